"""From the faithful configuration of ppo_continuous.py to its default, one change at a time.

    python benchmarks/ablation.py --processes 2                            # lines of ablation.csv
    python benchmarks/report.py --table ablation.csv --figure ablation     # the table, the figure

The first lines lead from faithful to the default, whose runs are taken from continuous.csv where
they stand there. The others lead from faithful to an earlier default of ours, with many more
changes; "and" keeps those of the lines above.
Runs that stand in the table already are not done again.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]

from run import RESULTS, Job, append, read, run_all  # noqa: E402

SCRIPT = "ppo_continuous.py"
FAITHFUL = "--config faithful"
LENGTH_1 = "--log-std-init None --scale-actions"
DEFAULT = "default"  # and then the noise falls by schedule and is not learned
ELSEWHERE = {  # what else is changed, and the flags that do it
    "8 environments x 256 steps": "--num-envs 8 --num-steps 256",
    "and advantages recomputed before each epoch": "--recompute-advantages",
    "and value loss not clipped": "--no-clip-vloss",
    "and minibatches of 256, learning rate by the KL": (
        "--num-minibatches 8 --learning-rate 1e-3 --desired-kl 0.025"
    ),
    "and discount 0.995": "--gamma 0.995",
    "and noise of length 1": LENGTH_1,
    "and the noise falls": "--log-std-fall 1.5",
}
LINES = {  # all flags of each line
    "faithful": FAITHFUL,
    "noise of length 1 over all actions, in units of the box": f"{FAITHFUL} {LENGTH_1}",
    DEFAULT: "",
}
flags = FAITHFUL
for name, change in ELSEWHERE.items():
    flags = f"{flags} {change}"
    LINES[name] = flags


@dataclass
class Args:
    """Run the steps from faithful to default."""

    seeds: tuple[int, ...] = (1, 2, 3)
    env_ids: tuple[str, ...] = ("HalfCheetah-v5", "Walker2d-v5")
    processes: int = 1  # runs at a time, each on a core of its own
    quick: bool = False  # Pendulum, 1 seed, 10,000 steps, to results/quick/


def main() -> None:
    args = tyro.cli(Args)
    seeds, env_ids, more, table = args.seeds, args.env_ids, "", RESULTS / "ablation.csv"
    if args.quick:
        seeds, env_ids, table = (1,), ("Pendulum-v1",), RESULTS / "quick" / "ablation.csv"
        more = "--total-timesteps 10000"
    there = {(row["env_id"], row["config"], row["seed"]) for row in read(table)}
    for row in read(RESULTS / "continuous.csv") if not args.quick else []:
        wanted = row["env_id"] in env_ids and row["seed"] in map(str, seeds)
        key = row["env_id"], row["config"], row["seed"]
        if row["config"] == DEFAULT and wanted and key not in there:
            append(table, row)
    jobs = [
        Job(SCRIPT, env_id, name, seed, f"{more} {flags}".strip())
        for seed in seeds
        for env_id in env_ids
        for name, flags in LINES.items()
    ]
    run_all(jobs, table, args.processes)


if __name__ == "__main__":
    main()
