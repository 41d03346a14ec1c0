"""Measure what each detail of PPO is worth: one changed at a time, all else the default.

    python benchmarks/details.py --processes 2        # 5 seeds, lines of results/details.csv
    python benchmarks/report.py --table details.csv --figure details

Most changes are flags. Five details have none, for nobody should switch them off: for those,
functions of the script are wrapped. Runs that stand in the table already are not done again.
"""

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]

from run import RESULTS, Job, check_names, program, run_all  # noqa: E402

DISCRETE, CONTINUOUS = "ppo_discrete.py", "ppo_continuous.py"
BOTH = (DISCRETE, CONTINUOUS)
TASKS = {  # two of each kind: environment, steps
    DISCRETE: (("Acrobot-v1", 100_000), ("LunarLander-v3", 300_000)),
    CONTINUOUS: (("HalfCheetah-v5", 300_000), ("Hopper-v5", 300_000)),
}
EVALUATIONS = {DISCRETE: "--eval-episodes 100", CONTINUOUS: "--eval-episodes 20"}


def fixed(**arguments: object) -> Callable:
    """Return what calls a function with these values of these arguments, whatever was asked for."""
    return lambda function, *args, **kwargs: function(*args, **kwargs | arguments)


def truncation_is_death(gae: Callable, terminated, done, **rollout):
    return gae(terminated=done, done=done, **rollout)


def count_all(count_steps: Callable, run, is_transition, *arrays):
    is_transition[:] = True
    count_steps(run, is_transition, *arrays)


@dataclass
class Change:
    """A detail that is otherwise, by flags or by functions of the script that are wrapped."""

    name: str  # as the table names it
    flags: str = ""
    wraps: dict[str, Callable] = field(default_factory=dict)
    scripts: tuple[str, ...] = BOTH  # none: no script has its flag any more, but it has lines


CHANGES = [
    Change("default"),
    Change("advantages not normalised", "--norm-adv none"),
    Change("advantages normalised by minibatch", "--norm-adv minibatch", scripts=(DISCRETE,)),
    Change("advantages normalised over the batch", "--norm-adv batch", scripts=(CONTINUOUS,)),
    Change("advantages recomputed each epoch", scripts=()),
    Change("value loss clipped", "--clip-vloss", scripts=(DISCRETE,)),
    Change("value loss not clipped", "--no-clip-vloss", scripts=(CONTINUOUS,)),
    Change("PyTorch's initial weights", wraps={"nn.init.orthogonal_": lambda _, w, gain: w}),
    Change("policy head not small", wraps={"mlp": fixed(head_gain=1.0)}),
    Change("learning rate does not fall", "--no-anneal-lr"),
    Change("Adam's eps 1e-8", wraps={"torch.optim.Adam.__init__": fixed(eps=1e-8)}),
    Change("gradient not clipped", "--max-grad-norm 1e9"),
    Change("observations not normalised", "--no-norm-obs", scripts=(CONTINUOUS,)),
    Change("observations clipped to 3", "--clip-obs 3", scripts=(CONTINUOUS,)),
    Change("rewards not scaled", "--no-norm-reward", scripts=(CONTINUOUS,)),
    Change("truncation taken for death", wraps={"gae": truncation_is_death}),
    Change("reset rows learned from", wraps={"experiment.Run.count_steps": count_all}),
    Change("no entropy bonus", "--ent-coef 0", scripts=(DISCRETE,)),
    Change("PPO-Penalty for PPO-Clip", "--objective penalty"),
    Change("learning rate tied to the KL", scripts=()),
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
WRAPS = {change.name: change.wraps for change in CHANGES}


@dataclass
class Args:
    """Run the changes."""

    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    processes: int = 1  # runs at a time, each on a core of its own
    env_ids: tuple[str, ...] = ()  # all of them by default
    changes: tuple[str, ...] = ()  # names of the changes, all by default; "default" always runs
    quick: bool = False  # Acrobot, 2 seeds, 20,000 steps, few changes, to results/quick/


def main() -> None:
    args = tyro.cli(Args)
    seeds, env_ids, names, table = args.seeds, args.env_ids, args.changes, RESULTS / "details.csv"
    if args.quick:
        seeds, env_ids, table = (1, 2), ("Acrobot-v1",), RESULTS / "quick" / "details.csv"
        names = ("advantages not normalised", "reset rows learned from", "no entropy bonus")
    check_names("--changes", names, (change.name for change in CHANGES))
    check_names("--env-ids", env_ids, (env_id for tasks in TASKS.values() for env_id, _ in tasks))
    jobs = []
    for seed in seeds:
        for script, tasks in TASKS.items():
            for (env_id, steps), change in itertools.product(tasks, CHANGES):
                wanted = not names or change.name in ("default", *names)
                wanted = wanted and (not env_ids or env_id in env_ids)
                if script in change.scripts and wanted:
                    steps = 20_000 if args.quick else steps
                    flags = f"--total-timesteps {steps} {EVALUATIONS[script]} {change.flags}"
                    jobs.append(Job(script, env_id, change.name, seed, flags.strip()))
                    if change.wraps:
                        jobs[-1].program = program(script, f"details.WRAPS[{change.name!r}]")
    run_all(jobs, table, args.processes, curves=False)


if __name__ == "__main__":
    main()
