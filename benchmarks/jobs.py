"""What the benchmarks share: measured processes, and tables that can be continued."""

import contextlib
import csv
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial, reduce
from importlib.metadata import version
from pathlib import Path
from queue import Queue
from types import ModuleType
from unittest import mock

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"  # the committed tables, which the pages show


@dataclass
class Shared:
    """Flags of all benchmarks."""

    # Folder of the tables. By default your own, benchmarks/results/own (with --quick:
    # benchmarks/results/quick), so that your runs stay separate from the committed ones. Pass
    # benchmarks/results to continue those.
    results: Path | None = None

    def path(self, name: str) -> Path:
        own = "quick" if getattr(self, "quick", False) else "own"
        return (self.results or RESULTS / own) / name


# ---- Tables ------------------------------------------------------------------------------------


def read(table: Path) -> list[dict[str, str]]:
    """Return the lines of a CSV table, none if it does not exist yet."""
    if not table.exists():
        return []
    with open(table) as file:
        return list(csv.DictReader(file))


def by_key(table: Path, key: Sequence[str]) -> dict[tuple[str, ...], dict[str, str]]:
    """Return the lines of a table by the values of its key columns."""
    return {tuple(line[column] for column in key): line for line in read(table)}


def append(table: Path, lines: Sequence[dict]) -> None:
    """Write more lines. Raises `ValueError` if the table has other columns."""
    table.parent.mkdir(parents=True, exist_ok=True)
    old = read(table)
    if old and list(old[0]) != list(lines[0]):
        raise ValueError(f"{table} has the columns {', '.join(old[0])}: name another table")
    with open(table, "a", newline="") as file:
        writer = csv.DictWriter(file, lines[0].keys(), lineterminator="\n")
        if not old:
            writer.writeheader()
        writer.writerows(lines)


def check_names(flag: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Exit with a one-line message if a name is unknown."""
    known = list(dict.fromkeys(known))
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"{flag}: there is no {', '.join(unknown)}, but {', '.join(known)}")


def commit(folder: Path = ROOT) -> str:
    """Return the short name of the commit in a checkout, with a "+" if a script was changed."""
    words = ["git", "rev-parse", "--short", "HEAD"]
    name = subprocess.run(words, cwd=folder, capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "*.py"], cwd=folder)
    return name + "+" * changed.returncode if name else name


# ---- Processes ---------------------------------------------------------------------------------


class Failed(RuntimeError):
    """A process that did not do what it was asked to do."""


@dataclass
class Finished:
    """What a process left behind."""

    results: dict  # of results.json, if it wrote one
    metrics: list[dict[str, str]]  # of metrics.csv, one row per iteration
    seconds: float | None = None  # from start to exit, imports included; None if it was resumed
    memory: float = 0.0  # peak, in megabytes
    printed: str = ""
    started: float = 0.0  # by time.time()


def launch(
    script: Sequence[object],
    flags: Sequence[object] = (),
    core: object = None,
    folder: Path | None = None,
    python: Path | str = sys.executable,
    environment: dict[str, str] | None = None,
    limit: float | None = None,
) -> Finished:
    """Run a script in its own process, with one thread, on one core (or on "0,1").

    `folder` keeps a run of ours: if it was interrupted, it is resumed there; if it is finished, it
    is not run again. Without a folder, the run is temporary. Raises `Failed` if the process fails
    or takes longer than `limit` seconds.
    """
    resumed = False
    if folder is not None:
        folder, note = folder.absolute(), folder / "origin.txt"
        origin = f"{shlex.join(map(str, flags))} at {commit()}"
        resumed = (folder / "checkpoint.pt").exists()
        if not resumed:  # drop what a run killed before its first checkpoint left
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            note.write_text(origin)
        elif not note.exists() or note.read_text() != origin:
            raise Failed(f"{folder} holds another run than {origin}: delete it")
        results, metrics = read_run(folder)
        if results and not results.get("stopped"):  # by Ctrl-C, for example
            return Finished(results, metrics)
        flags = ["--resume", folder] if resumed else [*flags, "--run-dir", folder]
    pin = ["taskset", "-c", core] if core is not None and shutil.which("taskset") else []
    command = list(map(str, [*pin, python, *script, *flags]))
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        variables = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        variables["TORCHINDUCTOR_CACHE_DIR"] = str(temporary / "inductor")  # empty
        variables |= environment or {}
        with open(temporary / "out", "w") as out, open(temporary / "err", "w") as err:
            started = time.time()
            process = subprocess.Popen(
                command, cwd=temporary, env=os.environ | variables, stdout=out, stderr=err
            )
            alarm = threading.Timer(limit or threading.TIMEOUT_MAX, process.kill)
            alarm.daemon = True
            alarm.start()
            _, status, usage = os.wait4(process.pid, 0)  # for its own peak of memory
            alarm.cancel()
            seconds = time.time() - started
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors = (temporary / "err").read_text()[-2000:]
            after = f"status {process.returncode} after {seconds:.0f} seconds"
            raise Failed(f"{after}: {shlex.join(command)}\n{errors}")
        kept = folder or next(temporary.glob("runs/*"), temporary)
        printed = (temporary / "out").read_text()
        seconds = None if resumed else seconds
        return Finished(*read_run(kept), seconds, usage.ru_maxrss / 1024, printed, started)


def read_run(folder: Path) -> tuple[dict, list[dict[str, str]]]:
    """Return the results and the metrics of a run's folder, empty if it is not a run of ours."""
    results = folder / "results.json"
    return json.loads(results.read_text()) if results.exists() else {}, read(folder / "metrics.csv")


@contextlib.contextmanager
def wrapped(script: ModuleType, wraps: dict[str, Callable]) -> Iterator[None]:
    """Call `wraps[name](original, *arguments)` wherever a script calls its function `name`.

    A dotted name, such as "experiment.Run.save", refers to something that the script imports.
    """

    def bind(wrap: Callable, original: Callable) -> Callable:
        return lambda *args, **kwargs: wrap(original, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        for path, wrap in wraps.items():
            *owners, name = path.split(".")
            owner = reduce(getattr, owners, script)
            stack.enter_context(mock.patch.object(owner, name, bind(wrap, getattr(owner, name))))
        yield


def wrapped_script(script: str, wraps: str) -> tuple[str, str]:
    """Return the program with which `launch` trains with `wraps`, such as "overhead.TIMED"."""
    module = wraps.partition(".")[0]
    code = f"from benchmarks import jobs, {module}; jobs.train_wrapped({script!r}, {wraps})"
    return "-c", code


def train_wrapped(script: str, wraps: dict[str, Callable]) -> None:
    """Train with the command line's flags, with functions of the script wrapped."""
    module = importlib.import_module(Path(script).stem)
    with wrapped(module, wraps):
        module.experiment.main(module.Args, module.train)


# ---- Jobs --------------------------------------------------------------------------------------


@dataclass
class Job:
    """Something to measure, which becomes lines of a table."""

    key: tuple[object, ...]  # the values of the key columns of its lines
    measure: Callable[[int], list[dict]]  # takes the core to run on
    flags: str | None = None  # with which a line with this key must have been measured


def run_jobs(jobs: Iterable[Job], table: Path, key: Sequence[str], processes: int = 1) -> None:
    """Run the jobs that the table has no line for, at most `processes` at a time.

    A job that fails leaves no line, does not stop the others, and makes the exit status 1.
    """
    done, todo, cores, lock = by_key(table, key), [], Queue[int](), threading.Lock()
    # The cores that this command may use: two commands under taskset then share none.
    mine = sorted(getattr(os, "sched_getaffinity", lambda _: range(processes))(0))
    for i in range(processes):
        cores.put(mine[i % len(mine)])
    for job in jobs:
        name = " ".join(map(str, job.key)) or table.stem  # a table may hold just one job
        line = done.get(tuple(map(str, job.key)))
        if line is None:
            todo.append((name, job))
        elif job.flags not in (None, line.get("flags")):
            sys.exit(f"{table.name}: {name} was measured with the flags {line['flags']!r}")
        else:
            print(f"{name}: already in {table}", flush=True)

    def work(item: tuple[str, Job]) -> bool:
        name, job = item
        core = cores.get()
        try:
            lines = job.measure(core)
        except Failed as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            return False
        finally:
            cores.put(core)
        with lock:
            append(table, lines)
            print(f"{name}: measured, now in {table}", flush=True)
        return True

    with ThreadPoolExecutor(processes) as pool:
        try:
            succeeded = list(pool.map(work, todo))
        except BaseException:  # above all Ctrl-C: start no other job
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if not all(succeeded):
        sys.exit(1)


Quantities = dict[tuple[str, str], float]  # (case, quantity), a line and a column: value
# The part of the table, case and quantity of one of the values, and the function that measures.
Measurement = tuple[str, str, str, Callable[[], Quantities]]


def measure_all(measurements: Sequence[Measurement], rounds: int, table: Path) -> None:
    """Take all measurements in turn, round after round."""

    def lines(part: str, number: int, measure: Callable[[], Quantities], core: int) -> list[dict]:
        at = {"torch": version("torch"), "commit": commit()}
        return [
            {"part": part, "case": case, "quantity": name, "round": number, "value": f"{x:.5g}"}
            | at
            for (case, name), x in measure().items()
        ]

    jobs = [
        Job((part, case, quantity, number), partial(lines, part, number, measure))
        for number in range(1, rounds + 1)
        for part, case, quantity, measure in measurements
    ]
    run_jobs(jobs, table, ("part", "case", "quantity", "round"))
