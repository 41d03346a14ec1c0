"""MiniGrid's environments with what the agent sees, and where it faces, as one vector.

Beside the scripts:
    pip install minigrid
    python ppo_discrete.py --env-id minigrid_envs:Grid/Empty-5x5-v0

The mission is left out: it is a sentence. In Empty it is always the same.
"""

from typing import Any

import gymnasium as gym
import minigrid  # noqa: F401  (registers MiniGrid-Empty-5x5-v0 and the others)


def make(name: str, **kwargs: Any) -> gym.Env:
    """Make an environment without its mission."""
    return gym.wrappers.FilterObservation(gym.make(name, **kwargs), ["image", "direction"])


for name in [name for name in gym.registry if name.startswith("MiniGrid-")]:
    gym.register(name.replace("MiniGrid-", "Grid/"), make, kwargs={"name": name})
