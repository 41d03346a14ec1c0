"""Train Stable-Baselines3's PPO with rl-baselines3-zoo's settings, for benchmarks/classic.py.

With --recurrent, it is sb3-contrib's RecurrentPPO without velocities, for benchmarks/lstm.py.

It takes our scripts' flags and writes what they write, results.json and metrics.csv, so that the
same runner reads it. Evaluation is ours: 100 episodes on fresh environments, each in one of its
own, with the statistics of the normaliser frozen, deterministic and stochastic.
"""

import csv
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from sb3_contrib import RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from benchmarks.lstm import hide


@dataclass
class Args:
    """Train and evaluate."""

    env_id: str
    seed: int
    total_timesteps: int
    recurrent: bool = False
    run_dir: Path = Path("runs/sb3")


def falling(start: float):
    return lambda left: start * left


# From hyperparams/ppo.yml of rl-baselines3-zoo; "envs" and "normalize" are not arguments of PPO.
ZOO: dict[str, dict] = {
    "CartPole-v1": {
        "envs": 8, "n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98,
        "n_epochs": 20, "learning_rate": falling(1e-3), "clip_range": falling(0.2),
    },
    "Acrobot-v1": {
        "envs": 16, "normalize": True, "n_steps": 256, "gae_lambda": 0.94, "gamma": 0.99,
        "n_epochs": 4,
    },
    "MountainCar-v0": {
        "envs": 16, "normalize": True, "n_steps": 16, "gae_lambda": 0.98, "gamma": 0.99,
        "n_epochs": 4,
    },
    "LunarLander-v3": {
        "envs": 16, "n_steps": 1024, "batch_size": 64, "gae_lambda": 0.98, "gamma": 0.999,
        "n_epochs": 4, "ent_coef": 0.01,
    },
    "Pendulum-v1": {
        "envs": 4, "n_steps": 1024, "gae_lambda": 0.95, "gamma": 0.9, "n_epochs": 10,
        "learning_rate": 1e-3, "use_sde": True, "sde_sample_freq": 4,
    },
}  # fmt: skip
# From hyperparams/ppo_lstm.yml at 22e3ff2. Its CartPole and LunarLander are without velocities and
# marked as tuned; Acrobot is neither, and gets the network that both of them have.
RECURRENT_ZOO = {
    "CartPole-v1": ZOO["CartPole-v1"] | {"normalize": True},
    "Acrobot-v1": ZOO["Acrobot-v1"],
    "LunarLander-v3": ZOO["LunarLander-v3"] | {
        "envs": 32, "normalize": True, "n_steps": 512, "batch_size": 128,
    },
}  # fmt: skip
RECURRENT_NETWORK = {
    "lstm_hidden_size": 64, "enable_critic_lstm": True, "net_arch": {"pi": [64], "vf": [64]},
    "activation_fn": torch.nn.ReLU, "ortho_init": False,
}  # fmt: skip


class Curve(BaseCallback):
    """Notes the mean return of the episodes that ended since the last rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, float]] = []
        self.returns: list[float] = []
        self.episodes: list[float] = []

    def _on_step(self) -> bool:
        infos = self.locals["infos"]
        self.returns += [info["episode"]["r"] for info in infos if "episode" in info]
        return True

    def _on_rollout_end(self) -> None:
        mean = float(np.mean(self.returns)) if self.returns else float("nan")
        self.rows.append((self.num_timesteps, mean))
        self.episodes, self.returns = self.episodes + self.returns, []


def make_envs(args: Args, num_envs: int, seed: int) -> Any:
    return make_vec_env(
        args.env_id, num_envs, seed=seed, wrapper_class=hide if args.recurrent else None
    )


def evaluate(model: Any, args: Args, deterministic: bool, episodes: int = 100) -> np.ndarray:
    """Return the returns of one episode in each environment."""
    envs = make_envs(args, episodes, seed=12345)
    trained = model.get_vec_normalize_env()
    if trained is not None:
        envs = VecNormalize(envs, training=False, norm_reward=False)
        envs.obs_rms = trained.obs_rms
    obs, returns, running = envs.reset(), np.zeros(episodes), np.ones(episodes, bool)
    state, begins = None, running
    while running.any():
        actions, state = model.predict(obs, state, begins, deterministic)
        obs, rewards, begins, _ = envs.step(actions)
        returns[running] += rewards[running]
        running = running & ~begins
    return returns


def main() -> None:
    args = tyro.cli(Args)
    torch.set_num_threads(1)
    args.run_dir.mkdir(parents=True, exist_ok=True)
    settings = dict((RECURRENT_ZOO if args.recurrent else ZOO)[args.env_id])
    envs = make_envs(args, settings.pop("envs"), args.seed)
    if settings.pop("normalize", False):
        envs = VecNormalize(envs, gamma=settings["gamma"])
    settings |= {"seed": args.seed, "device": "cpu", "tensorboard_log": tempfile.mkdtemp()}
    model: Any
    if args.recurrent:
        model = RecurrentPPO("MlpLstmPolicy", envs, **settings, policy_kwargs=RECURRENT_NETWORK)
    else:
        model = PPO("MlpPolicy", envs, **settings)
    curve, start = Curve(), time.perf_counter()
    model.learn(args.total_timesteps, callback=curve, log_interval=1)
    sps = int(model.num_timesteps / (time.perf_counter() - start))
    with open(args.run_dir / "metrics.csv", "w", newline="") as file:
        csv.writer(file).writerows([("global_step", "charts/episodic_return"), *curve.rows])
    likeliest, sampled = (evaluate(model, args, d) for d in (True, False))
    last = curve.episodes[-100:]
    results = {
        "global_step": model.num_timesteps,
        "eval_mean": likeliest.mean(),
        "eval_std": likeliest.std(),
        "eval_stochastic_mean": sampled.mean(),
        "eval_episodes": 100,
        "train_return": float(np.mean(last)) if last else None,
        "sps": sps,
    }
    (args.run_dir / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
