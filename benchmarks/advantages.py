"""Time `gae` against other forms of it and against torchrl, on one CPU thread.

python benchmarks/advantages.py            # prints a Markdown table, microseconds a call
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from gae import gae

SHAPES = [(128, 4), (2048, 1), (128, 1024), (32, 4096)]


def residuals(rewards, values, next_values, terminated, done, gamma, gae_lambda):
    deltas = rewards + gamma * next_values * ~terminated - values
    return deltas, gamma * gae_lambda * ~done


def plain_loop(*rollout) -> Tensor:
    """The backward recursion as everybody writes it."""
    deltas, decay = residuals(*rollout)
    advantages, last = torch.empty_like(deltas), torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        advantages[t] = last = deltas[t] + decay[t] * last
    return advantages


def unbound_loop(*rollout) -> Tensor:
    """The same over rows taken apart beforehand."""
    deltas, decay = residuals(*rollout)
    rows, last = [], torch.zeros_like(deltas[0])
    for delta, factor in zip(reversed(deltas.unbind()), reversed(decay.unbind())):
        last = torch.addcmul(delta, factor, last)
        rows.append(last)
    return torch.stack(rows[::-1])


def numpy_loop(*rollout) -> Tensor:
    """The same on NumPy's view of the memory, which a CPU alone can do."""
    deltas, decay = residuals(*rollout)
    advantages, factors = deltas.numpy(), decay.numpy()
    for t in reversed(range(len(advantages) - 1)):
        advantages[t] += factors[t] * advantages[t + 1]
    return deltas


def doubling(*rollout) -> Tensor:
    """The sum by log2(T) passes: that of step k takes the residuals up to row t + 2k - 1."""
    (advantages, decay), step = residuals(*rollout), 1
    while step < len(advantages):  # decay[t] is the weight of row t + step, 0 in another episode
        advantages[:-step] += decay[: len(advantages) - step] * advantages[step:]
        decay = decay[:-step] * decay[step:]
        step *= 2
    return advantages


def torchrl_vectorised(rewards, values, next_values, terminated, done, gamma, gae_lambda) -> Tensor:
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    columns = (x.unsqueeze(-1) for x in (values, next_values, rewards, done, terminated))
    return vec_generalized_advantage_estimate(gamma, gae_lambda, *columns, time_dim=0)[0].squeeze(
        -1
    )


def microseconds(function: Callable[[], object]) -> float:
    """Time one call: the median of 50, or of as many as 2 seconds hold, after 5 to warm up."""
    times: list[float] = []
    while len(times) < 8 or (len(times) < 55 and sum(times) < 2.0):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times[5:]) * 1e6


def measure(shapes: list[tuple[int, int]]) -> dict[str, dict[str, float]]:
    """Return the microseconds of each form at each (T, N); all forms must agree."""
    forms = {
        "`gae`": lambda *rollout: gae(*rollout)[0],
        "plain loop": plain_loop,
        "unbound loop": unbound_loop,
        "NumPy loop": numpy_loop,
        "doubling": doubling,
        "torchrl, vectorised": torchrl_vectorised,
    }
    try:
        import torchrl  # noqa: F401
    except ImportError:
        print('torchrl is left out: pip install -e ".[benchmark]" brings it', file=sys.stderr)
        del forms["torchrl, vectorised"]
    times = {}
    for T, N in shapes:
        rewards, values, next_values = torch.randn(3, T, N)
        terminated = torch.rand(T, N) < 0.01
        done = terminated | (torch.rand(T, N) < 0.01)
        rollout = (rewards, values, next_values, terminated, done, 0.99, 0.95)
        for form in forms.values():
            torch.testing.assert_close(form(*rollout), plain_loop(*rollout), rtol=1e-3, atol=1e-4)
        row = {name: microseconds(partial(form, *rollout)) for name, form in forms.items()}
        times[f"({T}, {N})"] = row | {"`gae` / best": row["`gae`"] / min(row.values())}
    return times


def main() -> None:
    torch.set_num_threads(1)
    times = measure(SHAPES)
    heads = list(next(iter(times.values())))
    print("| (T, N) |", *(f"{name} |" for name in heads))
    print("|---|" + "---:|" * len(heads))
    for shape, row in times.items():
        *cells, ratio = row.values()
        print(f"| {shape} |", *(f"{x:,.0f} |" for x in cells), f"{ratio:.2f} |")


if __name__ == "__main__":
    main()
