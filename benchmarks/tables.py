"""Print the tables of the pages from the committed results.

    python -m benchmarks.tables                                        # of runs.csv
    python -m benchmarks.tables --table speed.csv --part solve
    python -m benchmarks.tables --results benchmarks/results/own       # of your own runs.csv
    python -m benchmarks.tables --pages README.md                      # update a page's tables

On a page, a table stands between two comments. The first is the command that prints it:

    <!-- python -m benchmarks.tables --table runs.csv -->
    ...
    <!-- end -->

The interquartile mean (IQM) leaves out the lowest and the highest quarter of the seeds; its
interval is the middle 95% of the IQMs of 20,000 resamplings of the seeds with replacement, as
Agarwal et al. 2021 ("Deep RL at the Edge of the Statistical Precipice") propose. Their rliable
gives the same numbers, but its version 1.2.0 cannot be imported with pandas 3, hence SciPy. The
interval cannot reach beyond the seeds seen, so with few of them it is too narrow: for normal scores
it covers the true value in 94% of cases with 10 seeds, 89% with 5 and 76% with 3. Differences
between two configurations are therefore judged by Welch's t interval instead.
"""

import json
import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from scipy.stats import bootstrap, trim_mean, ttest_ind

from benchmarks import ablation, details, published
from benchmarks.jobs import RESULTS, check_names, read

Rows = list[dict[str, str]]


@dataclass
class Args:
    """Print a table of results as Markdown."""

    table: str = "runs.csv"  # the table's file in the folder of results
    part: str = ""  # of speed.csv, scaling.csv, overhead.csv or rlhf.csv; by default its first
    threads: int = 1  # of speed.csv
    brief: Literal["", "en", "zh"] = ""  # README's version, in this language
    results: Path = RESULTS  # folder of the tables; your own are in benchmarks/results/own
    pages: tuple[Path, ...] = ()  # pages whose tables are updated, instead of printing


# ---- Statistics --------------------------------------------------------------------------------


def iqm(scores: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the mean over an axis, leaving out the lowest and the highest quarter."""
    return trim_mean(scores, 0.25, axis=axis)


def interval(scores: np.ndarray, resamplings: int = 20_000) -> tuple[float, float]:
    """Return the bootstrap 95% interval of the IQM of scores (seeds,)."""
    if len(scores) == 1:
        return scores[0], scores[0]
    drawn = bootstrap((scores,), iqm, n_resamples=resamplings, method="percentile", rng=0)
    low, high = drawn.confidence_interval
    return low, high


def change_interval(x: np.ndarray, default: np.ndarray) -> tuple[float, float]:
    """Return Welch's 95% interval of mean(x) - mean(default); infinite for a single seed."""
    if min(len(x), len(default)) < 2:
        return -np.inf, np.inf
    if x.std() == default.std() == 0.0:
        return (x.mean() - default.mean(),) * 2
    low, high = ttest_ind(x, default, equal_var=False).confidence_interval()
    return low, high


def significance(x: np.ndarray, default: np.ndarray) -> str:
    """Return an arrow if the interval of the difference excludes 0."""
    low, high = change_interval(x, default)
    return " ▼" if high < 0.0 else " ▲" if low > 0.0 else ""


def median_and_range(x: np.ndarray, form: str) -> list[str]:
    return [f"{np.median(x):{form}}", f"{x.min():{form}} - {x.max():{form}}"]


# ---- The tables --------------------------------------------------------------------------------


def markdown_table(heads: list[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table; headings that begin with ":" are for text, others for numbers."""
    rule = "|".join("---" if head.startswith(":") else "---:" for head in heads)
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in rows]
    return "\n".join([f"| {' | '.join(head.lstrip(':') for head in heads)} |", f"|{rule}|", *lines])


def group_by(rows: Rows, *columns: str) -> dict[tuple[str, ...], Rows]:
    """Return the rows of each combination of these columns, in the order of the table."""
    groups: dict[tuple[str, ...], Rows] = defaultdict(list)
    for row in rows:
        groups[tuple(row[column] for column in columns)].append(row)
    return groups


def numbers(rows: Rows, column: str) -> np.ndarray:
    """Return a column without its empty rows."""
    return np.array([float(row[column]) for row in rows if row[column]])


def seeds(rows: Rows) -> str:
    """Return one line for each environment and configuration, over its seeds."""
    groups = group_by(rows, "env_id", "script", "config")
    several = len({script for _, script, _ in groups}) > 1  # peers were run as well
    figures = published.MUJOCO | (published.CLASSIC if several else {})
    compared = any(env_id in figures for env_id, _, _ in groups)
    heads = [":environment", *[":script"] * several, ":configuration", "steps", "seeds"]
    heads += ["deterministic: mean ± std", "IQM [95%]", "lowest seed", "stochastic"]
    lines = []
    for (env_id, script, config), group in groups.items():
        x, stochastic = numbers(group, "eval_mean"), numbers(group, "eval_stochastic_mean")
        steps, (low, high) = numbers(group, "global_step"), interval(x)
        line = [env_id, *[script] * several, config, f"{steps.mean():,.0f}", len(group)]
        line += [f"{x.mean():,.1f} ± {x.std():,.1f}", f"{iqm(x):,.1f} [{low:,.1f}, {high:,.1f}]"]
        line += [f"{x.min():,.1f}", f"{stochastic.mean():,.1f}"]
        lines.append([*line, *[figures.get(env_id, "-")] * compared])
    return markdown_table(heads + ["published"] * compared, lines)


def speed(rows: Rows) -> str:
    """Return steps per second, or seconds to solve CartPole, of each contender."""
    if not any(row["contender"].startswith("ppo_") for row in rows):
        sys.exit("speed.csv has no line of ours for this --part")
    return (solved if rows[0]["work"] == "solve" else steps_per_second)(rows)


def versions(group: Rows) -> str:
    """Return the versions in which a contender was measured, from all of its lines."""
    return "; ".join(dict.fromkeys(row["versions"] for row in group))


def median_memory(group: Rows) -> str:
    return f"{np.median(numbers(group, 'peak_mb')):,.0f}"


def rates(rows: Rows) -> list[list[str]]:
    """Return steps per second and memory of each contender, and how far ours is ahead."""
    groups = group_by(rows, "contender")
    ours = next(group for (name,), group in groups.items() if name.startswith("ppo_"))
    rates = {row["round"]: float(row["steps_per_second"]) for row in ours}
    lines = []
    for (name,), group in groups.items():
        shared = [row for row in group if row["round"] in rates]
        ratios = [rates[row["round"]] / float(row["steps_per_second"]) for row in shared]
        line = [name, versions(group)]
        line += median_and_range(numbers(group, "steps_per_second"), ",.0f")
        line += [f"{np.median(ratios):.2f}x", median_memory(group), group[0]["remark"]]
        lines.append(line)
    return lines


def steps_per_second(rows: Rows) -> str:
    heads = [":", ":version", "steps/s, median", "lowest - highest"]
    heads += ["our steps/s over theirs, median of the rounds", "peak memory, MB", ":not the same"]
    return f"{markdown_table(heads, rates(rows))}\n\n{settings_in_words(rows[0])}"


def solved(rows: Rows) -> str:
    """Return the seconds from process start to a solved CartPole of each contender."""
    lines, notes = [], [settings_in_words(rows[0])]
    for (name,), group in group_by(rows, "contender").items():
        good = [row for row in group if row["solved_seconds"]]
        seconds = numbers(good, "solved_seconds")
        times = median_and_range(seconds, ".1f") if good else ["never", "-"]
        count = f"{np.median(numbers(good or group, 'rows')):,.0f}"
        line = [name, versions(group), f"{len(good)} of {len(group)}", *times, count]
        lines.append([*line, median_memory(group), group[0]["remark"]])
        if group[0]["settings"] != rows[0]["settings"]:
            notes.append(f"{name}: {settings_in_words(group[0])}")
    heads = [":", ":version", "solved", "seconds, median", "lowest - highest", "rows, median"]
    heads += ["peak memory, MB", ":not the same"]
    return "\n\n".join([markdown_table(heads, lines), *notes])


def settings_in_words(row: dict) -> str:
    """Describe the settings of a line of speed.csv in words."""
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


def medians(rows: Rows) -> str:
    """Return one line per case, one column per quantity, medians over rounds."""
    cells = group_by(rows, "case", "quantity")
    cases, quantities = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))

    def cell(case: str, quantity: str) -> str:
        if (case, quantity) not in cells:
            return "-"
        x = np.median(numbers(cells[case, quantity], "value"))
        return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"

    lines = [[case, *(cell(case, quantity) for quantity in quantities)] for case in cases]
    return markdown_table([":", *quantities], lines)


RLHF_COLUMNS = {
    "reviews": {
        "kl_coef": "beta",
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
}


def rlhf(rows: Rows) -> str:
    """Return one line per run: seeds at the default beta and, for reviews, without a KL penalty."""
    columns = RLHF_COLUMNS[rows[0]["task"]]
    rows = [row for row in rows if row["kl_coef"] in ("0.1", "0.0")]
    rows.sort(key=lambda row: (int(row["seed"]), -float(row["kl_coef"])))

    def cell(row: dict[str, str], name: str) -> str:
        form = "g" if name == "kl_coef" else ".3f"
        return f"{float(row[name]):{form}}" if row[name] else "-"

    lines = [[row["seed"], *(cell(row, name) for name in columns)] for row in rows]
    return markdown_table([":seed", *columns.values()], lines)


def mean_and_deviation(x: np.ndarray) -> str:
    if len(x) < 2:
        return f"{x[0]:.2f}" if len(x) else "-"
    return f"{x.mean():.2f} ± {x.std():.2f}"


def rlhf_details(rows: Rows) -> str:
    """Return one line per change, marked where the 95% interval of its difference excludes 0."""
    columns = {
        "gold": "gold",
        "proxy": "proxy",
        "kl": "KL, nats",
        "length": "tokens",
        "optimum_share": "share of the optimum",
        "rm_correlation": "reward model, correlation with gold",
        "first_ratio_error": "first ratios, off 1 by",
    }
    groups = group_by(rows, "config")

    def cell(group: Rows, column: str) -> str:
        x, default = numbers(group, column), numbers(groups[("default",)], column)
        return mean_and_deviation(x) + significance(x, default)

    lines = [[name, *(cell(group, x) for x in columns)] for (name,), group in groups.items()]
    return markdown_table([":", *columns.values()], lines)


def rlhf_options(rows: Rows) -> str:
    """Return one line per option of the reviews, means over the seeds."""
    columns = {
        "optimum_kl": "KL to the optimum",
        "optimum_share": "share of the optimum",
        "gold": "gold",
        "length": "tokens",
        "kl": "KL to the reference",
        "eos_rate": "EOS",
    }
    lines = [
        [name, len(group), *(mean_and_deviation(numbers(group, x)) for x in columns)]
        for (name,), group in group_by(rows, "option").items()
    ]
    return markdown_table([":", "seeds", *columns.values()], lines)


def lstm(rows: Rows) -> str:
    """Return one line for each environment, script and configuration."""
    lines = []
    for (env_id,), task in group_by(rows, "env_id").items():
        form = ",.2f" if "TMaze" in env_id else ",.1f"
        for (script, config), group in group_by(task, "script", "config").items():
            x, sampled = numbers(group, "eval_mean"), numbers(group, "eval_stochastic_mean")
            steps = f"{numbers(group, 'global_step').mean():,.0f}"
            line = [env_id.rpartition(":")[2], script, config, steps, len(group)]
            lines.append(line + [f"{x:{form}}" for x in (x.mean(), x.min(), sampled.mean())])
    heads = [":environment", ":script", ":", "steps", "seeds"]
    return markdown_table([*heads, "likeliest actions", "lowest seed", "sampled"], lines)


def lstm_speed(rows: Rows) -> str:
    """Return the medians of each contender."""
    columns = {
        "steps_per_second": "steps/s",
        "steps_per_cpu_second": "steps per second of processor time",
    }
    lines = [
        [name, *(f"{np.median(numbers(group, x)):,.0f}" for x in columns)]
        for (name,), group in group_by(rows, "contender").items()
    ]
    return markdown_table([":", *columns.values()], lines)


ORDERS = {  # of the lines
    "ablation": list(ablation.LINES),
    "details": [change.name for change in details.CHANGES],
}


def scores_of_changes(rows: Rows, order: str) -> dict[str, dict[str, np.ndarray]]:
    """Return, for each change and each task, the scores of its seeds, as ORDERS has them."""
    rows = sorted(rows, key=lambda row: ORDERS[order].index(row["config"]))
    scores: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for (config, env_id), group in group_by(rows, "config", "env_id").items():
        scores[config][env_id] = numbers(group, "eval_mean")
    return scores


def changes(rows: Rows, order: str) -> str:
    """Return one line per change, one column per task; marked where the 95% interval excludes 0.

    Up to three seeds are listed; more are shown by their standard deviation.
    """
    scores = scores_of_changes(rows, order)
    env_ids = list(dict.fromkeys(env_id for tasks in scores.values() for env_id in tasks))

    def cell(config: str, env_id: str) -> str:
        if env_id not in scores[config]:
            return "-"
        x = scores[config][env_id]
        each = f"± {x.std():,.1f}"
        if len(x) <= 3:
            each = f"({', '.join(f'{score:,.0f}' for score in x)})"
        return f"{x.mean():,.1f} {each}{significance(x, scores['default'][env_id])}"

    lines = [[config, *(cell(config, env_id) for env_id in env_ids)] for config in scores]
    return markdown_table([":", *env_ids], lines)


def brief_returns(rows: Rows) -> list[list[object]]:
    """Return one line per environment, with ours and the peer's return side by side."""
    lines = []
    for (env_id,), group in group_by(rows, "env_id").items():
        theirs = [row for row in group if row["script"] == "Stable-Baselines3"]
        ours = [row for row in group if row not in theirs]
        returns = [numbers(part, "eval_mean") for part in (ours, theirs)]
        line = [env_id, ours[0]["config"], f"{numbers(ours, 'global_step').mean():,.0f}"]
        line += [f"{x.mean():,.1f} ± {x.std():,.1f}" for x in returns]
        lines.append([*line, published.CLASSIC[env_id]])
    return lines


def brief_speed(rows: Rows) -> list[list[str]]:
    """Return one line per contender: steps per second, and our steps/s divided by them."""
    return [[name, median, ratio] for name, _, median, _, ratio, *_ in rates(rows)]


BRIEF = {  # for README: the function of the rows, and the headings in each language
    "classic.csv": (
        brief_returns,
        {
            "en": [":environment", ":our flags", "steps", "ours", "Stable-Baselines3", "published"],
            "zh": [":环境", ":本项目的参数", "步数", "本项目", "Stable-Baselines3", "已发表"],
        },
    ),
    "speed.csv": (
        brief_speed,
        {
            "en": [":", "steps/s", "our steps/s over theirs"],
            "zh": [":", "每秒步数", "本项目是它的几倍"],
        },
    ),
}


# For each file, the function of its rows, and the column from which --part chooses.
TABLES: dict[str, tuple[Callable[[Rows], str], str]] = {
    "runs.csv": (seeds, ""),
    "continuous.csv": (seeds, ""),
    "classic.csv": (seeds, ""),
    "ablation.csv": (partial(changes, order="ablation"), ""),
    "details.csv": (partial(changes, order="details"), ""),
    "speed.csv": (speed, "work"),
    "scaling.csv": (medians, "part"),
    "overhead.csv": (medians, "part"),
    "rlhf.csv": (rlhf, "task"),
    "rlhf_details.csv": (rlhf_details, ""),
    "rlhf_options.csv": (rlhf_options, "task"),
    "lstm.csv": (lstm, ""),
    "lstm_speed.csv": (lstm_speed, ""),
}


def markdown(args: Args) -> str:
    """Return the table that `args` asks for."""
    rows = read(args.results / args.table)
    if not rows:
        sys.exit(f"--table {args.table}: {args.results} has no such table")
    table, column = TABLES.get(args.table, (seeds, ""))  # those that run.py may be told to write
    if column:
        part = args.part or rows[0][column]
        check_names("--part", [part], (row[column] for row in rows))
        rows = [row for row in rows if row[column] == part]
    if args.table == "speed.csv":
        rows = [row for row in rows if row["threads"] == str(args.threads)]
    if args.brief:
        brief, heads = BRIEF[args.table]
        return markdown_table(heads[args.brief], brief(rows))
    quick = "*A quick pass, fewer seeds, rounds and steps: not for quoting.*\n\n"
    return quick * (args.results.name == "quick") + table(rows)


MARKED = re.compile(
    r"(?P<start>^<!-- python -m benchmarks\.tables(?P<words>[^\n]*?) -->\n)"
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
    if not args.pages:
        print(markdown(args))


if __name__ == "__main__":
    main()
