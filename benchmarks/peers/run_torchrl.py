"""Run the work of benchmarks/speed.py with torchrl.

Its own ways, as in its sota-implementations: GymWrapper, Collector, vectorised GAE, replay buffer
without replacement, ClipPPOLoss; TensorBoard by hand. Its value loss is not halved, hence
vf_coef / 2. Observations and rewards are normalised by Gymnasium's wrappers, as in CleanRL.
"""

import tempfile

import gymnasium as gym
import torch
from common import settings, tick
from networks import mlp, normalised
from tensordict.nn import AddStateIndependentNormalScale, TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torch.utils.tensorboard import SummaryWriter
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from torchrl.envs import GymWrapper, RewardSum, SerialEnv, TransformedEnv
from torchrl.modules import IndependentNormal, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

s = settings()
torch.set_num_threads(s.threads)
torch.manual_seed(s.seed)


def make_env():
    env = normalised(s.env_id, s.gamma) if s.normalise else gym.make(s.env_id)
    return GymWrapper(env, categorical_action_encoding=True)


env = make_env() if s.num_envs == 1 else SerialEnv(s.num_envs, make_env)
env = TransformedEnv(env, RewardSum())
env.set_seed(s.seed)
space = gym.make(s.env_id)
discrete = isinstance(space.action_space, gym.spaces.Discrete)
obs_dim = space.observation_space.shape[0]
if discrete:
    net = mlp(obs_dim, space.action_space.n, s.activation, 0.01)
    keys, distribution = ["logits"], Categorical
else:
    num_actions = space.action_space.shape[0]
    scale = AddStateIndependentNormalScale(num_actions, scale_mapping="exp", scale_lb=1e-8)
    net = nn.Sequential(mlp(obs_dim, num_actions, s.activation, 0.01), scale)
    keys, distribution = ["loc", "scale"], IndependentNormal
actor = ProbabilisticActor(
    TensorDictModule(net, in_keys=["observation"], out_keys=keys),
    in_keys=keys,
    spec=env.full_action_spec_unbatched,
    distribution_class=distribution,
    return_log_prob=True,
)
critic = ValueOperator(mlp(obs_dim, 1, s.activation, 1.0), in_keys=["observation"])
total = s.num_iterations * s.batch_size
collector = Collector(env, actor, frames_per_batch=s.batch_size, total_frames=total)
buffer = TensorDictReplayBuffer(
    storage=LazyTensorStorage(s.batch_size),
    sampler=SamplerWithoutReplacement(),
    batch_size=s.minibatch_size,
)
advantage = GAE(gamma=s.gamma, lmbda=s.gae_lambda, value_network=critic, average_gae=False)
loss_module = ClipPPOLoss(
    actor,
    critic,
    clip_epsilon=s.clip_coef,
    loss_critic_type="l2",
    clip_value=s.clip_vloss,
    entropy_coeff=s.ent_coef,
    critic_coeff=s.vf_coef / 2,
    normalize_advantage=True,
)
parameters = [*actor.parameters(), *critic.parameters()]
optimizer = torch.optim.Adam(parameters, lr=s.learning_rate, eps=1e-5)
writer = SummaryWriter(tempfile.mkdtemp())


def likeliest(obs):
    with torch.no_grad():
        return net(torch.as_tensor(obs)).argmax(-1).numpy()


for iteration, data in enumerate(collector):
    optimizer.param_groups[0]["lr"] = s.learning_rate * (1.0 - iteration / s.num_iterations)
    with torch.no_grad():
        advantage(data)
    for _ in range(s.update_epochs):
        buffer.extend(data.reshape(-1))
        for batch in buffer:
            losses = loss_module(batch)
            loss = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, s.max_grad_norm)
            optimizer.step()
    rows = (iteration + 1) * s.batch_size
    episodes = data["next", "episode_reward"][data["next", "done"]]
    if len(episodes):
        writer.add_scalar("charts/episodic_return", episodes.mean().item(), rows)
    for name in ("loss_objective", "loss_critic", "loss_entropy", "entropy", "kl_approx"):
        writer.add_scalar(f"losses/{name}", losses[name].mean().item(), rows)
    tick(rows, likeliest if discrete else None)
collector.shutdown()
