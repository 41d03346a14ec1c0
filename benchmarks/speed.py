"""Steps per second of the same PPO work, ours against the peers', taken in turn on one core.

    python benchmarks/speed.py                                  # CartPole: ours, Stable-Baselines3
    python benchmarks/speed.py --cleanrl PATH                   # also CleanRL, from a checkout
    python benchmarks/speed.py --work half-cheetah --cleanrl PATH

The work is CleanRL's default: on CartPole-v1 4 environments x 128 steps, 4 epochs x 4 minibatches;
on HalfCheetah-v5 1 x 2048 steps, 10 epochs x 32 minibatches, observations and rewards normalised
(our `--config faithful`); tanh 64-64, value clipping and TensorBoard on both. Each figure is rows
per second of the training loop without imports: CleanRL prints it, SB3's is timed around `learn`,
ours is the run's `sps` with the reset rows counted in, as the others count them. SB3 does not clip
the value loss by default. CleanRL's continuous script gives a wrapper one argument less than
Gymnasium 1.x wants; a copy with that argument is run.
"""

import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).parent.parent
SB3 = """
import sys, tempfile, time
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
steps = int(sys.argv[1])
envs = {envs}
model = PPO("MlpPolicy", envs, {hyperparameters}, clip_range=0.2, device="cpu",
            tensorboard_log=tempfile.mkdtemp())
start = time.perf_counter()
model.learn(steps, log_interval=1)
print("SPS:", steps / (time.perf_counter() - start))
"""


@dataclass
class Work:
    """The same work in the words of each library."""

    script: str
    flags: str
    batch_size: int
    total_timesteps: int
    sb3_envs: str
    sb3_hyperparameters: str
    cleanrl_script: str
    cleanrl_flags: str


WORK = {
    "cart-pole": Work(
        script="ppo_discrete.py",
        flags="--env-id CartPole-v1 --num-envs 4 --num-steps 128 --update-epochs 4 "
        "--num-minibatches 4 --learning-rate 2.5e-4 --ent-coef 0.01 --clip-vloss "
        "--norm-adv minibatch --activation tanh",
        batch_size=512,
        total_timesteps=60_000,
        sb3_envs='make_vec_env("CartPole-v1", 4)',
        sb3_hyperparameters="n_steps=128, batch_size=128, n_epochs=4, ent_coef=0.01, vf_coef=0.25, "
        "learning_rate=lambda left: 2.5e-4 * left",
        cleanrl_script="ppo.py",
        cleanrl_flags="",
    ),
    "half-cheetah": Work(
        script="ppo_continuous.py",
        flags="--env-id HalfCheetah-v5 --config faithful",
        batch_size=2048,
        total_timesteps=20_480,
        sb3_envs='VecNormalize(make_vec_env("HalfCheetah-v5", 1))',
        sb3_hyperparameters="n_steps=2048, batch_size=64, n_epochs=10, ent_coef=0.0, vf_coef=0.25, "
        "learning_rate=lambda left: 3e-4 * left",
        cleanrl_script="ppo_continuous_action.py",
        cleanrl_flags="--env-id HalfCheetah-v5",
    ),
}


@dataclass
class Args:
    """Measure steps per second, interleaved."""

    work: Literal["cart-pole", "half-cheetah"] = "cart-pole"  # the environment and its settings
    cleanrl: Path | None = None  # a checkout of CleanRL, measured too if given
    cleanrl_python: Path = Path(sys.executable)  # the interpreter that has CleanRL's packages
    rounds: int = 5  # times that each is run, in turn


def run(command: list[object], cwd: Path) -> str:
    """Run on one core with one thread and return the output."""
    pin = ["taskset", "-c", "0"] if shutil.which("taskset") else []
    words = ["env", "OMP_NUM_THREADS=1", "OPENBLAS_NUM_THREADS=1", f"PYTHONPATH={cwd}", *pin]
    words += map(str, command)
    return subprocess.run(words, cwd=cwd, check=True, capture_output=True, text=True).stdout


def ours(args: Args, work: Work) -> float:
    with tempfile.TemporaryDirectory() as folder:
        flags = [*work.flags.split(), "--run-dir", folder, "--eval-episodes", 1]
        flags += ["--total-timesteps", work.total_timesteps]
        run([sys.executable, ROOT / work.script, *flags], ROOT)
        results = json.loads((Path(folder) / "results.json").read_text())
    rows = work.total_timesteps // work.batch_size * work.batch_size
    return results["sps"] * rows / results["global_step"]


def stable_baselines3(args: Args, work: Work) -> float:
    code = SB3.format(envs=work.sb3_envs, hyperparameters=work.sb3_hyperparameters)
    with tempfile.TemporaryDirectory() as folder:
        output = run([sys.executable, "-c", code, work.total_timesteps], Path(folder))
    return float(re.findall(r"SPS: ([\d.]+)", output)[-1])


def cleanrl(args: Args, work: Work) -> float:
    source = (args.cleanrl / "cleanrl" / work.cleanrl_script).read_text()
    source = source.replace("np.clip(obs, -10, 10))", "np.clip(obs, -10, 10), None)")
    flags = [*work.cleanrl_flags.split(), "--total-timesteps", work.total_timesteps]
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, work.cleanrl_script)
        script.write_text(source)
        output = run([args.cleanrl_python.absolute(), script, *flags], Path(folder))
    return float(re.findall(r"SPS: ([\d.]+)", output)[-1])


def main() -> None:
    args = tyro.cli(Args)
    work = WORK[args.work]
    contenders = {work.script: ours, "Stable-Baselines3": stable_baselines3}
    if args.cleanrl:
        contenders[f"CleanRL {work.cleanrl_script}"] = cleanrl
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name, contender in contenders.items():
            figures[name].append(contender(args, work))
            print(f"{name}: {figures[name][-1]:,.0f} steps/s", file=sys.stderr, flush=True)
    print("| | steps/s, median | lowest - highest | ours is faster by, median of the rounds |")
    print("|---|---:|---:|---:|")
    for name, sps in figures.items():
        ratio = statistics.median(a / b for a, b in zip(figures[work.script], sps))
        spread = f"{min(sps):,.0f} - {max(sps):,.0f}"
        print(f"| {name} | {statistics.median(sps):,.0f} | {spread} | {ratio:.2f}x |")


if __name__ == "__main__":
    main()
