"""Run the work of benchmarks/speed.py with Tianshou.

Its own ways: DummyVectorEnv, Collector, OnPolicyTrainer, TensorBoard, VectorEnvNormObs and
return_scaling for the normalisation. Its value loss is not halved, hence vf_coef / 2. It computes
values and log-probabilities in a pass after the rollout, as we do; max_batchsize lets that be one.
"""

import tempfile

import gymnasium as gym
import numpy as np
import torch
from common import settings, tick
from networks import mlp
from tianshou.algorithm import PPO
from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy, ProbabilisticActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory, LRSchedulerFactoryLinear
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv, VectorEnvNormObs
from tianshou.trainer import OnPolicyTrainerParams
from tianshou.utils import TensorboardLogger
from tianshou.utils.net.common import ModuleWithVectorOutput
from tianshou.utils.net.continuous import ContinuousActorProbabilistic, ContinuousCritic
from tianshou.utils.net.discrete import DiscreteActor, DiscreteCritic
from torch import nn
from torch.distributions import Independent, Normal
from torch.utils.tensorboard import SummaryWriter

s = settings()
torch.set_num_threads(s.threads)
np.random.seed(s.seed)
torch.manual_seed(s.seed)
space = gym.make(s.env_id)
envs = DummyVectorEnv([lambda: gym.make(s.env_id) for _ in range(s.num_envs)])
if s.normalise:
    envs = VectorEnvNormObs(envs)
envs.seed(s.seed)
discrete = isinstance(space.action_space, gym.spaces.Discrete)
obs_dim = space.observation_space.shape[0]


class Trunk(ModuleWithVectorOutput):
    """The hidden layers; Tianshou's actors and critics bring the last one."""

    def __init__(self):
        super().__init__(64)
        *layers, _ = mlp(obs_dim, 1, s.activation, 1.0)
        self.layers = nn.Sequential(*layers)

    def forward(self, obs, state=None, info=None):
        return self.layers(torch.as_tensor(obs, dtype=torch.float32)), state


def initialise(head: nn.Module, gain: float) -> None:
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)


if discrete:
    shape = int(space.action_space.n)
    actor = DiscreteActor(preprocess_net=Trunk(), action_shape=shape, softmax_output=False)
    critic = DiscreteCritic(preprocess_net=Trunk())
    initialise(actor.last, 0.01)
    policy = DiscreteActorPolicy(actor=actor, action_space=space.action_space)
else:
    actor = ContinuousActorProbabilistic(
        preprocess_net=Trunk(), action_shape=space.action_space.shape, unbounded=True
    )
    critic = ContinuousCritic(preprocess_net=Trunk())
    initialise(actor.mu, 0.01)
    policy = ProbabilisticActorPolicy(
        actor=actor,
        dist_fn=lambda mean_std: Independent(Normal(*mean_std), 1),
        action_space=space.action_space,
        action_scaling=False,
        action_bound_method="clip",
    )
initialise(critic.last, 1.0)

# One trainer's epoch is one iteration, so that its end can be told.
epochs = {"max_epochs": s.num_iterations, "epoch_num_steps": s.batch_size}
optim = AdamOptimizerFactory(lr=s.learning_rate, eps=1e-5)
optim.with_lr_scheduler_factory(
    LRSchedulerFactoryLinear(**epochs, collection_step_num_env_steps=s.batch_size)
)
algorithm = PPO(
    policy=policy,
    critic=critic,
    optim=optim,
    eps_clip=s.clip_coef,
    value_clip=s.clip_vloss,
    advantage_normalization=True,
    vf_coef=s.vf_coef / 2,
    ent_coef=s.ent_coef,
    max_grad_norm=s.max_grad_norm,
    gae_lambda=s.gae_lambda,
    gamma=s.gamma,
    return_scaling=s.normalise,
    max_batchsize=s.batch_size,
)


def likeliest(obs):
    with torch.no_grad():
        return actor(torch.as_tensor(obs))[0].argmax(-1).numpy()


def at_the_start(epoch: int, rows: int) -> None:
    if rows:
        tick(rows, likeliest if discrete else None)


buffer = VectorReplayBuffer(s.batch_size, s.num_envs)
algorithm.run_training(
    OnPolicyTrainerParams(
        training_collector=Collector(algorithm, envs, buffer),
        **epochs,
        collection_step_num_env_steps=s.batch_size,
        update_step_num_repetitions=s.update_epochs,
        batch_size=s.minibatch_size,
        training_fn=at_the_start,
        logger=TensorboardLogger(SummaryWriter(tempfile.mkdtemp())),
        show_progress=False,
        verbose=False,
    )
)
tick(s.num_iterations * s.batch_size, likeliest if discrete else None)
