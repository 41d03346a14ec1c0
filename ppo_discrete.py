# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "gymnasium>=1.1", "numpy", "tensorboard", "tyro", "tqdm"]
# ///
"""PPO for discrete actions: one file, read top to bottom.

    python ppo_discrete.py --env-id CartPole-v1    # return 500 after some 10 seconds on one core

One iteration of `train`:
    [1] Rollout     the policy plays T steps in each of N environments
    [2] Advantages  the critic values every row in one pass, GAE turns rewards into advantages
    [3] Update      K epochs of shuffled minibatches on the clipped surrogate and the value loss
    [4] Log         means over the iteration, to TensorBoard, metrics.csv and the terminal

Shapes: T num_steps, N num_envs, D observation size (of images: 4, 84, 84), P parts of an action (1
but for MultiDiscrete), A choices of a part, B real rows of a batch, M rows of a minibatch.
Episodes restart one step late (Gymnasium's NEXT_STEP autoreset): if one ends in row t, then
obs[t+1] is its true last observation, row t+1 is the reset (its action is ignored: it is no
transition, and nothing may learn from it), and obs[t+2] begins the next episode.

Papers: PPO (Schulman et al. 2017, arXiv 1707.06347), GAE (Schulman et al. 2016, 1506.02438).
"Detail n" counts as in "The 37 Implementation Details of PPO" (Huang et al. 2022).
"""

import ast
import atexit
import contextlib
import dataclasses
import importlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from gae import gae

# The defaults if observations are images, nearly as Baselines plays Atari; Args alone, without a
# command line, does not know: Args(env_id="ALE/Pong-v5", **PIXELS).
PIXELS: dict[str, Any] = {
    "total_timesteps": 10_000_000,
    "eval_episodes": 10,
    "learning_rate": 2.5e-4,
    "num_envs": 8,
    "num_steps": 128,
    "update_epochs": 4,
    "clip_coef": 0.1,
    "sign_rewards": True,
    "life_loss": True,
    "hidden_size": 512,
}


class UserError(ValueError):
    """A flag, an environment or a number to mend: one line on the command line, no traceback."""


@dataclasses.dataclass
class Args:
    """Train a PPO agent with discrete actions, then evaluate it.

    Environments that show images have other defaults: --env-id ALE/Pong-v5 --help lists them.
    """

    # Gymnasium environment with Discrete, MultiDiscrete or MultiBinary actions.
    env_id: str = "CartPole-v1"
    # Keyword arguments of the environment, such as is_slippery=false map_name=8x8.
    env_kwargs: tuple[str, ...] = ()
    # Default: the environment's own vectorised version, else sync. async suits slow environments.
    vectorization_mode: Literal["sync", "async", "vector_entry_point"] | None = None
    total_timesteps: int = 50_000  # environment steps, rounded down to whole batches
    seed: int = 1  # seed of the environments, the first weights, the sampling and the shuffling
    run_dir: Path | None = None  # default: runs/<env>__ppo_discrete__<seed>__<time>
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda only if the network is wide
    num_threads: int = 1  # PyTorch's CPU threads; more help wide networks only
    compile: bool = False  # torch.compile the loss and its gradient: pays from some minutes on
    checkpoint_every: int = 25  # iterations between checkpoints; one more at the end or at Ctrl-C
    resume: Path | None = None  # go on with the run in this folder, with its arguments
    evaluate: Path | None = None  # only evaluate the run in this folder
    capture_video: bool = False  # an mp4 of an episode of the final policy, 2,000 steps at most
    eval_episodes: int = 100  # episodes of each final evaluation, deterministic and stochastic

    learning_rate: float = 2.5e-3  # Adam's learning rate at the start
    anneal_lr: bool = True  # let the learning rate fall linearly to 0 (detail 4)
    # Move the learning rate up or down to keep approx_kl here; anneal_lr lets this fall instead.
    desired_kl: float | None = None
    num_envs: int = 32  # N, parallel environments
    num_steps: int = 32  # T, steps of each environment in a rollout
    update_epochs: int = 10  # K, passes over the batch in an update
    num_minibatches: int = 4  # minibatches in an epoch
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of GAE: 0 trusts the critic, 1 the rewards
    recompute_advantages: bool = False  # before every epoch, by the critic as it is by then
    # Where advantages are brought to mean 0 and standard deviation 1; minibatch is detail 7.
    norm_adv: Literal["batch", "minibatch", "none"] = "batch"
    # PPO-Clip (eq. 7), or PPO-Penalty with an adaptive KL coefficient (eq. 8).
    objective: Literal["clip", "penalty"] = "clip"
    clip_coef: float = 0.2  # epsilon: moving the ratio further than this from 1 earns nothing
    clip_vloss: bool = False  # clip the value loss by clip_coef too (detail 9)
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # the gradient's global norm is clipped to this (detail 11)
    # clip: end an update after an epoch with a higher approx_kl. penalty: the KL to keep (0.01).
    target_kl: float | None = None
    kl_coef: float = 1.0  # penalty: the first KL coefficient, beta
    norm_obs: bool = False  # observations to mean 0, std 1 (detail 28)
    clip_obs: float = 10.0  # and clipped to this (detail 29)
    norm_reward: bool = False  # by the std of the discounted return, clipped to 10 (30, 31)
    sign_rewards: bool = False  # learn from the sign of a reward only (detail 19)
    life_loss: bool = False  # Atari: to the advantages, a lost life is the end (detail 16)
    hidden_size: int = 64  # units in each hidden layer: two, or one after an image's convolutions
    activation: Literal["relu", "tanh"] = "relu"  # tanh is Baselines' and CleanRL's, relu is faster

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.batch_size

    @property
    def restart_every(self) -> int:
        """Iterations after which all episodes begin anew, some 10,000 steps of each environment.

        An environment's state cannot be saved in general. A resumed run plays the same actions
        again from the last restart instead, and so ends with the same bits. An episode that would
        last longer is cut off: no log shows its return.
        """
        return max(1, 10_000 // self.num_steps)

    def check(self) -> None:
        """Raise `UserError` for a value or a combination that cannot work."""
        counts = "total_timesteps num_threads eval_episodes num_envs update_epochs num_minibatches"
        for names, low, high, rule in (
            (counts + " hidden_size checkpoint_every", 1, np.inf, "must be at least 1"),
            ("num_steps", 2, np.inf, "must be at least 2, for every second row may be a reset"),
            ("seed ent_coef vf_coef", 0, sys.maxsize, "must not be negative"),
            ("gamma gae_lambda", 0, 1, "must lie in [0, 1]"),
            ("learning_rate desired_kl clip_coef max_grad_norm", 1e-99, 1e99, "must be > 0"),
            ("target_kl kl_coef clip_obs", 1e-99, 1e99, "must be > 0"),
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
        brake = self.target_kl or np.inf
        if self.desired_kl and (self.objective == "penalty" or brake < self.desired_kl):
            what = "--objective penalty" if self.objective == "penalty" else f"--target-kl {brake}"
            raise UserError(f"{what} needs --desired-kl None: the two would pull apart")
        folder = self.resume or self.evaluate
        if folder is not None and self.run_dir not in (None, folder):
            raise UserError(f"--run-dir {self.run_dir}: the run stays in its folder, {folder}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch finds no CUDA device")
        if self.capture_video and not importlib.util.find_spec("moviepy"):
            raise UserError('--capture-video needs moviepy: pip install "gymnasium[other]"')


class ActionMasks(gym.Wrapper):
    """Put what the environment's `action_masks()` returns into its info."""

    def reset(self, **kwargs: Any) -> tuple[Any, dict]:
        obs, info = super().reset(**kwargs)
        return obs, info | {"action_mask": np.hstack(self.get_wrapper_attr("action_masks")())}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict]:
        *step, info = super().step(action)
        return *step, info | {"action_mask": np.hstack(self.get_wrapper_attr("action_masks")())}


def is_image(space: gym.Space, height: int) -> bool:
    """Return whether observations are images, of bytes; `height` is the axis, the width is next."""
    shape = space.shape or ()
    sides = shape[height : height + 2]
    return space.dtype == np.uint8 and len(shape) in (2, 3) and len(sides) == 2 and min(sides) >= 36


def prepare(env: Any) -> Any:
    """Wrap one environment: masks go to its info; images become 4 grey frames, 84 x 84."""
    if env.has_wrapper_attr("action_masks"):
        env = ActionMasks(env)
    shape = env.observation_space.shape or ()
    if is_image(env.observation_space, 0) and shape[2:] in ((), (1,), (3,)):
        if shape[2:] == (3,):
            env = gym.wrappers.GrayscaleObservation(env)
        else:
            env = gym.wrappers.ReshapeObservation(env, shape[:2])
        env = gym.wrappers.ResizeObservation(env, (84, 84))
        env = gym.wrappers.FrameStackObservation(env, 4)
    return env


def count_choices(space: gym.Space) -> list[int]:
    """Return the number of choices of each of the P parts of an action, none if it has others."""
    if isinstance(space, gym.spaces.Discrete):
        return [int(space.n)]
    if isinstance(space, gym.spaces.MultiDiscrete):
        return space.nvec.ravel().tolist()
    return [2] * int(np.prod(space.shape)) if isinstance(space, gym.spaces.MultiBinary) else []


def leave_signals(env: Any) -> Any:
    """In a worker process, leave Ctrl-C and SIGTERM to the main one, to end the run in order."""
    if multiprocessing.parent_process() is not None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    return env


def abandon(envs: gym.vector.VectorEnv) -> None:
    """Close environments after an error; workers are killed, for a dead one never answers."""
    for process in getattr(envs.unwrapped, "processes", ()):
        process.kill()
        envs.unwrapped.closed = True
    envs.close()


def make_envs(args: Args, num_envs: int, **kwargs: Any) -> gym.vector.VectorEnv:
    """Make `num_envs` environments with observations (N, D); discrete parts become one-hot.

    Images are bytes (N, 4, 84, 84). Raises `UserError` for an environment that is unknown or that
    this script cannot serve.
    """
    for pair in args.env_kwargs:
        name, _, text = pair.partition("=")
        kwargs[name] = text
        for read in (ast.literal_eval, json.loads):  # None, True and .05 of the one; true, null
            with contextlib.suppress(ValueError, SyntaxError):
                kwargs[name] = read(text)
    flag, mode, atari = f"--env-id {args.env_id}:", args.vectorization_mode, "ALE/" in args.env_id
    wrappers: Sequence[Callable] = [prepare, leave_signals] if mode == "async" else [prepare]
    module, _, name = args.env_id.rpartition(":")
    try:
        if module or atari:
            importlib.import_module(module or "ale_py")  # registers its environments
        own = mode is None and gym.spec(name).vector_entry_point is not None
        if own or mode == "vector_entry_point":
            wrappers = []  # they are one object; Atari's shows 4 grey frames, 84 x 84, by itself
            if atari:  # scores are to be whole, and it draws nothing
                kwargs = {"reward_clipping": False, **kwargs}
                kwargs.pop("render_mode", None)
        envs = gym.make_vec(name, num_envs, mode, wrappers=wrappers, **kwargs)
    except (gym.error.Error, ImportError, TypeError, ValueError, AssertionError) as error:
        missing = atari and isinstance(error, ImportError)
        hint = ' (pip install "gymnasium[atari]")' if missing else ""
        raise UserError(f"{flag} {' '.join(str(error).split())}{hint}") from error
    space = envs.single_action_space
    if not count_choices(space):
        other = ": use ppo_continuous.py" if isinstance(space, gym.spaces.Box) else ""
        raise UserError(f"{flag} its actions are {space}, not Discrete{other}")
    if envs.metadata.get("autoreset_mode") != gym.vector.AutoresetMode.NEXT_STEP:
        raise UserError(f"{flag} needs the autoreset mode NEXT_STEP")
    seen = envs.single_observation_space
    if seen.dtype == np.uint8 and len(seen.shape or ()) == 4:
        raise UserError(f"{flag} its images are a stack in colour, not grey: {seen.shape}")
    if is_image(seen, 1):
        if args.norm_obs:
            raise UserError("--norm-obs: images are divided by 255 instead")
    elif not isinstance(seen, gym.spaces.Box) or len(seen.shape) != 1:
        envs = gym.wrappers.vector.FlattenObservation(envs)
    if envs.single_observation_space.shape is None:
        raise UserError(f"{flag} its observations are {seen}, of no fixed size")
    return envs


def mlp(*sizes: int, activation: str, head_gain: float) -> nn.Sequential:
    """Make linear layers with activations between; orthogonal weights, zero biases (detail 2)."""
    layers: list[nn.Module] = []
    for size, next_size in itertools.pairwise(sizes):
        linear = nn.Linear(size, next_size)
        nn.init.orthogonal_(linear.weight, 2**0.5)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU(inplace=True) if activation == "relu" else nn.Tanh()]
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
        count, mean, var = moments(x, correction=0)
        share, delta = count / (self.count + count), mean - self.mean
        self.var += share * (var - self.var + (1 - share) * delta.square())
        self.mean += share * delta
        self.count += count

    def numpy(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation as float32."""
        return self.mean.float().cpu().numpy(), (self.var + 1e-8).sqrt().float().cpu().numpy()


class NatureCNN(nn.Sequential):
    """Three convolutions and a layer, from images (..., C, H, W) to features (..., width)."""

    def __init__(self, shape: tuple[int, ...], width: int):
        convolutions = [nn.Conv2d(shape[0], 32, 8, stride=4), nn.ReLU(inplace=True)]
        convolutions += [nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(inplace=True)]
        convolutions += [nn.Conv2d(64, 64, 3), nn.ReLU(inplace=True), nn.Flatten()]
        size = nn.Sequential(*convolutions)(torch.zeros(1, *shape)).numel()
        super().__init__(*convolutions, nn.Linear(size, width), nn.ReLU(inplace=True))
        for layer in self:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.orthogonal_(layer.weight, 2**0.5)
                layer.bias.data.zero_()

    def forward(self, images: Tensor) -> Tensor:
        """Divide the bytes by 255 (detail 22); with channels last a CPU needs a fifth less time."""
        x = images.reshape(-1, *images.shape[-3:]).contiguous(memory_format=torch.channels_last)
        return super().forward(x.float().div_(255.0)).view(*images.shape[:-3], -1)


class Agent(nn.Module):
    """A policy and a critic: two networks (detail 13), on images two heads of one (detail 21).

    Apart, neither pulls at the other's features. What an image shows is dear to learn and serves
    both, and one CNN takes half the time of two.
    """

    def __init__(self, args: Args, envs: gym.vector.VectorEnv):
        super().__init__()
        self.action_space = envs.single_action_space
        numbers = np.array(count_choices(self.action_space))
        self.choices = (len(numbers), int(numbers.max()))  # P, A
        self.exists = np.arange(self.choices[1]) < numbers[:, None]  # (P, A)
        self.no_mask = np.where(self.exists, 0.0, -1e9).astype(np.float32)
        self.obs_shape = envs.single_observation_space.shape or ()
        self.sees_images = len(self.obs_shape) == 3
        self.obs_dtype = np.uint8 if self.sees_images else np.float32
        sizes: tuple[int, ...] = (self.obs_shape[0], args.hidden_size, args.hidden_size)
        self.trunk: nn.Module = nn.Identity()
        if self.sees_images:
            self.trunk, sizes = NatureCNN(self.obs_shape, args.hidden_size), (args.hidden_size,)
        # The small head makes the first policy almost uniform in every state.
        outputs = math.prod(self.choices)
        self.actor = mlp(*sizes, outputs, activation=args.activation, head_gain=0.01)
        self.critic = mlp(*sizes, 1, activation=args.activation, head_gain=1.0)
        # They are part of the agent, so that whoever saves or loads it cannot forget them.
        self.obs_moments, self.return_moments = RunningMoments(sizes[0]), RunningMoments(1)
        self.norm_obs, self.clip_obs = args.norm_obs, args.clip_obs
        self.norm_reward = args.norm_reward

    def noise(self, rng: np.random.Generator, *shape: int) -> np.ndarray:
        """Draw the noise (*shape, P, A) with which the policy samples."""
        return rng.gumbel(size=(*shape, *self.choices))

    def masks(self, info: dict, done: np.ndarray) -> np.ndarray:
        """Return what is added to logits (N, P, A): 0 for a legal choice, -1e9 for another.

        `info["action_mask"]`, if there, says what is legal, a number for each choice of each part.
        Where an episode has ended the action is ignored, and all is. Raises `UserError` if nothing
        is legal.
        """
        if "action_mask" not in info:
            return self.no_mask
        legal = np.tile(self.exists, (len(done), 1, 1))
        rows = info.get("_action_mask", True) & ~done  # of environments that gave a mask
        given = info["action_mask"][rows]
        if len(given) and isinstance(given[0], tuple | list):  # an array for each part
            given = np.array([np.hstack(row) for row in given])
        given = np.array(given.tolist(), bool)
        of_rows, choices = legal[rows], self.exists.sum()
        if given.size != len(of_rows) * choices:
            raise UserError(f"an action_mask of {given[0].size} numbers for {choices} choices")
        of_rows[:, self.exists] = given.reshape(-1, choices)
        legal[rows] = of_rows
        if not legal.any(-1).all():
            raise UserError("an action_mask leaves no legal action")
        return np.where(legal, 0.0, -1e9).astype(np.float32)

    def observe(self, obs: np.ndarray, discounted_returns: np.ndarray) -> None:
        """Take real rows into the moments: obs (B, D) and discounted returns (B,)."""
        if self.norm_obs:
            self.obs_moments.update(obs)
        if self.norm_reward:
            self.return_moments.update(discounted_returns[:, None])

    def normalise_obs(self, obs: np.ndarray) -> np.ndarray:
        """Return obs (..., D) at mean 0 and std 1, clipped to +-clip_obs (details 28, 29)."""
        mean, std = self.obs_moments.numpy()
        return ((obs - mean) / std).clip(-self.clip_obs, self.clip_obs) if self.norm_obs else obs

    def scale_rewards(self, rewards: np.ndarray) -> np.ndarray:
        """Return rewards over the std of the discounted return, clipped too (details 30, 31)."""
        _, std = self.return_moments.numpy()
        return (rewards / std).clip(-10.0, 10.0) if self.norm_reward else rewards

    def see(self, obs: np.ndarray) -> np.ndarray:
        """Return what actor and critic take: the features of images, vectors as they are."""
        if not self.sees_images:
            return obs
        device = next(self.parameters()).device
        with torch.no_grad():
            return self.trunk(torch.as_tensor(obs, device=device)).cpu().numpy()

    def numpy_policy(self) -> Callable[[np.ndarray, np.ndarray | float], np.ndarray]:
        """Return the present policy: from what `see` gives and noise (N, P, A) to actions (N, P).

        argmax(logits + Gumbel noise) is a sample from softmax(logits); noise 0 gives the mode.
        With the masks added to the noise no illegal action comes out.
        On a few rows NumPy's overhead is a third of PyTorch's, and the rollout is mostly overhead.
        """
        linears = [layer for layer in self.actor if isinstance(layer, nn.Linear)]
        arrays = [[p.detach().cpu().numpy().T for p in layer.parameters()] for layer in linears]
        *hidden, (head_weight, head_bias) = arrays
        tanh = nn.Tanh in map(type, self.actor)
        obs_mean, obs_std = self.obs_moments.numpy()

        def act(x: np.ndarray, noise: np.ndarray | float) -> np.ndarray:
            if self.norm_obs:  # as normalise_obs
                x = ((x - obs_mean) / obs_std).clip(-self.clip_obs, self.clip_obs)
            for weight, bias in hidden:
                x = x @ weight + bias
                x = np.tanh(x) if tanh else np.maximum(x, 0.0)
            logits = (x @ head_weight + head_bias).reshape(-1, *self.choices)
            return (logits + noise).argmax(-1)

        return act

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """Return actions (N, P), counted from 0, as the environment counts and shapes them."""
        space = self.action_space
        actions = actions.reshape(-1, *(space.shape or ())) + getattr(space, "start", 0)
        return actions.astype(space.dtype)

    def log_prob_and_entropy(
        self, features: Tensor, actions: Tensor, masks: Tensor | float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Return log pi(a|s) and the policy's entropy in nats, both (...), of actions (..., P).

        The parts of an action are independent, so that their logs and entropies add (detail 37).
        A masked choice has probability 0 exactly, and its logit no gradient.
        """
        logits = self.actor(features).unflatten(-1, self.choices) + masks
        log_pi = F.log_softmax(logits, dim=-1)  # (..., P, A)
        log_probs = log_pi.gather(-1, actions.unsqueeze(-1)).sum((-2, -1))
        return log_probs, -(log_pi.exp() * log_pi).sum((-2, -1))

    def value(self, obs: Tensor) -> Tensor:
        """Return V(s), (...), of observations (..., D) or images (..., 4, 84, 84)."""
        return self.critic(self.trunk(obs)).squeeze(-1)

    def forward(
        self, obs: Tensor, actions: Tensor, masks: Tensor | float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return log pi(a|s), the policy's entropy and V(s), all (...), by one pass."""
        features = self.trunk(obs)
        values = self.critic(features).squeeze(-1)
        return *self.log_prob_and_entropy(features, actions, masks), values


def flatten_parameters(module: nn.Module) -> nn.Parameter:
    """Return one vector of which all parameters of `module` become views; gradients likewise.

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


def kl_penalised_surrogate(
    log_ratio: Tensor, advantages: Tensor, kl_coef: Tensor | float
) -> Tensor:
    """Return mean(r A - beta KL(old, new)) over (M,), to be maximised (PPO eq. 8).

    KL(old, new) is estimated by (r - 1) - log r: right on average, never below 0 but by rounding.
    """
    ratio = log_ratio.exp()
    return (ratio * advantages - kl_coef * (ratio - 1.0 - log_ratio)).mean()


def adapt_kl_coef(kl_coef: float, kl: float, target_kl: float) -> float:
    """Return beta, halved or doubled if the KL left [target / 1.5, 1.5 target] (PPO eq. 8).

    It stays within [1e-6, 1e6], or in a long run it would get to 0 and never leave it again.
    """
    factor = 2.0 if kl > 1.5 * target_kl else 0.5 if kl < target_kl / 1.5 else 1.0
    return min(max(factor * kl_coef, 1e-6), 1e6)


def adapt_learning_rate(learning_rate: float, kl: float, desired_kl: float) -> float:
    """Return the rate, a half up or a third down if the KL left [desired / 1.5, 1.5 desired].

    The rule of PPO's eq. 8 turned on the step instead of the penalty: one rate moves the policy of
    one task ten times as far as that of another, one KL means the same everywhere. It raises the
    rate to 0.01 at most.
    """
    factor = 1.0 / 1.5 if kl > 1.5 * desired_kl else 1.5 if kl < desired_kl / 1.5 else 1.0
    return min(factor * learning_rate, max(learning_rate, 1e-2))


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
    return moments(ratio - 1.0 - log_ratio)[1].item(), moments(outside.float())[1].item()


def ppo_loss(
    agent: Agent, args: Args, batch: Sequence[Tensor], kl_coef: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss to minimise (PPO eq. 9, its sign turned), its parts (3,), log-ratios (M,).

    `batch` holds what `agent` is called with, then old log-probs, advantages, returns and old
    values, each (M,).
    The parts, for the log, are the policy loss, the value loss and the entropy.
    """
    *inputs, old_log_probs, advantages, returns, old_values = batch
    log_probs, entropies, values = agent(*inputs)
    log_ratio = log_probs - old_log_probs
    if args.objective == "clip":
        surrogate = clipped_surrogate(log_ratio.exp(), advantages, args.clip_coef)
    else:
        surrogate = kl_penalised_surrogate(log_ratio, advantages, kl_coef)
    v_clip = args.clip_coef if args.clip_vloss else None
    v_loss, entropy = value_loss(values, old_values, returns, v_clip), entropies.mean()
    loss = -surrogate + args.vf_coef * v_loss - args.ent_coef * entropy
    return loss, torch.stack((-surrogate, v_loss, entropy)).detach(), log_ratio.detach()


def all_sum(x: Tensor) -> Tensor:
    """Return `x`, made the sum of the `x` of all processes."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def moments(x: Tensor, correction: int = 1) -> tuple[Tensor | int, Tensor, Tensor]:
    """Return number, mean and variance of the rows (B, ...) of all processes."""
    if not dist.is_initialized():
        return len(x), x.mean(0), x.var(0, correction=correction)
    count = all_sum(x.new_tensor(len(x)))
    mean = all_sum(x.sum(0)) / count
    return count, mean, all_sum((x - mean).square().sum(0)) / (count - correction)


def normalise(x: Tensor) -> Tensor:
    """Return `x` (B,) shifted and scaled to mean 0 and standard deviation 1, of all processes."""
    _, mean, var = moments(x)
    return (x - mean) / (var.sqrt() + 1e-8)


def critique(args: Args, values: Tensor, rollout: tuple[Tensor, ...]) -> list[Tensor]:
    """Return advantages, returns and values of the rollout's real rows, each (B,).

    `values` (T+1, N) are the critic's; `rollout` ends with rewards, terminated, done and real, each
    (T, N).
    """
    *_, rewards, terminated, done, real = rollout
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
    rank, world_size, device = join_processes(args)  # 0 and 1 without torchrun
    # One stream each, so that a longer evaluation, say, leaves the training as it was.
    env_seed, torch_seed, sample_seed, shuffle_seed, _ = split_seed(args.seed)
    sample_rng, shuffle_rng = map(np.random.default_rng, (sample_seed, shuffle_seed))
    torch.manual_seed(torch_seed)

    T, N = args.num_steps, args.num_envs // world_size
    mine = slice(rank * N, (rank + 1) * N)  # this process's share of all environments
    if args.capture_video:
        make_envs(args, 1, render_mode="rgb_array").close()  # says now if that cannot be
    envs = make_envs(args, N)
    atexit.register(abandon, envs)
    agent = Agent(args, envs).to(device)
    parameters = flatten_parameters(agent)
    optimizer = Adam([parameters], eps=1e-5, fused=True)  # detail 3
    compiled = compile_loss(agent, args, parameters) if args.compile else None

    obs = np.zeros((T + 1, N, *agent.obs_shape), agent.obs_dtype)
    features = np.zeros((T + 1, N, args.hidden_size), np.float32) if agent.sees_images else obs
    actions = np.zeros((T, N, agent.choices[0]), np.int64)
    masks, lives = np.zeros((T + 1, N, *agent.choices), np.float32), np.zeros((T + 1, N))
    rewards, discounted_returns = np.zeros((T, N), np.float32), np.zeros((T, N))
    terminated, truncated = np.zeros((T, N), bool), np.zeros((T, N), bool)
    run = Progress(
        args.learning_rate, args.kl_coef, [sample_rng, shuffle_rng], np.zeros((2, N)), np.zeros(N)
    )
    if args.resume is not None:
        obs[T], was_done, info = restore(args, agent, optimizer, run, rank, envs)
    run_dir, writer = open_run(args, run) if rank == 0 else (None, None)  # process 0 keeps the run
    if run_dir is not None:
        print(f"{args.env_id}: {args.num_iterations} iterations on {device}, logged to {run_dir}")
    done_steps, all_steps = run.iteration * args.batch_size, args.num_iterations * args.batch_size
    no_bar = None if rank == 0 else True  # None: a bar in a terminal only
    bar = tqdm(total=all_steps, initial=done_steps, unit=" steps", disable=no_bar)
    streaks: dict[str, int] = {}
    loop_time, print_time = time.perf_counter() - run.seconds, time.perf_counter()

    for iteration in range(run.iteration, args.num_iterations):
        fraction = 1.0 - iteration / args.num_iterations if args.anneal_lr else 1.0
        if args.desired_kl is None:
            run.learning_rate = fraction * args.learning_rate
        optimizer.param_groups[0]["lr"] = run.learning_rate

        # ---- [1] Rollout: T steps in N environments; only the policy runs ----------------------
        if iteration % args.restart_every == 0:
            run.restart(env_seed + iteration * args.num_envs + rank * N, args.restart_every * T)
            obs[T], info = envs.reset(seed=run.restart_seed)
            was_done = np.zeros(N, bool)
        obs[0] = obs[T]
        masks[0], lives[0] = agent.masks(info, was_done), info.get("lives", 0)
        act, noise = agent.numpy_policy(), agent.noise(sample_rng, T, args.num_envs)[:, mine]
        with np.errstate(invalid="ignore"):  # a NaN or infinity is reported below
            for t in range(T):
                features[t] = agent.see(obs[t])
                actions[t] = act(features[t], noise[t] + masks[t])
                step = envs.step(agent.to_env(actions[t]))
                obs[t + 1], rewards[t], terminated[t], truncated[t], info = step
                masks[t + 1] = agent.masks(info, terminated[t] | truncated[t])
                lives[t + 1] = info.get("lives", 0)
        features[T] = agent.see(obs[T])
        run.played.append(actions.astype(np.uint8 if agent.choices[1] <= 256 else np.int64))
        done = terminated | truncated
        real = ~np.concatenate([was_done[None], done[:-1]])  # (T, N), False in reset rows
        was_done = done[-1]
        rewards[~real] = 0.0
        if not (np.isfinite(obs).all() and np.isfinite(rewards).all()):
            raise UserError(f"{args.env_id} gave a NaN or infinity after step {run.global_step}")
        run.global_step += sum(gather([int(real.sum())]))
        lost_life = args.life_loss & (lives[1:] < lives[:-1])
        pay = np.sign(rewards) if args.sign_rewards else rewards  # what is learned from
        episodes = []  # return and length of those that ended in this rollout
        for t in range(T):
            run.episode += rewards[t], real[t]
            discounted_returns[t] = run.discounted = args.gamma * run.discounted + pay[t]
            if done[t].any():
                episodes += run.episode[:, done[t]].T.tolist()
                run.episode[:, done[t]] = run.discounted[done[t]] = 0.0
        episodes = gather(episodes)
        # The normalisers move between iterations, so that all of one sees the same numbers; only
        # the first needs a look at its own rollout.
        if iteration == 0:
            agent.observe(obs[:-1][real], discounted_returns[real])

        # ---- [2] Advantages: one pass over all rows, by the parameters of the rollout ----------
        inputs = agent.normalise_obs(obs), actions, masks[:-1], agent.scale_rewards(pay)
        buffers = (*inputs, terminated | lost_life, done | lost_life, real)
        rollout = tuple(torch.as_tensor(x, device=device) for x in buffers)
        s, a, m, *_, keep = rollout
        with torch.no_grad():
            seen = torch.as_tensor(features, device=device) if agent.sees_images else s
            values = agent.critic(seen).squeeze(-1)  # (T+1, N)
            log_probs, _ = agent.log_prob_and_entropy(seen[:-1], a, m)  # (T, N)
        # From here on without the reset rows: obs (B, D), the others (B, ...).
        batch = [x[keep] for x in (s[:-1], a, m, log_probs)] + critique(args, values, rollout)
        *_, returns, values = batch
        unexplained = moments(returns - values)[2] / moments(returns)[2]
        share = len(values) / sum(gather([len(values)]))  # of the rows of all processes

        # ---- [3] Update: K epochs of shuffled minibatches --------------------------------------
        losses: list[Tensor] = []  # of a minibatch: the parts of its loss, its gradient's norm
        epoch_diagnostics = []
        for epoch in range(args.update_epochs):
            if epoch > 0 and args.recompute_advantages:
                with torch.no_grad():
                    batch[-3:] = critique(args, agent.value(rollout[0]), rollout)
            order = torch.as_tensor(shuffle_rng.permutation(len(batch[0])), device=device)
            number = min(args.num_minibatches, len(order) // 2)  # of at least 2 rows, for the std
            log_ratios = []
            for mb in zip(*(x[order].tensor_split(number) for x in batch)):
                if args.norm_adv == "minibatch":
                    mb = *mb[:-3], normalise(mb[-3]), *mb[-2:]
                if compiled is not None:
                    parts, log_ratio = compiled(mb, run.kl_coef)
                else:
                    parameters.grad.zero_()
                    loss, parts, log_ratio = ppo_loss(agent, args, mb, run.kl_coef)
                    loss.backward()
                all_sum(parameters.grad.mul_(share))
                grad_norm = parameters.grad.norm()
                parameters.grad *= (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)
                optimizer.step()
                losses.append(torch.cat((parts, grad_norm[None])))
                log_ratios.append(log_ratio)
            epoch_diagnostics.append(diagnostics(torch.cat(log_ratios), args.clip_coef))
            final_kl, _ = epoch_diagnostics[-1]
            if args.objective == "clip" and args.target_kl and final_kl > args.target_kl:
                break
        if args.objective == "penalty":
            run.kl_coef = adapt_kl_coef(run.kl_coef, final_kl, args.target_kl or 0.01)
        if args.desired_kl is not None:  # for the next iteration
            wish = args.desired_kl * fraction**0.5  # falls slowly, to 0 only at the end
            run.learning_rate = adapt_learning_rate(run.learning_rate, final_kl, wish)

        # ---- [4] Log: means over the iteration -------------------------------------------------
        means = all_sum(share * torch.stack(losses).mean(0)).tolist()
        if not np.isfinite(means).all():
            what = "loss" if not np.isfinite(means[:3]).all() else "gradient"
            raise UserError(f"{what} not finite at step {run.global_step}: lower --learning-rate")
        run.seconds = time.perf_counter() - loop_time
        sps = int(run.global_step / run.seconds)
        mean_return, mean_length = np.mean(episodes, axis=0) if episodes else (np.nan, np.nan)
        run.last_return = float(mean_return) if episodes else run.last_return
        run.recent_returns = (run.recent_returns + [r for r, _ in episodes])[-100:]
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
            "losses/kl_coef": run.kl_coef,
        }
        if run_dir is not None and writer is not None:
            log(run_dir, writer, run.global_step, metrics)
            warn(metrics, streaks)
        bar.set_postfix_str(f"return {run.last_return:.1f}")
        bar.update(args.batch_size)
        if bar.disable and rank == 0 and time.perf_counter() - print_time > 5:  # no terminal
            print_time = time.perf_counter()
            line = f"step {run.global_step:,}  return {run.last_return:.1f}  {sps:,} steps/s"
            print(line, flush=True)
        if iteration > 0:
            agent.observe(obs[:-1][real], discounted_returns[real])
        run.iteration = iteration + 1
        stopped = any(gather([stop is not None and stop.is_set()]))
        last = stopped or run.iteration == args.num_iterations
        if last or run.iteration % args.checkpoint_every == 0:
            save(run_dir, args, agent, optimizer, run)
        if stopped:
            break

    bar.close()
    envs.close()
    atexit.unregister(abandon)
    if run_dir is None or writer is None:
        return agent, {}
    writer.close()
    if run.iteration < args.num_iterations:
        print(f"stopped after {run.global_step} steps")
    results = {"env_id": args.env_id, "seed": args.seed, "global_step": run.global_step}
    results["sps"] = int(run.global_step / run.seconds)
    results["train_return"] = np.mean(run.recent_returns) if run.recent_returns else None
    results |= report(agent, args)
    results["wall_seconds"] = round(time.perf_counter() - start_time, 2)
    write_json(run_dir / "results.json", results)
    if args.capture_video:
        film(agent, args, run_dir)
    return agent, results


# ---- What keeps and reports a run. None of it is PPO; docs/en/copying.md says what may go --------


@dataclasses.dataclass
class Progress:
    """Where a run stands, beside its agent and its optimiser."""

    learning_rate: float
    kl_coef: float
    rngs: list[np.random.Generator]  # for sampling and shuffling
    episode: np.ndarray  # (2, N), return and length so far
    discounted: np.ndarray  # (N,), discounted return so far
    iteration: int = 0
    global_step: int = 0
    seconds: float = 0.0
    last_return: float = float("nan")
    recent_returns: list[float] = dataclasses.field(default_factory=list)  # of 100 episodes
    restart_seed: int = 0  # with which all episodes last began anew
    cut_off: bool = False  # whether that has ended one which had lasted from restart to restart
    # The actions since, each (T, N, P).
    played: list[np.ndarray] = dataclasses.field(default_factory=list)

    def restart(self, seed: int, length: int) -> None:
        """Begin all episodes anew, after `length` steps; say once if one had lasted as long."""
        if self.episode[1].max() >= length and not self.cut_off:
            self.cut_off = True
            text = f"warning: an episode was cut off after {length} steps, where all begin anew"
            tqdm.write(text, file=sys.stderr)
        self.restart_seed, self.played = seed, []
        self.episode[:] = 0.0
        self.discounted[:] = 0.0


def split_seed(seed: int) -> list[int]:
    """Return the seeds of environments, weights, sampling, shuffling and evaluation."""
    return (np.random.SeedSequence(seed).generate_state(5) >> 2).tolist()


def join_processes(args: Args) -> tuple[int, int, torch.device]:
    """Join the processes that torchrun started; return this one's rank, their number, its device.

    Each steps its share of the environments; their gradients and statistics are joined.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK") if dist.is_torchelastic_launched() else ()
    rank, world_size, local_rank = [int(os.environ[name]) for name in names] or (0, 1, 0)
    wide = args.hidden_size >= 512 and torch.cuda.is_available()
    cuda = args.device == "cuda" or (args.device == "auto" and wide)
    device = torch.device(f"cuda:{local_rank}" if cuda else "cpu")
    if world_size > 1 and not dist.is_initialized():
        what = f"--num-envs {args.num_envs} x --num-steps {args.num_steps}"
        rows = args.num_envs * (args.num_steps // 2)  # that are surely real
        if args.num_envs % world_size or rows < 2 * world_size * args.num_minibatches:
            raise UserError(f"{what} cannot be split over {world_size} processes")
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        if cuda:
            torch.cuda.set_device(device)
    return rank, world_size, device


def gather(items: list) -> list:
    """Return the lists of all processes, one after the other."""
    if not dist.is_initialized():
        return items
    lists: list[list] = [[]] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return list(itertools.chain(*lists))


def compile_loss(agent: Agent, args: Args, parameters: nn.Parameter) -> Callable:
    """Return a compiled function of a minibatch and kl_coef that fills `parameters.grad`.

    It gives the parts and log-ratios of `ppo_loss`. Loss and gradient are one graph, for compiling
    the loss and then calling backward() gains nothing. The first call takes some 20 seconds.
    """

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.agent = agent

        def forward(self, batch: Sequence[Tensor], kl_coef: Tensor) -> tuple[Tensor, tuple]:
            loss, *for_the_log = ppo_loss(self.agent, args, batch, kl_coef)
            return loss, tuple(for_the_log)

    module = Loss()
    names, shapes = zip(*((name, p.shape) for name, p in module.named_parameters()))

    def loss_of(vector: Tensor, batch: Sequence[Tensor], kl_coef: Tensor) -> tuple[Tensor, tuple]:
        parts = zip(vector.split([shape.numel() for shape in shapes]), shapes)
        tensors = dict(zip(names, (part.view(shape) for part, shape in parts)))
        return torch.func.functional_call(module, tensors, (batch, kl_coef))

    mode = "reduce-overhead" if parameters.is_cuda else None  # CUDA graphs
    compiled = torch.compile(torch.func.grad(loss_of, has_aux=True), dynamic=True, mode=mode)

    def fill_gradient(batch: Sequence[Tensor], kl_coef: float) -> list[Tensor]:
        try:
            gradient, for_the_log = compiled(parameters.detach(), batch, torch.tensor(kl_coef))
        except RuntimeError as error:
            raise UserError(f"--compile: {str(error).strip().splitlines()[0]}") from error
        parameters.grad.copy_(gradient)
        return [x.clone() for x in for_the_log]  # the next call may write over them

    return fill_gradient


def evaluate(
    agent: Agent, envs: gym.vector.VectorEnv, seed: int, deterministic: bool, filming: bool = False
) -> tuple[np.ndarray, list]:
    """Return the undiscounted returns (E,) of E whole episodes.

    They are cut off after 10,000 steps, games with images after 30,000. Each has an environment of
    its own: the first E to end in a few would be the short ones. The first one's pictures,
    2,000 at most, come second, if `filming`: if it draws none, what the agent sees.
    """
    act, rng = agent.numpy_policy(), np.random.default_rng(seed)
    obs, info = envs.reset(seed=seed)
    returns, running, frames = np.zeros(envs.num_envs), np.ones(envs.num_envs, bool), []
    ended = ~running
    for t in range(30_000 if agent.sees_images else 10_000):  # an Atari game may take 27,000
        if filming and running[0] and t < 2_000:  # a picture may take a megabyte
            draws = envs.render_mode == "rgb_array"
            frames.append(envs.render()[0] if draws else np.stack([obs[0, -1]] * 3, axis=-1))
        noise = 0.0 if deterministic else agent.noise(rng, envs.num_envs)
        seen = agent.see(obs.astype(agent.obs_dtype))
        actions = act(seen, noise + agent.masks(info, ended))
        step = envs.step(agent.to_env(actions))
        obs, reward, terminated, truncated, info = step
        ended = terminated | truncated
        returns[running] += reward[running]
        running &= ~ended
        if not running.any():
            break
    if running.any():
        print(f"{running.sum()} of {len(running)} episodes were cut off before their end")
    return returns, frames


def report(agent: Agent, args: Args) -> dict:
    """Evaluate in both modes, print and return the figures."""
    seed = split_seed(args.seed)[-1]
    if args.vectorization_mode == "async":  # that would be a process for every episode
        args = dataclasses.replace(args, vectorization_mode="sync")
    envs = make_envs(args, args.eval_episodes)
    results: dict[str, float] = {"eval_episodes": args.eval_episodes}
    for mode, prefix in (("deterministic", "eval"), ("stochastic", "eval_stochastic")):
        scores, _ = evaluate(agent, envs, seed, mode == "deterministic")
        results |= {f"{prefix}_mean": scores.mean(), f"{prefix}_std": scores.std()}
        print(f"{mode} evaluation: {scores.mean():.1f} ± {scores.std():.1f}")
    envs.close()
    return results


def film(agent: Agent, args: Args, run_dir: Path) -> None:
    """Write an mp4 of one episode of the best actions."""
    try:
        from gymnasium.utils.save_video import save_video

        envs = make_envs(args, 1, render_mode="rgb_array")
        _, frames = evaluate(agent, envs, split_seed(args.seed)[-1], True, filming=True)
        fps = envs.metadata.get("render_fps", 30)
        save_video(frames, str(run_dir), lambda _: True, name_prefix="final", fps=fps)
        envs.close()
    except gym.error.DependencyNotInstalled as error:
        raise UserError(f"--capture-video: {error}") from error


def write(path: Path, data: bytes) -> None:
    """Write beside `path`, then rename: a killed run leaves the old file or the new, never half."""
    with open(path.with_suffix(".tmp"), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path.with_suffix(".tmp"), path)


def write_json(path: Path, data: dict) -> None:
    """Write `data` as JSON."""
    write(path, (json.dumps(data, indent=2, default=str) + "\n").encode())


def open_run(args: Args, run: Progress) -> tuple[Path, SummaryWriter]:
    """Make the folder of a new run, or drop what a resumed one logged after its checkpoint."""
    name = f"{args.env_id}__{Path(__file__).stem}__{args.seed}__{time.time_ns() // 10**6}"
    run_dir = args.resume or args.run_dir or Path("runs", name.replace("/", "-"))
    if args.resume is None:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--run-dir {run_dir}: {error}") from error
        if (run_dir / "args.json").exists():
            there = (run_dir / "checkpoint.pt").exists()
            what = "--resume it" if there else "delete it, for it has no checkpoint yet"
            raise UserError(f"--run-dir {run_dir} holds a run: {what}, or name another")
    else:
        lines = (run_dir / "metrics.csv").read_bytes().splitlines(keepends=True)
        write(run_dir / "metrics.csv", b"".join(lines[: run.iteration + 1]))  # and the header
    write_json(run_dir / "args.json", dataclasses.asdict(args) | {"resume": None})
    return run_dir, SummaryWriter(run_dir, purge_step=run.global_step + 1)


def log(run_dir: Path, writer: SummaryWriter, step: int, metrics: dict) -> None:
    """Add the metrics to TensorBoard and to metrics.csv."""
    values = [Summary.Value(tag=k, simple_value=x) for k, x in metrics.items() if np.isfinite(x)]
    writer.file_writer.add_summary(Summary(value=values), step)  # one by one takes 6 times as long
    with open(run_dir / "metrics.csv", "a") as file:
        if file.tell() == 0:
            print("global_step", *metrics, sep=",", file=file)
        print(step, *metrics.values(), sep=",", file=file)


def warn(metrics: dict, streaks: dict[str, int]) -> None:
    """Say once what has looked wrong for ten iterations in a row; `streaks` counts them."""
    signs = {
        "approx_kl > 0.1, the policy leaps: lower --learning-rate": (
            metrics["losses/approx_kl"] > 0.1
        ),
        "explained_variance < 0, the critic is worse than a constant: raise --num-steps": (
            metrics["losses/explained_variance"] < 0.0
        ),
        "entropy nearly 0: unless the task is solved, raise --ent-coef": (
            metrics["losses/entropy"] < 0.001
        ),
    }
    for text, bad in signs.items():
        streaks[text] = streaks.get(text, 0) + 1 if bad or streaks.get(text, 0) >= 10 else 0
        if streaks[text] == 10:
            tqdm.write(f"warning: {text}", file=sys.stderr)


def save(run_dir: Path | None, args: Args, agent: Agent, optimizer: Adam, run: Progress) -> None:
    """Write checkpoint.pt in `run_dir`, if this process has one; each adds what it alone knows."""
    state = vars(run) | {"rngs": [rng.bit_generator.state for rng in run.rngs]}
    state |= {"played": np.array(run.played)}
    state = {k: torch.as_tensor(v) if isinstance(v, np.ndarray) else v for k, v in state.items()}
    processes = gather([state])
    if run_dir is not None:
        plain_args = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        checkpoint = {"args": plain_args, "agent": agent.state_dict(), "processes": processes}
        file = io.BytesIO()
        torch.save(checkpoint | {"optimizer": optimizer.state_dict()}, file)
        write(run_dir / "checkpoint.pt", file.getvalue())


def load(folder: Path) -> dict:
    """Read a folder's checkpoint as data: `weights_only` refuses a program."""
    path = folder / "checkpoint.pt"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if {"args", "agent", "optimizer", "processes"} <= saved.keys():
            return saved
    except Exception as error:
        reason = f"{type(error).__name__} {error}".splitlines()[0]
        raise UserError(f"{path} cannot be read: {reason}") from error
    raise UserError(f"{path} is no checkpoint of a run")


def restore(
    args: Args, agent: Agent, optimizer: Adam, run: Progress, rank: int, envs: gym.vector.VectorEnv
) -> tuple[np.ndarray, np.ndarray, dict]:
    """Take up the checkpoint; return the last observations, where an episode has ended, the info.

    An environment's state cannot be saved in general. So episodes begin anew every `restart_every`
    iterations, resumed or not, and the actions since the last restart are played again here: an
    environment that does the same for the same seed and actions is then where it was.
    """
    assert args.resume is not None
    flag, saved = f"--resume {args.resume}:", load(args.resume)
    states, num_processes = saved["processes"], len(gather([rank]))
    if len(states) != num_processes:
        raise UserError(f"{flag} saved by {len(states)} processes, resumed by {num_processes}")
    for name in "env_id num_envs num_steps seed activation norm_obs".split():
        if getattr(args, name) != saved["args"][name]:
            raise UserError(f"{flag} --{name.replace('_', '-')} was {saved['args'][name]}")
    try:
        agent.load_state_dict(saved["agent"])
        optimizer.load_state_dict(saved["optimizer"])
        if any(state["exp_avg"].shape != p.shape for p, state in optimizer.state.items()):
            raise ValueError("Adam itself does not look, and would write past the end")
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{flag} its network is not that of the flags given") from error
    state = {k: v.numpy() if isinstance(v, Tensor) else v for k, v in states[rank].items()}
    for rng, rng_state in zip(run.rngs, state.pop("rngs")):
        rng.bit_generator.state = rng_state
    vars(run).update(state, played=list(state["played"]))
    for name in ("learning_rate", "kl_coef"):
        if getattr(args, name) != saved["args"][name]:  # another flag than the run had
            setattr(run, name, getattr(args, name))
    obs, info = envs.reset(seed=run.restart_seed)
    ended = np.zeros(envs.num_envs, bool)
    if run.iteration % args.restart_every:
        for step_actions in itertools.chain(*run.played):
            step = envs.step(agent.to_env(step_actions))
            obs, _, terminated, truncated, info = step
            ended = terminated | truncated
    return obs, ended, info


def evaluate_run(args: Args, folder: Path) -> None:
    """Evaluate the policy of a folder's checkpoint, as at the end of its training."""
    args.check()
    torch.set_num_threads(args.num_threads)
    agent = Agent(args, make_envs(args, 1))
    try:
        agent.load_state_dict(load(folder)["agent"])
    except RuntimeError as error:
        raise UserError(f"--evaluate {folder}: its network is not that of the flags") from error
    report(agent, args)
    if args.capture_video:
        film(agent, args, folder)


def parse() -> Args:
    """Return the arguments; those of a run that is resumed or evaluated are the defaults."""
    args = tyro.cli(Args, args=[word for word in sys.argv[1:] if word not in ("-h", "--help")])
    folder = args.resume or args.evaluate
    if folder is None:
        mode = "sync" if args.vectorization_mode == "async" else args.vectorization_mode
        envs = make_envs(dataclasses.replace(args, vectorization_mode=mode), 1)
        images = is_image(envs.single_observation_space, 1)
        envs.close()
        return tyro.cli(Args, default=Args(**PIXELS) if images else Args())
    saved = load(folder)["args"]
    ours: dict[str, Any] = dict(run_dir=folder, resume=None, evaluate=None, capture_video=False)
    if args.evaluate is not None:
        ours["device"] = "auto"  # the run may have been on another machine
    try:
        defaults = Args(**saved | ours | {"env_kwargs": tuple(saved["env_kwargs"])})
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no run of {Path(__file__).name}") from error
    return tyro.cli(Args, default=defaults)


def main() -> None:
    """Run from the command line: Ctrl-C ends the training in order, `UserError` is one line."""
    stop, status = threading.Event(), 0

    def on_signal(number: int, _: object) -> None:
        nonlocal status
        status = 128 + number  # what a shell expects
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one ends it at once
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    try:
        args = parse()
        if args.evaluate is not None:
            for number in (signal.SIGINT, signal.SIGTERM):  # nothing is to be saved
                signal.signal(number, signal.SIG_DFL)
            evaluate_run(args, args.evaluate)
        else:
            train(args, stop)
    except (EOFError, ConnectionError) as error:
        reason = f"{error!r}: has a process of the environments died?"
        print(f"{Path(__file__).name}: {reason}", file=sys.stderr)
        sys.exit(1)
    except (UserError, OSError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        reason = str(error).splitlines()[0]
        print(f"{Path(__file__).name}: another process has ended: {reason}", file=sys.stderr)
        sys.exit(1)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
