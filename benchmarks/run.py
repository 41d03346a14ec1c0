"""Run a script over environments and seeds; one CSV line a run, and its learning curve.

    python benchmarks/run.py --env-ids CartPole-v1 --seeds 1 2 3 4 5
    python benchmarks/run.py --env-ids CartPole-v1 --seeds 1 --config x --flags="--ent-coef 0.1"

Runs that stand in the table already are not done again, so an interrupted call is just repeated.
With `--runs FOLDER` a run that was interrupted itself goes on from its checkpoint.
"""

import contextlib
import csv
import functools
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from queue import Queue
from types import ModuleType
from unittest import mock

import tyro

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CURVE = ("global_step", "charts/episodic_return")


@dataclass
class Args:
    """Run seeds of environments and collect their results."""

    env_ids: tuple[str, ...]  # environments
    seeds: tuple[int, ...]  # seeds of each
    script: str = "ppo_discrete.py"  # the script to run
    config: str = "default"  # a name for the flags, one column of the table
    flags: str = ""  # further flags of the script
    table: str = "runs.csv"  # the table's file in benchmarks/results/
    processes: int = 1  # runs at a time, each on a core of its own
    runs: Path | None = None  # keep the runs' folders here; without it they are temporary


@dataclass
class Job:
    """One run."""

    script: str  # as the table names it
    env_id: str
    config: str
    seed: int
    flags: str
    program: tuple[str, ...] = ()  # what Python runs, if not the script of this name

    @property
    def key(self) -> tuple[str, ...]:
        return self.script, self.env_id, self.config, str(self.seed)

    @property
    def name(self) -> str:
        """Return the key as the name of a file or a folder."""
        parts = Path(self.script).stem, self.env_id, self.config, str(self.seed)
        return "__".join(parts).replace("/", "-")


@contextlib.contextmanager
def wrapped(script: ModuleType, wraps: dict[str, Callable]) -> Iterator[None]:
    """Call `wraps[name](original, *arguments)` wherever a script calls its function `name`.

    A dotted name, such as "experiment.Run.save", leads to what the script imports.
    """

    def bind(wrap: Callable, original: Callable) -> Callable:
        return lambda *args, **kwargs: wrap(original, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        for path, wrap in wraps.items():
            *owners, name = path.split(".")
            owner = functools.reduce(getattr, owners, script)
            stack.enter_context(mock.patch.object(owner, name, bind(wrap, getattr(owner, name))))
        yield


def program(script: str, wraps: str) -> tuple[str, ...]:
    """Return what Python runs to train with `wraps`, an expression such as "keeping.SAVES"."""
    paths, module = [str(ROOT), str(ROOT / "benchmarks")], wraps.partition(".")[0]
    code = f"import sys; sys.path[:0] = {paths}; import run, {module}; "
    return "-c", f"{code}run.train_wrapped({script!r}, {wraps})"


def python(*words: object, pin: Iterable[str] = (), **environment: str) -> str:
    """Run Python in a process of its own, with one thread; return what it printed."""
    command = [*pin, sys.executable, *map(str, words)]
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    kwargs = {"env": os.environ | threads | environment, "text": True}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, **kwargs).stdout


def train_wrapped(script: str, wraps: dict[str, Callable]) -> None:
    """Train by the command line's flags with functions of the script wrapped."""
    module = importlib.import_module(Path(script).stem)
    with wrapped(module, wraps):
        module.experiment.main(module.Args, module.train)


def read(table: Path) -> list[dict[str, str]]:
    """Return the lines of a CSV table, none if it is not there yet."""
    if not table.exists():
        return []
    with open(table) as file:
        return list(csv.DictReader(file))


def append(table: Path, line: dict) -> None:
    """Write one more line; a table whose columns are others is refused."""
    table.parent.mkdir(parents=True, exist_ok=True)
    old = read(table)
    if old and list(old[0]) != list(line):
        raise ValueError(f"{table} has the columns {', '.join(old[0])}: name another table")
    with open(table, "a", newline="") as file:
        writer = csv.DictWriter(file, line.keys(), lineterminator="\n")
        if not old:
            writer.writeheader()
        writer.writerow(line)


def check_names(flag: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Stop with one line if a name is not known."""
    known = list(dict.fromkeys(known))
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"{flag}: there is no {', '.join(unknown)}, but {', '.join(known)}")


def commit(folder: Path = ROOT) -> str:
    """Return the short name of the commit in a checkout, "+" behind it if a script differs."""
    words = ["git", "rev-parse", "--short", "HEAD"]
    name = subprocess.run(words, cwd=folder, capture_output=True, text=True).stdout.strip()
    other = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "*.py"], cwd=folder)
    return name + "+" * other.returncode if name else name


def one_run(job: Job, core: int, curves: Path | None, runs: Path | None = None) -> dict:
    """Train in a process of its own, on one core with one thread; return the table's line."""
    with tempfile.TemporaryDirectory() as folder:
        if runs is not None:
            folder = str(runs / job.name)
        resumed = Path(folder, "checkpoint.pt").exists()
        origin, note = f"{job.flags} at {commit()}", Path(folder, "origin.txt")
        if not resumed:  # drop what a run left that was killed before its first checkpoint
            shutil.rmtree(folder, ignore_errors=True)
            Path(folder).mkdir(parents=True)
            note.write_text(origin)
        elif note.read_text() != origin:
            raise ValueError(f"{folder} was begun with {note.read_text()}, not {origin}: delete it")
        pin = ["taskset", "-c", str(core)] if shutil.which("taskset") else []
        words = ["--env-id", job.env_id, "--seed", job.seed, "--run-dir", folder]
        words = ["--resume", folder] if resumed else [*words, *shlex.split(job.flags)]
        start = time.perf_counter()
        python(*(job.program or [ROOT / job.script]), *words, pin=pin)
        seconds = time.perf_counter() - start
        results = json.loads((Path(folder) / "results.json").read_text())
        rows = [row for row in read(Path(folder) / "metrics.csv") if row[CURVE[1]] != "nan"]
    if curves is not None:
        curve = [[int(row[CURVE[0]]), round(float(row[CURVE[1]]), 2)] for row in rows]
        curves.mkdir(parents=True, exist_ok=True)
        with open(curves / f"{job.name}.csv", "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(
                [["global_step", "episodic_return"], *curve]
            )
    last_100 = results["train_return"]  # mean return of the last 100 episodes of the training
    return {
        "script": job.script,
        "env_id": job.env_id,
        "config": job.config,
        "seed": job.seed,
        "global_step": results["global_step"],
        "eval_mean": round(results["eval_mean"], 3),
        "eval_std": round(results["eval_std"], 3),
        "eval_stochastic_mean": round(results["eval_stochastic_mean"], 3),
        "eval_episodes": results["eval_episodes"],
        "train_return": round(last_100, 3) if last_100 is not None else "",
        "sps": results["sps"],
        # From its start to its exit, imports included.
        "process_seconds": "" if resumed else round(seconds, 2),
        "flags": job.flags,
        "torch": version("torch"),
        "gymnasium": version("gymnasium"),
        "commit": origin.rpartition(" ")[2],
        "mujoco": version("mujoco") if find_spec("mujoco") else "",
    }


def run_all(
    jobs: list[Job], table: Path, processes: int, curves: bool = True, runs: Path | None = None
) -> None:
    """Run those that are not in the table yet, at most `processes` at a time.

    Curves go to a folder beside the table. A run that fails leaves no line, does not stop the
    others, and makes the exit status 1.
    """
    done = {
        (row["script"], row["env_id"], row["config"], row["seed"]): row["flags"]
        for row in read(table)
    }
    for job in jobs:
        if done.get(job.key, job.flags) != job.flags:
            sys.exit(f"{table.name}: {' '.join(job.key)} stands there with {done[job.key]!r}")
    cores: Queue[int] = Queue()
    for core in range(processes):
        cores.put(core)

    def work(job: Job) -> dict:
        core = cores.get()
        try:
            return one_run(job, core, table.parent / "curves" if curves else None, runs)
        finally:
            cores.put(core)

    failed = False
    with ThreadPoolExecutor(processes) as pool:
        todo = {pool.submit(work, job): job for job in jobs if job.key not in done}
        try:
            for future in as_completed(todo):
                name = " ".join(todo[future].key)
                try:
                    line = future.result()
                except subprocess.CalledProcessError as error:
                    failed = True
                    print(f"{name}: failed with status {error.returncode}", file=sys.stderr)
                    continue
                except ValueError as error:
                    failed = True
                    print(f"{name}: {error}", file=sys.stderr)
                    continue
                append(table, line)
                print(f"{name}: {line['eval_mean']}", flush=True)
        except BaseException:  # Ctrl-C above all: begin no other run
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed:
        sys.exit(1)


def main() -> None:
    args = tyro.cli(Args)
    jobs = [
        Job(args.script, env_id, args.config, seed, args.flags)
        for seed in args.seeds
        for env_id in args.env_ids
    ]
    run_all(jobs, RESULTS / args.table, args.processes, runs=args.runs)


if __name__ == "__main__":
    main()
