"""Other implementations of `gae`, and torchrl's, which benchmarks.scaling times on one thread."""

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gae import gae


def residuals(rewards, values, next_values, terminated, done, gamma, gae_lambda):
    deltas = rewards + gamma * next_values * ~terminated - values
    return deltas, gamma * gae_lambda * ~done


def plain_loop(*rollout) -> Tensor:
    """The backward recursion as it is usually written."""
    deltas, decay = residuals(*rollout)
    advantages, last = torch.empty_like(deltas), torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        advantages[t] = last = deltas[t] + decay[t] * last
    return advantages


def unbound_loop(*rollout) -> Tensor:
    """The same over rows that were unbound first."""
    deltas, decay = residuals(*rollout)
    rows, last = [], torch.zeros_like(deltas[0])
    for delta, factor in zip(reversed(deltas.unbind()), reversed(decay.unbind())):
        last = torch.addcmul(delta, factor, last)
        rows.append(last)
    return torch.stack(rows[::-1])


def numpy_loop(*rollout) -> Tensor:
    """The same on NumPy's view of the memory, which works only on a CPU."""
    deltas, decay = residuals(*rollout)
    advantages, factors = deltas.numpy(), decay.numpy()
    for t in reversed(range(len(advantages) - 1)):
        advantages[t] += factors[t] * advantages[t + 1]
    return deltas


def doubling(*rollout) -> Tensor:
    """The sum in log2(T) passes: the pass of step k adds the residuals up to row t + 2k - 1."""
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
    """Time one call: the median of 50, or of as many as fit in 2 seconds, after 5 to warm up."""
    times: list[float] = []
    while len(times) < 8 or (len(times) < 55 and sum(times) < 2.0):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times[5:]) * 1e6


FORMS = {
    "`gae`": lambda *rollout: gae(*rollout)[0],
    "plain loop": plain_loop,
    "unbound loop": unbound_loop,
    "NumPy loop": numpy_loop,
    "doubling": doubling,
    "torchrl, vectorised": torchrl_vectorised,
}


def measure(T: int, N: int) -> dict[str, float]:
    """Return the microseconds of each implementation at (T, N); all must agree."""
    forms = dict(FORMS)
    if importlib.util.find_spec("torchrl") is None:
        print('torchrl is left out: pip install -e ".[benchmark]" brings it', file=sys.stderr)
        del forms["torchrl, vectorised"]
    rewards, values, next_values = torch.randn(3, T, N)
    terminated = torch.rand(T, N) < 0.01
    done = terminated | (torch.rand(T, N) < 0.01)
    rollout = (rewards, values, next_values, terminated, done, 0.99, 0.95)
    for form in forms.values():
        torch.testing.assert_close(form(*rollout), plain_loop(*rollout), rtol=1e-3, atol=1e-4)
    times = {name: microseconds(partial(form, *rollout)) for name, form in forms.items()}
    return times | {"`gae` / best": times["`gae`"] / min(times.values())}
