"""Measure ppo_rlhf_toy.py: seeds, a sweep of beta on one reward model, and the KV cache.

    python benchmarks/rlhf.py                    # about 20 minutes on one core; resumes if killed
    python benchmarks/rlhf.py --only figure      # draw benchmarks/results/rlhf.svg again

Each run is one process in a folder under --runs; one that has its results.json is not repeated.
Prints Markdown tables and writes one line a run to benchmarks/results/rlhf.csv.
"""

import csv
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ppo_rlhf_toy as rlhf  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


@dataclasses.dataclass
class Args:
    """Run the benchmark of the RLHF script."""

    seeds: tuple[int, ...] = (1, 2, 3)  # of the default runs, of beta 0 and of arithmetic
    betas: tuple[float, ...] = (0.0, 0.01, 0.03, 0.1, 0.3)  # of the sweep
    sweep_seeds: tuple[int, ...] = (1,)  # seeds that run all betas, not only 0.1 and 0
    runs: Path = ROOT / "runs" / "benchmark-rlhf"  # where the run folders go
    only: Literal["all", "reviews", "arithmetic", "cache", "figure"] = "all"


def run(folder: Path, flags: dict[str, object]) -> dict:
    """Return the results of a run, which is made unless its folder has them already."""
    if not (folder / "results.json").exists():
        if folder.exists():  # killed half-way; kept, under a name of its own
            folder.rename(folder.with_name(f"{folder.name}-broken-{time.time_ns()}"))
        words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        command = [sys.executable, str(ROOT / "ppo_rlhf_toy.py"), f"--run-dir={folder}", *words]
        print(" ".join(["python ppo_rlhf_toy.py", *words]), flush=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "results.json").read_text())


def reviews(args: Args) -> list[dict]:
    """Run the default task, and other betas from the SFT and reward model of the same seed."""
    rows = []
    for seed in args.seeds:
        folder = args.runs / f"reviews-{seed}"
        rows.append(run(folder, {"seed": seed}))
        loaded = {
            "seed": seed,
            "load_sft": folder / "sft.pt",
            "load_reward_model": folder / "reward_model.pt",
        }
        for beta in args.betas if seed in args.sweep_seeds else (0.0,):
            if beta != rlhf.Args.kl_coef:
                rows.append(run(args.runs / f"reviews-{seed}-{beta}", loaded | {"kl_coef": beta}))
    return rows


def arithmetic(args: Args) -> list[dict]:
    flags = {"task": "arithmetic"}
    return [run(args.runs / f"arithmetic-{s}", flags | {"seed": s}) for s in args.seeds]


def markdown(rows: list[dict], keys: list[str]) -> str:
    """Return a Markdown table."""
    cells = [[row.get(key) for key in keys] for row in rows]
    lines = [keys, ["---"] * len(keys)]
    lines += [[f"{x:.3f}" if isinstance(x, float) else str(x) for x in row] for row in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cache_speed(batch_size: int = 128, length: int = 24, repeats: int = 12) -> list[float]:
    """Return tokens a CPU second of generation with and without the KV cache, the best of some.

    EOS is made improbable, so that all answers are as long as allowed and both do the same work.
    """
    torch.set_num_threads(1)
    args = rlhf.Args(max_new_tokens=length, context_size=length + 8)
    task = rlhf.TASKS["reviews"]
    rng, generator = rlhf.streams(args, 1)
    model = rlhf.make_model(args, task, scalar=False).requires_grad_(False)
    model.head.bias[rlhf.EOS] = -1e9
    texts = task.prompts(batch_size, rng)
    prompts = rlhf.pad([task.encode(text) for text in texts], True, args)
    best = [0.0, 0.0]
    for i in range(2 * repeats):  # in turns, so that both meet the same noise
        start = time.process_time()
        responses, _ = rlhf.generate(args, model, prompts, generator, cached=i % 2 == 0)
        best[i % 2] = max(best[i % 2], responses.numel() / (time.process_time() - start))
    return best


def figure(rows: list[dict], path: Path) -> None:
    """Draw gold and proxy against the KL that PPO moved, one point a beta."""
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        print("no figure: pip install matplotlib, then run again with --only figure")
        return

    rows = sorted(rows, key=lambda row: -row["kl_coef"])
    kl = [0.0] + [row["kl"] for row in rows]
    gold = [rows[0]["sft_gold"]] + [row["gold"] for row in rows]
    proxy = [0.0] + [row["proxy"] for row in rows]
    fig, left = plt.subplots(figsize=(7, 4.2), layout="constrained")
    right = left.twinx()
    left.plot(kl, gold, "o-", color="#1f6f8b", label="gold: what the reviews are worth (left)")
    right.plot(kl, proxy, "s--", color="#d1495b", label="proxy: the reward model's score (right)")
    names = ["SFT"] + [f"β {row['kl_coef']:g}" for row in rows]
    for name, x, y in zip(names, kl, gold):
        left.annotate(name, (x, y), (0, 8), textcoords="offset points", fontsize=8, ha="center")
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
    for axis in (left, right):
        axis.spines["top"].set_visible(False)
    fig.savefig(path)


def main(args: Args) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "rlhf.csv"
    old = list(csv.DictReader(path.open())) if path.exists() else []
    kept = {"reviews": ["arithmetic"], "arithmetic": ["reviews"]}.get(args.only, [])
    rows = [row for row in old if row["task"] in kept]
    if args.only in ("all", "reviews", "figure"):
        reviews_rows = reviews(args)
        keys = "seed kl_coef rm_accuracy rm_correlation sft_gold sft_grammatical gold proxy "
        keys += "grammatical kl length eos_rate distinct optimum_share wall_seconds"
        print(markdown(reviews_rows, keys.split()))
        swept = [row for row in reviews_rows if row["seed"] in args.sweep_seeds[:1]]
        if swept:
            figure(swept, RESULTS / "rlhf.svg")
        rows += reviews_rows
    if args.only in ("all", "arithmetic"):
        arithmetic_rows = arithmetic(args)
        keys = "seed sft_accuracy accuracy sft_greedy_accuracy greedy_accuracy kl wall_seconds"
        print(markdown(arithmetic_rows, keys.split()))
        rows += arithmetic_rows
    if args.only in ("all", "cache"):
        cached, uncached = cache_speed()
        print(
            f"KV cache at batch 128: {cached:,.0f} tokens/s with, {uncached:,.0f} without, ", end=""
        )
        print(f"{cached / uncached:.1f} times")
    if args.only in ("all", "reviews", "arithmetic"):
        names = list(dict.fromkeys(name for row in rows for name in row))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main(tyro.cli(Args))
