"""Measure what each detail of ppo_rlhf_toy.py is worth: one changed at a time, all else default.

    python -m benchmarks.rlhf_details            # about an hour on one core, rlhf_details.csv
    python -m benchmarks.tables --table rlhf_details.csv

A change of stage 3 starts from the SFT and the reward model of its seed's default run; one of an
earlier stage makes its own from there on. For what has no flag, functions of the script are
wrapped.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import tyro

import ppo_rlhf_toy as toy
from benchmarks.details import Change, fixed
from benchmarks.jobs import Job, Shared, check_names, run_jobs, wrapped, wrapped_script
from benchmarks.rlhf import COLUMNS, RUNS, SCRIPT, RlhfRun


def count_padding(forward: Callable, model, tokens, cache=None):
    seen = cache["tokens"].shape[1] if cache else 0
    columns = seen + torch.arange(tokens.shape[1], device=tokens.device)[None]
    with model.position.register_forward_pre_hook(lambda *_: (columns,)):
        return forward(model, tokens, cache)


def read_early(read_scores: Callable, args, model, *texts):
    with model.register_forward_hook(lambda _, __, output: output[:, :-1]):
        return read_scores(args, model, *texts)


def default_scalar_head(make_model: Callable, args, task, scalar, trunk=None):
    model = make_model(args, task, scalar, trunk)
    if scalar:
        model.head.reset_parameters()
    return model


def scores_as_learned(train_reward_model: Callable, *args):
    """Give the head back what it was when it last scored answers, to be normalised by them."""
    heads = []

    def read_scores(original: Callable, args, model, *texts):
        heads.append(copy.deepcopy(model.head))
        return original(args, model, *texts)

    with wrapped(toy, {"read_scores": read_scores}):
        model = train_reward_model(*args)
    model.head = heads[-1]
    return model


def sampled_at_07(generate: Callable, args, policy, *rest):
    with mock.patch.object(policy, "temperature", 0.7):
        return generate(args, policy, *rest)


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
class RlhfChange(Change):
    """A change, and whether it takes the models of the default run."""

    scripts: tuple[str, ...] = (SCRIPT,)
    loads_models: bool = True


CHANGES = [
    RlhfChange(
        "positions count padding", wraps={"Transformer.forward": count_padding}, loads_models=False
    ),
    RlhfChange(
        "reward model read a token before EOS",
        wraps={"read_scores": read_early},
        loads_models=False,
    ),
    RlhfChange(
        "PyTorch's initial scalar head",
        wraps={"make_model": default_scalar_head},
        loads_models=False,
    ),
    RlhfChange(
        "reward model's scores not normalised",
        wraps={"train_reward_model": scores_as_learned},
        loads_models=False,
    ),
    RlhfChange("sampled at temperature 0.7, rated at 1", wraps={"generate": sampled_at_07}),
    RlhfChange("temperature 0.7", "--temperature 0.7"),
    RlhfChange("EOS is no action", wraps={"ppo": eos_is_no_action}),
    RlhfChange("dropout 0.1 in all models", wraps={"Block.__init__": dropout}),
    RlhfChange("learning rate does not fall", "--no-anneal-lr"),
    RlhfChange("no warm-up", "--warmup-iterations 1"),
    RlhfChange("Adam's eps 1e-8", wraps={"torch.optim.Adam.__init__": fixed(eps=1e-8)}),
    RlhfChange("value model begins as the policy", "--value-init policy"),
    RlhfChange("value loss not clipped", "--no-clip-vloss"),
    RlhfChange("no penalty for a missing EOS", "--missing-eos-penalty 0"),
    RlhfChange("discount 0.95", "--gamma 0.95"),
    RlhfChange("one epoch, one minibatch", "--update-epochs 1 --num-minibatches 1"),
    RlhfChange("k2 as the reward", "--kl-estimator k2"),
    RlhfChange("k3 as the reward", "--kl-estimator k3"),
    RlhfChange(
        "sign of the KL turned",
        wraps={"token_rewards": lambda f, scores, kl, *rest: f(scores, -kl, *rest)},
    ),
    RlhfChange("advantages not whitened", wraps={"masked_whiten": lambda _, x, mask: x}),
    RlhfChange("one advantage for the whole answer", "--credit response"),
    RlhfChange("the group's mean for a critic", "--baseline group"),
]
WRAPS = {change.name: change.wraps for change in CHANGES}


@dataclass
class Args(Shared):
    """Measure what each detail of RLHF is worth."""

    seeds: tuple[int, ...] = (1, 2, 3)
    changes: tuple[str, ...] = ()  # names of the changes, all by default; "default" always runs
    runs: Path = RUNS  # where the run folders go


def line(run: RlhfRun, runs: Path, core: object = None) -> list[dict[str, object]]:
    """Train and return the table's line.

    What changes the models of an earlier stage changes what they compute when they are measured.
    """
    with wrapped(toy, {} if run.loads_models else WRAPS[run.name]):
        return run.line(runs, core, ("config", *COLUMNS))


def main() -> None:
    args = tyro.cli(Args)
    check_names("--changes", args.changes, (change.name for change in CHANGES))
    runs = []
    for seed in args.seeds:
        runs.append(RlhfRun("reviews", seed))
        for x in CHANGES:
            if x.name in (args.changes or [x.name]):
                program = wrapped_script(SCRIPT, f"rlhf_details.WRAPS[{x.name!r}]")
                runs.append(RlhfRun("reviews", seed, x.name, x.flags, program, x.loads_models))
    jobs = []
    for run in runs:
        jobs.append(Job((run.name or "default", run.seed), partial(line, run, args.runs)))
    run_jobs(jobs, args.path("rlhf_details.csv"), ("config", "seed"))


if __name__ == "__main__":
    main()
