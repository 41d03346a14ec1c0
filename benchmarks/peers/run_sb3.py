"""Run the work of benchmarks/speed.py with Stable-Baselines3, SBX, or sb3-contrib's RecurrentPPO.

Its own ways: DummyVecEnv, VecNormalize, clip_range_vf for the value clip, TensorBoard every
iteration. It halves no value loss, hence vf_coef / 2, and takes Adam's eps 1e-5 by itself. SBX is
the same in JAX; it ignores clip_range_vf.
"""

import sys
import tempfile
from typing import Any

import torch
from common import settings, tick
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

s = settings()
torch.set_num_threads(s.threads)


class Tick(BaseCallback):
    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:  # all of the iteration before is done
        if self.num_timesteps:
            tick(self.num_timesteps, lambda obs: self.model.predict(obs, deterministic=True)[0])


algorithm: Any = PPO
policy, wrapper = "MlpPolicy", None
network: dict[str, Any] = {
    "activation_fn": torch.nn.Tanh if s.activation == "tanh" else torch.nn.ReLU
}
if "sbx" in sys.argv:
    import jax
    import sbx

    algorithm = sbx.PPO
    network = {"activation_fn": jax.numpy.tanh if s.activation == "tanh" else jax.nn.relu}
    network |= {"net_arch": [64, 64], "ortho_init": True}
if "recurrent" in sys.argv:
    from sb3_contrib import RecurrentPPO

    from benchmarks.lstm import hide

    algorithm, policy, wrapper = RecurrentPPO, "MlpLstmPolicy", hide
    network |= {"lstm_hidden_size": 64, "net_arch": {"pi": [64], "vf": [64]}}
envs = make_vec_env(s.env_id, s.num_envs, seed=s.seed, wrapper_class=wrapper)
if s.normalise:
    envs = VecNormalize(envs, gamma=s.gamma)
model = algorithm(
    policy,
    envs,
    n_steps=s.num_steps,
    batch_size=s.minibatch_size,
    n_epochs=s.update_epochs,
    learning_rate=lambda left: s.learning_rate * left,
    gamma=s.gamma,
    gae_lambda=s.gae_lambda,
    clip_range=lambda left: s.clip_coef * (left if s.anneal_clip else 1.0),
    clip_range_vf=s.clip_coef if s.clip_vloss else None,
    ent_coef=s.ent_coef,
    vf_coef=s.vf_coef / 2,
    max_grad_norm=s.max_grad_norm,
    policy_kwargs=network,
    device="cpu",
    seed=s.seed,
    tensorboard_log=tempfile.mkdtemp(),
)
rows = s.num_iterations * s.batch_size
model.learn(rows, callback=Tick(), log_interval=1)
tick(rows, lambda obs: model.predict(obs, deterministic=True)[0])
