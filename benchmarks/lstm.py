"""The value of a memory: ppo_lstm.py against sb3-contrib's RecurrentPPO and four stacked frames.

    pip install -c constraints.txt -e ".[benchmark]"   # sb3-contrib among others
    python -m benchmarks.lstm                          # returns without velocities, 5 seeds
    python -m benchmarks.lstm --work maze              # a cue 20 steps back
    python -m benchmarks.lstm --work details           # the maze with one detail changed, 3 seeds
    python -m benchmarks.lstm --work speed             # steps/s at equal settings, in turn
    python -m benchmarks.lstm --work sequences         # three ways to run an LSTM over a rollout
    python -m benchmarks.tables --table lstm.csv       # and lstm_speed.csv

Returns: CartPole, Acrobot and LunarLander with all velocities set to 0, and the same steps for all.
ppo_lstm.py uses its defaults, except for longer rollouts on LunarLander, which were chosen on seeds
101 and 102. ppo_discrete.py uses its defaults, on the last four observations.
RecurrentPPO uses the hyperparameters of rl-baselines3-zoo, which tuned them without velocities on
CartPole and LunarLander, but not on Acrobot. All LSTMs have 64 units.

Maze: neither script normalises advantages, which are almost 0 once every episode pays 1. Details:
ppo_lstm.py in the maze, and two of them in CartPole, with one thing changed, by wrapping its
functions.

Speed: the same environments, rollout, minibatches, epochs and network: an LSTM of 64 units each
for policy and critic, then a layer of 64, ReLU. Every run is a separate process on one core, and
they take turns. Steps per second count from the end of the second iteration. The core may be
shared, so steps per second of processor time are reported as well.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import tyro

import ppo_lstm
from benchmarks import speed
from benchmarks.classic import SB3
from benchmarks.details import Change
from benchmarks.jobs import ROOT, Job, check_names, commit, run_jobs, wrapped_script
from benchmarks.run import SeededArgs, Training, train_all

LSTM, DISCRETE, PEER = SCRIPTS = "ppo_lstm.py", "ppo_discrete.py", "RecurrentPPO"
# Environment, steps, the indices of the velocities in its observation, and our flags.
TASKS = {
    "CartPole-v1": (100_000, (1, 3), ""),
    "Acrobot-v1": (200_000, (4, 5), ""),
    "LunarLander-v3": (1_000_000, (2, 3, 5), "--num-steps 128"),
}
MAZE = "benchmarks.lstm:TMaze-v0"


class TMaze(gym.Env):
    """A corridor whose first cell shows which way to turn at its end, `length` steps later.

    Everywhere else the observation is the same. Actions: 0 goes on, 1 and 2 turn left and right.
    The right turn at the end pays 1, any other end pays 0: without a memory the best mean is 0.5.
    """

    observation_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gym.spaces.Discrete(3)

    def __init__(self, length: int = 20):
        self.length = length

    def observe(self) -> np.ndarray:
        cue = (2.0 * self.cue - 1.0) * (self.cell == 0)
        return np.array([cue, self.cell == self.length], np.float32)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.cue, self.cell = int(self.np_random.integers(2)), 0
        return self.observe(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        at_end = self.cell == self.length
        reward = float(at_end and action == 1 + self.cue)
        self.cell = min(self.cell + 1, self.length)
        return self.observe(), reward, at_end, False, {}


if "TMaze-v0" not in gym.registry:  # this file may be imported under more than one name
    gym.register("TMaze-v0", TMaze)


def hide(env: gym.Env) -> gym.Env:
    """Set the velocities in an environment's observation to 0."""
    seen = np.ones(env.observation_space.shape, np.float32)
    seen[list(TASKS[env.spec.id][1])] = 0.0
    return gym.wrappers.TransformObservation(env, lambda obs: obs * seen, env.observation_space)


def stack_four(env: gym.Env) -> gym.Env:
    return gym.wrappers.FrameStackObservation(hide(env), 4)


# ---- What is wrapped around functions of the scripts -------------------------------------------

STACKED = {
    "experiment.make_vec": lambda make_vec, args, num_envs, **kwargs: make_vec(
        args, num_envs, wrap=stack_four, **kwargs
    )
}


def uniform_memory(memory: Any, *sizes: int) -> Any:
    net = memory(*sizes)
    for lstm in (net.actor, net.critic):
        lstm.reset_parameters()
    return net


def shared_memory(memory: Any, *sizes: int) -> Any:
    net = memory(*sizes)
    net.critic = net.actor
    return net


def deaf_policy(policy: Any, agent: Any, state: Any = None) -> Any:
    choose = policy(agent, state)
    return lambda obs, masks, begins, rng: choose(obs, masks, begins & False, rng)


def deaf_memory(remember: Any, agent: Any, obs: Any, begins: Any, state: Any) -> Any:
    return remember(agent, obs, begins & False, state)


def from_zero(remember: Any, agent: Any, obs: Any, begins: Any, state: Any) -> Any:
    return remember(agent, obs, begins, 0.0 * state)


DEAF = {"Agent.policy": deaf_policy, "Agent.remember": deaf_memory}
ONE_LSTM = Change("one LSTM for actor and critic", wraps={"Memory": shared_memory})
DETAILS = [
    (MAZE, Change("PyTorch's initial weights", wraps={"Memory": uniform_memory})),
    (MAZE, Change("state never set to 0", wraps=DEAF)),
    (MAZE, Change("update starts from a state of 0", wraps={"Agent.remember": from_zero})),
    (MAZE, ONE_LSTM),
    ("CartPole-v1", ONE_LSTM),
    ("CartPole-v1", Change("observations not normalised", "--no-norm-obs")),
]
WRAPS = {change.name: change.wraps for _, change in DETAILS}


@dataclass
class Args(SeededArgs):
    """Measure the value of a memory."""

    # What is measured.
    work: Literal["returns", "maze", "details", "speed", "sequences"] = "returns"
    rounds: int = 3  # for the speed: number of runs of each
    only: tuple[str, ...] = ()  # scripts, of ppo_lstm.py, ppo_discrete.py and RecurrentPPO


# ---- Returns -----------------------------------------------------------------------------------


def flags_of(env_id: str) -> str:
    """Return the flags of ppo_lstm.py in the maze, or without velocities."""
    if env_id == MAZE:
        return "--norm-adv none --total-timesteps 40000 --eval-episodes 100"
    steps, velocities, more = TASKS[env_id]
    hidden = " ".join(map(str, velocities))
    return f"--total-timesteps {steps} --eval-episodes 100 --hide {hidden} {more}".strip()


def trainings(args: Args, seed: int) -> Iterator[Training]:
    """Yield the runs of one seed."""
    if args.work == "maze":
        for script in (LSTM, DISCRETE):
            yield Training(script, MAZE, "default", seed, flags_of(MAZE))
    for env_id, change in DETAILS if args.work == "details" else ():
        flags = f"{flags_of(env_id)} {change.flags}".strip()
        program = wrapped_script(LSTM, f"lstm.WRAPS[{change.name!r}]")
        yield Training(LSTM, env_id, change.name, seed, flags, program)
    for env_id, (steps, *_) in TASKS.items() if args.work == "returns" else ():
        budget = f"--total-timesteps {steps}"
        stacked = wrapped_script(DISCRETE, "lstm.STACKED")
        yield Training(LSTM, env_id, "no velocities", seed, flags_of(env_id))
        yield Training(
            DISCRETE, env_id, "four frames", seed, f"{budget} --eval-episodes 100", stacked
        )
        yield Training(PEER, env_id, "its zoo's", seed, f"{budget} --recurrent", [SB3])


# ---- Steps per second at equal settings --------------------------------------------------------

EQUAL = dict(num_envs=8, num_steps=128, num_minibatches=4, update_epochs=4)


def contenders() -> list[speed.Contender]:
    """Return ours and RecurrentPPO."""
    python, runners = Path(sys.executable), speed.PEERS
    settings = replace(speed.SOLVE, total_timesteps=10_240, **EQUAL)
    flags = "--hide 1 3 --norm-adv minibatch --no-norm-obs --eval-episodes 1"
    flags += " --vectorization-mode sync"  # as RecurrentPPO has them
    ours = speed.Contender(LSTM, python, runners / "run_ours.py", settings)
    ours.flags = (*flags.split(), ROOT / LSTM)
    peer = speed.Contender(PEER, python, runners / "run_sb3.py", settings, ("recurrent",))
    return [ours, replace(peer, as_json=True)]


def measure_speed(contender: speed.Contender, number: int, core: int) -> list[dict]:
    """Return the table's line of one run."""
    settings = replace(contender.settings, seed=number)
    _, ticks = speed.run(replace(contender, settings=settings))
    first, last = ticks[speed.BURN_IN - 1], ticks[-1]
    rows, seconds, cpu = (last[name] - first[name] for name in ("rows", "time", "cpu"))
    line = {"contender": contender.name, "round": number, "rows": rows}
    line |= {"steps_per_second": round(rows / seconds), "steps_per_cpu_second": round(rows / cpu)}
    return [line | {"settings": json.dumps(EQUAL | {"hidden_size": 64}), "commit": commit()}]


# ---- Ways to run an LSTM over rows in which episodes begin --------------------------------------


def measure_sequences(rounds: int) -> None:
    """Print the least processor milliseconds for outputs and gradient of a minibatch."""
    torch.set_num_threads(1)
    args = ppo_lstm.Args()
    T, M, H = args.num_steps, args.num_envs // args.num_minibatches, args.hidden_size
    envs = ppo_lstm.make_envs(args, 1)
    agent, size = ppo_lstm.Agent(args, envs), envs.single_observation_space.shape[0]
    obs, state = torch.randn(T, M, size), torch.zeros(4, M, H)

    def by_cells(begins: Any) -> Any:
        outputs = []
        for net in (agent.memory.actor, agent.memory.critic):
            weights, h, c = net._flat_weights, state[0], state[0]
            for x, new in zip(obs, begins):
                h, c = (torch.where(new[:, None], 0.0, part) for part in (h, c))
                h, c = torch._VF.lstm_cell(x, (h, c), *weights)
                outputs.append(h)
        return outputs

    def by_stretches(begins: Any) -> Any:
        """Stretches between rows in which any episode begins, as in a2c-ppo-acktr."""
        cuts = [0, *(begins[1:].any(1).nonzero()[:, 0] + 1).tolist(), T]
        outputs, last = [], state
        for start, end in zip(cuts, cuts[1:]):
            last = last * ~begins[start][:, None]
            output, last = agent.memory(obs[start:end], last)
            outputs.append(output)
        return outputs

    ways = {
        "a loop with cells": by_cells,
        "stretches between beginnings": by_stretches,
        "padded sequences": lambda begins: agent.remember(obs, begins, state),
    }
    for length in (20, 100, 500):
        begins = torch.rand(T, M, generator=torch.Generator().manual_seed(0)) < 1.0 / length
        for name, way in ways.items():
            times = []
            for _ in range(10 * rounds):
                start = time.thread_time()
                sum(output.square().sum() for output in way(begins)).backward()
                times.append(time.thread_time() - start)
            print(f"episodes of {length} steps, {name}: {1e3 * min(times):.1f} ms", flush=True)


def main() -> None:
    args = tyro.cli(Args)
    check_names("--only", args.only, SCRIPTS)
    if args.work == "sequences":
        measure_sequences(args.rounds)
    elif args.work == "speed":
        jobs = [
            Job((contender.name, number), partial(measure_speed, contender, number))
            for number in range(1, args.rounds + 1)
            for contender in contenders()
        ]
        run_jobs(jobs, args.path("lstm_speed.csv"), ("contender", "round"))
    else:
        seeds = args.seeds[:3] if args.work == "details" else args.seeds
        chosen = [x for seed in seeds for x in trainings(args, seed)]
        chosen = [x for x in chosen if x.script in (args.only or SCRIPTS)]
        train_all(chosen, args, "lstm.csv", curves=False)


if __name__ == "__main__":
    main()
