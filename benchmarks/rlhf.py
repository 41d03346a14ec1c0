"""Measure ppo_rlhf_toy.py: seeds, and a sweep of beta on one reward model.

    python -m benchmarks.rlhf                    # about 20 minutes on one core
    python -m benchmarks.rlhf --only figure      # draw rlhf.svg from the table again
    python -m benchmarks.tables --table rlhf.csv --part arithmetic

A run is one process and one line of rlhf.csv. The runs' folders stay under --runs: a beta is swept
with the reward model of its seed's default run.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

import ppo_rlhf_toy as toy
from benchmarks import figures
from benchmarks.jobs import ROOT, Finished, Job, Shared, commit, launch, read, run_jobs
from benchmarks.rlhf_optimum import load, optimum_of

SCRIPT = "ppo_rlhf_toy.py"
# The table's; a task leaves empty what it has no measure of.
COLUMNS = """task seed kl_coef sft_gold sft_grammatical sft_greedy_gold rm_accuracy rm_correlation
gold proxy grammatical greedy_gold kl length eos_rate distinct optimum_share sft_accuracy
sft_greedy_accuracy accuracy greedy_accuracy wall_seconds first_ratio_error flags torch
commit""".split()
GRAMMARS = {"reviews": toy.Reviews.grammar, "arithmetic": re.compile("0|[1-9][0-9]*")}
RUNS = ROOT / "runs" / "benchmark-rlhf"
# The seed with which beta is swept, and the values beside the default 0.1 and 0, which all have.
SWEPT, BETAS = 1, (0.01, 0.03, 0.3)


@dataclass
class Args(Shared):
    """Run the benchmark of the RLHF script."""

    seeds: tuple[int, ...] = (1, 2, 3, 4)  # of the default runs and of beta 0
    arithmetic_seeds: tuple[int, ...] = (1, 2, 3)
    runs: Path = RUNS  # where the run folders go
    only: Literal["all", "reviews", "arithmetic", "figure"] = "all"


@dataclass
class RlhfRun:
    """A run of the script; with a name, it is not the default's but that of a change."""

    task: str
    seed: int
    name: str = ""
    more: str = ""  # flags of the change
    program: tuple[object, ...] = (ROOT / SCRIPT,)  # what Python runs
    loads_models: bool = True  # a change takes the models of the default run

    @property
    def flags(self) -> list[str]:
        return [f"--task={self.task}", f"--seed={self.seed}", *self.more.split()]

    def train(self, runs: Path, core: object = None) -> Finished:
        """Train, if need be after the default run, whose models a change takes."""
        folder = "-".join((self.task, str(self.seed), self.name or "default")).replace(" ", "-")
        flags = self.flags
        if self.name and self.loads_models:
            default = RlhfRun(self.task, self.seed).train(runs, core)
            flags.append(f"--load-models={default.results['run_dir']}")
        return launch(self.program, flags, core, runs / folder)

    def line(
        self, runs: Path, core: object = None, columns: Sequence[str] = COLUMNS
    ) -> list[dict[str, object]]:
        """Train and return the table's line."""
        at, run = commit(), self.train(runs, core)
        folder = Path(run.results["run_dir"])
        args, task, models = load(folder)
        measured = run.results | measures_of(args, task, models)
        measured["optimum_share"], measured["optimum_kl"] = optimum_of(folder)
        if self.task == "arithmetic":
            measured = {name.replace("gold", "accuracy"): x for name, x in measured.items()}
        measured = {k: round(x, 4) if isinstance(x, float) else x for k, x in measured.items()}
        errors = [float(row["losses/first_ratio_error"]) for row in run.metrics]
        measured["first_ratio_error"] = float(f"{max(errors):.2g}")
        measured |= {"task": self.task, "seed": self.seed, "kl_coef": args.kl_coef}
        measured |= dict.fromkeys(("config", "option"), self.name or "default")
        measured |= {"flags": " ".join(self.flags), "torch": version("torch"), "commit": at}
        return [{name: measured.get(name) for name in columns}]


def measures_of(args: toy.Args, task: toy.Task, models: toy.Models) -> dict[str, float]:
    """Return what the script leaves out, of the answers that it evaluated and of greedy ones."""
    measures = {}
    for prefix, model in (("sft_", models.reference), ("", models.policy)):
        rng, generator = toy.streams(args, 4, torch.device("cpu"))
        prompts = task.prompts(args.eval_prompts, rng, held_out=True)
        answers = toy.answer(args, model, prompts, generator).answers
        model.temperature = 1e-6  # the likeliest word every time
        greedy = toy.answer(args, model, prompts, generator).answers
        grammatical = [GRAMMARS[args.task].fullmatch(x) is not None for x in answers]
        measures[f"{prefix}grammatical"] = float(np.mean(grammatical))
        measures[f"{prefix}distinct"] = len(set(answers)) / len(answers)
        measures[f"{prefix}greedy_gold"] = float(np.mean(task.gold_scores(prompts, greedy)))
    return measures


def wanted(args: Args) -> Iterator[RlhfRun]:
    """Yield the runs, those with the default beta before those that need their models."""
    for seed in args.seeds if args.only in ("all", "reviews") else ():
        yield RlhfRun("reviews", seed)
        for beta in (0.0, *BETAS) if seed == SWEPT else (0.0,):
            yield RlhfRun("reviews", seed, f"beta {beta}", f"--kl-coef {beta}")
    for seed in args.arithmetic_seeds if args.only in ("all", "arithmetic") else ():
        yield RlhfRun("arithmetic", seed)


def main() -> None:
    args = tyro.cli(Args)
    table = args.path("rlhf.csv")
    jobs = [Job((" ".join(run.flags),), partial(run.line, args.runs)) for run in wanted(args)]
    run_jobs(jobs, table, ("flags",))
    if args.only != "arithmetic":
        swept = "reviews", str(SWEPT)
        rows = [row for row in read(table) if (row["task"], row["seed"]) == swept]
        if not rows:
            sys.exit(f"nothing to draw: {table} has no line of {' '.join(swept)}")
        figures.draw_rlhf(rows, table.with_name("rlhf.svg"))


if __name__ == "__main__":
    main()
