"""What keeping a run costs, what processes and compiling bring: lines of results/keeping.csv.

    python benchmarks/keeping.py                     # processes and compiling, beside without
    python benchmarks/keeping.py --what checkpoints  # their share of the loop's time
    python benchmarks/keeping.py --what kills        # 50 times kill -9 and --resume
    python benchmarks/report.py --table keeping.csv --part gains

A gain is of runs that take turns (A B A B ...). `kills` writes no line, it prints what came out.
"""

import itertools
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, TimeoutExpired
from typing import Literal

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import gymnasium as gym  # noqa: E402
import torch  # noqa: E402
import tyro  # noqa: E402
from run import RESULTS, program, python, read  # noqa: E402
from scaling import Measurement, Quantities, take  # noqa: E402

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
CART = (
    "ppo_discrete.py",
    "--total-timesteps 200000 --num-envs 4 --num-steps 128 --update-epochs 4 "
    "--norm-adv minibatch --activation tanh",
)
CHEETAH = ("ppo_continuous.py", "--env-id HalfCheetah-v5 --total-timesteps 60000")


class Slow(gym.Wrapper):
    """CartPole whose step takes 2 ms, as a simulator's may."""

    def __init__(self) -> None:
        super().__init__(gym.make("CartPole-v1").unwrapped)

    def step(self, action):
        time.sleep(0.002)
        return super().step(action)


gym.register("Slow-v0", Slow, max_episode_steps=500)


def time_save(save: Callable, run) -> None:
    """Print the seconds that a checkpoint took."""
    start = time.perf_counter()
    save(run)
    print("checkpoint:", time.perf_counter() - start, flush=True)


def save_what_begins(start: Callable, run, *parts) -> None:
    """Before the first episode, save the state of the run in the folder "state" beside its own."""
    start(run, *parts)
    folder, run.folder = run.folder, run.folder.with_name("state")
    run.save()
    run.folder = folder


TIMED = {"experiment.Run.save": time_save}
SAVED = {"experiment.Run.start": save_what_begins}


@dataclass
class Args:
    """Compare."""

    what: Literal["gains", "checkpoints", "kills"] = "gains"
    rounds: int = 5  # times that each measurement is taken; the table shows medians
    kills: int = 50  # kills: how often
    seconds: float = 8.0  # kills: a process lives at most so long after its start


def train(script: str, flags: str, launch: tuple[str, ...], cache: str) -> dict[str, float]:
    """Train in a process of its own; return its steps a second and what it needed to get going.

    The rate is of all but the first tenth of the steps; `begin` is by how many seconds that tenth
    was slower, to which compiling belongs.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = [*launch, ROOT / script, "--run-dir", folder + "/run", "--eval-episodes", 1]
        python(*words, *flags.split(), TORCHINDUCTOR_CACHE_DIR=cache, PYTHONPATH=str(ROOT))
        metrics = read(Path(folder, "run", "metrics.csv"))
    rows = [(int(row["global_step"]), float(row["charts/SPS"])) for row in metrics]
    seconds = {step: step / sps for step, sps in rows}
    last = rows[-1][0]
    tenth = min(step for step in seconds if step >= last / 10)
    rate = (last - tenth) / (seconds[last] - seconds[tenth])
    return {"rate": rate, "begin": seconds[tenth] - tenth / rate}


def checkpoints(script: str, flags: str) -> Quantities:
    """Measure the share of the loop's time that checkpoints take.

    It is too small to be seen by comparing two noisy runs.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = [*program(script, "keeping.TIMED"), "--run-dir", folder + "/run"]
        printed = python(*words, "--eval-episodes", 1, *flags.split())
        last = read(Path(folder, "run", "metrics.csv"))[-1]
    spent = sum(map(float, re.findall("^checkpoint: (.*)", printed, re.MULTILINE)))
    share = spent * float(last["charts/SPS"]) / int(last["global_step"])
    return {(f"{script} {flags}", "checkpoints, % of the time"): 100.0 * share}


def gain(name: str, script: str, flags: str, more: str, launch: tuple[str, ...]) -> Quantities:
    """Measure a script with `more` flags or launched by `launch`, and without."""
    with tempfile.TemporaryDirectory() as cache:  # of what is compiled: empty, as on the first day
        without = train(script, flags, (), cache)
        first, again = (train(script, flags + more, launch, cache) for _ in range(2))
    quantities = {
        "steps/s without": without["rate"],
        "with": first["rate"],
        "times": first["rate"] / without["rate"],
    }
    if more:  # what torchrun needs to start is not in the loop's time
        quantities["begins later by, s"] = first["begin"] - without["begin"]
        quantities["the second time, s"] = again["begin"] - without["begin"]
    return {(name, quantity): value for quantity, value in quantities.items()}


def measurements(what: str) -> Iterator[Measurement]:
    """Yield what is to be measured."""
    slow = "--env-id benchmarks.keeping:Slow-v0 --total-timesteps 8192 --num-envs 8 --num-steps 128"
    if what == "gains":
        for name, *run in (
            ("2 processes, environment of 2 ms a step", "ppo_discrete.py", slow, "", TORCHRUN),
            ("--compile, CartPole", *CART, " --compile", ()),
            ("--compile, HalfCheetah", *CHEETAH, " --compile", ()),
        ):
            yield what, name, partial(gain, name, *run)
    else:
        for script, flags in (CART, CHEETAH):
            yield what, f"{script} {flags}", partial(checkpoints, script, flags)


def same(a: object, b: object) -> bool:
    """Return whether two parts of checkpoints are equal bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else repr(a) == repr(b)


def load(folder: Path) -> dict:
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    del saved["run"]["wall_seconds"]  # goes on while a run is resumed
    return saved


def check_metrics(folder: Path, saved: dict) -> None:
    """Raise `AssertionError` if metrics.csv has a gap or a repeat up to the checkpoint."""
    rows, count = read(folder / "metrics.csv"), saved["run"]["iteration"]
    steps = [int(row["global_step"]) for row in rows[:count]]
    assert len(steps) == count and steps[-1] == saved["run"]["global_step"], steps[-5:]
    size = saved["args"]["num_envs"] * saved["args"]["num_steps"]
    assert all(0 < b - a <= size for a, b in itertools.pairwise([0, *steps])), steps


def kills(count: int, longest: float) -> None:
    """Kill and resume one run over and over; check each checkpoint, the log and what is resumed."""
    rng, killed, resumed, ended, saved = random.Random(0), 0, 0, False, None
    flags = f"--total-timesteps {60_000 * count} --checkpoint-every 1 --eval-episodes 1".split()
    command = [sys.executable, *program("ppo_discrete.py", "keeping.SAVED")]
    with tempfile.TemporaryDirectory() as parent:
        folder, state = Path(parent, "run"), Path(parent, "state")
        state.mkdir()
        while not ended:
            (state / "checkpoint.pt").unlink(missing_ok=True)
            if saved is None:  # killed before its first checkpoint
                shutil.rmtree(folder, ignore_errors=True)
            more = [*flags, "--run-dir", folder] if saved is None else ["--resume", folder]
            limit = rng.uniform(0.3, 1.0) * longest if killed < count else None
            try:
                subprocess.run([*command, *more], check=True, timeout=limit, stdout=DEVNULL)
                ended = True
            except TimeoutExpired:  # and kill -9
                killed += 1
            if saved is not None and (state / "checkpoint.pt").exists():
                assert same(load(state), saved), "a resumed run is not what was saved"
                resumed += 1
            if (folder / "checkpoint.pt").exists():
                saved = load(folder)
                check_metrics(folder, saved)
        rows = len(read(folder / "metrics.csv"))
    print(
        f"{killed} kills, {resumed} resumes, each bit for bit in its checkpoint's state, ", end=""
    )
    print(f"0 unreadable checkpoints; {rows} rows of metrics.csv without gap or repeat")


def main() -> None:
    args = tyro.cli(Args)
    if args.what == "kills":
        kills(args.kills, args.seconds)
    else:
        take(RESULTS / "keeping.csv", args.rounds, lambda: measurements(args.what))


if __name__ == "__main__":
    main()
