"""`ppo_continuous.py`: the Gaussian, the box of actions and the normalisers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch import nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution

import ppo_continuous
from experiment import Normaliser, UserError
from ppo_continuous import Agent, Args, make_envs, train
from tests.envs import MARK
from tests.helpers import make_agent, quick_args, read_metrics, spy

OBS = Box(-1.0, 1.0, (4,), np.float32)


def gaussian_agent(**changes) -> Agent:
    """Return an agent whose means and standard deviations are far from those at the start."""
    agent = make_agent(ppo_continuous, 0.3, **changes)
    nn.init.normal_(agent.log_std, std=0.3)
    return agent


def agent_of(box: Box, **flags) -> Agent:
    spaces = SimpleNamespace(single_action_space=box, single_observation_space=OBS)
    return Agent(Args(**flags), spaces)


# ---- The policy --------------------------------------------------------------------------------


def test_log_prob_and_entropy_equal_those_of_a_gaussian() -> None:
    agent, obs, actions = gaussian_agent(), torch.randn(5, 7, 2), torch.randn(5, 7, 2)
    log_probs, entropy = agent.log_prob_and_entropy(obs, actions)
    oracle = Normal(agent.actor(obs), agent.log_std.exp())
    torch.testing.assert_close(log_probs, oracle.log_prob(actions).sum(-1))
    torch.testing.assert_close(entropy, oracle.entropy().sum(-1))


def test_log_prob_of_an_actor_with_too_few_outputs_is_an_error() -> None:
    agent, obs, actions = gaussian_agent(), torch.randn(5, 2), torch.randn(5, 2)
    agent.actor = nn.Linear(2, 1)  # its one mean would serve both dimensions
    with pytest.raises(RuntimeError, match="shape"):
        agent.log_prob_and_entropy(obs, actions)


def test_log_prob_of_an_actor_without_an_axis_for_its_one_output_is_that_of_one_with_it() -> None:
    box = Box(-1.0, 1.0, (1,), np.float32)
    agent, obs, actions = agent_of(box), torch.randn(5, 4), torch.randn(5, 1)
    expected, _ = agent.log_prob_and_entropy(obs, actions)
    agent.actor = nn.Sequential(agent.actor, nn.Flatten(0))  # (5,): minus (5, 1) it is (5, 5)
    log_probs, _ = agent.log_prob_and_entropy(obs, actions)
    torch.testing.assert_close(log_probs, expected)


def test_log_prob_with_squash_is_that_of_the_change_of_variables() -> None:
    agent, obs, actions = gaussian_agent(squash=True), torch.randn(50, 2), torch.randn(50, 2)
    log_probs, _ = agent.log_prob_and_entropy(obs, actions)
    gaussian = Normal(agent.actor(obs), agent.log_std.exp())
    oracle = TransformedDistribution(gaussian, TanhTransform(cache_size=1))
    oracle_log_probs = oracle.log_prob(oracle.transforms[0](actions)).sum(-1)
    torch.testing.assert_close(log_probs, oracle_log_probs)
    # The determinant of the Jacobian once more, by autograd.
    x = actions.clone().requires_grad_()
    (slope,) = torch.autograd.grad(x.tanh().sum(), x)
    plain = gaussian.log_prob(actions).sum(-1)
    torch.testing.assert_close(log_probs, plain - slope.log().sum(-1), atol=1e-5, rtol=1e-5)


def test_log_prob_with_squash_of_far_actions_is_finite() -> None:
    agent, far = gaussian_agent(squash=True), torch.tensor([[30.0, 30.0], [-300.0, 300.0]])
    log_probs, _ = agent.log_prob_and_entropy(torch.zeros(2, 2), far)
    assert torch.isfinite(log_probs).all()


def test_policy_is_the_gaussian_of_the_normalised_observation() -> None:
    agent = gaussian_agent()
    agent.obs_normaliser.update(np.random.default_rng(0).normal(3.0, 5.0, (100, 2)))
    policy, obs = agent.policy(), np.array([[4.0, -200.0]], np.float32)
    inputs = torch.as_tensor(agent.obs_normaliser.snapshot()(obs))
    assert inputs[0, 1] == -10.0 and abs(inputs[0, 0]) < 1.0
    mean = agent.actor(inputs).detach().numpy()
    np.testing.assert_allclose(policy(obs, None), mean, rtol=1e-5)
    samples = policy(np.repeat(obs, 100_000, axis=0), np.random.default_rng(0))
    std = agent.log_std.exp().detach().numpy()
    np.testing.assert_allclose(samples.mean(0), mean[0], atol=0.02)
    np.testing.assert_allclose(samples.std(0), std, rtol=0.02)
    assert abs(np.corrcoef(samples.T)[0, 1]) < 0.02


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_log_std_by_default_has_noise_of_length_one_over_three_actions_or_more(size: int) -> None:
    agent = agent_of(Box(-2, 2, (size,)))
    assert agent.log_std.shape == (size,)
    assert agent.log_std.exp().square().sum().item() == pytest.approx(min(size / 3, 1.0))


@pytest.mark.parametrize(
    ("env", "flag", "rate"),
    [("Target", None, 3e-4), ("WideTarget", None, 1.5e-4), ("WideTarget", 1e-3, 1e-3)],
)
def test_learning_rate_by_default_is_smaller_for_more_than_17_inputs(
    env: str, flag: float | None, rate: float, run_dir
) -> None:
    train(quick_args(ppo_continuous, run_dir, env_id=f"test/{env}-v0", learning_rate=flag))
    assert read_metrics(run_dir)[0]["charts/learning_rate"] == pytest.approx(rate)


def test_log_std_with_a_fall_follows_the_schedule(run_dir) -> None:
    args = quick_args(ppo_continuous, run_dir, log_std_init=-0.5, log_std_fall=1.0)
    agent, _ = train(args)
    assert "log_std" not in dict(agent.named_parameters()) and "log_std" in agent.state_dict()
    stds = [row["charts/action_std"] for row in read_metrics(run_dir)]
    np.testing.assert_allclose(stds, np.exp(np.linspace(-0.5, -1.4, 10)), rtol=1e-6)


def test_log_std_without_a_fall_is_learned(run_dir) -> None:
    args = quick_args(ppo_continuous, run_dir, log_std_init=-0.5, log_std_fall=None)
    agent, _ = train(args)
    assert "log_std" in dict(agent.named_parameters())
    assert len(set(agent.log_std.tolist())) == 2  # each dimension went its own way
    assert (agent.log_std != -0.5).all()


# ---- The box of actions ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "sent"),
    [
        ({}, [[-1.0, 0.0], [1.0, 0.25], [2.0, 0.375], [3.0, 0.5]]),
        ({"scale_actions": False}, [[-1.0, 0.0], [0.0, 0.0], [0.5, 0.5], [3.0, 0.5]]),
        ({"squash": True}, [[-1.0, 0.0], [1.0, 0.25], [1.924234, 0.365529], [3.0, 0.5]]),
    ],
)
def test_to_env_maps_minus_one_to_one_to_the_box(flags: dict, sent: list) -> None:
    """Rows: far below, 0, 0.5 and far above, for the box [-1, 3] x [0, 0.5]."""
    box = Box(np.array([-1.0, 0.0], np.float32), np.array([3.0, 0.5], np.float32))
    actions = np.repeat([[-50.0], [0.0], [0.5], [50.0]], 2, axis=1)
    np.testing.assert_allclose(agent_of(box, **flags).to_env(actions), sent, rtol=1e-5)


def test_to_env_gives_the_shape_and_type_of_the_box() -> None:
    box = Box(-1.0, 1.0, (2, 3), np.float64)
    sent = agent_of(box).to_env(np.arange(12, dtype=np.float32).reshape(2, 6) / 12)
    assert sent.shape == (2, 2, 3) and sent.dtype == np.float64
    np.testing.assert_allclose(sent[1].ravel(), np.arange(6, 12) / 12, rtol=1e-6)


def test_to_env_with_the_widest_box_does_not_overflow() -> None:
    agent = agent_of(Box(-3.4e38, 3.4e38, (2,), np.float32))
    assert np.isfinite(agent.half_width).all()
    np.testing.assert_allclose(agent.to_env(np.array([[0.5, -1.0]])), [[1.7e38, -3.4e38]])


def test_train_sends_actions_of_the_box_and_learns_from_free_ones(monkeypatch, run_dir) -> None:
    sent = spy(monkeypatch, "to_env", Agent)
    updates = spy(monkeypatch, "ppo_loss", ppo_continuous)
    train(quick_args(ppo_continuous, run_dir, log_std_init=0.5))
    assert max(np.abs(call.result).max() for call in sent) == 1.0
    assert max(call.batch.actions.abs().max() for call in updates) > 1.5


def test_clipped_actions_logs_the_share_that_the_box_clips(run_dir) -> None:
    train(quick_args(ppo_continuous, run_dir, log_std_init=0.5, total_timesteps=128))
    (row,) = read_metrics(run_dir)
    # A normal of standard deviation exp(0.5) leaves [-1, 1] 54 % of the time.
    assert row["charts/clipped_actions"] == pytest.approx(0.544, abs=0.08)


@pytest.mark.parametrize("env", ["UnboundedTarget", "HalfBoundedTarget"])
def test_clipped_actions_of_a_box_without_some_bounds_counts_the_others(run_dir, env) -> None:
    flags = dict(env_id=f"test/{env}-v0", log_std_init=1.0)
    train(quick_args(ppo_continuous, run_dir, **flags))
    shares = [row["charts/clipped_actions"] for row in read_metrics(run_dir)]
    assert max(shares) == 0.0 if env == "UnboundedTarget" else min(shares) > 0.5


def test_clipped_actions_counts_no_reset_row(monkeypatch, run_dir) -> None:
    """Every fourth row of `PoisonBox` is a reset."""
    calls = spy(monkeypatch, "to_env", Agent)
    flags = dict(env_id="test/PoisonBox-v0", total_timesteps=128, norm_obs=False)
    args = quick_args(ppo_continuous, run_dir, **flags)
    _, results = train(args)
    whole = [len(call.result) for call in calls if len(call.result) > args.num_envs]
    assert whole == [results["global_step"]] and results["global_step"] < 128


# ---- The normalisers ---------------------------------------------------------------------------


def test_normaliser_after_updates_has_the_moments_of_all_rows() -> None:
    normaliser, rng = Normaliser((3,), clip=10.0), np.random.default_rng(0)
    parts = [rng.normal(5.0, (1.0, 2.0, 3.0), (rows, 3)) for rows in (1, 100, 7, 1000)]
    for part in parts:
        normaliser.update(part)
    rows = np.concatenate(parts)
    np.testing.assert_allclose(normaliser.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(normaliser.var, rows.var(0), rtol=1e-12)
    assert normaliser.count == len(rows)
    normal = normaliser.snapshot()(rows.astype(np.float32))
    assert normal.dtype == np.float32
    np.testing.assert_allclose(normal, (rows - rows.mean(0)) / rows.std(0), atol=1e-4)


@pytest.mark.parametrize("shift", [True, False])
def test_normaliser_without_shift_only_divides(shift: bool) -> None:
    normaliser = Normaliser((), clip=2.0, shift=shift)
    normaliser.update(np.array([1.0, 3.0, 5.0, 7.0]))  # mean 4, variance 5
    rows = np.array([0.0, 4.0, 100.0], np.float32)
    expected = (rows - 4.0 * shift) / 5**0.5
    np.testing.assert_allclose(normaliser.snapshot()(rows), expected.clip(-2.0, 2.0), rtol=1e-6)


def test_normaliser_function_is_that_of_the_moment() -> None:
    normaliser, rows = Normaliser((2,), clip=10.0), np.ones((1, 2), np.float32)
    function = normaliser.snapshot()
    normaliser.update(np.random.default_rng(0).normal(5.0, 2.0, (10, 2)))
    np.testing.assert_allclose(function(rows), rows, rtol=1e-6)
    assert (normaliser.snapshot()(rows) < 0).all()


@pytest.mark.parametrize("on", [True, False])
def test_normalisers_can_be_switched_off(run_dir, on: bool) -> None:
    flags = dict(norm_obs=on, norm_reward=on, clip_obs=2.5)
    agent, results = train(quick_args(ppo_continuous, run_dir, **flags))
    big = np.array([[1e4, -1e4]], np.float32)
    assert np.abs(agent.obs_normaliser.snapshot()(big)).max() == (2.5 if on else 1e4)
    assert agent.reward_scaler.snapshot()(big).max() == (10.0 if on else 1e4)
    assert agent.obs_normaliser.count == (results["global_step"] if on else 0)
    # The first observations, of 256 steps at most, come without returns.
    first = agent.obs_normaliser.count - agent.reward_scaler.count
    assert 0 < first <= 256 if on else first == 0


def test_train_gives_the_normalisers_transitions_only(monkeypatch, run_dir) -> None:
    """`PoisonBox` pays 1e6 in reset rows, and only a reset row has the marked observation."""
    calls = spy(monkeypatch, "update", Normaliser)
    rollouts = spy(monkeypatch, "gae", ppo_continuous)
    flags = dict(env_id="test/PoisonBox-v0", num_envs=3, num_steps=32, gamma=0.9)
    agent, results = train(quick_args(ppo_continuous, run_dir, **flags))
    rows = {
        name: [call.rows for call in calls if call.self is getattr(agent, name)]
        for name in ("obs_normaliser", "reward_scaler")
    }
    obs, returns = (np.concatenate(parts).astype(np.float64) for parts in rows.values())
    first = len(rows["obs_normaliser"][0])
    assert len(obs) == len(returns) + first == results["global_step"] == agent.obs_normaliser.count
    assert not (obs[:, 0] == MARK).any()
    np.testing.assert_allclose(agent.obs_normaliser.mean, obs.mean(0), rtol=1e-6)
    np.testing.assert_allclose(agent.obs_normaliser.var, obs.var(0), rtol=1e-5, atol=1e-9)
    # Reward 1 for 3 steps, the sum cleared at each end and kept between rollouts. Only the first
    # episodes of two environments are shorter.
    sums, counts = np.unique(returns.round(6), return_counts=True)
    assert sums.tolist() == [1.0, 1.9, 2.71] and np.ptp(counts) <= 4
    for i, rollout in enumerate(rollouts):  # an iteration's scale is that of all rows up to its own
        seen = np.concatenate(rows["reward_scaler"][: i + 1])
        scale = min(10.0, 1 / np.sqrt(seen.var() + 1e-8))
        assert rollout.rewards.max().item() == pytest.approx(scale, rel=1e-5)


def test_state_dict_of_an_agent_is_its_whole_policy(run_dir) -> None:
    agent, _ = train(quick_args(ppo_continuous, run_dir))
    fresh = gaussian_agent()
    obs = np.random.default_rng(0).normal(0, 3, (20, 2)).astype(np.float32)

    def sample(policy_of: Agent) -> np.ndarray:
        return policy_of.act(obs, {}, np.random.default_rng(0))

    assert not np.array_equal(sample(fresh), sample(agent))
    fresh.load_state_dict(agent.state_dict())
    assert np.array_equal(sample(fresh), sample(agent))
    scales = [x.reward_scaler.snapshot()(np.ones(3, np.float32)) for x in (fresh, agent)]
    assert np.array_equal(*scales) and scales[0][0] != 1.0


# ---- Environments ------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{}, {"squash": True}, {"objective": "penalty"}])
def test_train_learns_the_target(run_dir, flags: dict) -> None:
    flags = flags | dict(total_timesteps=16_000, num_steps=64, gamma=0.5, eval_episodes=20)
    _, results = train(quick_args(ppo_continuous, run_dir, **flags))
    assert results["eval_mean"] > -0.15  # standing still costs 1.7
    assert results["eval_stochastic_mean"] < results["eval_mean"]


@pytest.mark.parametrize("env", ["Parts", "Bits"])
def test_make_envs_of_actions_in_parts_names_the_script_for_them(env: str) -> None:
    with pytest.raises(UserError, match=r"ppo_discrete\.py"):
        make_envs(Args(env_id=f"test/{env}-v0"), 2)


@pytest.mark.parametrize("env", ["UnboundedTarget", "HalfBoundedTarget"])
def test_squash_without_bounds_is_refused(env: str) -> None:
    with pytest.raises(UserError, match="--squash"):
        make_envs(Args(env_id=f"test/{env}-v0", squash=True), 2)


def test_ent_coef_with_a_scheduled_log_std_is_refused(run_dir) -> None:
    with pytest.raises(UserError, match="--ent-coef"):
        train(quick_args(ppo_continuous, run_dir, ent_coef=0.01))
    train(quick_args(ppo_continuous, run_dir, ent_coef=0.01, log_std_fall=None))
