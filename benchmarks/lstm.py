"""The value of a memory: ppo_lstm.py against sb3-contrib's RecurrentPPO and four stacked frames.

    pip install -c constraints.txt -e ".[benchmark]"   # sb3-contrib among others
    python -m benchmarks.lstm                          # returns without velocities, 5 seeds
    python -m benchmarks.lstm --work speed             # steps/s at equal settings, in turn
    python -m benchmarks.lstm --work maze              # a cue 20 steps back
    python -m benchmarks.lstm --work details           # the maze with one detail changed
    python -m benchmarks.lstm --work sequences         # three ways to run an LSTM over a rollout
    python -m benchmarks.lstm --work table             # lstm.csv as the table of the pages

Returns: CartPole, Acrobot and LunarLander with all velocities set to 0, and the same steps for all.
ppo_lstm.py and ppo_discrete.py use their defaults, the latter on the last four observations.
RecurrentPPO uses the hyperparameters of rl-baselines3-zoo (hyperparams/ppo_lstm.yml at 038ab16),
before it tuned them; Acrobot's are meant for observations with velocities. Its two LSTMs have 256
units; --units 64 gives them the size of ours and takes less time. Each run adds one line to
results/lstm.csv.

Speed: the same environments, rollout, minibatches, epochs and network: an LSTM of 64 units each
for policy and critic, then a layer of 64, ReLU. Every run is a separate process on one core, and
they take turns. Steps per second count from the end of the second iteration. The core may be
shared, so steps per second of processor time are reported as well.

Maze: neither script normalises advantages. Once every episode pays 1, normalising blows up what is
left of them, and the policy forgets a solved maze again. Details: ppo_lstm.py
in the maze, and two of them in CartPole, with one thing changed, by wrapping its functions.
"""

import csv
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import tyro

from benchmarks.jobs import (
    RESULTS,
    Shared,
    append,
    check_names,
    commit,
    launch,
    read,
    wrapped_script,
)
from benchmarks.run import Training, train_all

# Environment, steps, and the indices of the velocities in its observation.
TASKS = {
    "CartPole-v1": (100_000, (1, 3)),
    "Acrobot-v1": (200_000, (4, 5)),
    "LunarLander-v3": (300_000, (2, 3, 5)),
}
EQUAL = dict(num_envs=8, num_steps=128, num_minibatches=4, update_epochs=4, hidden_size=64)


def falling(start: float) -> Any:
    return lambda left: start * left


# From rl-baselines3-zoo; a name with "envs" or "normalize" is not RecurrentPPO's.
ZOO: dict[str, dict] = {
    "CartPole-v1": {
        "envs": 8, "n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98,
        "n_epochs": 20, "learning_rate": falling(1e-3), "clip_range": falling(0.2),
    },
    "Acrobot-v1": {
        "envs": 16, "normalize": True, "n_steps": 256, "gae_lambda": 0.94, "gamma": 0.99,
        "n_epochs": 4,
    },
    "LunarLander-v3": {
        "envs": 16, "n_steps": 1024, "batch_size": 64, "gae_lambda": 0.98, "gamma": 0.999,
        "n_epochs": 4, "ent_coef": 0.01,
    },
}  # fmt: skip


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


class Hide(gym.ObservationWrapper):
    """Sets numbers of the observation to 0."""

    def observation(self, obs: np.ndarray) -> np.ndarray:
        obs = np.array(obs, np.float32)
        obs[list(TASKS[self.env.spec.id][1])] = 0.0
        return obs


if "TMaze-v0" not in gym.registry:  # this file may be imported under more than one name
    gym.register("TMaze-v0", TMaze)

# Wrapped around ppo_discrete.py: the last four observations instead of one.
STACKED = {
    "experiment.make_vec": lambda make_vec, args, num_envs, **kwargs: make_vec(
        args, num_envs, wrap=lambda env: gym.wrappers.FrameStackObservation(Hide(env), 4), **kwargs
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


# What Python wraps around functions of ppo_lstm.py.
CHANGES: dict[str, dict] = {
    "PyTorch's initial weights": {"Memory": uniform_memory},
    "state never set to 0": {
        "Agent.policy": deaf_policy,
        "Agent.remember": lambda remember, agent, obs, begins, state: remember(
            agent, obs, begins & False, state
        ),
    },
    "update starts from a state of 0": {
        "Agent.remember": lambda remember, agent, obs, begins, state: remember(
            agent, obs, begins, 0.0 * state
        ),
    },
    "one LSTM for actor and critic": {"Memory": shared_memory},
}
IN_CART_POLE = {"one LSTM for actor and critic": "", "observations not normalised": "--no-norm-obs"}


@dataclass
class Args(Shared):
    """Measure the value of a memory."""

    # What is measured.
    work: Literal["returns", "speed", "maze", "details", "sequences", "table"] = "returns"
    env_ids: tuple[str, ...] = ()  # of the returns and the details; all of them by default
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    rounds: int = 3  # for the speed: number of runs of each
    core: int = 0  # the core on which they run
    units: int = 256  # of each LSTM of RecurrentPPO
    only: tuple[str, ...] = ()  # scripts, of ppo_lstm.py, ppo_discrete.py and RecurrentPPO


# ---- RecurrentPPO ------------------------------------------------------------------------------


def evaluate(model: Any, envs: Any, deterministic: bool) -> np.ndarray:
    """Return the returns of one episode of each environment."""
    obs, state = envs.reset(), None
    returns, running = np.zeros(envs.num_envs), np.ones(envs.num_envs, bool)
    begins = np.ones(envs.num_envs, bool)
    while running.any():
        actions, state = model.predict(obs, state, begins, deterministic=deterministic)
        obs, rewards, begins, _ = envs.step(actions)
        returns[running] += rewards[running]
        running &= ~begins
    return returns


def learn_peer(
    env_id: str, seed: int, total_timesteps: int, units: int, run_dir: Path = Path("runs", "peer")
) -> None:
    """Train RecurrentPPO with the zoo's settings, and write what our scripts write."""
    import torch
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    from benchmarks.peers.learn_sb3 import Curve

    torch.set_num_threads(1)
    run_dir.mkdir(parents=True, exist_ok=True)
    settings = dict(ZOO[env_id])
    envs: Any = make_vec_env(env_id, settings.pop("envs"), seed=seed, wrapper_class=Hide)
    normalised = settings.pop("normalize", False)
    if normalised:
        envs = VecNormalize(envs, gamma=settings["gamma"])
    logs = tempfile.mkdtemp()
    model = RecurrentPPO(
        "MlpLstmPolicy",
        envs,
        **settings,
        policy_kwargs=dict(lstm_hidden_size=units),
        seed=seed,
        device="cpu",
        tensorboard_log=logs,
    )
    curve, start = Curve(), time.perf_counter()
    model.learn(total_timesteps, callback=curve, log_interval=1)
    sps = int(model.num_timesteps / (time.perf_counter() - start))
    with open(run_dir / "metrics.csv", "w", newline="") as file:
        csv.writer(file).writerows([("global_step", "charts/episodic_return"), *curve.rows])
    scores = []
    for deterministic in (True, False):
        envs = make_vec_env(env_id, 100, seed=12345, wrapper_class=Hide)
        if normalised:
            envs = VecNormalize(envs, training=False, norm_reward=False)
            envs.obs_rms = model.get_vec_normalize_env().obs_rms
        scores.append(evaluate(model, envs, deterministic))
    likeliest, sampled = scores
    last = curve.episodes[-100:]
    results = {
        "global_step": model.num_timesteps,
        "eval_mean": likeliest.mean(),
        "eval_std": likeliest.std(),
        "eval_stochastic_mean": sampled.mean(),
        "eval_episodes": 100,
        "train_return": float(np.mean(last)) if last else None,
        "sps": sps,
    }
    (run_dir / "results.json").write_text(json.dumps(results))


# ---- Steps per second at equal settings --------------------------------------------------------

SPEED_STEPS = 10 * EQUAL["num_envs"] * EQUAL["num_steps"]


def ticks_of_ours(seed: int) -> list[tuple[int, float, float]]:
    """Train ppo_lstm.py; return rows, time and processor seconds after each iteration."""
    import ppo_lstm

    ticks: list[tuple[int, float, float]] = []
    args = ppo_lstm.Args(
        hide=TASKS["CartPole-v1"][1],
        vectorization_mode="sync",  # as RecurrentPPO has them
        total_timesteps=SPEED_STEPS,
        seed=seed,
        norm_adv="minibatch",
        norm_obs=False,
        eval_episodes=1,
        run_dir=Path(tempfile.mkdtemp(), "run"),
        **EQUAL,
    )
    rows = args.batch_size

    def tick(step: int, metrics: dict) -> None:
        ticks.append((rows * (len(ticks) + 1), time.time(), time.process_time()))

    ppo_lstm.train(args, on_iteration=tick)
    return ticks


def ticks_of_peer(seed: int) -> list[tuple[int, float, float]]:
    """Train RecurrentPPO; return the same."""
    import torch
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    ticks: list[tuple[int, float, float]] = []

    class Tick(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            if self.num_timesteps:
                ticks.append((self.num_timesteps, time.time(), time.process_time()))

    torch.set_num_threads(1)
    size = EQUAL["hidden_size"]
    model = RecurrentPPO(
        "MlpLstmPolicy",
        make_vec_env("CartPole-v1", EQUAL["num_envs"], seed=seed, wrapper_class=Hide),
        n_steps=EQUAL["num_steps"],
        batch_size=EQUAL["num_envs"] * EQUAL["num_steps"] // EQUAL["num_minibatches"],
        n_epochs=EQUAL["update_epochs"],
        learning_rate=falling(2.5e-3),
        ent_coef=0.01,
        vf_coef=0.25,  # it does not halve the loss
        policy_kwargs=dict(
            lstm_hidden_size=size,
            net_arch=dict(pi=[size], vf=[size]),
            activation_fn=torch.nn.ReLU,
        ),
        device="cpu",
        seed=seed,
        tensorboard_log=tempfile.mkdtemp(),
    )
    model.learn(SPEED_STEPS, callback=Tick(), log_interval=1)
    return [*ticks, (SPEED_STEPS, time.time(), time.process_time())]


def measure_speed(args: Args) -> None:
    speeds_table = args.path("lstm_speed.csv")
    for number in range(1, args.rounds + 1):
        for name, function in (("ppo_lstm.py", "ours"), ("RecurrentPPO", "peer")):
            code = "import json; from benchmarks import lstm; "
            code += f"print(json.dumps(lstm.ticks_of_{function}({number})))"
            printed = launch(["-c", code], core=args.core).printed
            _, first, *_, last = json.loads(printed.splitlines()[-1])
            rows, seconds, cpu = (b - a for a, b in zip(first, last))
            line = {
                "contender": name,
                "round": number,
                "rows": rows,
                "steps_per_second": round(rows / seconds),
                "steps_per_cpu_second": round(rows / cpu),
                "settings": json.dumps(EQUAL),
                "commit": commit(),
            }
            append(speeds_table, [line])
            speeds = f"{line['steps_per_second']:,} steps/s"
            speeds += f", {line['steps_per_cpu_second']:,} a second of the processor"
            print(f"{name}, round {number}: {speeds}", flush=True)
    lines = read(speeds_table)
    for column in ("steps_per_second", "steps_per_cpu_second"):
        ours, theirs = (
            np.median([float(x[column]) for x in lines if x["contender"] == name])
            for name in ("ppo_lstm.py", "RecurrentPPO")
        )
        print(f"{column}: {ours:,.0f} and {theirs:,.0f}, medians: {ours / theirs:.1f} times")


# ---- Ways to run an LSTM over rows in which episodes begin --------------------------------------


def measure_sequences(rounds: int) -> None:
    """Print the least processor milliseconds for outputs and gradient of a minibatch."""
    import torch

    import ppo_lstm

    torch.set_num_threads(1)
    args = ppo_lstm.Args()
    T, M, H = args.num_steps, args.num_envs // args.num_minibatches, args.hidden_size
    envs = ppo_lstm.make_envs(args, 1)
    agent, size = ppo_lstm.Agent(args, envs), envs.single_observation_space.shape[0]
    envs.close()
    obs, state = torch.randn(T, M, size), torch.zeros(4, M, H)

    def by_cells(obs: Any, begins: Any) -> Any:
        outputs = []
        for net in (agent.memory.actor, agent.memory.critic):
            weights, h, c = net._flat_weights, state[0], state[0]
            for x, new in zip(obs, begins):
                h, c = (torch.where(new[:, None], 0.0, part) for part in (h, c))
                h, c = torch._VF.lstm_cell(x, (h, c), *weights)
                outputs.append(h)
        return outputs

    def by_stretches(obs: Any, begins: Any) -> Any:
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
        "padded sequences": lambda obs, begins: agent.remember(obs, begins, state),
    }
    for length in (20, 100, 500):
        begins = torch.rand(T, M, generator=torch.Generator().manual_seed(0)) < 1.0 / length
        for name, way in ways.items():
            times = []
            for _ in range(10 * rounds):
                start = time.thread_time()
                sum(output.square().sum() for output in way(obs, begins)).backward()
                times.append(time.thread_time() - start)
            print(f"episodes of {length} steps, {name}: {1e3 * min(times):.1f} ms", flush=True)


# ---- Returns -----------------------------------------------------------------------------------


MAZE, MAZE_FLAGS = "benchmarks.lstm:TMaze-v0", "--norm-adv none --total-timesteps 40000"
MAZE_FLAGS += " --eval-episodes 100"


def table() -> str:
    """Return lstm.csv as a Markdown table."""
    groups: dict[tuple, list[dict]] = {}
    for row in read(RESULTS / "lstm.csv"):
        key = row["env_id"].rpartition(":")[2], row["script"], row["config"]
        groups.setdefault(key, []).append(row)
    lines = [
        "| environment | script | | steps | seeds | likeliest actions | lowest seed | sampled |"
    ]
    lines.append("|---|---|---|---:|---:|---:|---:|---:|")
    env_ids = [env_id for env_id, *_ in groups]
    for key, rows in sorted(groups.items(), key=lambda group: env_ids.index(group[0][0])):
        likeliest, sampled, steps = (
            np.array([float(row[name]) for row in rows])
            for name in ("eval_mean", "eval_stochastic_mean", "global_step")
        )
        form = ",.2f" if "TMaze" in key[0] else ",.1f"
        cells = [*key, f"{steps.mean():,.0f}", str(len(rows))]
        cells += [f"{x:{form}}" for x in (likeliest.mean(), likeliest.min(), sampled.mean())]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def detail_trainings(args: Args) -> list[Training]:
    steps, hidden = TASKS["CartPole-v1"]
    flags = f"--total-timesteps {steps} --eval-episodes 100 --hide {' '.join(map(str, hidden))}"
    tasks = [(MAZE, name, MAZE_FLAGS) for name in CHANGES]
    tasks += [
        ("CartPole-v1", name, f"{flags} {more}".strip()) for name, more in IN_CART_POLE.items()
    ]
    trainings = []
    for seed in args.seeds[:3]:
        for env_id, name, flags in tasks:
            if args.env_ids and env_id not in args.env_ids:
                continue
            wraps = wrapped_script("ppo_lstm.py", f"lstm.CHANGES.get({name!r}, {{}})")
            trainings.append(Training("ppo_lstm.py", env_id, name, seed, flags, wraps))
    return trainings


def maze_trainings(args: Args) -> list[Training]:
    return [
        Training(script, MAZE, "default", seed, MAZE_FLAGS)
        for seed in args.seeds
        for script in ("ppo_lstm.py", "ppo_discrete.py")
    ]


def trainings_without_velocities(args: Args) -> list[Training]:
    peer = "import tyro; from benchmarks import lstm; tyro.cli(lstm.learn_peer)"
    stacked = wrapped_script("ppo_discrete.py", "lstm.STACKED")
    trainings = []
    for env_id, (steps, hidden) in TASKS.items():
        if args.env_ids and env_id not in args.env_ids:
            continue
        budget, hide = f"--total-timesteps {steps}", f"--hide {' '.join(map(str, hidden))}"
        ours = f"{budget} --eval-episodes 100"
        for seed in args.seeds:
            trainings += [
                Training("ppo_lstm.py", env_id, "no velocities", seed, f"{ours} {hide}"),
                Training("ppo_discrete.py", env_id, "four frames", seed, ours, stacked),
                Training(
                    "RecurrentPPO",
                    env_id,
                    f"its zoo's, {args.units} units",
                    seed,
                    f"{budget} --units {args.units}",
                    ("-c", peer),
                ),
            ]
    return trainings


def main() -> None:
    args = tyro.cli(Args)
    check_names("--env-ids", args.env_ids, [*TASKS, MAZE])
    check_names("--only", args.only, ("ppo_lstm.py", "ppo_discrete.py", "RecurrentPPO"))
    if args.work == "speed":
        measure_speed(args)
        return
    if args.work == "sequences":
        measure_sequences(args.rounds)
        return
    if args.work == "table":
        print(table())
        return
    works = {"maze": maze_trainings, "details": detail_trainings}
    trainings = works.get(args.work, trainings_without_velocities)(args)
    trainings = [x for x in trainings if not args.only or x.script in args.only]
    train_all(trainings, args.path("lstm.csv"), processes=1, curves=False)


if __name__ == "__main__":
    main()
