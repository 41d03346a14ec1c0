"""Learn the classic tasks with our scripts and Stable-Baselines3, with the same number of steps.

    python -m benchmarks.classic --processes 2             # 10 seeds, lines of classic.csv
    python -m benchmarks.tables --table classic.csv        # the table, with published figures

Stable-Baselines3 has the hyperparameters that rl-baselines3-zoo lists for each task. Ours are the
defaults with the flags below; those of ppo_discrete.py were chosen on seeds 100 to 239 of CartPole.
"""

from dataclasses import dataclass

import tyro

from benchmarks.jobs import ROOT
from benchmarks.run import SeededArgs, Training, train_all

SB3 = ROOT / "benchmarks" / "peers" / "learn_sb3.py"
DISCRETE, CONTINUOUS = "ppo_discrete.py", "ppo_continuous.py"
# Environment, steps, our script and its flags.
TASKS = [
    ("CartPole-v1", 50_000, DISCRETE, ""),
    ("Acrobot-v1", 250_000, DISCRETE, ""),
    ("MountainCar-v0", 1_000_000, DISCRETE, "--norm-obs --activation tanh"),
    ("LunarLander-v3", 1_000_000, DISCRETE, ""),
    ("Pendulum-v1", 150_000, CONTINUOUS, "--gamma 0.9 --learning-rate 1e-3 --activation relu"),
]


@dataclass
class Args(SeededArgs):
    """Learn the classic tasks with our scripts and with Stable-Baselines3."""

    seeds: tuple[int, ...] = tuple(range(1, 11))
    quick: bool = False  # CartPole and Pendulum, 2 seeds, a fifth of the steps


def main() -> None:
    args = tyro.cli(Args)
    if args.quick:
        args.env_ids, args.seeds = ("CartPole-v1", "Pendulum-v1"), (1, 2)
    trainings = []
    for seed in args.seeds:
        for env_id, steps, script, more in TASKS:
            budget = f"--total-timesteps {steps // 5 if args.quick else steps}"
            flags = f"{budget} --eval-episodes 100 {more}".strip()
            trainings += [
                Training(script, env_id, more or "default", seed, flags),
                Training("Stable-Baselines3", env_id, "its zoo's", seed, budget, [SB3]),
            ]
    train_all(trainings, args, "classic.csv")


if __name__ == "__main__":
    main()
