"""The same PPO work by ours and by the peers: steps per second, time to solve CartPole, memory.

    python -m benchmarks.speed                        # CartPole, eager and compiled
    python -m benchmarks.speed --work half-cheetah
    python -m benchmarks.speed --work pong            # against CleanRL only
    python -m benchmarks.speed --work solve           # CartPole solved, from process start
    python -m benchmarks.speed --threads 2            # any of them on two cores
    python -m benchmarks.tables --table speed.csv --part solve

Only peers with a virtual environment in --envs are measured; `benchmarks/peers/install.sh` creates
them. CleanRL, LeanRL and PureJaxRL also need checkouts: --cleanrl, --leanrl, --purejaxrl PATH.
benchmarks/README.md says how the work is made equal, and counted. A run is a line of speed.csv.

Steps per second are rows per wall second from the end of the second iteration to the end of the
last, so without imports and compilation. The time to solve CartPole runs from the start of the
process, including imports and compilation but not the evaluations.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks import jobs
from benchmarks.jobs import ROOT, Failed, Finished
from benchmarks.peers.common import SOLVED, Settings

PEERS = ROOT / "benchmarks" / "peers"

CARTPOLE = Settings()  # CleanRL's defaults
HALF_CHEETAH = Settings(  # CleanRL's defaults
    env_id="HalfCheetah-v5",
    total_timesteps=40_960,
    num_envs=1,
    num_steps=2048,
    update_epochs=10,
    num_minibatches=32,
    learning_rate=3e-4,
    ent_coef=0.0,
    normalise=True,
)
PONG = Settings(  # CleanRL's defaults
    env_id="ALE/Pong-v5",
    total_timesteps=8_192,
    num_envs=8,
    clip_coef=0.1,
    activation="relu",
)
SOLVE = Settings(  # our defaults
    total_timesteps=50_000,
    num_envs=32,
    num_steps=32,
    update_epochs=10,
    learning_rate=2.5e-3,
    clip_vloss=False,
    activation="relu",
)
ZOO = replace(  # what rl-baselines3-zoo found best for CartPole with Stable-Baselines3
    SOLVE,
    total_timesteps=100_000,
    num_envs=8,
    update_epochs=20,
    num_minibatches=1,
    learning_rate=1e-3,
    gamma=0.98,
    gae_lambda=0.8,
    ent_coef=0.0,
    vf_coef=1.0,  # Stable-Baselines3's 0.5, of a loss that it does not halve
    activation="tanh",
    anneal_clip=True,
)
OWN = replace(CARTPOLE, total_timesteps=500_000)  # what CleanRL and PureJaxRL come with
# The flags that the scripts share; the rest of the settings are each contender's own affair.
FLAGS = "env_id total_timesteps seed num_envs num_steps update_epochs num_minibatches learning_rate"
FLAGS += " gamma gae_lambda clip_coef clip_vloss ent_coef vf_coef max_grad_norm"
BURN_IN = 2  # iterations before steps per second are counted
LIMIT = 1200  # seconds after which a run is stopped


@dataclass
class Args(jobs.Shared):
    """Measure our scripts and the peers in turn."""

    work: Literal["cart-pole", "half-cheetah", "pong", "solve"] = "cart-pole"  # the work to do
    rounds: int = 5  # runs of each contender, each with a different seed
    threads: int = 1  # cores and PyTorch threads of each
    envs: Path = ROOT / ".venv-peers"  # a folder with a virtual environment for each peer
    cleanrl: Path | None = None  # a checkout of CleanRL
    leanrl: Path | None = None  # a checkout of LeanRL
    purejaxrl: Path | None = None  # a checkout of PureJaxRL
    only: tuple[str, ...] = ()  # names of the contenders, by default all that can run here
    quick: bool = False  # 1 round of fewer rows


@dataclass
class Contender:
    """A program that does the work, and how to start it."""

    name: str
    python: Path
    script: Path
    settings: Settings
    flags: tuple[object, ...] = ()  # after those of the settings
    as_json: bool = False  # takes the settings as JSON, not as flags
    countable: bool = True  # its steps are Gymnasium's and PyTorch's, uncompiled
    package: str = "torch"  # whose version the table names, beside
    checkout: Path | None = None  # the commit of this folder
    remark: str = ""  # what differs from the settings


def our_contenders(work: str, settings: Settings) -> list[Contender]:
    """Return our script, and the same compiled."""
    scripts = {"half-cheetah": "ppo_continuous.py", "pong": "ppo_atari.py"}
    name = scripts.get(work, "ppo_discrete.py")
    # Our default normalises advantages over the batch, the peers over each minibatch.
    flags = ("--norm-adv", "batch" if work == "solve" else "minibatch", "--eval-episodes", 1)
    flags += ("--num-threads", settings.threads)
    flags += () if work == "pong" else ("--activation", settings.activation)
    if work == "half-cheetah":
        flags += ("--log-std-init", 0.0, "--log-std-fall", None, "--no-scale-actions")
    remark = {
        "cart-pole": "Gymnasium's vectorised CartPole",
        "solve": "Gymnasium's vectorised CartPole, advantages normalised over the batch",
        "half-cheetah": "statistics updated once per rollout",
        "pong": "",
    }[work]
    python, path = Path(sys.executable), ROOT / name
    eager = Contender(name, python, PEERS / "run_ours.py", settings, (*flags, path))
    eager.checkout, eager.remark = ROOT, remark
    flags = (*flags, "--compile", path)
    return [eager, replace(eager, name=f"{name} --compile", flags=flags, countable=False)]


def peers(args: Args, settings: Settings) -> list[Contender]:
    """Return the peers that can do the work, by their runners."""

    def peer(name: str, folder: str, *flags: object, **more: Any) -> Contender:
        python = args.envs / folder / "bin" / "python"
        return Contender(name, python, PEERS / f"run_{folder}.py", settings, flags, **more)

    found = []
    on_cartpole, whole = settings.env_id == CARTPOLE.env_id, "advantages normalised over the batch"
    vectorised = "Gymnasium's vectorised CartPole, " if on_cartpole else ""
    for name, folder, package, remark in (
        ("Stable-Baselines3", "sb3", "stable-baselines3", ""),
        ("Tianshou", "tianshou", "tianshou", ""),
        ("torchrl", "torchrl", "torchrl", ""),
        ("skrl", "skrl", "skrl", vectorised + whole),
        ("rlox", "rlox", "rlox", "environment in Rust" if on_cartpole else ""),
    ):
        if args.work != "pong":
            library = peer(name, folder, as_json=True, package=package, remark=remark)
            library.countable = "in Rust" not in remark
            found.append(library)
    if args.work != "pong":
        sbx = peer("SBX", "sbx", "sbx", as_json=True, countable=False, package="sbx-rl")
        sbx.script = PEERS / "run_sb3.py"
        sbx.remark = "networks in JAX, value loss not clipped, gradient clipped per network"
        found.append(sbx)
    if args.cleanrl:
        scripts = {"half-cheetah": "ppo_continuous_action.py", "pong": "ppo_atari.py"}
        script = scripts.get(args.work, "ppo.py")
        path = args.cleanrl / "cleanrl" / script
        cleanrl = peer(f"CleanRL {script}", "cleanrl", path, checkout=args.cleanrl)
        if args.work == "pong":  # its script skips frames by itself
            pong = replace(settings, env_id="PongNoFrameskip-v4")
            cleanrl = replace(cleanrl, settings=pong, remark="no sticky actions")
        elif settings.activation != "tanh":
            cleanrl.remark = "tanh"
        found.append(cleanrl)
    if args.leanrl and args.work == "half-cheetah":  # it has none for CartPole
        path = args.leanrl / "leanrl" / "ppo_continuous_action.py"
        leanrl = peer("LeanRL", "leanrl", path, checkout=args.leanrl, remark="no TensorBoard")
        leanrl.script = PEERS / "run_cleanrl.py"
        flags = ("--compile", path.with_name("ppo_continuous_action_torchcompile.py"))
        compiled = replace(leanrl, name="LeanRL, compiled", flags=flags, countable=False)
        found += [leanrl, compiled]
    if args.purejaxrl and settings.env_id == CARTPOLE.env_id:
        path = args.purejaxrl / "purejaxrl"
        jax = peer("PureJaxRL", "purejaxrl", path, as_json=True, countable=False, package="jax")
        remark = "environment in JAX, no TensorBoard"
        remark += "" if settings.clip_vloss else ", value loss clipped"
        found.append(replace(jax, checkout=args.purejaxrl, remark=remark))
    return found


def contenders(args: Args) -> list[Contender]:
    """Return the contenders that can run here; report those that cannot."""
    works = {"cart-pole": CARTPOLE, "half-cheetah": HALF_CHEETAH, "pong": PONG, "solve": SOLVE}
    settings = replace(works[args.work], threads=args.threads)
    if args.quick and args.work != "solve":
        settings = replace(settings, total_timesteps=max(4096, 4 * settings.batch_size))
    found = [*our_contenders(args.work, settings), *peers(args, settings)]
    if args.work == "solve" and not args.quick:  # also each with its own settings
        zoo, own = (replace(x, threads=args.threads) for x in (ZOO, OWN))
        tuned = [c for c in peers(args, zoo) if c.name == "Stable-Baselines3"]
        tuned += [c for c in peers(args, own) if c.checkout]
        found += [replace(c, name=f"{c.name}, its own settings") for c in tuned]
    jobs.check_names("--only", args.only, (c.name for c in found))
    found = [c for c in found if c.name in (args.only or [c.name])]
    for contender in [c for c in found if not c.python.exists()]:
        print(f"left out: {contender.name}, for there is no {contender.python}", file=sys.stderr)
        found.remove(contender)
    return found


def flag(name: str, value: object) -> str:
    """Return a flag as tyro reads it."""
    return f"--{'no-' * (not value)}{name}" if isinstance(value, bool) else f"--{name}={value}"


def run(contender: Contender, **environment: str) -> tuple[Finished, list[dict]]:
    """Run it once; return what it left behind, and what it reported at each tick."""
    settings = asdict(contender.settings)
    words = [flag(name.replace("_", "-"), settings[name]) for name in FLAGS.split()]
    words = [json.dumps(settings)] if contender.as_json else words
    threads = contender.settings.threads
    environment |= {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    environment["PYTHONPATH"] = ":".join(map(str, (PEERS, ROOT, contender.checkout or "")))
    finished = jobs.launch(
        [contender.script],
        [*words, *contender.flags],
        core=",".join(map(str, range(threads))),
        python=contender.python.absolute(),
        environment=environment,
        limit=LIMIT,
    )
    lines = finished.printed.splitlines()
    return finished, [json.loads(line) for line in lines if line.startswith('{"rows"')]


def check_work(contender: Contender) -> str:
    """Run two iterations and count; return the counts, or raise if they are not as asked."""
    if not contender.countable:
        return "its steps are compiled and cannot be counted from outside, only its rows"
    s = replace(contender.settings, total_timesteps=2 * contender.settings.batch_size)
    *_, last = run(replace(contender, settings=s), BENCHMARK_COUNT="1")[1]
    env_steps, gradient_steps = last["env_steps"], last["gradient_steps"]
    wanted = 2 * s.update_epochs * s.num_minibatches
    # A library that spends a row on the reset takes one environment step fewer per episode.
    same = last["rows"] == s.total_timesteps and gradient_steps == wanted
    if not same or not 0.9 * s.total_timesteps <= env_steps <= s.total_timesteps:
        raise Failed(
            f"{contender.name} did {env_steps} environment steps and {gradient_steps} optimiser "
            f"steps on {last['rows']} rows, where {wanted} on {s.total_timesteps} were asked for"
        )
    return f"{gradient_steps} optimiser steps on {last['rows']} rows"


def versions(contender: Contender) -> str:
    """Return the versions of the library, of PyTorch or JAX, and the commit of a checkout."""
    code = "import sys; from importlib.metadata import version as v; "
    code += "print(*(f'{p} {v(p)}' for p in sys.argv[1:]), sep=', ')"
    base = [] if contender.package in ("torch", "jax") else ["torch"]
    words = [contender.python.absolute(), "-c", code, contender.package, *base]
    text = subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True).stdout
    return text.strip() + (f", {jobs.commit(contender.checkout)}" if contender.checkout else "")


def measure(contender: Contender, work: str, number: int) -> dict:
    """Return the table's line of one run."""
    settings, at = replace(contender.settings, seed=number), jobs.commit()
    environment = {"BENCHMARK_SOLVE": "1"} if work == "solve" else {}
    process, ticks = run(replace(contender, settings=settings), **environment)
    first = ticks[BURN_IN - 1] if len(ticks) > 2 else ticks[0]
    rate = (ticks[-1]["rows"] - first["rows"]) / (ticks[-1]["time"] - first["time"])
    solved = ticks[-1].get("score", 0.0) >= SOLVED
    wanted = settings.num_iterations * settings.batch_size
    if ticks[-1]["rows"] != wanted and not solved:
        raise Failed(f"{contender.name} did {ticks[-1]['rows']} rows, not {wanted}")
    return {
        "work": work,
        "threads": settings.threads,
        "contender": contender.name,
        "round": number,
        "rows": ticks[-1]["rows"],
        "steps_per_second": round(rate),
        "solved_seconds": round(ticks[-1]["time"] - process.started, 2) if solved else "",
        "score": ticks[-1].get("score", ""),  # of the last evaluation
        "process_seconds": round(process.seconds, 2),
        "peak_mb": round(process.memory),
        "versions": versions(contender),
        "remark": contender.remark,
        # The seed is the round.
        "settings": json.dumps({k: v for k, v in asdict(settings).items() if k != "seed"}),
        "flags": " ".join(f for f in map(str, contender.flags) if "/" not in f),
        "commit": at,
    }


def runs_in_turn(args: Args) -> Iterator[jobs.Job]:
    """Yield the runs, round after round. A contender that fails is left out from then on."""
    found, checked, failed = contenders(args), set(), set()

    def measure_unless_failed(contender: Contender, number: int, core: int) -> list[dict]:
        if contender.name in failed:
            raise Failed("left out, because it failed before")
        failed.add(contender.name)
        if contender.name not in checked:
            checked.add(contender.name)
            print(f"{contender.name}: {check_work(contender)}", flush=True)
        line = measure(contender, args.work, number)
        failed.remove(contender.name)
        return [line]

    for number in range(1, 2 if args.quick else args.rounds + 1):
        for contender in found:
            key = (args.work, args.threads, contender.name, number)
            yield jobs.Job(key, partial(measure_unless_failed, contender, number))


def main() -> None:
    args = tyro.cli(Args)
    for name in ("cleanrl", "leanrl", "purejaxrl"):  # contenders run in another folder
        path = getattr(args, name)
        setattr(args, name, path.absolute() if path else None)
    jobs.run_jobs(
        runs_in_turn(args), args.path("speed.csv"), ("work", "threads", "contender", "round")
    )


if __name__ == "__main__":
    main()
