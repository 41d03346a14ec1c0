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
import ppo_rlhf_toy
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


# ---- Tasks and networks for language -----------------------------------------------------------


@pytest.fixture
def run_language(tmp_path: Path) -> Any:
    """Return a function that runs the command of a file's first lines, with more flags."""

    def run(name: str, flags: str) -> tuple[dict[str, Any], list[dict[str, float]]]:
        for file in ("ppo_rlhf_toy", "gae", "experiment", f"docs/recipes/{name}"):
            shutil.copy(ROOT / f"{file}.py", tmp_path)
        lines = (RECIPES / f"{name}.py").read_text().splitlines()
        (command,) = (x.split() for x in lines if x.startswith("    python "))
        words = [sys.executable, *command[1:], *flags.split(), "--run-dir", "run"]
        words += ["--device", "cpu", "--seed", "1"]
        result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        results = json.loads((tmp_path / "run" / "results.json").read_text())
        return results, read_metrics(tmp_path / "run")

    return run


def test_a_task_of_ones_own_is_learned(run_language: Any) -> None:
    flags = "--num-iterations 12 --warmup-iterations 3 --eval-prompts 256"
    results, metrics = run_language("rlhf_own_task", flags)
    assert results["gold"] > results["sft_gold"] + 0.1
    assert max(row["losses/first_ratio_error"] for row in metrics) < 1e-4


def test_own_task_holds_prompts_out_and_pays_for_places() -> None:
    task = run_file_as_module("rlhf_own_task.py").Sort()
    rng = np.random.default_rng(0)
    seen, held_out = (set(task.prompts(2000, rng, held_out=x)) for x in (False, True))
    assert len(seen) > 1000 and len(held_out) > 500 and not seen & held_out
    assert max(len(task.tokenizer.encode(x)) for x in seen) == task.prompt_size
    for answer, gold in {"abcd": 1.0, "abdc": 0.5, "abcdd": 0.8, "ab": 0.5, "": 0.0}.items():
        assert task.gold("dbca:", answer) == gold


def test_gpt2_of_hugging_face_goes_through_all_stages(run_language: Any) -> None:
    needs("transformers", "tokenizers")
    flags = "--sft-steps 120 --rm-pairs 768 --num-iterations 8 --warmup-iterations 3"
    results, metrics = run_language("rlhf_gpt2", f"{flags} --eval-prompts 256")
    # Generation with the cache agrees with the pass over whole answers.
    assert max(row["losses/first_ratio_error"] for row in metrics) < 1e-4
    assert results["rm_accuracy"] > 0.8
    assert results["gold"] > results["sft_gold"] + 0.1


def test_gpt2_of_hugging_face_does_not_see_padding() -> None:
    needs("transformers", "tokenizers")
    task = run_file_as_module("rlhf_gpt2.py").Reviews()
    tokenizer = task.tokenizer
    rng = np.random.default_rng(1)
    for prompt in task.prompts(100, rng):
        answer = task.demonstration(prompt, rng)
        assert tokenizer.decode(tokenizer.encode(answer)) == answer
        assert 1 < len(tokenizer.encode(prompt)) <= task.prompt_size
    torch.manual_seed(0)
    tokens = torch.tensor([tokenizer.encode(answer)])
    padded = torch.nn.functional.pad(tokens, (3, 0), value=tokenizer.pad)
    for head_size in (1, len(tokenizer)):
        model = task.network(ppo_rlhf_toy.Args(), head_size)
        cache: dict = {}
        steps = torch.cat([model(column, cache) for column in padded.split(1, dim=1)], dim=1)
        for outputs in (model(padded), steps):
            torch.testing.assert_close(outputs[:, 3:], model(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "page", sorted(ROOT.glob("docs/*/copying.md")), ids=lambda p: p.parent.name
)
def test_every_short_file_is_on_the_page(page: Path) -> None:
    files = {x.name for x in RECIPES.glob("*.py") if "eside the scripts:\n" in x.read_text()}
    assert len(files) >= 11
    assert {name for name in files if f"../recipes/{name}" not in page.read_text()} == set()
