"""Print the tables and draw the curves of README from the committed results.

    python benchmarks/report.py                          # Markdown, from results/runs.csv
    python benchmarks/report.py --curves CartPole-v1     # also results/CartPole-v1.svg
    python benchmarks/report.py --table continuous.csv   # MuJoCo, beside the published figures

The interquartile mean (IQM) leaves out the lowest and the highest quarter of the seeds; its
interval is the middle 95 % of the IQMs of 20,000 resamplings of the seeds with replacement, as
Agarwal et al. 2021 ("Deep RL at the Edge of the Statistical Precipice", rliable) propose. Five
seeds make such an interval wide, and it cannot reach beyond the seeds seen.
"""

import csv
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

RESULTS = Path(__file__).parent / "results"
# The best published PPO at 1M steps, of versions v2 to v4: T Tianshou (v3, 10 seeds, the maximum
# over training), B Baselines (v2, 6 seeds, rerun by Huang et al.), C CleanRL (v4, 3 seeds).
PUBLISHED = {
    "HalfCheetah-v5": "5,784 ± 1,244 T",
    "Hopper-v5": "2,609 ± 701 T",
    "Walker2d-v5": "3,588 ± 757 T",
    "Ant-v5": "3,258 ± 1,079 T",
    "Humanoid-v5": "787 ± 194 T",
    "Swimmer-v5": "111 B",
    "Reacher-v5": "-4.1 ± 0.3 T",
    "Pusher-v5": "-40.4 ± 7.2 C",
    "InvertedPendulum-v5": "1,000 ± 0 T",
    "InvertedDoublePendulum-v5": "9,231 ± 270 T",
}


@dataclass
class Args:
    """Report the results."""

    table: str = "runs.csv"  # the table's file in benchmarks/results/
    curves: tuple[str, ...] = ()  # environments whose learning curves are drawn, a panel each
    script: str = "ppo_discrete.py"  # the script whose curves are drawn
    configs: tuple[str, ...] = ("default",)  # and its configurations, a colour each
    figure: str = ""  # the figure's name, by default the first environment's


def iqm(scores: np.ndarray) -> np.ndarray:
    """Return the mean over the last axis without the lowest and the highest quarter."""
    scores = np.sort(scores, axis=-1)
    cut = scores.shape[-1] // 4
    return scores[..., cut : scores.shape[-1] - cut].mean(-1)


def interval(scores: np.ndarray, resamplings: int = 20_000) -> tuple[float, float]:
    """Return the bootstrap 95 % interval of the IQM of scores (seeds,)."""
    choice = np.random.default_rng(0).integers(len(scores), size=(resamplings, len(scores)))
    low, high = np.quantile(iqm(scores[choice]), [0.025, 0.975])
    return low, high


def markdown(table: Path) -> str:
    """Return a row for every environment and configuration, over its seeds."""
    groups = defaultdict(list)
    with open(table) as file:
        for row in csv.DictReader(file):
            groups[row["env_id"], row["config"]].append(row)
    published = PUBLISHED if any(env_id in PUBLISHED for env_id, _ in groups) else {}
    lines = [
        "| environment | configuration | steps | seeds | deterministic: mean ± std | IQM [95 %] "
        "| lowest seed | stochastic |" + (" published |" if published else ""),
        "|---|---|---:|---:|---:|---:|---:|---:|" + ("---:|" if published else ""),
    ]
    for (env_id, config), rows in groups.items():
        x = np.array([float(row["eval_mean"]) for row in rows])
        stochastic = np.mean([float(row["eval_stochastic_mean"]) for row in rows])
        steps = np.mean([int(row["global_step"]) for row in rows])
        low, high = interval(x)
        lines.append(
            f"| {env_id} | {config} | {steps:,.0f} | {len(rows)} "
            f"| {x.mean():,.1f} ± {x.std():,.1f} | {iqm(x):,.1f} [{low:,.1f}, {high:,.1f}] "
            f"| {x.min():,.1f} | {stochastic:,.1f} |"
            + (f" {published.get(env_id, '-')} |" if published else "")
        )
    return "\n".join(lines)


def seeds_on_a_grid(args: Args, env_id: str, config: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps (200,) and the learning curves of all seeds at them (seeds, 200)."""
    pattern = f"{Path(args.script).stem}__{env_id}__{config}__*.csv".replace("/", "-")
    paths = sorted((RESULTS / "curves").glob(pattern))
    curves = [np.loadtxt(path, delimiter=",", skiprows=1) for path in paths]
    grid = np.linspace(0, min(curve[-1, 0] for curve in curves), 200)
    return grid, np.array([np.interp(grid, curve[:, 0], curve[:, 1]) for curve in curves])


def draw(args: Args) -> Path:
    """Draw a panel for each environment: every seed's curve, thin, and their median, thick."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "same file every time"
    colours = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777"]
    columns = min(5, len(args.curves))
    rows = -(-len(args.curves) // columns)
    size = (7, 3.2) if len(args.curves) < 3 else (2.6 * columns, 2.3 * rows)
    figure, panels = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes, env_id in zip(panels.flat, args.curves):
        for colour, config in zip(colours, args.configs):
            grid, seeds = seeds_on_a_grid(args, env_id, config)
            axes.plot(grid, seeds.T, color=colour, alpha=0.3 / len(args.configs), linewidth=0.8)
            axes.plot(grid, np.median(seeds, axis=0), color=colour, linewidth=2, label=config)
        axes.set_title(env_id)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:.0f}k")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.supxlabel("environment steps", fontsize="medium")
    figure.supylabel("return while training", fontsize="medium")
    if len(args.configs) > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    path = RESULTS / f"{args.figure or args.curves[0].replace('/', '-')}.svg"
    # A white ground keeps the axes readable on a dark page.
    figure.savefig(path, facecolor="white", metadata={"Date": None})
    return path


def main() -> None:
    args = tyro.cli(Args)
    print(markdown(RESULTS / args.table))
    if args.curves:
        print(f"drawn: {draw(args)}")


if __name__ == "__main__":
    main()
