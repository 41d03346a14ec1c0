"""Environments to try the recipes on: copy this file beside the script, then --env-id tasks:..."""

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.spaces import Box, Dict, Discrete


class PositionsOnly(gym.ObservationWrapper):
    """CartPole that shows where cart and pole are, but not how fast they move."""

    def __init__(self, render_mode: str | None = None):
        super().__init__(CartPoleEnv(render_mode=render_mode))
        self.observation_space = Box(-np.inf, np.inf, (2,), np.float32)

    def observation(self, observation):
        return observation[[0, 2]]


class Recall(gym.Env):
    """The first observation is a cue; to do the same in each of the four steps after it pays 1."""

    observation_space = Box(-1.0, 1.0, (1,), np.float32)
    action_space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cue, self.steps = int(self.np_random.integers(2)), 0
        return np.array([2.0 * self.cue - 1.0], np.float32), {}

    def step(self, action):
        self.steps += 1
        reward = float(self.steps > 1 and action == self.cue)
        return np.zeros(1, np.float32), reward, self.steps == 5, False, {}


class BarAndNumber(gym.Env):
    """An image shows one of three bars, a vector one of three numbers; their sum modulo 3 pays 1.

    Ten steps: 10 at best, 3.3 for whoever sees only the image or only the vector.
    """

    observation_space = Dict(
        {"image": Box(0, 255, (24, 24, 1), np.uint8), "vector": Box(0.0, 1.0, (3,), np.float32)}
    )
    action_space = Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action):
        reward = float(action == (self.bar + self.number) % 3)
        self.steps += 1
        return self.observe(), reward, False, self.steps == 10, {}

    def observe(self):
        self.bar, self.number = self.np_random.integers(3, size=2)
        image = np.zeros((24, 24, 1), np.uint8)
        image[:, 8 * self.bar : 8 * self.bar + 8] = 255
        return {"image": image, "vector": np.eye(3, dtype=np.float32)[self.number]}


class Spot(gym.Env):
    """A bright column on a dark image; the nearer the action is to its position, the better.

    Fifty steps: random actions earn about -33, and -25 is the best that the blind can do.
    """

    observation_space = Box(0, 255, (64, 64, 3), np.uint8)
    action_space = Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action):
        reward = -abs(float(action[0]) - (self.column / 31.5 - 1.0))
        self.steps += 1
        return self.observe(), reward, False, self.steps == 50, {}

    def observe(self):
        self.column = int(self.np_random.integers(64))
        image = np.zeros((64, 64, 3), np.uint8)
        image[:, self.column] = 255
        return image


gym.register("PositionsOnly-v0", PositionsOnly, max_episode_steps=500)
for cls in (Recall, BarAndNumber, Spot):
    gym.register(f"{cls.__name__}-v0", cls)
