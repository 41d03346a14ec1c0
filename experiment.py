"""What every run needs and no paper mentions, shared by the scripts. Not one formula of PPO.

RunArgs, EnvArgs                the flags that say how to run
start, all_sum, gather, ...     seeds, device, and several processes (torchrun)
make_vec, RecordedEnvs, ...     environments, their masks, their running statistics
numpy_forward, ...              speed
Run                             a training run: its folder, log, checkpoints and Ctrl-C
evaluate, load_agent            what came out of it
main                            the command line
"""

import ast
import atexit
import contextlib
import ctypes
import dataclasses
import importlib
import inspect
import io
import json
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from gymnasium.vector import VectorEnv
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

if os.name == "posix":
    import fcntl

SIGNALS = [getattr(signal, x) for x in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, x)]


class UserError(ValueError):
    """Something the user can correct: one line on the command line, without a traceback."""


@contextlib.contextmanager
def as_user_error(what: Any, *kinds: type[Exception]) -> Iterator[None]:
    """Raise errors of these kinds as a `UserError`, which says `what` is wrong."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{what}: {error}") from error


def say(text: str) -> None:
    """Print a line. A terminal that is gone, or cannot show a letter, must not stop a run."""
    try:
        print(text, flush=True)
    except (OSError, UnicodeEncodeError):
        sys.stdout = open(os.devnull, "w")


# ---- Flags -------------------------------------------------------------------------------------


@dataclasses.dataclass
class RunArgs:
    """How to run. A script's `Args` adds the hyperparameters of its algorithm."""

    seed: int = 1  # Seed of the environments, initial weights, sampling and shuffling.
    run_dir: Path | None = None  # Folder, by default runs/<environment>__<script>__<seed>__<time>.
    device: str = "auto"  # Device such as cpu, cuda:1, mps. By default the GPU where it is faster.
    num_threads: int = 1  # Threads on the CPU. Only wide networks gain from more than one.
    checkpoint_every: int = 25  # Iterations between checkpoints. The last one is always saved.
    resume: Path | None = None  # Continue the run in this folder, with the flags it had.
    evaluate: Path | None = None  # Evaluate the run in this folder instead of training.

    fixed, fixed_to_resume = "", "seed"  # flags fixed for a trained network, or for its run
    unit, wants_gpu = "steps", False  # what a run counts; whether a GPU helps narrow networks too

    def check(self) -> None:
        """Raise `UserError`, which names the flag, for a value that cannot work."""
        self.check_range("num_threads", 1, 1024)
        self.check_range("checkpoint_every", 1)
        self.check_range("seed", 0, 2**63 - 1)
        folders = {str(x) for x in (self.run_dir, self.resume, self.evaluate) if x is not None}
        if self.run_dir == Path() or len(folders) > 1 or (self.resume and self.evaluate):
            raise UserError("--run-dir, --resume and --evaluate: name one folder, with one of them")

    def check_range(self, names: str, low: float, high: float = 1e12) -> None:
        """Raise `UserError` unless each flag named is None or within [low, high]."""
        for name in names.split():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                flag = f"--{name.replace('_', '-')} {value}"
                raise UserError(f"{flag} must lie between {low:g} and {high:g}")


@dataclasses.dataclass
class EnvArgs(RunArgs):
    """How to run with environments of Gymnasium."""

    env_kwargs: tuple[str, ...] = ()  # Environment keyword arguments, such as is_slippery=false.
    # How environments run in parallel. By default, their author's vectorised version, else sync.
    # async gives each a process, which pays off for slow ones.
    vectorization_mode: Literal["sync", "async", "vector_entry_point"] | None = None
    compile: bool = False  # Compile the loss and its gradient. Pays off in runs of minutes.
    eval_episodes: int = 100  # Episodes of each final evaluation, deterministic and stochastic.
    capture_video: bool = False  # Film an episode of the final policy, 2,000 steps at most.

    fixed_to_resume, infos = "seed num_envs num_steps", ""  # infos: to keep, besides masks
    env_id, total_timesteps, num_envs, num_steps = "", 0, 0, 0  # see the scripts
    subject = property(lambda self: self.env_id)  # for the log
    batch_size = property(lambda self: self.num_envs * self.num_steps)
    num_iterations = property(lambda self: self.total_timesteps // self.batch_size)

    def check(self) -> None:
        super().check()
        self.check_range("total_timesteps eval_episodes num_envs num_steps", 1)
        if self.num_iterations < 1:
            batch = f"--num-envs {self.num_envs} x --num-steps {self.num_steps}"
            raise UserError(f"--total-timesteps {self.total_timesteps} is below one batch, {batch}")


# ---- Processes ---------------------------------------------------------------------------------


def split_seed(seed: int) -> list[int]:
    """Return seeds for environments, weights, sampling, shuffling and evaluation."""
    return (np.random.SeedSequence(seed).generate_state(5) >> 2).tolist()


def start(args: RunArgs) -> torch.device:
    """Check the flags, seed everything, join the processes of torchrun; return the device."""
    args.check()
    torch.set_num_threads(args.num_threads)
    for path in Path(np.__file__).parents[1].glob("numpy.libs/*openblas*"):  # NumPy has its own
        for name in ("scipy_openblas_set_num_threads64_", "openblas_set_num_threads64_"):
            getattr(ctypes.CDLL(str(path)), name, lambda number: None)(args.num_threads)
    seed = split_seed(args.seed)[1]
    torch.manual_seed(seed)
    launched = dist.is_available() and dist.is_torchelastic_launched()
    name = args.device
    if name == "auto":
        gains = args.wants_gpu or getattr(args, "hidden_size", getattr(args, "d_model", 0)) >= 512
        name = "cuda" if gains and torch.cuda.is_available() else "cpu"
    if launched and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    with as_user_error(f"--device {name}", RuntimeError, AssertionError, ImportError):
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if launched and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        # Otherwise Gloo's threads may abort the process as it exits.
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
        args.check()  # again, for this process's share
    seed_global_generators(seed + rank())
    return device


def seed_global_generators(seed: int) -> None:
    """Seed the random numbers of Python and NumPy, for environments that use those."""
    random.seed(seed)
    np.random.seed(seed % 2**32)


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_sum(x: Any, weight: float = 1) -> Tensor:
    """Make `x` the sum of `weight * x` over all processes; leave it, if there is one. Return it."""
    if world_size() > 1:
        dist.all_reduce(x.mul_(weight))
    return x


def gather(item: Any) -> list:
    """Return the items of all processes."""
    items = [item] * world_size()
    if world_size() > 1:
        dist.all_gather_object(items, item)
    return items


def mean_and_variance(x: Tensor, correction: int = 1) -> tuple[Tensor, Tensor]:
    """Return mean and variance of the rows (B, ...) of all processes."""
    if world_size() == 1:
        return x.mean(0), x.var(0, correction=correction)
    count = all_sum(x.new_tensor(len(x)))
    mean = all_sum(x.sum(0)) / count
    return mean, all_sum((x - mean).square().sum(0)) / (count - correction)


# ---- Environments ------------------------------------------------------------------------------


class SingleEnv(gym.Wrapper):
    """One environment. Its info has only masks, wherever they come from, and the `infos` named."""

    def __init__(self, env: gym.Env, infos: str):
        super().__init__(env)
        self.infos, space = ["action_mask", *infos.split()], env.observation_space
        self.in_obs = isinstance(space, Dict) and "action_mask" in space.spaces  # PettingZoo's way
        if self.in_obs:
            self.observation_space = Dict({k: x for k, x in space.items() if k != "action_mask"})
        self.has_masks = self.in_obs or env.has_wrapper_attr("action_masks")
        self.in_worker = multiprocessing.current_process().name.startswith("Worker<")  # Gymnasium's
        for number in SIGNALS if self.in_worker else ():
            signal.signal(number, signal.SIG_IGN)  # the main process shuts the run down

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Any:
        if self.in_worker and seed is not None:
            seed_global_generators(seed)
        return self.call(self.env.reset, seed=seed, options=options)

    def step(self, action: Any) -> Any:
        return self.call(self.env.step, action)

    def call(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        try:
            obs, *others, info = function(*args, **kwargs)
            info = {key: info[key] for key in self.infos if key in info}
            if self.in_obs:
                info["action_mask"] = obs["action_mask"]
                obs = {key: obs[key] for key in self.observation_space}
            elif self.has_masks:
                info["action_mask"] = np.hstack(self.env.get_wrapper_attr("action_masks")())
            return obs, *others, info
        except Exception:
            if self.in_worker:  # an error that cannot be pickled would hang Gymnasium for ever
                raise RuntimeError(traceback.format_exc()) from None
            raise


def make_vec(args: EnvArgs, num_envs: int, wrap: Any = None, **kwargs: Any) -> VectorEnv:
    """Make the environments that the flags name; raise `UserError` if a flag is wrong.

    Environments that their author vectorised cannot be wrapped: with a `wrap` of yours, single ones
    take their place, if they exist. An error inside the environment keeps its traceback.
    """
    kwargs = {**dict(map(read_keyword, args.env_kwargs)), **kwargs}
    mode, (module, _, name) = args.vectorization_mode, args.env_id.rpartition(":")
    module = "ale_py" if name.startswith("ALE/") else module
    sys.path.append("")  # the folder in which the command was typed
    try:
        if module:
            importlib.import_module(module)  # registers its environments
        spec = gym.spec(name)
        if mode is None and (spec.vector_entry_point is None or (wrap and spec.entry_point)):
            mode = "sync"
        wrappers = [lambda env: SingleEnv(env, args.infos), *filter(None, [wrap])]
        wrappers = wrappers if mode in ("sync", "async") else []
        if wrap and not wrappers and spec.entry_point:
            raise UserError("the script's wrapper needs --vectorization-mode sync or async")
        envs = gym.make_vec(name, num_envs, mode, wrappers=wrappers, **kwargs)
    except Exception as error:
        if not is_fault_of_a_flag(error):
            raise
        missing = module == "ale_py" and isinstance(error, ImportError)
        hint = ' (pip install "gymnasium[atari]")' if missing else ""
        raise UserError(f"--env-id {args.env_id}: {' '.join(str(error).split())}{hint}") from error
    if envs.metadata.get("autoreset_mode") != gym.vector.AutoresetMode.NEXT_STEP:
        refuse(args, envs, "needs the autoreset mode NEXT_STEP")
    return envs


def read_keyword(pair: str) -> tuple[str, Any]:
    """Read name=value: true (also if it is missing), false, none, a Python literal, or a string."""
    name, equals, text = pair.partition("=")
    words: Any = dict(true=True, yes=True, on=True, false=False, no=False, off=False)
    words |= dict(none=None, null=None)
    with contextlib.suppress(ValueError, SyntaxError):
        return name, ast.literal_eval(text)
    return name, words.get(text.lower(), text) if equals else True


def is_fault_of_a_flag(error: BaseException, *scripts: str) -> bool:
    """Return whether only Gymnasium's code, these scripts' and ours took part: a flag is wrong."""
    while error.__context__ is not None:
        error = error.__context__
    known = (__file__, *scripts, "<frozen importlib", importlib.__file__, *gym.__path__)
    return all(x.filename.startswith(known) for x in traceback.extract_tb(error.__traceback__))


def refuse(args: EnvArgs, envs: VectorEnv, text: str) -> NoReturn:
    """Close environments that a script cannot handle, and say why."""
    envs.close()
    raise UserError(f"--env-id {args.env_id}: {text}")


def is_image(shape: Any, num_axes: tuple[int, ...] = (2, 3)) -> bool:
    """Return whether a shape has height and width, with or without channels, first or last."""
    return len(shape or ()) in num_axes and sorted(shape)[-2] >= 36


def flatten_observations(args: EnvArgs, envs: VectorEnv, for_images: str) -> VectorEnv:
    """Turn observations into vectors (N, D), discrete parts one-hot; refuse images."""
    space = envs.single_observation_space
    if isinstance(space, Dict) and "action_mask" in space.spaces:
        refuse(args, envs, "vectorised environments must have the action_mask in the info")
    parts = [space]
    for part in parts:
        if isinstance(part, Dict | Tuple):
            parts += part.values() if isinstance(part, Dict) else part  # they are looked at too
        elif is_image(part.shape):
            refuse(args, envs, f"its observation has an image: {for_images}")
        elif not isinstance(part, Box | Discrete | MultiDiscrete | MultiBinary):
            refuse(args, envs, f"its observation has {part}, which has no fixed size")
    is_flat = isinstance(space, Box) and len(space.shape) == 1
    return envs if is_flat else gym.wrappers.vector.FlattenObservation(envs)


class RecordedEnvs(gym.vector.VectorWrapper):
    """Environments that record their episodes. A reset row has a reward of 0 and no action mask."""

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        self.done, self.returns = np.zeros(self.num_envs, bool), np.zeros(self.num_envs)
        self.steps, self.starts = 0, np.zeros(self.num_envs, int)  # at the start of each episode
        self.finished: list[tuple[int, float, int]] = []  # environment, return, length
        obs, info = self.env.reset(**kwargs)
        return self.complete(obs, info, begins=np.ones(self.num_envs, bool))

    def step(self, actions: np.ndarray) -> tuple:
        obs, rewards, terminated, truncated, info = self.env.step(actions)
        rewards, begins = rewards.astype(np.float64), self.done  # which were only reset
        rewards[begins] = 0.0
        self.returns += rewards
        self.steps += 1
        self.done = terminated | truncated
        for i in self.done.nonzero()[0].tolist():
            self.finished.append((i, float(self.returns[i]), self.steps - int(self.starts[i])))
            self.returns[i], self.starts[i] = 0.0, self.steps + 1  # the reset is no step
        obs, info = self.complete(obs, info, begins)
        return obs, rewards, terminated, truncated, info

    def complete(self, obs: np.ndarray, info: dict, begins: np.ndarray) -> tuple[np.ndarray, dict]:
        """Make numbers floats, unless they are images; add to the info what it lacks."""
        if obs.dtype != np.uint8 or obs.ndim != 4:
            obs = obs.astype(np.float32, copy=False)
        info = info | {"begins": begins}
        if hasattr(self.env.unwrapped, "action_masks"):  # of all environments
            info["action_mask"] = np.asarray(self.env.unwrapped.action_masks())
        if "action_mask" in info:
            info["_action_mask"] = info.get("_action_mask", True) & ~self.done
        return obs, info


class Choices:
    """Actions of P parts, each one of at most A choices."""

    SPACES = (Discrete, MultiDiscrete, MultiBinary)

    def __init__(self, space: Any):
        self.space = space
        counts = np.full(space.shape, 2)  # of choices, for each part
        if not isinstance(space, MultiBinary):
            counts = np.asarray(space.n if isinstance(space, Discrete) else space.nvec)
        counts = counts.reshape(-1, 1)
        self.shape = (len(counts), int(counts.max()))  # P, A
        self.exists = np.arange(self.shape[1]) < counts  # (P, A): a part may have fewer than A
        self.no_masks = np.where(self.exists, 0.0, -1e9).astype(np.float32)

    def masks(self, info: dict) -> np.ndarray:
        """Return what to add to the logits, (N, P, A) or (P, A): 0 for a legal choice, else -1e9.

        `info["action_mask"]` has a 1 for each legal choice and a 0 for any other, one part after
        the other; `info["_action_mask"]` says which environments gave one. Raises `UserError`.
        """
        if "action_mask" not in info:
            return self.no_masks
        given, count = np.asarray(info["action_mask"]), self.exists.sum()
        rows = np.broadcast_to(info.get("_action_mask", True), len(given))
        given = given[rows]
        if given.size != count * rows.sum() or ((given != 0) & (given != 1)).any():
            raise UserError(f"an action_mask needs {count} numbers: 1 for a legal choice, else 0")
        legal = np.repeat(self.exists[None], len(rows), axis=0)  # (N, P, A)
        legal[rows[:, None, None] & self.exists] = given.ravel()
        if not legal.any(-1).all():
            raise UserError("an action_mask leaves no legal action")
        return np.where(legal, 0.0, -1e9).astype(np.float32)

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """Return actions (N, P), counted from 0, as the environment counts and shapes them."""
        actions = actions.reshape(-1, *self.space.shape) + getattr(self.space, "start", 0)
        return actions.astype(self.space.dtype)


class Normaliser(nn.Module):
    """Brings rows to mean 0, if `shift`, and std 1, using the moments of all rows so far.

    It is saved with the agent, but stays on the CPU, where the environments are.
    """

    def __init__(self, shape: tuple, clip: float, shift: bool = True, enabled: bool = True):
        super().__init__()
        self.clip, self.shift, self.enabled = clip, shift, enabled
        self.mean: Tensor = nn.Buffer(torch.zeros(shape, dtype=torch.float64))
        self.var: Tensor = nn.Buffer(torch.ones(shape, dtype=torch.float64))
        self.count: Tensor = nn.Buffer(torch.zeros((), dtype=torch.float64))

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        return self

    def update(self, rows: np.ndarray) -> None:
        """Add rows (B, ...): the moments of a union follow from those of its parts."""
        if self.enabled:
            x, count = torch.as_tensor(rows, dtype=torch.float64), sum(gather(len(rows)))
            mean, var = mean_and_variance(x, correction=0)
            weight, delta = count / (self.count + count), mean - self.mean
            self.var += weight * (var - self.var + (1 - weight) * delta.square())
            self.mean += weight * delta
            self.count += count

    def snapshot(self) -> Callable[[np.ndarray], np.ndarray]:
        """Return a function that normalises rows by the current moments and clips them."""
        if not self.enabled:
            return lambda rows: rows
        mean = (self.mean * self.shift).float().numpy()
        std = (self.var + 1e-8).sqrt().float().numpy()
        return lambda rows: ((rows - mean) / std).clip(-self.clip, self.clip)


# ---- Speed -------------------------------------------------------------------------------------


def to_device(array: Any, device: torch.device) -> Tensor:
    """Return an array as a tensor. A GPU fetches it while the CPU goes on."""
    x = torch.as_tensor(array)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def numpy_forward(net: nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    """Return `net` as a function from arrays to arrays; make it anew after each update.

    For few rows PyTorch's overhead takes four times as long as NumPy, so a plain `nn.Sequential` of
    `Linear`, `ReLU` and `Tanh` runs in NumPy, on copies. Any other module runs as it is.
    """

    def torch_forward(x: np.ndarray) -> np.ndarray:
        device = next((p.device for p in net.parameters()), None)
        with torch.no_grad():
            return net(torch.tensor(x, device=device)).cpu().numpy()  # a copy: it may be written to

    layers: Any = net if type(net) is nn.Sequential else [net]
    known = all(type(layer) in (nn.Linear, nn.ReLU, nn.Tanh) for layer in layers)
    biased = all(layer.bias is not None for layer in layers if type(layer) is nn.Linear)
    hooked = any(x._forward_hooks or x._forward_pre_hooks for x in net.modules())
    parameters = list(net.parameters())
    if not known or not biased or hooked or not parameters:
        return torch_forward
    on_cpu = nn.utils.parameters_to_vector(parameters).detach().cpu()  # at once: each fetch waits
    arrays = dict(zip(parameters, on_cpu.split([p.numel() for p in parameters])))
    steps: list[Callable] = []
    for layer in layers:
        if isinstance(layer, nn.Linear):
            weight, bias = (arrays[p].view_as(p).numpy().T for p in layer.parameters())
            steps.append(lambda x, weight=weight, bias=bias: x @ weight + bias)
        else:
            steps.append(np.tanh if isinstance(layer, nn.Tanh) else lambda x: np.maximum(x, 0.0))

    def forward(x: np.ndarray) -> np.ndarray:
        for step in steps:
            x = step(x)
        return x

    return forward


def flatten_parameters(module: nn.Module) -> nn.Parameter:
    """Return one vector of which all parameters of `module` become views; gradients likewise.

    Clipping and Adam then take one kernel each, not one per tensor: a small run saves a tenth.
    """
    parameters = list(module.parameters())
    flat = nn.Parameter(nn.utils.parameters_to_vector(parameters).detach())
    flat.grad = torch.zeros_like(flat)
    nn.utils.vector_to_parameters(flat.data, parameters)  # assigns views, copies nothing
    for parameter, grad in zip(parameters, flat.grad.split([p.numel() for p in parameters])):
        parameter.grad = grad.view_as(parameter)
    return flat


class Adam(torch.optim.Adam):
    """PyTorch's Adam without the wrappers for torch.compile, whose import takes a second."""

    add_param_group = inspect.unwrap(torch.optim.Adam.add_param_group)
    state_dict = inspect.unwrap(torch.optim.Adam.state_dict)
    zero_grad = inspect.unwrap(torch.optim.Adam.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))  # its wrapper did that as well


def compile_gradient(loss: Callable, agent: nn.Module, args: Any, parameters: Tensor) -> Callable:
    """Return a function of a batch that fills `parameters.grad` and returns the loss's figures.

    Loss and gradient are compiled as one graph: compiling the loss alone gains half as much. The
    first call takes about 20 seconds.
    """
    module = nn.Module()
    module.agent = agent
    module.forward = lambda batch: loss(agent, args, batch)
    names, shapes = zip(*((name, p.shape) for name, p in module.named_parameters()))

    def loss_of(vector: Tensor, batch: tuple) -> tuple[Tensor, dict[str, Tensor]]:
        parts = zip(vector.split([shape.numel() for shape in shapes]), shapes)
        tensors = dict(zip(names, (part.view(shape) for part, shape in parts)))
        return torch.func.functional_call(module, tensors, (batch,))

    compiled = torch.compile(torch.func.grad(loss_of, has_aux=True), dynamic=True)

    def fill_gradient(batch: tuple) -> dict[str, Tensor]:
        with as_user_error("--compile", RuntimeError):
            gradient, figures = compiled(parameters.detach(), batch)
        parameters.grad.copy_(gradient)
        return figures

    return fill_gradient


# ---- A run and its folder ----------------------------------------------------------------------


def write(path: Path, data: bytes | memoryview) -> None:
    """Write a new file and let it replace `path`: a killed run leaves one or the other."""
    new = path.with_suffix(".new")
    with as_user_error(path.parent, OSError):
        new.unlink(missing_ok=True)
        with open(new, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)


def write_json(path: Path, data: dict[str, Any]) -> None:
    write(path, (json.dumps(data, indent=2, default=str) + "\n").encode())


def fits(value: Any, kind: Any) -> bool:
    """Return whether a value is of an annotated type, or one of the words of a `Literal`."""
    parts = get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(fits(item, parts[0]) for item in value)
    if parts:
        return any(fits(value, part) for part in parts)
    return kind in (value, type(value)) or (kind is float and type(value) is int)


def load_checkpoint(folder: Path, args_class: type) -> tuple[dict, Any]:
    """Read a folder's checkpoint as data, which runs no code; return it and its arguments."""
    with as_user_error(f"{folder} holds no checkpoint of this script", Exception):
        if zipfile.ZipFile(folder / "checkpoint.pt").testzip():  # torch.load does not check it
            raise ValueError("checkpoint.pt is damaged")
        saved = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        for name, kind in get_type_hints(args_class).items():
            if not fits(saved["args"][name], kind):
                raise ValueError(f"{name} is {saved['args'][name]!r}")
        return saved, args_class(**saved["args"])


def pack_space(space: Any) -> dict[str, Any]:
    """Return a space as what a checkpoint can hold."""
    names = [name for name in ("low", "high", "n", "nvec", "start") if hasattr(space, name)]
    numbers = {name: torch.as_tensor(getattr(space, name)) for name in names}
    return numbers | {"kind": type(space).__name__, "dtype": str(space.dtype)}


def unpack_space(packed: dict[str, Any]) -> gym.Space:
    """Return the space that `pack_space` wrote down."""
    kinds: Any = {kind.__name__: kind for kind in (Box, *Choices.SPACES)}
    numbers: Any = {name: x.numpy()[()] for name, x in packed.items() if isinstance(x, Tensor)}
    if packed["kind"] in ("Box", "MultiDiscrete"):
        numbers["dtype"] = np.dtype(packed["dtype"]).type
    return kinds[packed["kind"]](**numbers)


class Run(contextlib.ExitStack):
    """A training run and its folder. On exit it closes all that it opened, whatever happens."""

    def __init__(self, args: Any, on_iteration: Callable | None = None):
        super().__init__()
        names = ("run_dir", "resume", "evaluate")  # in code a string names a folder too
        folders = {name: Path(getattr(args, name)) for name in names if getattr(args, name)}
        self.args, self.on_iteration = dataclasses.replace(args, **folders), on_iteration
        self.device = start(self.args)
        self.env_seed, _, sample_seed, shuffle_seed, self.eval_seed = split_seed(args.seed)
        self.sampling: Any = np.random.default_rng(sample_seed + rank())
        self.shuffling: Any = np.random.default_rng(shuffle_seed + rank())
        self.iteration, self.global_step, self.seconds = 0, 0, 0.0  # seconds of training
        self.recent_returns: list[float] = []  # of the last 100 episodes
        self.weight = 1.0  # of this process's rows among all
        self.folder: Any = None  # a Path, of process 0 only, and not with --evaluate
        self.envs: RecordedEnvs | None = None
        self.stopped, self.signal_time, self.print_time = "", 0.0, time.perf_counter()
        with contextlib.suppress(ValueError):  # only the main thread may
            for number in SIGNALS:
                self.callback(signal.signal, number, signal.signal(number, self.on_signal))
        self.push(lambda kind, error, trace: self.close_envs(abandon=error is not None))

    def on_signal(self, number: int, _: Any) -> None:
        """Stop after this iteration, or stop evaluating. A second signal exits at once."""
        if not self.signal_time:
            self.stopped, self.signal_time = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() > self.signal_time + 1.0:  # schedulers and torchrun may send it twice
            raise SystemExit(128 + number)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        with contextlib.suppress(*[OSError] if error else []):  # it is already reported
            super().__exit__(kind, error, trace)
        if isinstance(error, MemoryError | RuntimeError) and " allocate" in str(error):
            raise UserError(f"not enough memory: {error}") from error

    # Environments

    def make_envs(self, make_envs: Callable) -> RecordedEnvs:
        """Make this process's share of the environments."""
        if self.args.num_envs % world_size():
            raise UserError(f"--num-envs must be a multiple of {world_size()}, the process count")
        if self.args.capture_video:
            self.film(make_envs, None)  # fails now, not after the training
        self.envs = RecordedEnvs(make_envs(self.args, self.args.num_envs // world_size()))
        return self.envs

    def first_observations(self, agent: Any) -> np.ndarray:
        """Return what an untrained agent sees in 256 steps, (B, D), for the first statistics."""
        rng, rows, policy = np.random.default_rng(self.eval_seed), [], agent.policy()
        obs, info = self.envs.reset(seed=self.env_seed)
        for _ in range(max(1, 256 // self.args.num_envs)):
            self.check_finite(obs)
            rows.append(obs[~self.envs.done])
            obs, _, _, _, info = self.envs.step(agent.act(obs, info, rng, policy))
        self.global_step += sum(gather(sum(map(len, rows))))
        return np.concatenate(rows)

    def close_envs(self, abandon: bool = False) -> None:
        """Close the environments, or abandon workers that would not answer a request to close."""
        if self.envs is not None:
            envs, self.envs = self.envs, None
            for worker in getattr(envs.unwrapped, "processes", []) if abandon else []:
                worker.kill()
                worker.join()
                envs.unwrapped.closed = True
            envs.close()

    # Folder and checkpoints

    def start(self, agent: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Open the folder, or load its checkpoint. Call it once, before the loop."""
        self.agent, self.optimizer, args = agent, optimizer, self.args
        with as_user_error(args.run_dir or args.resume, OSError):
            if rank() == 0 and not args.evaluate:
                self.lock_folder()
            if args.resume or args.evaluate:
                self.restore(args.resume or args.evaluate)
            if self.folder is not None:
                self.open_log()
        if self.envs is not None:  # each process, and each resumed run, plays episodes of its own
            self.env_seed += self.iteration * args.num_envs + rank() * self.envs.num_envs
        step, total = (n * args.batch_size for n in (self.iteration, args.num_iterations))
        quiet = None if self.folder else True  # None: a bar only in a terminal
        self.bar = tqdm(total=total, initial=step, unit=f" {args.unit}", disable=quiet)
        self.callback(self.bar.close)
        self.loop_time = time.perf_counter() - self.seconds

    def lock_folder(self) -> None:
        """Make the folder, for this process alone."""
        args, script = self.args, Path(inspect.getfile(type(self.args))).stem
        name = f"{args.subject}__{script}__{args.seed}__{time.time_ns() // 10**6}"
        self.folder = args.resume or args.run_dir or Path("runs", re.sub(r"[^\w.-]+", "-", name))
        if not args.resume:
            self.folder.mkdir(parents=True, exist_ok=True)
        if os.name == "posix":
            lock = os.open(self.folder, os.O_RDONLY)
            self.callback(os.close, lock)
            with as_user_error(f"{self.folder}: another process is using it", BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not args.resume and (self.folder / "args.json").exists():
            raise UserError(f"--run-dir {self.folder} holds a run: --resume it, or name another")

    def open_log(self) -> None:
        """Open metrics.csv and TensorBoard; drop what was logged after the checkpoint."""
        args, path = self.args, self.folder / "metrics.csv"
        if args.resume:
            lines = [x for x in path.read_bytes().splitlines(keepends=True) if x.endswith(b"\n")]
            write(path, b"".join(lines[: self.iteration + 1]))
            (self.folder / "results.json").unlink(missing_ok=True)
        write_json(self.folder / "args.json", vars(args) | {"resume": None})
        self.metrics_file = self.enter_context(open(path, "a"))
        self.writer = SummaryWriter(self.folder, purge_step=self.global_step + 1)
        self.callback(self.writer.close)
        rows = [f"| {name} | {value} |" for name, value in vars(args).items()]
        self.writer.add_text("hyperparameters", "\n".join(["| flag | value |", "|-|-|", *rows]))
        begin = f"resumed at {self.global_step:,} {args.unit}, " if args.resume else ""
        iterations = f"{args.num_iterations} iterations on {self.device}"
        say(f"{args.subject}: {begin}{iterations}, logged to {self.folder}")

    def save(self) -> None:
        """Write checkpoint.pt: the exact state of all that is ours."""
        rngs = [
            rng.get_state() if isinstance(rng, torch.Generator) else rng.bit_generator.state
            for rng in (self.sampling, self.shuffling)
        ]
        counted = ("iteration", "global_step", "seconds", "recent_returns")
        checkpoint = {
            "args": {k: None if isinstance(v, Path) else v for k, v in vars(self.args).items()},
            "agent": self.agent.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "run": {name: getattr(self, name) for name in counted},
            "rngs": gather(rngs),
        }
        if self.folder is None:
            return
        if self.envs is not None:
            checkpoint["obs_space"] = pack_space(self.envs.single_observation_space)
            checkpoint["action_space"] = pack_space(self.envs.single_action_space)
        os.fsync(self.metrics_file.fileno())  # after a power cut it has all rows of the checkpoint
        buffer = io.BytesIO()  # writing a file itself, torch.save would hide the disk's error
        torch.save(checkpoint, buffer)
        write(self.folder / "checkpoint.pt", buffer.getbuffer())

    def restore(self, folder: Path) -> None:
        """Continue from a folder's checkpoint, or take only its agent to evaluate it."""
        args, (saved, saved_args) = self.args, load_checkpoint(folder, type(self.args))
        for name in f"{args.fixed} {'' if args.evaluate else args.fixed_to_resume}".split():
            was = getattr(saved_args, name)
            if getattr(args, name) != was:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} {getattr(args, name)}: the run in {folder} has {was}")
        with as_user_error(f"{folder} does not fit", Exception):  # whatever it may hold
            self.agent.load_state_dict(saved["agent"])
            if args.evaluate:
                self.iteration = args.num_iterations  # nothing is left to train
                return
            if (processes := len(saved["rngs"])) != world_size():
                raise ValueError(f"saved by {processes} processes, resumed by {world_size()}")
            if saved["optimizer"]:
                for parameter in self.optimizer.param_groups[0]["params"]:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                self.optimizer.step()  # with gradients of 0, only to create the moments
            for number, moments in self.optimizer.state_dict()["state"].items():
                for name, moment in moments.items():  # Adam would write past a shorter one's end
                    moment.copy_(saved["optimizer"][number][name].view_as(moment))
            for name in ("iteration", "global_step", "seconds"):
                number = saved["run"][name]
                if type(number) is not type(getattr(self, name)) or not 0 <= number < 2**53:
                    raise ValueError(f"{name} is {number!r}")
                setattr(self, name, number)
            self.recent_returns = list(map(float, saved["run"]["recent_returns"]))
            generators = (self.sampling, self.shuffling)
            for rng, state in zip(generators, saved["rngs"][rank()], strict=True):
                if isinstance(rng, torch.Generator):
                    rng.set_state(state)
                else:
                    rng.bit_generator.state = state
        if self.iteration >= args.num_iterations and (folder / "results.json").exists():
            what = f"{folder} is finished, after {self.global_step} {args.unit}"
            raise UserError(f"{what}: --evaluate it, or ask for more {args.unit}")

    # Each iteration

    def check_finite(self, *arrays: Any) -> None:
        if not all(np.isfinite(x).all() for x in arrays):
            what = f"gave a NaN or infinity after step {self.global_step}"
            raise UserError(f"{self.args.env_id} {what}")

    def count_steps(self, is_transition: np.ndarray, *arrays: np.ndarray) -> None:
        """Count a rollout's transitions; raise `UserError` for a NaN or an infinity."""
        self.check_finite(*arrays)
        steps = gather(int(is_transition.sum()))
        self.global_step += sum(steps)
        self.weight = steps[rank()] / sum(steps)

    def average(self, stats: list[dict[str, Tensor]]) -> dict[str, float]:
        """Return the means of the minibatches' statistics, over all processes."""
        numbers = torch.stack([x for row in stats for x in row.values()]).view(len(stats), -1)
        means = dict(zip(stats[0], all_sum(numbers.mean(0), self.weight).tolist()))
        wrong = [name for name, x in means.items() if not math.isfinite(x)]
        if wrong:
            what = f"{wrong[0]} is not finite after step {self.global_step}"
            raise UserError(f"{what}: lower --learning-rate, or scale observations and rewards")
        return means

    def end_iteration(self, metrics: dict[str, float]) -> bool:
        """Log an iteration, save a checkpoint if one is due; return whether to stop."""
        finished = self.envs.finished if self.envs is not None else []
        episodes = [(score, length) for part in gather(finished) for _, score, length in part]
        finished.clear()
        self.recent_returns = [*self.recent_returns, *(score for score, _ in episodes)][-100:]
        score, length = np.mean(episodes, axis=0).tolist() if episodes else (math.nan, math.nan)
        self.iteration += 1
        self.seconds = time.perf_counter() - self.loop_time
        metrics = {
            "charts/episodic_return": score,
            "charts/episodic_length": length,
            "charts/learning_rate": self.optimizer.param_groups[0]["lr"],
            "charts/SPS": int(self.global_step / self.seconds),
        } | metrics
        if self.on_iteration is not None and self.on_iteration(self.global_step, metrics):
            self.stopped = "on_iteration"
        stopped = any(gather(bool(self.stopped)))
        with as_user_error(self.folder, OSError):
            self.log(metrics)
            last = stopped or self.iteration == self.args.num_iterations
            if last or self.iteration % self.args.checkpoint_every == 0:
                self.save()
        return stopped

    def log(self, metrics: dict[str, float]) -> None:
        """Add an iteration's metrics to TensorBoard, metrics.csv and the terminal."""
        if self.folder is None:
            return
        values = [Summary.Value(tag=k, simple_value=x) for k, x in metrics.items() if x == x]
        self.writer.file_writer.add_summary(Summary(value=values), self.global_step)
        if self.metrics_file.tell() == 0:
            print("global_step", *metrics, sep=",", file=self.metrics_file)
        print(self.global_step, *metrics.values(), sep=",", file=self.metrics_file, flush=True)
        episodes = self.recent_returns[-10:] or [metrics["charts/episodic_return"]]
        recent = f"return {np.mean(episodes):.1f}"
        self.bar.set_postfix_str(recent, refresh=False)
        self.bar.update(self.args.batch_size)
        if self.bar.disable and time.perf_counter() - self.print_time > 5:
            self.print_time = time.perf_counter()
            speed = f"{metrics['charts/SPS']:,} {self.args.unit}/s"
            say(f"{self.global_step:,} {self.args.unit}  {recent}  {speed}")

    # The end

    def finish(self, make_envs: Callable) -> dict[str, Any]:
        """Evaluate the policy, write and return the results."""
        self.close_envs()
        self.bar.close()
        args, returns = self.args, self.recent_returns
        results: dict[str, Any] = {"env_id": args.env_id, "seed": args.seed}
        if self.stopped:
            say(f"stopped after {self.global_step} {args.unit}")
        if not args.evaluate:
            results |= {
                "run_dir": str(self.folder),
                "global_step": self.global_step,
                "sps": int(self.global_step / self.seconds),
                "train_return": float(np.mean(returns)) if returns else None,
            }
        if rank() == 0:
            results |= self.evaluate(make_envs)
        results["stopped"] = self.stopped or None
        self.write_results(results)
        if rank() == 0 and args.capture_video:
            self.film(make_envs, self.agent)
        return results

    def evaluate(self, make_envs: Callable) -> dict[str, Any]:
        """Evaluate with the most likely and with sampled actions; print and return the figures."""
        args, seed, before = self.args, self.eval_seed, self.stopped
        results: dict[str, Any] = {"eval_episodes": args.eval_episodes}
        num_envs = min(args.num_envs // world_size(), args.eval_episodes)
        self.envs = envs = RecordedEnvs(make_envs(args, num_envs))
        for prefix, rng in (("eval", None), ("eval_stochastic", np.random.default_rng(seed))):
            scores, cut_off = evaluate(
                self.agent, envs, args.eval_episodes, seed, rng, lambda: self.stopped != before
            )
            self.check_finite(scores)
            mean, std = float(np.mean(scores)), float(np.std(scores))
            results |= {f"{prefix}_mean": mean, f"{prefix}_std": std, f"{prefix}_cut_off": cut_off}
            say(f"{'stochastic' if rng else 'deterministic'} evaluation: {mean:.1f} ± {std:.1f}")
            if cut_off:
                say(f"{cut_off} of {len(scores)} episodes were cut off before their end")
            if self.stopped != before:
                break
        self.close_envs()
        return results

    def write_results(self, results: dict[str, Any]) -> None:
        if self.folder is not None:
            results["wall_seconds"] = round(time.perf_counter() - self.loop_time, 2)
            write_json(self.folder / "results.json", results)

    def film(self, make_envs: Callable, agent: Any) -> None:
        """Save a video of one episode of the most likely actions; without an agent, only try it."""
        envs = RecordedEnvs(make_envs(self.args, 1, render_mode="rgb_array"))
        with contextlib.closing(envs):
            obs, info = envs.reset(seed=self.eval_seed)
            with as_user_error("--capture-video needs moviepy and a renderer", Exception):
                frames = [picture(envs, obs)]
                from gymnasium.utils.save_video import save_video
            if agent is None:
                return
            policy = agent.policy()
            while not envs.finished and len(frames) < 2_000:
                obs, _, _, _, info = envs.step(agent.act(obs, info, None, policy))
                frames.append(picture(envs, obs))
            path = (self.folder or self.args.evaluate) / "final-episode-0.mp4"
            path.unlink(missing_ok=True)  # a stranger's link could lead it elsewhere
            fps = envs.metadata.get("render_fps", 30)
            save_video(frames, str(path.parent), lambda _: True, name_prefix="final", fps=fps)
            say(f"video: {path}")


# ---- Evaluation and loading --------------------------------------------------------------------


def evaluate(
    agent: Any, envs: RecordedEnvs, episodes: int, seed: int, rng: Any, stop: Any = lambda: False
) -> tuple[list[float], int]:
    """Play whole episodes; return their returns, and how many of them were cut off.

    Each environment plays its quota: the first episodes to end would mostly be short ones. An
    episode is cut off after 30,000 steps. `stop` is called before each step.
    """
    quotas = np.array([len(range(i, episodes, envs.num_envs)) for i in range(envs.num_envs)])
    scores: list[float] = []
    seed_global_generators(seed)
    obs, info = envs.reset(seed=seed)
    policy = agent.policy()
    while quotas.any() and envs.steps - envs.starts[quotas > 0].min() < 30_000 and not stop():
        obs, _, _, _, info = envs.step(agent.act(obs, info, rng, policy))
        for i, score, _ in envs.finished:
            if quotas[i] > 0:
                quotas[i] -= 1
                scores.append(score)
        envs.finished = []
    return [*scores, *envs.returns[quotas > 0].tolist()], int((quotas > 0).sum())


def picture(envs: Any, obs: np.ndarray) -> np.ndarray:
    """Return a picture of the first environment; if it draws none, what the agent sees."""
    return envs.render()[0] if envs.render_mode == "rgb_array" else np.stack([obs[0, -1]] * 3, -1)


def load_agent(folder: Path | str, args_class: type, agent_class: type) -> Any:
    """Return the agent of a folder's checkpoint, which acts without its environment."""
    saved, args = load_checkpoint(Path(folder), args_class)
    with as_user_error(f"{folder} holds no such agent", Exception):
        envs = VectorEnv()
        envs.single_observation_space = unpack_space(saved["obs_space"])
        envs.single_action_space = unpack_space(saved["action_space"])
        agent = agent_class(args, envs)
        agent.load_state_dict(saved["agent"])
    return agent


# ---- Command line ------------------------------------------------------------------------------


def help_in_groups(cls: Any) -> Any:
    """Return a dataclass of two groups of flags for `--help`: the algorithm's and the run's."""
    fields, own = cls.__dataclass_fields__, inspect.get_annotations(cls)
    groups: Any = []
    for title, names in (("algorithm", own), ("run", [x for x in fields if x not in own])):
        group: Any = type(cls.__name__, cls.__bases__, {**vars(cls), "__doc__": None})  # a copy
        group.__dataclass_fields__ = {name: fields[name] for name in names}
        groups.append((title, tyro.conf.OmitArgPrefixes[group]))  # type: ignore[misc]
    return dataclasses.make_dataclass("Flags", groups)


def parse(cls: type) -> Any:
    """Read the flags; the defaults are those of the run that is continued or evaluated."""
    if {"-h", "--help"} & set(sys.argv):
        tyro.cli(help_in_groups(cls), description=cls.__doc__)  # exits
    typed: Any = tyro.cli(cls)
    if not (typed.resume or typed.evaluate):
        return typed
    _, saved = load_checkpoint(typed.resume or typed.evaluate, cls)
    saved.capture_video, saved.device = False, "auto" if typed.evaluate else saved.device
    if ":" in saved.subject and typed.subject != saved.subject:  # importing it would run its code
        raise UserError(f"the run imports {saved.subject}: to allow it, type --env-id (or --task)")
    return tyro.cli(cls, default=saved)


def main(cls: type, train: Callable) -> None:
    """Run from the command line: a `UserError` is one line and exit status 2."""
    sys.stdout, sys.stderr = (x or open(os.devnull, "w") for x in (sys.stdout, sys.stderr))
    try:
        _, results = train(parse(cls))
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before the training or after it
        sys.exit(128 + signal.SIGINT)
    if str(results.get("stopped")).startswith("SIG"):
        sys.exit(128 + signal.Signals[results["stopped"]])
