"""How the cost grows and where the time goes: lines of scaling.csv.

    python -m benchmarks.scaling                              # all, on one core with one thread
    python -m benchmarks.scaling --parts environments gae
    python -m benchmarks.tables --table scaling.csv --part environments

Parts:
    environments  CartPole over 1 to 4,096 environments: steps/s, seconds per update, and the floor
    profile       microseconds that each part of the loop takes per environment step
    atari         steps/s of Pong's environments alone, and in the rollout with a policy that costs
                  nothing
    gae           microseconds of `gae` and the alternatives in advantages.py over T and N
    rlhf          tokens/s of ppo_rlhf_toy.py's generation over batch and length, with its KV cache
                  and without

The floor is the time of the same number of environment steps and matrix products, alone and back to
back: everything else (sampling, activations, losses, Adam, logging, Python) comes on top. It counts
all rows; the loop leaves reset rows out of the update, early on one in twenty on CartPole.
"""

import ast
import contextlib
import importlib
import importlib.util
import io
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import numpy as np
import torch
import tyro

import ppo_atari
import ppo_rlhf_toy as toy
from benchmarks import advantages, jobs
from benchmarks.jobs import Measurement, Quantities

PARTS = ("environments", "profile", "atari", "gae", "rlhf")


@dataclass
class Args(jobs.Shared):
    """Measure how the cost grows."""

    parts: tuple[str, ...] = PARTS  # what to measure
    rounds: int = 5  # number of times each measurement is taken; the table shows medians
    quick: bool = False  # 1 round of few sizes


# For glibc's malloc, which otherwise returns a few megabytes per tensor and requests them again.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**32)}
# Each of these functions has a mark before and after it: the time since the last mark is a part.
MARKS = {
    "experiment.RecordedEnvs.step": ("acting", "environment"),
    "gae": ("", "advantages"),
    "ppo_loss": ("minibatches", "forward"),  # the batch put together, shuffled and cut
    "torch.Tensor.backward": ("", "backward"),
    "torch.optim.Adam.step": ("", "optimiser"),
    "experiment.Run.average": ("", "diagnostics"),
    "experiment.Run.end_iteration": ("diagnostics", "logging"),
}
PARTS_OF_THE_LOOP = """logging acting environment advantages diagnostics
minibatches forward backward optimiser""".split()


def seconds(function: Callable[[], object], least: float = 0.05) -> float:
    """Return the seconds of one call: the best of three averages over at least `least` seconds."""
    function()
    best = np.inf
    for _ in range(3):
        start, calls = time.perf_counter(), 0
        while calls < 3 or time.perf_counter() - start < least:
            function()
            calls += 1
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def numpy_randn(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def matrix_products(
    sizes: tuple[int, ...], rows: int, backward: bool, randn: Callable = torch.randn
) -> float:
    """Return the seconds of a network's matrix products on rows: forward, and backward if asked."""
    layers = list(itertools.pairwise(sizes))
    inputs = [randn(rows, n) for n, _ in layers]
    weights = [randn(n, m) for n, m in layers]
    grads = [randn(rows, m) for _, m in layers]

    def products() -> None:
        for i, (x, weight, grad) in enumerate(zip(inputs, weights, grads)):
            x @ weight
            if backward:
                x.T @ grad  # the weights' gradient
                if i > 0:  # the observations need none
                    grad @ weight.T

    return seconds(products)


def floor(args) -> tuple[float, float]:
    """Return the seconds of an iteration's environment steps and of its matrix products, alone."""
    N, T = args.num_envs, args.num_steps
    envs = gym.make_vec(args.env_id, N)
    space, inputs = envs.single_action_space, envs.single_observation_space.shape[0]
    outputs = int(space.n) if isinstance(space, gym.spaces.Discrete) else space.shape[0]
    envs.reset(seed=0)
    actions = itertools.cycle([envs.action_space.sample() for _ in range(16)])
    step = seconds(lambda: envs.step(next(actions)), 0.2)
    envs.close()
    hidden = args.hidden_size
    actor, critic = (inputs, hidden, hidden, outputs), (inputs, hidden, hidden, 1)
    part = N * T // args.num_minibatches
    acting = min(matrix_products(actor, N, False, x) for x in (torch.randn, numpy_randn))
    products = T * acting + matrix_products(actor, N * T, False)
    products += matrix_products(critic, N * T, False)
    update = matrix_products(actor, part, True) + matrix_products(critic, part, True)
    return T * step, products + args.update_epochs * args.num_minibatches * update


def timed_parts(script: ModuleType, iterations: int, args) -> dict[str, float]:
    """Train and return the seconds of each part of an iteration.

    The first two iterations, and the last with its checkpoint, are not counted.
    """
    parts: dict[str, float] = dict.fromkeys(PARTS_OF_THE_LOOP, 0.0)
    last, ended = time.perf_counter(), 0

    def mark(part: str) -> None:
        nonlocal last, ended
        now = time.perf_counter()
        if 2 <= ended < iterations - 1:
            parts[part] += (now - last) / (iterations - 3)
        last = now
        ended += part == "logging"  # the last of an iteration

    def marking(before: str, after: str, function: Callable, *args, **kwargs):
        if before:
            mark(before)
        result = function(*args, **kwargs)
        mark(after)
        return result

    args.total_timesteps = iterations * args.batch_size
    wraps = {name: partial(marking, *marks) for name, marks in MARKS.items()}
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        jobs.wrapped(script, wraps),
    ):
        args.run_dir = Path(folder, "run")
        script.train(args)
    return parts


def profiled(script: str, iterations: int, **flags) -> tuple[dict[str, float], int, float, float]:
    """Train; return the seconds of each part of the loop in an iteration, and the iteration's rows.

    Then what its environment steps and its matrix products take alone, in seconds.
    """
    module = importlib.import_module(script.removesuffix(".py"))
    args = module.Args(eval_episodes=1, **flags)
    return timed_parts(module, iterations, args), args.batch_size, *floor(args)


def atari(iterations: int) -> Quantities:
    """Measure steps/s on Pong: in the rollout with a policy that costs nothing, and bare."""
    limit = ("max_num_frames_per_episode=1000",)  # so that the evaluation is short
    args = ppo_atari.Args(env_kwargs=limit, hidden_size=8, update_epochs=1, eval_episodes=1)
    envs = ppo_atari.make_envs(args, args.num_envs)
    still = np.zeros((args.num_envs, 1), int)
    nothing = np.zeros((args.num_envs, args.hidden_size), np.float32)
    rows = (iterations - 3) * args.batch_size
    free = {
        "Agent.see": lambda _, agent, obs: nothing[: len(obs)],
        "Agent.policy": lambda _, agent: lambda features, *_: still[: len(features)],
    }
    with jobs.wrapped(ppo_atari, free):
        parts = timed_parts(ppo_atari, iterations, args)
    rollout = args.batch_size / (parts["acting"] + parts["environment"])

    envs.reset(seed=0)
    start = time.perf_counter()
    for _ in range(rows // args.num_envs):
        envs.step(still[:, 0])
    bare = rows / (time.perf_counter() - start)
    envs.close()
    quantities = {"environments alone": bare, "rollout": rollout}
    lines = {("Pong, 8 environments", f"{k}, steps/s"): v for k, v in quantities.items()}
    return lines | {("Pong, 8 environments", "rollout / alone"): rollout / bare}


def environments(num_envs: int, num_minibatches: int = 4) -> Quantities:
    """Measure the loop, its update alone and the floor at one number of environments."""
    iterations = max(5, min(20, 200_000 // (num_envs * 128)))
    flags = {"num_envs": num_envs, "num_steps": 128, "update_epochs": 4}
    flags["num_minibatches"] = num_minibatches
    parts, batch, *alone = profiled("ppo_discrete.py", iterations, **flags)
    update = sum(parts[p] for p in ("minibatches", "forward", "backward", "optimiser"))
    quantities = {
        "steps/s": batch / sum(parts.values()),
        "floor, steps/s": batch / sum(alone),
        "time / floor": sum(parts.values()) / sum(alone),
        "rows of a batch": batch,
        "an update, ms": 1e3 * update,
    }
    case = f"{num_envs:,}" + f", {num_minibatches} minibatches" * (num_minibatches != 4)
    return {(case, name): value for name, value in quantities.items()}


def memory_kept(num_envs: int) -> Quantities:
    """Measure the same with freed memory kept for the next tensor instead of returned."""
    code = "import torch; from benchmarks import scaling; torch.set_num_threads(1); "
    code += f"print(repr(scaling.environments({num_envs})))"
    printed = jobs.launch(["-c", code], core=0, environment=KEEP_MEMORY).printed
    quantities = ast.literal_eval(printed.splitlines()[-1])
    return {(f"{num_envs:,}, memory kept", name): x for (_, name), x in quantities.items()}


def profile(name: str, script: str, iterations: int, **flags: object) -> Quantities:
    """Measure the microseconds of each part of the loop per row, and the floor."""
    parts, rows, environment, products = profiled(script, iterations, **flags)
    lines = {part: 1e6 * value / rows for part, value in parts.items()}
    whole = sum(parts.values())
    lines |= {"all": 1e6 * whole / rows, "steps/s": rows / whole}
    lines["environment alone"] = 1e6 * environment / rows
    lines["matrix products alone"] = 1e6 * products / rows
    lines["all / both alone"] = whole / (environment + products)
    return {(line, name): value for line, value in lines.items()}


def gae_times(T: int, N: int) -> Quantities:
    return {(f"({T}, {N})", form): x for form, x in advantages.measure(T, N).items()}


def without_cache(forward: Callable, model, tokens, cache=None):
    """Make a transformer read all tokens again; the cache keeps only the tokens."""
    if cache is not None:
        tokens = cache["tokens"] = torch.cat([cache.get("tokens", tokens[:, :0]), tokens], dim=1)
    return forward(model, tokens)


def cache_speed(batch_size: int, length: int, repeats: int = 3) -> list[float]:
    """Return generated tokens per CPU second with and without the KV cache, the best of several.

    EOS is made improbable, so that all answers are as long as allowed and both do the same work.
    """
    torch.set_num_threads(1)
    args = toy.Args(max_new_tokens=length, context_size=length + 8)
    task, device = toy.TASKS["reviews"], torch.device("cpu")
    rng, generator = toy.streams(args, 1, device)
    model = toy.make_model(args, task, scalar=False).requires_grad_(False)
    model.head.bias[task.tokenizer.eos] = -1e9
    texts = task.prompts(batch_size, rng)
    prompts = task.tokenizer.block(map(task.tokenizer.encode, texts), True, device)
    best = [0.0, 0.0]
    for i in range(2 * repeats):  # taking turns, so that both see the same noise
        with jobs.wrapped(toy, {"Transformer.forward": without_cache} if i % 2 else {}):
            start = time.process_time()
            with torch.no_grad():
                toy.generate(args, model, generator, prompts)
            rate = batch_size * length / (time.process_time() - start)
        best[i % 2] = max(best[i % 2], rate)
    return best


def answers(number: int, length: int) -> str:
    return f"{number} answer{'s' * (number > 1)} of {length} tokens"


def rlhf_tokens(batch_size: int, length: int) -> Quantities:
    """Measure generation with the KV cache and without."""
    cached, uncached = cache_speed(batch_size, length)
    case = answers(batch_size, length)
    return {
        (case, "with the cache, tokens/s"): cached,
        (case, "without, tokens/s"): uncached,
        (case, "times"): cached / uncached,
    }


CLEANRL = {"num_envs": 4, "num_steps": 128, "update_epochs": 4, "num_minibatches": 4}
CLEANRL |= {"activation": "tanh", "clip_vloss": True, "norm_adv": "minibatch"}
FAITHFUL = {"env_id": "HalfCheetah-v5", "log_std_init": 0.0, "log_std_fall": None}
FAITHFUL |= {"scale_actions": False}
PROFILES = {  # script, iterations and arguments
    "CartPole, CleanRL's settings": ("ppo_discrete.py", 60, CLEANRL),
    "CartPole, default": ("ppo_discrete.py", 30, {}),
    "CartPole, 1024 x 16": (
        "ppo_discrete.py", 20, {"num_envs": 1024, "num_steps": 16, "update_epochs": 4},
    ),
    "HalfCheetah, faithful": ("ppo_continuous.py", 6, FAITHFUL),
    "HalfCheetah, default": ("ppo_continuous.py", 10, {"env_id": "HalfCheetah-v5"}),
}  # fmt: skip


def measurements(args: Args) -> Iterator[Measurement]:
    """Yield what to measure, for all parts."""
    quick = args.quick
    for N in (1, 16, 256) if quick else (1, 4, 16, 64, 256, 1024, 4096):
        yield Measurement("environments", f"{N:,}", "steps/s", partial(environments, N))
    for N in () if quick else (1024, 4096):  # minibatches of as many rows as those of 256
        case, measure = f"{N:,}, {N // 64} minibatches", partial(environments, N, N // 64)
        yield Measurement("environments", case, "steps/s", measure)
    if not quick and sys.platform == "linux":
        case, measure = "1,024, memory kept", partial(memory_kept, 1024)
        yield Measurement("environments", case, "steps/s", measure)
    for name, (script, iterations, flags) in PROFILES.items():
        few = max(4, iterations // 10) if quick else iterations
        yield Measurement("profile", "all", name, partial(profile, name, script, few, **flags))
    measure = partial(atari, 4 if quick else 8)
    yield Measurement("atari", "Pong, 8 environments", "rollout, steps/s", measure)
    for T in (128,) if quick else (32, 128, 512, 2048):
        for N in (4, 1024) if quick else (1, 4, 64, 1024, 4096):
            if T * N <= 2**20:
                yield Measurement("gae", f"({T}, {N})", "`gae`", partial(gae_times, T, N))
    for length in (24,) if quick else (24, 64, 128):
        for batch_size in (8, 128) if quick else (1, 8, 32, 128, 512):
            case, measure = answers(batch_size, length), partial(rlhf_tokens, batch_size, length)
            yield Measurement("rlhf", case, "times", measure)


def can_run(measurement: Measurement) -> bool:
    """Return whether the simulator that it needs is installed; say which is not."""
    needed = "ale_py" if measurement.part == "atari" else "gymnasium"
    needed = "mujoco" if measurement.quantity.startswith("HalfCheetah") else needed
    there = importlib.util.find_spec(needed) is not None
    if not there:
        name = f"{measurement.part}, {measurement.quantity}"
        print(f"left out: {name}, because {needed} is not installed", file=sys.stderr)
    return there


def main() -> None:
    args = tyro.cli(Args)
    jobs.check_names("--parts", args.parts, PARTS)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {0})
    torch.set_num_threads(1)
    chosen = [x for x in measurements(args) if x.part in args.parts and can_run(x)]
    jobs.measure_all(chosen, 1 if args.quick else args.rounds, args.path("scaling.csv"))


if __name__ == "__main__":
    main()
