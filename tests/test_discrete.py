"""`ppo_discrete.py`: its policy, masks and actions of several parts, and what it learns."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import ppo_discrete
from experiment import UserError
from ppo_discrete import Agent, train
from tests.helpers import make_agent, quick_args, read_metrics, spy

LEARN = dict(total_timesteps=8_000, num_steps=32, learning_rate=1e-2, eval_episodes=20)


# ---- The policy --------------------------------------------------------------------------------


def test_log_prob_and_entropy_equal_those_of_a_categorical() -> None:
    agent, obs = make_agent(ppo_discrete, 1.0, env_id="Acrobot-v1"), torch.randn(5, 7, 6)
    actions = torch.randint(3, (5, 7))
    masks = torch.as_tensor(agent.choices.no_masks)
    log_probs, entropy = agent.log_prob_and_entropy(obs, actions[..., None], masks)
    oracle = Categorical(logits=agent.actor(obs))
    torch.testing.assert_close(log_probs, oracle.log_prob(actions))
    torch.testing.assert_close(entropy, oracle.entropy())


def test_forward_gives_log_probs_entropies_and_values_of_a_batch() -> None:
    agent, obs = make_agent(ppo_discrete, 1.0, env_id="Acrobot-v1"), torch.randn(5, 6)
    actions, masks = torch.randint(3, (5, 1)), torch.zeros(5, 1, 3)
    batch = ppo_discrete.Batch(obs, actions, masks, *[torch.empty(0)] * 4)
    log_probs, entropy, values = agent(batch)
    expected = agent.log_prob_and_entropy(obs, actions, masks)
    assert torch.equal(log_probs, expected[0]) and torch.equal(entropy, expected[1])
    assert torch.equal(values, agent.critic(obs)[:, 0])


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_policy_with_a_generator_samples_the_softmax(activation: str) -> None:
    agent = make_agent(ppo_discrete, 1.0, env_id="Acrobot-v1", activation=activation)
    obs, masks = torch.randn(1, 6), agent.choices.no_masks
    probs = agent.actor(obs).softmax(-1).squeeze().detach().numpy()
    rows = np.repeat(obs.numpy(), 100_000, axis=0)
    actions = agent.policy()(rows, masks, np.random.default_rng(0))
    assert actions.shape == (100_000, 1)
    np.testing.assert_allclose(np.bincount(actions[:, 0], minlength=3) / 1e5, probs, atol=0.006)


def test_policy_without_a_generator_gives_the_likeliest_actions() -> None:
    agent, obs = make_agent(ppo_discrete, 1.0, env_id="Acrobot-v1"), torch.randn(100, 6)
    actions = agent.policy()(obs.numpy(), agent.choices.no_masks, None)
    assert (actions[:, 0] == agent.actor(obs).argmax(-1).numpy()).all()
    assert (agent.act(obs.numpy(), {}, None) == actions[:, 0]).all()


def test_policy_with_norm_obs_sees_normalised_and_clipped_observations() -> None:
    agent = make_agent(ppo_discrete, 1.0, env_id="Acrobot-v1", norm_obs=True)
    agent.obs_normaliser.update(np.random.default_rng(0).normal(3.0, 0.2, (100, 6)))
    obs = np.random.default_rng(1).normal(3.0, 2.0, (200, 6)).astype(np.float32)
    inputs = torch.as_tensor(agent.obs_normaliser.snapshot()(obs))
    assert (inputs.abs() == 10.0).any() and not (inputs.abs() == 10.0).all()
    likeliest = agent.actor(inputs).argmax(-1).numpy()
    assert (agent.act(obs, {}, None) == likeliest).all()
    assert (agent.actor(torch.as_tensor(obs)).argmax(-1).numpy() != likeliest).any()


def test_act_after_a_change_of_weights_uses_the_new_ones() -> None:
    agent, rng = make_agent(ppo_discrete, 1.0, env_id="Acrobot-v1"), np.random.default_rng(0)
    obs = rng.normal(size=(200, 6)).astype(np.float32)
    before = agent.act(obs, {}, None)
    nn.init.normal_(agent.actor[-1].weight)
    after = agent.act(obs, {}, None)
    assert (before != after).any()
    assert (after == agent.actor(torch.as_tensor(obs)).argmax(-1).numpy()).all()


def test_agent_at_first_is_orthogonal_and_almost_uniform() -> None:
    """Gains sqrt(2), heads 0.01 and 1, biases 0."""
    agent = make_agent(ppo_discrete, env_id="CartPole-v1", hidden_size=32)
    for net, head_gain in ((agent.actor, 0.01), (agent.critic, 1.0)):
        layers = [layer for layer in net if isinstance(layer, nn.Linear)]
        for layer, gain in zip(layers, (2**0.5, 2**0.5, head_gain), strict=True):
            w = layer.weight if layer.weight.shape[0] <= layer.weight.shape[1] else layer.weight.T
            torch.testing.assert_close(w @ w.T, gain**2 * torch.eye(len(w)), atol=1e-5, rtol=1e-5)
            assert not layer.bias.any()
    actions, masks = torch.zeros(64, 1, dtype=torch.long), torch.zeros(64, 1, 2)
    _, entropy = agent.log_prob_and_entropy(torch.randn(64, 4), actions, masks)
    assert (entropy > math.log(2) - 1e-3).all()


# ---- Several choices at once -------------------------------------------------------------------


@pytest.mark.parametrize(("env", "sizes"), [("Parts", (2, 3)), ("Bits", (2, 2, 2))])
def test_action_of_parts_is_a_product_of_categoricals(env: str, sizes: tuple) -> None:
    agent = make_agent(ppo_discrete, 1.0, env_id=f"test/{env}-v0")
    obs = torch.randn(4, 7, *agent.obs_shape)
    actions = torch.stack([torch.randint(n, (4, 7)) for n in sizes], dim=-1)
    masks = torch.as_tensor(agent.choices.masks({}))
    log_probs, entropy = agent.log_prob_and_entropy(obs, actions, masks)
    logits = agent.actor(obs).unflatten(-1, (len(sizes), max(sizes)))
    oracles = [Categorical(logits=logits[..., k, :n]) for k, n in enumerate(sizes)]
    expected = sum(oracle.log_prob(actions[..., k]) for k, oracle in enumerate(oracles))
    torch.testing.assert_close(log_probs, expected)
    torch.testing.assert_close(entropy, sum(oracle.entropy() for oracle in oracles))


@pytest.mark.parametrize("env", ["Parts", "Bits"])
def test_train_with_actions_of_parts_learns_them_all(run_dir, env: str) -> None:
    flags = LEARN | dict(total_timesteps=32_000, ent_coef=0.0)
    _, results = train(quick_args(ppo_discrete, run_dir, env_id=f"test/{env}-v0", **flags))
    assert results["eval_mean"] > 9.0  # of 10; chance gives 5 or less


# ---- Masks -------------------------------------------------------------------------------------


def all_log_probs(agent: Agent, obs: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return log pi(a|s) for each of the actions (A, B), and the entropies (B,)."""
    number, rows = agent.choices.shape[1], len(obs)
    actions = torch.arange(number).expand(rows, number).T[..., None]
    log_probs, entropy = agent.log_prob_and_entropy(obs.expand(number, *obs.shape), actions, masks)
    return log_probs, entropy[0]


def test_masked_action_has_no_probability() -> None:
    agent, obs = make_agent(ppo_discrete, 1.0, env_id="Acrobot-v1"), torch.randn(50, 6)
    log_probs, entropy = all_log_probs(agent, obs, torch.tensor([[0.0, -1e9, 0.0]]))
    probs = log_probs.exp()
    assert (probs[1] == 0).all()
    torch.testing.assert_close(probs.sum(0), torch.ones(50))
    legal = Categorical(logits=agent.actor(obs)[:, [0, 2]])
    torch.testing.assert_close(probs[[0, 2]].T, legal.probs)
    torch.testing.assert_close(entropy, legal.entropy())


def test_masked_action_has_no_gradient() -> None:
    agent, obs = make_agent(ppo_discrete, 1.0, env_id="Acrobot-v1"), torch.randn(50, 6)
    log_probs, entropy = all_log_probs(agent, obs, torch.tensor([[0.0, -1e9, 0.0]]))
    (log_probs[[0, 2]].sum() + entropy.sum()).backward()
    head = agent.actor[-1]
    assert not head.weight.grad[1].any() and head.bias.grad[1] == 0.0
    assert head.weight.grad[0].any() and head.weight.grad[2].any()


@pytest.mark.parametrize("rng", [None, np.random.default_rng(0)], ids=["likeliest", "sampled"])
def test_masked_action_is_never_chosen(rng: np.random.Generator | None) -> None:
    agent = make_agent(ppo_discrete, 1.0, env_id="Acrobot-v1")
    obs = np.random.default_rng(1).normal(size=(200, 6)).astype(np.float32)
    info = {"action_mask": np.tile(np.int8([1, 0, 1]), (200, 1))}
    assert 1 in agent.act(obs, {}, rng)
    assert set(agent.act(obs, info, rng)) == {0, 2}


def test_mask_of_only_legal_actions_changes_no_bit() -> None:
    agent, obs = make_agent(ppo_discrete, 1.0, env_id="Taxi-v4"), torch.eye(500)
    masks = agent.choices.masks({"action_mask": np.ones((500, 6), np.int8)})
    assert np.broadcast_to(agent.choices.masks({}), masks.shape).tolist() == masks.tolist()
    actions = torch.randint(6, (500, 1))
    log_probs, _ = agent.log_prob_and_entropy(obs, actions, torch.as_tensor(masks))
    expected = Categorical(logits=agent.actor(obs)).logits.gather(1, actions)[:, 0]
    torch.testing.assert_close(log_probs, expected)


def test_masks_are_read_where_they_are_given() -> None:
    """Only some environments may give one."""
    agent = make_agent(ppo_discrete, env_id="test/Parts-v0")
    info = {
        "action_mask": np.array([[1, 0, 0, 1, 1], [0] * 5], np.int8),
        "_action_mask": np.array([True, False]),
    }
    masks = agent.choices.masks(info) == 0
    free = [[True, True, False], [True, True, True]]
    assert masks.tolist() == [[[True, False, False], [False, True, True]], free]


def test_masks_that_are_not_one_array_of_all_parts_are_refused() -> None:
    agent, given = make_agent(ppo_discrete, env_id="test/Parts-v0"), np.empty(2, object)
    given[:] = [([1, 0], [0, 1, 1]), (np.ones(2, np.int8), np.ones(3, np.int8))]
    with pytest.raises(UserError, match="an action_mask needs 5 numbers"):
        agent.choices.masks({"action_mask": given})


@pytest.mark.parametrize("env", ["Masked", "MaskedByMethod"])
def test_train_with_masks_sends_legal_actions_only(run_dir, monkeypatch, env: str) -> None:
    """The environment asserts so, in training and evaluations; the batch has the masks."""
    calls = spy(monkeypatch, "ppo_loss", ppo_discrete)
    _, results = train(quick_args(ppo_discrete, run_dir, env_id=f"test/{env}-v0", **LEARN))
    assert results["eval_mean"] == 10.0
    for call in calls:
        masks = call.batch.masks
        assert ((masks == 0).sum(-1) == 2).all() and (masks[masks != 0] == -1e9).all()
        assert not masks.gather(-1, call.batch.actions[..., None]).any()
    # At first two legal actions are about equally likely.
    torch.testing.assert_close(
        calls[0].batch.log_probs,
        torch.full_like(calls[0].batch.log_probs, -math.log(2)),
        atol=0.05,
        rtol=0,
    )


@pytest.mark.parametrize(("wrong", "words"), [("none", "no legal action"), ("short", "5 numbers")])
def test_train_with_a_wrong_mask_says_what_is_wrong(run_dir, wrong: str, words: str) -> None:
    flags = dict(env_id="test/Masked-v0", env_kwargs=(f"wrong='{wrong}'",))
    with pytest.raises(UserError, match=words):
        train(quick_args(ppo_discrete, run_dir, **flags))


# ---- Environments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env", ["Identity", "OffsetIdentity", "NestedIdentity", "Matrix", "Factors"]
)
def test_train_learns_the_identity(run_dir, env: str) -> None:
    _, results = train(quick_args(ppo_discrete, run_dir, env_id=f"test/{env}-v0", **LEARN))
    assert results["eval_mean"] == 10.0 and results["eval_std"] == 0.0
    assert results["eval_stochastic_mean"] > 9.0


@pytest.mark.parametrize(
    "flags", [dict(objective="penalty"), dict(norm_obs=True), dict(clip_vloss=True, target_kl=0.05)]
)
def test_train_with_other_objectives_learns_too(run_dir, flags: dict) -> None:
    _, results = train(quick_args(ppo_discrete, run_dir, **(LEARN | flags)))
    assert results["eval_mean"] == 10.0


def test_explained_variance_of_a_known_critic_rises_to_one(run_dir) -> None:
    flags = dict(env_id="test/Constant-v0", total_timesteps=6_400, learning_rate=1e-2)
    train(quick_args(ppo_discrete, run_dir, **flags))
    last = read_metrics(run_dir)[-1]
    assert last["losses/explained_variance"] > 0.95
    assert last["charts/episodic_return"] == last["charts/episodic_length"] == 5.0


@pytest.mark.parametrize("env", ["Blackjack-v1", "Taxi-v4", "CliffWalking-v1", "FrozenLake-v1"])
def test_train_with_tiny_rollouts_of_short_episodes_runs(run_dir, env: str) -> None:
    """Blackjack ends after a step or two: half of its rows are resets, and minibatches shrink."""
    flags = dict(num_envs=2, num_steps=4, total_timesteps=80, num_minibatches=2)
    flags |= dict(env_kwargs=("max_episode_steps=20",))
    _, results = train(quick_args(ppo_discrete, run_dir, env_id=env, **flags))
    assert np.isfinite(results["eval_mean"]) and 0 < results["global_step"] <= 80


def test_args_with_fewer_rows_than_minibatches_need_are_refused(run_dir) -> None:
    flags = dict(num_envs=2, num_steps=4, total_timesteps=80, num_minibatches=4)
    with pytest.raises(UserError, match="--num-minibatches 4"):
        train(quick_args(ppo_discrete, run_dir, **flags))


CONTINUOUS = {"MountainCarContinuous-v0", "Pendulum-v1", "LunarLanderContinuous-v3"}
CONTINUOUS |= {"BipedalWalker-v3", "BipedalWalkerHardcore-v3"}
IMAGES = {"CarRacing-v3"}


def discrete_environments() -> list[str]:
    """Return what Gymnasium registers with discrete actions, but for what needs JAX."""
    own = {name: str(spec.entry_point) for name, spec in gym.registry.items()}
    own = {name: entry for name, entry in own.items() if entry.startswith("gymnasium.envs.")}
    others = ("mujoco", "phys2d", "tabular")  # continuous; JAX
    return sorted(
        name
        for name, entry in own.items()
        if not any(x in name + entry for x in others) and name not in CONTINUOUS | IMAGES
    )


@pytest.mark.parametrize("env_id", discrete_environments())
@pytest.mark.filterwarnings("ignore:.*is out of date")
def test_train_with_every_discrete_environment_runs(run_dir, env_id: str) -> None:
    flags = dict(env_id=env_id, env_kwargs=("max_episode_steps=30",), num_envs=4)
    args = quick_args(ppo_discrete, run_dir, total_timesteps=128, **flags)
    try:
        _, results = train(args)
    except UserError as error:
        if isinstance(error.__cause__, ImportError | gym.error.DependencyNotInstalled):
            pytest.skip(str(error))  # of an extra
        raise
    assert np.isfinite(results["eval_mean"]) and results["global_step"] > 0
