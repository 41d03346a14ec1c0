"""Measure the options of ppo_rlhf_toy.py that other libraries name, and its memory at GPT-2's size.

    python -m benchmarks.rlhf_options                # an hour on one core, rlhf_options.csv
    python -m benchmarks.rlhf_options --only memory  # one iteration at the size of GPT-2
    python -m benchmarks.tables --table rlhf_options.csv --part reviews

An option starts from the SFT and the reward model of its seed's default run.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.jobs import ROOT, Job, Shared, launch, run_jobs
from benchmarks.rlhf import COLUMNS, RUNS, SCRIPT, RlhfRun

GROUP = "--baseline group --no-whiten-advantages --group-advantage"
OPTIONS = {
    "group whitened": "--baseline group",
    "RLOO": f"{GROUP} rloo",
    "GRPO": f"{GROUP} grpo",
    "Dr. GRPO": f"{GROUP} dr_grpo",
    "RLOO, k2 in the loss": f"{GROUP} rloo --kl-in-loss --kl-estimator k2",
    "GRPO, k3 in the loss": f"{GROUP} grpo --kl-in-loss --kl-estimator k3",
    "clip-higher 0.28": "--clip-coef-high 0.28",
}
# A group learns only where its answers differ, so it gets more of them, twice the critic's.
LARGE_BATCH = "--baseline group --group-size 4 --batch-size 2048 --num-minibatches 16"
LARGE_BATCH += " --num-iterations 120"


@dataclass
class Args(Shared):
    """Measure the options of RLHF."""

    seeds: tuple[int, ...] = (200, 201, 202, 203)  # of reviews
    arithmetic_seeds: tuple[int, ...] = (213, 214, 215, 216, 217, 218)
    runs: Path = RUNS  # where the run folders go
    only: Literal["all", "memory"] = "all"


def wanted(args: Args) -> Iterator[RlhfRun]:
    """Yield the runs, the default of a seed before its options."""
    for seed in args.arithmetic_seeds:
        yield RlhfRun("arithmetic", seed)
        yield RlhfRun("arithmetic", seed, "group of 4, batch of 2048", LARGE_BATCH)
    for seed in args.seeds:
        yield RlhfRun("reviews", seed)
        for name, flags in OPTIONS.items():
            yield RlhfRun("reviews", seed, name, flags)


def print_memory() -> None:
    """Train one iteration at the size of GPT-2; print the most memory that the process had."""
    flags = "--num-layers 12 --num-heads 12 --d-model 768 --context-size 1024 --max-new-tokens 32"
    flags += " --batch-size 16 --micro-batch-size 4 --num-minibatches 1 --update-epochs 1"
    flags += " --num-iterations 1 --sft-steps 1 --sft-batch-size 4 --eval-prompts 4"
    flags += " --task benchmarks.rlhf_gpt2:Echo"
    for more in ("--baseline group", ""):
        run = launch([ROOT / SCRIPT], [*flags.split(), *more.split()])
        print(f"{more or 'separate critic'}: {run.memory / 1024:.2f} GiB, {run.seconds:.0f} s")


def main() -> None:
    args = tyro.cli(Args)
    if args.only == "memory":
        print_memory()
        return
    jobs = []
    for run in wanted(args):
        measure = partial(run.line, args.runs, columns=("option", *COLUMNS, "optimum_kl"))
        jobs.append(Job((run.task, run.name or "default", run.seed), measure))
    run_jobs(jobs, args.path("rlhf_options.csv"), ("task", "option", "seed"))


if __name__ == "__main__":
    main()
