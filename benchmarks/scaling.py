"""How the cost grows and where the time goes: lines of scaling.csv.

    python -m benchmarks.scaling                              # all, on one core with one thread
    python -m benchmarks.scaling --parts environments gae
    python -m benchmarks.tables --table scaling.csv --part environments

Parts:
    environments  CartPole over 1 to 4,096 environments: steps/s, seconds per update, and the floor
    profile       microseconds that each part of the loop takes per environment step
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
import io
import itertools
import os
import sys
import tempfile
import time
import timeit
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro

import ppo_rlhf_toy as toy
from benchmarks import advantages, jobs
from benchmarks.jobs import Measurement, Quantities

PARTS = ("environments", "profile", "gae", "rlhf")


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
    "experiment.Adam.step": ("", "optimiser"),
    "experiment.Run.average": ("", "diagnostics"),
    "experiment.Run.end_iteration": ("diagnostics", "logging"),
}


def seconds(function: Callable[[], object], least: float = 0.05) -> float:
    """Return the seconds of one call: the best of three averages over at least `least` seconds."""
    timer = timeit.Timer(function)
    calls = max(3, int(least / min(timer.repeat(2, number=1))))
    return min(timer.repeat(3, calls)) / calls


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


def profiled(script: str, iterations: int, **flags) -> tuple[dict[str, float], int, float, float]:
    """Train; return the seconds of each part of the loop in an iteration, and the iteration's rows.

    Then what its environment steps and its matrix products take alone, in seconds. The first two
    iterations, and the last with its checkpoint, are not counted.
    """
    module = importlib.import_module(script.removesuffix(".py"))
    args = module.Args(eval_episodes=1, **flags)
    args.total_timesteps = iterations * args.batch_size
    parts: dict[str, float] = defaultdict(float)
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

    wraps = {name: partial(marking, *marks) for name, marks in MARKS.items()}
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        jobs.wrapped(module, wraps),
    ):
        args.run_dir = Path(folder, "run")
        module.train(args)
    return parts, args.batch_size, *floor(args)


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
    """Measure the microseconds of each implementation at (T, N); all must agree."""
    forms = dict(advantages.FORMS)
    if find_spec("torchrl") is None:
        print('torchrl is left out: pip install -e ".[benchmark]" brings it', file=sys.stderr)
        del forms["torchrl, vectorised"]
    rewards, values, next_values = torch.randn(3, T, N)
    terminated = torch.rand(T, N) < 0.01
    done = terminated | (torch.rand(T, N) < 0.01)
    rollout = (rewards, values, next_values, terminated, done, 0.99, 0.95)
    expected = advantages.plain_loop(*rollout)
    times = {}
    for name, form in forms.items():
        torch.testing.assert_close(form(*rollout), expected, rtol=1e-3, atol=1e-4)
        times[name] = 1e6 * seconds(partial(form, *rollout))
    times["`gae` / best"] = times["`gae`"] / min(times.values())
    return {(f"({T}, {N})", name): x for name, x in times.items()}


def without_cache(forward: Callable, model, tokens, cache=None):
    """Make a transformer read all tokens again; the cache keeps only the tokens."""
    if cache is not None:
        tokens = cache["tokens"] = torch.cat([cache.get("tokens", tokens[:, :0]), tokens], dim=1)
    return forward(model, tokens)


def answers(number: int, length: int) -> str:
    return f"{number} answer{'s' * (number > 1)} of {length} tokens"


def rlhf_tokens(batch_size: int, length: int) -> Quantities:
    """Measure generated tokens per CPU second with and without the KV cache, the best of three.

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
    ways = {"with the cache": {}, "without": {"Transformer.forward": without_cache}}
    best = dict.fromkeys(ways, 0.0)
    for name in 3 * [*ways]:  # taking turns, so that both see the same noise
        with jobs.wrapped(toy, ways[name]):
            start = time.process_time()
            with torch.no_grad():
                toy.generate(args, model, generator, prompts)
            rate = batch_size * length / (time.process_time() - start)
        best[name] = max(best[name], rate)
    case = answers(batch_size, length)
    speeds = {(case, f"{name}, tokens/s"): rate for name, rate in best.items()}
    return speeds | {(case, "times"): best["with the cache"] / best["without"]}


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
        yield "environments", f"{N:,}", "steps/s", partial(environments, N)
    for N in () if quick else (1024, 4096):  # minibatches of as many rows as those of 256
        case = f"{N:,}, {N // 64} minibatches"
        yield "environments", case, "steps/s", partial(environments, N, N // 64)
    if not quick and sys.platform == "linux":
        yield "environments", "1,024, memory kept", "steps/s", partial(memory_kept, 1024)
    for name, (script, iterations, flags) in PROFILES.items():
        if name.startswith("HalfCheetah") and find_spec("mujoco") is None:
            print(f"left out: {name}, because mujoco is not installed", file=sys.stderr)
            continue
        few = max(4, iterations // 10) if quick else iterations
        yield "profile", "all", name, partial(profile, name, script, few, **flags)
    for T in (128,) if quick else (32, 128, 512, 2048):
        for N in (4, 1024) if quick else (1, 4, 64, 1024, 4096):
            if T * N <= 2**20:
                yield "gae", f"({T}, {N})", "`gae`", partial(gae_times, T, N)
    for length in (24,) if quick else (24, 64, 128):
        for batch_size in (8, 128) if quick else (1, 8, 32, 128, 512):
            case = answers(batch_size, length)
            yield "rlhf", case, "times", partial(rlhf_tokens, batch_size, length)


def main() -> None:
    args = tyro.cli(Args)
    jobs.check_names("--parts", args.parts, PARTS)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {0})
    torch.set_num_threads(1)
    chosen = [x for x in measurements(args) if x[0] in args.parts]
    jobs.measure_all(chosen, 1 if args.quick else args.rounds, args.path("scaling.csv"))


if __name__ == "__main__":
    main()
