"""Draw the figures of the pages from the committed results.

    python -m benchmarks.figures --curves CartPole-v1        # learning curves, one panel each
    python -m benchmarks.figures --table classic.csv --name classic --curves CartPole-v1 Acrobot-v1
    python -m benchmarks.figures --table details.csv         # the effect of each change

A figure is written beside its table. benchmarks.rlhf and benchmarks.pitfalls also draw theirs with
these functions.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.jobs import RESULTS, read
from benchmarks.tables import scores_of_changes, significance

BLUE, RED = "#4477aa", "#cc3344"
COLOURS = (BLUE, "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777")


@dataclass
class Args:
    """Draw a figure of results."""

    table: str = "runs.csv"  # the table's file in the folder of results
    curves: tuple[str, ...] = ()  # environments whose learning curves are drawn, one panel each
    script: str = "ppo_discrete.py"  # the script whose curves are drawn
    configs: tuple[str, ...] = ("default",)  # and its configurations, one colour each
    name: str = ""  # of the figure; by default the first environment's, or the table's
    results: Path = RESULTS  # folder of the tables; your own are in benchmarks/results/own


def new_figure(*panels: int, **kwargs: Any) -> tuple:
    """Return a figure, which is saved as the same file every time, and its panels."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "same file every time"
    return plt.subplots(*panels, layout="constrained", **kwargs)


def save(figure: Any, path: Path) -> None:
    """Write a figure."""
    # A white background keeps the axes readable on a dark page.
    figure.savefig(path, facecolor="white", metadata={"Date": None})
    print(f"drawn: {path}")


def thousands(x: float) -> str:
    """Return a number of steps as an axis shows it: 0, 500k, 1M."""
    return f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k" if x else "0"


def tidy(axes: Any, title: str, **grid: str) -> None:
    """Give axes a title and a faint grid, and no frame."""
    axes.set_title(title, fontsize="medium" if len(title) < 24 else "small")  # or it is cut off
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, **grid)


def curves_of(args: Args, env_id: str) -> dict[str, tuple[str, str]]:
    """Return what is drawn for an environment: script and configuration of each label.

    Where peers were run on it, too, that is ours and theirs.
    """
    rows = read(args.results / args.table)
    pairs = {row["script"]: row["config"] for row in rows if row["env_id"] == env_id}
    if len(pairs) < 2:
        return {config: (args.script, config) for config in args.configs}
    return {"ours" if pair[0].startswith("ppo_") else pair[0]: pair for pair in pairs.items()}


def seeds_on_a_grid(
    args: Args, env_id: str, script: str, config: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return steps (200,) and the learning curves of all seeds at them (seeds, 200)."""
    pattern = f"{Path(script).stem}__{env_id}__{config}__*.csv".replace("/", "-")
    paths = sorted(args.results.glob(f"curves/{pattern}"))
    if not paths:
        sys.exit(f"there is no curve of {script} on {env_id}, configuration {config}")
    curves = [np.loadtxt(path, delimiter=",", skiprows=1) for path in paths]
    grid = np.linspace(0, min(curve[-1, 0] for curve in curves), 200)
    return grid, np.array([np.interp(grid, curve[:, 0], curve[:, 1]) for curve in curves])


def draw_curves(args: Args) -> None:
    """Draw a panel for each environment: every seed's curve, thin, and their median, thick."""
    columns = min(5, len(args.curves))
    rows = -(-len(args.curves) // columns)
    size = (7, 3.2) if len(args.curves) < 3 else (2.1 * columns, 1.9 * rows)
    figure, panels = new_figure(rows, columns, figsize=size, squeeze=False)
    for axes, env_id in zip(panels.flat, args.curves):
        labels = curves_of(args, env_id)
        for colour, (label, (script, config)) in zip(COLOURS, labels.items()):
            grid, seeds = seeds_on_a_grid(args, env_id, script, config)
            axes.plot(grid, seeds.T, color=colour, alpha=0.3 / len(labels), linewidth=0.8)
            axes.plot(grid, np.median(seeds, axis=0), color=colour, linewidth=2, label=label)
        axes.xaxis.set_major_formatter(lambda x, _: thousands(x))
        tidy(axes, env_id)
    figure.supxlabel("environment steps", fontsize="medium")
    figure.supylabel("return while training", fontsize="medium")
    if len(labels) > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    save(figure, args.results / f"{args.name or args.curves[0]}.svg".replace("/", "-"))


def draw_changes(args: Args) -> None:
    """Draw, for each task, every change's seeds and their mean, red where it differs."""
    name = Path(args.table).stem
    scores = scores_of_changes(read(args.results / args.table), name)
    env_ids = list(dict.fromkeys(env_id for tasks in scores.values() for env_id in tasks))
    size = (2 * len(env_ids) + 0.075 * max(map(len, scores)), 0.26 * len(scores) + 1)
    figure, panels = new_figure(1, len(env_ids), figsize=size, sharey=True, squeeze=False)
    for axes, env_id in zip(panels.flat, env_ids):
        default = scores["default"][env_id]
        for y, tasks in enumerate(scores.values()):
            if env_id in tasks:
                x = tasks[env_id]
                colour = RED if significance(x, default) else BLUE
                axes.plot(x, np.full(len(x), y), "o", color=colour, markersize=4, alpha=0.4)
                axes.plot(x.mean(), y, "|", color=colour, markersize=11, markeredgewidth=2)
        axes.axvline(default.mean(), color="black", linewidth=0.6)
        axes.xaxis.set_major_formatter(lambda x, _: thousands(x) if abs(x) >= 1e3 else f"{x:g}")
        axes.set_xlabel("final return")
        tidy(axes, env_id, axis="x")
    axes.set_yticks(range(len(scores)), list(scores))
    axes.set_ylim(len(scores) - 0.5, -0.5)
    save(figure, args.results / f"{args.name or name}.svg")


def draw_rlhf(rows: list[dict[str, str]], path: Path) -> None:
    """Draw gold and proxy against the KL from the reference, one point per beta."""
    rows = sorted(rows, key=lambda row: -float(row["kl_coef"]))
    kl = [0.0] + [float(row["kl"]) for row in rows]
    gold = [float(rows[0]["sft_gold"])] + [float(row["gold"]) for row in rows]
    proxy = [0.0] + [float(row["proxy"]) for row in rows]
    figure, left = new_figure(figsize=(7, 4.2))
    right = left.twinx()
    left.plot(kl, gold, "o-", color="#1f6f8b", label="gold: what the reviews are worth (left)")
    right.plot(kl, proxy, "s--", color="#d1495b", label="proxy: the reward model's score (right)")
    names = ["SFT"] + [f"β {float(row['kl_coef']):g}" for row in rows]
    style = {"textcoords": "offset points", "fontsize": 8, "ha": "center"}
    clear = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}
    for name, x, y in zip(names, kl, gold):
        left.annotate(name, (x, y), (0, 9), **style, bbox=clear)
    left.set_xscale("symlog", linthresh=1.0)
    left.set_xticks([0, 0.5, 1, 2, 5, 10, 20, 50, 100], "0 0.5 1 2 5 10 20 50 100".split())
    left.set_xlim(-0.1, 1.5 * max(kl))
    left.set_ylim(-0.03, 1.1)
    left.set_xlabel("KL(policy, reference), nats an answer")
    left.set_ylabel("gold")
    right.set_ylabel("proxy")
    left.set_title("Less KL penalty buys more proxy, and then nothing real")
    handles = left.get_lines() + right.get_lines()
    left.legend(handles=handles, loc="lower center", fontsize=8, frameon=False)
    for axes in (left, right):
        axes.spines["top"].set_visible(False)
    save(figure, path)


def draw_pitfall(
    runs: dict[str, list[dict[str, np.ndarray]]],
    number: str,
    is_log: bool,
    path: Path,
) -> None:
    """Draw returns and the telling logged number for the runs of each label, one colour each."""
    import matplotlib

    matplotlib.rcParams["svg.fonttype"] = "none"
    figure, panels = new_figure(1, 2, figsize=(7.5, 2.9))
    for axes, metric in zip(panels, ("charts/episodic_return", number)):
        for colour, (label, group) in zip((BLUE, RED), runs.items()):
            for i, run in enumerate(group):
                known = ~np.isnan(run[metric])
                steps, values = run["global_step"][known], run[metric][known]
                mark = label if i == 0 else None
                axes.plot(steps, values, color=colour, linewidth=1.1, alpha=0.8, label=mark)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:.0f}k")
        tidy(axes, metric)
    if is_log:
        panels[1].set_yscale("log")
    labels = panels[0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside upper center", ncols=2, frameon=False)
    figure.supxlabel("environment steps", fontsize="medium")
    save(figure, path)


def main(words: Sequence[str] | None = None) -> None:
    args = tyro.cli(Args, args=words)
    if args.curves:
        draw_curves(args)
    elif Path(args.table).stem in ("ablation", "details"):
        draw_changes(args)
    else:
        sys.exit("name the environments of --curves, or --table details.csv or ablation.csv")


if __name__ == "__main__":
    main()
