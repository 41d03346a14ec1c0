"""Measure what each detail of ppo_rlhf_toy.py is worth: one changed at a time, all else default.

    python benchmarks/rlhf_details.py                 # about an hour on one core, rlhf_details.csv
    python benchmarks/report.py --table rlhf_details.csv

A change of stage 3 starts from the SFT and the reward model of its seed's default run; one of an
earlier stage makes its own from there on. What has no flag is patched in a copy of the script, made
for the run. Runs that stand in the table already are not done again; one that fails leaves no line,
does not stop the others, and makes the exit status 1.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]

from details import Change, write_scripts  # noqa: E402
from rlhf import RUNS, Run, line_of, train  # noqa: E402
from run import RESULTS, append, check_names, read  # noqa: E402

TABLE = RESULTS / "rlhf_details.csv"
SCRIPT = "ppo_rlhf_toy.py"


@dataclass
class Stage(Change):
    """A change, and the last model that it takes from the default run."""

    scripts: tuple[str, ...] = (SCRIPT,)
    after: Literal["", "SFT", "reward model"] = "reward model"


CHANGES = [
    Stage(
        "positions count padding",
        patches={
            "        positions = (real.cumsum(1) - 1).clamp(min=0)[:, -S:]\n": (
                "        positions = torch.arange(total, device=tokens.device)[None, -S:]\n"
            )
        },
        after="",
    ),
    Stage(
        "reward model read a token before EOS",
        patches={"return model(tokens)[:, -1, 0]": "return model(tokens)[:, -2, 0]"},
        after="SFT",
    ),
    Stage(
        "PyTorch's initial scalar head",
        patches={
            "            nn.init.normal_(self.head.weight, std=(d_model + 1) ** -0.5)\n": "",
            "            nn.init.zeros_(self.head.bias)\n": "            pass\n",
        },
        after="SFT",
    ),
    Stage(
        "reward model's scores not normalised",
        patches={
            "    model.head.bias.sub_(scores.mean()).div_(scores.std())\n": "",
            "    model.head.weight.div_(scores.std())\n": "",
        },
        after="SFT",
    ),
    Stage(
        "sampled at temperature 0.7, rated at 1",
        patches={
            "policy(new, cache)[:, -1], args.temperature)": "policy(new, cache)[:, -1], 0.7)",
        },
    ),
    Stage("temperature 0.7", "--temperature 0.7"),
    Stage(
        "EOS is no action",
        # An empty answer keeps it, for without an action the score had no place.
        patches={"        mask = action_mask(responses)  # (B, R)\n": (
            "        mask = action_mask(responses)\n"
            "        mask &= (responses != EOS) | (mask.sum(1, keepdim=True) == 1)\n")},
    ),
    Stage(
        "dropout 0.1 in all models",
        patches={
            "return x + self.mlp(self.norm_2(x))": (
                "return x + F.dropout(self.mlp(self.norm_2(x)), 0.1)"
            ),
        },
    ),
    Stage("learning rate does not fall", "--no-anneal-lr"),
    Stage("no warm-up", "--warmup-iterations 1"),
    Stage(
        "Adam's eps 1e-8",
        patches={"    optimizer = torch.optim.Adam(parameters, eps=1e-5": (
            "    optimizer = torch.optim.Adam(parameters, eps=1e-8")},
    ),
    Stage("value model begins as the policy", "--value-init policy"),
    Stage("value loss not clipped", "--no-clip-vloss"),
    Stage("no penalty for a missing EOS", "--missing-eos-penalty 0"),
    Stage("discount 0.95", "--gamma 0.95"),
    Stage("one epoch, one minibatch", "--update-epochs 1 --num-minibatches 1"),
    Stage("k2 as the reward", "--kl-estimator k2"),
    Stage("k3 as the reward", "--kl-estimator k3"),
    Stage("sign of the KL turned", patches={"mask, -kl_coef * kl": "mask, kl_coef * kl"}),
    Stage("beta adapted to 2 nats", "--ref-kl-target 2"),
    Stage(
        "advantages not whitened",
        patches={"        advantages = masked_whiten(advantages, mask)\n": ""},
    ),
    Stage("rewards whitened", "--whiten-rewards"),
    Stage(
        "rewards whitened, their mean moved",
        "--whiten-rewards",
        {"shift_mean=False)": "shift_mean=True)"},
    ),
    Stage("one advantage for the whole answer", "--credit response"),
    Stage("the group's mean for a critic", "--baseline group"),
]  # fmt: skip


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
    with tempfile.TemporaryDirectory() as folder:
        scripts = write_scripts(Path(folder), CHANGES)
        for seed in args.seeds:
            runs = [Run("reviews", seed)]
            for change in CHANGES:
                if change.name in (args.changes or [change.name]):
                    x, script = change, scripts[change.name, SCRIPT]
                    runs.append(Run("reviews", seed, x.name, x.flags, script, x.after))
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
