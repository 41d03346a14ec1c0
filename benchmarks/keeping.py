"""What keeping a run costs, what processes and compiling bring: lines of results/keeping.csv.

    python benchmarks/keeping.py                     # processes and compiling, beside without
    python benchmarks/keeping.py --what checkpoints  # their share of the loop's time
    python benchmarks/keeping.py --what kills        # 50 times kill -9 and --resume, then compare
    python benchmarks/report.py --table keeping.csv --part gains

A gain is of runs that take turns (A B A B ...). `kills` writes no line, it prints what came out.
"""

import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import gymnasium as gym  # noqa: E402
import torch  # noqa: E402
import tyro  # noqa: E402
from run import RESULTS  # noqa: E402
from scaling import Measurement, Quantities, take  # noqa: E402

ONE_CORE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
CART = (
    "ppo_discrete.py",
    "--total-timesteps 200000 --num-envs 4 --num-steps 128 --update-epochs 4 "
    "--norm-adv minibatch --activation tanh",
)
CHEETAH = ("ppo_continuous.py", "--env-id HalfCheetah-v5 --total-timesteps 60000")


class Slow(gym.Env):
    """CartPole whose step takes 2 ms, as a simulator's may."""

    def __init__(self) -> None:
        self.env = gym.make("CartPole-v1").unwrapped
        self.observation_space, self.action_space = (
            self.env.observation_space,
            self.env.action_space,
        )

    def reset(self, *, seed=None, options=None):
        return self.env.reset(seed=seed)

    def step(self, action):
        time.sleep(0.002)
        return self.env.step(action)


gym.register("Slow-v0", Slow, max_episode_steps=500)

# The share of the loop that `save` takes: too small to be seen by comparing two noisy runs.
SHARE = """
import sys, time
import {module} as script
spent, save = [], script.save
def timed(*args):
    start = time.perf_counter()
    save(*args)
    spent.append(time.perf_counter() - start)
script.save = timed
script.main()
print(sum(spent))
"""


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
        command = [sys.executable, *launch, str(ROOT / script), "--run-dir", folder + "/run"]
        command += ["--eval-episodes", "1", *flags.split()]
        subprocess.run(
            command,
            check=True,
            env=os.environ | ONE_CORE | {"TORCHINDUCTOR_CACHE_DIR": cache},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        with open(folder + "/run/metrics.csv") as file:
            rows = [
                (int(row["global_step"]), float(row["charts/SPS"])) for row in csv.DictReader(file)
            ]
    seconds = {step: step / sps for step, sps in rows}
    last = rows[-1][0]
    tenth = min(step for step in seconds if step >= last / 10)
    rate = (last - tenth) / (seconds[last] - seconds[tenth])
    return {"rate": rate, "begin": seconds[tenth] - tenth / rate}


def share_of_checkpoints(script: str, flags: str) -> float:
    """Return the share of the loop's seconds that checkpoints take."""
    with tempfile.TemporaryDirectory() as folder:
        code = SHARE.format(module=script.removesuffix(".py"))
        command = [sys.executable, "-c", code, "--run-dir", folder + "/run", *flags.split()]
        done = subprocess.run(
            [*command, "--eval-episodes", "1"],
            check=True,
            env=os.environ | ONE_CORE,
            capture_output=True,
            text=True,
        )
        with open(folder + "/run/metrics.csv") as file:
            last = list(csv.DictReader(file))[-1]
    seconds = float(done.stdout.splitlines()[-1])
    return seconds / (int(last["global_step"]) / float(last["charts/SPS"]))


def checkpoints(script: str, flags: str) -> Quantities:
    """Measure what checkpoints take of a script's loop."""
    share = share_of_checkpoints(script, flags)
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


def kills(count: int, longest: float) -> None:
    """Kill and resume a run over and over, then compare it with one that was left alone."""
    rng = random.Random(0)
    folder = Path(tempfile.mkdtemp())
    flags = "--total-timesteps 2000000 --checkpoint-every 1 --eval-episodes 1".split()
    script = [sys.executable, str(ROOT / "ppo_discrete.py")]
    environment = os.environ | ONE_CORE
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "env": environment}
    subprocess.run([*script, *flags, "--run-dir", folder / "whole"], check=True, **quiet)
    killed = resumed = 0
    while True:
        there = (folder / "killed" / "checkpoint.pt").exists()
        if not there:
            shutil.rmtree(folder / "killed", ignore_errors=True)
        more = (
            ["--resume", folder / "killed"] if there else [*flags, "--run-dir", folder / "killed"]
        )
        resumed += there
        with subprocess.Popen([*script, *more], **quiet) as process:
            try:
                process.wait(rng.uniform(0.3, 1.0) * longest if killed < count else None)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                killed += 1
            _, error = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, error.decode()
    whole, other = (
        torch.load(folder / name / "checkpoint.pt", weights_only=True)["agent"]
        for name in ("whole", "killed")
    )
    same = all(torch.equal(whole[name], other[name]) for name in whole)
    print(f"{killed} kills, {resumed} resumes, 0 failures; parameters equal: {same}")
    shutil.rmtree(folder)


def main() -> None:
    args = tyro.cli(Args)
    if args.what == "kills":
        kills(args.kills, args.seconds)
    else:
        take(RESULTS / "keeping.csv", args.rounds, lambda: measurements(args.what))


if __name__ == "__main__":
    main()
