"""`ppo_continuous.py`: what differs from its discrete sibling, whose tests hold the rest."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution

import ppo_continuous
from ppo_continuous import Agent, Args, RunningMoments, UserError, train
from tests.envs import MARK
from tests.helpers import read_metrics, spy


def small(run_dir: Path, **changes) -> Args:
    """Arguments of a run that takes about a second."""
    quick = dict(env_id="test/Target-v0", num_envs=8, num_steps=16, total_timesteps=1280)
    quick |= dict(num_minibatches=4, eval_episodes=4, run_dir=run_dir)
    return Args(**(quick | changes))


def make_agent(env_id: str = "test/Target-v0", **changes) -> Agent:
    torch.manual_seed(0)
    args = Args(env_id=env_id, **changes)
    agent = Agent(args, ppo_continuous.make_envs(args, 1))
    nn.init.normal_(agent.actor[-1].weight, std=0.3)
    nn.init.normal_(agent.log_std, std=0.3)
    return agent


# ---- The policy ------------------------------------------------------------------------------


def test_log_prob_and_entropy_equal_torch_distributions() -> None:
    agent, obs, actions = make_agent(), torch.randn(5, 7, 2), torch.randn(5, 7, 2)
    log_probs, entropy = agent.log_prob_and_entropy(obs, actions)
    oracle = Normal(agent.actor(obs), agent.log_std.exp())
    torch.testing.assert_close(log_probs, oracle.log_prob(actions).sum(-1))
    torch.testing.assert_close(entropy, oracle.entropy().sum(-1))


def test_the_squashed_log_prob_is_that_of_the_change_of_variables() -> None:
    agent, obs, actions = make_agent(squash=True), torch.randn(50, 2), torch.randn(50, 2)
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
    far, _ = agent.log_prob_and_entropy(obs, torch.full((50, 2), 30.0))
    assert torch.isfinite(far).all()


def test_the_numpy_policy_is_the_gaussian_of_the_normalised_observation() -> None:
    agent = make_agent()
    agent.obs_moments.update(np.random.default_rng(0).normal(3.0, 5.0, (100, 2)))
    act, obs = agent.numpy_policy(), np.array([[4.0, -200.0]], np.float32)
    mean = agent.actor(torch.as_tensor(agent.normalise_obs(obs))).detach().numpy()
    np.testing.assert_allclose(act(obs, 0.0), mean, rtol=1e-5)
    noise = agent.noise(np.random.default_rng(0), 100_000)
    samples = act(np.repeat(obs, 100_000, axis=0), noise)
    std = agent.log_std.exp().detach().numpy()
    np.testing.assert_allclose(samples.mean(0), mean[0], atol=0.02)
    np.testing.assert_allclose(samples.std(0), std, rtol=0.02)


def test_actions_sent_are_in_the_box_and_stored_ones_are_free(monkeypatch, run_dir) -> None:
    sent = spy(monkeypatch, "to_env", Agent)
    seen = spy(monkeypatch, "log_prob_and_entropy", Agent)
    train(small(run_dir, log_std_init=0.5))
    assert max(np.abs(result).max() for *_, result in sent) == 1.0
    assert max(actions.abs().max() for _, _, actions, _ in seen) > 1.5
    shares = [row["charts/clipped_actions"] for row in read_metrics(run_dir)]
    # A normal of standard deviation exp(0.5) leaves [-1, 1] 54 % of the time.
    assert shares[0] == pytest.approx(0.544, abs=0.08)
    squashed = make_agent(squash=True).to_env(np.array([[-50.0, 0.0], [0.5, 50.0]]))
    np.testing.assert_allclose(squashed, [[-1.0, 0.0], [np.tanh(0.5), 1.0]])


@pytest.mark.parametrize(
    ("flags", "sent"),
    [
        ({}, [[-1.0, 0.0], [1.0, 0.25], [2.0, 0.375], [3.0, 0.5]]),
        ({"scale_actions": False}, [[-1.0, 0.0], [0.0, 0.0], [0.5, 0.5], [3.0, 0.5]]),
        ({"squash": True}, [[-1.0, 0.0], [1.0, 0.25], [1.924234, 0.365529], [3.0, 0.5]]),
    ],
)
def test_the_box_is_minus_one_to_one_of_the_policy(flags: dict, sent: list) -> None:
    """Rows: far below, 0, 0.5 and far above, for the box [-1, 3] x [0, 0.5]."""
    box = gym.spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([3.0, 0.5], np.float32))
    spaces = SimpleNamespace(single_action_space=box, single_observation_space=box)
    agent = Agent(Args(**flags), spaces)
    actions = np.repeat([[-50.0], [0.0], [0.5], [50.0]], 2, axis=1)
    np.testing.assert_allclose(agent.to_env(actions), sent, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_the_first_noise_has_length_one_over_three_actions_or_more(size: int) -> None:
    spaces = SimpleNamespace(
        single_observation_space=gym.spaces.Box(-1, 1, (4,)),
        single_action_space=gym.spaces.Box(-2, 2, (size,)),
    )
    agent = Agent(Args(), spaces)
    assert agent.log_std.shape == (size,)
    assert agent.log_std.exp().square().sum().item() == pytest.approx(min(size / 3, 1.0))


def test_log_std_falls_linearly_or_is_learned(run_dir) -> None:
    agent, _ = train(small(run_dir / "falls", log_std_init=-0.5, log_std_fall=1.0))
    assert "log_std" not in dict(agent.named_parameters()) and "log_std" in agent.state_dict()
    stds = [row["charts/action_std"] for row in read_metrics(run_dir / "falls")]
    np.testing.assert_allclose(stds, np.exp(np.linspace(-0.5, -1.4, 10)), rtol=1e-6)
    agent, _ = train(small(run_dir / "learned", log_std_init=-0.5, log_std_fall=None))
    assert "log_std" in dict(agent.named_parameters())
    assert len(set(agent.log_std.tolist())) == 2  # each dimension went its own way


# ---- The normalisers ---------------------------------------------------------------------------


def test_running_moments_are_those_of_all_rows() -> None:
    moments, rng = RunningMoments(3), np.random.default_rng(0)
    parts = [rng.normal(5.0, (1.0, 2.0, 3.0), (rows, 3)) for rows in (1, 100, 7, 1000)]
    for part in parts:
        moments.update(part)
    rows = np.concatenate(parts)
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.var, rows.var(0), rtol=1e-12)
    assert moments.count == len(rows)


def test_the_moments_are_those_of_the_real_rows(monkeypatch, run_dir) -> None:
    """`PoisonBox` pays 1e6 in reset rows, and only a reset row has the marked observation."""
    seen = spy(monkeypatch, "observe", Agent)
    gae_calls = spy(monkeypatch, "gae", ppo_continuous)
    args = small(run_dir, env_id="test/PoisonBox-v0", num_envs=3, num_steps=32, gamma=0.9)
    agent, results = train(args)
    obs = np.concatenate([obs for _, obs, *_ in seen]).astype(np.float64)
    returns = np.concatenate([returns for _, _, returns, _ in seen])
    assert len(seen) == 13 and len(obs) == results["global_step"] == agent.obs_moments.count
    assert not (obs[:, 0] == MARK).any()
    np.testing.assert_allclose(agent.obs_moments.mean, obs.mean(0), rtol=1e-6)
    np.testing.assert_allclose(agent.obs_moments.var, obs.var(0), rtol=1e-5, atol=1e-9)
    # Reward 1 for at most 3 steps, the sum cleared at each end.
    assert {round(float(x), 6) for x in returns} == {1.0, 1.9, 2.71}
    # The scale of an iteration is that of the rows before it; the first looks at its own.
    scaled = gae_calls[0][0].max().item()
    assert scaled == pytest.approx(min(10.0, 1 / np.sqrt(seen[0][2].var() + 1e-8)), rel=1e-5)


def test_statistics_stand_still_within_an_iteration(monkeypatch, run_dir) -> None:
    """So the first ratio of every update is 1, although the moments move in between."""
    ratios = spy(monkeypatch, "clipped_surrogate", ppo_continuous)
    train(small(run_dir, num_minibatches=2, update_epochs=2))
    for ratio, *_ in ratios[::4]:
        torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-5, rtol=0)
    assert any((ratio - 1).abs().max() > 1e-3 for ratio, *_ in ratios)


def test_one_state_dict_is_the_whole_policy(run_dir) -> None:
    agent, _ = train(small(run_dir))
    fresh = make_agent()
    obs = np.random.default_rng(0).normal(0, 3, (20, 2)).astype(np.float32)
    assert not np.array_equal(fresh.numpy_policy()(obs, 0.0), agent.numpy_policy()(obs, 0.0))
    fresh.load_state_dict(agent.state_dict())
    assert np.array_equal(fresh.numpy_policy()(obs, 0.0), agent.numpy_policy()(obs, 0.0))
    assert np.array_equal(fresh.scale_rewards(np.ones(3)), agent.scale_rewards(np.ones(3)))


@pytest.mark.parametrize("on", [True, False])
def test_normalisation_can_be_switched_off(monkeypatch, run_dir, on: bool) -> None:
    agent, _ = train(small(run_dir, norm_obs=on, norm_reward=on, clip_obs=2.5))
    big = np.array([[1e4, -1e4]], np.float32)
    assert (np.abs(agent.normalise_obs(big)).max() == 2.5) == on
    assert (agent.scale_rewards(big).max() == 10.0) == on
    assert (agent.obs_moments.count > 0) == on


# ---- Training ------------------------------------------------------------------------------------


PENALTY = {"objective": "penalty"}


@pytest.mark.parametrize("changes", [{}, {"squash": True}, PENALTY])
def test_learns_the_target(run_dir, changes: dict) -> None:
    args = small(run_dir, total_timesteps=16_000, num_steps=64, gamma=0.5, eval_episodes=20)
    for name, value in changes.items():
        setattr(args, name, value)
    _, results = train(args)
    assert results["eval_mean"] > -0.15  # standing still costs 1.7
    assert results["eval_stochastic_mean"] < results["eval_mean"]


@pytest.mark.parametrize("env", ["UnboundedTarget", "HalfBoundedTarget"])
def test_actions_are_clipped_where_there_is_a_bound_and_it_says_so(
    run_dir, capsys, env: str
) -> None:
    train(small(run_dir, env_id=f"test/{env}-v0", log_std_init=1.0))
    assert "a bound of the actions is missing" in capsys.readouterr().out
    shares = [row["charts/clipped_actions"] for row in read_metrics(run_dir)]
    assert max(shares) == 0.0 if env == "UnboundedTarget" else min(shares) > 0.5


def test_the_widest_box_does_not_overflow() -> None:
    box, obs = gym.spaces.Box(-3.4e38, 3.4e38, (2,), np.float32), gym.spaces.Box(0.0, 1.0, (3,))
    agent = Agent(Args(), SimpleNamespace(single_action_space=box, single_observation_space=obs))
    assert np.isfinite(agent.half_width).all()


def test_the_share_of_clipped_actions_is_that_of_real_rows(monkeypatch, run_dir) -> None:
    calls = spy(monkeypatch, "in_env_units", owner=Agent)
    _, results = train(small(run_dir, env_id="test/PoisonBox-v0"))
    rows = [len(actions) for _, actions, _ in calls if len(actions) > 8]
    assert sum(rows) == 2 * results["global_step"] < 2 * 1280


@pytest.mark.parametrize("name, value", [("learning_rate", 1e-5), ("kl_coef", 7.0)])
def test_a_flag_changed_for_a_resumed_run_counts(run_dir, name: str, value: float) -> None:
    args = small(run_dir, objective="penalty", target_kl=1e9)
    if name == "learning_rate":
        args = small(run_dir, desired_kl=1e9)  # raised by half in every iteration
    train(args)
    args = replace(args, resume=run_dir, total_timesteps=1408, **{name: value})
    train(args)
    column = "charts/learning_rate" if name == "learning_rate" else "losses/kl_coef"
    before, after = [row[column] for row in read_metrics(run_dir)][-2:]
    assert before != after == (value if name == "learning_rate" else value / 2)
    train(replace(args, total_timesteps=1536))  # from then on it is adapted
    last = read_metrics(run_dir)[-1][column]
    assert last == pytest.approx(after * (1.5 if name == "learning_rate" else 0.5))


@pytest.mark.parametrize("changes", [{"config": "faithful"}, {"run_dir": Path("elsewhere")}])
def test_a_resumed_run_refuses_what_it_could_not_heed(run_dir, changes: dict) -> None:
    train(small(run_dir))
    with pytest.raises(UserError, match=f"--{next(iter(changes)).replace('_', '-')}"):
        train(replace(small(run_dir, resume=run_dir), **changes))


def test_actions_of_whole_numbers_are_refused(run_dir) -> None:
    with pytest.raises(UserError, match="not Box of floats"):
        train(small(run_dir, env_id="test/WholeTarget-v0"))


def test_the_same_seed_gives_the_same_parameters_to_the_last_bit(run_dir) -> None:
    first, second = (train(small(run_dir / name))[0].state_dict() for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env_id": "CartPole-v1"}, "use ppo_discrete.py"),
        ({"env_id": "test/Parts-v0"}, "use ppo_discrete.py"),
        ({"env_id": "test/UnboundedTarget-v0", "squash": True}, "--squash needs bounded actions"),
        ({"learning_rate": 1e30}, "lower --learning-rate"),
        ({"ent_coef": 0.01}, "--ent-coef needs --log-std-fall None"),
    ],
)
def test_wrong_input_is_named(run_dir, changes: dict, message: str) -> None:
    with np.errstate(all="ignore"), pytest.raises(UserError, match=message):
        train(small(run_dir, **changes))
    assert not (run_dir / "results.json").exists()


@pytest.mark.parametrize("flags", ["--config faithful", "--config=faithful", ""])
def test_the_faithful_configuration_sets_the_defaults(monkeypatch, flags: str) -> None:
    calls = []
    monkeypatch.setattr(ppo_continuous, "train", lambda args, stop: calls.append(args))
    monkeypatch.setattr(ppo_continuous.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["ppo_continuous.py", *flags.split(), "--num-envs", "3"])
    ppo_continuous.main()
    (args,) = calls
    assert args.num_envs == 3  # the user's word wins
    assert args.log_std_fall == (None if flags else 1.5)
    assert args.scale_actions != bool(flags) and args.config == ("faithful" if flags else "strong")
