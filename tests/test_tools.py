"""The short files of docs/recipes do what they say, wherever their packages are installed."""

import json
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import experiment
import ppo_continuous
import ppo_discrete
from tests.helpers import ROOT, quick_args, read_metrics

RECIPES = ROOT / "docs" / "recipes"
SCRIPTS = ("ppo_discrete", "ppo_continuous", "gae", "experiment")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of the packages are not ours


def needs(*packages: str) -> None:
    """Skip the test unless these packages are installed."""
    for package in packages:
        pytest.importorskip(package)


@pytest.fixture
def run_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return a function that runs a file as a user does, but on 10 iterations of 64 steps."""
    short = dict(num_envs=4, num_steps=16, total_timesteps=640, eval_episodes=2)

    class Short(ppo_discrete.Args):
        def __init__(self, **flags: Any):
            super().__init__(**(flags | short))

    monkeypatch.setattr(ppo_discrete, "Args", Short)
    monkeypatch.chdir(tmp_path)

    def run(name: str, *words: object) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        return runpy.run_path(str(RECIPES / name), run_name="__main__")

    return run


# ---- Around `train` ----------------------------------------------------------------------------


def test_sweep_maximises_the_evaluated_return(run_file: Any) -> None:
    needs("optuna")
    study = run_file("sweep.py")["study"]
    assert len(study.trials) == 20
    evaluated = [json.loads(x.read_text())["eval_mean"] for x in Path().rglob("results.json")]
    assert study.best_value == max(x.value for x in study.trials if x.state.name == "COMPLETE")
    assert study.best_value in evaluated


def test_sweep_ends_a_pruned_trial_after_the_report_that_prunes_it(run_file: Any) -> None:
    needs("optuna")
    import optuna

    objective = run_file_as_module("sweep.py").objective
    never = optuna.pruners.ThresholdPruner(lower=1e9)  # no return is enough
    study = optuna.create_study(direction="maximize", pruner=never)
    study.optimize(objective, n_trials=1)
    (folder,) = Path("runs").iterdir()
    (trial,) = study.trials
    assert trial.state.name == "PRUNED" and len(trial.intermediate_values) == 1
    returns = [row["charts/episodic_return"] for row in read_metrics(folder)]
    assert len(returns) < 10 and np.isfinite(returns).sum() == 1 and np.isfinite(returns[-1])


def run_file_as_module(name: str) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(runpy.run_path(str(RECIPES / name)))
    return module


def test_weights_and_biases_has_the_metrics_of_every_iteration(
    run_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_file("track_wandb.py")
    (log,) = Path("wandb").glob("offline-run-*/*.wandb")
    data, deadline = b"", time.monotonic() + 60
    while data.count(b"losses/approx_kl") < 10 and time.monotonic() < deadline:
        time.sleep(0.2)  # a process of its own writes the file
        data = log.read_bytes()
    assert data.count(b"losses/approx_kl") >= 10
    assert b"eval_stochastic_mean" in data and b"num_minibatches" in data


def test_best_policy_is_kept_and_loads(run_file: Any) -> None:
    names = run_file("keep_best.py")
    keep_best = names["keep_best"]
    assert len(keep_best.scores) == 1
    agent = experiment.load_agent("runs/best", ppo_discrete.Args, ppo_discrete.Agent)
    for name, value in agent.state_dict().items():
        assert torch.equal(value, keep_best.best[name])


def test_kept_policy_is_that_of_the_best_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    module = run_file_as_module("keep_best.py")
    agent = torch.nn.Linear(1, 1, bias=False)
    keep_best = module.KeepBest(agent, None, every=2)
    scores = iter([1.0, 5.0, 3.0])
    monkeypatch.setattr(experiment, "evaluate", lambda *_, **__: ([next(scores)], 0))
    for call in range(1, 7):
        torch.nn.init.constant_(agent.weight, float(call))
        keep_best(call, {})
    assert keep_best.scores == [1.0, 5.0, 3.0] and keep_best.best["weight"].item() == 4.0


def test_loaded_agent_plays_the_episode_of_the_trained_one(
    run_file: Any, capsys: pytest.CaptureFixture
) -> None:
    args = ppo_discrete.Args(run_dir=Path("runs/mine"))
    agent, _ = ppo_discrete.train(args)
    capsys.readouterr()
    run_file("act.py", "runs/mine")
    with_agent = experiment.RecordedEnvs(ppo_discrete.make_envs(args, 1))
    returns, _ = experiment.evaluate(agent, with_agent, episodes=1, seed=1, rng=None)
    with_agent.close()
    assert capsys.readouterr().out == f"return {returns[0]}\n"


@pytest.mark.parametrize("flags", [{}, {"squash": True}, {"norm_obs": False}], ids=str)
def test_onnx_actions_are_those_of_the_agent(
    run_file: Any, tmp_path: Path, flags: dict[str, bool]
) -> None:
    needs("onnx", "onnxscript", "onnxruntime")
    import onnxruntime

    changes = dict(env_id="Pendulum-v1", total_timesteps=256, **flags)
    agent, _ = ppo_continuous.train(quick_args(ppo_continuous, tmp_path / "run", **changes))
    run_file("export_onnx.py", tmp_path / "run")
    session = onnxruntime.InferenceSession(tmp_path / "run" / "policy.onnx")
    rng = np.random.default_rng(0)
    for rows in (1, 1000):
        obs = rng.normal(0.0, [1.0, 1.0, 50.0], (rows, 3)).astype(np.float32)  # some are clipped
        (actions,) = session.run(None, {"obs": obs})
        np.testing.assert_allclose(actions, agent.act(obs, {}), rtol=0, atol=1e-6)
    assert actions.std() > 0.01


# ---- Environments of others --------------------------------------------------------------------

# Plays at random until an episode has ended, then runs the script's own command line.
COMMAND = """
import importlib, sys
import numpy as np
import experiment

script = importlib.import_module(sys.argv.pop(1))
args = experiment.parse(script.Args)
envs = script.make_envs(args, args.num_envs)
space = envs.single_action_space
space.seed(1)
first, _ = envs.reset(seed=3)
obs, _ = envs.reset(seed=3)
assert len(obs) == args.num_envs and np.array_equal(first, obs)
done = np.zeros(args.num_envs, bool)
while not done.any():
    before = obs
    actions = np.stack([space.sample() for _ in range(args.num_envs)])
    obs, _, terminated, truncated, _ = envs.step(actions)
    done = terminated | truncated
assert not np.array_equal(obs, before)
before, (obs, rewards, terminated, truncated, _) = obs, envs.step(actions)
assert not rewards[done].any() and not (terminated | truncated)[done].any()
assert not np.array_equal(obs[done], before[done])
envs.close()
experiment.main(script.Args, script.train)
"""
ENVIRONMENTS = {
    "envpool_envs:EnvPool/CartPole-v1": ("ppo_discrete", "envpool", ""),
    "minigrid_envs:Grid/Empty-5x5-v0": ("ppo_discrete", "minigrid", ""),
    "pettingzoo_envs:Pursuit-v0": (
        "ppo_discrete",
        "supersuit pettingzoo pygame",
        "--num-envs 16 --eval-episodes 16 --env-kwargs max_cycles=20",
    ),
    "mjx_envs:Swing-v0": ("ppo_continuous", "mujoco.mjx", "--eval-episodes 4"),
    "shimmy:dm_control/cartpole-balance-v0": ("ppo_continuous", "shimmy dm_control", ""),
}
FLAGS = "--num-envs 4 --num-steps 16 --num-minibatches 2 --total-timesteps 640 --eval-episodes 2"


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_environments_of_others_reset_one_step_late_and_train(env_id: str, tmp_path: Path) -> None:
    script, packages, flags = ENVIRONMENTS[env_id]
    needs(*packages.split())
    for name in SCRIPTS:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    if (RECIPES / f"{env_id.partition(':')[0]}.py").exists():
        shutil.copy(RECIPES / f"{env_id.partition(':')[0]}.py", tmp_path)
    words = [sys.executable, "-c", COMMAND, script, "--env-id", env_id, "--run-dir", "run"]
    words += [*FLAGS.split(), *flags.split()]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert np.isfinite(json.loads((tmp_path / "run" / "results.json").read_text())["eval_mean"])


@pytest.mark.parametrize(
    "page", sorted(ROOT.glob("docs/*/copying.md")), ids=lambda p: p.parent.name
)
def test_every_short_file_is_on_the_page(page: Path) -> None:
    files = {x.name for x in RECIPES.glob("*.py") if "eside the scripts:\n" in x.read_text()}
    assert len(files) >= 9
    assert {name for name in files if f"../recipes/{name}" not in page.read_text()} == set()
