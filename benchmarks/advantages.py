"""Other implementations of `gae`, and torchrl's, which benchmarks.scaling times on one thread."""

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

    columns = (x[..., None] for x in (values, next_values, rewards, done, terminated))
    estimate = vec_generalized_advantage_estimate(gamma, gae_lambda, *columns, time_dim=0)
    return estimate[0].squeeze(-1)


FORMS = {
    "`gae`": lambda *rollout: gae(*rollout)[0],
    "plain loop": plain_loop,
    "unbound loop": unbound_loop,
    "doubling": doubling,
    "torchrl, vectorised": torchrl_vectorised,
}
