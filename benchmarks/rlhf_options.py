"""Measure the options of ppo_rlhf_toy.py that other libraries name, and its memory at GPT-2's size.

    python benchmarks/rlhf_options.py                # half an hour on one core, rlhf_options.csv
    python benchmarks/rlhf_options.py --only table   # print the table of the page
    python benchmarks/rlhf_options.py --only memory  # one iteration at the size of GPT-2

An option starts from the SFT and the reward model of its seed's default run. Runs that stand in the
table are not done again. Seconds are those of the CPU, so that a busy machine does not matter.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from rlhf import RUNS, Run, line_of, train  # noqa: E402
from rlhf_optimum import optimum_of  # noqa: E402
from run import RESULTS, append, read  # noqa: E402

TABLE = RESULTS / "rlhf_options.csv"
GROUP = "--baseline group --no-whiten-advantages --group-advantage"
OPTIONS = {
    "group whitened": "--baseline group",
    "RLOO": f"{GROUP} rloo",
    "GRPO": f"{GROUP} grpo",
    "Dr. GRPO": f"{GROUP} dr_grpo",
    "RLOO, k2 in the loss": f"{GROUP} rloo --kl-in-loss --kl-estimator k2",
    "GRPO, k3 in the loss": f"{GROUP} grpo --kl-in-loss --kl-estimator k3",
    "averaged per answer": "--loss-average answers",
    "clip-higher 0.28": "--clip-coef-high 0.28",
    "value head on the policy": "--share-trunk",
}
ARITHMETIC = {"group whitened": OPTIONS["group whitened"]}


@dataclass
class Args:
    """Run the options."""

    seeds: tuple[int, ...] = (200, 201, 202, 203)  # of reviews
    more_seeds: tuple[int, ...] = (204,)  # of the defaults alone
    arithmetic_seeds: tuple[int, ...] = (200, 201, 202)
    runs: Path = RUNS  # where the run folders go
    only: Literal["all", "defaults", "table", "memory"] = "all"


def wanted(args: Args) -> list[Run]:
    """Return the runs: the defaults, then all options of one seed after the other."""
    runs = [Run("reviews", seed) for seed in (*args.seeds, *args.more_seeds)]
    for seed in args.arithmetic_seeds:
        runs.append(Run("arithmetic", seed))
        runs += [Run("arithmetic", seed, k, flags, after="SFT") for k, flags in ARITHMETIC.items()]
    if args.only == "defaults":
        return runs
    return runs + [
        Run("reviews", seed, name, flags) for seed in args.seeds for name, flags in OPTIONS.items()
    ]


def table() -> str:
    """Return the means over the seeds, a line an option."""
    columns = {"optimum_kl": "KL to the optimum", "optimum_share": "share of the optimum"}
    columns |= {"gold": "gold", "length": "tokens", "kl": "KL to the reference", "eos_rate": "EOS"}
    rows = [row for row in read(TABLE) if row["task"] == "reviews"]
    lines = [f"| | seeds | {' | '.join(columns.values())} |", "|---" + "|---:" * 7 + "|"]
    for option in dict.fromkeys(row["option"] for row in rows):
        runs = [row for row in rows if row["option"] == option]
        cells = []
        for column in columns:
            x = [float(row[column]) for row in runs]
            cells.append(f"{statistics.mean(x):.2f} ± {statistics.pstdev(x):.2f}")
        lines.append(f"| {option} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def memory() -> None:
    """Train one iteration at the size of GPT-2; print the most memory that the process had."""
    flags = "--num-layers 12 --num-heads 12 --d-model 768 --context-size 1024 --max-new-tokens 32"
    flags += " --batch-size 16 --micro-batch-size 4 --num-minibatches 1 --update-epochs 1"
    flags += " --num-iterations 1 --sft-steps 1 --sft-batch-size 4 --eval-prompts 4"
    for more in ("--baseline group", "--share-trunk", ""):
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, ROOT / "ppo_rlhf_toy.py", "--task=rlhf_gpt2:Echo"]
            words += [f"--run-dir={folder}/run", *flags.split(), *more.split()]
            process = subprocess.Popen(words, cwd=ROOT / "benchmarks", stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"failed: {more}")
        seconds = usage.ru_utime + usage.ru_stime
        print(f"{more or 'separate critic'}: {usage.ru_maxrss / 2**20:.2f} GiB, {seconds:.0f} s")


def main() -> None:
    args = tyro.cli(Args)
    if args.only == "memory":
        memory()
        return
    if args.only == "table":
        print(table())
        return
    done = {(row["task"], row["option"], row["seed"]) for row in read(TABLE)}
    for run in wanted(args):
        option = run.name or "default"
        if (run.task, option, str(run.seed)) in done:
            continue
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        folder = train(run, args.runs)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        line = {"option": option} | line_of(run, folder)
        _, line["optimum_kl"] = optimum_of(folder)
        append(TABLE, line | {"cpu_seconds": round(seconds, 1)})
        print(f"{run.task}, {option}, seed {run.seed}", flush=True)


if __name__ == "__main__":
    main()
