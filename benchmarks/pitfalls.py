"""Reproduce the pitfalls of docs/en/debugging.md, each beside healthy runs, and measure the ranges.

    python -m benchmarks.pitfalls                       # run what is missing, then draw everything
    python -m benchmarks.pitfalls --only lr-high        # one case
    python -m benchmarks.pitfalls --ranges              # print the tables of the page

A run is one process of a script with the flags of its case. All its logged numbers go to the folder
pitfalls, one line per iteration, and the figures are drawn only from there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tyro

from benchmarks import figures
from benchmarks.jobs import RESULTS, ROOT, Job, Shared, check_names, launch, read, run_jobs
from benchmarks.tables import markdown_table

SEEDS = (1, 2, 3, 4, 5)
CARTPOLE = "ppo_discrete.py --env-id CartPole-v1"
LAKE = "ppo_discrete.py --env-id FrozenLake-v1 --env-kwargs is_slippery=false"
PENDULUM = "ppo_continuous.py --env-id Pendulum-v1 --total-timesteps 150000 --gamma 0.9"
PENDULUM += " --learning-rate 1e-3 --activation relu"


@dataclass(frozen=True)
class Case:
    """A command, the healthy case to compare it with, and the logged number that gives it away."""

    command: str  # of the script, with the flags that differ from the healthy case at the end
    healthy: str  # the name of the healthy case, "" if it is one
    number: str = "losses/approx_kl"  # the second panel
    log: bool = False  # whether the second panel has a logarithmic axis


CASES = {
    "cartpole": Case(CARTPOLE, ""),
    "lr-high": Case(f"{CARTPOLE} --learning-rate 0.2", "cartpole", log=True),
    "lr-low": Case(f"{CARTPOLE} --learning-rate 2.5e-5", "cartpole", log=True),
    "no-annealing": Case(f"{CARTPOLE} --learning-rate 0.02 --no-anneal-lr", "cartpole", log=True),
    "clip-wide": Case(f"{CARTPOLE} --clip-coef 10", "cartpole", log=True),
    "clip-narrow": Case(f"{CARTPOLE} --clip-coef 0.01", "cartpole", "losses/clipfrac"),
    "batch-small": Case(f"{CARTPOLE} --num-envs 4 --num-steps 16", "cartpole", "losses/grad_norm"),
    "batch-large": Case(f"{CARTPOLE} --num-steps 512", "cartpole", "losses/explained_variance"),
    "epochs-one": Case(f"{CARTPOLE} --update-epochs 1", "cartpole", log=True),
    "epochs-many": Case(f"{CARTPOLE} --update-epochs 60", "cartpole", log=True),
    "critic-dead": Case(f"{CARTPOLE} --vf-coef 0", "cartpole", "losses/explained_variance"),
    "lambda-zero": Case(f"{CARTPOLE} --gae-lambda 0", "cartpole", "losses/explained_variance"),
    "lambda-one": Case(f"{CARTPOLE} --gae-lambda 1", "cartpole", "losses/explained_variance"),
    "entropy-high": Case(f"{CARTPOLE} --ent-coef 0.5", "cartpole", "losses/entropy"),
    "no-clipped-gradient": Case(
        f"{CARTPOLE} --max-grad-norm 1e9", "cartpole", "losses/grad_norm", log=True
    ),
    "lake": Case(f"{LAKE} --ent-coef 0.05", ""),
    "entropy-low": Case(LAKE, "lake", "losses/entropy"),
    "pendulum": Case(PENDULUM, ""),
    "no-normalisation": Case(
        f"{PENDULUM} --no-norm-obs --no-norm-reward", "pendulum", "losses/value_loss", log=True
    ),
    "no-advantage-normalisation": Case(
        f"{LAKE} --ent-coef 0.05 --norm-adv none", "lake", "losses/entropy"
    ),
}


@dataclass
class Args(Shared):
    """Run, draw and measure the pitfalls."""

    only: tuple[str, ...] = ()  # cases to run or draw, by default all
    ranges: bool = False  # print the healthy ranges and the outcomes as Markdown, run nothing
    # Copy the logged numbers of finished RLHF runs (benchmarks.rlhf) from this folder.
    rlhf_runs: Path | None = None


def rounded(metrics: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the metrics of a run with five digits each."""
    return [
        {name: x if name == "global_step" else f"{float(x):.5g}" for name, x in row.items()}
        for row in metrics
    ]


def train(name: str, seed: int, core: int) -> list[dict[str, str]]:
    """Run a case; return what it logged."""
    script, *flags = CASES[name].command.split()
    flags += [f"--seed={seed}", "--eval-episodes=1"]
    return rounded(launch([ROOT / script], flags, core).metrics)


def load(name: str, folder: Path) -> list[dict[str, np.ndarray]]:
    """Return the runs of a case in a folder, each with one column of numbers per metric."""
    runs = []
    for path in sorted(folder.glob(f"{name}__*.csv")):
        rows = read(path)
        runs.append({name: np.array([float(row[name]) for row in rows]) for name in rows[0]})
    return runs


def draw(name: str, folder: Path) -> None:
    """Draw the healthy runs in blue and those of the case in red."""
    case = CASES[name]
    runs = {"healthy": load(case.healthy, folder), name: load(name, folder)}
    figures.draw_pitfall(runs, case.number, case.log, folder / f"{name}.svg")


def digits(x: float) -> str:
    """Format with two or more digits, with an exponent only where a person would write one."""
    if 0 < abs(x) < 1e-4:
        return f"{x:.0e}"
    return f"{x:,.0f}" if abs(x) >= 100 else f"{float(f'{x:.2g}'):g}"


def ranges(folder: Path = RESULTS / "pitfalls") -> str:
    """Return one row per logged number: 5 to 95% of each script's healthy iterations."""
    columns = {
        "ppo_discrete.py": [*load("cartpole", folder), *load("lake", folder)],
        "ppo_continuous.py": load("pendulum", folder),
        "ppo_rlhf_toy.py": load("rlhf", folder),
    }

    def cell(runs: list[dict[str, np.ndarray]], name: str) -> str:
        values = np.concatenate([np.zeros(0), *(run[name] for run in runs if name in run)])
        values = values[np.isfinite(values)]
        if not len(values):
            return "-"
        low, high = np.quantile(values, (0.05, 0.95))
        return f"{digits(low)} to {digits(high)}"

    names = dict.fromkeys(name for runs in columns.values() for run in runs for name in run)
    shown = [x for x in names if x.startswith(("losses/", "objective/")) and x != "losses/kl_coef"]
    lines = [[f"`{name}`", *(cell(runs, name) for runs in columns.values())] for name in shown]
    return markdown_table([":number", *columns], lines)


def mean_of(runs: list[dict[str, np.ndarray]], metric: str, share: float) -> str:
    """Return the mean of a metric over runs, from this share of the steps on."""
    means = []
    for run in runs:
        steps, values = run["global_step"], run[metric]
        known = ~np.isnan(values)  # where no episode ended, the last known return still holds
        values = np.interp(steps, steps[known], values[known])
        means.append(values[steps > share * steps[-1]].mean())
    return digits(float(np.mean(means)))


def outcomes(folder: Path = RESULTS / "pitfalls") -> str:
    """Return one row per case: returns over the run and its last tenth, the number over the run."""
    heads = [":case", ":flags", "return, whole run", "return, last tenth"]
    lines = []
    for name, case in CASES.items():
        if not case.healthy:
            continue
        runs, healthy = load(name, folder), load(case.healthy, folder)
        returns = "charts/episodic_return"
        whole, last, number = (
            f"{mean_of(runs, metric, share)}, healthy {mean_of(healthy, metric, share)}"
            for metric, share in ((returns, 0.0), (returns, 0.9), (case.number, 0.0))
        )
        flags, usual = case.command, CASES[case.healthy].command
        flags = f"`{flags.removeprefix(usual).strip()}`"
        if not case.command.startswith(usual):
            flags = "no `--ent-coef`"
        lines.append([f"[{name}](#{name})", flags, whole, last])
        lines[-1].append(f"`{case.number}`: {number}")
    return markdown_table([*heads, ":logged value that gives it away"], lines)


def main() -> None:
    args = tyro.cli(Args)
    check_names("--only", args.only, CASES)
    if args.ranges:
        folder = args.results / "pitfalls" if args.results else RESULTS / "pitfalls"
        print(ranges(folder), outcomes(folder), sep="\n\n")
        return
    names = args.only or tuple(CASES)
    jobs: dict[str, Callable[[int], list[dict]]] = {}
    if args.rlhf_runs:
        for path in sorted(args.rlhf_runs.glob("reviews-*-default/metrics.csv")):
            seed = path.parent.name.split("-")[1]
            jobs[f"rlhf__{seed}.csv"] = lambda _, path=path: rounded(read(path))
    for seed in SEEDS:
        for name in dict.fromkeys((*(CASES[n].healthy or n for n in names), *names)):
            jobs[f"{name}__{seed}.csv"] = partial(train, name, seed)
    for file, measure in jobs.items():
        run_jobs([Job((), measure)], args.path(f"pitfalls/{file}"), ())
    for name in names:
        if CASES[name].healthy:
            draw(name, args.path("pitfalls"))


if __name__ == "__main__":
    main()
