"""What every contender of benchmarks/speed.py runs with: its settings, a clock and a test.

A contender calls `tick(rows, policy)` at the end of each iteration. That prints a JSON line with
the rows so far, the time and the processor's time. With BENCHMARK_SOLVE in the environment it also
asks, every 2,000 rows or so, whether CartPole is solved, with the clock stopped. With
BENCHMARK_COUNT it also tells how many environment steps and optimiser steps were done.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

SOLVED = 475.0  # Gymnasium's threshold for CartPole-v1
LOOK_EVERY = 2_000  # rows


@dataclass
class Settings:
    """PPO's hyperparameters, by the names of CleanRL's flags and ours."""

    env_id: str = "CartPole-v1"
    total_timesteps: int = 60_000
    seed: int = 1
    num_envs: int = 4
    num_steps: int = 128
    update_epochs: int = 4
    num_minibatches: int = 4
    learning_rate: float = 2.5e-4
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip_coef: float = 0.2
    clip_vloss: bool = True
    ent_coef: float = 0.01
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5
    activation: str = "tanh"
    normalise: bool = False  # observations and rewards
    anneal_clip: bool = False  # only Stable-Baselines3 can, and only its zoo does
    threads: int = 1

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def minibatch_size(self) -> int:
        return self.batch_size // self.num_minibatches

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.batch_size


def settings() -> Settings:
    """Read the settings, a JSON object, from the command line."""
    return Settings(**json.loads(sys.argv[1]))


@dataclass
class Clock:
    paused: float = 0.0  # seconds spent looking
    next_look: int = LOOK_EVERY


CLOCK, COUNTS = Clock(), dict[str, int]()


def tick(rows: int, policy: Callable | None = None) -> None:
    """Report the end of an iteration; leave the process once CartPole is solved, if asked to.

    `policy` takes observations (N, D) to the likeliest actions (N,), in NumPy.
    """
    now = time.time()
    line = {"rows": rows, "time": now - CLOCK.paused, "cpu": time.process_time(), **COUNTS}
    if "BENCHMARK_SOLVE" in os.environ and policy is not None and rows >= CLOCK.next_look:
        CLOCK.next_look = rows + LOOK_EVERY
        line["score"] = evaluate(policy)
        CLOCK.paused += time.time() - now
    print(json.dumps(line), flush=True)
    if line.get("score", 0.0) >= SOLVED:
        os._exit(0)  # at once: a library may catch SystemExit, and nothing after it counts


def evaluate(policy: Callable, episodes: int = 100) -> float:
    """Return the mean return of CartPole over episodes, by the policy's likeliest actions."""
    import gymnasium
    import numpy as np

    envs = gymnasium.make_vec("CartPole-v1", episodes)
    obs, _ = envs.reset(seed=12345)
    returns, running = np.zeros(episodes), np.ones(episodes, bool)
    while running.any():
        obs, reward, terminated, truncated, _ = envs.step(np.asarray(policy(obs)).reshape(-1))
        returns[running] += reward[running]
        running &= ~(terminated | truncated)
    envs.close()
    return float(returns.mean())


def count_work() -> None:
    """Count what is done, below every library: Gymnasium's steps and PyTorch's optimiser steps."""
    import gymnasium as gym
    from gymnasium.envs.classic_control import cartpole
    from torch.optim.optimizer import register_optimizer_step_post_hook

    COUNTS.update(env_steps=0, gradient_steps=0)

    def optimiser_stepped(*_: object) -> None:
        COUNTS["gradient_steps"] += 1

    def count(cls: type) -> None:
        step = cls.step

        def counted(self, action):  # type: ignore[no-untyped-def]
            COUNTS["env_steps"] += getattr(self, "num_envs", 1)
            return step(self, action)

        cls.step = counted  # type: ignore[attr-defined]

    register_optimizer_step_post_hook(optimiser_stepped)
    count(cartpole.CartPoleEnv)
    count(cartpole.CartPoleVectorEnv)
    with contextlib.suppress(ImportError, gym.error.DependencyNotInstalled):
        from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv

        count(HalfCheetahEnv)
    with contextlib.suppress(ImportError):
        from ale_py.vector_env import AtariVectorEnv

        count(AtariVectorEnv)
    with contextlib.suppress(ImportError):
        from cleanrl_utils.atari_wrappers import ClipRewardEnv

        count(ClipRewardEnv)


if "BENCHMARK_COUNT" in os.environ:
    count_work()
