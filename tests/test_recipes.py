"""The patches of docs/recipes apply to the shipped scripts, and do what the page says of them.

To change one: apply it, edit the script, and write `diff -U1` of the two files, with the names
a/<script> and b/<script>.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

import experiment
from tests.helpers import ROOT, StopAfter, import_file, parameter_vector, spy

FOLDER = ROOT / "docs" / "recipes"
PATCHES = sorted(FOLDER.glob("*.patch"))
MOST_LINES = {"without_experiment": 225}  # it takes out every feature of experiment.py
sys.path.append(str(FOLDER))

import tasks  # noqa: E402, F401  (registers the recipes' environments)


def apply(patch: str, folder: Path, *flags: str) -> None:
    subprocess.run(["git", "apply", *flags, f"{patch}.patch"], cwd=folder, check=True)


def copy_files(folder: Path) -> Path:
    """Copy what the page copies: the scripts, `gae.py`, `experiment.py` and the recipes."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in [*ROOT.glob("*.py"), *FOLDER.iterdir()]:
        if path.is_file():
            shutil.copy(path, folder)
    return folder


def script_of(patch: Path) -> str:
    return patch.read_text().split("\n", 1)[0].removeprefix("--- a/")


@pytest.fixture
def patched(request: pytest.FixtureRequest, tmp_path: Path) -> ModuleType:
    """The script with the recipe that the test names."""
    folder = copy_files(tmp_path / "mine")
    apply(request.param, folder)
    return import_file(folder / script_of(FOLDER / f"{request.param}.patch"))


def recipe(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("patched", [name], indirect=True, ids=[name])


def args_of(script: ModuleType, run_dir: Path, **changes: object) -> object:
    """Return a script's `Args`, small enough for a test of seconds."""
    small = dict(
        num_envs=8, num_steps=32, total_timesteps=2560, num_minibatches=4, eval_episodes=20
    )
    return script.Args(**(small | dict(run_dir=run_dir) | changes))


# ---- The files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
@pytest.mark.parametrize("in_repository", [False, True])
def test_a_patch_applies_and_can_be_taken_back(patch, in_repository, tmp_path) -> None:
    """Also in a folder of a repository, where `git apply` ignores a patch of the top level."""
    if in_repository:
        subprocess.run(["git", "init", "-q", tmp_path], check=True)
    folder = copy_files(tmp_path / "mine")
    script = script_of(patch)
    apply(patch.stem, folder)
    assert (folder / script).read_text() != (ROOT / script).read_text()
    compile((folder / script).read_text(), script, "exec")
    apply(patch.stem, folder, "-R")
    assert (folder / script).read_text() == (ROOT / script).read_text()


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_a_patch_is_short_and_as_tidy_as_the_scripts(patch, tmp_path) -> None:
    rows = patch.read_text().splitlines()[2:]
    assert sum(row[:1] in ("+", "-") for row in rows) <= MOST_LINES.get(patch.stem, 60)
    apply(patch.stem, copy_files(tmp_path))
    # In a folder of its own ruff cannot tell our modules from installed ones, to sort imports.
    for command in ("format --check", "check --ignore I"):
        words = f"-m ruff {command} --config {ROOT / 'pyproject.toml'} {script_of(patch)}".split()
        result = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True)
        assert result.returncode == 0, result.stdout.decode()


def test_each_patch_is_on_the_page() -> None:
    for page in ROOT.glob("docs/*/copying.md"):
        for patch in PATCHES:
            link = f"\n\n[`{patch.name}`](../recipes/{patch.name})\n\n"
            assert link in page.read_text(), f"{page}: {patch.stem}"
            assert f"\ngit apply {patch.name}\n" in page.read_text(), f"{page}: {patch.stem}"


def test_the_first_command_of_the_page_copies_what_a_recipe_needs(tmp_path) -> None:
    command = re.search(r"```sh\n(mkdir .*)\n", (ROOT / "docs/en/copying.md").read_text())[1]
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(FOLDER, tmp_path / "docs" / "recipes")
    subprocess.run(["bash", "-c", f"{command} && git apply rnd.patch"], cwd=tmp_path, check=True)
    assert {path.name for path in (tmp_path / "mine").iterdir()} >= {"tasks.py", "gae.py"}


# ---- Networks ----------------------------------------------------------------------------------


def first_kls(calls: list, args: object) -> list[float]:
    """Return the KL of each update's first minibatch, where the policy is still the old one."""
    per_update = args.update_epochs * args.num_minibatches
    return [abs(call.result[1]["approx_kl"].item()) for call in calls[::per_update]]


@recipe("own_network")
def test_an_own_network_acts_as_it_learns(patched, run_dir, monkeypatch) -> None:
    calls = spy(monkeypatch, "ppo_loss", patched)
    args = args_of(patched, run_dir, env_id="test/Identity-v0", total_timesteps=3840)
    agent, results = patched.train(args)
    assert sum(isinstance(module, nn.LayerNorm) for module in agent.actor.modules()) == 2
    assert max(first_kls(calls, args)) < 1e-6
    obs = np.random.default_rng(0).random((50, 3), np.float32)
    with torch.no_grad():
        expected = agent.actor(torch.as_tensor(obs)).argmax(-1)
    assert (agent.act(obs, {}) == expected.numpy()).all()
    assert results["eval_mean"] > 9.0  # of 10; random actions get 3.3


@recipe("two_branches")
def test_two_branches_solve_what_neither_can_alone(patched, run_dir, monkeypatch) -> None:
    calls = spy(monkeypatch, "ppo_loss", patched)
    args = args_of(patched, run_dir, env_id="BarAndNumber-v0", total_timesteps=7680)
    _, results = patched.train(args)
    assert max(first_kls(calls, args)) < 1e-6
    assert results["eval_mean"] > 5.0  # of 10; who sees only one of the two gets 3.3
    loaded = experiment.load_agent(run_dir, patched.Args, patched.Agent)
    envs = patched.make_envs(args, 4)
    obs, info = envs.reset(seed=0)
    assert loaded.act(obs, info).shape == (4,)


@recipe("images_continuous")
def test_images_steer_continuous_actions(patched, run_dir, monkeypatch) -> None:
    gae_calls = spy(monkeypatch, "ppo_loss", patched)
    args = args_of(
        patched, run_dir, env_id="test/Half-v0", total_timesteps=2048, hidden_size=32,
        update_epochs=3, learning_rate=1e-3,
    )  # fmt: skip
    agent, results = patched.train(args)
    assert gae_calls[0].batch.obs.dtype == torch.uint8
    assert max(first_kls(gae_calls, args)) < 1e-5
    assert results["eval_mean"] > -5.0  # 0 is best; who sees nothing gets -10


# ---- Memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "patched, best_without, enough",
    [("four_frames", 2.0, 3.0)],
    indirect=["patched"],
)
def test_what_was_seen_earlier_is_used(patched, best_without, enough, run_dir) -> None:
    """`Recall` shows a cue, then pays for it four times: 3 of 4 are within four frames."""
    args = args_of(
        patched, run_dir, env_id="Recall-v0", num_envs=32, num_steps=16, total_timesteps=7680,
        eval_episodes=200,
    )  # fmt: skip
    _, results = patched.train(args)
    assert results["eval_mean"] > enough > best_without


# ---- Rewards, advantages and learning rates ----------------------------------------------------


@recipe("own_reward")
def test_an_own_reward_is_what_is_learned_from(patched, run_dir, monkeypatch) -> None:
    calls = spy(monkeypatch, "gae", patched)
    rollouts = spy(monkeypatch, "count_steps", experiment.Run)
    patched.train(
        args_of(patched, run_dir, env_id="MountainCar-v0", total_timesteps=512, eval_episodes=2)
    )
    for call, rollout in zip(calls, rollouts):
        obs, _ = rollout.arrays
        energy = obs[..., 1] ** 2 / 2.0 + 0.0025 / 3.0 * np.sin(3.0 * obs[..., 0])
        expected = -1.0 + 200_000.0 * (energy[1:] - energy[:-1])
        expected[~rollout.is_transition] = 0.0
        np.testing.assert_allclose(call.rewards, expected, atol=0.02)


@recipe("recompute_advantages")
def test_each_epoch_has_advantages_of_the_critic_as_it_is(patched, run_dir, monkeypatch) -> None:
    estimates = spy(monkeypatch, "gae", patched)
    updates = spy(monkeypatch, "ppo_loss", patched)
    rollouts = spy(monkeypatch, "count_steps", experiment.Run)
    args = args_of(patched, run_dir, env_id="test/Identity-v0", total_timesteps=512)
    patched.train(args)
    assert len(estimates) == 2 * args.update_epochs
    assert not torch.equal(estimates[0].values, estimates[1].values)
    for epoch, estimate in enumerate(estimates):
        keep = torch.as_tensor(rollouts[epoch // args.update_epochs].is_transition)
        minibatches = updates[4 * epoch : 4 * epoch + 4]
        returns = torch.cat([call.batch.returns for call in minibatches])
        torch.testing.assert_close(returns.sort()[0], estimate.result[1][keep].sort()[0])


@recipe("kl_learning_rate")
def test_the_learning_rate_follows_the_kl(patched, run_dir) -> None:
    for kl, factor in ((0.021, 1 / 1.5), (0.019, 1.0), (0.0051, 1.0), (0.0049, 1.5)):
        learning_rate = torch.tensor(1e-3)
        patched.adapt_learning_rate(learning_rate, kl, 0.01)
        assert learning_rate.item() == pytest.approx(1e-3 * factor)
    log = StopAfter(10)
    args = args_of(patched, run_dir, env_id="test/Target-v0", total_timesteps=5120)
    agent, _ = patched.train(args, on_iteration=log)
    rates = [row["charts/learning_rate"] for row in log.metrics]
    assert rates[-1] == pytest.approx(agent.learning_rate.item()) != args.learning_rate
    kls = [row["losses/approx_kl"] for row in log.metrics[5:]]
    assert 0.005 < np.mean(kls) < 0.02
    log = StopAfter(1)  # resumed, it goes on where it was: the rate is saved with the agent
    patched.train(args_of(patched, None, resume=run_dir, **vars_of(args)), on_iteration=log)
    change = log.metrics[0]["charts/learning_rate"] / rates[-1]
    assert abs(np.log(change) / np.log(1.5)) < args.update_epochs + 1e-3


def vars_of(args: object) -> dict:
    return {k: v for k, v in vars(args).items() if k not in ("run_dir", "resume")}


@recipe("critic_learning_rate")
def test_the_critic_has_a_learning_rate_of_its_own(patched, run_dir) -> None:
    """The first step of Adam moves each parameter by the learning rate, whatever the gradient."""
    args = args_of(
        patched, run_dir, env_id="test/Identity-v0", update_epochs=1, num_minibatches=1,
        anneal_lr=False, critic_learning_rate=0.01, checkpoint_every=1,
    )  # fmt: skip
    envs = patched.make_envs(args, 1)
    agent = patched.Agent(args, envs)
    before = {name: parameter_vector(getattr(agent, name)) for name in ("actor", "critic")}
    patched.train(args, agent, on_iteration=StopAfter(1))
    moved = {n: (parameter_vector(getattr(agent, n)) - x).abs().max() for n, x in before.items()}
    assert moved["actor"].item() == pytest.approx(args.learning_rate, rel=0.01)
    assert moved["critic"].item() == pytest.approx(0.01, rel=0.01)
    log = StopAfter(1)
    patched.train(args_of(patched, None, resume=run_dir, **vars_of(args)), on_iteration=log)
    assert log.steps[0] > 256  # the optimiser of two groups resumes as well


# ---- Exploration and imitation -----------------------------------------------------------------


@recipe("rnd")
def test_novelty_is_what_was_seldom_seen(patched, run_dir, monkeypatch) -> None:
    """The value of rewards ends with the episode; that of novelty never does."""
    calls = spy(monkeypatch, "gae", patched)
    args = args_of(patched, run_dir, env_id="test/Identity-v0", total_timesteps=5120)
    envs = patched.make_envs(args, 1)
    agent = patched.Agent(args, envs)
    target = parameter_vector(agent.target)
    patched.train(args, agent)
    for call in calls:
        assert call.rewards.shape == call.values.shape == (32, 8, 2)
        assert call.terminated[..., 0].any() and not call.terminated[..., 1].any()
        assert torch.equal(call.done[..., 0], call.done[..., 1])
    assert torch.equal(parameter_vector(agent.target), target)
    normalise = agent.obs_normaliser.snapshot()
    with torch.no_grad():
        seen, new = (
            agent.novelty(torch.as_tensor(normalise(sign * np.eye(3, dtype=np.float32)))).mean()
            for sign in (1, -1)
        )
    assert seen < 0.5 * new


@recipe("cloning")
def test_the_cloned_policy_does_not_fall(patched, run_dir, monkeypatch, tmp_path) -> None:
    """Its teacher gets 500; a new critic would lead it astray, if nothing kept it near."""
    monkeypatch.chdir(tmp_path)
    exec((FOLDER / "record.py").read_text(), {})
    args = args_of(patched, run_dir, num_envs=32, total_timesteps=8192)
    envs = experiment.RecordedEnvs(patched.make_envs(args, 8))
    agent = patched.Agent(args, envs)
    scores = []

    def look(step: int, metrics: dict) -> None:
        scores.append(np.mean(experiment.evaluate(agent, envs, 8, seed=1, rng=None)[0]))
        assert metrics["losses/frozen_kl"] < 0.1

    patched.train(args, agent, on_iteration=look)
    assert len(scores) == 8 and min(scores) > 300
    with torch.no_grad():
        actor, clone = (parameter_vector(net) for net in (agent.actor, agent.clone))
    assert not torch.equal(actor, clone)
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"]
    assert any(name.startswith("clone.") for name in saved)  # a resumed run keeps to the same one


# ---- Without experiment.py ---------------------------------------------------------------------


def test_script_and_gae_are_enough(tmp_path) -> None:
    for name in ("ppo_discrete.py", "gae.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copy(FOLDER / "without_experiment.patch", tmp_path)
    apply("without_experiment", tmp_path)
    script = (tmp_path / "ppo_discrete.py").read_text()
    assert "experiment" not in script and len(script.splitlines()) < 300
    module = import_file(tmp_path / "ppo_discrete.py")
    args = module.Args(env_id="test/Identity-v0", num_envs=8, num_steps=32, total_timesteps=3840)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        agent = module.train(args)
    assert list(tmp_path.rglob("agent.pt"))
    envs = gym.make_vec("test/Identity-v0", 8)
    obs, _ = envs.reset(seed=0)
    total = 0.0
    for _ in range(10):
        obs, rewards, *_ = envs.step(agent.act(obs))
        total += rewards.mean()
    assert total > 7.0  # of 10; random actions get 3.3
