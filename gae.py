"""Generalised Advantage Estimation (Schulman et al. 2016), shared by the three PPO scripts."""

import torch
from torch import Tensor


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    r"""Estimate advantages and returns by an exponentially weighted sum of TD residuals.

        delta_t = r_t + gamma * (1 - terminated_t) * V(s_{t+1}) - V(s_t)
        A_t     = sum_{l >= 0} (gamma * lambda)^l * delta_{t+l}         up to the end of the segment
        A_t     = delta_t + gamma * lambda * (1 - done_t) * A_{t+1}     the same sum, backwards

    A segment ends in one of three ways:

    =============  ==========  =====  ====================================================
    the episode    terminated  done   so the last residual of the segment
    =============  ==========  =====  ====================================================
    really ends    True        True   has V(s_{t+1}) = 0: nothing more can be earned
    is truncated   False       True   bootstraps from V(s_{t+1}): it would have gone on
    is cut off     False       False  bootstraps from V(s_{t+1}): it goes on in the next
    (rollout end)                     rollout, so row T-1 counts no residual beyond its own
    =============  ==========  =====  ====================================================

    The sum is taken by doubling: after the pass with step k, row t holds the residuals of rows
    t to t+2k-1, so T rows need log2(T) passes over whole tensors and no Python loop over T.

    Args:
        rewards: r_t, (T, ...), float32 or float64; time comes first, any shape may follow.
        values: V(s_t), same shape, dtype and device.
        next_values: V(s_{t+1}), same; where an episode ended, of its true last observation
            (with NEXT_STEP autoreset simply the next row of values).
        terminated: bool, same shape; the environment said that the episode is over.
        done: bool, same shape; terminated or truncated, so True wherever `terminated` is.
        gamma: discount factor in [0, 1].
        gae_lambda: lambda in [0, 1]: 0 is the TD residual (low variance, biased by the critic),
            1 the discounted sum of rewards minus V (unbiased, high variance).

    Returns:
        advantages A_t and returns A_t + V(s_t), the critic's target; both of rewards' shape,
        constants to autograd.

    Raises:
        ValueError: a shape, dtype or device that differs, or a coefficient outside [0, 1].

    Source: GAE paper (arXiv 1506.02438) eq. 16; PPO paper (arXiv 1707.06347) eq. 11 and 12.
    """
    if (
        rewards.ndim == 0
        or len(rewards) == 0
        or rewards.dtype not in (torch.float32, torch.float64)
    ):
        raise ValueError(
            f"rewards must be float32 or float64 of shape (T, ...) with T >= 1, "
            f"got {rewards.dtype} {tuple(rewards.shape)}"
        )
    for name, tensor, dtype in (
        ("values", values, rewards.dtype),
        ("next_values", next_values, rewards.dtype),
        ("terminated", terminated, torch.bool),
        ("done", done, torch.bool),
    ):
        # (T, N) against (T, N, 1) would broadcast to (T, N, N) without a word.
        if (tensor.shape, tensor.dtype, tensor.device) != (rewards.shape, dtype, rewards.device):
            raise ValueError(
                f"{name} must be {dtype} {tuple(rewards.shape)} on {rewards.device} like rewards, "
                f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )
    for name, coefficient in (("gamma", gamma), ("gae_lambda", gae_lambda)):
        if not 0.0 <= coefficient <= 1.0:
            raise ValueError(f"{name} must lie in [0, 1], got {coefficient}")

    advantages = rewards + gamma * next_values * ~terminated - values  # delta_t, so far
    decay = gamma * gae_lambda * (~done).to(rewards.dtype)
    step = 1
    while step < len(advantages):
        # decay[t] is now the weight of the row `step` rows later, 0 beyond an episode's end.
        advantages[:-step] += decay[: len(advantages) - step] * advantages[step:]
        decay = decay[:-step] * decay[step:]
        step *= 2
    return advantages, advantages + values
