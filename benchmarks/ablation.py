"""From the faithful configuration of ppo_continuous.py to its default, one change at a time.

    python benchmarks/ablation.py --processes 2                            # lines of ablation.csv
    python benchmarks/report.py --table ablation.csv --figure ablation     # the table, the figure

The first lines lead from faithful to the default, whose runs are taken from continuous.csv where
they stand there. The others lead from faithful to an earlier default of ours, with many more
changes; "and" keeps those of the lines above. Only the first of them can still be run.
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
FAITHFUL = "--log-std-init 0.0 --log-std-fall None --no-scale-actions"
DEFAULT = "default"  # and then the noise falls by schedule and is not learned
LINES = {  # all flags of each line
    "faithful": FAITHFUL,
    "noise of length 1 over all actions, in units of the box": "--log-std-fall None",
    DEFAULT: "",
    "8 environments x 256 steps": f"{FAITHFUL} --num-envs 8 --num-steps 256",
}
FORMER = (  # lines with flags that the script no longer has, each a change more than the one above
    "and advantages recomputed before each epoch",
    "and value loss not clipped",
    "and minibatches of 256, learning rate by the KL",
    "and discount 0.995",
    "and noise of length 1",
    "and the noise falls",
)


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
            there.add(key)
    jobs = [
        Job(SCRIPT, env_id, name, seed, f"{more} {flags}".strip())
        for seed in seeds
        for env_id in env_ids
        for name, flags in LINES.items()
        if (env_id, name, str(seed)) not in there
    ]
    run_all(jobs, table, args.processes)


if __name__ == "__main__":
    main()
