"""Learn the classic tasks with our scripts and with Stable-Baselines3, the same steps each.

    python benchmarks/classic.py --processes 2        # 10 seeds, lines of results/classic.csv
    python benchmarks/report.py --table classic.csv   # the table, beside the published figures

Stable-Baselines3 has the hyperparameters that rl-baselines3-zoo tuned for each task; ours are the
defaults with the flags below; those of ppo_discrete.py were chosen on seeds 100 to 239 of CartPole.
Runs that stand in the table already are not done again.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]

from run import RESULTS, Job, check_names, run_all  # noqa: E402

SB3 = ROOT / "benchmarks" / "peers" / "learn_sb3.py"
DISCRETE, CONTINUOUS = "ppo_discrete.py", "ppo_continuous.py"
# Environment, steps, our script and its flags.
TASKS = [
    ("CartPole-v1", 50_000, DISCRETE, ""),
    ("Acrobot-v1", 250_000, DISCRETE, ""),
    ("MountainCar-v0", 1_000_000, DISCRETE, "--norm-obs --activation tanh"),
    ("LunarLander-v3", 1_000_000, DISCRETE, ""),
    ("Pendulum-v1", 150_000, CONTINUOUS, "--gamma 0.9 --learning-rate 1e-3 --activation relu"),
]


@dataclass
class Args:
    """Run the classic tasks."""

    seeds: tuple[int, ...] = tuple(range(1, 11))
    processes: int = 1  # runs at a time, each on a core of its own
    env_ids: tuple[str, ...] = ()  # all of them by default
    quick: bool = False  # CartPole and Pendulum, 2 seeds, a fifth of the steps, to results/quick/


def main() -> None:
    args = tyro.cli(Args)
    env_ids, seeds, share, table = args.env_ids, args.seeds, 1.0, RESULTS / "classic.csv"
    if args.quick:
        env_ids, seeds, share = ("CartPole-v1", "Pendulum-v1"), (1, 2), 0.2
        table = RESULTS / "quick" / "classic.csv"
    check_names("--env-ids", env_ids, (env_id for env_id, *_ in TASKS))
    jobs = []
    for seed in seeds:
        for env_id, steps, script, more in TASKS:
            if env_ids and env_id not in env_ids:
                continue
            budget = f"--total-timesteps {int(share * steps)}"
            flags = f"{budget} --eval-episodes 100 {more}".strip()
            jobs.append(Job(script, env_id, "default" if not more else more, seed, flags))
            jobs.append(Job("Stable-Baselines3", env_id, "its zoo's", seed, budget, (str(SB3),)))
    run_all(jobs, table, args.processes)


if __name__ == "__main__":
    main()
