"""Reproduce the pitfalls of docs/en/debugging.md, each beside healthy runs, and measure the ranges.

    python benchmarks/gallery.py                       # run what is missing, then draw everything
    python benchmarks/gallery.py --only lr-high --draw # one case; --draw alone runs nothing
    python benchmarks/gallery.py --ranges              # print the tables of the page

A run is one process of a script with the flags of its case. Every number that it logged goes to
benchmarks/results/gallery/, a line an iteration, and the figures are drawn from there alone. Runs
whose file stands already are not repeated.
"""

import csv
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]

from run import check_names, python  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "gallery"
CARTPOLE = "ppo_discrete.py --env-id CartPole-v1"
LAKE = "ppo_discrete.py --env-id FrozenLake-v1 --env-kwargs is_slippery=false"
PENDULUM = "ppo_continuous.py --env-id Pendulum-v1 --total-timesteps 150000 --gamma 0.9"
PENDULUM += " --learning-rate 1e-3 --activation relu"


@dataclass(frozen=True)
class Case:
    """A command, the healthy case it is drawn beside, and the logged number that tells."""

    command: str  # of the script, with the flags that differ from the healthy case at the end
    healthy: str  # the name of the healthy case, "" if it is one
    number: str = "losses/approx_kl"  # the second panel
    seeds: int = 3
    log: bool = False  # whether the second panel's axis is logarithmic


CASES = {
    "cartpole": Case(CARTPOLE, "", seeds=5),
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
    "lake": Case(f"{LAKE} --ent-coef 0.05", "", seeds=5),
    "entropy-low": Case(LAKE, "lake", "losses/entropy", seeds=5),
    "pendulum": Case(PENDULUM, ""),
    "no-normalisation": Case(
        f"{PENDULUM} --no-norm-obs --no-norm-reward", "pendulum", "losses/value_loss", log=True
    ),
    "no-advantage-normalisation": Case(
        f"{LAKE} --ent-coef 0.05 --norm-adv none", "lake", "losses/entropy"
    ),
}
HEALTHY = [name for name, case in CASES.items() if not case.healthy]


@dataclass
class Args:
    """Run, draw and measure the gallery."""

    only: tuple[str, ...] = ()  # cases to run or draw, by default all
    draw: bool = False  # run nothing
    ranges: bool = False  # print the healthy ranges and the outcomes as Markdown, run nothing
    # Take over the logged numbers of finished RLHF runs (benchmarks/rlhf.py) from this folder.
    rlhf_runs: Path | None = None


def path(name: str, seed: int) -> Path:
    return RESULTS / f"{name}__{seed}.csv"


def keep(metrics: Path, target: Path) -> None:
    """Copy a run's metrics.csv, rounded to five digits."""
    with open(metrics) as file:
        header, *rows = csv.reader(file)
    rows = [[row[0], *(f"{float(x):.5g}" for x in row[1:])] for row in rows]
    RESULTS.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    with open(temporary, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    os.replace(temporary, target)


def run(name: str, seed: int) -> None:
    """Make the run's file, unless it stands."""
    if path(name, seed).exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        script, *flags = CASES[name].command.split()
        flags += [f"--seed={seed}", f"--run-dir={folder}/run", "--eval-episodes=1"]
        python(ROOT / script, *flags)
        keep(Path(folder, "run", "metrics.csv"), path(name, seed))
    print(f"{name} seed {seed}", flush=True)


def load(name: str) -> list[dict[str, np.ndarray]]:
    """Return the committed runs of a case, each a column of numbers a metric."""
    runs = []
    for file_name in sorted(RESULTS.glob(f"{name}__*.csv")):
        with open(file_name) as file:
            header, *rows = csv.reader(file)
        runs.append(dict(zip(header, np.array(rows, dtype=float).T)))
    return runs


def draw(name: str) -> Path:
    """Draw returns and the telling number, the healthy runs in blue and the case in red."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams |= {"svg.hashsalt": "same file every time", "svg.fonttype": "none"}
    case = CASES[name]
    figure, panels = plt.subplots(1, 2, figsize=(7.5, 2.7), layout="constrained")
    for axes, number in zip(panels, ("charts/episodic_return", case.number)):
        for colour, which in (("#4477aa", case.healthy), ("#cc3344", name)):
            for i, run in enumerate(load(which)):
                known = ~np.isnan(run[number])
                steps, values = run["global_step"][known], run[number][known]
                label = ("healthy" if which == case.healthy else name) if i == 0 else None
                axes.plot(steps, values, color=colour, linewidth=1.1, alpha=0.8, label=label)
        axes.set_title(number, fontsize="medium")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:.0f}k")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    if case.log:
        panels[1].set_yscale("log")
    panels[0].legend(frameon=False, fontsize="small")
    figure.supxlabel("environment steps", fontsize="medium")
    target = RESULTS / f"{name}.svg"
    # A white ground keeps the axes readable on a dark page.
    figure.savefig(target, facecolor="white", metadata={"Date": None})
    plt.close(figure)
    return target


def number(x: float) -> str:
    """Return two digits or more, without an exponent where a person would write none."""
    if 0 < abs(x) < 1e-4:
        return f"{x:.0e}"
    return f"{x:,.0f}" if abs(x) >= 100 else f"{float(f'{x:.2g}'):g}"


def ranges() -> str:
    """Return a row a logged number: 5 to 95 % of all iterations of each script's healthy runs."""
    columns = {
        "ppo_discrete.py": [*load("cartpole"), *load("lake")],
        "ppo_continuous.py": load("pendulum"),
        "ppo_rlhf_toy.py": load("rlhf"),
    }
    names = list(dict.fromkeys(x for runs in columns.values() for run in runs for x in run))
    lines = [f"| number | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name in names:
        if not name.startswith(("losses/", "objective/")) or name == "losses/kl_coef":
            continue
        cells = []
        for runs in columns.values():
            values = np.concatenate([run[name] for run in runs if name in run] or [np.zeros(0)])
            values = values[np.isfinite(values)]
            low, high = np.quantile(values, (0.05, 0.95)) if len(values) else (np.nan, np.nan)
            cells.append(f"{number(low)} to {number(high)}" if len(values) else "-")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def outcomes() -> str:
    """Return a row a case: returns over the run and its last tenth, the number over the run."""
    lines = [
        "| case | flags | seeds | return, whole run | return, last tenth | the number that tells |",
        "|---|---|---:|---:|---:|---|",
    ]
    for name, case in CASES.items():
        if not case.healthy:
            continue
        cells = []
        for metric, share in (
            ("charts/episodic_return", 0.0),
            ("charts/episodic_return", 0.9),
            (case.number, 0.0),
        ):
            pair = []
            for which in (name, case.healthy):
                means = []
                for run in load(which):
                    # Where no episode ended the last return known still stands.
                    steps, values = run["global_step"], run[metric]
                    known = ~np.isnan(values)
                    values = np.interp(steps, steps[known], values[known])
                    means.append(values[steps > share * steps[-1]].mean())
                pair.append(number(float(np.mean(means))))
            cells.append(f"{pair[0]}, healthy {pair[1]}")
        flags = case.command.removeprefix(CASES[case.healthy].command).strip()
        if not case.command.startswith(CASES[case.healthy].command):
            flags = "no `--ent-coef`"
        lines.append(
            f"| [{name}](#{name}) | {f'`{flags}`' if '`' not in flags else flags} "
            f"| {len(load(name))} | {cells[0]} | {cells[1]} | `{case.number}`: {cells[2]} |"
        )
    return "\n".join(lines)


def main() -> None:
    args = tyro.cli(Args)
    check_names("--only", args.only, CASES)
    if args.ranges:
        print(ranges(), outcomes(), sep="\n\n")
        return
    if args.rlhf_runs:
        for seed in range(1, 100):
            metrics = args.rlhf_runs / f"reviews-{seed}-default" / "metrics.csv"
            if metrics.exists():
                keep(metrics, path("rlhf", seed))
    names = args.only or tuple(CASES)
    if not args.draw:
        for seed in range(1, 6):
            for name in dict.fromkeys((*(CASES[n].healthy or n for n in names), *names)):
                if seed <= CASES[name].seeds:
                    run(name, seed)
    for name in names:
        if CASES[name].healthy and load(name):
            print(f"drawn: {draw(name)}")


if __name__ == "__main__":
    main()
