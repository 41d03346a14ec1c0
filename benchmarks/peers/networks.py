"""The networks and wrappers of the peers' runners: what CleanRL has, for libraries that have none.

Two separate networks of 64-64 units, orthogonal weights, zero biases.
"""

import gymnasium as gym
import numpy as np
from torch import nn


def mlp(inputs: int, outputs: int, activation: str, head_gain: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    sizes = (int(inputs), 64, 64, int(outputs))
    for size, next_size, gain in zip(sizes, sizes[1:], (2**0.5, 2**0.5, head_gain)):
        linear = nn.Linear(size, next_size)
        nn.init.orthogonal_(linear.weight, gain)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh() if activation == "tanh" else nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def normalised(env_id: str, gamma: float) -> gym.Env:
    """Make an environment with CleanRL's chain of wrappers."""
    env: gym.Env = gym.wrappers.ClipAction(gym.make(env_id))
    env = gym.wrappers.NormalizeObservation(env)
    space = env.observation_space
    env = gym.wrappers.TransformObservation(env, lambda obs: np.clip(obs, -10, 10), space)
    env = gym.wrappers.NormalizeReward(env, gamma=gamma)
    return gym.wrappers.TransformReward(env, lambda reward: np.clip(reward, -10, 10))
