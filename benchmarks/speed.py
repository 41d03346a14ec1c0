"""The same PPO work by us and by the peers: steps per second, time to solve CartPole, memory.

    python benchmarks/speed.py                        # CartPole, eager and compiled
    python benchmarks/speed.py --work half-cheetah
    python benchmarks/speed.py --work pong            # beside CleanRL alone
    python benchmarks/speed.py --work solve           # CartPole solved, from process start
    python benchmarks/speed.py --threads 2            # any of them on two cores

Measured are those peers that have an environment in --envs, which `benchmarks/peers/install.sh`
makes; CleanRL, LeanRL and PureJaxRL also need their checkouts: --cleanrl, --leanrl, --purejaxrl
PATH. Every contender is a process of its own, on one core with one thread, and they run in turn,
round after round. Two iterations before the timed rounds count what each does: optimiser steps and
environment steps must be what the settings ask for, or the contender is left out.

Steps per second are rows per wall second from the end of the second iteration to the end of the
last, so without imports and compilation. Solved means a mean return of 475 in 100 episodes by the
likeliest actions; the time runs from the start of the process, imports and compilation included,
without those evaluations, which take place about every 2,000 rows. One line a run goes to
results/speed.csv; `python benchmarks/report.py --table speed.csv --work solve` prints them.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).parent.parent
PEERS = ROOT / "benchmarks" / "peers"
sys.path[:0] = [str(PEERS), str(ROOT / "benchmarks")]

from common import SOLVED, Settings  # noqa: E402
from run import RESULTS, append, check_names, commit, read  # noqa: E402

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
LIMIT = 1200  # seconds after which a run is given up
# The third argument of TransformObservation came with Gymnasium 1.0.
GYMNASIUM_1 = {"np.clip(obs, -10, 10))": "np.clip(obs, -10, 10), None)"}
# With PyTorch 2.13 the copy of the agent that acts wants gradients, and LeanRL stops at .numpy().
NO_GRAD = {
    f"    {name} = agent_inference.{method}\n": (
        f"    {name} = torch.no_grad()(agent_inference.{method})\n"
    )
    for name, method in (("policy", "get_action_and_value"), ("get_value", "get_value"))
}
# So did new names of wrappers, and games have to be registered.
ATARI = {
    "import gymnasium as gym\n": "import ale_py\nimport gymnasium as gym\n",
    "gym.wrappers.GrayScaleObservation(env)": "gym.wrappers.GrayscaleObservation(env)",
    "gym.wrappers.FrameStack(env, 4)": "gym.wrappers.FrameStackObservation(env, 4)",
}
WANDB = "wandb = __import__('types').SimpleNamespace(init=lambda **_: 0, log=lambda *_, **__: 0)"


@dataclass
class Args:
    """Measure ourselves and the peers in turn."""

    work: Literal["cart-pole", "half-cheetah", "pong", "solve"] = "cart-pole"  # what is to be done
    rounds: int = 5  # times that each contender is run, each with another seed
    threads: int = 1  # cores and PyTorch threads of each
    envs: Path = ROOT / ".venv-peers"  # a folder with an environment for each peer
    cleanrl: Path | None = None  # a checkout of CleanRL
    leanrl: Path | None = None  # a checkout of LeanRL
    purejaxrl: Path | None = None  # a checkout of PureJaxRL
    only: tuple[str, ...] = ()  # contenders whose names begin so, instead of all
    skip: tuple[str, ...] = ()  # contenders of just these names are left out
    quick: bool = False  # 1 round of fewer rows, to results/quick/


@dataclass
class Contender:
    """A program that does the work, and how it is told to."""

    name: str
    python: Path
    script: Path
    settings: Settings
    flags: tuple[object, ...] = ()  # after those of the settings
    patches: dict[str, str] = field(default_factory=dict)  # of the script, in a copy
    runner: bool = False  # takes the settings as JSON, not as flags
    countable: bool = True  # its steps are Gymnasium's and PyTorch's, and not compiled
    package: str = "torch"  # whose version the table names, beside
    checkout: Path | None = None  # the commit of this folder
    remark: str = ""  # what differs from the settings


def patched(source: str, patches: dict[str, str]) -> str:
    """Return `source` with each key, which must stand there exactly once, made its value."""
    for old, new in patches.items():
        if source.count(old) != 1:
            raise ValueError(f"a patch fits in {source.count(old)} places, not one: {old!r}")
        source = source.replace(old, new)
    return source


def ours(work: str, settings: Settings) -> list[Contender]:
    scripts = {"half-cheetah": "ppo_continuous.py", "pong": "ppo_atari.py"}
    script = ROOT / scripts.get(work, "ppo_discrete.py")
    # Our default normalises advantages over the batch, the peers do it a minibatch at a time.
    flags = ("--norm-adv", "batch" if work == "solve" else "minibatch", "--eval-episodes", 1)
    flags += ("--num-threads", settings.threads)
    flags += () if work == "pong" else ("--activation", settings.activation)
    if work == "half-cheetah":
        flags += ("--log-std-init", 0.0, "--log-std-fall", None, "--no-scale-actions")
    remark = {
        "cart-pole": "Gymnasium's vectorised CartPole",
        "solve": "Gymnasium's vectorised CartPole, advantages normalised over the batch",
        "half-cheetah": "statistics move once a rollout",
        "pong": "",
    }[work]
    eager = Contender(script.name, Path(sys.executable), PEERS / "run_ours.py", settings)
    eager = replace(eager, flags=(*flags, script), checkout=ROOT, remark=remark)
    name, flags = f"{script.name} --compile", (*flags, "--compile", script)
    return [eager, replace(eager, name=name, flags=flags, countable=False)]


def packaged(args: Args, settings: Settings) -> list[Contender]:
    """Return the libraries of the registry, by the runners in benchmarks/peers."""
    found = []
    for name, folder, package, remark in (
        ("Stable-Baselines3", "sb3", "stable-baselines3", ""),
        ("Tianshou", "tianshou", "tianshou", ""),
        ("torchrl", "torchrl", "torchrl", ""),
        ("skrl", "skrl", "skrl", "advantages normalised over the batch"),
    ):
        python, script = args.envs / folder / "bin" / "python", PEERS / f"run_{folder}.py"
        found.append(Contender(name, python, script, settings, runner=True))
        found[-1].package, found[-1].remark = package, remark
    return found


def cleanrl(args: Args, settings: Settings) -> Contender:
    names = {"cart-pole": "ppo.py", "solve": "ppo.py", "pong": "ppo_atari.py"}
    name = names.get(args.work, "ppo_continuous_action.py")
    line = '        print("SPS:", int(global_step / (time.time() - start_time)))'
    policy = "lambda obs: agent.actor(torch.Tensor(obs)).argmax(-1).numpy()"
    patches = {line: f"{line}\n        common.tick(global_step, {policy})"}
    python, script = args.envs / "cleanrl" / "bin" / "python", args.cleanrl / "cleanrl" / name
    patches |= {"half-cheetah": GYMNASIUM_1, "pong": ATARI}.get(args.work, {})
    remark = "" if settings.activation == "tanh" else "tanh"
    if args.work == "pong":
        remark = "no sticky actions"
        settings = replace(settings, env_id="PongNoFrameskip-v4")  # it skips frames by itself
    found = Contender(f"CleanRL {name}", python, script, settings, (), patches, remark=remark)
    return replace(found, checkout=args.cleanrl)


def leanrl(args: Args, settings: Settings) -> list[Contender]:
    """Return LeanRL's script, and the one that it compiles; it has none for CartPole."""
    found = []
    for name, file in (("LeanRL", ""), ("LeanRL, compiled", "_torchcompile")):
        line = "        if global_step_burnin is not None and iteration % 10 == 0:"
        patches = {line: f"        common.tick(iteration * args.batch_size)\n{line}"}
        patches |= {"import wandb": WANDB} | GYMNASIUM_1
        python = args.envs / "leanrl" / "bin" / "python"
        script = args.leanrl / "leanrl" / f"ppo_continuous_action{file}.py"
        patches |= NO_GRAD if file else {}
        flags = ("--compile",) if file else ()
        found.append(Contender(name, python, script, settings, flags, patches))
        found[-1].countable, found[-1].checkout = not file, args.leanrl
        found[-1].remark = "no TensorBoard"
    return found


def purejaxrl(args: Args, settings: Settings) -> Contender:
    python, script = args.envs / "purejaxrl" / "bin" / "python", PEERS / "run_purejaxrl.py"
    flags = (args.purejaxrl.absolute() / "purejaxrl",)
    found = Contender("PureJaxRL", python, script, settings, flags, runner=True)
    found.package, found.checkout, found.countable = "jax", args.purejaxrl, False
    clipped = "" if settings.clip_vloss else ", value loss clipped"
    return replace(found, remark=f"environment in JAX, no TensorBoard{clipped}")


def contenders(args: Args) -> list[Contender]:
    """Return all that can be run here; say which cannot."""
    works = {"cart-pole": CARTPOLE, "half-cheetah": HALF_CHEETAH, "pong": PONG, "solve": SOLVE}
    settings = works[args.work]
    if args.quick and args.work != "solve":
        settings = replace(settings, total_timesteps=max(4096, 4 * settings.batch_size))
    settings = replace(settings, threads=args.threads)
    found = ours(args.work, settings)
    found += packaged(args, settings) if args.work != "pong" else []
    found += [cleanrl(args, settings)] if args.cleanrl else []
    found += leanrl(args, settings) if args.leanrl and args.work == "half-cheetah" else []
    found += (
        [purejaxrl(args, settings)] if args.purejaxrl and settings.env_id == CARTPOLE.env_id else []
    )
    if args.work == "solve" and not args.quick:  # each with the settings that it comes with, too
        zoo, its_own = (replace(x, threads=args.threads) for x in (ZOO, OWN))
        own = packaged(args, zoo)[:1]
        own += [cleanrl(args, its_own)] if args.cleanrl else []
        own += [purejaxrl(args, its_own)] if args.purejaxrl else []
        found += [replace(c, name=f"{c.name}, its own settings") for c in own]
    check_names("--skip", args.skip, (c.name for c in found))
    found = [c for c in found if c.name not in args.skip]
    for contender in [c for c in found if not c.python.exists()]:
        print(f"left out: {contender.name}, for there is no {contender.python}", file=sys.stderr)
        found.remove(contender)
    return [c for c in found if not args.only or c.name.startswith(args.only)]


def flag(name: str, value: object) -> str:
    """Return a flag as tyro reads it."""
    return f"--{'no-' * (not value)}{name}" if isinstance(value, bool) else f"--{name}={value}"


def run(contender: Contender, solve: bool = False, count: bool = False) -> tuple[dict, list[dict]]:
    """Run it once; return seconds and megabytes of the process, and what it told at each tick."""
    s = contender.settings
    with tempfile.TemporaryDirectory() as folder:
        script = contender.script
        if contender.patches:
            script = Path(folder, script.name)
            source = patched(contender.script.read_text(), contender.patches)
            script.write_text(f"import common\n{source}")
        if contender.runner:
            words = [json.dumps(asdict(s))]
        else:
            words = [flag(name.replace("_", "-"), getattr(s, name)) for name in FLAGS.split()]
        cores = ",".join(map(str, range(s.threads)))
        pin = ["taskset", "-c", cores] if shutil.which("taskset") else []
        command = [*pin, contender.python.absolute(), script, *words, *contender.flags]
        environment = os.environ | {
            "OMP_NUM_THREADS": str(s.threads),
            "OPENBLAS_NUM_THREADS": str(s.threads),
            "PYTHONPATH": os.pathsep.join(map(str, (PEERS, ROOT, contender.checkout or ""))),
            # Nothing that an earlier run compiled.
            "TORCHINDUCTOR_CACHE_DIR": str(Path(folder, "inductor")),
        }
        environment |= {"BENCHMARK_SOLVE": "1"} if solve else {}
        environment |= {"BENCHMARK_COUNT": "1"} if count else {}
        out, err = Path(folder, "out"), Path(folder, "err")
        with open(out, "w") as stdout, open(err, "w") as stderr:
            start = time.time()
            process = subprocess.Popen(
                list(map(str, command)), cwd=folder, env=environment, stdout=stdout, stderr=stderr
            )
            alarm = threading.Timer(LIMIT, process.kill)
            alarm.start()
            _, status, usage = os.wait4(process.pid, 0)  # for its own peak of memory
            alarm.cancel()
            process.returncode = os.waitstatus_to_exitcode(status)
            seconds = time.time() - start
        lines, errors = out.read_text().splitlines(), err.read_text()
    if process.returncode:
        raise RuntimeError(
            f"{contender.name} ended with {process.returncode} after {seconds:.0f} of at most "
            f"{LIMIT} seconds:\n{errors[-2000:]}"
        )
    ticks = [json.loads(line) for line in lines if line.startswith('{"rows"')]
    return {"start": start, "seconds": seconds, "peak_mb": usage.ru_maxrss / 1024}, ticks


def check_work(contender: Contender) -> str:
    """Run two iterations and count; return what was done, or raise if it is not what was asked."""
    if not contender.countable:
        return "its steps are compiled and cannot be counted from outside, only its rows"
    s = replace(contender.settings, total_timesteps=2 * contender.settings.batch_size)
    *_, last = run(replace(contender, settings=s), count=True)[1]
    env_steps, gradient_steps = last["env_steps"], last["gradient_steps"]
    wanted = 2 * s.update_epochs * s.num_minibatches
    # A library that spends a row on the reset steps the environment once less for each episode.
    same = last["rows"] == s.total_timesteps and gradient_steps == wanted
    if not same or not 0.9 * s.total_timesteps <= env_steps <= s.total_timesteps:
        raise RuntimeError(
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
    return text.strip() + (f", {commit(contender.checkout)}" if contender.checkout else "")


def measure(contender: Contender, args: Args, number: int) -> dict:
    """Return the table's line of one run."""
    settings, at = replace(contender.settings, seed=number), commit()
    process, ticks = run(replace(contender, settings=settings), solve=args.work == "solve")
    first = ticks[BURN_IN - 1] if len(ticks) > 2 else ticks[0]
    rate = (ticks[-1]["rows"] - first["rows"]) / (ticks[-1]["time"] - first["time"])
    solved = ticks[-1].get("score", 0.0) >= SOLVED
    wanted = settings.num_iterations * settings.batch_size
    if ticks[-1]["rows"] != wanted and not solved:
        raise RuntimeError(f"{contender.name} did {ticks[-1]['rows']} rows, not {wanted}")
    return {
        "work": args.work,
        "threads": args.threads,
        "contender": contender.name,
        "round": number,
        "rows": ticks[-1]["rows"],
        "steps_per_second": round(rate),
        "solved_seconds": round(ticks[-1]["time"] - process["start"], 2) if solved else "",
        "score": ticks[-1].get("score", ""),  # of the last evaluation
        "process_seconds": round(process["seconds"], 2),
        "peak_mb": round(process["peak_mb"]),
        "versions": versions(contender),
        "remark": contender.remark,
        # The seed is the round.
        "settings": json.dumps({k: v for k, v in asdict(settings).items() if k != "seed"}),
        "flags": " ".join(f for f in map(str, contender.flags) if "/" not in f),
        "commit": at,
    }


def main() -> None:
    args = tyro.cli(Args)
    for name in ("cleanrl", "leanrl", "purejaxrl"):  # contenders run in another folder
        path = getattr(args, name)
        setattr(args, name, path.absolute() if path else None)
    rounds = 1 if args.quick else args.rounds
    table = (RESULTS / "quick" if args.quick else RESULTS) / "speed.csv"
    keys = ("work", "threads", "contender", "round")
    done = {tuple(row[key] for key in keys) for row in read(table)}
    found, failed = [], False
    for contender in contenders(args):
        try:
            print(f"{contender.name}: {check_work(contender)}", flush=True)
            found.append(contender)
        except RuntimeError as error:
            print(f"left out: {error}", file=sys.stderr)
            failed = True
    for number in range(1, rounds + 1):
        for contender in list(found):
            if (args.work, str(args.threads), contender.name, str(number)) in done:
                continue
            try:
                line = measure(contender, args, number)
            except RuntimeError as error:
                print(f"left out from now on: {error}", file=sys.stderr)
                found.remove(contender)
                failed = True
                continue
            append(table, line)
            text = f"{line['steps_per_second']:,} steps/s"
            if args.work == "solve":
                text = f"solved after {line['solved_seconds'] or 'never'} s, {line['rows']:,} rows"
            print(f"{contender.name}, round {number}: {text}, {line['peak_mb']} MB", flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
