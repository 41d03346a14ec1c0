"""Run a script over environments and seeds; one CSV line a run, and its learning curve.

    python benchmarks/run.py --env-ids CartPole-v1 --seeds 1 2 3 4 5
    python benchmarks/run.py --env-ids CartPole-v1 --seeds 1 --config x --flags="--ent-coef 0.1"

Runs that stand in the table already are not done again, so an interrupted call is just repeated.
"""

import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from queue import Queue

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


def one_run(args: Args, env_id: str, seed: int, core: int) -> dict:
    """Train in a process of its own, on one core with one thread; return the table's line."""
    with tempfile.TemporaryDirectory() as folder:
        pin = ["taskset", "-c", str(core)] if shutil.which("taskset") else []
        command = [*pin, sys.executable, str(ROOT / args.script), "--env-id", env_id]
        command += ["--seed", str(seed), "--run-dir", folder, *shlex.split(args.flags)]
        start = time.perf_counter()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        results = json.loads((Path(folder) / "results.json").read_text())
        with open(Path(folder) / "metrics.csv") as file:
            rows = [row for row in csv.DictReader(file) if row[CURVE[1]] != "nan"]
    name = f"{Path(args.script).stem}__{env_id}__{args.config}__{seed}.csv".replace("/", "-")
    curve = [[int(row[CURVE[0]]), round(float(row[CURVE[1]]), 2)] for row in rows]
    (RESULTS / "curves").mkdir(parents=True, exist_ok=True)
    with open(RESULTS / "curves" / name, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [["global_step", "episodic_return"], *curve]
        )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    return {
        "script": args.script,
        "env_id": env_id,
        "config": args.config,
        "seed": seed,
        "global_step": results["global_step"],
        "eval_mean": round(results["eval_mean"], 3),
        "eval_std": round(results["eval_std"], 3),
        "eval_stochastic_mean": round(results["eval_stochastic_mean"], 3),
        "eval_episodes": results["eval_episodes"],
        "train_return": round(results["train_return"], 3),  # of the last 100 episodes
        "sps": results["sps"],
        "process_seconds": round(seconds, 2),  # from its start to its exit, imports included
        "flags": args.flags,
        "torch": version("torch"),
        "gymnasium": version("gymnasium"),
        "commit": commit,
        "mujoco": version("mujoco") if find_spec("mujoco") else "",
    }


def main() -> None:
    args = tyro.cli(Args)
    table = RESULTS / args.table
    RESULTS.mkdir(exist_ok=True)
    done = set()
    if table.exists():
        with open(table) as file:
            done = {
                tuple(row[k] for k in ("script", "env_id", "config", "seed"))
                for row in csv.DictReader(file)
            }
    jobs = [(env_id, seed) for seed in args.seeds for env_id in args.env_ids]
    jobs = [job for job in jobs if (args.script, job[0], args.config, str(job[1])) not in done]
    cores: Queue[int] = Queue()
    for core in range(args.processes):
        cores.put(core)

    def work(job: tuple[str, int]) -> dict:
        core = cores.get()
        try:
            return one_run(args, *job, core)
        finally:
            cores.put(core)

    with ThreadPoolExecutor(args.processes) as pool:
        for future in as_completed([pool.submit(work, job) for job in jobs]):
            line = future.result()
            new = not table.exists()
            with open(table, "a", newline="") as file:
                writer = csv.DictWriter(file, line.keys(), lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerow(line)
            print(
                f"{line['env_id']} {line['config']} seed {line['seed']}: {line['eval_mean']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
