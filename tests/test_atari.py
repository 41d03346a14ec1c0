"""`ppo_atari.py`: the CNN, images in all their forms, lives, and the games of Atari."""

import copy
import importlib.util

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor, nn

import ppo_atari
from experiment import UserError
from ppo_atari import Agent, Args, make_envs, train
from tests.envs import Lives
from tests.helpers import (
    StopAfter,
    make_agent,
    parameter_vector,
    quick_args,
    read_metrics,
    spy,
)

needs_atari = pytest.mark.skipif(
    importlib.util.find_spec("ale_py") is None, reason="needs the extra atari"
)
needs_opencv = pytest.mark.skipif(
    importlib.util.find_spec("cv2") is None, reason="needs the extra images"
)


# ---- The network -------------------------------------------------------------------------------


@pytest.fixture
def nature() -> Agent:
    """An agent at the defaults, for four frames of 84 x 84 and six actions."""
    envs = gym.vector.VectorEnv()
    envs.single_action_space = Discrete(6)
    envs.single_observation_space = Box(0, 255, (4, 84, 84), np.uint8)
    return Agent(Args(), envs)


def test_agent_has_the_shapes_of_the_nature_paper(nature) -> None:
    shapes = [tuple(p.shape) for p in nature.trunk.parameters() if p.dim() > 1]
    assert shapes == [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 3136)]
    assert nature.actor[0].weight.shape == (6, 512) and len(nature.actor) == 1
    assert nature.critic[0].weight.shape == (1, 512) and len(nature.critic) == 1


def test_agent_at_first_is_orthogonal_and_almost_uniform(nature) -> None:
    gains = [(layer, 2**0.5) for layer in nature.trunk if hasattr(layer, "weight")]
    gains += [(nature.actor[0], 0.01), (nature.critic[0], 1.0)]
    assert len(gains) == 6
    for layer, gain in gains:
        w = layer.weight.flatten(1)
        torch.testing.assert_close(w @ w.T, gain**2 * torch.eye(len(w)), atol=1e-4, rtol=1e-4)
        assert not layer.bias.any()


def test_trunk_divides_bytes_by_255(nature) -> None:
    obs = torch.randint(256, (6, 4, 84, 84), dtype=torch.uint8)
    plain = nn.Sequential(*nature.trunk)(obs / 255.0)
    torch.testing.assert_close(nature.trunk(obs), plain)
    np.testing.assert_allclose(nature.see(obs), plain.detach(), atol=1e-5)
    assert 0.1 < plain.std() < 10.0


def test_forward_gives_two_heads_of_one_cnn(nature) -> None:
    nn.init.normal_(nature.actor[0].weight, std=0.1)
    obs = torch.randint(256, (5, 4, 84, 84), dtype=torch.uint8)
    actions, masks = torch.randint(6, (5, 1)), torch.zeros(5, 1, 6)
    batch = ppo_atari.Batch(obs, actions, masks, *[torch.empty(0)] * 4)
    log_probs, entropy, values = nature(batch)
    features = nature.trunk(obs)
    oracle = torch.distributions.Categorical(logits=nature.actor(features))
    torch.testing.assert_close(log_probs, oracle.log_prob(actions[:, 0]))
    torch.testing.assert_close(entropy, oracle.entropy())
    torch.testing.assert_close(values, nature.critic(features)[:, 0])
    for loss in (log_probs.sum(), values.sum()):  # both teach the CNN
        nature.zero_grad()
        loss.backward(retain_graph=True)
        assert nature.trunk[0].weight.grad.abs().max() > 0


def test_act_on_images_gives_the_likeliest_or_sampled_actions() -> None:
    agent = make_agent(ppo_atari, 1.0)
    obs = np.random.default_rng(0).integers(256, size=(1, 4, 36, 36), dtype=np.uint8)
    logits = agent.actor(agent.trunk(torch.as_tensor(obs)))[0].detach()
    assert agent.act(obs, {}, None).tolist() == [logits.argmax().item()]
    samples = agent.act(np.repeat(obs, 20_000, axis=0), {}, np.random.default_rng(0))
    frequencies = np.bincount(samples, minlength=3) / 20_000
    np.testing.assert_allclose(frequencies, logits.softmax(-1), atol=0.02)


class Patches(nn.Module):
    """A trunk of one's own: means of patches, normalised."""

    def __init__(self, width: int):
        super().__init__()
        self.pool, self.norm = nn.AdaptiveAvgPool2d(4), nn.LayerNorm(64)
        self.linear = nn.Linear(64, width)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.pool(images.float()).flatten(1))
        return torch.sin(self.linear(x))


def test_train_with_a_trunk_of_ones_own_starts_updates_at_ratio_one(run_dir, monkeypatch) -> None:
    agent = make_agent(ppo_atari, 1.0)
    agent.trunk = Patches(16)
    before = parameter_vector(agent.trunk)
    calls = spy(monkeypatch, "clipped_surrogate", ppo_atari)
    train(quick_args(ppo_atari, run_dir, num_minibatches=2, update_epochs=2), agent)
    assert len(calls) == 8
    for call in calls[::4]:
        torch.testing.assert_close(call.ratio, torch.ones_like(call.ratio), atol=1e-5, rtol=0)
    assert not torch.equal(before, parameter_vector(agent.trunk))


# ---- Images ------------------------------------------------------------------------------------


@needs_opencv
@pytest.mark.parametrize("env", ["Picture", "GreyPicture", "OneChannelPicture"])
def test_make_envs_turns_pictures_into_four_grey_frames(env: str) -> None:
    envs = make_envs(Args(env_id=f"test/{env}-v0"), 2)
    obs, _ = envs.reset(seed=0)
    assert obs.shape == (2, 4, 84, 84) and obs.dtype == np.uint8
    assert envs.single_observation_space.shape == (4, 84, 84)
    assert (obs[:, :1] == obs).all()  # the first frame four times
    frames = [obs[:, -1], *(envs.step(np.zeros(2, int))[0][:, -1] for _ in range(3))]
    after, *_ = envs.step(np.zeros(2, int))
    assert 190 < after.max() <= 200 and after.min() == 0
    # The newest frame is the last one; the three before it have moved up.
    assert (after[:, :3] == np.stack(frames[1:], axis=1)).all()
    assert not (after[:, :1] == after).all()


@pytest.mark.parametrize("env", ["FramesLast", "VectorFramesLast"])
def test_make_envs_with_channels_last_gives_the_agent_the_same_images(env: str) -> None:
    features = []
    for env_id in ("test/Frames-v0", f"test/{env}-v0"):
        envs = make_envs(Args(env_id=env_id), 5)
        images, _ = envs.reset(seed=0)
        features.append(make_agent(ppo_atari, env_id=env_id).see(torch.as_tensor(images)))
    np.testing.assert_allclose(*features, atol=1e-6)
    assert features[0].std(0).max() > 1e-2


def test_train_with_either_order_of_axes_gives_the_same_bits(run_dir) -> None:
    agents = [
        train(quick_args(ppo_atari, run_dir / env, env_id=f"test/{env}-v0"))[0]
        for env in ("Frames", "FramesLast")
    ]
    assert torch.equal(*map(parameter_vector, agents))


@needs_opencv
@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("CartPole-v1", "images"),
        ("test/Film-v0", "images"),
        ("test/FloatFrames-v0", "bytes"),
        ("test/FloatFramesLast-v0", "bytes"),
        ("test/NarrowFrames-v0", "bytes"),  # divided by 255 they would be almost black
        ("test/PictureInDict-v0", "images"),
        ("test/FloatPicture-v0", "float32.*not images of bytes"),
        ("test/BoxPicture-v0", r"Box\(-1.0"),
    ],
)
def test_make_envs_of_a_space_it_cannot_serve_says_why(env_id: str, words: str) -> None:
    with pytest.raises(UserError, match=f"--env-id {env_id}.*{words}"):
        make_envs(Args(env_id=env_id), 2)


# ---- Training ----------------------------------------------------------------------------------


@needs_opencv
def test_train_learns_from_pictures(run_dir, monkeypatch) -> None:
    """The bar shows where to go; the rows of the update are bytes, as they came."""
    calls = spy(monkeypatch, "ppo_loss", ppo_atari)
    flags = dict(num_envs=8, total_timesteps=2048, num_minibatches=2, hidden_size=64)
    flags |= dict(learning_rate=1e-3, gamma=0.5, eval_episodes=10, clip_coef=0.2)
    _, results = train(quick_args(ppo_atari, run_dir, env_id="test/Picture-v0", **flags))
    assert results["eval_mean"] == 10.0
    obs = calls[0].batch.obs
    assert obs.dtype == torch.uint8 and obs.shape[1:] == (4, 84, 84)


@pytest.mark.parametrize(("env", "bar"), [("PartsFrames", 6.0), ("MaskedFrames", 9.0)])
def test_train_with_images_serves_parts_and_masks(run_dir, env: str, bar: float) -> None:
    """The environments assert that each action is legal; chance gives 4.2 and 5."""
    flags = dict(env_id=f"test/{env}-v0", num_envs=8, total_timesteps=4096, num_minibatches=2)
    flags |= dict(learning_rate=3e-3, gamma=0.5, eval_episodes=10, clip_coef=0.2, ent_coef=0.0)
    _, results = train(quick_args(ppo_atari, run_dir, hidden_size=64, **flags))
    assert results["eval_mean"] > bar


def test_train_values_every_image_by_the_trunk_that_played(run_dir, monkeypatch) -> None:
    """The features kept from the rollout are those of all T + 1 rows of images."""
    seen, rollouts = spy(monkeypatch, "see", Agent), spy(monkeypatch, "gae", ppo_atari)
    agent = make_agent(ppo_atari)
    nn.init.normal_(agent.critic[-1].weight)
    playing, args = copy.deepcopy(agent), quick_args(ppo_atari, run_dir)
    train(args, agent, StopAfter(1))
    images = [call.images for call in seen[: args.num_steps + 1]]
    values = torch.cat([playing.critic(playing.trunk(x)).T for x in images]).detach()
    torch.testing.assert_close(rollouts[0].values, values[:-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rollouts[0].next_values, values[1:], atol=1e-5, rtol=1e-5)
    assert values.std() > 1e-3


LIVES = dict(env_id="test/LivesFrames-v0", num_envs=4, num_steps=20, total_timesteps=160)


def test_gae_of_atari_gets_signs_and_ends_at_lost_lives(run_dir, monkeypatch) -> None:
    rollouts = spy(monkeypatch, "gae", ppo_atari)
    updates = spy(monkeypatch, "ppo_loss", ppo_atari)
    _, results = train(quick_args(ppo_atari, run_dir, eval_episodes=4, **LIVES))
    first = rollouts[0]
    # Environment 0 from its reset on: steps 1 to 4, of which 2 and 4 cost a life, then the reset.
    assert first.rewards[:5, 0].tolist() == [1, 1, 1, 1, 0]
    assert first.terminated[:5, 0].tolist() == [False, True, False, True, False]
    assert first.done[:5, 0].tolist() == [False, True, False, True, False]
    # 64 of 80 rows are transitions: the reset alone is out.
    assert {len(call.batch.obs) for call in updates} == {16}
    rows = read_metrics(run_dir)
    assert {row["charts/episodic_return"] for row in rows[1:]} == {12.0}  # whole games, true scores
    assert {row["charts/episodic_length"] for row in rows[1:]} == {4.0}
    assert results["eval_mean"] > 6.0


def test_life_lost_between_two_rollouts_counts(run_dir, monkeypatch) -> None:
    """With three steps a rollout, lives are lost and games end at any place of a rollout."""
    rollouts = spy(monkeypatch, "gae", ppo_atari)
    flags = LIVES | dict(num_steps=3, total_timesteps=60, num_minibatches=1)
    train(quick_args(ppo_atari, run_dir, **flags))
    lost = torch.cat([call.terminated for call in rollouts])[:, 0]
    assert lost.tolist() == [False, True, False, True, False] * 3


def test_an_info_without_lives_is_no_lost_life(run_dir, monkeypatch) -> None:
    """Gymnasium fills a gap with 0 and says in `_lives` that it is one."""
    rollouts = spy(monkeypatch, "gae", ppo_atari)

    def gaps(self) -> dict:
        known = self.steps % 2 == 0
        return {"lives": np.where(known, 2 - self.steps // 2, 0), "_lives": known}

    monkeypatch.setattr(Lives, "_info", gaps)
    train(quick_args(ppo_atari, run_dir, **LIVES))
    assert rollouts[0].terminated[:5, 0].tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("flag", ["sign_rewards", "life_loss"])
def test_sign_rewards_and_life_loss_can_be_switched_off(run_dir, monkeypatch, flag: str) -> None:
    rollouts = spy(monkeypatch, "gae", ppo_atari)
    train(quick_args(ppo_atari, run_dir, **LIVES, **{flag: False}))
    rewards, terminated = rollouts[0].rewards[:5, 0], rollouts[0].terminated[:5, 0]
    assert rewards.tolist() == ([3, 3, 3, 3, 0] if flag == "sign_rewards" else [1, 1, 1, 1, 0])
    assert terminated.tolist() == [False, flag == "sign_rewards", False, True, False]


# ---- Atari -------------------------------------------------------------------------------------


GAME = dict(env_id="ALE/Breakout-v5", env_kwargs=("max_num_frames_per_episode=400",))


@needs_atari
def test_train_with_a_game_of_atari_evaluates_and_films_it(run_dir) -> None:
    args = quick_args(ppo_atari, run_dir, capture_video=True, **GAME)
    _, results = train(args)
    assert results["eval_mean"] >= 0 and 60 <= results["global_step"] <= 64
    assert list(run_dir.glob("*.mp4"))


@needs_atari
@pytest.mark.parametrize("env_id", ["ALE/Breakout-v5", "ale_py:ALE/Breakout-v5"])
def test_make_envs_of_atari_gives_stacks_of_bytes_and_lives(env_id: str) -> None:
    envs = make_envs(Args(env_id=env_id), 2)
    assert type(envs.unwrapped).__name__ == "AtariVectorEnv"
    obs, info = envs.reset(seed=0)
    assert obs.shape == (2, 4, 84, 84) and obs.dtype == np.uint8
    assert info["lives"].tolist() == [5, 5]
    envs.close()


@needs_atari
def test_lives_of_separate_games_reach_the_script() -> None:
    envs = make_envs(Args(env_id="ALE/Breakout-v5", vectorization_mode="sync"), 2)
    assert envs.reset(seed=0)[1]["lives"].tolist() == [5, 5]
    envs.close()


@needs_atari
@pytest.mark.parametrize("mode", [None, "sync"])
def test_rewards_of_atari_are_true_scores(mode: str | None) -> None:
    """A dot of Pac-Man's is worth 10, which ale-py alone would make 1."""
    envs = make_envs(Args(env_id="ALE/MsPacman-v5", vectorization_mode=mode), 1)
    envs.reset(seed=0)
    rewards = [envs.step(np.array([action]))[1][0] for action in [0] * 70 + [3] * 30]
    assert max(rewards) == 10.0
    envs.close()


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


def images_of_gymnasium() -> list[str]:
    """Return the environments of Gymnasium itself whose observations are images."""
    return sorted(name for name in gym.registry if name.startswith("CarRacing"))


@needs_opencv
@pytest.mark.parametrize("env_id", images_of_gymnasium())
@pytest.mark.filterwarnings("ignore:.*is out of date")
def test_train_with_every_image_environment_runs(run_dir, env_id: str) -> None:
    kwargs = ("continuous=false", "max_episode_steps=30")
    try:
        _, results = train(quick_args(ppo_atari, run_dir, env_id=env_id, env_kwargs=kwargs))
    except UserError as error:
        if isinstance(error.__cause__, ImportError | gym.error.DependencyNotInstalled):
            pytest.skip(str(error))  # of an extra
        raise
    assert np.isfinite(results["eval_mean"]) and results["global_step"] > 0


def test_args_at_their_defaults_are_those_of_atari() -> None:
    """As in the papers: details 16, 19 and the table of 37 Implementation Details."""
    args = Args()
    assert (args.num_envs, args.num_steps, args.update_epochs, args.num_minibatches) == (
        8,
        128,
        4,
        4,
    )
    assert (args.learning_rate, args.clip_coef, args.total_timesteps) == (2.5e-4, 0.1, 10_000_000)
    assert args.sign_rewards and args.life_loss and args.wants_gpu
