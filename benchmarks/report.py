"""Print the tables and draw the figures of the pages from the committed results.

    python benchmarks/report.py                          # Markdown, from results/runs.csv
    python benchmarks/report.py --curves CartPole-v1     # also results/CartPole-v1.svg
    python benchmarks/report.py --table continuous.csv   # MuJoCo, beside the published figures
    python benchmarks/report.py --table details.csv --figure details
    python benchmarks/report.py --pages README.md        # bring the tables of a page up to date

In a page, a table stands between two comments, of which the first is the command that prints it:

    <!-- python benchmarks/report.py --table runs.csv -->
    ...
    <!-- end -->

The interquartile mean (IQM) leaves out the lowest and the highest quarter of the seeds; its
interval is the middle 95 % of the IQMs of 20,000 resamplings of the seeds with replacement, as
Agarwal et al. 2021 ("Deep RL at the Edge of the Statistical Precipice") propose. Their rliable
gives the same numbers, but its 1.2.0 cannot be imported beside pandas 3, hence SciPy. The interval
cannot reach beyond the seeds seen, so with few of them it is too narrow: of normal scores it holds
the truth in 94 % of cases with 10 seeds, 89 % with 5, 76 % with 3. A difference between two
configurations is therefore judged by Welch's t interval instead.
"""

import json
import re
import shlex
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from scipy.stats import bootstrap, trim_mean, ttest_ind

sys.path[:0] = [str(Path(__file__).parent)]

import ablation  # noqa: E402
from details import CHANGES, TASKS  # noqa: E402
from run import check_names, read  # noqa: E402

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
# B as above after 500k steps, Z rl-baselines3-zoo: one run, tuned for the task.
CLASSIC = {
    "CartPole-v1": "497.5 ± 4.0 B, 500 Z (100k)",
    "Acrobot-v1": "-81.8 ± 5.6 B, -73.5 Z (1M)",
    "MountainCar-v0": "-200 B, -110.4 Z (1M)",
    "LunarLander-v3": "242.1 Z (1M)",
    "Pendulum-v1": "-172.2 Z (100k)",
}


@dataclass
class Args:
    """Report the results."""

    table: str = "runs.csv"  # the table's file in benchmarks/results/
    curves: tuple[str, ...] = ()  # environments whose learning curves are drawn, a panel each
    script: str = "ppo_discrete.py"  # the script whose curves are drawn
    configs: tuple[str, ...] = ("default",)  # and its configurations, a colour each
    figure: str = ""  # the figure's name, by default the first environment's
    work: str = "cart-pole"  # of speed.csv: cart-pole, half-cheetah, pong or solve
    threads: int = 1  # of speed.csv
    part: str = "environments"  # of scaling.csv or keeping.csv; of rlhf.csv: reviews, arithmetic
    pages: tuple[Path, ...] = ()  # pages whose tables are brought up to date, instead of printing


def iqm(scores: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the mean over an axis without the lowest and the highest quarter."""
    return trim_mean(scores, 0.25, axis=axis)


def interval(scores: np.ndarray, resamplings: int = 20_000) -> tuple[float, float]:
    """Return the bootstrap 95 % interval of the IQM of scores (seeds,)."""
    if len(scores) == 1:
        return scores[0], scores[0]
    drawn = bootstrap((scores,), iqm, n_resamples=resamplings, method="percentile", rng=0)
    low, high = drawn.confidence_interval
    return low, high


def rows_of(lines: list[str], heads: list[str]) -> str:
    """Return a Markdown table; heads that begin with ":" are of text, the others of numbers."""
    rule = "|".join("---" if head.startswith(":") else "---:" for head in heads)
    titles = " | ".join(head.lstrip(":") for head in heads)
    return "\n".join([f"| {titles} |", f"|{rule}|", *lines])


def lines_of(args: Args) -> list[dict]:
    """Return the table's lines; those of the ablation and of the details in the order of these."""
    rows = read(RESULTS / args.table)
    if not rows:
        sys.exit(f"--table {args.table}: benchmarks/results/ has no such table")
    if Path(args.table).stem == "ablation":
        rows.sort(key=lambda row: [*ablation.LINES, *ablation.FORMER].index(row["config"]))
    elif Path(args.table).stem == "details":
        names = [change.name for change in CHANGES]
        env_ids = [env_id for tasks in TASKS.values() for env_id, _ in tasks]
        rows.sort(key=lambda row: (names.index(row["config"]), env_ids.index(row["env_id"])))
    return rows


def markdown(args: Args) -> str:
    """Return the table that `args` ask for, of the form that its columns call for."""
    rows = lines_of(args)
    if "part" in rows[0]:
        text = scaling(rows, args.part)
    elif Path(args.table).stem == "rlhf_details":
        text = rlhf_details(rows)
    elif "task" in rows[0]:
        text = rlhf(rows, args.part)
    elif "contender" in rows[0]:
        rows = [r for r in rows if (r["work"], r["threads"]) == (args.work, str(args.threads))]
        if not any(row["contender"].startswith("ppo_") for row in rows):
            sys.exit(f"{args.table} has no line of ours for --work {args.work}")
        text = solved(rows) if args.work == "solve" else speed(rows)
    elif Path(args.table).stem in ("details", "ablation"):
        text = details(rows)
    else:
        text = seeds(rows)
    note = "*A quick pass, fewer seeds, rounds and steps: not for quoting.*\n\n"
    return (note if args.table.startswith("quick/") else "") + text


def seeds(rows: list[dict]) -> str:
    """Return a line for every environment and configuration, over its seeds."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["env_id"], row["script"], row["config"]].append(row)
    several = len({script for _, script, _ in groups}) > 1
    published = PUBLISHED | (CLASSIC if several else {})  # where peers were run on them, too
    compared = any(env_id in published for env_id, _, _ in groups)
    lines = []
    for (env_id, script, config), group in groups.items():
        x = np.array([float(row["eval_mean"]) for row in group])
        stochastic = np.mean([float(row["eval_stochastic_mean"]) for row in group])
        steps = np.mean([int(row["global_step"]) for row in group])
        low, high = interval(x)
        lines.append(
            f"| {env_id} |"
            + (f" {script} |" if several else "")
            + f" {config} | {steps:,.0f} | {len(group)} "
            f"| {x.mean():,.1f} ± {x.std():,.1f} | {iqm(x):,.1f} [{low:,.1f}, {high:,.1f}] "
            f"| {x.min():,.1f} | {stochastic:,.1f} |"
            + (f" {published.get(env_id, '-')} |" if compared else "")
        )
    heads = [":environment", *([":script"] if several else []), ":configuration", "steps", "seeds"]
    heads += ["deterministic: mean ± std", "IQM [95 %]", "lowest seed", "stochastic"]
    return rows_of(lines, heads + (["published"] if compared else []))


def by_contender(rows: list[dict]) -> dict[str, list[dict]]:
    groups = defaultdict(list)
    for row in rows:
        groups[row["contender"]].append(row)
    return groups


def versions(group: list[dict]) -> str:
    """Return the versions that a contender was measured in, by all of its lines."""
    return "; ".join(dict.fromkeys(row["versions"] for row in group))


def spread(values: list[float], form: str) -> str:
    return f"{np.median(values):{form}} | {min(values):{form}} - {max(values):{form}}"


def speed(rows: list[dict]) -> str:
    """Return steps per second and memory of each contender, and how far ours is ahead."""
    groups = by_contender(rows)
    rates = {
        name: {r["round"]: float(r["steps_per_second"]) for r in g} for name, g in groups.items()
    }
    base = rates[next(name for name in rates if name.startswith("ppo_"))]
    lines = []
    for name, group in groups.items():
        x = rates[name]
        ratio = np.median([base[number] / x[number] for number in x if number in base])
        memory = np.median([float(row["peak_mb"]) for row in group])
        lines.append(
            f"| {name} | {versions(group)} | {spread([*x.values()], ',.0f')} "
            f"| {ratio:.2f}x | {memory:,.0f} | {group[0]['remark']} |"
        )
    heads = [":", ":version", "steps/s, median", "lowest - highest"]
    heads += ["our steps/s over theirs, median of the rounds", "peak memory, MB", ":not the same"]
    return rows_of(lines, heads) + "\n\n" + wording(rows[0])


def solved(rows: list[dict]) -> str:
    """Return the seconds from process start to a solved CartPole of each contender."""
    lines = []
    for name, group in by_contender(rows).items():
        good = [row for row in group if row["solved_seconds"]]
        seconds = [float(row["solved_seconds"]) for row in good]
        times = spread(seconds, ".1f") if good else "never | -"
        count = np.median([int(row["rows"]) for row in good or group])
        memory = np.median([float(row["peak_mb"]) for row in group])
        lines.append(
            f"| {name} | {versions(group)} | {len(good)} of {len(group)} | {times} "
            f"| {count:,.0f} | {memory:,.0f} | {group[0]['remark']} |"
        )
    heads = [":", ":version", "solved", "seconds, median", "lowest - highest", "rows, median"]
    heads += ["peak memory, MB", ":not the same"]
    other = [g[0] for g in by_contender(rows).values() if g[0]["settings"] != rows[0]["settings"]]
    notes = [wording(rows[0]), *(f"{row['contender']}: {wording(row)}" for row in other)]
    return "\n\n".join([rows_of(lines, heads), *notes])


def wording(row: dict) -> str:
    """Return the settings of a line of speed.csv in words."""
    s = json.loads(row["settings"])
    network = "Nature's CNN" if s["env_id"].startswith("ALE/") else f"{s['activation']} 64-64"
    normalised = ", observations and rewards normalised" if s["normalise"] else ""
    return (
        f"{s['env_id']}, {s['num_envs']} environment{'s' * (s['num_envs'] > 1)} x "
        f"{s['num_steps']} steps, "
        f"{s['update_epochs']} epochs x {s['num_minibatches']} minibatches, {network}, "
        f"learning rate {s['learning_rate']:g} falling to 0, gamma {s['gamma']:g}, lambda "
        f"{s['gae_lambda']:g}, clip {s['clip_coef']:g}{' falling to 0' * s['anneal_clip']}, "
        f"entropy {s['ent_coef']:g}, "
        f"value loss {'' if s['clip_vloss'] else 'not '}clipped{normalised}; {s['threads']} "
        f"{'thread' if s['threads'] == 1 else 'threads'}, {s['total_timesteps']:,} rows a run."
    )


def scaling(rows: list[dict], part: str) -> str:
    """Return a part of scaling.csv: a line a case, a column a quantity, medians over rounds."""
    cells = defaultdict(list)
    check_names("--part", [part], (row["part"] for row in rows))
    for row in rows:
        if row["part"] == part:
            cells[row["case"], row["quantity"]].append(float(row["value"]))
    cases, quantities = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))

    def cell(case: str, quantity: str) -> str:
        if (case, quantity) not in cells:
            return "-"
        x = np.median(cells[case, quantity])
        return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"

    lines = [f"| {c} | {' | '.join(cell(c, q) for q in quantities)} |" for c in cases]
    return rows_of(lines, [":", *quantities])


def rlhf(rows: list[dict], task: str) -> str:
    """Return a line a run of the task: seeds at the default beta and, of reviews, without a KL."""
    betas_of = {"reviews": ("0.1", "0.0"), "arithmetic": ("0.1",)}
    check_names("--part", [task], betas_of)
    betas = betas_of[task]
    rows = [row for row in rows if row["task"] == task and row["kl_coef"] in betas]
    rows.sort(key=lambda row: (int(row["seed"]), -float(row["kl_coef"])))
    columns = {
        "reviews": {
            "rm_accuracy": "reward model, accuracy",
            "sft_gold": "gold, SFT",
            "gold": "gold, PPO",
            "grammatical": "grammatical",
            "proxy": "proxy",
            "kl": "KL, nats",
            "optimum_share": "share of the optimum",
        },
        "arithmetic": {
            "sft_accuracy": "sampled accuracy, SFT",
            "accuracy": "PPO",
            "sft_greedy_accuracy": "greedy accuracy, SFT",
            "greedy_accuracy": "PPO",
        },
    }[task]
    lines = []
    for row in rows:
        cells = [f"{float(row[c]):.3f}" if row[c] else "-" for c in columns]
        beta = f" {float(row['kl_coef']):g} |" if len(betas) > 1 else ""
        lines.append(f"| {row['seed']} |{beta} {' | '.join(cells)} |")
    return rows_of(lines, [":seed", *(["beta"] if len(betas) > 1 else []), *columns.values()])


def change_interval(x: np.ndarray, default: np.ndarray) -> tuple[float, float]:
    """Return Welch's 95 % interval of mean(x) - mean(default); without end for a single seed."""
    if min(len(x), len(default)) < 2:
        return -np.inf, np.inf
    if x.std() == default.std() == 0.0:
        return (x.mean() - default.mean(),) * 2
    low, high = ttest_ind(x, default, equal_var=False).confidence_interval()
    return low, high


def mark(x: np.ndarray, default: np.ndarray) -> str:
    """Return an arrow where the interval of the difference leaves 0 out."""
    low, high = change_interval(x, default)
    return " ▼" if high < 0.0 else " ▲" if low > 0.0 else ""


def rlhf_details(rows: list[dict]) -> str:
    """Return a line a change; a mark where the 95 % interval of its difference leaves 0 out."""
    columns = {
        "gold": "gold",
        "proxy": "proxy",
        "kl": "KL, nats",
        "length": "tokens",
        "optimum_share": "share of the optimum",
        "rm_correlation": "reward model, correlation with gold",
        "first_ratio_error": "first ratios, off 1 by",
    }
    scores: dict[str, dict[str, np.ndarray]] = {}
    for config in dict.fromkeys(row["config"] for row in rows):
        group = [row for row in rows if row["config"] == config]
        scores[config] = {c: np.array([float(r[c]) for r in group if r[c]]) for c in columns}

    def cell(config: str, column: str) -> str:
        x, default = scores[config][column], scores["default"][column]
        if not len(x):
            return "-"
        return f"{x.mean():.2f} ± {x.std():.2f}{mark(x, default)}"

    lines = [f"| {c} | {' | '.join(cell(c, name) for name in columns)} |" for c in scores]
    return rows_of(lines, [":", *columns.values()])


def differences(rows: list[dict]) -> dict[str, dict[str, np.ndarray]]:
    """Return, for each change of details.csv and each task, the scores of its seeds."""
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        scores[row["config"]][row["env_id"]].append(float(row["eval_mean"]))
    return {c: {e: np.array(x) for e, x in tasks.items()} for c, tasks in scores.items()}


def details(rows: list[dict]) -> str:
    """Return a line a change, a column a task; a mark where its 95 % interval leaves 0 out.

    Up to three seeds are shown each, more by their standard deviation.
    """
    scores = differences(rows)
    env_ids = list(dict.fromkeys(row["env_id"] for row in rows))

    def cell(config: str, env_id: str) -> str:
        if env_id not in scores[config]:
            return "-"
        x = scores[config][env_id]
        each = f"± {x.std():,.1f}"
        if len(x) <= 3:
            each = f"({', '.join(f'{score:,.0f}' for score in x)})"
        return f"{x.mean():,.1f} {each}{mark(x, scores['default'][env_id])}"

    lines = [f"| {c} | {' | '.join(cell(c, e) for e in env_ids)} |" for c in scores]
    return rows_of(lines, [":", *env_ids])


def draw_details(args: Args) -> Path:
    """Draw, for each task, every change's seeds and their mean, red where it differs."""
    plt = pyplot()
    rows = lines_of(args)
    scores = differences(rows)
    env_ids = list(dict.fromkeys(row["env_id"] for row in rows))
    size = (2.6 * len(env_ids) + 2.6, 0.26 * len(scores) + 1)
    figure, panels = plt.subplots(
        1, len(env_ids), figsize=size, sharey=True, layout="constrained", squeeze=False
    )
    for axes, env_id in zip(panels.flat, env_ids):
        default = scores["default"][env_id]
        for y, tasks in enumerate(scores.values()):
            if env_id in tasks:
                x = tasks[env_id]
                colour = "#cc3344" if mark(x, default) else "#4477aa"
                axes.plot(x, np.full(len(x), y), "o", color=colour, markersize=4, alpha=0.4)
                axes.plot(x.mean(), y, "|", color=colour, markersize=11, markeredgewidth=2)
        axes.axvline(default.mean(), color="black", linewidth=0.6)
        axes.xaxis.set_major_formatter(lambda x, _: thousands(x) if abs(x) >= 1e3 else f"{x:g}")
        axes.set_title(env_id, fontsize="medium")
        axes.grid(alpha=0.25, axis="x")
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_yticks(range(len(scores)), list(scores))
    axes.invert_yaxis()
    figure.supxlabel("return of the final policy", fontsize="medium")
    return save(figure, args, args.figure)


def drawn(args: Args, env_id: str) -> dict[str, tuple[str, str]]:
    """Return what is drawn of an environment: script and configuration of each label.

    Where peers were run on it, too, that is ours and theirs.
    """
    pairs = {row["script"]: row["config"] for row in lines_of(args) if row["env_id"] == env_id}
    if len(pairs) < 2:
        return {config: (args.script, config) for config in args.configs}
    return {"ours" if pair[0].startswith("ppo_") else pair[0]: pair for pair in pairs.items()}


def seeds_on_a_grid(
    args: Args, env_id: str, script: str, config: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return steps (200,) and the learning curves of all seeds at them (seeds, 200)."""
    pattern = f"{Path(script).stem}__{env_id}__{config}__*.csv".replace("/", "-")
    paths = sorted((RESULTS / args.table).parent.glob(f"curves/{pattern}"))
    if not paths:
        sys.exit(f"there is no curve of {script} on {env_id}, configuration {config}")
    curves = [np.loadtxt(path, delimiter=",", skiprows=1) for path in paths]
    grid = np.linspace(0, min(curve[-1, 0] for curve in curves), 200)
    return grid, np.array([np.interp(grid, curve[:, 0], curve[:, 1]) for curve in curves])


def draw(args: Args) -> Path:
    """Draw a panel for each environment: every seed's curve, thin, and their median, thick."""
    plt = pyplot()
    colours = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777"]
    columns = min(5, len(args.curves))
    rows = -(-len(args.curves) // columns)
    size = (7, 3.2) if len(args.curves) < 3 else (2.6 * columns, 2.3 * rows)
    figure, panels = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes, env_id in zip(panels.flat, args.curves):
        labels = drawn(args, env_id)
        for colour, (label, (script, config)) in zip(colours, labels.items()):
            grid, seeds = seeds_on_a_grid(args, env_id, script, config)
            axes.plot(grid, seeds.T, color=colour, alpha=0.3 / len(labels), linewidth=0.8)
            axes.plot(grid, np.median(seeds, axis=0), color=colour, linewidth=2, label=label)
        axes.set_title(env_id, fontsize="medium")
        axes.xaxis.set_major_formatter(lambda x, _: thousands(x))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.supxlabel("environment steps", fontsize="medium")
    figure.supylabel("return while training", fontsize="medium")
    if len(labels) > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return save(figure, args, args.figure or args.curves[0])


def thousands(x: float) -> str:
    """Return a number of steps as an axis shows it: 0, 500k, 1M."""
    return f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k" if x else "0"


def pyplot():
    """Return matplotlib.pyplot, set to write the same file every time."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "same file every time"
    return plt


def save(figure, args: Args, name: str) -> Path:
    """Write a figure beside the table."""
    path = (RESULTS / args.table).parent / f"{name.replace('/', '-')}.svg"
    # A white ground keeps the axes readable on a dark page.
    figure.savefig(path, facecolor="white", metadata={"Date": None})
    return path


MARKED = re.compile(
    r"(?P<start>^<!-- python benchmarks/report\.py(?P<words>[^\n]*?) -->\n)"
    r".*?(?P<end>^<!-- end -->)",
    re.DOTALL | re.MULTILINE,
)


def fill(page: str) -> str:
    """Return a page with the tables that its comments ask for."""

    def table(match: re.Match) -> str:
        args = tyro.cli(Args, args=shlex.split(match["words"]))
        return f"{match['start']}\n{markdown(args)}\n\n{match['end']}"

    return MARKED.sub(table, page)


def main() -> None:
    args = tyro.cli(Args)
    for path in args.pages:
        path.write_text(fill(path.read_text()))
    if args.pages:
        return
    print(markdown(args))
    if args.curves:
        print(f"drawn: {draw(args)}")
    elif args.figure:
        print(f"drawn: {draw_details(args)}")


if __name__ == "__main__":
    main()
