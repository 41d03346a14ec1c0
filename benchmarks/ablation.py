"""From the faithful configuration of ppo_continuous.py to its default, one change at a time.

    python -m benchmarks.ablation --processes 2             # lines of ablation.csv
    python -m benchmarks.tables --table ablation.csv
    python -m benchmarks.figures --table ablation.csv

The lines lead from faithful to the default, whose runs are taken from continuous.csv if they are
there. (With 17 inputs, the default learning rate is 3e-4 as well.)
"""

import itertools
from dataclasses import dataclass

import tyro

from benchmarks.jobs import append, by_key
from benchmarks.run import KEY, SeededArgs, Training, train_all

SCRIPT = "ppo_continuous.py"
FAITHFUL = "--log-std-init 0.0 --log-std-fall None --no-scale-actions --learning-rate 3e-4"
DEFAULT = "default"  # and then the noise falls by schedule and is not learned
LINES = {  # all flags of each line
    "faithful": FAITHFUL,
    "noise of length 1 over all actions, in units of the box": "--log-std-fall None",
    DEFAULT: "",
}


@dataclass
class Args(SeededArgs):
    """Run the steps from faithful to default."""

    seeds: tuple[int, ...] = (1, 2, 3)
    env_ids: tuple[str, ...] = ("HalfCheetah-v5", "Walker2d-v5")
    quick: bool = False  # Pendulum, 1 seed, 10,000 steps


def main() -> None:
    args = tyro.cli(Args)
    if args.quick:
        args.seeds, args.env_ids = (1,), ("Pendulum-v1",)
    more = "--total-timesteps 10000" if args.quick else ""
    table = args.path("ablation.csv")
    there = by_key(table, KEY)
    known = by_key(args.path("continuous.csv"), KEY) | there
    trainings = []
    for seed, env_id in itertools.product(args.seeds, args.env_ids):
        for name, flags in LINES.items():
            key = (SCRIPT, env_id, name, str(seed))
            flags = f"{more} {flags}".strip()
            if key in known:
                flags = known[key]["flags"]  # perhaps older ones
                if key not in there:
                    append(table, [known[key]])
            trainings.append(Training(SCRIPT, env_id, name, seed, flags))
    train_all(trainings, args, "ablation.csv")


if __name__ == "__main__":
    main()
