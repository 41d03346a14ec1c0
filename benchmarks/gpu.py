"""The speed on a GPU: `python -m benchmarks.gpu`, at most 8 minutes on a machine with one.

First it checks that the numbers agree: each script runs some iterations on the CPU and on the
device. Then it measures steps/s on both devices: of Atari games for each number of environments,
eager and compiled, and of ppo_discrete.py for each width of its network. Results go to gpu.csv; a
second call continues the first.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import tyro

from benchmarks import jobs

KEY = ("part", "script", "flags", "device", "name")
# A few iterations of each script; their returns do not matter.
FEW = {
    "ppo_discrete.py": "--total-timesteps 4096 --eval-episodes 4",
    "ppo_continuous.py": "--total-timesteps 8192 --num-envs 4 --num-steps 512 --eval-episodes 4",
    "ppo_atari.py": "--total-timesteps 4096 --eval-episodes 1",
    "ppo_rlhf_toy.py": "--task arithmetic --sft-steps 20 --num-iterations 2 --eval-prompts 64",
}
LIMIT = 150  # seconds after which a run is stopped


@dataclass
class Args(jobs.Shared):
    """Compare a device with the CPU."""

    device: str = "cuda"  # any PyTorch device; cpu tries the benchmark without a GPU
    minutes: float = 8.0  # after which no new run starts
    quick: bool = False  # only the smallest sizes


def train(script: str, flags: str, device: str) -> jobs.Finished:
    return jobs.launch([jobs.ROOT / script], [*flags.split(), "--device", device], limit=LIMIT)


def difference(script: str, flags: str, device: str) -> dict:
    """Return the largest relative difference of the first iteration's losses from the CPU's."""
    here, there = (train(script, flags, name).metrics[0] for name in ("cpu", device))
    names = [name for name in here if name.startswith("losses/") and name.endswith("_loss")]
    pairs = [(float(here[name]), float(there[name])) for name in names]
    largest = max(abs(a - b) / (abs(a) + 1e-3) for a, b in pairs)
    return {"difference": f"{largest:.1e}"}


def speed(script: str, flags: str, device: str) -> dict:
    """Return the steps/s after the first iteration, which compiles, and that one's seconds."""
    done = train(script, flags, device)
    steps = [float(row["global_step"]) for row in done.metrics]
    seconds = [n / float(row["charts/SPS"]) for n, row in zip(steps, done.metrics)]
    rate = (steps[-1] - steps[0]) / (seconds[-1] - seconds[0])
    figures = {"steps_per_second": round(rate), "first_iteration": f"{seconds[0]:.2f}"}
    return figures | {"memory_mb": round(done.memory)}


def runs(args: Args) -> Iterator[tuple[str, str, str, str, Callable]]:
    """Yield part, script, flags, device and what to measure, the most informative first."""
    for script, flags in FEW.items():
        yield "equal", script, flags, args.device, difference
    for num_envs in (8,) if args.quick else (64, 8, 256):
        for env_id in ("ALE/Pong-v5",) if args.quick else ("ALE/Pong-v5", "ALE/Breakout-v5"):
            for compiled in ("", " --compile"):
                total = num_envs * 128 * (2 if args.quick else 5)
                flags = f"--env-id {env_id} --num-envs {num_envs} --total-timesteps {total}"
                flags += f" --eval-episodes 1{compiled}"
                yield "atari", "ppo_atari.py", flags, args.device, speed
    for hidden_size in (64,) if args.quick else (64, 256, 512, 1024, 2048):
        for device in dict.fromkeys(("cpu", args.device)):
            flags = f"--total-timesteps 8192 --eval-episodes 1 --hidden-size {hidden_size}"
            yield "width", "ppo_discrete.py", flags, device, speed


def main() -> None:
    args = tyro.cli(Args)
    try:
        device = torch.device(args.device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"--device {args.device}: {error}")
    start = time.monotonic()

    def measure(part: str, script: str, flags: str, device: str, figures: Callable) -> list[dict]:
        if time.monotonic() > start + 60.0 * args.minutes:
            raise jobs.Failed(f"not begun: --minutes {args.minutes:g} are over")
        empty = dict.fromkeys("difference steps_per_second first_iteration memory_mb".split(), "")
        at = {"torch": torch.__version__, "commit": jobs.commit()}
        known = dict(zip(KEY, (part, script, flags, device, name)))
        return [known | empty | figures(script, flags, device) | at]

    work = [
        jobs.Job((*run[:4], name), lambda _, run=run: measure(*run))  # in order, one at a time
        for run in runs(args)
    ]
    jobs.run_jobs(work, args.path("gpu.csv"), KEY)


if __name__ == "__main__":
    main()
