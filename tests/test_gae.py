"""`gae` against tables worked by hand, a brute-force double sum, and Stable-Baselines3."""

import numpy as np
import pytest
import torch
from torch import Tensor

from gae import gae

# Three rows: r = 1, 2, 4; V(s) = 1, 2, 3; V(s') = 2, 3, 5; gamma = lambda = 1/2. By hand:
# residuals 1 + 2/2 - 1 = 1, 2 + 3/2 - 2 = 1.5 (2 - 2 = 0 after a true end), 4 + 5/2 - 3 = 3.5.
TABLE = {
    "cut off": ([0, 0, 0], [0, 0, 0], 0.5, [1 + 2.375 / 4, 1.5 + 3.5 / 4, 3.5]),
    "truncated in row 1": ([0, 0, 0], [0, 1, 0], 0.5, [1 + 1.5 / 4, 1.5, 3.5]),
    "terminated in row 1": ([0, 1, 0], [0, 1, 0], 0.5, [1.0, 0.0, 3.5]),
    "terminated in the last row": ([0, 0, 1], [0, 0, 1], 0.5, [1 + 1.75 / 4, 1.5 + 1 / 4, 1.0]),
    "lambda 0: the residuals": ([0, 0, 0], [0, 0, 0], 0.0, [1.0, 1.5, 3.5]),
    # 1 + 2/2 + 4/4 + 5/8 - 1, 2 + 4/2 + 5/4 - 2, 4 + 5/2 - 3
    "lambda 1: the rewards": ([0, 0, 0], [0, 0, 0], 1.0, [2.625, 3.25, 3.5]),
    "lambda 1, truncated in row 1": ([0, 0, 0], [0, 1, 0], 1.0, [1.75, 1.5, 3.5]),
}


@pytest.mark.parametrize("case", TABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gae_of_three_rows_equals_the_table_by_hand(case: str, dtype: torch.dtype) -> None:
    terminated, done, gae_lambda, expected = TABLE[case]
    rewards = torch.tensor([1, 2, 4], dtype=dtype)
    values = torch.tensor([1, 2, 3], dtype=dtype)
    next_values = torch.tensor([2, 3, 5], dtype=dtype)
    ends = torch.tensor(terminated, dtype=torch.bool), torch.tensor(done, dtype=torch.bool)
    advantages, returns = gae(rewards, values, next_values, *ends, 0.5, gae_lambda)
    assert advantages.dtype == returns.dtype == dtype
    assert advantages.tolist() == expected
    assert returns.tolist() == [a + v for a, v in zip(expected, [1, 2, 3])]


def random_rollout(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(sum(shape))
    rewards, values, next_values = torch.randn(3, *shape, dtype=dtype, generator=generator)
    terminated = torch.rand(shape, generator=generator) < 0.15
    done = terminated | (torch.rand(shape, generator=generator) < 0.15)
    return rewards, values, next_values, terminated, done


def double_sum(rewards, values, next_values, terminated, done, gamma, gae_lambda) -> Tensor:
    """A_t = sum_l (gamma lambda)^l delta_{t+l}, term by term, up to the segment's end."""
    advantages = torch.zeros_like(rewards)
    for index in np.ndindex(*rewards.shape):
        t, rest = index[0], index[1:]
        for row in range(t, len(rewards)):
            here = (row, *rest)
            delta = rewards[here] - values[here]
            if not terminated[here]:
                delta = delta + gamma * next_values[here]
            advantages[index] += (gamma * gae_lambda) ** (row - t) * delta
            if done[here]:
                break
    return advantages


@pytest.mark.parametrize(
    "shape", [(1,), (2,), (9, 3), (33, 2), (16, 2, 2), *((t, 1) for t in range(3, 9))]
)
@pytest.mark.parametrize(
    ("gamma", "gae_lambda"), [(0.99, 0.95), (0.9, 1.0), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)]
)
def test_gae_of_any_shape_equals_the_double_sum(
    shape: tuple[int, ...], gamma: float, gae_lambda: float
) -> None:
    rollout = random_rollout(*shape)
    advantages, returns = gae(*rollout, gamma, gae_lambda)
    expected = double_sum(*rollout, gamma, gae_lambda)
    torch.testing.assert_close(advantages, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns, expected + rollout[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("N", [7, 600])  # narrow and wide rows
def test_gae_in_float32_equals_the_backward_recursion(N: int) -> None:
    rewards, values, next_values, terminated, done = random_rollout(500, N, dtype=torch.float32)
    expected, last = [], torch.zeros(N)
    for t in reversed(range(500)):
        delta = rewards[t] + 0.99 * next_values[t] * ~terminated[t] - values[t]
        last = delta + 0.99 * 0.95 * ~done[t] * last
        expected.insert(0, last)
    advantages, _ = gae(rewards, values, next_values, terminated, done, 0.99, 0.95)
    torch.testing.assert_close(advantages, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_gae_equals_the_buffer_of_stable_baselines3() -> None:
    """SB3's buffer knows true ends and the cut-off, the two kinds that both conventions share."""
    import gymnasium as gym
    from stable_baselines3.common.buffers import RolloutBuffer

    T, N = 64, 3
    rewards, values, _, done, _ = random_rollout(T, N, dtype=torch.float32)
    last_values = torch.randn(N)
    box, discrete = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Discrete(2)
    buffer = RolloutBuffer(T, box, discrete, device="cpu", gamma=0.97, gae_lambda=0.9, n_envs=N)
    starts = np.zeros(N)
    for t in range(T):
        zeros = np.zeros((N, 1))
        buffer.add(zeros, zeros, rewards[t].numpy(), starts, values[t], torch.zeros(N))
        starts = done[t].numpy()
    buffer.compute_returns_and_advantage(last_values, starts)
    next_values = torch.cat([values[1:], last_values[None]])
    advantages, returns = gae(rewards, values, next_values, done, done, 0.97, 0.9)
    np.testing.assert_allclose(advantages, buffer.advantages, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(returns, buffer.returns, rtol=1e-4, atol=1e-5)


def test_gae_is_a_constant_to_autograd_and_leaves_its_inputs_alone() -> None:
    rollout = random_rollout(8, 2)
    before = [x.clone() for x in rollout]
    values = rollout[1].requires_grad_()
    advantages, returns = gae(*rollout, 0.9, 0.9)
    assert values.requires_grad and not advantages.requires_grad and not returns.requires_grad
    for x, y in zip(rollout, before):
        assert torch.equal(x, y)


GOOD = {
    "rewards": torch.zeros(4, 2),
    "values": torch.zeros(4, 2),
    "next_values": torch.zeros(4, 2),
    "terminated": torch.zeros(4, 2, dtype=torch.bool),
    "done": torch.zeros(4, 2, dtype=torch.bool),
    "gamma": 0.99,
    "gae_lambda": 0.95,
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rewards", torch.zeros(4, 2, dtype=torch.int64)),
        ("rewards", torch.zeros(4, 2, dtype=torch.float16)),
        ("rewards", torch.tensor(1.0)),
        ("rewards", torch.zeros(0, 2)),
        ("values", torch.zeros(4, 2, 1)),
        ("values", torch.zeros(4)),
        ("next_values", torch.zeros(5, 2)),
        ("next_values", torch.zeros(4, 2, dtype=torch.float64)),
        ("terminated", torch.zeros(4, 2)),
        ("done", torch.zeros(4, 2, dtype=torch.uint8)),
        ("done", torch.zeros(4, 1, dtype=torch.bool)),
        ("gamma", 1.01),
        ("gamma", -0.1),
        ("gae_lambda", float("nan")),
    ],
)
def test_gae_with_a_wrong_argument_names_it(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        gae(**(GOOD | {name: value}))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gae_on_cuda_equals_cpu() -> None:
    rollout = random_rollout(100, 5)
    expected, _ = gae(*rollout, 0.99, 0.95)
    advantages, _ = gae(*(x.cuda() for x in rollout), 0.99, 0.95)
    torch.testing.assert_close(advantages.cpu(), expected)
