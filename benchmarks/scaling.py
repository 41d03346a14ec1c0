"""How cost grows and where the time goes: lines of results/scaling.csv.

    python benchmarks/scaling.py                              # all, on one core with one thread
    python benchmarks/scaling.py --parts environments gae
    python benchmarks/report.py --table scaling.csv --part environments

Parts:
    environments  CartPole over 1 to 4,096 environments: steps/s, seconds an update, and the floor
    profile       microseconds that each part of the loop takes, for each step of an environment
    atari         steps/s of Pong's environments alone, and in the rollout with a policy that costs
                  nothing
    gae           microseconds of `gae` and of other forms over T and N (benchmarks/advantages.py)
    rlhf          tokens/s of ppo_rlhf_toy.py's generation over batch and length, with its KV cache
                  and without

The floor is what the same number of environment steps and of matrix products cost, alone and back
to back: all else (sampling, activations, losses, Adam, logging, Python) is above it. It counts all
rows; the loop leaves those of resets out of the update, one in twenty of CartPole's early on.
"""

import ast
import contextlib
import importlib.util
import io
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

if __name__ == "__main__":  # one thread for NumPy's products as well, which asks when imported
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

import gymnasium as gym  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import tyro  # noqa: E402
from run import RESULTS, append, check_names, commit, python, read, wrapped  # noqa: E402

import ppo_atari  # noqa: E402

Quantities = dict[tuple[str, str], float]  # (line, column) of the part's table: value
# The part, the name of a line or column, and the function that measures it.
Measurement = tuple[str, str, Callable[[], Quantities]]
PARTS = ("environments", "profile", "atari", "gae", "rlhf")


@dataclass
class Args:
    """Measure how cost grows."""

    parts: tuple[str, ...] = PARTS  # what to measure
    rounds: int = 5  # times that each measurement is taken; the table shows medians
    core: int = 0  # the core to stay on
    quick: bool = False  # 1 round of few sizes, to results/quick/


# For glibc's malloc, which else gives tensors of some megabytes back and asks for them again.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**32)}
# Before and after each of these functions is a mark: what ran since the last one is that part.
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
    """Return what one call takes: the best of three averages over at least `least` seconds."""
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
                if i > 0:  # nobody asks for the observations'
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
        wrapped(script, wraps),
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
    """Measure the rollout's steps/s on Pong with a policy that costs nothing, and the bare ones."""
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
    with wrapped(ppo_atari, free):
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
    """Measure the same where freed memory is kept for the next tensor, not handed back."""
    code = "import scaling, torch; torch.set_num_threads(1); "
    code += f"print(repr(scaling.environments({num_envs})))"
    printed = python("-c", code, **KEEP_MEMORY, PYTHONPATH=str(ROOT / "benchmarks"))
    quantities = ast.literal_eval(printed.splitlines()[-1])
    return {(f"{num_envs:,}, memory kept", name): x for (_, name), x in quantities.items()}


def profile(name: str, script: str, iterations: int, **flags: object) -> Quantities:
    """Measure the microseconds of each part of the loop, for each row, beside the floor."""
    parts, rows, environment, products = profiled(script, iterations, **flags)
    lines = {part: 1e6 * value / rows for part, value in parts.items()}
    whole = sum(parts.values())
    lines |= {"all": 1e6 * whole / rows, "steps/s": rows / whole}
    lines["environment alone"] = 1e6 * environment / rows
    lines["matrix products alone"] = 1e6 * products / rows
    lines["all / both alone"] = whole / (environment + products)
    return {(line, name): value for line, value in lines.items()}


def gae_times(T: int, N: int) -> Quantities:
    import advantages

    times = advantages.measure([(T, N)])
    return {(case, form): x for case, row in times.items() for form, x in row.items()}


def answers(number: int, length: int) -> str:
    return f"{number} answer{'s' * (number > 1)} of {length} tokens"


def rlhf_tokens(batch_size: int, length: int) -> Quantities:
    import rlhf

    cached, uncached = rlhf.cache_speed(batch_size, length, repeats=3)
    case = answers(batch_size, length)
    return {
        (case, "with the cache, tokens/s"): cached,
        (case, "without, tokens/s"): uncached,
        (case, "times"): cached / uncached,
    }


def measurements(args: Args) -> Iterator[Measurement]:
    """Yield what is to be measured."""
    quick = args.quick
    sizes = (1, 16, 256) if quick else (1, 4, 16, 64, 256, 1024, 4096)
    if "environments" in args.parts:
        for N in sizes:
            yield "environments", f"{N:,}", partial(environments, N)
        for N in () if quick else (1024, 4096):  # minibatches of as many rows as those of 256
            name = f"{N:,}, {N // 64} minibatches"
            yield "environments", name, partial(environments, N, N // 64)
        if not quick and sys.platform == "linux":
            yield "environments", "1,024, memory kept", partial(memory_kept, 1024)
    if "profile" in args.parts:
        cleanrl = {"num_envs": 4, "num_steps": 128, "update_epochs": 4, "num_minibatches": 4}
        cleanrl |= {"activation": "tanh", "clip_vloss": True, "norm_adv": "minibatch"}
        faithful = {"env_id": "HalfCheetah-v5", "log_std_init": 0.0, "log_std_fall": None}
        faithful["scale_actions"] = False
        large = {"num_envs": 1024, "num_steps": 16, "update_epochs": 4}
        for name, script, iterations, flags in (
            ("CartPole, CleanRL's settings", "ppo_discrete.py", 60, cleanrl),
            ("CartPole, default", "ppo_discrete.py", 30, {}),
            ("CartPole, 1024 x 16", "ppo_discrete.py", 20, large),
            ("HalfCheetah, faithful", "ppo_continuous.py", 6, faithful),
            ("HalfCheetah, default", "ppo_continuous.py", 10, {"env_id": "HalfCheetah-v5"}),
        ):
            if "HalfCheetah" in name and importlib.util.find_spec("mujoco") is None:
                print(f"left out: {name}, for MuJoCo is not installed", file=sys.stderr)
                continue
            few = max(4, iterations // 10) if quick else iterations
            yield "profile", name, partial(profile, name, script, few, **flags)
    if "atari" in args.parts:
        if importlib.util.find_spec("ale_py") is None:
            print("left out: Pong, for ale-py is not installed", file=sys.stderr)
        else:
            yield "atari", "Pong, 8 environments", partial(atari, 4 if quick else 8)
    if "gae" in args.parts:
        for T in (128,) if quick else (32, 128, 512, 2048):
            for N in (4, 1024) if quick else (1, 4, 64, 1024, 4096):
                if T * N <= 2**20:
                    yield "gae", f"({T}, {N})", partial(gae_times, T, N)
    if "rlhf" in args.parts:
        for length in (24,) if quick else (24, 64, 128):
            for batch_size in (8, 128) if quick else (1, 8, 32, 128, 512):
                name = answers(batch_size, length)
                yield "rlhf", name, partial(rlhf_tokens, batch_size, length)


def take(table: Path, rounds: int, measurements: Callable[[], Iterable[Measurement]]) -> None:
    """Take all measurements in turn, round after round; what stands in the table is not redone."""
    done = {
        (row["part"], row[k], row["round"]) for row in read(table) for k in ("case", "quantity")
    }
    for number in range(1, rounds + 1):
        for part, name, measure in measurements():
            if (part, name, str(number)) in done:
                continue
            quantities = measure()
            for (case, quantity), value in quantities.items():
                line = {"part": part, "case": case, "quantity": quantity, "round": number}
                line |= {"value": f"{value:.5g}", "torch": torch.__version__, "commit": commit()}
                append(table, line)
            print(f"{part}, {name}, round {number}", flush=True)


def main() -> None:
    args = tyro.cli(Args)
    check_names("--parts", args.parts, PARTS)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {args.core})
    torch.set_num_threads(1)
    table = (RESULTS / "quick" if args.quick else RESULTS) / "scaling.csv"
    take(table, 1 if args.quick else args.rounds, lambda: measurements(args))


if __name__ == "__main__":
    main()
