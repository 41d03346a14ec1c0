"""Measure ppo_rlhf_toy.py: seeds, a sweep of beta on one reward model, and the KV cache.

    python benchmarks/rlhf.py                    # about 20 minutes on one core; resumes if killed
    python benchmarks/rlhf.py --only figure      # draw results/rlhf.svg from the table again
    python benchmarks/report.py --table rlhf.csv --part reviews    # the tables

A run is one process and one line of results/rlhf.csv; runs that stand there are not done again.
Their folders stay under --runs: a beta is swept with the reward model of its seed's default run.
"""

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from report import pyplot  # noqa: E402
from rlhf_optimum import optimum_of  # noqa: E402
from run import RESULTS, append, commit, python, read, wrapped  # noqa: E402

import ppo_rlhf_toy as rlhf  # noqa: E402

TABLE = RESULTS / "rlhf.csv"
# Of results.json; a task leaves empty what it has no measure of.
MEASURES = """task seed kl_coef sft_gold sft_grammatical sft_greedy_gold rm_accuracy rm_correlation
gold proxy grammatical greedy_gold kl length eos_rate distinct optimum_share sft_accuracy
sft_greedy_accuracy accuracy greedy_accuracy wall_seconds""".split()
RUNS = ROOT / "runs" / "benchmark-rlhf"


@dataclasses.dataclass
class Args:
    """Run the benchmark of the RLHF script."""

    seeds: tuple[int, ...] = (1, 2, 3, 4)  # of the default runs and of beta 0
    betas: tuple[float, ...] = (0.0, 0.01, 0.03, 0.3)  # of the sweep, beside the default 0.1
    sweep_seeds: tuple[int, ...] = (1,)  # seeds that run all betas, not only 0.1 and 0
    arithmetic_seeds: tuple[int, ...] = (1, 2, 3)
    runs: Path = RUNS  # where the run folders go
    only: Literal["all", "reviews", "arithmetic", "cache", "figure"] = "all"


@dataclasses.dataclass
class Run:
    """One run of the script; with a name, it is not the default's but that of a change."""

    task: str
    seed: int
    name: str = ""
    more: str = ""  # flags of the change
    program: tuple[str, ...] = (str(ROOT / "ppo_rlhf_toy.py"),)  # what Python runs
    after: Literal["", "SFT", "reward model"] = "reward model"  # the last model it does not make

    @property
    def folder(self) -> str:
        return "-".join((self.task, str(self.seed), self.name or "default")).replace(" ", "-")

    @property
    def flags(self) -> list[str]:
        return [f"--task={self.task}", f"--seed={self.seed}", *self.more.split()]


def wanted(args: Args) -> Iterator[Run]:
    """Yield the runs, those with the default beta before those that need their models."""
    for seed in args.seeds if args.only in ("all", "reviews") else ():
        yield Run("reviews", seed)
        for beta in args.betas if seed in args.sweep_seeds else (0.0,):
            yield Run("reviews", seed, f"beta {beta}", f"--kl-coef {beta}")
    for seed in args.arithmetic_seeds if args.only in ("all", "arithmetic") else ():
        yield Run("arithmetic", seed)


def train(run: Run, runs: Path) -> Path:
    """Return the folder of a run, made unless it was, by the same flags at the same commit."""
    folder, loaded, at = runs / run.folder, [], commit()
    origin, note = f"{' '.join(run.flags)} at {at}", folder / "origin.txt"
    if note.exists() and note.read_text() == origin:
        return folder
    shutil.rmtree(folder, ignore_errors=True)  # killed half-way, or of another day
    if run.name and run.after:
        models = train(Run(run.task, run.seed), runs)
        loaded = [f"--load-sft={models}"]
        if run.after == "reward model":
            loaded.append(f"--load-reward-model={models}")
    python(*run.program, f"--run-dir={folder}", *run.flags, *loaded)
    note.write_text(origin)
    return folder


def line_of(run: Run, folder: Path) -> dict[str, object]:
    """Return the table's line of a finished run."""
    results = json.loads((folder / "results.json").read_text())
    results["optimum_share"], _ = optimum_of(folder)
    line = {name: results.get(name) for name in MEASURES}
    line = {k: round(x, 4) if isinstance(x, float) else x for k, x in line.items()}
    errors = [float(row["losses/first_ratio_error"]) for row in read(folder / "metrics.csv")]
    line["first_ratio_error"] = float(f"{max(errors):.2g}")
    line |= {"flags": " ".join(run.flags), "torch": torch.__version__}
    return line | {"commit": (folder / "origin.txt").read_text().rpartition(" ")[2]}


def without_cache(forward: Callable, model, tokens, cache=None):
    """Let a transformer read all tokens again; of the cache, keep only what they were."""
    if cache is not None:
        tokens = cache["tokens"] = torch.cat([cache.get("tokens", tokens[:, :0]), tokens], dim=1)
    return forward(model, tokens)


def cache_speed(batch_size: int = 128, length: int = 24, repeats: int = 12) -> list[float]:
    """Return tokens a CPU second of generation with and without the KV cache, the best of some.

    EOS is made improbable, so that all answers are as long as allowed and both do the same work.
    """
    torch.set_num_threads(1)
    args = rlhf.Args(max_new_tokens=length, context_size=length + 8)
    task, device = rlhf.TASKS["reviews"], torch.device("cpu")
    rng, generator = rlhf.streams(args, 1, device)
    model = rlhf.make_model(args, task, scalar=False).requires_grad_(False)
    model.head.bias[task.tokenizer.eos] = -1e9
    texts = task.prompts(batch_size, rng)
    prompts = task.tokenizer.block(map(task.tokenizer.encode, texts), True, device)
    best = [0.0, 0.0]
    for i in range(2 * repeats):  # in turns, so that both meet the same noise
        with wrapped(rlhf, {"Transformer.forward": without_cache} if i % 2 else {}):
            start = time.process_time()
            rlhf.generate(args, model, prompts, generator)
            rate = batch_size * length / (time.process_time() - start)
        best[i % 2] = max(best[i % 2], rate)
    return best


def figure(rows: list[dict[str, str]], path: Path) -> None:
    """Draw gold and proxy against the KL that PPO moved, one point a beta."""
    plt = pyplot()
    rows = sorted(rows, key=lambda row: -float(row["kl_coef"]))
    kl = [0.0] + [float(row["kl"]) for row in rows]
    gold = [float(rows[0]["sft_gold"])] + [float(row["gold"]) for row in rows]
    proxy = [0.0] + [float(row["proxy"]) for row in rows]
    fig, left = plt.subplots(figsize=(7, 4.2), layout="constrained")
    right = left.twinx()
    left.plot(kl, gold, "o-", color="#1f6f8b", label="gold: what the reviews are worth (left)")
    right.plot(kl, proxy, "s--", color="#d1495b", label="proxy: the reward model's score (right)")
    names = ["SFT"] + [f"β {float(row['kl_coef']):g}" for row in rows]
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
    fig.savefig(path, facecolor="white", metadata={"Date": None})


def main() -> None:
    args = tyro.cli(Args)
    done = {row["flags"] for row in read(TABLE)}
    for run in wanted(args):
        if " ".join(run.flags) not in done:
            append(TABLE, line_of(run, train(run, args.runs)))
            print(" ".join(["python ppo_rlhf_toy.py", *run.flags]), flush=True)
    if args.only in ("all", "reviews", "figure"):
        swept = "reviews", str(args.sweep_seeds[0])
        rows = [r for r in read(TABLE) if (r["task"], r["seed"]) == swept]
        if not rows:
            sys.exit(f"nothing to draw: rlhf.csv has no line of {' '.join(swept)}")
        figure(rows, RESULTS / "rlhf.svg")
    if args.only in ("all", "cache"):
        cached, uncached = cache_speed()
        print(f"cache, batch 128: {cached:,.0f} tokens/s with, {uncached:,.0f} without, ", end="")
        print(f"{cached / uncached:.1f} times")


if __name__ == "__main__":
    main()
