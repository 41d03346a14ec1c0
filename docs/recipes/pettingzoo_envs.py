"""One policy for a team of PettingZoo's: each of its agents is a row of the batch.

Beside the scripts:
    pip install pettingzoo supersuit pygame scipy
    python ppo_discrete.py --env-id pettingzoo_envs:Pursuit-v0 --num-envs 32 --eval-episodes 32

Both numbers must be multiples of Pursuit's 8 agents. Any other parallel environment fits if all of
its agents see and do the same kind of thing and end together.
"""

from typing import Any

import gymnasium as gym
import numpy as np
import supersuit
from pettingzoo.sisl.pursuit.pursuit import parallel_env


class Teams(gym.vector.VectorEnv):
    """SuperSuit resets a team in the step that ends it; the scripts want it one step later."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}

    def __init__(self, num_envs: int, agents: int = 8, **kwargs: Any):
        assert num_envs % agents == 0, f"{num_envs} environments: no multiple of {agents} agents"
        teams = [parallel_env(n_pursuers=agents, **kwargs) for _ in range(num_envs // agents)]
        flat = [supersuit.flatten_v0(team) for team in teams]
        self.teams = [supersuit.pettingzoo_env_to_vec_env_v1(team) for team in flat]
        self.fresh: list[Any] = [None] * len(teams)  # observations after a reset, not yet shown
        self.num_envs, spaces = num_envs, (flat[0].observation_space, flat[0].action_space)
        self.single_observation_space, self.single_action_space = (x("pursuer_0") for x in spaces)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        self.fresh = [None] * len(self.teams)
        seeds = [seed if seed is None else seed + i for i in range(len(self.teams))]
        return np.concatenate([x.reset(seed)[0] for x, seed in zip(self.teams, seeds)]), {}

    def step(self, actions: np.ndarray) -> tuple[Any, Any, Any, Any, dict]:
        parts = map(self.step_team, range(len(self.teams)), np.split(actions, len(self.teams)))
        return *map(np.concatenate, zip(*parts)), {}

    def step_team(self, i: int, actions: np.ndarray) -> tuple[Any, ...]:
        obs, self.fresh[i] = self.fresh[i], None
        if obs is not None:  # it ended in the last step: this one only shows the reset
            return obs, np.zeros(len(obs)), *np.zeros((2, len(obs)), bool)
        obs, rewards, terminated, truncated, infos = self.teams[i].step(actions)
        if (terminated | truncated).all():
            self.fresh[i], obs = obs, np.stack([info["terminal_observation"] for info in infos])
        return obs, rewards, terminated.astype(bool), truncated.astype(bool)


gym.register("Pursuit-v0", vector_entry_point=Teams)
