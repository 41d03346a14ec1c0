"""Published figures of others, shown beside ours."""

# The best published PPO at 1M steps, of versions v2 to v4: T Tianshou (v3, 10 seeds, the maximum
# over training), B Baselines (v2, 6 seeds, rerun by Huang et al.), C CleanRL (v4, 3 seeds).
MUJOCO = {
    "HalfCheetah-v5": "5,784 ± 1,244 T",
    "Hopper-v5": "2,609 ± 701 T",
    "Walker2d-v5": "3,588 ± 757 T",
    "Ant-v5": "3,258 ± 1,079 T",
    "Humanoid-v5": "787 ± 194 T",
    "Swimmer-v5": "111 B",
    "Reacher-v5": "-4.1 ± 0.3 T",
    "Pusher-v5": "-40.4 ± 7.2 C",
    "InvertedPendulum-v5": "1,000 ± 0 T",
    "InvertedDoublePendulum-v5": "9,231 ± 270 T",
}
# B as above after 500k steps, Z rl-baselines3-zoo: one run, with the task's own settings.
CLASSIC = {
    "CartPole-v1": "497.5 ± 4.0 B, 500 Z (100k)",
    "Acrobot-v1": "-81.8 ± 5.6 B, -73.5 Z (1M)",
    "MountainCar-v0": "-200 B, -110.4 Z (1M)",
    "LunarLander-v3": "242.1 Z (1M)",
    "Pendulum-v1": "-172.2 Z (100k)",
}
