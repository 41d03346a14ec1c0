"""Measure what each detail of PPO is worth: one changed at a time, all else the default.

    python benchmarks/details.py --processes 2        # 5 seeds, lines of results/details.csv
    python benchmarks/report.py --table details.csv --figure details

Most changes are flags. Four details have none, for nobody should switch them off: those are patched
in a copy of the script, made for the run. A patch must fit in exactly one place, or there is no
run. Runs that stand in the table already are not done again.
"""

import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]

from run import RESULTS, Job, check_names, patched, run_all  # noqa: E402

DISCRETE, CONTINUOUS = "ppo_discrete.py", "ppo_continuous.py"
BOTH = (DISCRETE, CONTINUOUS)
TASKS = {  # two of each kind: environment, steps
    DISCRETE: (("Acrobot-v1", 100_000), ("LunarLander-v3", 300_000)),
    CONTINUOUS: (("HalfCheetah-v5", 300_000), ("Hopper-v5", 300_000)),
}
EVALUATIONS = {DISCRETE: "--eval-episodes 100", CONTINUOUS: "--eval-episodes 20"}
HIDDEN = "nn.init.orthogonal_(linear.weight, 2**0.5)"
HEAD = "    nn.init.orthogonal_(linear.weight, head_gain)\n"


@dataclass
class Change:
    """A detail that is otherwise, by flags or by patches of the source."""

    name: str  # as the table names it
    flags: str = ""
    patches: dict[str, str] = field(default_factory=dict)
    scripts: tuple[str, ...] = BOTH


CHANGES = [
    Change("default"),
    Change("advantages not normalised", "--norm-adv none"),
    Change("advantages normalised by minibatch", "--norm-adv minibatch", scripts=(DISCRETE,)),
    Change("advantages normalised over the batch", "--norm-adv batch", scripts=(CONTINUOUS,)),
    Change("advantages recomputed each epoch", "--recompute-advantages"),
    Change("value loss clipped", "--clip-vloss", scripts=(DISCRETE,)),
    Change("value loss not clipped", "--no-clip-vloss", scripts=(CONTINUOUS,)),
    Change("PyTorch's initial weights", patches={HIDDEN: "pass", HEAD: ""}),
    Change("policy head not small", patches={"head_gain=0.01)": "head_gain=1.0)"}),
    Change("learning rate does not fall", "--no-anneal-lr"),
    Change("Adam's eps 1e-8", patches={"eps=1e-5, fused=True": "eps=1e-8, fused=True"}),
    Change("gradient not clipped", "--max-grad-norm 1e9"),
    Change("observations not normalised", "--no-norm-obs", scripts=(CONTINUOUS,)),
    Change("observations clipped to 3", "--clip-obs 3", scripts=(CONTINUOUS,)),
    Change("rewards not scaled", "--no-norm-reward", scripts=(CONTINUOUS,)),
    Change(
        "truncation taken for death",
        patches={
            "values[1:], terminated, done, args.gamma": "values[1:], done, done, args.gamma",
        },
    ),
    Change(
        "reset rows learned from",
        patches={
            "        real = ~np.concatenate([was_done[None], done[:-1]])": (
                "        real = np.ones_like(done)"
            ),
        },
    ),
    Change("no entropy bonus", "--ent-coef 0", scripts=(DISCRETE,)),
    Change("PPO-Penalty for PPO-Clip", "--objective penalty"),
    Change("learning rate tied to the KL", "--desired-kl 0.025", scripts=(CONTINUOUS,)),
    Change("discount 0.995", "--gamma 0.995", scripts=(CONTINUOUS,)),
    Change("8 environments x 256 steps", "--num-envs 8 --num-steps 256", scripts=(CONTINUOUS,)),
    Change("std learned, not annealed", "--log-std-fall None", scripts=(CONTINUOUS,)),
    Change(  # an annealed std leaves an entropy bonus nothing to act on
        "std learned, entropy bonus 0.01",
        "--log-std-fall None --ent-coef 0.01",
        scripts=(CONTINUOUS,),
    ),
    Change("actions not scaled to the box", "--no-scale-actions", scripts=(CONTINUOUS,)),
    Change("tanh for ReLU", "--activation tanh", scripts=(DISCRETE,)),
    Change("ReLU for tanh", "--activation relu", scripts=(CONTINUOUS,)),
]


@dataclass
class Args:
    """Run the changes."""

    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    processes: int = 1  # runs at a time, each on a core of its own
    env_ids: tuple[str, ...] = ()  # all of them by default
    changes: tuple[str, ...] = ()  # names of the changes, all by default; "default" always runs
    quick: bool = False  # Acrobot, 2 seeds, 20,000 steps, few changes, to results/quick/


def write_scripts(folder: Path, changes: Sequence[Change]) -> dict[tuple[str, str], Path]:
    """Write the patched copies with what they import; return where each change's script stands."""
    paths = {}
    for number, change in enumerate(changes):
        for script in change.scripts:
            paths[change.name, script] = ROOT / script
            if change.patches:
                place = folder / str(number)
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / "gae.py", place)
                paths[change.name, script] = place / script
                source = patched((ROOT / script).read_text(), change.patches)
                (place / script).write_text(source)
    return paths


def main() -> None:
    args = tyro.cli(Args)
    seeds, env_ids, names, table = args.seeds, args.env_ids, args.changes, RESULTS / "details.csv"
    if args.quick:
        seeds, env_ids, table = (1, 2), ("Acrobot-v1",), RESULTS / "quick" / "details.csv"
        names = ("advantages not normalised", "reset rows learned from", "no entropy bonus")
    check_names("--changes", names, (change.name for change in CHANGES))
    check_names("--env-ids", env_ids, (env_id for tasks in TASKS.values() for env_id, _ in tasks))
    jobs = []
    with tempfile.TemporaryDirectory() as folder:
        paths = write_scripts(Path(folder), CHANGES)
        for seed in seeds:
            for script, tasks in TASKS.items():
                for env_id, steps in tasks:
                    for change in CHANGES:
                        wanted = not names or change.name in ("default", *names)
                        if script not in change.scripts or not wanted:
                            continue
                        if env_ids and env_id not in env_ids:
                            continue
                        steps = 20_000 if args.quick else steps
                        flags = f"--total-timesteps {steps} {EVALUATIONS[script]} {change.flags}"
                        path = paths[change.name, script]
                        jobs.append(Job(script, env_id, change.name, seed, flags.strip(), path))
        run_all(jobs, table, args.processes, curves=False)


if __name__ == "__main__":
    main()
