"""Run the work of benchmarks/speed.py with skrl.

Its own ways: Gymnasium's vector environments, two models, RandomMemory, SequentialTrainer,
TensorBoard. Its value loss is not halved, hence vf_coef / 2; advantages are normalised over the
batch. Observations and rewards are normalised by Gymnasium's wrappers, as in CleanRL.
"""

import tempfile

import gymnasium as gym
import torch
from common import settings, tick
from networks import mlp, normalised
from skrl.agents.torch.ppo import PPO
from skrl.envs.wrappers.torch import wrap_env
from skrl.memories.torch import RandomMemory
from skrl.models.torch import CategoricalMixin, DeterministicMixin, GaussianMixin, Model
from skrl.trainers.torch import SequentialTrainer
from skrl.utils import set_seed
from torch import nn

s = settings()
torch.set_num_threads(s.threads)
set_seed(s.seed)
if s.normalise:
    makers = [lambda: normalised(s.env_id, s.gamma)] * s.num_envs
    env = wrap_env(gym.vector.SyncVectorEnv(makers))
else:
    env = wrap_env(gym.make_vec(s.env_id, s.num_envs))
discrete = isinstance(env.action_space, gym.spaces.Discrete)
spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
obs_dim = env.observation_space.shape[0]


class Discrete(CategoricalMixin, Model):
    def __init__(self):
        Model.__init__(self, **spaces, device="cpu")
        CategoricalMixin.__init__(self)
        self.net = mlp(obs_dim, env.action_space.n, s.activation, 0.01)

    def compute(self, inputs, role=""):
        return self.net(inputs["observations"]), {}


class Gaussian(GaussianMixin, Model):
    def __init__(self):
        Model.__init__(self, **spaces, device="cpu")
        GaussianMixin.__init__(self, clip_actions=False)
        self.net = mlp(obs_dim, env.action_space.shape[0], s.activation, 0.01)
        self.log_std = nn.Parameter(torch.zeros(env.action_space.shape[0]))

    def compute(self, inputs, role=""):
        return self.net(inputs["observations"]), {"log_std": self.log_std}


class Critic(DeterministicMixin, Model):
    def __init__(self):
        Model.__init__(self, **spaces, device="cpu")
        DeterministicMixin.__init__(self)
        self.net = mlp(obs_dim, 1, s.activation, 1.0)

    def compute(self, inputs, role=""):
        return self.net(inputs["observations"]), {}


def likeliest(obs):
    with torch.no_grad():
        return policy.net(torch.as_tensor(obs)).argmax(-1).numpy()


class TickingPPO(PPO):
    def post_interaction(self, *, timestep, timesteps):
        super().post_interaction(timestep=timestep, timesteps=timesteps)
        if (timestep + 1) % s.num_steps == 0:
            tick((timestep + 1) * s.num_envs, likeliest if discrete else None)


policy = Discrete() if discrete else Gaussian()
agent = TickingPPO(
    models={"policy": policy, "value": Critic()},
    memory=RandomMemory(memory_size=s.num_steps, num_envs=s.num_envs, device="cpu"),
    **spaces,
    device="cpu",
    cfg={
        "rollouts": s.num_steps,
        "learning_epochs": s.update_epochs,
        "mini_batches": s.num_minibatches,
        "discount_factor": s.gamma,
        "gae_lambda": s.gae_lambda,
        "learning_rate": s.learning_rate,
        "learning_rate_scheduler": torch.optim.lr_scheduler.LambdaLR,  # is stepped every epoch
        "learning_rate_scheduler_kwargs": {
            "lr_lambda": lambda epoch: 1.0 - epoch // s.update_epochs / s.num_iterations
        },
        "grad_norm_clip": s.max_grad_norm,
        "ratio_clip": s.clip_coef,
        "value_clip": s.clip_coef if s.clip_vloss else 0.0,
        "entropy_loss_scale": s.ent_coef,
        "value_loss_scale": s.vf_coef / 2,
        "experiment": {
            "directory": tempfile.mkdtemp(),
            "write_interval": s.num_steps,
            "checkpoint_interval": 0,
        },
    },
)
for group in agent.optimizer.param_groups:
    group["eps"] = 1e-5  # there is no setting for it
steps = s.num_iterations * s.num_steps
trainer = {"timesteps": steps, "headless": True, "disable_progressbar": True}
SequentialTrainer(env=env, agents=agent, cfg=trainer).train()
