"""Run the work of benchmarks/speed.py with rlox: its data in Rust, its networks in PyTorch.

Its own ways: CartPole in Rust, other environments of Gymnasium, VecNormalize, TensorBoard. Its
networks are separate, 64-64, orthogonal and tanh; its value loss is halved as ours is.
"""

import tempfile

import torch
from common import settings, tick
from rlox import Callback, Trainer
from rlox.logging import TensorBoardLogger
from rlox.policies import DiscretePolicy
from torch import nn

s = settings()
torch.set_num_threads(s.threads)
torch.manual_seed(s.seed)


class Tick(Callback):
    rows = 0

    def on_step(self, algo, **_) -> bool:  # once an iteration
        self.rows += s.batch_size
        tick(self.rows, lambda obs: algo.predict(obs).numpy())
        return True


trainer = Trainer(
    "ppo",
    env=s.env_id,
    seed=s.seed,
    callbacks=[Tick()],
    logger=TensorBoardLogger(tempfile.mkdtemp()),
    config={
        "n_envs": s.num_envs,
        "n_steps": s.num_steps,
        "n_epochs": s.update_epochs,
        "batch_size": s.minibatch_size,
        "learning_rate": s.learning_rate,
        "gamma": s.gamma,
        "gae_lambda": s.gae_lambda,
        "clip_eps": s.clip_coef,
        "clip_vloss": s.clip_vloss,
        "ent_coef": s.ent_coef,
        "vf_coef": s.vf_coef,
        "max_grad_norm": s.max_grad_norm,
        "normalize_obs": s.normalise,
        "normalize_rewards": s.normalise,
    },
)
if s.activation == "relu":  # which it has no setting for
    policy: DiscretePolicy = trainer.algo.policy
    for net in (policy.actor, policy.critic):
        net[1], net[3] = nn.ReLU(), nn.ReLU()
trainer.train(s.num_iterations * s.batch_size)
