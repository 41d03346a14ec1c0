"""The cost of checkpoints, and the gain from processes and compiling: lines of overhead.csv.

    python -m benchmarks.overhead                     # processes and compiling, against neither
    python -m benchmarks.overhead --what checkpoints  # their share of the loop's time
    python -m benchmarks.tables --table overhead.csv --part gains

A gain compares runs that take turns (A B A B ...).
"""

import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import gymnasium as gym
import tyro

from benchmarks import jobs
from benchmarks.jobs import ROOT, Measurement, Quantities

SHARE = "checkpoints, % of the time"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
CART = "ppo_discrete.py --total-timesteps 200000 --num-envs 4 --num-steps 128 --update-epochs 4"
CART += " --norm-adv minibatch --activation tanh"
CHEETAH = "ppo_continuous.py --env-id HalfCheetah-v5 --total-timesteps 60000"
SLOW = "ppo_discrete.py --env-id benchmarks.overhead:Slow-v0 --total-timesteps 8192 --num-envs 8"
SLOW += " --num-steps 128"


class Slow(gym.Wrapper):
    """CartPole with a step of 2 ms, like that of a simulator."""

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


TIMED = {"experiment.Run.save": time_save}


@dataclass
class Args(jobs.Shared):
    """Compare a run with and without something that costs or saves time."""

    what: Literal["gains", "checkpoints"] = "gains"
    rounds: int = 5  # number of times each measurement is taken; the table shows medians


def rate_and_beginning(
    command: str, launcher: tuple[str, ...] = (), cache: str = ""
) -> tuple[float, float]:
    """Train; return the steps per second and the seconds until it got going.

    The rate is of all but the first tenth of the steps; the second number is by how much that tenth
    was slower, to which compiling belongs.
    """
    script, *flags = command.split()
    compiled = {"TORCHINDUCTOR_CACHE_DIR": cache}
    program = [*launcher, ROOT / script]
    metrics = jobs.launch(program, [*flags, "--eval-episodes", 1], environment=compiled).metrics
    rows = [(int(row["global_step"]), float(row["charts/SPS"])) for row in metrics]
    seconds = {step: step / sps for step, sps in rows}
    last = rows[-1][0]
    tenth = min(step for step in seconds if step >= last / 10)
    rate = (last - tenth) / (seconds[last] - seconds[tenth])
    return rate, seconds[tenth] - tenth / rate


def checkpoints(command: str) -> Quantities:
    """Measure the share of the loop's time that checkpoints take.

    It is too small to show in a comparison of two noisy runs.
    """
    script, *flags = command.split()
    run = jobs.launch(jobs.wrapped_script(script, "overhead.TIMED"), [*flags, "--eval-episodes", 1])
    spent = sum(map(float, re.findall("^checkpoint: (.*)", run.printed, re.MULTILINE)))
    share = spent * float(run.metrics[-1]["charts/SPS"]) / int(run.metrics[-1]["global_step"])
    return {(command, SHARE): 100.0 * share}


def gain(name: str, command: str, more: str = "", launcher: tuple[str, ...] = ()) -> Quantities:
    """Measure a command with `more` flags or started by `launcher`, and without."""
    with tempfile.TemporaryDirectory() as cache:  # for compiled code: empty, as the first time
        without, began = rate_and_beginning(command, (), cache)
        rate, first = rate_and_beginning(command + more, launcher, cache)
        _, again = rate_and_beginning(command + more, launcher, cache)
    quantities = {"steps/s without": without, "with": rate, "times": rate / without}
    if more:  # the loop's time excludes torchrun's start
        quantities["starts later by, s"] = first - began
        quantities["on the second run, s"] = again - began
    return {(name, quantity): value for quantity, value in quantities.items()}


def measurements(what: str) -> Iterator[Measurement]:
    """Yield what is to be measured."""
    if what == "checkpoints":
        for command in (CART, CHEETAH):
            yield what, command, SHARE, partial(checkpoints, command)
        return
    for name, *run in (
        ("2 processes, environment of 2 ms a step", SLOW, "", TORCHRUN),
        ("--compile, CartPole", CART, " --compile"),
        ("--compile, HalfCheetah", CHEETAH, " --compile"),
    ):
        yield what, name, "times", partial(gain, name, *run)


def main() -> None:
    args = tyro.cli(Args)
    jobs.measure_all([*measurements(args.what)], args.rounds, args.path("overhead.csv"))


if __name__ == "__main__":
    main()
