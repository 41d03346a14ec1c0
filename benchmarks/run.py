"""Train a script over environments and seeds: one table line and learning curve per run.

    python -m benchmarks.run --env-ids CartPole-v1 --seeds 1 2 3 4 5
    python -m benchmarks.run --env-ids CartPole-v1 --seeds 1 --config x --flags="--ent-coef 0.1"

Runs that are already in the table are not repeated, so if a call is interrupted, make it again.
With `--runs FOLDER`, an interrupted run continues from its checkpoint.
"""

import csv
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import tyro

from benchmarks.jobs import ROOT, Job, Shared, check_names, commit, launch, run_jobs

KEY = ("script", "env_id", "config", "seed")


@dataclass
class SeededArgs(Shared):
    """Flags of the benchmarks that train over environments and seeds."""

    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    env_ids: tuple[str, ...] = ()  # all of them by default
    processes: int = 1  # runs at a time, each on its own core


@dataclass
class Args(SeededArgs):
    """Train a script over environments and seeds."""

    env_ids: tuple[str, ...] = ("CartPole-v1",)
    script: str = "ppo_discrete.py"  # the script to run
    config: str = "default"  # a name for the flags, one column of the table
    flags: str = ""  # further flags of the script
    table: str = "runs.csv"  # the table's file in the folder of results
    runs: Path | None = None  # keep the runs' folders here; without it they are temporary


@dataclass
class Training:
    """A run of a script."""

    script: str  # as the table names it
    env_id: str
    config: str
    seed: int
    flags: str
    program: Sequence[object] = ()  # what Python runs, if not the script of this name

    @property
    def name(self) -> str:
        """The run as the name of a file or a folder."""
        parts = Path(self.script).stem, self.env_id, self.config, str(self.seed)
        return "__".join(parts).replace("/", "-")

    def line(self, core: int, curves: Path | None = None, runs: Path | None = None) -> list[dict]:
        """Train; write the learning curve and return the table's line."""
        at, folder = commit(), runs / self.name if runs is not None else None
        flags = ["--env-id", self.env_id, "--seed", self.seed, *shlex.split(self.flags)]
        run = launch(self.program or [ROOT / self.script], flags, core, folder)
        if curves is not None:
            write_curve(curves / f"{self.name}.csv", run.metrics)
        line = {name: getattr(self, name) for name in KEY}
        line["global_step"] = run.results["global_step"]
        for name in ("eval_mean", "eval_std", "eval_stochastic_mean", "eval_episodes"):
            line[name] = round(run.results[name], 3)
        last_100 = run.results["train_return"]  # mean return of the last 100 training episodes
        line |= {
            "train_return": round(last_100, 3) if last_100 is not None else "",
            "sps": run.results["sps"],
            "process_seconds": round(run.seconds, 2) if run.seconds is not None else "",
            "flags": self.flags,
            "torch": version("torch"),
            "gymnasium": version("gymnasium"),
            "commit": at,
            "mujoco": version("mujoco") if find_spec("mujoco") else "",
        }
        return [line]


def write_curve(path: Path, metrics: list[dict[str, str]]) -> None:
    """Write the returns of a run over its steps."""
    step, value = "global_step", "charts/episodic_return"
    rows = [(int(x[step]), round(float(x[value]), 2)) for x in metrics if x[value] != "nan"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([(step, "episodic_return"), *rows])


def train_all(
    trainings: Sequence[Training],
    args: SeededArgs,
    table: str,
    curves: bool = True,
    runs: Path | None = None,
) -> None:
    """Train the runs on --env-ids that the table lacks; curves go to a folder beside it."""
    check_names("--env-ids", args.env_ids, (x.env_id for x in trainings))
    folder = args.path("curves") if curves else None
    jobs = []
    for x in trainings:
        if x.env_id in (args.env_ids or [x.env_id]):
            measure = partial(x.line, curves=folder, runs=runs)
            jobs.append(Job((x.script, x.env_id, x.config, x.seed), measure, x.flags))
    run_jobs(jobs, args.path(table), KEY, args.processes)


def main() -> None:
    args = tyro.cli(Args)
    trainings = [
        Training(args.script, env_id, args.config, seed, args.flags)
        for seed in args.seeds
        for env_id in args.env_ids
    ]
    train_all(trainings, args, args.table, runs=args.runs)


if __name__ == "__main__":
    main()
