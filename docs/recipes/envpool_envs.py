"""EnvPool's environments, which run in threads of C++.

Beside the scripts:
    pip install envpool
    python ppo_discrete.py --env-id envpool_envs:EnvPool/CartPole-v1
"""

from typing import Any

import envpool
import gymnasium as gym
import numpy as np

TASKS = ["CartPole-v1", "Acrobot-v1", "Pendulum-v1", "HalfCheetah-v4"]  # and any other of EnvPool's


class Pool(gym.vector.VectorEnv):
    """EnvPool resets one step late, as the scripts want it, but is seeded when it is made."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}

    def __init__(self, num_envs: int, **kwargs: Any):
        self.num_envs, self.kwargs = num_envs, kwargs | {"num_envs": num_envs}
        self.pool = envpool.make(env_type="gymnasium", **self.kwargs)
        self.single_observation_space = self.pool.single_observation_space
        self.single_action_space = self.pool.single_action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        if seed is not None:
            self.pool = envpool.make(env_type="gymnasium", seed=seed % 2**31, **self.kwargs)
        return self.pool.reset()[0], {}

    def step(self, actions: np.ndarray) -> tuple[Any, Any, Any, Any, dict]:
        return *self.pool.step(actions)[:4], {}


for task in TASKS:
    gym.register(f"EnvPool/{task}", vector_entry_point=Pool, kwargs={"task_id": task})
