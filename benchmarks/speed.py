"""Steps per second of the same PPO work, ours against the peers', taken in turn on one core.

    python benchmarks/speed.py                      # ppo_discrete.py, Stable-Baselines3
    python benchmarks/speed.py --cleanrl PATH       # also ppo.py of a CleanRL checkout

The work is CleanRL's default: CartPole-v1, 4 environments x 128 steps, 4 epochs x 4 minibatches,
tanh 64-64, value clipping, TensorBoard on. Each figure is rows per second of the training loop
without imports: CleanRL prints it, SB3's is timed around `learn`, ours is the run's `sps` with the
reset rows counted in, as the others count them. SB3 does not clip the value loss by default.
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

import tyro

ROOT = Path(__file__).parent.parent
FLAGS = (
    "--env-id CartPole-v1 --num-envs 4 --num-steps 128 --update-epochs 4 --num-minibatches 4 "
    "--learning-rate 2.5e-4 --ent-coef 0.01 --clip-vloss --norm-adv minibatch --activation tanh "
    "--eval-episodes 1"
)
SB3 = """
import sys, tempfile, time
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
steps = int(sys.argv[1])
model = PPO("MlpPolicy", make_vec_env("CartPole-v1", 4), n_steps=128, batch_size=128, n_epochs=4,
            learning_rate=lambda left: 2.5e-4 * left, ent_coef=0.01, vf_coef=0.25, clip_range=0.2,
            device="cpu", tensorboard_log=tempfile.mkdtemp())
start = time.perf_counter()
model.learn(steps, log_interval=1)
print("SPS:", steps / (time.perf_counter() - start))
"""


@dataclass
class Args:
    """Measure steps per second, interleaved."""

    cleanrl: Path | None = None  # a checkout of CleanRL, measured too if given
    cleanrl_python: Path = Path(sys.executable)  # the interpreter that has CleanRL's packages
    rounds: int = 5  # times that each is run, in turn
    total_timesteps: int = 60_000  # steps of each run


def run(command: list[object], cwd: Path) -> str:
    """Run on one core with one thread and return the output."""
    pin = ["taskset", "-c", "0"] if shutil.which("taskset") else []
    words = ["env", "OMP_NUM_THREADS=1", f"PYTHONPATH={cwd}", *pin, *map(str, command)]
    return subprocess.run(words, cwd=cwd, check=True, capture_output=True, text=True).stdout


def ours(args: Args) -> float:
    with tempfile.TemporaryDirectory() as folder:
        flags = [*FLAGS.split(), "--run-dir", folder, "--total-timesteps", args.total_timesteps]
        run([sys.executable, ROOT / "ppo_discrete.py", *flags], ROOT)
        results = json.loads((Path(folder) / "results.json").read_text())
    rows = args.total_timesteps // 512 * 512
    return results["sps"] * rows / results["global_step"]


def stable_baselines3(args: Args) -> float:
    with tempfile.TemporaryDirectory() as folder:
        output = run([sys.executable, "-c", SB3, args.total_timesteps], Path(folder))
    return float(re.findall(r"SPS: ([\d.]+)", output)[-1])


def cleanrl(args: Args) -> float:
    with tempfile.TemporaryDirectory() as folder:
        script = args.cleanrl.resolve() / "cleanrl" / "ppo.py"
        flags = [
            "--total-timesteps",
            args.total_timesteps,
        ]
        output = run([args.cleanrl_python.absolute(), script, *flags], Path(folder))
    return float(re.findall(r"SPS: ([\d.]+)", output)[-1])


def main() -> None:
    args = tyro.cli(Args)
    contenders = {"ppo_discrete.py": ours, "Stable-Baselines3": stable_baselines3}
    if args.cleanrl:
        contenders["CleanRL ppo.py"] = cleanrl
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name, contender in contenders.items():
            figures[name].append(contender(args))
            print(f"{name}: {figures[name][-1]:,.0f} steps/s", file=sys.stderr, flush=True)
    print("| | steps/s, median | lowest - highest | ours is faster by, median of the rounds |")
    print("|---|---:|---:|---:|")
    for name, sps in figures.items():
        ratio = statistics.median(a / b for a, b in zip(figures["ppo_discrete.py"], sps))
        spread = f"{min(sps):,.0f} - {max(sps):,.0f}"
        print(f"| {name} | {statistics.median(sps):,.0f} | {spread} | {ratio:.2f}x |")


if __name__ == "__main__":
    main()
