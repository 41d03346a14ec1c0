"""A run of `experiment.py`: its folder, log, checkpoints and signals, and what it leaves behind."""

import contextlib
import dataclasses
import errno
import gc
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import experiment
import ppo_atari
import ppo_continuous
import ppo_discrete
from experiment import UserError, load_agent
from tests.helpers import ROOT, StopAfter, parameter_vector, quick_args, read_metrics, run_main

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
# Python warns of a fork in a process with threads, and Gymnasium logs what a worker raised.
forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:.*ERROR")


def load(run_dir: Path) -> dict[str, Any]:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def change(run_dir: Path, part: str, **values: Any) -> None:
    """Rewrite entries of one part of a checkpoint."""
    saved = load(run_dir)
    saved[part] |= values
    torch.save(saved, run_dir / "checkpoint.pt")


def stop_after(n: int, run_dir: Path, script: Any = ppo_discrete, **changes: Any) -> Any:
    """Train for n iterations of ten; return the arguments that resume the run."""
    args = quick_args(script, run_dir, **changes)
    script.train(args, on_iteration=StopAfter(n))
    return dataclasses.replace(args, resume=run_dir)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def equal(one: Any, other: Any) -> bool:
    """Return whether two nested states are equal to the last bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other


# ---- Folder and log ----------------------------------------------------------------------------


def test_run_folder_after_training_holds_exactly_its_files(run_dir) -> None:
    ppo_discrete.train(quick_args(ppo_discrete, run_dir))
    names = sorted(path.name.split(".tfevents")[0] for path in run_dir.iterdir())
    assert names == ["args.json", "checkpoint.pt", "events.out", "metrics.csv", "results.json"]


def test_args_json_after_resume_holds_what_the_run_continued_with(run_dir) -> None:
    resumed = stop_after(2, run_dir, gamma=0.5)
    ppo_discrete.train(dataclasses.replace(resumed, gamma=0.9), on_iteration=StopAfter(1))
    written = json.loads((run_dir / "args.json").read_text())
    assert written["gamma"] == 0.9 and written["resume"] is None
    assert written.keys() == vars(ppo_discrete.Args()).keys()


def test_folders_named_by_strings_train_resume_and_evaluate_alike(run_dir) -> None:
    args = stop_after(2, str(run_dir))
    assert args.resume == str(run_dir)
    ppo_discrete.train(args)
    _, trained = ppo_discrete.train(dataclasses.replace(args, resume=None, evaluate=str(run_dir)))
    assert trained["eval_mean"] == json.loads((run_dir / "results.json").read_text())["eval_mean"]
    with pytest.raises(UserError, match="name one folder"):
        ppo_discrete.train(quick_args(ppo_discrete, "."))


def test_results_json_after_training_is_what_train_returns(run_dir) -> None:
    _, results = ppo_discrete.train(quick_args(ppo_discrete, run_dir, eval_episodes=5))
    assert json.loads((run_dir / "results.json").read_text()) == results
    assert results["run_dir"] == str(run_dir) and results["stopped"] is None
    assert results["env_id"] == "test/Identity-v0" and results["seed"] == 1
    assert results["eval_episodes"] == 5
    assert results["eval_cut_off"] == results["eval_stochastic_cut_off"] == 0
    assert 0 <= results["eval_mean"] <= 10 and results["eval_stochastic_std"] >= 0
    rows = read_metrics(run_dir)
    assert results["global_step"] == rows[-1]["global_step"] and results["sps"] > 0
    returns = load(run_dir)["run"]["recent_returns"]
    assert results["train_return"] == pytest.approx(np.mean(returns)) and len(returns) == 100


def test_results_json_with_cut_off_episodes_says_how_many(run_dir, capsys) -> None:
    flags = dict(env_id="test/Drawn-v0", env_kwargs=("length=100_000",), eval_episodes=1)
    _, results = ppo_discrete.train(quick_args(ppo_discrete, run_dir, **flags))
    assert results["eval_cut_off"] == results["eval_stochastic_cut_off"] == 1
    assert results["eval_mean"] == 30_000 and results["train_return"] is None
    assert "1 of 1 episodes were cut off" in capsys.readouterr().out


def test_metrics_csv_has_a_row_for_each_iteration_with_what_on_iteration_gets(run_dir) -> None:
    seen = StopAfter(99)
    ppo_discrete.train(quick_args(ppo_discrete, run_dir), on_iteration=seen)
    rows = read_metrics(run_dir)
    assert [row.pop("global_step") for row in rows] == seen.steps and len(rows) == 10
    for row, metrics in zip(rows, seen.metrics):
        assert row.keys() == metrics.keys()
        np.testing.assert_array_equal(list(row.values()), list(metrics.values()))


def test_tensorboard_has_the_numbers_of_metrics_csv_but_no_nan(run_dir) -> None:
    flags = dict(env_id="test/Dial-v0", env_kwargs=("choices=3",))  # 40 steps, 2.5 iterations each
    ppo_discrete.train(quick_args(ppo_discrete, run_dir, **flags))
    events, rows = EventAccumulator(str(run_dir)).Reload(), read_metrics(run_dir)
    assert set(events.Tags()["scalars"]) == rows[0].keys() - {"global_step"}
    for name in ("charts/episodic_return", "losses/value_loss", "charts/learning_rate"):
        expected = [(r["global_step"], r[name]) for r in rows if not math.isnan(r[name])]
        steps, values = zip(*((e.step, e.value) for e in events.Scalars(name)))
        assert list(steps) == [step for step, _ in expected]
        np.testing.assert_allclose(values, [value for _, value in expected], rtol=1e-6)
    assert math.isnan(rows[0]["charts/episodic_return"])


def test_tensorboard_shows_the_hyperparameters_as_text(run_dir) -> None:
    stop_after(1, run_dir, gamma=0.875)
    events = EventAccumulator(str(run_dir)).Reload()
    (text,) = events.Tensors("hyperparameters/text_summary")
    table = text.tensor_proto.string_val[0].decode()
    assert "| gamma | 0.875 |" in table and "| env_id | test/Identity-v0 |" in table


def test_run_dir_that_holds_a_run_is_refused_and_kept(run_dir) -> None:
    stop_after(1, run_dir)
    before = contents(run_dir)
    with pytest.raises(UserError, match="holds a run: --resume it"):
        ppo_discrete.train(quick_args(ppo_discrete, run_dir))
    (run_dir / "checkpoint.pt").unlink()
    with pytest.raises(UserError, match="or name another"):
        ppo_discrete.train(quick_args(ppo_discrete, run_dir))
    assert contents(run_dir).items() <= before.items()


def test_two_runs_of_one_seed_are_equal_to_the_last_bit(tmp_path) -> None:
    parameters, tables = [], []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        args = quick_args(ppo_discrete, tmp_path / name, seed=seed)
        agent, _ = ppo_discrete.train(args)
        parameters.append(parameter_vector(agent))
        tables.append([r | {"charts/SPS": 0} for r in read_metrics(tmp_path / name)])
    assert torch.equal(parameters[0], parameters[1]) and str(tables[0]) == str(tables[1])
    assert not torch.equal(parameters[0], parameters[2])


# ---- train as a function -----------------------------------------------------------------------


def test_train_ends_when_on_iteration_returns_true(run_dir) -> None:
    stop = StopAfter(3)
    _, results = ppo_discrete.train(quick_args(ppo_discrete, run_dir), on_iteration=stop)
    assert len(read_metrics(run_dir)) == len(stop.steps) == 3
    assert results["stopped"] == "on_iteration" and results["eval_cut_off"] == 0
    assert load(run_dir)["run"]["iteration"] == 3


def test_train_with_an_agent_starts_from_its_weights_and_returns_it(tmp_path) -> None:
    agent, _ = ppo_discrete.train(quick_args(ppo_discrete, tmp_path / "first"))
    before = parameter_vector(agent)
    args = quick_args(ppo_discrete, tmp_path / "second", learning_rate=1e-12)
    again, _ = ppo_discrete.train(args, agent)
    assert again is agent
    torch.testing.assert_close(parameter_vector(agent), before, rtol=1e-5, atol=1e-7)


def test_train_works_in_a_thread_that_is_not_the_main_one(run_dir) -> None:
    done = []
    args = quick_args(ppo_discrete, run_dir)
    thread = threading.Thread(target=lambda: done.append(ppo_discrete.train(args)))
    thread.start()
    thread.join()
    ((_, results),) = done
    assert results["global_step"] > 1000 and (run_dir / "results.json").exists()


def leftovers() -> tuple[int, int, int]:
    """Return how many processes, threads and open files this process has."""
    gc.collect()
    files = len(os.listdir("/proc/self/fd"))
    return len(multiprocessing.active_children()), threading.active_count(), files


def trial(run_dir: Path, mode: str, where: str) -> None:
    """Train until something raises, in one of several places."""

    def on_iteration(step: int, _: dict) -> bool:
        if where == "on_iteration":
            raise ZeroDivisionError
        return False

    flags = dict(env_id="test/Raises-v0", env_kwargs=(f"where={where}",), num_envs=4)
    args = quick_args(ppo_discrete, run_dir, vectorization_mode=mode, total_timesteps=256, **flags)
    with contextlib.suppress(ZeroDivisionError, RuntimeError, OSError, EOFError):
        ppo_discrete.train(args, on_iteration=on_iteration)
        raise AssertionError("it did not raise")


@forks
@pytest.mark.parametrize(
    ("mode", "where"),
    [
        *(("sync", where) for where in ("on_iteration", "step", "reset", "close")),
        *(("async", where) for where in ("on_iteration", "step", "reset", "worker")),
    ],
)
def test_trials_that_raise_leave_no_process_thread_or_open_file(tmp_path, mode, where) -> None:
    handlers = [signal.getsignal(number) for number in SIGNALS]
    trial(tmp_path / "first", mode, where)  # opens what Python keeps open, such as /dev/urandom
    before = leftovers()
    for i in range(4):
        trial(tmp_path / str(i), mode, where)
    assert leftovers() == before and before[0] == 0
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


@forks
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_trial_that_succeeds_leaves_no_process_thread_or_open_file(tmp_path, mode) -> None:
    flags = dict(vectorization_mode=mode, num_envs=4, num_minibatches=2, total_timesteps=64)
    ppo_discrete.train(quick_args(ppo_discrete, tmp_path / "first", **flags))
    before = leftovers()
    ppo_discrete.train(quick_args(ppo_discrete, tmp_path / "second", **flags))
    assert leftovers() == before and before[0] == 0


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_checkpoint(
    run_dir, monkeypatch
) -> None:
    resumed = stop_after(2, run_dir)
    before = (run_dir / "checkpoint.pt").read_bytes()
    original = ppo_discrete.value_loss
    monkeypatch.setattr(ppo_discrete, "value_loss", lambda *x: original(*x) * math.nan)
    step = load(run_dir)["run"]["global_step"]
    with pytest.raises(UserError, match=r"loss is not finite after step (\d+)") as error:
        ppo_discrete.train(dataclasses.replace(resumed, checkpoint_every=1))
    assert step < int(str(error.value).split("step ")[1].split(":")[0]) <= step + 128
    assert (run_dir / "checkpoint.pt").read_bytes() == before and len(read_metrics(run_dir)) == 2


# ---- Resuming ----------------------------------------------------------------------------------


def state_of(run: experiment.Run) -> dict[str, Any]:
    """Return what a checkpoint of this run would hold now."""
    folder, run.folder = run.folder, Path(tempfile.mkdtemp())
    run.save()
    state = load(run.folder)
    shutil.rmtree(run.folder)
    run.folder = folder
    return state


def record_states(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Record the state of each run before its first episodes begin."""
    states, original = [], experiment.Run.start

    def start(self, *args: Any) -> None:
        original(self, *args)
        states.append(state_of(self))

    monkeypatch.setattr(experiment.Run, "start", start)
    return states


@pytest.mark.parametrize(
    ("script", "changes"),
    [
        (ppo_discrete, dict(norm_obs=True, objective="penalty")),
        (ppo_continuous, dict(log_std_fall=None)),
        (ppo_atari, dict(total_timesteps=96)),
    ],
)
def test_resume_takes_up_the_exact_state_of_the_checkpoint(
    run_dir, monkeypatch, script, changes: dict
) -> None:
    resumed = stop_after(2, run_dir, script, **changes)
    saved, states = load(run_dir), record_states(monkeypatch)
    script.train(resumed, on_iteration=StopAfter(1))
    (state,) = states
    assert state["optimizer"][0]["exp_avg"].any()
    assert state["run"]["iteration"] == 2 and state["run"]["recent_returns"]
    for part in state:
        assert equal(state[part], saved[part]), part
    assert not equal(load(run_dir)["agent"], saved["agent"])  # and it learns on


def test_resume_plays_new_episodes_and_no_step_before_its_first_rollout(
    run_dir, monkeypatch
) -> None:
    resets, steps = [], []
    original_reset, original_step = experiment.RecordedEnvs.reset, experiment.RecordedEnvs.step

    def reset(self, **kwargs) -> Any:
        obs, info = original_reset(self, **kwargs)
        resets.append(obs.copy())
        return obs, info

    monkeypatch.setattr(experiment.RecordedEnvs, "reset", reset)
    resumed = stop_after(3, run_dir, env_id="test/Parts-v0")
    (first, *_), done = list(resets), []
    resets.clear()
    monkeypatch.setattr(
        experiment.RecordedEnvs,
        "step",
        lambda self, actions: steps.append(0) or original_step(self, actions),
    )
    ppo_discrete.train(resumed, on_iteration=lambda *_: done.append(len(steps)))
    assert done == [16 * k for k in range(1, 8)]
    assert not np.array_equal(resets[0], first)


def test_resume_continues_the_metrics_without_a_gap_or_a_repeat(run_dir, capsys) -> None:
    """What a killed run logged after its checkpoint is dropped, a torn row too."""
    args = quick_args(ppo_discrete, run_dir, checkpoint_every=4)
    steps = []

    def killed(step: int, _: dict) -> bool:
        steps.append(step)
        return 1 / (7 - len(steps)) < 0  # never True; raises in the seventh iteration

    with pytest.raises(ZeroDivisionError):
        ppo_discrete.train(args, on_iteration=killed)
    with open(run_dir / "metrics.csv", "a") as file:
        file.write("1234,half a li")
    kept = (run_dir / "metrics.csv").read_bytes().splitlines()[:5]
    capsys.readouterr()
    rest = StopAfter(99)
    ppo_discrete.train(dataclasses.replace(args, resume=run_dir), on_iteration=rest)
    (line,) = (x for x in capsys.readouterr().out.splitlines() if "resumed at" in x)
    assert re.search(rf"resumed at \D*{steps[3]:,}\b", line)
    assert (run_dir / "metrics.csv").read_bytes().splitlines()[:5] == kept
    expected = [*steps[:4], *rest.steps]
    assert [row["global_step"] for row in read_metrics(run_dir)] == expected
    assert len(expected) == 10 and expected == sorted(set(expected))
    events = EventAccumulator(str(run_dir)).Reload().Scalars("losses/entropy")
    assert [event.step for event in events] == expected


def test_resume_drops_a_torn_row_before_the_checkpoint_too(run_dir) -> None:
    """A disk that lost the end of a file must not glue two rows together."""
    resumed = stop_after(4, run_dir)
    data = (run_dir / "metrics.csv").read_bytes()
    (run_dir / "metrics.csv").write_bytes(data[:-9])
    rest = StopAfter(99)
    ppo_discrete.train(resumed, on_iteration=rest)
    header, *rows = (run_dir / "metrics.csv").read_text().splitlines()
    assert rows[:3] == data.decode().splitlines()[1:4]
    assert {row.count(",") for row in rows} == {header.count(",")}
    assert [float(row.split(",")[0]) for row in rows[3:]] == rest.steps


def test_resume_continues_the_learning_rate_schedule(run_dir) -> None:
    resumed = stop_after(4, run_dir, learning_rate=0.01)
    ppo_discrete.train(resumed)
    rates = [row["charts/learning_rate"] for row in read_metrics(run_dir)]
    np.testing.assert_allclose(rates, [0.01 * (1 - i / 10) for i in range(10)])


def test_resume_counts_time_and_steps_from_the_beginning(run_dir) -> None:
    resumed = stop_after(4, run_dir)
    change(run_dir, "run", seconds=1000.0)
    _, results = ppo_discrete.train(resumed)
    assert 1000 < results["wall_seconds"] < 1100 and results["sps"] == 1
    assert read_metrics(run_dir)[-1]["charts/SPS"] == 1


def test_resume_of_a_finished_run_is_one_clear_line(run_dir, monkeypatch, capsys) -> None:
    _, results = ppo_discrete.train(quick_args(ppo_discrete, run_dir))
    before = contents(run_dir)
    for flags in ("", " --total-timesteps 640"):
        line = f"--resume {run_dir}{flags}"
        status, _, error = run_main(ppo_discrete, line, monkeypatch, capsys)
        assert status == 2 and error.count("\n") == 1
        assert "is finished" in error and re.search(rf"\b{results['global_step']}\b", error)
        assert contents(run_dir) == before


def test_resume_with_fewer_steps_than_done_is_one_clear_line(run_dir, monkeypatch, capsys) -> None:
    stop_after(6, run_dir)
    line = f"--resume {run_dir} --total-timesteps 512"
    status, _, error = run_main(ppo_discrete, line, monkeypatch, capsys)
    assert status == 2 and error.count("\n") == 1 and "is finished" in error


def test_resume_of_a_finished_run_with_more_steps_continues_it(
    run_dir, monkeypatch, capsys
) -> None:
    ppo_discrete.train(quick_args(ppo_discrete, run_dir))
    line = f"--resume {run_dir} --total-timesteps {13 * 128}"
    assert run_main(ppo_discrete, line, monkeypatch, capsys)[0] == 0
    assert len(read_metrics(run_dir)) == 13


def test_resume_of_a_run_killed_in_its_evaluation_evaluates_it(run_dir) -> None:
    args = quick_args(ppo_discrete, run_dir)
    _, results = ppo_discrete.train(args)
    (run_dir / "results.json").unlink()
    _, again = ppo_discrete.train(dataclasses.replace(args, resume=run_dir))
    assert (run_dir / "results.json").exists()
    changing = {"wall_seconds": 0, "sps": 0}
    assert again | changing == results | changing


def test_resume_that_starts_removes_the_results_of_the_earlier_end(run_dir) -> None:
    resumed = stop_after(3, run_dir)
    assert (run_dir / "results.json").exists()
    with pytest.raises(ZeroDivisionError):
        ppo_discrete.train(resumed, on_iteration=lambda *_: 1 / 0)
    assert not (run_dir / "results.json").exists()


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@pytest.mark.parametrize(
    ("script", "changed"),
    [
        *((ppo_discrete, x) for x in ("--env-id Acrobot-v1", "--hidden-size 32", "--norm-obs")),
        *((ppo_discrete, x) for x in ("--activation tanh", "--kl-coef 3.0")),
        *((ppo_continuous, x) for x in ("--squash", "--no-scale-actions", "--log-std-init 0.0")),
        *((ppo_continuous, x) for x in ("--log-std-fall None", "--no-norm-obs", "--clip-obs 5.0")),
        (ppo_continuous, "--no-norm-reward"),
    ],
)
def test_a_flag_of_the_trained_network_cannot_be_changed(
    tmp_path_factory, monkeypatch, capsys, script, changed: str, flag: str
) -> None:
    run_dir = tmp_path_factory.getbasetemp() / f"fixed_{script.__name__}"
    if not run_dir.exists():
        stop_after(1, run_dir, script)
    before = contents(run_dir)
    line = f"{flag} {run_dir} {changed}"
    status, _, error = run_main(script, line, monkeypatch, capsys)
    name = changed.split()[0].removeprefix("--").removeprefix("no-")
    assert status == 2 and error.count("\n") == 1 and f"--{name} " in error
    assert contents(run_dir) == before


@pytest.mark.parametrize("changed", ["--seed 2", "--num-envs 4", "--num-steps 32"])
def test_a_flag_of_the_random_numbers_cannot_be_changed_by_resume(
    run_dir, monkeypatch, capsys, changed: str
) -> None:
    stop_after(1, run_dir)
    line = f"--resume {run_dir} {changed}"
    status, _, error = run_main(ppo_discrete, line, monkeypatch, capsys)
    assert status == 2 and error.count("\n") == 1 and changed in error


def test_checkpoint_size_does_not_grow_with_the_run(run_dir) -> None:
    resumed = stop_after(10, run_dir)
    short = (run_dir / "checkpoint.pt").stat().st_size
    ppo_discrete.train(dataclasses.replace(resumed, total_timesteps=30 * 128))
    assert load(run_dir)["run"]["iteration"] == 30
    assert abs((run_dir / "checkpoint.pt").stat().st_size - short) < 200


def test_a_folder_in_use_is_refused_and_not_touched(run_dir) -> None:
    refused = []

    def second(step: int, _: dict) -> bool:
        for args in (args_first, dataclasses.replace(args_first, resume=run_dir)):
            with pytest.raises(UserError, match="another process is using it"):
                ppo_discrete.train(args)
            refused.append(step)
        return len(refused) >= 6

    args_first = quick_args(ppo_discrete, run_dir, checkpoint_every=1)
    ppo_discrete.train(args_first, on_iteration=second)
    assert [row["global_step"] for row in read_metrics(run_dir)] == sorted(set(refused))
    args = dataclasses.replace(args_first, resume=run_dir)  # and afterwards it is free
    ppo_discrete.train(args, on_iteration=StopAfter(1))


# ---- Killed runs -------------------------------------------------------------------------------


def train_in_a_child(args: Any) -> None:
    """Train; exit with status 3 if a resumed run is not in the state of its checkpoint."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    monkeypatch = pytest.MonkeyPatch()
    resumes = (args.run_dir / "checkpoint.pt").exists()
    saved = load(args.run_dir) if resumes else None
    states, original = record_states(monkeypatch), experiment.RecordedEnvs.reset

    def reset(self, **kwargs: Any) -> Any:
        if saved is not None and not equal(states[0], saved):
            os._exit(3)
        return original(self, **kwargs)

    monkeypatch.setattr(experiment.RecordedEnvs, "reset", reset)
    ppo_discrete.train(dataclasses.replace(args, resume=args.run_dir if resumes else None))


def kill_and_resume(run_dir: Path, kills: int, seed: int = 0) -> dict[str, int]:
    """Kill one run over and over at random moments, resuming it each time, then let it end.

    Raises `AssertionError` if a checkpoint cannot be read, if a resumed run is not bit for bit in
    the state of its checkpoint, or if metrics.csv has a gap or a repeat. Returns what was counted.
    """
    iterations = 100 + 50 * kills
    length = f"length={16 * iterations + 1}"  # so that no episode ends, and each step counts
    flags = dict(env_id="test/Drawn-v0", env_kwargs=(length,), num_envs=4, eval_episodes=1)
    flags |= dict(num_minibatches=2, update_epochs=1, total_timesteps=64 * iterations)
    args = quick_args(ppo_discrete, run_dir, checkpoint_every=1, **flags)
    rng, fork = random.Random(seed), multiprocessing.get_context("fork")
    # What Python imports late is imported now, so that the children begin at once.
    warm = dataclasses.replace(args, run_dir=run_dir.with_name("warm"))
    ppo_discrete.train(warm, on_iteration=StopAfter(2))
    counted, patience = dict(killed=0, resumed=0, iterations=0), 0.3  # seconds
    while True:
        resumes = (run_dir / "checkpoint.pt").exists()
        if not resumes:
            shutil.rmtree(run_dir, ignore_errors=True)
        process = fork.Process(target=train_in_a_child, args=(args,))
        process.start()
        process.join(rng.uniform(0.05, patience) if counted["killed"] < kills else 300)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            if (run_dir / "checkpoint.pt").exists():
                counted["killed"] += 1
            else:  # a slow machine
                patience *= 1.5
        else:
            assert process.exitcode == 0, process.exitcode
        counted["resumed"] += resumes
        if process.exitcode == 0:
            break
        if (run_dir / "checkpoint.pt").exists():
            iteration = load(run_dir)["run"]["iteration"]
            text = (run_dir / "metrics.csv").read_text().splitlines()
            steps = [line.split(",")[0] for line in text[1 : iteration + 1]]
            assert steps == [str(64 * k) for k in range(1, iteration + 1)]
    rows = read_metrics(run_dir)
    assert [row["global_step"] for row in rows] == [64 * k for k in range(1, len(rows) + 1)]
    assert len(rows) == args.num_iterations
    return counted | {"iterations": len(rows)}


@forks
def test_a_run_killed_and_resumed_over_and_over_loses_nothing(run_dir) -> None:
    counted = kill_and_resume(run_dir, kills=5)
    assert counted["killed"] >= 3 and counted["resumed"] >= 3  # all, unless it is very fast or slow


# ---- Signals -----------------------------------------------------------------------------------


def send_during(monkeypatch, name: str, at: int, *numbers: int, owner: Any = None) -> list[int]:
    """Send signals to this process in the `at`-th call of `Run.name`, or `owner.name`."""
    owner, calls = owner or experiment.Run, []
    original = getattr(owner, name)

    def sending(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls) + 1)
        if len(calls) == at:
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(0.01)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, sending)
    return calls


def flags_of(args: Any) -> list[str]:
    """Return the command line of arguments that differ from the default."""
    words = []
    for name, value in vars(args).items():
        if value != getattr(type(args)(), name):
            words += [
                f"--{name.replace('_', '-')}",
                *(map(str, value) if isinstance(value, tuple) else [str(value)]),
            ]
    return words


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_once_or_twice_within_a_second_saves_and_evaluates(
    run_dir, monkeypatch, capsys, number: int, times: int
) -> None:
    """Schedulers send it to the launcher and to the processes, so that it arrives twice."""
    handlers = [signal.getsignal(n) for n in SIGNALS]
    send_during(monkeypatch, "count_steps", 3, *[number] * times)
    line = flags_of(quick_args(ppo_discrete, run_dir))
    status, out, error = run_main(ppo_discrete, line, monkeypatch, capsys)
    assert status == 128 + number and "Traceback" not in error and "stopped after" in out
    results = json.loads((run_dir / "results.json").read_text())
    assert results["stopped"] == number.name
    assert results["eval_cut_off"] == results["eval_stochastic_cut_off"] == 0
    rows = read_metrics(run_dir)
    assert load(run_dir)["run"]["iteration"] == len(rows) == 3
    assert results["global_step"] == rows[-1]["global_step"]
    assert [signal.getsignal(n) for n in SIGNALS] == handlers


def test_a_signal_and_its_echo_during_the_evaluation_count_once(
    run_dir, monkeypatch, capsys
) -> None:
    """The iteration may end, and the evaluation begin, between the two."""
    send_during(monkeypatch, "count_steps", 3, signal.SIGTERM)
    send_during(monkeypatch, "evaluate", 1, signal.SIGTERM, owner=experiment)
    line = flags_of(quick_args(ppo_discrete, run_dir))
    status, _, _ = run_main(ppo_discrete, line, monkeypatch, capsys)
    results = json.loads((run_dir / "results.json").read_text())
    assert status == 143 and results["eval_cut_off"] == results["eval_stochastic_cut_off"] == 0


def test_a_second_signal_after_a_second_ends_the_run_at_once(run_dir, monkeypatch, capsys) -> None:
    now, clock = [0.0], time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: clock() + now[0])
    send_during(monkeypatch, "count_steps", 3, signal.SIGINT)

    def later(*_: Any) -> None:
        now[0] = 1.5
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        raise AssertionError("still running")

    monkeypatch.setattr(experiment.Run, "save", later)
    line = flags_of(quick_args(ppo_discrete, run_dir))
    status, out, error = run_main(ppo_discrete, line, monkeypatch, capsys)
    assert status == 130 and "Traceback" not in error and "evaluation" not in out


@pytest.mark.parametrize("evaluating", [False, True])
def test_a_signal_during_the_evaluation_ends_it(
    run_dir, monkeypatch, capsys, evaluating: bool
) -> None:
    flags = dict(env_id="test/Drawn-v0", env_kwargs=("length=1_000_000",))
    args = quick_args(ppo_discrete, run_dir, total_timesteps=128, eval_episodes=2, **flags)
    line = flags_of(args)
    if evaluating:
        stop_after(1, run_dir, total_timesteps=256, eval_episodes=1, **flags)
        line = f"--evaluate {run_dir} --eval-episodes 2"
    calls = send_during(monkeypatch, "step", 100, signal.SIGINT, owner=experiment.RecordedEnvs)
    status, out, error = run_main(ppo_discrete, line, monkeypatch, capsys)
    assert calls[-1] <= 101 and "Traceback" not in error
    assert status == 130
    if (run_dir / "results.json").exists() and not evaluating:
        assert json.loads((run_dir / "results.json").read_text())["eval_cut_off"] == 2


@forks
def test_worker_processes_leave_signals_to_the_main_process(run_dir) -> None:
    seen = []

    def on_iteration(*_: Any) -> bool:
        for worker in multiprocessing.active_children():
            status = Path(f"/proc/{worker.pid}/status").read_text()
            ignored = int(status.split("SigIgn:")[1].split()[0], 16)
            seen.append([bool(ignored >> (number - 1) & 1) for number in SIGNALS])
        return True

    flags = dict(vectorization_mode="async", num_envs=2, num_minibatches=2)
    ppo_discrete.train(quick_args(ppo_discrete, run_dir, **flags), on_iteration=on_iteration)
    assert seen == [[True] * 3] * 2


# ---- Disks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["checkpoint.pt", "metrics.csv", "results.json", "args.json"])
def test_a_full_disk_is_one_clear_line_and_keeps_the_last_checkpoint(
    run_dir, monkeypatch, capsys, where: str
) -> None:
    """A file is the old one until it is the whole new one."""
    stop_after(2, run_dir)
    before = (run_dir / "checkpoint.pt").read_bytes()
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == where:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    line = f"--resume {run_dir} --total-timesteps 384"
    status, _, error = run_main(ppo_discrete, line, monkeypatch, capsys)
    assert status == 2 and error.count("\n") == 1 and "No space left on device" in error
    assert str(run_dir) in error
    if where != "results.json":
        assert (run_dir / "checkpoint.pt").read_bytes() == before
    assert load(run_dir)["run"]["iteration"] in (2, 3)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_power_cut_cannot_leave_a_checkpoint_without_its_rows(run_dir, monkeypatch) -> None:
    """Both are on the disk before the new checkpoint takes the place of the old one."""
    events, fsync, replace = [], os.fsync, os.replace

    def recorded_fsync(file: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{file}")).name)
        fsync(file)

    def recorded_replace(source: Path, target: Path) -> None:
        events.append(f"replace {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    ppo_discrete.train(quick_args(ppo_discrete, run_dir, checkpoint_every=5))
    (first, second, _) = " ".join(events).split("replace checkpoint.pt")
    for before in (first, second):
        assert "metrics.csv" in before and "checkpoint.new" in before


CHILD_ON_A_FULL_DISK = """
import resource, sys
sys.path.insert(0, {root!r})
import experiment, ppo_discrete, tests.envs
original = experiment.Run.log
def log(self, metrics):
    if self.iteration == 3:
        limit = (self.folder / "metrics.csv").stat().st_size + 10
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    original(self, metrics)
experiment.Run.log = log
experiment.main(ppo_discrete.Args, ppo_discrete.train)
"""


def test_files_that_cannot_grow_are_one_clear_line(run_dir) -> None:
    """The system refuses to write beyond a limit, to TensorBoard's thread as well."""
    code = CHILD_ON_A_FULL_DISK.format(root=str(ROOT))
    args = quick_args(ppo_discrete, run_dir, checkpoint_every=2)
    done = subprocess.run(
        [sys.executable, "-c", code, *flags_of(args)], capture_output=True, text=True, timeout=100
    )
    # With a traceback of ours the status would be 1. TensorBoard's thread may print its own.
    assert done.returncode == 2 and done.stderr.count(f"-c: {run_dir}") == 1, done.stderr
    assert "File too large" in done.stderr
    assert load(run_dir)["run"]["iteration"] == 2


def test_a_checkpoint_that_the_disk_cannot_hold_is_one_clear_line(run_dir, monkeypatch, capsys):
    """It is larger than a buffer, so that the disk refuses it in the middle."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        flags = flags_of(quick_args(ppo_discrete, run_dir, hidden_size=256))
        status, _, error = run_main(ppo_discrete, flags, monkeypatch, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2 and error.count("\n") == 1 and "File too large" in error
    assert not (run_dir / "checkpoint.pt").exists()


# ---- Strangers' folders ------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@pytest.mark.parametrize(
    "how", ["missing", "empty", "text", "pickle", "payload", "foreign", "list", "other_script"]
)
def test_a_checkpoint_that_is_none_is_one_clear_line_and_runs_no_code(
    run_dir, monkeypatch, capsys, flag: str, how: str
) -> None:
    monkeypatch.chdir(run_dir.parent)
    stop_after(1, run_dir)
    path = run_dir / "checkpoint.pt"
    saved = load(run_dir)
    if how == "missing":
        path.unlink()
    elif how == "other_script":
        torch.save(saved | {"args": vars(ppo_continuous.Args()) | {"run_dir": None}}, path)
    elif how == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif how == "payload":
        torch.save(saved | {"args": Bomb()}, path)
    elif how in ("empty", "text"):
        path.write_bytes(b"no checkpoint" if how == "text" else b"")
    else:
        torch.save([1, 2] if how == "list" else {"model": torch.zeros(3)}, path)
    before = contents(run_dir)
    status, out, error = run_main(ppo_discrete, f"{flag} {run_dir}", monkeypatch, capsys)
    assert status == 2 and error.count("\n") == 1 and str(run_dir) in error and out == ""
    assert contents(run_dir) == before and not Path("exploded").exists()


def forge_value(value: Any, rng: random.Random) -> Any:
    """Return another value in place of a number, string, list, tensor or dict."""
    if isinstance(value, torch.Tensor):
        other_dtype = torch.float16 if value.dtype != torch.float16 else torch.int64
        return rng.choice(
            [
                lambda: torch.zeros(3, dtype=value.dtype),  # too small
                lambda: torch.zeros((*value.shape, 2), dtype=value.dtype),
                lambda: torch.zeros(0, dtype=value.dtype),
                lambda: value.to(other_dtype),
                lambda: value.double() if value.dtype == torch.float32 else value.float(),
                lambda: torch.zeros((), dtype=value.dtype).expand(value.shape),  # one number behind
                lambda: torch.zeros_like(value).to_sparse() if value.ndim else value.long(),
                lambda: torch.empty_like(value, device="meta"),
                lambda: value.tolist(),
                lambda: None,
                lambda: "text",
                lambda: {"a": value},
            ]
        )()
    if isinstance(value, dict):
        other = dict(value)
        key = rng.choice(list(other) or ["a"])
        how = rng.randrange(4)
        if how == 0:
            other.pop(key, None)
        elif how == 1:
            other["stranger"] = 1
        elif how == 2:
            other[str(key) + "x"] = other.pop(key, 0)
        else:
            return rng.choice([[], None, 3, "text"])
        return other
    if isinstance(value, bool):
        return rng.choice(["yes", 2, []])
    if isinstance(value, int | float):
        return rng.choice([-5, -(2**70), 2.5, math.nan, math.inf, -math.inf, "text", [1], True, {}])
    if isinstance(value, str):
        return rng.choice(["", "nonsense", "a:b:c-v0", "CartPole-v9", 5, ["x"], "../../etc"])
    if isinstance(value, list | tuple):
        wrong = [5], ["text"], [None], [math.nan], [[1]], "text", {"a": 1}, 7
        other = rng.choice(wrong)
        return tuple(other) if isinstance(value, tuple) and isinstance(other, list) else other
    return rng.choice([5, "text", [1], math.nan, {"a": 1}])  # None, for one


def forge(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Return a damaged or forged copy of a checkpoint's bytes, and what was done to it.

    A third are damaged bytes: cut off, overwritten, single bits. In the others one value anywhere
    has another shape, type or content, as a hostile or foreign program would write it.
    """
    if rng.random() < 0.34:
        broken, place = bytearray(data), rng.randrange(len(data))
        how = rng.choice(["truncated", "overwritten", "bits", "doubled"])
        if how == "truncated":
            return f"{how} at {place}", bytes(broken[:place])
        if how == "overwritten":
            broken[place : place + 20] = rng.randbytes(20)
        elif how == "bits":
            for _ in range(8):
                broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        else:
            broken[place:place] = broken[:place]
        return f"{how} at {place}", bytes(broken)
    saved = torch.load(io.BytesIO(data), weights_only=True)
    path: list[Any] = []
    parent, part = None, saved
    while isinstance(part, dict | list) and part and (not path or rng.random() < 0.93):
        key = rng.choice(list(part)) if isinstance(part, dict) else rng.randrange(len(part))
        path.append(key)
        parent, part = part, part[key]
    parent[path[-1]] = forge_value(part, rng)
    text = f"{type(parent[path[-1]]).__name__} {str(parent[path[-1]])[:60]!r}"
    file = io.BytesIO()
    torch.save(saved, file)
    return f"{'/'.join(map(str, path))} = {text}", file.getvalue()


def take_up(script: Any, how: str, folder: Path) -> str:
    """Resume, evaluate or load a folder's run; return "" or the line that refuses it."""
    try:
        if how == "load":
            agent = load_agent(folder, script.Args, script.Agent)
            agent.act(np.zeros((2, *agent.obs_shape), np.float32), {}, np.random.default_rng(0))
        else:
            sys.argv = [f"{script.__name__}.py", f"--{how}", str(folder), "--eval-episodes", "1"]
            sys.argv += ["--total-timesteps", "512"] if how == "resume" else []
            script.train(experiment.parse(script.Args))
    except UserError as error:
        return " ".join(str(error).split()) or "an empty message"
    except SystemExit as error:
        return f"exit {error.code}" if error.code == 2 else f"status {error.code}"
    return ""


def attack(run_dir: Path, seeds: range, log: Path, script: Any = ppo_discrete) -> None:
    """Forge a run's checkpoint with each seed and take it up; add a line to `log` for each.

    A line says "ok" if it was refused in one line, with nothing in the folder changed, or was
    harmless: it trained, or its numbers did not stay finite; of damaged bytes, none of the state's
    may have been taken up. Run this in a process of its own: what it looks for is a crash.
    """
    os.chdir(run_dir.parent)
    torch.set_num_threads(1)
    data, state = (run_dir / "checkpoint.pt").read_bytes(), load(run_dir)
    with open(log, "a", buffering=1) as file:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(f"{log}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        for seed in seeds:
            what, forged = forge(data, random.Random(seed))
            how = ("resume", "evaluate", "load")[seed % 3]
            folder = run_dir.parent / "forged"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(run_dir, folder)
            (folder / "checkpoint.pt").write_bytes(forged)
            before, damaged = contents(folder), "=" not in what
            if damaged:
                with contextlib.suppress(Exception):
                    damaged = not equal(load(folder), state)
            file.write(f"{seed} {how} {what}: ")
            try:
                refused = take_up(script, how, folder)
                changed = contents(folder) != before
                if refused and changed and "finite" not in refused and "infinity" not in refused:
                    file.write(f"REFUSED BUT CHANGED {refused}\n")
                elif damaged and not refused:
                    file.write("TAKEN UP\n")
                else:
                    file.write(f"ok {refused}\n")
            except Exception as error:
                file.write(f"RAISED {type(error).__name__} {' '.join(str(error).split())}\n")


def bad_lines(run_dir: Path, seeds: range, script: Any = ppo_discrete) -> list[str]:
    """Attack in a process of its own; return the lines that tell of a fault, a crash included."""
    log = run_dir.parent / f"attack_{seeds.start}.log"
    start, fork = seeds.start, multiprocessing.get_context("fork")
    bad = []
    while start < seeds.stop:
        process = fork.Process(target=attack, args=(run_dir, range(start, seeds.stop), log, script))
        process.start()
        process.join()
        lines = log.read_text().splitlines()
        log.unlink()
        bad += [line for line in lines if ": ok" not in line]
        if process.exitcode == 0:
            break
        bad[-1:] = [f"{lines[-1]} CRASHED with {process.exitcode}"]
        start = int(lines[-1].split()[0]) + 1
    return bad


@forks
@pytest.mark.parametrize("script", [ppo_discrete, ppo_continuous])
def test_a_damaged_or_forged_checkpoint_is_one_clear_line_and_no_crash(run_dir, script) -> None:
    stop_after(3, run_dir, script, eval_episodes=1)
    assert bad_lines(run_dir, range(20), script) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *((("args", name), None) for name in ("num_envs", "hidden_size", "env_id", "env_kwargs")),
        *(
            (("args", name), "nonsense")
            for name in ("objective", "vectorization_mode", "target_kl")
        ),
        *((("args", name), [1]) for name in ("run_dir", "resume", "evaluate", "gamma")),
        (("args", "env_kwargs"), (1,)),
        (("args", "seed"), True),
        *((("run", "iteration"), value) for value in (-5, 2.0, None)),
        *((("run", "global_step"), value) for value in (-5, 2**62, 2**70, None)),
        *((("run", "seconds"), value) for value in (math.nan, math.inf, None)),
        *((("run", "recent_returns"), value) for value in (None, ["x"], [None], [[1]])),
        *((("rngs",), value) for value in ([], [[]], None, [[{}, {}]])),
        (("rngs", 0, 0, "state", "state"), -1),
        (("rngs", 0, 1, "uinteger"), 2**70),
        (("optimizer",), {0: {}}),
        (("optimizer", 0, "exp_avg"), None),
        (("agent",), {}),
        (("agent", "kl_coef"), 1.0),
        (("agent", "actor.0.weight"), torch.zeros(3, 3)),
    ],
)
def test_resume_with_a_forged_value_is_one_clear_line_and_changes_nothing(
    tmp_path_factory, run_dir, monkeypatch, path: tuple, value: Any
) -> None:
    trained = tmp_path_factory.getbasetemp() / "forged_values"
    if not trained.exists():
        stop_after(3, trained)
    shutil.copytree(trained, run_dir)
    saved = part = load(run_dir)
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    torch.save(saved, run_dir / "checkpoint.pt")
    before = contents(run_dir)
    monkeypatch.setattr(sys, "argv", [])
    refused = take_up(ppo_discrete, "resume", run_dir)
    assert refused and str(run_dir) in refused and contents(run_dir) == before


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("obs_space",), None),
        (("obs_space", "low"), 3),
        (("action_space", "n"), -3),
        (("action_space", "kind"), "nonsense"),
        (("agent", "actor.0.weight"), torch.zeros(3, 3)),
        (("agent", "actor.0.weight"), None),
    ],
)
def test_load_agent_of_a_forged_value_is_a_user_error(run_dir, path: tuple, value: Any) -> None:
    stop_after(1, run_dir)
    saved = part = load(run_dir)
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    torch.save(saved, run_dir / "checkpoint.pt")
    with pytest.raises(UserError, match="no such agent"):
        load_agent(run_dir, ppo_discrete.Args, ppo_discrete.Agent)


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("form", ["short", "expanded", "double", "sparse", "strided"])
@forks
def test_adams_moments_of_another_form_neither_crash_nor_train(run_dir, moment, form) -> None:
    """Fused Adam checks nothing and would write past their end."""
    stop_after(3, run_dir)
    saved = load(run_dir)
    ours = saved["optimizer"][0][moment]
    forged = {
        "short": ours[:3].clone(),
        "expanded": torch.zeros(()).expand(ours.shape),
        "double": ours.double(),
        "sparse": ours.to_sparse(),
        "strided": torch.stack([ours, ours], 1)[:, 0],
    }[form]
    saved["optimizer"][0][moment] = forged
    torch.save(saved, run_dir / "checkpoint.pt")
    log = run_dir.parent / "refused"

    def child() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        log.write_text(take_up(ppo_discrete, "resume", run_dir))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0
    if form == "short":
        assert "invalid for input of size 3" in log.read_text()
    elif log.read_text() == "":  # taken up: then as a vector of its own, with the same numbers
        kept = load(run_dir)["optimizer"][0][moment]
        assert kept.is_contiguous() and kept.dtype == ours.dtype


@pytest.mark.parametrize(
    "name",
    ["metrics.new", "metrics.csv", "checkpoint.new", "results.new", "results.json", "args.json"],
)
def test_resume_of_a_folder_with_links_writes_nowhere_else(run_dir, name: str) -> None:
    resumed = stop_after(2, run_dir)
    victim = run_dir.parent / "victim"
    content = (run_dir / name).read_bytes() if (run_dir / name).exists() else b"precious"
    victim.write_bytes(content)
    (run_dir / name).unlink(missing_ok=True)
    (run_dir / name).symlink_to("../victim")
    ppo_discrete.train(resumed)
    assert victim.read_bytes() == content and not (run_dir / name).is_symlink()


def test_evaluate_with_video_into_a_folder_with_links_writes_nowhere(run_dir) -> None:
    pytest.importorskip("moviepy")
    args = quick_args(ppo_discrete, run_dir, env_id="CartPole-v1")
    ppo_discrete.train(args, on_iteration=StopAfter(1))
    (run_dir.parent / "victim").write_bytes(b"precious")
    (run_dir / "final-episode-0.mp4").symlink_to("../victim")
    args = dataclasses.replace(args, run_dir=None, evaluate=run_dir, capture_video=True)
    ppo_discrete.train(args)
    assert (run_dir.parent / "victim").read_bytes() == b"precious"
    assert not (run_dir / "final-episode-0.mp4").is_symlink()


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_a_strangers_environment_is_imported_only_if_its_name_is_typed(
    tmp_path, monkeypatch, capsys, flag: str
) -> None:
    module = f"runs_of_{flag[2:]}.stranger.setup"  # which Python would find
    run_dir = tmp_path / module.split(".")[0] / "stranger"
    stop_after(1, run_dir)
    (run_dir / "setup.py").write_text("from pathlib import Path\nPath('exploded').touch()\n")
    change(run_dir, "args", env_id=f"{module}:test/Identity-v0")
    monkeypatch.chdir(tmp_path)
    before = contents(run_dir)
    status, _, error = run_main(ppo_discrete, f"{flag} {run_dir}", monkeypatch, capsys)
    assert status == 2 and error.count("\n") == 1
    assert f"{module}:test/Identity-v0" in error and "--env-id" in error
    assert contents(run_dir) == before and not Path("exploded").exists()
    line = f"{flag} {run_dir} --env-id {module}:test/Identity-v0 --eval-episodes 1"
    assert run_main(ppo_discrete, line, monkeypatch, capsys)[0] == 0
    assert Path("exploded").exists()


# ---- What came out of it -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "env"),
    [
        (ppo_discrete, "Identity"),
        (ppo_discrete, "OffsetIdentity"),  # counts from 5
        (ppo_discrete, "Parts"),  # MultiDiscrete that counts from 0 and 4
        (ppo_discrete, "Bits"),  # MultiBinary (1, 3)
        (ppo_discrete, "NestedIdentity"),  # a Dict, flattened
        (ppo_continuous, "Target"),
        (ppo_continuous, "UnboundedTarget"),
        (ppo_continuous, "HalfBoundedTarget"),
        (ppo_atari, "Frames"),
    ],
)
def test_load_agent_acts_like_the_trained_agent_without_its_environment(
    run_dir, monkeypatch, script, env: str
) -> None:
    changes = {} if script is ppo_atari else dict(norm_obs=True)
    args = quick_args(script, run_dir, env_id=f"test/{env}-v0", **changes)
    agent, _ = script.train(args, on_iteration=StopAfter(2))
    monkeypatch.setattr(experiment.gym, "make_vec", lambda *_, **__: 1 / 0)
    loaded = load_agent(run_dir, script.Args, script.Agent)
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(40, *agent.obs_shape)).astype(np.float32)
    if script is ppo_atari:
        obs = rng.integers(256, size=(40, *agent.obs_shape), dtype=np.uint8)
    for generators in ((None, None), [np.random.default_rng(5) for _ in range(2)]):
        ours, theirs = (x.act(obs, {}, g) for x, g in zip((agent, loaded), generators))
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
        assert len(np.unique(ours, axis=0)) > 1 or generators[0] is None
    space = agent.box if script is ppo_continuous else agent.choices.space
    assert space == (loaded.box if script is ppo_continuous else loaded.choices.space)
    assert all(space.contains(action) for action in theirs)


def test_load_agent_of_another_network_is_a_user_error(run_dir) -> None:
    class Deeper(ppo_discrete.Agent):
        def __init__(self, args: Any, envs: Any):
            super().__init__(args, envs)
            self.actor.append(nn.Linear(3, 3))

    stop_after(1, run_dir)
    with pytest.raises(UserError, match="no such agent"):
        load_agent(run_dir, ppo_discrete.Args, Deeper)
    with pytest.raises(UserError, match="holds no checkpoint of this script"):
        load_agent(run_dir, ppo_continuous.Args, ppo_continuous.Agent)


@pytest.mark.filterwarnings("ignore:.*render_mode")
def test_capture_video_of_what_draws_nothing_fails_before_training(run_dir) -> None:
    with pytest.raises(UserError, match="render_mode"):
        ppo_discrete.train(quick_args(ppo_discrete, run_dir, capture_video=True))
    assert not run_dir.exists()


def test_capture_video_with_a_broken_renderer_fails_before_training(run_dir, monkeypatch) -> None:
    """Without a display, for one, the first picture raises whatever the renderer likes."""
    from gymnasium.envs.classic_control.cartpole import CartPoleEnv

    monkeypatch.setattr(CartPoleEnv, "render", lambda self: 1 / 0)
    flags = dict(env_id="CartPole-v1", vectorization_mode="sync", capture_video=True)
    args = quick_args(ppo_discrete, run_dir, **flags)
    with pytest.raises(UserError, match=r"--capture-video needs .*: division by zero"):
        ppo_discrete.train(args)
    assert not run_dir.exists()


@pytest.mark.parametrize("kwargs", [(), ("render_mode=ansi",)])
def test_capture_video_saves_one_episode_and_says_where(run_dir, capsys, kwargs) -> None:
    pytest.importorskip("moviepy")
    flags = dict(env_id="CartPole-v1", env_kwargs=kwargs, capture_video=True, total_timesteps=256)
    ppo_discrete.train(quick_args(ppo_discrete, run_dir, **flags))
    (video,) = run_dir.glob("*.mp4")
    assert video.stat().st_size > 1000 and str(video) in capsys.readouterr().out


def test_film_of_an_endless_episode_has_2000_frames(run_dir, monkeypatch) -> None:
    """An episode of 30,000 pictures of a megabyte would fill the memory."""
    from gymnasium.utils import save_video

    films = []
    monkeypatch.setattr(
        save_video, "save_video", lambda frames, *_, **__: films.append(len(frames))
    )
    monkeypatch.setattr(experiment, "evaluate", lambda *_, **__: ([0.0], 0))
    flags = dict(env_id="test/Drawn-v0", env_kwargs=("length=10_000",), total_timesteps=128)
    ppo_discrete.train(quick_args(ppo_discrete, run_dir, capture_video=True, **flags))
    assert films == [2000]
