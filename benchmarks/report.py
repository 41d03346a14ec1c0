"""Print the tables and draw the curves of README from the committed results.

python benchmarks/report.py             # Markdown, from benchmarks/results/runs.csv
python benchmarks/report.py --curves CartPole-v1    # also benchmarks/results/CartPole-v1.svg
"""

import csv
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

RESULTS = Path(__file__).parent / "results"


@dataclass
class Args:
    """Report the results."""

    table: str = "runs.csv"  # the table's file in benchmarks/results/
    curves: tuple[str, ...] = ()  # environments whose learning curves are drawn
    script: str = "ppo_discrete.py"  # the script whose curves are drawn
    config: str = "default"  # and its configuration


def markdown(table: Path) -> str:
    """Return a row for every environment and configuration, over its seeds."""
    groups = defaultdict(list)
    with open(table) as file:
        for row in csv.DictReader(file):
            groups[row["env_id"], row["config"]].append(row)
    lines = [
        "| environment | configuration | steps | seeds | deterministic: mean ± std | lowest seed "
        "| stochastic |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for (env_id, config), rows in groups.items():
        x = np.array([float(row["eval_mean"]) for row in rows])
        stochastic = np.mean([float(row["eval_stochastic_mean"]) for row in rows])
        steps = np.mean([int(row["global_step"]) for row in rows])
        lines.append(
            f"| {env_id} | {config} | {steps:,.0f} | {len(rows)} | {x.mean():.1f} ± {x.std():.1f} "
            f"| {x.min():.1f} | {stochastic:.1f} |"
        )
    return "\n".join(lines)


def draw(args: Args, env_id: str) -> Path:
    """Draw every seed's learning curve, thin, and their median, thick."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "same file every time"
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    pattern = f"{Path(args.script).stem}__{env_id}__{args.config}__*.csv".replace("/", "-")
    curves = [
        np.loadtxt(path, delimiter=",", skiprows=1)
        for path in sorted((RESULTS / "curves").glob(pattern))
    ]
    grid = np.linspace(0, min(curve[-1, 0] for curve in curves), 200)
    seeds = np.array([np.interp(grid, curve[:, 0], curve[:, 1]) for curve in curves])
    for seed in seeds:
        axes.plot(grid, seed, color="#4477aa", alpha=0.3, linewidth=0.8)
    axes.plot(grid, np.median(seeds, axis=0), color="#4477aa", linewidth=2.2)
    axes.set(xlabel="environment steps", ylabel="return while training", title=env_id)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:.0f}k")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    path = RESULTS / f"{env_id.replace('/', '-')}.svg"
    # A white ground keeps the axes readable on a dark page.
    figure.savefig(path, facecolor="white", metadata={"Date": None})
    return path


def main() -> None:
    args = tyro.cli(Args)
    print(markdown(RESULTS / args.table))
    for env_id in args.curves:
        print(f"drawn: {draw(args, env_id)}")


if __name__ == "__main__":
    main()
