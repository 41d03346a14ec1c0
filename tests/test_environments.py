"""Environments: how they are made, what they may show, their masks, statistics and evaluation."""

import builtins
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

import experiment
import ppo_continuous
import ppo_discrete
from experiment import Choices, Normaliser, RecordedEnvs, UserError
from tests.envs import MARK
from tests.helpers import StopAfter, quick_args, read_metrics, spy

# Python warns of a fork in a process with threads, and Gymnasium logs what a worker raised.
forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:.*ERROR")


def make(
    env_id: str, num_envs: int = 2, script: Any = ppo_discrete, **changes: Any
) -> RecordedEnvs:
    return RecordedEnvs(script.make_envs(script.Args(env_id=env_id, **changes), num_envs))


class Stub:
    """An agent that always takes action 0."""

    def policy(self) -> None:
        return None

    def act(self, obs: np.ndarray, *_: Any) -> np.ndarray:
        return np.zeros(len(obs), int)


# ---- Making them -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*is out of date|.*is deprecated:")
@pytest.mark.parametrize(
    ("env_id", "changes", "said"),
    [
        ("Nothing-v0", {}, "Nothing"),
        ("CartPol-v1", {}, "Did you mean: `CartPole`"),
        ("CartPole-v9", {}, "version `v9`"),
        ("Taxi-v3", {}, "Taxi-v4"),
        ("nothing:Nothing-v5", {}, "No module named 'nothing'"),
        ("nothing.at.all:Nothing-v5", {}, "No module named 'nothing'"),
        ("tests.envs:Nothing-v5", {}, "Nothing"),
        (":CartPole-v7", {}, "CartPole"),
        ("", {}, "--env-id"),
        ("CartPole-v1", dict(env_kwargs=("nonsense=1",)), "nonsense"),
        ("test/Constant-v0", dict(env_kwargs=("nonsense=1",)), "nonsense"),
        ("CartPole-v1", dict(env_kwargs=("num_envs=3",)), "num_envs"),
        ("CartPole-v1", dict(env_kwargs=("wrappers=3",)), "wrappers"),
        ("CartPole-v1", dict(env_kwargs=("x",)), "x"),
        ("Acrobot-v1", dict(vectorization_mode="vector_entry_point"), "vector entry point"),
        ("test/SameStep-v0", {}, "NEXT_STEP"),
        ("..x:Y-v0", {}, "relative import"),
        ("test/TwoActions-v0", {}, "Tuple(Discrete(2), Discrete(2))"),
        ("Pendulum-v1", {}, "ppo_continuous.py"),
    ],
)
def test_make_envs_of_wrong_flags_is_a_user_error_that_names_them(env_id, changes, said) -> None:
    with pytest.raises(UserError) as error:
        make(env_id, **changes)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert "--env-" in str(error.value)


@pytest.mark.parametrize(
    ("env_id", "said"),
    [
        ("CartPole-v1", "ppo_discrete.py"),
        ("test/WholeTarget-v0", "int8"),
        ("test/NoActions-v0", "0"),
    ],
)
def test_make_envs_of_actions_that_are_no_box_is_a_user_error(env_id: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make(env_id, script=ppo_continuous)


def test_atari_that_is_not_installed_is_a_user_error_that_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ale_py", None)  # importing it raises ImportError
    with pytest.raises(UserError, match=r'pip install "gymnasium\[atari\]"'):
        experiment.make_vec(ppo_discrete.Args(env_id="ALE/Pong-v5"), 1)


ERRORS = [
    "ZeroDivisionError",
    "FileNotFoundError",
    "ConnectionRefusedError",
    "EOFError",
    "KeyError",
]


@forks
@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("where", ["init", "reset", "step"])
@pytest.mark.parametrize("error", ERRORS)
def test_an_exception_inside_the_environment_keeps_its_traceback(
    run_dir, monkeypatch, where: str, error: str, mode: str
) -> None:
    raise_errors = gym.vector.AsyncVectorEnv._raise_if_errors

    def later(self, successes: Any) -> None:
        if not all(successes):
            time.sleep(0.2)  # the worker that raised has ended by now
        raise_errors(self, successes)

    monkeypatch.setattr(gym.vector.AsyncVectorEnv, "_raise_if_errors", later)
    flags = dict(env_kwargs=(f"where={where}", f"error={error}"), vectorization_mode=mode)
    flags |= dict(num_envs=2, num_steps=64, total_timesteps=256)
    args = quick_args(ppo_discrete, run_dir, env_id="test/Raises-v0", **flags)
    kind = RuntimeError if mode == "async" and where != "init" else getattr(builtins, error)
    with pytest.raises(kind) as raised:
        ppo_discrete.train(args)
    assert "of my own" in str(raised.value) and not isinstance(raised.value, UserError)
    if kind is RuntimeError:  # a worker's traceback arrives as the message
        assert re.search(rf'envs.py", line \d+(?s:.*)\b{error}: ', str(raised.value))
    elif mode == "sync":
        assert raised.traceback[-1].path.name == "envs.py"


@forks
@pytest.mark.parametrize("where", ["reset", "step", "action_masks"])
def test_an_exception_that_a_worker_cannot_pickle_arrives_as_its_traceback(
    run_dir, where: str
) -> None:
    """Gymnasium's main process would wait for it for ever."""
    flags = dict(env_kwargs=(f"where={where}",), vectorization_mode="async", num_envs=2)
    flags |= dict(num_steps=64, total_timesteps=256)
    args = quick_args(ppo_discrete, run_dir, env_id="test/RaisesUnpicklable-v0", **flags)
    with pytest.raises(RuntimeError, match=r'envs.py", line \d+(?s:.*)Unpicklable: of my own'):
        ppo_discrete.train(args)


def test_an_exception_of_gymnasium_called_by_the_environment_keeps_its_traceback() -> None:
    """The innermost line is Gymnasium's, but it is not the flags that are wrong."""
    with pytest.raises(gym.error.NameNotFound):
        make("test/Raises-v0", env_kwargs=("where=inner",))


def test_a_slip_in_a_wrapper_beside_the_flags_keeps_its_traceback() -> None:
    class Args(ppo_discrete.Args):
        pass

    with pytest.raises(AttributeError, match="observation_spase"):
        experiment.make_vec(Args(), 2, wrap=lambda env: env.observation_spase)


def test_an_exception_inside_the_environment_keeps_its_type_with_capture_video(run_dir) -> None:
    flags = dict(env_kwargs=("where=reset",), capture_video=True)
    with pytest.raises(ZeroDivisionError):
        ppo_discrete.train(quick_args(ppo_discrete, run_dir, env_id="test/Raises-v0", **flags))


MODULE = """
import gymnasium as gym
{first}
class Mine(gym.Env):
    action_space, observation_space = gym.spaces.Discrete(2), gym.spaces.Discrete(2)
    def reset(self, *, seed=None, options=None):
        return 0, {{}}
    def step(self, action):
        return 0, 1.0, True, False, {{}}
gym.register("mine/{name}-v0", Mine)
"""


def write_module(monkeypatch, folder: Path, name: str, first: str = "") -> None:
    """Write a module that registers an environment into a folder, and go there."""
    (folder / f"{name}.py").write_text(MODULE.format(first=first, name=name))
    monkeypatch.setattr(sys, "path", [x for x in sys.path if x not in ("", ".")])
    monkeypatch.chdir(folder)


def test_a_module_of_the_current_folder_is_found_though_the_script_is_elsewhere(
    tmp_path, monkeypatch
) -> None:
    write_module(monkeypatch, tmp_path, "my_environments")
    envs = make("my_environments:mine/my_environments-v0")
    assert envs.single_observation_space.shape == (2,)


@pytest.mark.parametrize(
    ("name", "first", "error"),
    [
        ("broken_one", "import one_more", ModuleNotFoundError),
        ("broken_two", "import broken", ModuleNotFoundError),  # the begin of its own name
        ("broken_four", "open('nowhere')", FileNotFoundError),
        ("broken_five", "gym.make('CartPol-v1')", gym.error.Error),
    ],
)
def test_an_exception_inside_the_module_keeps_its_traceback(
    tmp_path, monkeypatch, name: str, first: str, error: type
) -> None:
    write_module(monkeypatch, tmp_path, name, first)
    with pytest.raises(error) as raised:
        make(f"{name}:mine/{name}-v0")
    assert not isinstance(raised.value, UserError)


def test_a_module_that_is_no_python_is_one_line_with_file_and_line(tmp_path, monkeypatch) -> None:
    write_module(monkeypatch, tmp_path, "broken_three", "1 +")
    with pytest.raises(UserError, match=r"invalid syntax \(broken_three.py, line 3\)"):
        make("broken_three:mine/broken_three-v0")


def test_env_kwargs_are_read_as_python_or_json_or_words(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(gym, "make_vec", lambda *_, **kwargs: calls.append(kwargs) or 1 / 0)
    texts = "a=.05 b=None c=true d=False e=(1,2) f=[3] g=8x8 h=1e-3 i=null j= k=FALSE l=no m=off"
    texts += " n=True o=ON p=yes q=none r='x' s={'a':1} t=x=y u=-7 v=TRUE w=No x"
    with pytest.raises(ZeroDivisionError):
        make("CartPole-v1", env_kwargs=tuple(texts.split()))
    expected = dict(a=0.05, b=None, c=True, d=False, e=(1, 2), f=[3], g="8x8", h=1e-3, i=None, j="")
    expected |= dict(k=False, l=False, m=False, n=True, o=True, p=True, q=None, r="x", s={"a": 1})
    expected |= dict(t="x=y", u=-7, v=True, w=False, x=True)
    assert {k: calls[0][k] for k in expected} == expected


def test_env_kwargs_reach_every_environment() -> None:
    envs = make("test/Constant-v0", 3, env_kwargs=("length=2", "truncate=yes"))
    assert [(e.unwrapped.length, e.unwrapped.truncate) for e in envs.unwrapped.envs] == [
        (2, True)
    ] * 3


@forks
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_random_numbers_of_python_and_numpy_are_seeded(tmp_path, mode: str) -> None:
    tables = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        flags = dict(env_id="test/GlobalNoise-v0", seed=seed, vectorization_mode=mode, num_envs=4)
        ppo_discrete.train(quick_args(ppo_discrete, tmp_path / name, total_timesteps=192, **flags))
        tables.append([row | {"charts/SPS": 0} for row in read_metrics(tmp_path / name)])
    assert str(tables[0]) == str(tables[1]) and str(tables[0]) != str(tables[2])


@forks
def test_workers_draw_different_random_numbers() -> None:
    envs = make("test/GlobalNoise-v0", 4, vectorization_mode="async")
    obs, _ = envs.reset(seed=1)
    envs.close()
    assert len(np.unique(obs.max(1))) == 4


# ---- What they show ----------------------------------------------------------------------------

IMAGES = ["image", "channels_first", "channels_last", "grey", "floats", "dict", "tuple"]


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize(
    ("script", "env", "said"),
    [(ppo_discrete, "Shown", "ppo_atari.py"), (ppo_continuous, "ShownBox", "recipe")],
)
def test_an_image_is_refused_also_inside_a_dict_and_told_who_serves_it(
    script, env: str, said: str, kind: str
) -> None:
    with pytest.raises(UserError, match=f"image.*{said}"):
        make(f"test/{env}-v0", script=script, env_kwargs=(f"space={kind}",))


@pytest.mark.parametrize(
    ("kind", "part"), [("text", "Text("), ("sequence", "Sequence("), ("graph", "Graph(")]
)
def test_observations_of_no_fixed_size_are_refused_and_the_part_is_shown(kind, part) -> None:
    with pytest.raises(UserError, match="no fixed size") as error:
        make("test/Shown-v0", env_kwargs=(f"space={kind}",))
    assert part in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ("NestedIdentity", [3 + 2, 1 + 4]),  # one-hot 3 and 2, then the matrix
        ("Matrix", [3, 1]),
        ("Factors", [3 + 4, 2]),
        ("Bytes", [3, 200]),
    ],
)
def test_observations_of_a_fixed_size_become_vectors_of_floats(env: str, expected: list) -> None:
    envs = make(f"test/{env}-v0")
    obs, _ = envs.reset(seed=0)
    if env == "NestedIdentity":
        assert obs.shape == (2, 9) and obs.sum(1).tolist() == [1 + 1 + 4] * 2
    else:
        size, total = expected
        assert obs.shape == (2, size) and obs.sum(1).tolist() == [total] * 2


def test_bytes_reach_a_network_of_ones_own_in_the_evaluation_too(run_dir) -> None:
    args = quick_args(ppo_discrete, run_dir, env_id="test/Bytes-v0", total_timesteps=128)
    agent = ppo_discrete.Agent(args, ppo_discrete.make_envs(args, 1))
    agent.actor = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 3))
    _, results = ppo_discrete.train(args, agent)
    assert 0 <= results["eval_mean"] <= 10


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("what", ["reward", "obs"])
def test_what_is_no_number_stops_the_training_and_is_not_logged(run_dir, what: str) -> None:
    flags = dict(env_id="test/Broken-v0", env_kwargs=(f"what={what}",), checkpoint_every=1)
    with pytest.raises(UserError, match="test/Broken-v0 gave a NaN or infinity"):
        ppo_discrete.train(quick_args(ppo_discrete, run_dir, **flags))
    assert len(read_metrics(run_dir)) == 3  # 48 of the 50 good steps


def test_an_infinite_observation_in_the_first_statistics_is_one_clear_line(run_dir) -> None:
    flags = dict(env_id="test/Broken-v0", env_kwargs=("what=obs",), norm_obs=True, num_envs=2)
    with pytest.raises(UserError, match="gave a NaN or infinity after step 0"):  # no training yet
        ppo_discrete.train(quick_args(ppo_discrete, run_dir, **flags))


def test_a_reward_that_is_no_number_in_the_evaluation_is_one_clear_line(run_dir) -> None:
    flags = dict(env_id="test/NanLater-v0", total_timesteps=256)
    with pytest.raises(UserError, match="NaN"):
        ppo_discrete.train(quick_args(ppo_discrete, run_dir, **flags))
    assert not (run_dir / "results.json").exists()
    assert (run_dir / "checkpoint.pt").exists()


# ---- Masks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", ["MaskedInObs", "MaskedVector"])
def test_only_legal_actions_reach_the_environment(run_dir, monkeypatch, env: str) -> None:
    """It asserts so, in training and in both evaluations."""
    calls = spy(monkeypatch, "ppo_loss", ppo_discrete)
    args = quick_args(ppo_discrete, run_dir, env_id=f"test/{env}-v0", eval_episodes=20)
    _, results = ppo_discrete.train(args)
    assert results["eval_cut_off"] == 0
    masks = torch.cat([call.batch.masks for call in calls])
    legal = {"MaskedVector": 1}.get(env, 2)
    assert ((masks == 0).sum(-1) == legal).all() and set(masks.unique().tolist()) == {-1e9, 0.0}


def test_a_mask_in_the_observation_is_not_observed() -> None:
    envs = make("test/MaskedInObs-v0")
    obs, info = envs.reset(seed=0)
    assert obs.shape == (2, 3) and (obs.sum(1) == 1).all()
    assert info["action_mask"].shape == (2, 5) and (info["action_mask"].sum(1) == 2).all()


@pytest.mark.parametrize("mode", ["sync", pytest.param("async", marks=forks)])
@pytest.mark.parametrize("infos", ["", "prob"])
def test_only_masks_and_the_infos_named_are_joined(mode: Any, infos: str, monkeypatch) -> None:
    monkeypatch.setattr(ppo_discrete.Args, "infos", infos)
    envs = make("Taxi-v4", vectorization_mode=mode)
    expected = {
        "begins",
        *(f"{mark}{name}" for name in ["action_mask", *infos.split()] for mark in ["", "_"]),
    }
    for info in (envs.reset(seed=0)[1], envs.step(np.zeros(2, int))[-1]):
        assert set(info) == expected
    envs.close()


def test_a_vector_environment_with_a_mask_in_its_observation_is_refused(monkeypatch) -> None:
    from tests.envs import MaskedInObs, MaskedVector

    monkeypatch.setattr(MaskedVector, "single_observation_space", MaskedInObs.observation_space)
    with pytest.raises(UserError, match="action_mask in the info"):
        make("test/MaskedVector-v0")


def test_an_additive_mask_is_one_clear_line(run_dir) -> None:
    """Read as zeros and ones it would allow exactly the illegal actions."""
    args = quick_args(ppo_discrete, run_dir, env_id="test/MaskedAdditively-v0")
    with pytest.raises(UserError, match="1 for a legal choice, else 0"):
        ppo_discrete.train(args)


def test_masks_without_any_given_leave_every_choice_that_exists() -> None:
    choices = Choices(gym.spaces.MultiDiscrete([2, 3]))
    free = [[True, True, False], [True, True, True]]
    assert (np.broadcast_to(choices.masks({}), (2, 3)) == 0).tolist() == free
    given = choices.masks({"action_mask": np.ones((4, 5), np.int8)})
    assert given.tolist() == np.broadcast_to(choices.masks({}), (4, 2, 3)).tolist()


def test_masks_after_an_episodes_end_are_ignored() -> None:
    """Then nothing is legal, and the next step only resets."""
    envs = make("test/Masked-v0", 3)
    _, info = envs.reset(seed=0)
    for t in range(1, 12):
        legal = Choices(envs.single_action_space).masks(info)[:, 0]
        assert ((legal == 0).sum(-1) == (5 if t == 11 else 2)).all(), t
        *_, info = envs.step(legal.argmax(-1))


# ---- Recording ---------------------------------------------------------------------------------


def test_recorded_envs_note_returns_and_lengths_and_pay_nothing_for_a_reset() -> None:
    envs = make("test/Poison-v0", 3)  # episodes of 3 steps, of which 0, 1, 2 have been made
    envs.reset(seed=0)
    paid = np.stack([envs.step(np.zeros(3, int))[1] for _ in range(7)])
    assert paid.dtype == np.float64  # float32 would round the sums
    # rewards of environment 2: its last step, the reset, three steps, the reset, one step
    assert paid.T.tolist() == [[1, 1, 1, 0, 1, 1, 1], [1, 1, 0, 1, 1, 1, 0], [1, 0, 1, 1, 1, 0, 1]]
    expected = [(2, 1.0, 1), (1, 2.0, 2), (0, 3.0, 3), (2, 3.0, 3), (1, 3.0, 3), (0, 3.0, 3)]
    assert envs.finished == expected


def test_train_return_of_long_and_short_episodes_is_of_whole_episodes(run_dir) -> None:
    flags = dict(env_id="test/ShortOrLong-v0", num_envs=4, total_timesteps=16 * 4 * 16)
    seen = StopAfter(99)
    ppo_discrete.train(quick_args(ppo_discrete, run_dir, **flags), on_iteration=seen)
    returns = torch.load(run_dir / "checkpoint.pt", weights_only=True)["run"]["recent_returns"]
    assert set(returns) == {3.0, 60.0}
    assert read_metrics(run_dir)[-1]["global_step"] == seen.steps[-1]


def test_normaliser_stays_on_the_cpu_and_in_double_precision() -> None:
    module = nn.Sequential(nn.Linear(2, 2), Normaliser((2,), 10.0))
    module.to("meta").half()
    assert (
        module[0].weight.is_meta and module[1].mean.is_cpu and module[1].mean.dtype == torch.float64
    )


def test_statistics_leave_out_the_rows_that_only_reset(run_dir, monkeypatch) -> None:
    calls = spy(monkeypatch, "update", Normaliser)
    flags = dict(env_id="test/Poison-v0", norm_obs=True, total_timesteps=512)
    agent, results = ppo_discrete.train(quick_args(ppo_discrete, run_dir, **flags))
    rows = np.concatenate([call.rows for call in calls])
    assert len(rows) == results["global_step"] and rows.max() < MARK
    np.testing.assert_allclose(agent.obs_normaliser.mean, rows.astype(float).mean(0), rtol=1e-12)


# ---- Evaluation --------------------------------------------------------------------------------


@pytest.mark.parametrize(("episodes", "num_envs"), [(100, 8), (3, 8), (8, 8), (30, 1)])
def test_evaluate_plays_a_quota_of_whole_episodes_of_each_environment(episodes, num_envs) -> None:
    """Of episodes of 3 or 60 steps, a race would count too many short ones."""
    scores, cut_off = experiment.evaluate(
        Stub(), make("test/ShortOrLong-v0", num_envs), episodes, 7, None
    )
    expected = []
    for i in range(num_envs):
        env = gym.make("test/ShortOrLong-v0")
        for k in range(len(range(i, episodes, num_envs))):
            env.reset(seed=7 + i if k == 0 else None)
            expected.append(float(env.unwrapped.length))
    assert sorted(scores) == sorted(expected) and len(scores) == episodes and cut_off == 0


def test_evaluate_that_is_stopped_counts_the_episodes_it_cut_off() -> None:
    envs, steps = make("test/ShortOrLong-v0", 4), []
    scores, cut_off = experiment.evaluate(
        Stub(), envs, 8, 7, None, stop=lambda: steps.append(0) or len(steps) > 30
    )
    whole = [score for score in scores if score in (3.0, 60.0)]
    assert cut_off == len(scores) - len(whole) > 0 and len(steps) == 31


def test_results_json_is_valid_json_also_where_no_episode_ended(run_dir) -> None:
    flags = dict(env_id="test/Dial-v0", env_kwargs=("choices=3",), total_timesteps=128)
    ppo_discrete.train(quick_args(ppo_discrete, run_dir, **flags))
    results = json.loads((run_dir / "results.json").read_text(), parse_constant=lambda x: 1 / 0)
    assert results["train_return"] is None


@forks
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_evaluation_takes_no_more_environments_than_training_in_the_same_mode(
    run_dir, monkeypatch, mode: str
) -> None:
    calls = spy(monkeypatch, "make_vec", experiment.gym)
    flags = dict(num_envs=4, num_minibatches=2, total_timesteps=64, eval_episodes=30)
    args = quick_args(ppo_discrete, run_dir, vectorization_mode=mode, **flags)
    _, results = ppo_discrete.train(args)
    assert len(calls) >= 2 and results["eval_episodes"] == 30
    assert all(call.num_envs <= 4 and call.vectorization_mode == mode for call in calls)


def test_make_vec_with_a_wrapper_applies_it_to_vectorised_environments_too() -> None:
    """CartPole has a vector entry point, whose one object no wrapper of single ones fits."""
    args, wrap = ppo_discrete.Args(), gym.wrappers.TimeAwareObservation
    envs = experiment.make_vec(args, 2, wrap=wrap)
    assert envs.single_observation_space.shape == (5,)
    assert envs.reset(seed=0)[0].shape == (2, 5)
    args.vectorization_mode = "vector_entry_point"
    with pytest.raises(UserError, match="vectorization-mode sync"):  # not left out
        experiment.make_vec(args, 2, wrap=wrap)
