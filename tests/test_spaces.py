"""`ppo_discrete.py` on more than a vector and a choice: pixels, masks, several actions at once."""

import importlib.util
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import nn

import ppo_continuous
import ppo_discrete
from ppo_discrete import PIXELS, Agent, Args, UserError, make_envs, train
from tests.helpers import read_metrics, spy
from tests.test_ppo_discrete import LEARN, small

needs_atari = pytest.mark.skipif(
    importlib.util.find_spec("ale_py") is None, reason="needs the extra atari"
)
needs_opencv = pytest.mark.skipif(
    importlib.util.find_spec("cv2") is None, reason="needs the extra images"
)


def make_agent(env_id: str, **changes) -> Agent:
    args = Args(env_id=env_id, **changes)
    agent = Agent(args, make_envs(args, 1))
    nn.init.normal_(agent.actor[-1].weight)
    return agent


# ---- Several choices at once -------------------------------------------------------------------


@pytest.mark.parametrize(("env", "sizes"), [("Parts", (2, 3)), ("Bits", (2, 2, 2))])
def test_an_action_of_parts_is_a_product_of_categoricals(env: str, sizes: tuple) -> None:
    agent = make_agent(f"test/{env}-v0")
    obs = torch.randn(4, 7, len(sizes) if env == "Bits" else 5)
    actions = torch.stack([torch.randint(n, (4, 7)) for n in sizes], dim=-1)
    masks = torch.as_tensor(agent.masks({}, np.zeros(1, bool)))
    log_probs, entropy, _ = agent(obs, actions, masks)
    logits = agent.actor(obs).unflatten(-1, (len(sizes), max(sizes)))
    oracles = [
        torch.distributions.Categorical(logits=logits[..., k, :n]) for k, n in enumerate(sizes)
    ]
    expected = sum(oracle.log_prob(actions[..., k]) for k, oracle in enumerate(oracles))
    torch.testing.assert_close(log_probs, expected)
    torch.testing.assert_close(entropy, sum(oracle.entropy() for oracle in oracles))


@pytest.mark.parametrize("env", ["Parts", "Bits"])
def test_learns_several_choices_at_once(run_dir, env: str) -> None:
    flags = LEARN | dict(total_timesteps=24_000, eval_episodes=20, ent_coef=0.0)
    _, results = train(small(run_dir, env_id=f"test/{env}-v0", **flags))
    assert results["eval_mean"] == 10.0


# ---- Masks -------------------------------------------------------------------------------------


def test_a_masked_action_has_no_probability_and_no_gradient() -> None:
    agent, obs = make_agent("Acrobot-v1"), torch.randn(50, 6)
    masks = torch.tensor([[0.0, -1e9, 0.0]])
    everything = torch.arange(3).expand(50, 3).T[..., None]  # (3, 50, 1)
    log_probs, entropy, _ = agent(obs.expand(3, 50, 6), everything, masks)
    probs = log_probs.exp()
    assert (probs[1] == 0).all()
    torch.testing.assert_close(probs.sum(0), torch.ones(50))
    legal = torch.distributions.Categorical(logits=agent.actor(obs)[:, [0, 2]])
    torch.testing.assert_close(entropy[0], legal.entropy())

    agent.zero_grad()
    (log_probs[[0, 2]].sum() + entropy.sum()).backward()
    head = agent.actor[-1]
    assert not head.weight.grad[1].any() and head.bias.grad[1] == 0.0
    assert head.weight.grad[0].any() and head.weight.grad[2].any()

    act = agent.numpy_policy()
    noise = agent.noise(np.random.default_rng(0), 50) + masks.numpy()
    assert set(act(obs.numpy(), noise).ravel()) == {0, 2}
    assert set(act(obs.numpy(), masks.numpy()).ravel()) == {0, 2}


def test_where_all_is_legal_a_mask_changes_no_bit() -> None:
    agent, obs = make_agent("Taxi-v4"), torch.eye(500)
    actions = torch.randint(6, (500, 1))
    done = np.zeros(500, bool)
    masks = agent.masks({"action_mask": np.ones((500, 6), np.int8)}, done)
    assert np.broadcast_to(agent.masks({}, done), masks.shape).tolist() == masks.tolist()
    for with_mask, without in zip(agent(obs, actions, torch.as_tensor(masks)), agent(obs, actions)):
        assert torch.equal(with_mask, without)


def test_a_mask_is_read_where_it_is_given() -> None:
    """Only some environments may give one; after an episode's end it does not count."""
    agent = make_agent("test/Parts-v0")
    info = {
        "action_mask": np.array([[1, 0, 0, 1, 1], [0] * 5, [0] * 5], np.int8),
        "_action_mask": np.array([True, False, True]),
    }
    masks = agent.masks(info, np.array([False, False, True])) == 0
    free = [[True, True, False], [True, True, True]]
    assert masks.tolist() == [[[True, False, False], [False, True, True]], free, free]


def test_a_mask_may_be_an_array_for_each_part() -> None:
    agent, given = make_agent("test/Parts-v0"), np.empty(2, object)
    given[:] = [([1, 0], [0, 1, 1]), (np.ones(2, np.int8), np.ones(3, np.int8))]
    masks = agent.masks({"action_mask": given}, np.zeros(2, bool)) == 0
    of_first, of_second = masks.tolist()
    assert of_first == [[True, False, False], [False, True, True]]
    assert of_second == [[True, True, False], [True, True, True]]


@pytest.mark.parametrize("env", ["Masked", "MaskedByMethod"])
def test_only_legal_actions_reach_the_environment(run_dir, monkeypatch, env: str) -> None:
    """It asserts so, in training and in both evaluations; the masks of a rollout are stored."""
    calls = spy(monkeypatch, "log_prob_and_entropy", Agent)
    _, results = train(small(run_dir, env_id=f"test/{env}-v0", eval_episodes=20, **LEARN))
    assert results["eval_mean"] == 10.0
    _, _, actions, masks, (log_probs, _) = calls[0]
    assert (masks == -1e9).any()
    chosen = masks.gather(-1, actions[..., None])
    assert not chosen.any() and (log_probs > -2.0).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [("none", "leaves no legal action"), ("short", "an action_mask of 4 numbers for 5 choices")],
)
def test_a_wrong_mask_is_an_error(run_dir, wrong: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(small(run_dir, env_id="test/Masked-v0", env_kwargs=(f"wrong={wrong}",)))


# ---- Pixels ------------------------------------------------------------------------------------


def pixels(run_dir: Path, **changes) -> Args:
    """Arguments as `parse` gives for images, of a run of some seconds."""
    quick = dict(num_envs=2, num_steps=16, total_timesteps=64, eval_episodes=2, hidden_size=16)
    return Args(**(PIXELS | quick | dict(run_dir=run_dir) | changes))


def test_the_cnn_is_that_of_the_paper() -> None:
    """Nature's shapes, bytes divided by 255, orthogonal weights; actor and critic share it."""
    envs = gym.vector.VectorEnv()
    envs.single_action_space = Discrete(6)
    envs.single_observation_space = Box(0, 255, (4, 84, 84), np.uint8)
    agent = Agent(Args(**PIXELS), envs)
    shapes = [tuple(p.shape) for p in agent.trunk.parameters() if p.dim() > 1]
    assert shapes == [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 3136)]
    assert agent.actor[0].weight.shape == (6, 512) and agent.critic[0].weight.shape == (1, 512)
    for layer in agent.trunk:
        if hasattr(layer, "weight"):
            w = layer.weight.flatten(1)
            torch.testing.assert_close(w @ w.T, 2.0 * torch.eye(len(w)), atol=1e-4, rtol=1e-4)
            assert not layer.bias.any()
    obs = torch.randint(256, (3, 2, 4, 84, 84), dtype=torch.uint8)
    features = agent.trunk(obs)
    plain = nn.Sequential(*agent.trunk)(obs.flatten(0, 1) / 255.0)
    torch.testing.assert_close(features, plain.view(3, 2, 512))
    log_probs, entropy, values = agent(obs, torch.zeros(3, 2, 1, dtype=torch.long))
    assert log_probs.shape == entropy.shape == values.shape == (3, 2)
    torch.testing.assert_close(values, agent.value(obs))
    noise = agent.noise(np.random.default_rng(0), 2)
    logits = agent.actor(features[0]).detach().numpy()[:, None]
    acted = agent.numpy_policy()(agent.see(obs[0].numpy()), noise)
    assert (acted == (logits + noise).argmax(-1)).all()


@needs_opencv
@pytest.mark.parametrize("env", ["Picture", "GreyPicture", "OneChannelPicture"])
def test_pictures_become_four_grey_frames(env: str) -> None:
    args = Args(env_id=f"test/{env}-v0")
    envs = make_envs(args, 2)
    obs, _ = envs.reset(seed=0)
    assert obs.shape == (2, 4, 84, 84) and obs.dtype == np.uint8
    assert (obs[:, :1] == obs).all()  # the first frame four times
    for _ in range(3):
        envs.step(np.zeros(2, int))
    after, *_ = envs.step(np.zeros(2, int))
    assert 190 < after.max() <= 200 and not (after[:, :1] == after).all()


def test_what_cannot_be_made_grey_is_a_vector() -> None:
    envs = make_envs(Args(env_id="test/FourChannelPicture-v0"), 2)
    assert envs.single_observation_space.shape == (42 * 60 * 4,)


@needs_opencv
def test_learns_from_pictures(run_dir, monkeypatch) -> None:
    """The bar shows where to go; the rows of the update are bytes, as they came."""
    calls = spy(monkeypatch, "forward", Agent)
    flags = dict(num_envs=8, total_timesteps=2048, num_minibatches=2, hidden_size=64)
    flags |= dict(learning_rate=1e-3, gamma=0.5, eval_episodes=10)
    _, results = train(pixels(run_dir, env_id="test/Picture-v0", **flags))
    assert results["eval_mean"] == 10.0
    assert calls[0][1].dtype == torch.uint8 and calls[0][1].shape[1:] == (4, 84, 84)


@needs_opencv
def test_the_features_kept_from_the_rollout_are_those_of_all_its_images(
    run_dir, monkeypatch
) -> None:
    agents = spy(monkeypatch, "flatten_parameters", ppo_discrete)
    critique, seen = ppo_discrete.critique, []

    def checked(args, values, rollout):
        seen.append(values)
        torch.testing.assert_close(values, agents[0][0].value(rollout[0]).detach())
        return critique(args, values, rollout)

    monkeypatch.setattr(ppo_discrete, "critique", checked)
    train(pixels(run_dir, env_id="test/Picture-v0"))
    assert len(seen) == 2 and seen[0].shape == (17, 2)


def test_rewards_are_made_signs_and_a_lost_life_an_end_for_the_advantages_only(
    run_dir, monkeypatch
) -> None:
    gae_calls, minibatches = (
        spy(monkeypatch, "gae", ppo_discrete),
        spy(monkeypatch, "forward", Agent),
    )
    flags = dict(env_id="test/Lives-v0", num_envs=4, num_steps=20, total_timesteps=320)
    _, results = train(small(run_dir / "on", sign_rewards=True, life_loss=True, **flags))
    rewards, _, _, terminated, done, *_ = gae_calls[0]
    # Environment 0 from its reset on: steps 1 to 4, of which 2 and 4 cost a life, then the reset.
    assert rewards[:5, 0].tolist() == [1, 1, 1, 1, 0]
    assert terminated[:5, 0].tolist() == done[:5, 0].tolist() == [False, True, False, True, False]
    assert {len(call[1]) for call in minibatches} == {16}  # 64 real rows: the reset alone is out
    rows = read_metrics(run_dir / "on")
    assert {row["charts/episodic_return"] for row in rows[1:]} == {12.0}  # whole games, true scores
    assert {row["charts/episodic_length"] for row in rows[1:]} == {4.0}
    assert results["eval_mean"] == (12 + 9 + 6 + 3) / 4

    gae_calls.clear()
    train(small(run_dir / "off", **flags))
    rewards, _, _, terminated, *_ = gae_calls[0]
    assert rewards[:5, 0].tolist() == [3, 3, 3, 3, 0]
    assert terminated[:5, 0].tolist() == [False, False, False, True, False]


@needs_atari
@pytest.mark.parametrize("flags", ["", "--num-envs 3"])
def test_atari_has_defaults_of_its_own(monkeypatch, capsys, flags: str) -> None:
    words = ["ppo_discrete.py", "--env-id", "ALE/Breakout-v5", *flags.split()]
    monkeypatch.setattr(sys, "argv", words)
    args = ppo_discrete.parse()
    expected = PIXELS | ({"num_envs": 3} if flags else {})
    assert {name: getattr(args, name) for name in expected} == expected
    monkeypatch.setattr(sys, "argv", [*words, "--help"])
    with pytest.raises(SystemExit):
        ppo_discrete.parse()
    assert "(default: 0.00025)" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["ppo_discrete.py"])
    assert ppo_discrete.parse() == Args()


@needs_atari
def test_a_game_of_atari(run_dir) -> None:
    """Runs, resumes to the same bits, evaluates whole games, and films what the agent sees."""
    game = dict(env_id="ALE/Breakout-v5", env_kwargs=("max_num_frames_per_episode=400",))
    args = pixels(run_dir / "whole", capture_video=True, **game)
    agent, results = train(args)
    assert results["eval_mean"] >= 0 and 60 <= results["global_step"] <= 64
    assert list(run_dir.glob("whole/*.mp4"))
    envs = make_envs(args, 2)
    obs, info = envs.reset(seed=0)
    assert (
        obs.shape == (2, 4, 84, 84) and obs.dtype == np.uint8 and info["lives"].tolist() == [5, 5]
    )

    half = pixels(run_dir / "half", checkpoint_every=1, **game)

    class Stop:
        def is_set(self) -> bool:
            return True

    train(half, Stop())
    half.resume = half.run_dir
    resumed, _ = train(half)
    for p, q in zip(agent.parameters(), resumed.parameters()):
        assert torch.equal(p, q)


@needs_atari
def test_scores_of_atari_are_whole() -> None:
    """A dot of Pac-Man's is worth 10, which ale-py alone would make 1."""
    envs = make_envs(Args(env_id="ALE/MsPacman-v5"), 1)
    envs.reset(seed=0)
    rewards = [envs.step(np.array([action]))[1][0] for action in [0] * 70 + [3] * 30]
    assert max(rewards) == 10.0


@needs_atari
@pytest.mark.parametrize("switched_off", ["", "noop_max=0", "frameskip=1", "use_fire_reset=false"])
def test_atari_begins_with_no_ops_and_fire_and_repeats_actions(switched_off: str) -> None:
    """Details 14, 15 and 17, and their switches."""
    kwargs = (switched_off,) if switched_off else ()
    envs = make_envs(Args(env_id="ALE/Breakout-v5", env_kwargs=kwargs), 4)
    nothing = np.zeros(4, dtype=int)
    frames = [envs.reset(seed=1)[1]["episode_frame_number"]]
    for _ in range(150):
        *_, info = envs.step(nothing)
        frames.append(info["episode_frame_number"])
    assert (len(set(frames[0])) == 1) == (switched_off == "noop_max=0")
    assert set(frames[1] - frames[0]) == {1 if switched_off == "frameskip=1" else 4}
    # A ball that is in play is lost by doing nothing; without "fire" there is none.
    assert (info["lives"] == 5).all() == (switched_off == "use_fire_reset=false")
    envs.close()


@needs_opencv
def test_norm_obs_is_not_for_images(run_dir) -> None:
    with pytest.raises(UserError, match="--norm-obs: images are divided by 255"):
        train(pixels(run_dir, env_id="test/Picture-v0", norm_obs=True))


@pytest.mark.parametrize("script", [ppo_discrete, ppo_continuous])
def test_keyword_arguments_are_read_as_python_or_json(script, monkeypatch) -> None:
    seen = {}
    monkeypatch.setattr(gym, "make_vec", lambda *_, **kwargs: seen.update(kwargs) or 1 / 0)
    texts = "a=.05 b=None c=true d=False e=(1,2) f=[3] g=8x8 h=1e-3 i=null j=".split()
    with pytest.raises(ZeroDivisionError):
        script.make_envs(script.Args(env_kwargs=tuple(texts)), 1)
    expected = dict(a=0.05, b=None, c=True, d=False, e=(1, 2), f=[3], g="8x8", h=1e-3, i=None, j="")
    assert {k: seen[k] for k in expected} == expected


# ---- Everything ----------------------------------------------------------------------------------


CONTINUOUS = {"MountainCarContinuous-v0", "Pendulum-v1", "LunarLanderContinuous-v3"}
CONTINUOUS |= {"BipedalWalker-v3", "BipedalWalkerHardcore-v3"}
FLAGS = {"CarRacing-v3": ("continuous=false",)}


def discrete_environments() -> list[str]:
    """Return what Gymnasium registers with discrete actions, but for what needs JAX."""
    own = {name: str(spec.entry_point) for name, spec in gym.registry.items()}
    own = {name: entry for name, entry in own.items() if entry.startswith("gymnasium.envs.")}
    others = ("mujoco", "phys2d", "tabular")  # continuous; JAX
    return sorted(
        n for n in own if not any(x in n + own[n] for x in others) and n not in CONTINUOUS
    )


@pytest.mark.parametrize("env_id", discrete_environments())
@pytest.mark.filterwarnings("ignore:.*is out of date")
def test_every_discrete_environment_runs(run_dir, env_id: str) -> None:
    flags = FLAGS.get(env_id, ())
    try:
        envs = make_envs(Args(env_id=env_id, env_kwargs=flags), 1)
    except UserError as error:
        if isinstance(error.__cause__, ImportError | gym.error.DependencyNotInstalled):
            pytest.skip(str(error))  # of an extra
        raise
    make = pixels if len(envs.single_observation_space.shape) == 3 else small
    args = make(run_dir, env_id=env_id, env_kwargs=(*flags, "max_episode_steps=30"), num_envs=4)
    _, results = train(args)
    assert np.isfinite(results["eval_mean"]) and results["global_step"] > 0
