# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "gymnasium", "numpy", "tensorboard", "tyro", "tqdm"]
# ///
"""PPO for continuous actions: one file, read top to bottom.

    python ppo_continuous.py --env-id Pendulum-v1 --total-timesteps 100000 --gamma 0.9

One iteration of `train`:
    [1] Rollout     the policy plays T steps in each of N environments
    [2] Advantages  the critic values every row in one pass, GAE turns rewards into advantages
    [3] Update      K epochs of shuffled minibatches on the clipped surrogate and the value loss
    [4] Log         means over the iteration, to TensorBoard, metrics.csv and the terminal

Shapes: T num_steps, N num_envs, D observation size, A action size, B real rows of a batch, M rows
of a minibatch. Episodes restart one step late (Gymnasium's NEXT_STEP autoreset): if one ends in row
t, then obs[t+1] is its true last observation, row t+1 is the reset (its action is ignored: it is
no transition, and nothing may learn from it), and obs[t+2] begins the next episode.

Papers: PPO (Schulman et al. 2017, arXiv 1707.06347), GAE (Schulman et al. 2016, 1506.02438).
"Detail n" counts as in "The 37 Implementation Details of PPO" (Huang et al. 2022).
"""

import dataclasses
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from gae import gae

LOG_2, LOG_2PI = math.log(2.0), math.log(2.0 * math.pi)
FAITHFUL: dict[str, Any] = {  # what Baselines and CleanRL use for MuJoCo
    "num_envs": 1,
    "num_steps": 2048,
    "num_minibatches": 32,
    "learning_rate": 3e-4,
    "desired_kl": None,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "recompute_advantages": False,
    "clip_vloss": True,
    "log_std_init": 0.0,
    "log_std_final": None,
    "scale_actions": False,
}


class UserError(ValueError):
    """A flag, an environment or a number to mend: one line on the command line, no traceback."""


@dataclasses.dataclass
class Args:
    """Train a PPO agent with continuous actions, then evaluate it."""

    # faithful: the flags below default to those of Baselines and CleanRL.
    config: Literal["strong", "faithful"] = "strong"
    env_id: str = "Pendulum-v1"  # Gymnasium environment with Box actions
    # Keyword arguments of the environment, such as ctrl_cost_weight=0.05.
    env_kwargs: tuple[str, ...] = ()
    # Default: the environment's own vectorised version, else sync. async suits slow environments.
    vectorization_mode: Literal["sync", "async", "vector_entry_point"] | None = None
    total_timesteps: int = 1_000_000  # environment steps, rounded down to whole batches
    seed: int = 1  # seed of the environments, the first weights, the sampling and the shuffling
    run_dir: Path | None = None  # default: runs/<env>__ppo_continuous__<seed>__<time>
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda only if the network is wide
    num_threads: int = 1  # PyTorch's CPU threads; more help wide networks only
    eval_episodes: int = 20  # episodes of each final evaluation, deterministic and stochastic

    learning_rate: float = 1e-3  # Adam's learning rate at the start
    anneal_lr: bool = True  # let the learning rate fall linearly to 0 (detail 4)
    # Move the learning rate up or down to keep approx_kl here; anneal_lr lets this fall instead.
    desired_kl: float | None = 0.025
    num_envs: int = 8  # N, parallel environments
    num_steps: int = 256  # T, steps of each environment in a rollout
    update_epochs: int = 10  # K, passes over the batch in an update
    num_minibatches: int = 8  # minibatches in an epoch
    gamma: float = 0.995  # discount factor
    gae_lambda: float = 0.92  # lambda of GAE: 0 trusts the critic, 1 the rewards
    recompute_advantages: bool = True  # before every epoch, by the critic as it is by then
    # Where advantages are brought to mean 0 and standard deviation 1; minibatch is detail 7.
    norm_adv: Literal["batch", "minibatch", "none"] = "minibatch"
    # PPO-Clip (eq. 7), or PPO-Penalty with an adaptive KL coefficient (eq. 8).
    objective: Literal["clip", "penalty"] = "clip"
    clip_coef: float = 0.2  # epsilon: moving the ratio further than this from 1 earns nothing
    clip_vloss: bool = False  # clip the value loss by clip_coef too (detail 9)
    ent_coef: float = 0.0  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # the gradient's global norm is clipped to this (detail 11)
    # clip: end an update after an epoch with a higher approx_kl. penalty: the KL to keep (0.01).
    target_kl: float | None = None
    kl_coef: float = 1.0  # penalty: the first KL coefficient, beta
    norm_obs: bool = True  # observations to mean 0, std 1, clipped to 10 (details 28, 29)
    norm_reward: bool = True  # by the std of the discounted return, clipped to 10 (30, 31)
    log_std_init: float = -0.8  # log standard deviation of the first policy's actions
    # It falls to this linearly, as in PPO's table 4; None lets the gradient choose it.
    log_std_final: float | None = -2.3
    scale_actions: bool = True  # the policy's [-1, 1] is the whole box, so a std means the same
    squash: bool = False  # squash actions into their box by tanh, rather than clip them
    hidden_size: int = 64  # units in each of the two hidden layers
    activation: Literal["relu", "tanh"] = "tanh"  # of the hidden layers; relu is a little faster

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.batch_size

    def check(self) -> None:
        """Raise `UserError` for a value or a combination that cannot work."""
        counts = "total_timesteps num_threads eval_episodes num_envs update_epochs num_minibatches"
        for names, low, high, rule in (
            (counts + " hidden_size", 1, np.inf, "must be at least 1"),
            ("num_steps", 2, np.inf, "must be at least 2, for every second row may be a reset"),
            ("seed ent_coef vf_coef", 0, sys.maxsize, "must not be negative"),
            ("gamma gae_lambda", 0, 1, "must lie in [0, 1]"),
            ("learning_rate desired_kl clip_coef max_grad_norm", 1e-99, 1e99, "must be > 0"),
            ("target_kl kl_coef", 1e-99, 1e99, "must be > 0"),
        ):
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not low <= value <= high:
                    raise UserError(f"--{name.replace('_', '-')} {value} {rule}")
        batch = f"--num-envs {self.num_envs} x --num-steps {self.num_steps} = {self.batch_size}"
        if self.batch_size < 2 * max(2, self.num_minibatches):  # one row has no standard deviation
            raise UserError(
                f"{batch} rows are too few for --num-minibatches {self.num_minibatches}"
            )
        if self.num_iterations < 1:
            raise UserError(f"--total-timesteps {self.total_timesteps} is below one batch, {batch}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch finds no CUDA device")


def make_envs(args: Args, num_envs: int) -> gym.vector.VectorEnv:
    """Make `num_envs` environments with observations (N, D); discrete parts become one-hot.

    Raises `UserError` for an environment that is unknown or that this script cannot serve.
    """
    kwargs = {}
    for pair in args.env_kwargs:
        name, _, text = pair.partition("=")
        try:
            kwargs[name] = json.loads(text.lower() if text in ("True", "False") else text)
        except json.JSONDecodeError:
            kwargs[name] = text
    flag = f"--env-id {args.env_id}:"
    try:
        envs = gym.make_vec(args.env_id, num_envs, args.vectorization_mode, **kwargs)
    except (gym.error.Error, ImportError, TypeError, ValueError) as error:
        hint = ' (pip install "gymnasium[atari]")' if "ALE/" in args.env_id else ""
        raise UserError(f"{flag} {' '.join(str(error).split())}{hint}") from error
    space = envs.single_action_space
    if not isinstance(space, gym.spaces.Box):
        other = ": use ppo_discrete.py" if isinstance(space, gym.spaces.Discrete) else ""
        raise UserError(f"{flag} its actions are {space}, not Box{other}")
    if args.squash and not space.is_bounded():
        raise UserError(f"{flag} --squash needs bounded actions, these are {space}")
    if envs.metadata.get("autoreset_mode") != gym.vector.AutoresetMode.NEXT_STEP:
        raise UserError(f"{flag} needs the autoreset mode NEXT_STEP")
    if len(envs.single_observation_space.shape or ()) != 1:
        envs = gym.wrappers.vector.FlattenObservation(envs)
    return envs


def mlp(*sizes: int, activation: str, head_gain: float) -> nn.Sequential:
    """Make linear layers with activations between; orthogonal weights, zero biases (detail 2)."""
    layers: list[nn.Module] = []
    for size, next_size in itertools.pairwise(sizes):
        linear = nn.Linear(size, next_size)
        nn.init.orthogonal_(linear.weight, 2**0.5)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU() if activation == "relu" else nn.Tanh()]
    nn.init.orthogonal_(linear.weight, head_gain)
    return nn.Sequential(*layers[:-1])


class RunningMoments(nn.Module):
    """Mean and variance of all rows seen, kept in the agent's state_dict."""

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("var", torch.ones(size, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, rows: np.ndarray) -> None:
        """Take in rows (B, size): the moments of two sets give those of their union."""
        x = torch.as_tensor(rows, dtype=torch.float64, device=self.mean.device)
        share = len(x) / (self.count + len(x))
        delta = x.mean(0) - self.mean
        self.var += share * (x.var(0, correction=0) - self.var + (1 - share) * delta.square())
        self.mean += share * delta
        self.count += len(x)

    def numpy(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation as float32."""
        return self.mean.float().cpu().numpy(), (self.var + 1e-8).sqrt().float().cpu().numpy()


class Agent(nn.Module):
    """A Gaussian policy and a critic, two separate networks (details 13, 23 to 26)."""

    def __init__(self, args: Args, envs: gym.vector.VectorEnv):
        super().__init__()
        self.box, self.squash = envs.single_action_space, args.squash
        self.num_actions = int(np.prod(self.box.shape or ()))
        self.centre: np.ndarray | float = 0.0
        self.half_width: np.ndarray | float = 1.0
        if args.squash or (args.scale_actions and self.box.is_bounded()):
            self.centre = (self.box.high + self.box.low) / 2.0
            self.half_width = (self.box.high - self.box.low) / 2.0
        self.obs_dim = envs.single_observation_space.shape[0]
        sizes = (self.obs_dim, args.hidden_size, args.hidden_size)
        # The small head makes the first policy almost the same in every state.
        self.actor = mlp(*sizes, self.num_actions, activation=args.activation, head_gain=0.01)
        self.critic = mlp(*sizes, 1, activation=args.activation, head_gain=1.0)
        log_std = torch.full((self.num_actions,), args.log_std_init)
        self.log_std = nn.Parameter(log_std) if args.log_std_final is None else nn.Buffer(log_std)
        # They are part of the agent, so that whoever saves or loads it cannot forget them.
        self.obs_moments, self.return_moments = RunningMoments(self.obs_dim), RunningMoments(1)
        self.norm_obs, self.norm_reward = args.norm_obs, args.norm_reward

    def noise(self, rng: np.random.Generator, *shape: int) -> np.ndarray:
        """Draw the noise (*shape, A) with which the policy samples."""
        return rng.standard_normal((*shape, self.num_actions), np.float32)

    def observe(self, obs: np.ndarray, discounted_returns: np.ndarray) -> None:
        """Take real rows into the moments: obs (B, D) and discounted returns (B,)."""
        if self.norm_obs:
            self.obs_moments.update(obs)
        if self.norm_reward:
            self.return_moments.update(discounted_returns[:, None])

    def normalise_obs(self, obs: np.ndarray) -> np.ndarray:
        """Return obs (..., D) at mean 0 and std 1, clipped to [-10, 10] (details 28, 29)."""
        mean, std = self.obs_moments.numpy()
        return ((obs - mean) / std).clip(-10.0, 10.0) if self.norm_obs else obs

    def scale_rewards(self, rewards: np.ndarray) -> np.ndarray:
        """Return rewards over the std of the discounted return, clipped too (details 30, 31)."""
        _, std = self.return_moments.numpy()
        return (rewards / std).clip(-10.0, 10.0) if self.norm_reward else rewards

    def numpy_policy(self) -> Callable[[np.ndarray, np.ndarray | float], np.ndarray]:
        """Return the present policy, a function from obs (N, D) and noise (N, A) to actions (N, A).

        mean + std * standard normal noise is a sample; noise 0 gives the mode.
        On a few rows NumPy's overhead is a third of PyTorch's, and the rollout is mostly overhead.
        """
        linears = [layer for layer in self.actor if isinstance(layer, nn.Linear)]
        arrays = [[p.detach().cpu().numpy().T for p in layer.parameters()] for layer in linears]
        *hidden, (head_weight, head_bias) = arrays
        tanh = isinstance(self.actor[1], nn.Tanh)
        std = self.log_std.detach().exp().cpu().numpy()
        obs_mean, obs_std = self.obs_moments.numpy()
        bound = 10.0 if self.norm_obs else np.inf

        def act(x: np.ndarray, noise: np.ndarray | float) -> np.ndarray:
            x = ((x - obs_mean) / obs_std).clip(-bound, bound)  # as normalise_obs
            for weight, bias in hidden:
                x = x @ weight + bias
                x = np.tanh(x) if tanh else np.maximum(x, 0.0)
            return x @ head_weight + head_bias + std * noise

        return act

    def in_env_units(self, actions: np.ndarray) -> np.ndarray:
        """Return actions (..., A) as (B, *box), scaled or squashed to the box but not clipped."""
        actions = actions.reshape(-1, *(self.box.shape or ()))
        return self.centre + self.half_width * (np.tanh(actions) if self.squash else actions)

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """Return actions (N, A) as (N, *box), within it; the stored ones stay free (detail 27)."""
        return self.in_env_units(actions).clip(self.box.low, self.box.high)

    def log_prob_and_entropy(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Return log pi(a|s) and the policy's entropy in nats, both (...), of actions (..., A).

        `obs` are normalised. With squash the density is that of tanh(actions), by the change of
        variables; the entropy stays that of the Gaussian, for which alone there is a formula.
        """
        z = (actions - self.actor(obs)) / self.log_std.exp()
        log_probs = -(0.5 * z.square() + self.log_std + 0.5 * LOG_2PI).sum(-1)
        if self.squash:  # log(1 - tanh(x)^2), in a form that does not underflow
            log_probs = log_probs - 2.0 * (LOG_2 - actions - F.softplus(-2.0 * actions)).sum(-1)
        entropy = (self.log_std + 0.5 * LOG_2PI + 0.5).sum()
        return log_probs, entropy.expand(log_probs.shape)

    def value(self, obs: Tensor) -> Tensor:
        """Return V(s), of the shape of `obs` without its last dimension."""
        return self.critic(obs).squeeze(-1)


def flatten_parameters(module: nn.Module) -> nn.Parameter:
    """Return one vector (P,) of which all parameters of `module` become views; gradients likewise.

    Clipping and Adam then take one kernel each, not one a tensor: a tenth of a small run's time.
    """
    parameters = list(module.parameters())
    flat = nn.Parameter(nn.utils.parameters_to_vector(parameters).detach())
    flat.grad = torch.zeros_like(flat)
    nn.utils.vector_to_parameters(flat.data, parameters)  # assigns views, copies nothing
    for parameter, grad in zip(parameters, flat.grad.split([p.numel() for p in parameters])):
        parameter.grad = grad.view_as(parameter)
    return flat


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """Return mean(min(r A, clip(r, 1 - eps, 1 + eps) A)) over (M,), to be maximised (PPO eq. 7).

    The min is pessimistic: beyond the range a good move earns no more, a bad one still costs.
    """
    clipped = ratio.clamp(1.0 - clip_coef, 1.0 + clip_coef)
    return torch.min(ratio * advantages, clipped * advantages).mean()


def kl_penalised_surrogate(log_ratio: Tensor, advantages: Tensor, kl_coef: float) -> Tensor:
    """Return mean(r A - beta KL(old, new)) over (M,), to be maximised (PPO eq. 8).

    KL(old, new) is estimated by (r - 1) - log r: right on average, and never negative.
    """
    ratio = log_ratio.exp()
    return (ratio * advantages - kl_coef * (ratio - 1.0 - log_ratio)).mean()


def adapt_kl_coef(kl_coef: float, kl: float, target_kl: float) -> float:
    """Return beta, halved or doubled if the KL left [target / 1.5, 1.5 target] (PPO eq. 8)."""
    return kl_coef * (2.0 if kl > 1.5 * target_kl else 0.5 if kl < target_kl / 1.5 else 1.0)


def adapt_learning_rate(learning_rate: float, kl: float, desired_kl: float) -> float:
    """Return the rate, a half up or a third down if the KL left [desired / 1.5, 1.5 desired].

    The rule of PPO's eq. 8 turned on the step instead of the penalty: one rate moves the policy of
    one task ten times as far as that of another, one KL means the same everywhere.
    """
    factor = 1.0 / 1.5 if kl > 1.5 * desired_kl else 1.5 if kl < desired_kl / 1.5 else 1.0
    return min(factor * learning_rate, 1e-2)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """Return mean((V - returns)^2) / 2 over (M,).

    With `clip`, the larger of that error and the one with V held within `clip` of its old value.
    """
    errors = (values - returns).square()
    if clip is not None:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        errors = torch.max(errors, (clipped - returns).square())
    return 0.5 * errors.mean()


def diagnostics(log_ratio: Tensor, clip_coef: float) -> tuple[float, float]:
    """Return approx_kl, which is KL(old, new) in nats, and the share of ratios out of the range."""
    ratio = log_ratio.exp()
    outside = (ratio - 1.0).abs() > clip_coef
    return (ratio - 1.0 - log_ratio).mean().item(), outside.float().mean().item()


def normalise(x: Tensor) -> Tensor:
    """Return `x` shifted and scaled to mean 0 and standard deviation 1."""
    return (x - x.mean()) / (x.std() + 1e-8)


def critique(agent: Agent, args: Args, rollout: tuple[Tensor, ...]) -> list[Tensor]:
    """Return advantages, returns and values of the rollout's real rows, each (B,).

    `rollout` holds obs (T+1, N, D), then rewards, terminated, done and real, each (T, N).
    """
    obs, rewards, terminated, done, real = rollout
    with torch.no_grad():
        values = agent.value(obs)  # (T+1, N)
    # An episode's last observation has a row of its own, so V(s') is the next row of values.
    advantages, returns = gae(
        rewards, values[:-1], values[1:], terminated, done, args.gamma, args.gae_lambda
    )
    advantages, returns, values = advantages[real], returns[real], values[:-1][real]
    return [normalise(advantages) if args.norm_adv == "batch" else advantages, returns, values]


def train(args: Args, stop: threading.Event | None = None) -> tuple[Agent, dict]:
    """Train as `args` say, or until `stop` is set; return the agent and what results.json holds."""
    start_time = time.perf_counter()
    args.check()
    torch.set_num_threads(args.num_threads)
    auto_device = "cuda" if args.hidden_size >= 512 and torch.cuda.is_available() else "cpu"
    device = torch.device(auto_device if args.device == "auto" else args.device)
    # One stream each, so that a longer evaluation, say, leaves the training as it was.
    seeds = (np.random.SeedSequence(args.seed).generate_state(5) >> 2).tolist()
    env_seed, torch_seed, sample_seed, shuffle_seed, eval_seed = seeds
    sample_rng, shuffle_rng = map(np.random.default_rng, (sample_seed, shuffle_seed))
    torch.manual_seed(torch_seed)

    T, N = args.num_steps, args.num_envs
    envs = make_envs(args, N)
    agent = Agent(args, envs).to(device)
    parameters = flatten_parameters(agent)
    optimizer = torch.optim.Adam([parameters], eps=1e-5, fused=True)  # detail 3
    kl_coef, learning_rate = args.kl_coef, args.learning_rate

    obs = np.zeros((T + 1, N, agent.obs_dim), np.float32)
    actions = np.zeros((T, N, agent.num_actions), np.float32)
    rewards, discounted_returns = np.zeros((T, N), np.float32), np.zeros((T, N))
    terminated, truncated = np.zeros((T, N), bool), np.zeros((T, N), bool)
    obs[T], _ = envs.reset(seed=env_seed)
    was_done = np.zeros(N, bool)
    episode, discounted = np.zeros((2, N)), np.zeros(N)  # return and length, discounted return
    recent_returns: deque[float] = deque(maxlen=100)  # of the last 100 episodes
    last_return, global_step = np.nan, 0

    run_dir, writer = open_run(args)
    print(f"{args.env_id}: {args.num_iterations} iterations on {device}, logged to {run_dir}")
    if not envs.single_action_space.is_bounded():
        print("the action space is unbounded: no action is clipped")
    bar = tqdm(total=args.num_iterations * args.batch_size, unit=" steps", disable=None)
    loop_time = print_time = time.perf_counter()

    for iteration in range(args.num_iterations):
        fraction = 1.0 - iteration / args.num_iterations if args.anneal_lr else 1.0
        if args.desired_kl is None:
            learning_rate = fraction * args.learning_rate
        if args.log_std_final is not None:
            log_stds = args.log_std_init, args.log_std_final
            agent.log_std.fill_(np.interp(iteration, (0, args.num_iterations), log_stds))
        optimizer.param_groups[0]["lr"] = learning_rate

        # ---- [1] Rollout: T steps in N environments; only the policy runs ----------------------
        obs[0] = obs[T]
        act, noise = agent.numpy_policy(), agent.noise(sample_rng, T, N)
        with np.errstate(invalid="ignore"):  # a NaN or infinity is reported below
            for t in range(T):
                actions[t] = act(obs[t], noise[t])
                step = envs.step(agent.to_env(actions[t]))
                obs[t + 1], rewards[t], terminated[t], truncated[t], _ = step
        done = terminated | truncated
        real = ~np.concatenate([was_done[None], done[:-1]])  # (T, N), False in reset rows
        was_done = done[-1]
        rewards[~real] = 0.0
        if not (np.isfinite(obs).all() and np.isfinite(rewards).all()):
            raise UserError(f"{args.env_id} gave a NaN or infinity after step {global_step}")
        global_step += int(real.sum())
        episodes = []  # return and length of those that ended in this rollout
        for t in range(T):
            episode += rewards[t], real[t]
            discounted_returns[t] = discounted = args.gamma * discounted + rewards[t]
            if done[t].any():
                episodes += episode[:, done[t]].T.tolist()
                episode[:, done[t]] = discounted[done[t]] = 0.0
        # The normalisers move between iterations, so that all of one sees the same numbers; only
        # the first needs a look at its own rollout.
        if iteration == 0:
            agent.observe(obs[:-1][real], discounted_returns[real])

        # ---- [2] Advantages: one pass over all rows, by the parameters of the rollout ----------
        inputs = agent.normalise_obs(obs), agent.scale_rewards(rewards)
        buffers = (*inputs, terminated, done, real)
        rollout = tuple(torch.as_tensor(x, device=device) for x in buffers)
        s, keep, a = rollout[0][:-1], rollout[-1], torch.as_tensor(actions, device=device)
        with torch.no_grad():
            log_probs, _ = agent.log_prob_and_entropy(s, a)  # (T, N)
        # From here on without the reset rows: obs (B, D), the others (B,).
        batch = [s[keep], a[keep], log_probs[keep], *critique(agent, args, rollout)]
        *_, returns, values = batch
        unexplained = (returns - values).var() / returns.var()

        # ---- [3] Update: K epochs of shuffled minibatches --------------------------------------
        losses, epoch_diagnostics = [], []
        for epoch in range(args.update_epochs):
            if epoch > 0 and args.recompute_advantages:
                batch[3:] = critique(agent, args, rollout)
            order = torch.as_tensor(shuffle_rng.permutation(len(batch[0])), device=device)
            parts = min(args.num_minibatches, len(order) // 2)  # of at least 2 rows, for the std
            log_ratios = []
            for mb in zip(*(x[order].tensor_split(parts) for x in batch)):
                mb_obs, mb_actions, mb_log_probs, mb_advantages, mb_returns, mb_values = mb
                if args.norm_adv == "minibatch":
                    mb_advantages = normalise(mb_advantages)
                new_log_probs, entropy = agent.log_prob_and_entropy(mb_obs, mb_actions)
                log_ratio = new_log_probs - mb_log_probs
                if args.objective == "clip":
                    surrogate = clipped_surrogate(log_ratio.exp(), mb_advantages, args.clip_coef)
                else:
                    surrogate = kl_penalised_surrogate(log_ratio, mb_advantages, kl_coef)
                v_clip = args.clip_coef if args.clip_vloss else None
                v_loss = value_loss(agent.value(mb_obs), mb_values, mb_returns, v_clip)
                entropy = entropy.mean()
                # PPO eq. 9 with its sign turned, for an optimiser minimises.
                loss = -surrogate + args.vf_coef * v_loss - args.ent_coef * entropy

                parameters.grad.zero_()
                loss.backward()
                grad_norm = parameters.grad.norm()
                parameters.grad *= (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)
                optimizer.step()
                losses.append((-surrogate.detach(), v_loss.detach(), entropy.detach(), grad_norm))
                log_ratios.append(log_ratio.detach())
            epoch_diagnostics.append(diagnostics(torch.cat(log_ratios), args.clip_coef))
            final_kl, _ = epoch_diagnostics[-1]
            if args.objective == "clip" and args.target_kl and final_kl > args.target_kl:
                break
        if args.objective == "penalty":
            kl_coef = adapt_kl_coef(kl_coef, final_kl, args.target_kl or 0.01)
        if args.desired_kl is not None:  # for the next iteration
            wish = args.desired_kl * fraction**0.5
            learning_rate = adapt_learning_rate(learning_rate, final_kl, wish)

        # ---- [4] Log: means over the iteration -------------------------------------------------
        means = [torch.stack(loss).mean().item() for loss in zip(*losses)]
        if not np.isfinite(means).all():
            raise UserError(f"the loss is not finite at step {global_step}: lower --learning-rate")
        sps = int(global_step / (time.perf_counter() - loop_time))
        mean_return, mean_length = np.mean(episodes, axis=0) if episodes else (np.nan, np.nan)
        last_return = mean_return if episodes else last_return
        recent_returns.extend(episode_return for episode_return, _ in episodes)
        approx_kl, clipfrac = np.mean(epoch_diagnostics, axis=0)
        metrics = {
            "charts/episodic_return": mean_return,
            "charts/episodic_length": mean_length,
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
            "charts/SPS": sps,
            "losses/policy_loss": means[0],
            "losses/value_loss": means[1],
            "losses/entropy": means[2],
            "losses/grad_norm": means[3],
            "losses/approx_kl": approx_kl,
            "losses/clipfrac": clipfrac,
            "losses/explained_variance": 1.0 - unexplained.item(),
            "losses/kl_coef": kl_coef,
            "charts/action_std": agent.log_std.exp().mean().item(),
            "charts/clipped_actions": (agent.to_env(actions) != agent.in_env_units(actions)).mean(),
        }
        for name, value in metrics.items():
            if not np.isnan(value):
                writer.add_scalar(name, value, global_step)
        with open(run_dir / "metrics.csv", "a") as file:
            if iteration == 0:
                print("global_step", *metrics, sep=",", file=file)
            print(global_step, *metrics.values(), sep=",", file=file)
        bar.set_postfix_str(f"return {last_return:.1f}")
        bar.update(args.batch_size)
        if bar.disable and time.perf_counter() - print_time > 5:  # no terminal: a line now and then
            print_time = time.perf_counter()
            print(f"step {global_step:,}  return {last_return:.1f}  {sps:,} steps/s", flush=True)
        if iteration > 0:
            agent.observe(obs[:-1][real], discounted_returns[real])
        if stop is not None and stop.is_set():
            print(f"stopped after {global_step} steps")
            break

    bar.close()
    envs.close()
    writer.close()
    results = {"env_id": args.env_id, "seed": args.seed, "global_step": global_step, "sps": sps}
    results["train_return"] = np.mean(recent_returns) if recent_returns else None
    for mode in ("deterministic", "stochastic"):
        scores = evaluate(agent, args, eval_seed, mode == "deterministic")
        prefix = "eval" if mode == "deterministic" else "eval_stochastic"
        results |= {f"{prefix}_mean": scores.mean(), f"{prefix}_std": scores.std()}
        print(f"{mode} evaluation: {scores.mean():.1f} ± {scores.std():.1f}")
    wall_seconds = round(time.perf_counter() - start_time, 2)
    results |= {"eval_episodes": args.eval_episodes, "wall_seconds": wall_seconds}
    write_json(run_dir / "results.json", results)
    return agent, results


def evaluate(agent: Agent, args: Args, seed: int, deterministic: bool) -> np.ndarray:
    """Return the undiscounted returns (E,) of E whole episodes, cut off after 10,000 steps.

    Each has an environment of its own: the first E to end in a few would be the short ones.
    """
    if args.vectorization_mode == "async":  # that would be E processes
        args = dataclasses.replace(args, vectorization_mode="sync")
    envs, rng = make_envs(args, args.eval_episodes), np.random.default_rng(seed)
    act = agent.numpy_policy()
    obs, _ = envs.reset(seed=seed)
    returns, running = np.zeros(args.eval_episodes), np.ones(args.eval_episodes, bool)
    for _ in range(10_000):
        noise = 0.0 if deterministic else agent.noise(rng, args.eval_episodes)
        step = envs.step(agent.to_env(act(obs.astype(np.float32), noise)))
        obs, reward, terminated, truncated, _ = step
        returns[running] += reward[running]
        running &= ~(terminated | truncated)
        if not running.any():
            break
    envs.close()
    return returns


def write_json(path: Path, data: dict) -> None:
    """Write beside `path`, then rename: a killed run leaves the old file or the new, never half."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=2, default=str) + "\n")
    os.replace(temporary, path)


def open_run(args: Args) -> tuple[Path, SummaryWriter]:
    """Make the folder of the run with args.json and a writer of TensorBoard events."""
    name = f"{args.env_id}__{Path(__file__).stem}__{args.seed}__{time.time_ns() // 10**6}"
    run_dir = args.run_dir or Path("runs", name.replace("/", "-"))
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if (run_dir / "args.json").exists():
            raise UserError(f"--run-dir {run_dir} already holds a run: name another folder")
        write_json(run_dir / "args.json", dataclasses.asdict(args))
        return run_dir, SummaryWriter(run_dir)
    except OSError as error:
        raise UserError(f"--run-dir {run_dir}: {error}") from error


def main() -> None:
    """Run from the command line: Ctrl-C ends the training in order, `UserError` is one line."""
    stop = threading.Event()

    def on_ctrl_c(*_: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one ends it at once

    signal.signal(signal.SIGINT, on_ctrl_c)
    try:
        faithful = "--config faithful" in " ".join(sys.argv).replace("=", " ")
        defaults = Args(config="faithful", **FAITHFUL) if faithful else Args()
        train(tyro.cli(Args, default=defaults), stop)
    except UserError as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2)
    if stop.is_set():
        sys.exit(130)  # what a shell expects after Ctrl-C


if __name__ == "__main__":
    main()
