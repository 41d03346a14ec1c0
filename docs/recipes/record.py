"""Record demonstrations for cloning.patch: push the cart to the side the pole is falling to."""

import gymnasium as gym
import numpy as np

envs = gym.make_vec("CartPole-v1", num_envs=8)
obs, _ = envs.reset(seed=1)
seen, taken = [], []
for _ in range(500):
    actions = (obs[:, 2] + 0.2 * obs[:, 3] > 0.0).astype(np.int64)
    seen.append(obs)
    taken.append(actions[:, None])  # one part
    obs, *_ = envs.step(actions)
np.savez("demos.npz", obs=np.concatenate(seen), actions=np.concatenate(taken))
