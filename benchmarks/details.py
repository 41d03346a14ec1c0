"""Measure the effect of each detail of PPO: change one at a time, all else at the default.

    python -m benchmarks.details --processes 2              # 5 seeds, lines of details.csv
    python -m benchmarks.tables --table details.csv
    python -m benchmarks.figures --table details.csv

Most changes are flags. Five details have none, because nobody should switch them off: for those,
functions of the script are wrapped.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import tyro

from benchmarks.jobs import check_names, wrapped_script
from benchmarks.run import SeededArgs, Training, train_all

DISCRETE, CONTINUOUS = "ppo_discrete.py", "ppo_continuous.py"
BOTH = (DISCRETE, CONTINUOUS)
TASKS = {  # two of each kind: environment, steps
    DISCRETE: (("Acrobot-v1", 100_000), ("LunarLander-v3", 300_000)),
    CONTINUOUS: (("HalfCheetah-v5", 300_000), ("Hopper-v5", 300_000)),
}
EVALUATIONS = {DISCRETE: "--eval-episodes 100", CONTINUOUS: "--eval-episodes 20"}


def fixed(**arguments: object) -> Callable:
    """Return a wrapper that calls a function with these arguments, whatever the caller passed."""
    return lambda function, *args, **kwargs: function(*args, **kwargs | arguments)


def truncation_is_death(gae: Callable, terminated, done, **rollout):
    return gae(terminated=done, done=done, **rollout)


def count_all(count_steps: Callable, run, is_transition, *arrays):
    is_transition[:] = True
    count_steps(run, is_transition, *arrays)


@dataclass
class Change:
    """A changed detail, by flags or by wrapping functions of the script."""

    name: str  # as the table names it
    flags: str = ""
    wraps: dict[str, Callable] = field(default_factory=dict)
    scripts: tuple[str, ...] = BOTH


CHANGES = [
    Change("default"),
    Change("advantages not normalised", "--norm-adv none"),
    Change("advantages normalised by minibatch", "--norm-adv minibatch", scripts=(DISCRETE,)),
    Change("advantages normalised over the batch", "--norm-adv batch", scripts=(CONTINUOUS,)),
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
    Change("discount 0.995", "--gamma 0.995", scripts=(CONTINUOUS,)),
    Change("8 environments x 256 steps", "--num-envs 8 --num-steps 256", scripts=(CONTINUOUS,)),
    Change("std learned, not annealed", "--log-std-fall None", scripts=(CONTINUOUS,)),
    Change(  # with an annealed std, an entropy bonus has no effect
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
class Args(SeededArgs):
    """Measure the effect of each detail of PPO."""

    changes: tuple[str, ...] = ()  # names of the changes, all by default; "default" always runs
    quick: bool = False  # Acrobot, 2 seeds, 20,000 steps, few changes


def main() -> None:
    args = tyro.cli(Args)
    check_names("--changes", args.changes, (change.name for change in CHANGES))
    names = args.changes or [change.name for change in CHANGES]
    if args.quick:
        args.seeds, args.env_ids = (1, 2), ("Acrobot-v1",)
        names = ("advantages not normalised", "reset rows learned from", "no entropy bonus")
    chosen = [change for change in CHANGES if change.name in ("default", *names)]
    trainings = []
    for seed, script in itertools.product(args.seeds, TASKS):
        for (env_id, steps), change in itertools.product(TASKS[script], chosen):
            steps = 20_000 if args.quick else steps
            flags = f"--total-timesteps {steps} {EVALUATIONS[script]} {change.flags}".strip()
            program = wrapped_script(script, f"details.WRAPS[{change.name!r}]")
            if script in change.scripts:
                trainings.append(Training(script, env_id, change.name, seed, flags, program))
    train_all(trainings, args, "details.csv", curves=False)


if __name__ == "__main__":
    main()
