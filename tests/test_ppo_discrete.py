"""`ppo_discrete.py`: its pure functions against oracles, its training on known environments."""

import itertools
import json
import threading
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

import ppo_discrete
from ppo_discrete import Agent, Args, UserError, train
from tests.envs import MARK
from tests.helpers import read_metrics, spy


def small(run_dir: Path, **changes) -> Args:
    """Arguments of a run that takes about a second."""
    quick = dict(env_id="test/Identity-v0", num_envs=8, num_steps=16, total_timesteps=1280)
    return Args(**(quick | dict(eval_episodes=4, run_dir=run_dir) | changes))


# ---- Losses ----------------------------------------------------------------------------------


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
def test_the_surrogate_has_no_gradient_exactly_where_it_clips(ratio, advantage, clips) -> None:
    r = torch.tensor([ratio], requires_grad=True)
    surrogate = ppo_discrete.clipped_surrogate(r, torch.tensor([advantage]), 0.2)
    surrogate.backward()
    assert r.grad.item() == (0.0 if clips else advantage)
    bound = 1.2 if ratio > 1 else 0.8
    assert surrogate.item() == pytest.approx((bound if clips else ratio) * advantage)


def test_the_kl_penalty_is_unbiased_and_pulls_back() -> None:
    old, new = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.5, 0.3])
    actions = torch.multinomial(old, 200_000, replacement=True)
    log_ratio = (new / old).log()[actions]
    penalty = -ppo_discrete.kl_penalised_surrogate(log_ratio, torch.zeros(200_000), 2.0)
    exact = (old * (old / new).log()).sum()
    assert penalty.item() == pytest.approx(2.0 * exact.item(), rel=0.02)

    x = torch.tensor([0.3, 0.0, -0.3], requires_grad=True)  # log ratios
    ppo_discrete.kl_penalised_surrogate(x, torch.zeros(3), 1.0).backward()
    assert x.grad[0] < 0 and x.grad[1] == 0 and x.grad[2] > 0  # uphill is towards ratio 1

    # At ratio 1 the penalty vanishes: what is left is the policy gradient, A / M.
    x = torch.zeros(2, requires_grad=True)
    ppo_discrete.kl_penalised_surrogate(x, torch.tensor([3.0, -1.0]), 5.0).backward()
    assert x.grad.tolist() == [1.5, -0.5]


@pytest.mark.parametrize(
    ("kl", "factor"), [(0.0, 0.5), (0.0066, 0.5), (0.0067, 1.0), (0.0149, 1.0), (0.0151, 2.0)]
)
def test_the_kl_coefficient_follows_the_paper(kl: float, factor: float) -> None:
    assert ppo_discrete.adapt_kl_coef(3.0, kl, 0.01) == 3.0 * factor
    assert 1e-6 <= ppo_discrete.adapt_kl_coef(1e-6, kl, 0.01) <= 2e-6  # for it could never leave 0


@pytest.mark.parametrize(
    ("kl", "rate"), [(0.0066, 1.5e-3), (0.0067, 1e-3), (0.0149, 1e-3), (0.0151, 1e-3 / 1.5)]
)
def test_the_learning_rate_follows_the_kl(kl: float, rate: float) -> None:
    assert ppo_discrete.adapt_learning_rate(1e-3, kl, 0.01) == pytest.approx(rate, rel=1e-12)
    assert ppo_discrete.adapt_learning_rate(9e-3, kl, 0.01) <= 1e-2  # without a signal KL stays 0
    assert ppo_discrete.adapt_learning_rate(5e-2, 0.0, 0.01) == 5e-2  # as the user set it


def test_value_loss_by_hand() -> None:
    values = torch.tensor([1.0, 3.0, 0.0], requires_grad=True)
    old_values, returns = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([2.0, 2.0, 2.0])
    assert ppo_discrete.value_loss(values, old_values, returns, None).item() == (1 + 1 + 4) / 6
    # Clipped at 0.5 the values are 1, 1.5, 0.5, the larger errors 1, 1 and 4.
    assert ppo_discrete.value_loss(values, old_values, returns, 0.5).item() == (1 + 1 + 4) / 6
    # Where the move overshot inside the clipped error, that error wins and stops the gradient.
    loss = ppo_discrete.value_loss(values, old_values, torch.tensor([1.0, 2.8, 1.0]), 0.5)
    loss.backward()
    assert loss.item() == pytest.approx((0 + 1.3**2 + 1) / 6)
    assert values.grad[1] == 0.0 and values.grad[2] != 0.0


def test_diagnostics_by_hand() -> None:
    log_ratio = torch.tensor([1.0, 1.3, 0.75, 1.1]).log()
    kl, clipped = ppo_discrete.diagnostics(log_ratio, 0.2)
    r = log_ratio.exp()
    assert kl == pytest.approx((r - 1 - r.log()).mean().item(), abs=1e-7)
    assert clipped == 0.5
    assert ppo_discrete.diagnostics(torch.zeros(5), 0.2) == (0.0, 0.0)


# ---- Agent -----------------------------------------------------------------------------------


def make_agent(env_id: str = "CartPole-v1", **changes) -> Agent:
    args = Args(env_id=env_id, **changes)
    return Agent(args, ppo_discrete.make_envs(args, 1))


def test_log_prob_and_entropy_equal_torch_distributions() -> None:
    agent, obs = make_agent("Acrobot-v1"), torch.randn(5, 7, 6)
    nn.init.normal_(agent.actor[-1].weight)
    actions = torch.randint(3, (5, 7))
    log_probs, entropy, values = agent(obs, actions[..., None])
    oracle = torch.distributions.Categorical(logits=agent.actor(obs))
    torch.testing.assert_close(log_probs, oracle.log_prob(actions))
    torch.testing.assert_close(entropy, oracle.entropy())
    assert values.shape == (5, 7) and torch.equal(values, agent.value(obs))


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_the_numpy_policy_samples_from_the_policy(activation: str) -> None:
    agent = make_agent("Acrobot-v1", activation=activation)
    nn.init.normal_(agent.actor[-1].weight)
    obs = torch.randn(1, 6)
    probs = agent.actor(obs).softmax(-1).squeeze().detach().numpy()
    act, rows = agent.numpy_policy(), np.repeat(obs.numpy(), 100_000, axis=0)
    actions = act(rows, agent.noise(np.random.default_rng(0), 100_000))
    np.testing.assert_allclose(np.bincount(actions[:, 0], minlength=3) / 1e5, probs, atol=0.006)
    many = torch.randn(100, 6)
    assert (act(many.numpy(), 0.0)[:, 0] == agent.actor(many).argmax(-1).numpy()).all()


def test_the_numpy_policy_sees_normalised_observations() -> None:
    """Also those far out, which are clipped."""
    agent = make_agent("Acrobot-v1", norm_obs=True, clip_obs=2.0)
    nn.init.normal_(agent.actor[-1].weight)
    agent.observe(np.random.default_rng(0).normal(3.0, 2.0, (100, 6)), np.ones(100))
    obs = np.random.default_rng(1).normal(0.0, 20.0, (200, 6)).astype(np.float32)
    inputs = torch.as_tensor(agent.normalise_obs(obs), dtype=torch.float32)
    assert (inputs.abs() == 2.0).any()
    likeliest = agent.actor(inputs).argmax(-1).numpy()
    assert (agent.numpy_policy()(obs, 0.0)[:, 0] == likeliest).all()


def test_initialisation() -> None:
    """Orthogonal with gain sqrt(2), heads .01 and 1, biases 0, first policy almost uniform."""
    agent = make_agent(hidden_size=32)
    for net, head_gain in ((agent.actor, 0.01), (agent.critic, 1.0)):
        linears = [layer for layer in net if isinstance(layer, nn.Linear)]
        for layer, gain in zip(linears, (2**0.5, 2**0.5, head_gain), strict=True):
            w = layer.weight if layer.weight.shape[0] <= layer.weight.shape[1] else layer.weight.T
            torch.testing.assert_close(w @ w.T, gain**2 * torch.eye(len(w)), atol=1e-5, rtol=1e-5)
            assert not layer.bias.any()
    _, entropy, _ = agent(torch.randn(64, 4), torch.zeros(64, 1, dtype=torch.long))
    assert (entropy > np.log(2) - 1e-3).all()


def test_one_flat_vector_trains_as_separate_tensors_do() -> None:
    torch.manual_seed(0)
    agent, plain = make_agent(), make_agent()
    plain.load_state_dict(agent.state_dict())
    flat = ppo_discrete.flatten_parameters(agent)
    ours = torch.optim.Adam([flat], lr=0.01, eps=1e-5, fused=True)
    theirs = torch.optim.Adam(plain.parameters(), lr=0.01, eps=1e-5)
    obs = torch.randn(32, 4)
    for _ in range(5):
        flat.grad.zero_()
        (agent.value(obs).square().mean() + agent.actor(obs).cos().mean()).backward()
        flat.grad *= (0.5 / (flat.grad.norm() + 1e-6)).clamp(max=1.0)
        ours.step()
        theirs.zero_grad()
        (plain.value(obs).square().mean() + plain.actor(obs).cos().mean()).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        theirs.step()
    assert flat.numel() == sum(p.numel() for p in plain.parameters())
    for p, q in zip(agent.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q)


# ---- One update ------------------------------------------------------------------------------


def test_the_first_ratio_of_every_update_is_one(monkeypatch, run_dir) -> None:
    calls = spy(monkeypatch, "clipped_surrogate", ppo_discrete)
    train(small(run_dir, env_id="CartPole-v1", num_minibatches=2, update_epochs=2))
    assert len(calls) == 10 * 4
    for ratio, *_ in calls[::4]:
        torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-5, rtol=0)
    assert any((ratio - 1).abs().max() > 1e-3 for ratio, *_ in calls)


def test_an_update_moves_the_parameters_as_in_stable_baselines3(monkeypatch, run_dir) -> None:
    """Same weights, same batch, 4 epochs of one minibatch: equal to 1e-5 (parameters move 1e-2)."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.logger import Logger

    T, N = 32, 4
    start, gae_calls = {}, spy(monkeypatch, "gae", ppo_discrete)
    seen = spy(monkeypatch, "log_prob_and_entropy", Agent)

    def remember(agent: Agent, flatten=ppo_discrete.flatten_parameters):
        start.update({name: x.clone() for name, x in agent.state_dict().items()})
        return flatten(agent)

    monkeypatch.setattr(ppo_discrete, "flatten_parameters", remember)
    agent, _ = train(
        small(
            run_dir,
            env_id="Acrobot-v1",  # no episode ends within 32 steps, so SB3 sees the same rows
            num_envs=N,
            num_steps=T,
            total_timesteps=T * N,
            update_epochs=4,
            num_minibatches=1,
            norm_adv="minibatch",
            activation="tanh",
            learning_rate=1e-2,
            anneal_lr=False,
            ent_coef=0.01,
            vf_coef=1.0,  # SB3's value loss lacks our factor 1/2
            eval_episodes=1,
        )
    )
    _, obs, actions, _, (log_probs, _) = seen[0]
    values, (advantages, returns) = gae_calls[0][1], gae_calls[0][-1]
    assert obs.shape == (T, N, 6) and not gae_calls[0][4].any()

    model = PPO(
        "MlpPolicy",
        gym.make("Acrobot-v1"),
        n_steps=T * N,  # of one environment: the buffer is replaced below
        batch_size=T * N,
        n_epochs=4,
        learning_rate=1e-2,
        ent_coef=0.01,
        vf_coef=0.5,
        clip_range=0.2,
        device="cpu",
    )
    model.set_logger(Logger(None, []))
    theirs = {
        "actor.0": model.policy.mlp_extractor.policy_net[0],
        "actor.2": model.policy.mlp_extractor.policy_net[2],
        "actor.4": model.policy.action_net,
        "critic.0": model.policy.mlp_extractor.value_net[0],
        "critic.2": model.policy.mlp_extractor.value_net[2],
        "critic.4": model.policy.value_net,
    }
    for name, layer in theirs.items():
        layer.load_state_dict({k: start[f"{name}.{k}"] for k in ("weight", "bias")})
    buffer = type(model.rollout_buffer)(
        T, model.observation_space, model.action_space, device="cpu", n_envs=N
    )
    buffer.observations, buffer.actions = obs.numpy(), actions.numpy()
    buffer.values, buffer.log_probs = values.numpy(), log_probs.detach().numpy()
    buffer.advantages, buffer.returns = advantages.numpy(), returns.numpy()
    buffer.full = True
    model.rollout_buffer = buffer
    model.train()

    moved = 0.0
    for name, layer in theirs.items():
        for k in ("weight", "bias"):
            ours, expected = agent.state_dict()[f"{name}.{k}"], layer.state_dict()[k]
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
            moved = max(moved, (ours - start[f"{name}.{k}"]).abs().max().item())
    assert moved > 1e-2


def test_reset_rows_reach_nothing(monkeypatch, run_dir) -> None:
    """`Poison` pays 1e6 in every reset row, and only a reset row has the marked observation."""
    minibatches = spy(monkeypatch, "log_prob_and_entropy", Agent)
    losses = spy(monkeypatch, "value_loss", ppo_discrete)
    args = small(run_dir, env_id="test/Poison-v0", num_envs=3, num_steps=32, num_minibatches=2)
    agent, results = train(args)
    assert len(minibatches) == 13 * (1 + 20)  # the pass over all rows, 10 epochs of 2 minibatches
    for row, (_, obs, actions, *_) in enumerate(minibatches):
        if row % 21:  # not the pass over all rows
            assert not (obs[:, 0] == MARK).any()
            assert actions.shape[0] in (35, 36, 37)  # three quarters of 96, halved
    assert max(returns.abs().max() for _, _, returns, _, _ in losses) < 1e3
    rows = read_metrics(run_dir)
    # Every fourth row of every environment is a reset, 24 or so of the 96 rows of an iteration.
    assert results["global_step"] == 3 * 13 * 32 * 3 // 4
    returns = [row["charts/episodic_return"] for row in rows]
    lengths = [row["charts/episodic_length"] for row in rows]
    assert set(returns[1:]) == set(lengths[1:]) == {3.0} and results["train_return"] == 3.0
    assert results["eval_mean"] == (3 + 2 + 1 + 3) / 4  # its environments start out of step


@pytest.mark.parametrize("kind", ["truncated", "terminated"])
def test_the_critic_knows_a_time_limit_from_an_end(run_dir, kind: str) -> None:
    """Reward 1 for ever is worth 1 / (1 - gamma); reward 1 until the end is the finite sum."""
    agent, _ = train(
        small(
            run_dir,
            env_id="test/Constant-v0",
            env_kwargs=(f"truncate={str(kind == 'truncated').lower()}",),
            gamma=0.9,
            total_timesteps=16_000,
            num_steps=64,
            update_epochs=5,
            learning_rate=1e-2,
        )
    )
    values = agent.value(torch.eye(6)[:5]).detach()
    expected = [sum(0.9**i for i in range(5 - step)) for step in range(5)]
    if kind == "truncated":
        assert values[0].item() == pytest.approx(10.0, abs=0.3)
    else:
        torch.testing.assert_close(values, torch.tensor(expected), atol=0.15, rtol=0)


@pytest.mark.parametrize("norm_adv", ["batch", "minibatch", "none"])
def test_advantages_are_normalised_where_asked(monkeypatch, run_dir, norm_adv: str) -> None:
    calls = spy(monkeypatch, "clipped_surrogate", ppo_discrete)
    train(small(run_dir, env_id="CartPole-v1", norm_adv=norm_adv, num_minibatches=4))
    minibatch = torch.cat([calls[0][1]])
    batch = torch.cat([advantages for _, advantages, *_ in calls[:4]])
    for x, expected in ((minibatch, norm_adv == "minibatch"), (batch, norm_adv != "none")):
        # Four normalised minibatches have mean 0 together and a standard deviation near 1.
        normal = abs(x.mean()) < 1e-5 and abs(x.std() - 1) < 0.02
        assert normal == expected


@pytest.mark.parametrize("recompute", [False, True])
def test_advantages_are_recomputed_by_the_critic_of_the_epoch(
    monkeypatch, run_dir, recompute: bool
) -> None:
    calls = spy(monkeypatch, "gae", ppo_discrete)
    train(small(run_dir, total_timesteps=128, update_epochs=4, recompute_advantages=recompute))
    assert len(calls) == (4 if recompute else 1)
    for before, after in itertools.pairwise(calls):
        assert torch.equal(before[0], after[0])  # the rewards stay
        assert not torch.equal(before[1], after[1])  # the values move
    losses = spy(monkeypatch, "value_loss", ppo_discrete)
    train(small(run_dir / "2", total_timesteps=128, recompute_advantages=True, num_minibatches=1))
    for values, old_values, *_ in losses:  # the clipped loss starts from the critic of the epoch
        torch.testing.assert_close(values, old_values, atol=1e-5, rtol=0)


def test_the_learning_rate_falls_to_zero_or_stays(run_dir) -> None:
    train(small(run_dir / "falls", learning_rate=1e-3))
    rates = [row["charts/learning_rate"] for row in read_metrics(run_dir / "falls")]
    np.testing.assert_allclose(rates, 1e-3 * np.linspace(1.0, 0.1, 10))
    train(small(run_dir / "stays", learning_rate=1e-3, anneal_lr=False))
    assert {row["charts/learning_rate"] for row in read_metrics(run_dir / "stays")} == {1e-3}


def test_desired_kl_moves_the_learning_rate(run_dir) -> None:
    """By the KL of the iteration before, against a wish that falls as the root."""
    train(small(run_dir, learning_rate=1e-3, desired_kl=1e-3, update_epochs=1))
    rows = read_metrics(run_dir)
    rates = [row["charts/learning_rate"] for row in rows]
    assert rates[0] == 1e-3 and len(set(rates)) > 2
    for row, rate, wish in zip(rows, rates[1:], 1e-3 * np.linspace(1.0, 0.1, 10) ** 0.5):
        arguments = row["charts/learning_rate"], row["losses/approx_kl"], wish
        assert rate == pytest.approx(ppo_discrete.adapt_learning_rate(*arguments))


def test_target_kl_ends_an_update_early(monkeypatch, run_dir) -> None:
    calls = spy(monkeypatch, "clipped_surrogate", ppo_discrete)
    train(small(run_dir, target_kl=1e-9, num_minibatches=2))
    assert len(calls) == 10 * 2  # one epoch of ten, in each of ten iterations


def test_gradients_are_clipped_and_rows_used_once_an_epoch(monkeypatch, run_dir) -> None:
    norms = []

    class Recorder(torch.optim.Adam):
        def step(self, closure=None):
            norms.append(self.param_groups[0]["params"][0].grad.norm().item())
            return super().step(closure)

    monkeypatch.setattr(ppo_discrete, "Adam", Recorder)
    seen = spy(monkeypatch, "log_prob_and_entropy", Agent)
    train(small(run_dir, env_id="CartPole-v1", max_grad_norm=0.1, num_minibatches=3))
    assert max(norms) < 0.1 + 1e-5 and max(norms) > 0.09
    rollout = seen[0][1].flatten(0, 1)
    for epoch in range(10):
        rows = torch.cat([obs for _, obs, *_ in seen[1 + 3 * epoch : 4 + 3 * epoch]])
        assert len(rows) <= len(rollout)
        assert len(rows.unique(dim=0)) == len(rows)


# ---- Training --------------------------------------------------------------------------------


LEARN = dict(total_timesteps=8_000, num_steps=32, learning_rate=1e-2)


@pytest.mark.parametrize(
    "env", ["Identity", "OffsetIdentity", "NestedIdentity", "Matrix", "Factors"]
)
def test_learns_the_identity(run_dir, env: str) -> None:
    _, results = train(small(run_dir, env_id=f"test/{env}-v0", eval_episodes=20, **LEARN))
    assert results["eval_mean"] == 10.0 and results["eval_std"] == 0.0
    assert results["eval_stochastic_mean"] > 9.0


def test_the_penalty_objective_learns_too(run_dir) -> None:
    args = small(run_dir, objective="penalty", eval_episodes=20, **LEARN)
    _, results = train(args)
    assert results["eval_mean"] == 10.0
    coefficients = {row["losses/kl_coef"] for row in read_metrics(run_dir)}
    assert len(coefficients) > 1 and all(np.log2(x).is_integer() for x in coefficients)


@pytest.mark.parametrize("env", ["Blackjack-v1", "Taxi-v4", "CliffWalking-v1", "FrozenLake-v1"])
def test_toy_text_environments_run(run_dir, env: str) -> None:
    """Blackjack ends after a step or two: half of its rows are resets, and minibatches shrink."""
    args = small(
        run_dir, env_id=env, num_envs=2, num_steps=4, total_timesteps=80, num_minibatches=4
    )
    args.env_kwargs = ("max_episode_steps=20",)
    _, results = train(args)
    assert np.isfinite(results["eval_mean"]) and 0 < results["global_step"] <= 80


def test_environment_arguments_reach_the_environment() -> None:
    args = Args(env_id="FrozenLake-v1", env_kwargs=("is_slippery=False", "map_name=8x8"))
    env = ppo_discrete.make_envs(args, 2).unwrapped.envs[0]
    assert env.spec.kwargs["is_slippery"] is False and env.unwrapped.desc.shape == (8, 8)


def parameters_of(run_dir: Path, **changes) -> torch.Tensor:
    agent, _ = train(small(run_dir, env_id="CartPole-v1", **changes))
    return nn.utils.parameters_to_vector(agent.parameters()).detach()


def test_the_same_seed_gives_the_same_parameters_to_the_last_bit(run_dir) -> None:
    first = parameters_of(run_dir / "1")
    assert torch.equal(first, parameters_of(run_dir / "2"))
    assert not torch.equal(first, parameters_of(run_dir / "3", seed=2))
    assert torch.equal(first, parameters_of(run_dir / "4", eval_episodes=9))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_processes_for_the_environments_change_no_number(run_dir) -> None:
    flags = dict(num_envs=2, total_timesteps=64, eval_episodes=2)
    sync = parameters_of(run_dir / "1", vectorization_mode="sync", **flags)
    assert torch.equal(sync, parameters_of(run_dir / "2", vectorization_mode="async", **flags))


def test_a_run_leaves_its_files(run_dir, capsys) -> None:
    _, results = train(small(run_dir, env_id="CartPole-v1", seed=3))
    assert results == json.loads((run_dir / "results.json").read_text())
    assert results["seed"] == 3 and results["env_id"] == "CartPole-v1"
    assert results["eval_episodes"] == 4 and results["wall_seconds"] > 0 and results["sps"] > 0
    for kind in ("eval", "eval_stochastic"):
        assert results[f"{kind}_mean"] >= 1 and results[f"{kind}_std"] >= 0
    args = json.loads((run_dir / "args.json").read_text())
    assert args["seed"] == 3 and args["gamma"] == 0.99 and len(args) == len(vars(Args()))
    rows = read_metrics(run_dir)
    steps = [row["global_step"] for row in rows]
    assert len(rows) == 10 and steps == sorted(steps) and steps[-1] == results["global_step"]
    assert not list(run_dir.glob("*.tmp"))

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir)).Reload()
    for tag in ("charts/episodic_return", "losses/approx_kl", "losses/explained_variance"):
        logged = {event.step: event.value for event in events.Scalars(tag)}
        assert logged == {
            row["global_step"]: pytest.approx(row[tag], rel=1e-5)
            for row in rows
            if not np.isnan(row[tag])
        }
    output = capsys.readouterr().out
    assert "deterministic evaluation" in output and "stochastic evaluation" in output


def test_explained_variance_and_returns_are_what_they_say(run_dir) -> None:
    """With a critic that is right from the second iteration on, the variance is explained."""
    args = small(run_dir, env_id="test/Constant-v0", total_timesteps=6_400, learning_rate=1e-2)
    train(args)
    last = read_metrics(run_dir)[-1]
    assert last["losses/explained_variance"] > 0.95
    assert last["charts/episodic_return"] == last["charts/episodic_length"] == 5.0


def test_an_evaluation_counts_one_whole_episode_of_each_environment() -> None:
    """Continuing to the first E ends would favour short episodes: here one env in two is short."""

    class Uneven(gym.vector.VectorEnv):
        metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
        single_action_space = gym.spaces.Discrete(2)
        single_observation_space = gym.spaces.Box(0.0, 1.0, (1,), np.float32)

        def __init__(self, num_envs: int = 1):
            self.num_envs, self.lengths = num_envs, np.where(np.arange(num_envs) % 2, 30, 2)

        def reset(self, *, seed=None, options=None):
            self.steps = np.zeros(self.num_envs, int)
            return np.zeros((self.num_envs, 1), np.float32), {}

        def step(self, actions):
            self.steps = np.where(self.steps == self.lengths, 0, self.steps + 1)
            over, obs = self.steps == self.lengths, np.zeros((self.num_envs, 1), np.float32)
            return obs, np.ones(self.num_envs), over, np.zeros(self.num_envs, bool), {}

    gym.register(id="test/Uneven-v0", vector_entry_point=Uneven)
    args = Args(env_id="test/Uneven-v0", eval_episodes=6)
    agent = Agent(args, ppo_discrete.make_envs(args, 1))
    returns, _ = ppo_discrete.evaluate(agent, ppo_discrete.make_envs(args, 6), 0, True)
    assert returns.tolist() == [2, 30, 2, 30, 2, 30]


def test_stop_ends_the_run_in_order(run_dir) -> None:
    stop = threading.Event()
    stop.set()
    _, results = train(small(run_dir), stop)
    assert len(read_metrics(run_dir)) == 1 and results["global_step"] < 1280
    assert (run_dir / "results.json").exists()


# ---- What goes wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["reward", "observation"])
def test_a_number_that_is_not_finite_stops_the_run(run_dir, what: str) -> None:
    with pytest.raises(UserError, match="test/Broken-v0 gave a NaN or infinity"):
        train(small(run_dir, env_id="test/Broken-v0", env_kwargs=(f"what={what}",)))
    assert not (run_dir / "results.json").exists()
    assert all(np.isfinite(row["losses/value_loss"]) for row in read_metrics(run_dir))


def test_a_loss_that_is_not_finite_stops_the_run(run_dir) -> None:
    with pytest.raises(UserError, match="lower --learning-rate"):
        train(small(run_dir, learning_rate=1e30))


def test_a_run_folder_is_never_used_twice(run_dir) -> None:
    train(small(run_dir))
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    with pytest.raises(UserError, match="holds a run: --resume it"):
        train(small(run_dir))
    assert before == {path.name: path.read_bytes() for path in run_dir.iterdir()}


def test_an_unusable_run_folder_is_an_error_before_training(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--run-dir"):
        train(small(tmp_path / "file" / "run"))
