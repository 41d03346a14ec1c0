"""Measure what each detail of ppo_rlhf_toy.py is worth: one changed at a time, all else default.

    python benchmarks/rlhf_details.py                 # about an hour on one core, rlhf_details.csv
    python benchmarks/report.py --table rlhf_details.csv

A change of stage 3 starts from the SFT and the reward model of its seed's default run; one of an
earlier stage makes its own from there on. For what has no flag, functions of the script are
wrapped. Runs that stand in the table already are not done again; one that fails leaves no line,
does not stop the others, and makes the exit status 1.
"""

import copy
import dataclasses
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]

from details import Change, fixed  # noqa: E402
from rlhf import RUNS, Run, line_of, train  # noqa: E402
from run import RESULTS, append, check_names, program, read, wrapped  # noqa: E402

import ppo_rlhf_toy as toy  # noqa: E402

TABLE = RESULTS / "rlhf_details.csv"
SCRIPT = "ppo_rlhf_toy.py"


def count_padding(features: Callable, model, tokens, cache=None):
    seen = cache["tokens"].shape[1] if cache else 0
    columns = seen + torch.arange(tokens.shape[1], device=tokens.device)[None]
    with model.position.register_forward_pre_hook(lambda *_: (columns,)):
        return features(model, tokens, cache)


def read_early(read_scores: Callable, args, task, model, *texts):
    with model.register_forward_hook(lambda _, __, output: output[:, :-1]):
        return read_scores(args, task, model, *texts)


def default_scalar_head(make_model: Callable, args, task, scalar, trunk=None):
    model = make_model(args, task, scalar, trunk)
    if scalar:
        model.head.reset_parameters()
    return model


def scores_as_learned(train_reward_model: Callable, *args):
    """Give the head back what it was when it last scored answers, to be normalised by them."""
    heads = []

    def read_scores(original: Callable, args, task, model, *texts):
        heads.append(copy.deepcopy(model.head))
        return original(args, task, model, *texts)

    with wrapped(toy, {"read_scores": read_scores}):
        model, quality = train_reward_model(*args)
    model.head = heads[-1]
    return model, quality


def sampled_at_07(generate: Callable, args, *rest):
    return generate(dataclasses.replace(args, temperature=0.7), *rest)


def eos_is_no_action(ppo: Callable, args, task, *rest):
    def answer(original: Callable, *args):
        # An empty answer keeps it, for without an action the score had no place.
        rollout = original(*args)
        empty = rollout.mask.sum(1, keepdim=True) == 1
        is_eos = rollout.responses == task.tokenizer.eos
        return rollout._replace(mask=rollout.mask & (~is_eos | empty))

    with wrapped(toy, {"answer": answer}):
        ppo(args, task, *rest)


def dropout(init: Callable, block, *sizes):
    init(block, *sizes)
    block.mlp.append(torch.nn.Dropout(0.1))


@dataclass
class Stage(Change):
    """A change, and the last model that it takes from the default run."""

    scripts: tuple[str, ...] = (SCRIPT,)
    after: Literal["", "SFT", "reward model"] = "reward model"


MOVED = {"masked_whiten": fixed(shift_mean=True)}
CHANGES = [
    Stage("positions count padding", wraps={"Transformer.features": count_padding}, after=""),
    Stage("reward model read a token before EOS", wraps={"read_scores": read_early}, after="SFT"),
    Stage("PyTorch's initial scalar head", wraps={"make_model": default_scalar_head}, after="SFT"),
    Stage(
        "reward model's scores not normalised",
        wraps={"train_reward_model": scores_as_learned},
        after="SFT",
    ),
    Stage("sampled at temperature 0.7, rated at 1", wraps={"generate": sampled_at_07}),
    Stage("temperature 0.7", "--temperature 0.7"),
    Stage("EOS is no action", wraps={"ppo": eos_is_no_action}),
    Stage("dropout 0.1 in all models", wraps={"Block.__init__": dropout}),
    Stage("learning rate does not fall", "--no-anneal-lr"),
    Stage("no warm-up", "--warmup-iterations 1"),
    Stage("Adam's eps 1e-8", wraps={"torch.optim.Adam.__init__": fixed(eps=1e-8)}),
    Stage("value model begins as the policy", "--value-init policy"),
    Stage("value loss not clipped", "--no-clip-vloss"),
    Stage("no penalty for a missing EOS", "--missing-eos-penalty 0"),
    Stage("discount 0.95", "--gamma 0.95"),
    Stage("one epoch, one minibatch", "--update-epochs 1 --num-minibatches 1"),
    Stage("k2 as the reward", "--kl-estimator k2"),
    Stage("k3 as the reward", "--kl-estimator k3"),
    Stage(
        "sign of the KL turned",
        wraps={"token_rewards": lambda f, scores, kl, *rest: f(scores, -kl, *rest)},
    ),
    Stage("beta adapted to 2 nats", "--ref-kl-target 2"),
    Stage("advantages not whitened", wraps={"masked_whiten": lambda _, x, mask, **shift: x}),
    Stage("rewards whitened", "--whiten-rewards"),
    Stage("rewards whitened, their mean moved", "--whiten-rewards", MOVED),
    Stage("one advantage for the whole answer", "--credit response"),
    Stage("the group's mean for a critic", "--baseline group"),
]
WRAPS = {change.name: change.wraps for change in CHANGES}


@dataclass
class Args:
    """Run the changes."""

    seeds: tuple[int, ...] = (1, 2, 3)
    changes: tuple[str, ...] = ()  # names of the changes, all by default; "default" always runs
    runs: Path = RUNS  # where the run folders go


def main() -> None:
    args = tyro.cli(Args)
    check_names("--changes", args.changes, (change.name for change in CHANGES))
    done, failed = {(row["config"], row["seed"]) for row in read(TABLE)}, False
    for seed in args.seeds:
        runs = [Run("reviews", seed)]
        for change in CHANGES:
            if change.name in (args.changes or [change.name]):
                runs.append(Run("reviews", seed, change.name, change.flags, after=change.after))
                if change.wraps:
                    runs[-1].program = program(SCRIPT, f"rlhf_details.WRAPS[{change.name!r}]")
        for run in runs:
            name = run.name or "default"
            if (name, str(seed)) in done:
                continue
            try:
                line = line_of(run, train(run, args.runs))
            except subprocess.CalledProcessError as error:
                failed = True
                print(f"{name}, seed {seed}: failed with status {error.returncode}", flush=True)
                continue
            append(TABLE, {"config": name} | line)
            print(f"{name}, seed {seed}: gold {line['gold']}", flush=True)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
