"""The pure functions of the scripts, against tables worked by hand and against definitions."""

import importlib
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor


@pytest.fixture(params=["ppo_discrete", "ppo_continuous", "ppo_atari", "ppo_rlhf_toy"])
def any_script(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(request.param)


# ---- Surrogates --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "clips"),
    [
        (1.0, 1.0, False),
        (1.19, 2.0, False),
        (1.21, 2.0, True),  # a good action is probable enough
        (0.79, 2.0, False),  # a good action became improbable: bring it back
        (0.81, -2.0, False),
        (0.79, -2.0, True),  # a bad action is improbable enough
        (1.21, -2.0, False),  # a bad action became probable: bring it back
    ],
)
def test_clipped_surrogate_beyond_the_range_has_no_gradient(
    any_script, ratio: float, advantage: float, clips: bool
) -> None:
    r = torch.tensor([ratio], requires_grad=True)
    surrogate = any_script.clipped_surrogate(r, torch.tensor([advantage]), 0.2)
    surrogate.backward()
    assert r.grad.item() == (0.0 if clips else advantage)
    bound = 1.2 if ratio > 1 else 0.8
    assert surrogate.item() == pytest.approx((bound if clips else ratio) * advantage)


def test_clipped_surrogate_of_many_rows_is_their_mean(script) -> None:
    ratio, advantages = torch.tensor([1.0, 1.5, 0.5, 0.5]), torch.tensor([3.0, 1.0, 1.0, -1.0])
    surrogate = script.clipped_surrogate(ratio, advantages, 0.2)
    assert surrogate.item() == pytest.approx((3.0 + 1.2 + 0.5 - 0.8) / 4)


def test_kl_penalised_surrogate_without_advantages_is_minus_beta_kl(script) -> None:
    torch.manual_seed(0)
    old, new = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.5, 0.3])
    actions = torch.multinomial(old, 200_000, replacement=True)
    log_ratio = (new / old).log()[actions]
    kl_coef = torch.tensor(2.0)
    penalty = -script.kl_penalised_surrogate(log_ratio, torch.zeros(200_000), kl_coef)
    exact = (old * (old / new).log()).sum()
    assert penalty.item() == pytest.approx(2.0 * exact.item(), rel=0.02)


def test_kl_penalised_surrogate_away_from_ratio_one_pulls_back(script) -> None:
    log_ratio = torch.tensor([0.3, 0.0, -0.3], requires_grad=True)
    script.kl_penalised_surrogate(log_ratio, torch.zeros(3), torch.tensor(1.0)).backward()
    assert log_ratio.grad[0] < 0 and log_ratio.grad[1] == 0 and log_ratio.grad[2] > 0


def test_kl_penalised_surrogate_at_ratio_one_has_the_policy_gradient(script) -> None:
    log_ratio, advantages = torch.zeros(2, requires_grad=True), torch.tensor([3.0, -1.0])
    script.kl_penalised_surrogate(log_ratio, advantages, torch.tensor(5.0)).backward()
    assert log_ratio.grad.tolist() == [1.5, -0.5]  # A / M: the penalty vanishes


@pytest.mark.parametrize(
    ("kl", "factor"), [(0.0, 0.5), (0.0066, 0.5), (0.0067, 1.0), (0.0149, 1.0), (0.0151, 2.0)]
)
def test_adapt_kl_coef_outside_the_range_doubles_or_halves(script, kl: float, factor) -> None:
    kl_coef = torch.tensor(3.0)
    script.adapt_kl_coef(kl_coef, kl, 0.01)
    assert kl_coef.item() == 3.0 * factor


def test_adapt_kl_coef_at_its_limits_stays_there(script) -> None:
    lowest, highest = torch.tensor(1e-6), torch.tensor(1e6)
    script.adapt_kl_coef(lowest, 0.0, 0.01)
    script.adapt_kl_coef(highest, 1.0, 0.01)
    assert lowest.item() == pytest.approx(1e-6)  # from 0 it could never rise again
    assert highest.item() == pytest.approx(1e6)


# ---- The critic --------------------------------------------------------------------------------


def test_value_loss_equals_the_sum_by_hand(script) -> None:
    values, old_values = torch.tensor([1.0, 3.0, 0.0]), torch.tensor([1.0, 1.0, 1.0])
    returns = torch.tensor([2.0, 2.0, 2.0])
    assert script.value_loss(values, old_values, returns, None).item() == (1 + 1 + 4) / 6
    # Clipped at 0.5 the values are 1, 1.5, 0.5, and the larger errors 1, 1 and 4.
    assert script.value_loss(values, old_values, returns, 0.5).item() == (1 + 1 + 4) / 6


def test_value_loss_with_a_larger_clipped_error_has_no_gradient(any_script) -> None:
    values = torch.tensor([1.0, 3.0, 0.0], requires_grad=True)
    old_values, returns = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.0, 2.8, 1.0])
    loss = any_script.value_loss(values, old_values, returns, 0.5).mean()
    loss.backward()
    assert loss.item() == pytest.approx((0 + 1.3**2 + 1) / 6)
    assert values.grad[1] == 0.0 and values.grad[2] != 0.0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2.0, 4.0], 1.0),  # right
        ([6.0, 7.0, 9.0], 1.0),  # right but for a constant
        ([3.0, 3.0, 3.0], 0.0),  # knows nothing
        ([-1.0, -2.0, -4.0], -3.0),  # Var(2 R) is four times Var(R)
    ],
)
def test_explained_variance_of_known_critics_is_exact(script, values: list, expected) -> None:
    explained = script.explained_variance(torch.tensor(values), torch.tensor([1.0, 2.0, 4.0]))
    assert explained == pytest.approx(expected, abs=1e-6)


# ---- Advantages --------------------------------------------------------------------------------


def test_normalise_gives_mean_zero_and_standard_deviation_one(script) -> None:
    normal = script.normalise(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    std = (5 / 3) ** 0.5  # 1.5^2 + 0.5^2 + 0.5^2 + 1.5^2 = 5, over 4 - 1
    torch.testing.assert_close(normal, torch.tensor([-1.5, -0.5, 0.5, 1.5]) / std)


def test_normalise_of_equal_advantages_is_zero(script) -> None:
    assert script.normalise(torch.full((5,), 7.0)).tolist() == [0.0] * 5


# ---- The whole loss ----------------------------------------------------------------------------

RATIOS = [1.0, 1.3, 0.75, 1.1]


def loss_by_hand(script: ModuleType, **flags) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Return loss and figures of an agent with known answers, and its log-probabilities."""
    old_log_probs = torch.tensor([-1.0, -0.5, -2.0, -0.1])
    log_probs = (old_log_probs + torch.tensor(RATIOS).log()).requires_grad_()
    entropies = torch.tensor([0.5, 0.7, 0.6, 0.6], requires_grad=True)
    values = torch.tensor([1.0, 3.0, 0.0, 0.0], requires_grad=True)

    def agent(batch) -> tuple[Tensor, Tensor, Tensor]:
        return log_probs, entropies, values

    agent.kl_coef = torch.tensor(3.0)
    columns = dict.fromkeys(script.Batch._fields)
    columns |= dict(
        log_probs=old_log_probs,
        advantages=torch.tensor([1.0, 2.0, -1.0, -2.0]),
        returns=torch.tensor([2.0, 3.0, 2.0, 0.0]),
        values=torch.tensor([1.0, 1.0, 0.0, 0.0]),
    )
    args = SimpleNamespace(
        **dict(objective="clip", clip_coef=0.2, clip_vloss=False, vf_coef=0.5, ent_coef=0.1) | flags
    )
    loss, figures = script.ppo_loss(agent, args, script.Batch(**columns))
    return loss, figures, log_probs


KL = sum(r - 1 for r in RATIOS) / 4 - torch.tensor(RATIOS).log().mean().item()


@pytest.mark.parametrize(
    ("flags", "surrogate", "v_loss"),
    [
        # 1 + 2.4 - 0.8 - 2.2, and 1 + 0 + 4 + 0
        ({}, 0.4 / 4, 5.0 / 8),
        # 1 + 2 * 1.3 - 0.75 - 2.2, without a clip
        ({"objective": "penalty"}, 0.65 / 4 - 3.0 * KL, 5.0 / 8),
        # With a clip at 0.05 the second value stays at 1.05, not 3:
        # 1 + 2.1 - 0.95 - 2.2, and 1 + 1.95^2 + 4 + 0
        ({"clip_coef": 0.05, "clip_vloss": True}, -0.05 / 4, 8.8025 / 8),
    ],
)
def test_ppo_loss_equals_the_sum_by_hand(script, flags: dict, surrogate, v_loss) -> None:
    loss, figures, _ = loss_by_hand(script, **flags)
    assert figures["policy_loss"].item() == pytest.approx(-surrogate, abs=1e-6)
    assert figures["value_loss"].item() == pytest.approx(v_loss)
    assert figures["entropy"].item() == pytest.approx(0.6)
    assert figures["approx_kl"].item() == pytest.approx(KL, abs=1e-6)
    assert loss.item() == pytest.approx(-surrogate + 0.5 * v_loss - 0.1 * 0.6, abs=1e-6)


@pytest.mark.parametrize(("clip_coef", "share"), [(0.05, 0.75), (0.2, 0.5), (0.27, 0.25)])
def test_ppo_loss_counts_ratios_beyond_the_range(script, clip_coef: float, share: float) -> None:
    _, figures, _ = loss_by_hand(script, clip_coef=clip_coef)
    assert figures["clipfrac"].item() == share


def test_ppo_loss_is_differentiable_and_its_figures_are_not(script) -> None:
    loss, figures, log_probs = loss_by_hand(script)
    loss.backward()
    # -r A / M for the rows within the range and for the bad action that became probable.
    expected = torch.tensor([-1.0, 0.0, 0.0, 2.2]) / 4
    torch.testing.assert_close(log_probs.grad, expected)
    assert not any(figure.requires_grad for figure in figures.values())
