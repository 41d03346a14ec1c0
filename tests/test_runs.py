"""What keeps a run: checkpoints, resuming, evaluating again, several processes, compiling."""

import csv
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import ppo_continuous
import ppo_discrete

ROOT = Path(__file__).parent.parent
SCRIPTS = [ppo_discrete, ppo_continuous]
both = pytest.mark.parametrize("script", SCRIPTS)


def small(script, run_dir: Path, **changes):
    """Arguments of a run of 12 iterations, which takes about a second."""
    env_id = "CartPole-v1" if script is ppo_discrete else "Pendulum-v1"
    quick = dict(env_id=env_id, num_envs=4, num_steps=32, total_timesteps=12 * 128)
    quick |= dict(num_minibatches=4, update_epochs=2, eval_episodes=3, run_dir=run_dir)
    return script.Args(**(quick | changes))


class StopAfter(threading.Event):
    """Is set when it is asked for the n-th time, which `train` does once an iteration."""

    def __init__(self, n: int):
        super().__init__()
        self.countdown = n

    def is_set(self) -> bool:
        self.countdown -= 1
        return self.countdown <= 0


def parameters(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"]


def assert_same_run(one: Path, other: Path) -> None:
    """Equal to the last bit: parameters, normalisers, every line of the metrics but the speed."""
    a, b = parameters(one), parameters(other)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    for first, second in itertools.zip_longest(read_metrics(one), read_metrics(other)):
        assert {**first, "charts/SPS": ""} == {**second, "charts/SPS": ""}


def read_metrics(run_dir: Path) -> list[dict[str, str]]:
    with open(run_dir / "metrics.csv") as file:
        return list(csv.DictReader(file))


# ---- Resuming ----------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("restart_every", [1, 5, 100])
@pytest.mark.parametrize("mode", ["sync", None])
def test_a_resumed_run_ends_as_one_that_was_never_stopped(
    script, tmp_path, monkeypatch, restart_every: int, mode: str | None
) -> None:
    monkeypatch.setattr(script.Args, "restart_every", restart_every)
    flags = dict(target_kl=0.025, vectorization_mode=mode)
    script.train(small(script, tmp_path / "whole", **flags))
    args = small(script, tmp_path / "parts", **flags)
    script.train(args, StopAfter(3))
    args = dataclasses.replace(args, resume=args.run_dir)
    script.train(args, StopAfter(4))
    assert len(read_metrics(tmp_path / "parts")) == 7
    script.train(args)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    whole, parts = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "parts")
    )
    for results in (whole, parts):
        del results["sps"], results["wall_seconds"]
    assert whole == parts


@pytest.mark.parametrize("choices, dtype", [(256, torch.uint8), (300, torch.int64)])
def test_the_actions_of_a_checkpoint_are_small_and_are_played_again(
    tmp_path, choices: int, dtype: torch.dtype
) -> None:
    flags = dict(env_id="test/Dial-v0", env_kwargs=(f"choices={choices}",), learning_rate=1e-5)
    args = small(ppo_discrete, tmp_path / "parts", **flags)
    ppo_discrete.train(args, StopAfter(3))
    saved = torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)
    played = saved["processes"][0]["played"]
    assert played.dtype == dtype and played.shape == (3, 32, 4, 1) and played.max() > 200
    ppo_discrete.train(dataclasses.replace(args, resume=args.run_dir))
    ppo_discrete.train(small(ppo_discrete, tmp_path / "whole", **flags))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_restarting_ends_the_episodes_and_counts_nothing_twice(
    tmp_path, monkeypatch, capsys
) -> None:
    """An episode of 500 steps in rollouts of 32 ends only if nothing restarts it in between."""
    flags = dict(env_id="Pendulum-v1")  # 200 steps each
    monkeypatch.setattr(ppo_continuous.Args, "restart_every", 3)
    ppo_continuous.train(small(ppo_continuous, tmp_path / "cut", **flags))
    assert all(row["charts/episodic_return"] == "nan" for row in read_metrics(tmp_path / "cut"))
    assert capsys.readouterr().err.count("an episode was cut off after 96 steps") == 1
    monkeypatch.setattr(ppo_continuous.Args, "restart_every", 100)
    ppo_continuous.train(small(ppo_continuous, tmp_path / "whole", **flags))
    assert "cut off" not in capsys.readouterr().err
    lengths = {row["charts/episodic_length"] for row in read_metrics(tmp_path / "whole")}
    assert lengths == {"nan", "200.0"}


def test_the_metrics_go_on_without_a_gap_or_a_repeat(tmp_path) -> None:
    """What a killed run logged after its checkpoint is logged again when it is resumed."""
    args = small(ppo_discrete, tmp_path / "run", checkpoint_every=4)
    ppo_discrete.train(args, StopAfter(6))
    shutil.copy(tmp_path / "run" / "checkpoint.pt", tmp_path / "at6.pt")
    resumed = dataclasses.replace(args, resume=args.run_dir)
    ppo_discrete.train(resumed, StopAfter(3))
    shutil.copy(tmp_path / "at6.pt", tmp_path / "run" / "checkpoint.pt")  # as if killed after it
    with open(tmp_path / "run" / "metrics.csv", "a") as file:
        file.write("1234,half a li")
    ppo_discrete.train(resumed)
    ppo_discrete.train(small(ppo_discrete, tmp_path / "whole"))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def train_in_a_process(args, resume: bool) -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    ppo_discrete.train(dataclasses.replace(args, resume=args.run_dir if resume else None))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork in a process with threads
def test_killed_and_resumed_over_and_over(tmp_path, kills: int = 20) -> None:
    """SIGKILL at random moments never leaves a checkpoint that cannot be read and gone on with."""
    flags = dict(total_timesteps=400 * 128, checkpoint_every=1)
    args = small(ppo_discrete, tmp_path / "killed", **flags)
    rng, fork = random.Random(0), multiprocessing.get_context("fork")
    killed = 0
    for _ in range(10 * kills):
        resume = (args.run_dir / "checkpoint.pt").exists()
        if not resume:
            shutil.rmtree(args.run_dir, ignore_errors=True)
        process = fork.Process(target=train_in_a_process, args=(args, resume))
        process.start()
        process.join(rng.uniform(0.02, 0.3) if killed < kills else None)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed += 1
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert killed >= kills // 2  # all of them, unless the machine is very fast
    ppo_discrete.train(small(ppo_discrete, tmp_path / "whole", **flags))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


# ---- Folders that cannot be taken up -----------------------------------------------------------


def run_main(monkeypatch, capsys, script, flags: str) -> tuple[int, str]:
    """Return the exit status and what was printed to stderr."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *flags.split()])
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    status = 0
    try:
        script.main()
    except SystemExit as stopped:
        status = stopped.code
    for number, handler in handlers:
        signal.signal(number, handler)
    return status, capsys.readouterr().err


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def damage(path: Path, how: str) -> str:
    """Damage a checkpoint; return what the message has to say."""
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "missing":
        path.unlink()
    elif how == "text":
        path.write_text("no checkpoint")
    elif how == "noise":
        path.write_bytes(random.Random(0).randbytes(5000))
    elif how == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif how == "program":
        torch.save({"args": Bomb(), "agent": {}, "optimizer": {}, "processes": []}, path)
    elif how == "foreign":
        torch.save({"model": torch.zeros(3)}, path)
        return "no checkpoint of a run"
    elif how == "list":
        torch.save([1, 2], path)
    elif how == "other script":
        torch.save(torch.load(path) | {"args": {"lr": 1}}, path)
        return "holds no run of ppo_discrete.py"
    return "cannot be read"


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@pytest.mark.parametrize(
    "how",
    "truncated empty missing text noise pickle program foreign list other_script".split(),
)
def test_a_damaged_checkpoint_is_one_clear_line(
    tmp_path, monkeypatch, capsys, flag: str, how: str
) -> None:
    ppo_discrete.train(small(ppo_discrete, tmp_path / "run"), StopAfter(2))
    said = damage(tmp_path / "run" / "checkpoint.pt", how.replace("_", " "))
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    monkeypatch.chdir(tmp_path)
    status, error = run_main(monkeypatch, capsys, ppo_discrete, f"{flag} {tmp_path / 'run'}")
    assert status == 2 and error.count("\n") == 1 and said in error
    assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--hidden-size 32", "its network is not that of the flags given"),
        ("--env-id Acrobot-v1", "--env-id was CartPole-v1"),
        ("--num-envs 8", "--num-envs was 4"),
        ("--num-steps 64", "--num-steps was 32"),
        ("--seed 2", "--seed was 1"),
        ("--activation tanh", "--activation was relu"),
        ("--norm-obs", "--norm-obs was False"),
        ("--checkpoint-every 0", "--checkpoint-every 0 must be at least 1"),
    ],
)
def test_flags_that_do_not_fit_the_folder(tmp_path, monkeypatch, capsys, flags, said) -> None:
    ppo_discrete.train(small(ppo_discrete, tmp_path / "run"), StopAfter(2))
    status, error = run_main(
        monkeypatch, capsys, ppo_discrete, f"--resume {tmp_path / 'run'} {flags}"
    )
    assert status == 2 and error.count("\n") == 1 and said in error


@pytest.mark.parametrize("flag", ["squash", "scale_actions"])
def test_what_an_action_means_does_not_change(tmp_path, flag: str) -> None:
    args = small(ppo_continuous, tmp_path / "run", squash=False, scale_actions=False)
    ppo_continuous.train(args, StopAfter(2))
    resumed = dataclasses.replace(args, resume=args.run_dir, **{flag: True})
    with pytest.raises(ppo_continuous.UserError, match="was False"):
        ppo_continuous.train(resumed)


@both
def test_args_json_tells_what_the_run_goes_on_with(script, tmp_path) -> None:
    args = small(script, tmp_path / "run", gamma=0.5)
    script.train(args, StopAfter(2))
    script.train(dataclasses.replace(args, resume=args.run_dir, gamma=0.9), StopAfter(2))
    written = json.loads((tmp_path / "run" / "args.json").read_text())
    assert written["gamma"] == 0.9 and written["resume"] is None


def test_a_run_killed_in_its_evaluation_is_evaluated_when_resumed(tmp_path) -> None:
    args = small(ppo_discrete, tmp_path / "run")
    _, results = ppo_discrete.train(args)
    (tmp_path / "run" / "results.json").unlink()
    _, again = ppo_discrete.train(dataclasses.replace(args, resume=args.run_dir))
    assert (tmp_path / "run" / "results.json").exists()
    assert again | {"wall_seconds": 0} == results | {"wall_seconds": 0}


def test_another_number_of_parameters_is_refused(tmp_path, monkeypatch, capsys) -> None:
    """A learned std is a parameter, a falling one is not; the agent's state_dict is the same."""
    ppo_continuous.train(small(ppo_continuous, tmp_path / "run"), StopAfter(2))
    flags = f"--resume {tmp_path / 'run'} --log-std-fall None"
    status, error = run_main(monkeypatch, capsys, ppo_continuous, flags)
    assert status == 2 and "its network is not that of the flags given" in error


def test_what_is_not_finite_stays_out_of_tensorboard_but_not_of_the_table(tmp_path) -> None:
    writer = SummaryWriter(tmp_path)
    ppo_discrete.log(tmp_path, writer, 7, {"a": 1.0, "b": float("nan"), "c": float("-inf")})
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("a")] == [(7, 1.0)]
    assert events.Tags()["scalars"] == ["a"]
    assert (tmp_path / "metrics.csv").read_text() == "global_step,a,b,c\n7,1.0,nan,-inf\n"


def bad_flags(script) -> list[str]:
    """Make a command line wrong in one place, for every flag in every way that its type allows."""
    bad = {int: ["x", "1.5", "-3", ""], float: ["x", "nan", "inf", "-0.5", "1,5"]}
    lines = []
    for field in dataclasses.fields(script.Args):
        flag, text = f"--{field.name.replace('_', '-')}", str(field.type)
        if "bool" in text:
            lines += [f"{flag} maybe", f"{flag}s"]
        elif "Literal" in text:
            lines += [f"{flag} nonsense", f"{flag} -1"]
        elif "Path" in text and field.name != "run_dir":
            lines += [f"{flag} /nowhere", f"{flag} /dev/null", f"{flag} /etc/passwd"]
        elif "float" in text:
            any_sign = ("log_std_init", "log_std_fall")
            lines += [
                f"{flag} {x}"
                for x in bad[float]
                if not (flag[2:].replace("-", "_") in any_sign and x[0] in "-ni")
            ]
        elif "int" in text:
            lines += [f"{flag} {x}" for x in bad[int]]
    lines += ["--env-id No-v0", "--env-id /etc", "--env-id ''", "--run-dir /dev/null", "nonsense"]
    return [*lines, "--env-kwargs x", "-x", "--num-envs", "--"]


@pytest.mark.filterwarnings("ignore:.*is out of date|.*is deprecated:")
@both
def test_a_hundred_bad_command_lines(script, tmp_path, monkeypatch, capsys) -> None:
    """Each ends with a message, a status that is not 0, no traceback and no folder."""
    monkeypatch.chdir(tmp_path)
    lines = [line for line in bad_flags(script) if line != "--"]
    assert len(lines) > 90
    for line in lines:
        status, error = run_main(monkeypatch, capsys, script, f"--total-timesteps 4096 {line}")
        assert status not in (0, None) and error.strip(), line
        assert "Traceback" not in error and not (tmp_path / "runs").exists(), line
        if "For full helptext" not in error:  # the library that parses the flags draws a box
            assert error.count("\n") == 1, line


def test_a_hundred_damaged_checkpoints(tmp_path, monkeypatch, capsys) -> None:
    """Bytes overwritten or cut off anywhere: refused in one line, or harmless."""
    ppo_discrete.train(small(ppo_discrete, tmp_path / "run"), StopAfter(2))
    data, rng, refused = (tmp_path / "run" / "checkpoint.pt").read_bytes(), random.Random(0), 0
    for _ in range(100):
        broken, place = bytearray(data), rng.randrange(len(data))
        if rng.random() < 0.5:
            broken = broken[:place]
        else:
            broken[place : place + 20] = rng.randbytes(20)
        (tmp_path / "run" / "checkpoint.pt").write_bytes(broken)
        flags = f"--evaluate {tmp_path / 'run'} --eval-episodes 1"
        status, error = run_main(monkeypatch, capsys, ppo_discrete, flags)
        assert (status, error) == (0, "") or (status == 2 and error.count("\n") == 1)
        refused += status == 2
    assert refused > 50


def test_a_longer_run_goes_on_from_a_complete_one(tmp_path, monkeypatch, capsys) -> None:
    ppo_discrete.train(small(ppo_discrete, tmp_path / "run"))
    flags = f"--resume {tmp_path / 'run'} --total-timesteps {15 * 128}"
    assert run_main(monkeypatch, capsys, ppo_discrete, flags)[0] == 0
    assert len(read_metrics(tmp_path / "run")) == 15


@both
def test_a_file_is_the_old_one_until_it_is_the_whole_new_one(script, tmp_path, monkeypatch) -> None:
    """A power cut just before the renaming leaves what was there."""
    script.write(tmp_path / "file.pt", b"old")

    def power_cut(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(script.os, "replace", power_cut)
    with pytest.raises(KeyboardInterrupt):
        script.write(tmp_path / "file.pt", b"new")
    assert (tmp_path / "file.pt").read_bytes() == b"old"


def test_a_full_disk_is_one_clear_line_and_keeps_the_last_checkpoint(
    tmp_path, monkeypatch, capsys
) -> None:
    run_dir = tmp_path / "run"
    ppo_discrete.train(small(ppo_discrete, run_dir), StopAfter(2))
    before = (run_dir / "checkpoint.pt").read_bytes()
    (run_dir / "checkpoint.tmp").symlink_to("/dev/full")
    status, error = run_main(monkeypatch, capsys, ppo_discrete, f"--resume {run_dir}")
    assert status == 2 and "No space left on device" in error.splitlines()[-1]
    assert "Traceback" not in error
    assert (run_dir / "checkpoint.pt").read_bytes() == before


@both
def test_a_run_without_a_checkpoint_may_be_deleted(script, tmp_path) -> None:
    (tmp_path / "args.json").touch()
    with pytest.raises(script.UserError, match="delete it, for it has no checkpoint yet"):
        script.train(small(script, tmp_path))


@both
def test_workers_leave_signals_to_the_main_process(script) -> None:
    assert script.leave_signals("environment") == "environment"
    assert signal.getsignal(signal.SIGINT) != signal.SIG_IGN  # this is the main process
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(script.leave_signals, ("environment",))
        for number in (signal.SIGINT, signal.SIGTERM):
            assert pool.apply(signal.getsignal, (number,)) == signal.SIG_IGN
        pool.close()  # leaving the block would end it by SIGTERM
        pool.join()


def test_an_error_among_workers_is_one_line_too(tmp_path) -> None:
    flags = f"--env-id tests.envs:test/Broken-v0 --num-envs 2 --run-dir {tmp_path / 'run'}"
    command = [sys.executable, "ppo_discrete.py", *flags.split(), "--vectorization-mode", "async"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("ppo_discrete.py: test"), done.stderr
    assert "Traceback" not in done.stderr


def test_a_worker_that_dies_ends_the_run(tmp_path) -> None:
    flags = f"--env-id tests.envs:test/Dies-v0 --num-envs 2 --run-dir {tmp_path / 'run'}"
    command = [sys.executable, "ppo_discrete.py", *flags.split(), "--vectorization-mode", "async"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120
    )
    assert done.returncode == 1
    assert "has a process of the environments died?" in done.stderr
    assert "Traceback" not in done.stderr


# ---- Evaluating and watching -------------------------------------------------------------------


@both
def test_evaluating_ends_at_the_first_signal(script, tmp_path, monkeypatch, capsys) -> None:
    handlers = []
    monkeypatch.setattr(
        script,
        "evaluate_run",
        lambda *_: handlers.extend(map(signal.getsignal, (signal.SIGINT, signal.SIGTERM))),
    )
    script.train(small(script, tmp_path / "run"))
    run_main(monkeypatch, capsys, script, f"--evaluate {tmp_path / 'run'}")
    assert handlers == [signal.SIG_DFL, signal.SIG_DFL]


@both
def test_evaluating_a_folder_gives_the_figures_of_the_training(
    script, tmp_path, monkeypatch, capsys
) -> None:
    script.train(small(script, tmp_path / "run"))
    figures = [x for x in capsys.readouterr().out.splitlines() if "evaluation" in x]
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "argv", [script.__file__, "--evaluate", str(tmp_path / "elsewhere")])
    script.main()
    assert capsys.readouterr().out.splitlines() == figures and len(figures) == 2


@both
def test_a_run_of_another_machine_is_evaluated(script, tmp_path, monkeypatch) -> None:
    """There it was on a GPU, which this one need not have."""
    script.train(small(script, tmp_path / "run"), StopAfter(1))
    path = tmp_path / "run" / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    saved["args"]["device"] = "cuda"
    torch.save(saved, path)
    for flag, device in (("--evaluate", "auto"), ("--resume", "cuda")):
        monkeypatch.setattr(sys, "argv", [script.__file__, flag, str(tmp_path / "run")])
        assert script.parse().device == device


def test_an_episode_without_an_end_is_told_of(capsys) -> None:
    args = ppo_discrete.Args(env_id="CliffWalking-v1", env_kwargs=("max_episode_steps=None",))
    envs = ppo_discrete.make_envs(args, 2)
    agent = ppo_discrete.Agent(args, envs)
    with torch.no_grad():
        agent.actor[-1].bias[0] = 100.0  # always up
    returns, _ = ppo_discrete.evaluate(agent, envs, 1, deterministic=True)
    assert returns.tolist() == [-10_000.0, -10_000.0]
    assert "2 of 2 episodes were cut off" in capsys.readouterr().out


@both
@pytest.mark.filterwarnings("ignore:.*render_mode")
def test_what_cannot_be_filmed_is_known_before_the_training(script, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: True)
    env_id = "test/Identity-v0" if script is ppo_discrete else "test/Target-v0"
    with pytest.raises(script.UserError, match="render_mode"):
        script.train(small(script, tmp_path / "run", capture_video=True, env_id=env_id))
    assert not (tmp_path / "run").exists()


@both
def test_a_video_shows_an_episode_of_the_final_policy(script, tmp_path, capsys) -> None:
    pytest.importorskip("moviepy")
    script.train(small(script, tmp_path / "run", capture_video=True, total_timesteps=128))
    assert [p.stat().st_size > 1000 for p in (tmp_path / "run").glob("*.mp4")] == [True]


@both
def test_a_video_stays_short(script) -> None:
    """An episode of 10,000 pictures of a megabyte would fill the memory."""
    env_id = "CartPole-v1" if script is ppo_discrete else "Pendulum-v1"
    args = script.Args(env_id=env_id, env_kwargs=("max_episode_steps=3000",))
    envs = script.make_envs(args, 1)
    agent = script.Agent(args, envs)
    picture = np.zeros((4, 4, 3), np.uint8)
    envs.unwrapped.render_mode, envs.unwrapped.render = "rgb_array", lambda: [picture]
    if script is ppo_discrete:  # it never falls
        envs.unwrapped.theta_threshold_radians = envs.unwrapped.x_threshold = np.inf
    _, frames = script.evaluate(agent, envs, 0, True, filming=True)
    assert len(frames) == 2_000


# ---- Guard rails -------------------------------------------------------------------------------


def test_what_looks_wrong_for_long_is_said_once(capsys) -> None:
    streaks: dict[str, int] = {}
    fine = {"losses/approx_kl": 0.01, "losses/explained_variance": 0.5, "losses/entropy": 1.0}
    bad = fine | {"losses/approx_kl": 0.2}
    for metrics in [bad] * 9 + [fine] + [bad] * 9:
        ppo_discrete.warn(metrics, streaks)
    assert capsys.readouterr().err == ""
    for metrics in [bad] * 30 + [fine] + [bad] * 30:
        ppo_discrete.warn(metrics, streaks)
    assert capsys.readouterr().err.count("approx_kl > 0.1") == 1
    for metrics in [fine | {"losses/explained_variance": -0.1}] * 10:
        ppo_discrete.warn(metrics, streaks)
    assert capsys.readouterr().err.count("explained_variance < 0") == 1
    for metrics in [fine | {"losses/entropy": 0.0001}] * 10:
        ppo_discrete.warn(metrics, streaks)
    assert capsys.readouterr().err.count("entropy nearly 0") == 1
    streaks, fine = {}, fine | {"charts/action_std": 0.1, "charts/clipped_actions": 0.1}
    for bad in ({"charts/clipped_actions": 0.95}, {"charts/action_std": 0.005}):
        for metrics in [fine | bad] * 10:
            ppo_continuous.warn(metrics, streaks)
    assert capsys.readouterr().err.count("warning: ") == 2


@both
def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(script, tmp_path, monkeypatch) -> None:
    args = small(script, tmp_path / "run", checkpoint_every=1)
    script.train(args, StopAfter(2))
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    original = script.value_loss
    monkeypatch.setattr(script, "value_loss", lambda *x: original(*x) * float("nan"))
    with pytest.raises(script.UserError, match="loss not finite at step"):
        script.train(dataclasses.replace(args, resume=args.run_dir))
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


# ---- Several processes -------------------------------------------------------------------------

CHILD = """
import sys
sys.path.insert(0, {root!r})
import os, torch, tests.envs, {script} as script
from pathlib import Path
agent, _ = script.train(script.Args(**{flags!r}, run_dir=Path({run_dir!r})))
torch.save(agent.state_dict(), {out!r} + os.environ.get("RANK", "0"))
"""


def torchrun(tmp_path: Path, script, processes: int, **flags) -> list[dict[str, torch.Tensor]]:
    """Train with so many processes; return the parameters of each."""
    name = f"{script.__name__}{processes}"
    child, out = tmp_path / f"{name}.py", str(tmp_path / f"{name}_")
    fill = dict(script=script.__name__, flags=flags, run_dir=str(tmp_path / name))
    child.write_text(CHILD.format(root=str(ROOT), out=out, **fill))
    launch = "-m torch.distributed.run --standalone --nproc-per-node".split()
    command = [sys.executable, *launch, str(processes), str(child)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("iterations on") == 1  # one process speaks
    return [torch.load(f"{out}{rank}", weights_only=True) for rank in range(processes)]


@pytest.mark.parametrize(
    ("script", "env"),
    # Poison's episodes end in different rows; in the others the processes see different numbers.
    [(ppo_discrete, "Poison"), (ppo_discrete, "Identity"), (ppo_continuous, "Target")],
)
def test_two_processes_do_what_one_does_with_the_joined_batch(script, env, tmp_path) -> None:
    """One minibatch is the whole batch, so that its rows need not be shuffled in the same order."""
    flags = dict(env_id=f"test/{env}-v0")
    flags |= dict(num_envs=6, num_steps=32, num_minibatches=1, update_epochs=1, eval_episodes=2)
    flags |= dict(norm_adv="minibatch", total_timesteps=192)
    (alone,) = torchrun(tmp_path, script, 1, **flags)
    first, second = torchrun(tmp_path, script, 2, **flags)
    for name in alone:
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(alone[name], first[name], rtol=1e-4, atol=1e-6)
    one, two = (read_metrics(tmp_path / f"{script.__name__}{n}") for n in (1, 2))
    for name in one[0]:
        if name != "charts/SPS":
            assert np.isclose(float(one[0][name]), float(two[0][name]), 1e-3, 1e-5, True), name


def test_two_processes_stay_equal_and_resume(tmp_path) -> None:
    flags = dict(num_envs=4, num_steps=32, update_epochs=2, eval_episodes=2, checkpoint_every=3)
    flags |= dict(norm_adv="minibatch", target_kl=0.025, total_timesteps=6 * 128)
    first, second = torchrun(tmp_path, ppo_discrete, 2, **flags)
    assert all(torch.equal(first[name], second[name]) for name in first)
    saved = torch.load(tmp_path / "ppo_discrete2" / "checkpoint.pt", weights_only=True)
    assert len(saved["processes"]) == 2
    args = ppo_discrete.Args(**flags, resume=tmp_path / "ppo_discrete2")
    with pytest.raises(ppo_discrete.UserError, match="saved by 2 processes, resumed by 1"):
        ppo_discrete.train(args)


def test_processes_with_few_real_rows_are_refused(monkeypatch) -> None:
    """Of 5 rows of an environment 3 may be resets: too few are left for 5 minibatches of 2."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_: None)
    for script in SCRIPTS:
        script.join_processes(script.Args(num_envs=8, num_steps=5, num_minibatches=4))
        with pytest.raises(script.UserError, match="cannot be split over 2 processes"):
            script.join_processes(script.Args(num_envs=8, num_steps=5, num_minibatches=5))


@both
def test_an_error_of_its_own_keeps_its_traceback(script, monkeypatch, capsys) -> None:
    def fail(text: str) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(script, "parse", lambda: fail("simulator licence lost"))
    with pytest.raises(RuntimeError, match="licence"):
        run_main(monkeypatch, capsys, script, "")
    monkeypatch.setattr(script, "parse", lambda: fail("[gloo/pair.cc:5] Connection closed by peer"))
    status, error = run_main(monkeypatch, capsys, script, "")
    assert status == 1 and "another process has ended: [gloo" in error


def test_environments_that_do_not_divide_are_one_clear_line(tmp_path) -> None:
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2 ppo_discrete.py".split()
    command = [sys.executable, *launch, "--num-envs", "5"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode != 0
    said = "ppo_discrete.py: --num-envs 5 x --num-steps 32 cannot be split over 2 processes"
    assert said in done.stderr.splitlines()


def test_when_one_process_is_killed_all_end_and_the_run_can_go_on(tmp_path) -> None:
    run_dir = tmp_path / "run"
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2 ppo_discrete.py".split()
    flags = f"--run-dir {run_dir} --total-timesteps 2000000 --checkpoint-every 2".split()
    command = [sys.executable, *launch, *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as group:
        while not (run_dir / "checkpoint.pt").exists():
            assert group.poll() is None
            time.sleep(0.1)
        children = Path(f"/proc/{group.pid}/task/{group.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        _, error = group.communicate(timeout=60)
    assert group.returncode != 0 and "another process has ended" in error
    assert len(torch.load(run_dir / "checkpoint.pt", weights_only=True)["processes"]) == 2


# ---- Compiling ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.parametrize(
    ("script", "backend"),
    [(ppo_discrete, "inductor"), (ppo_discrete, "aot_eager"), (ppo_continuous, "aot_eager")],
)
def test_the_compiled_gradient_is_the_eager_one(script, backend, tmp_path, monkeypatch) -> None:
    """aot_eager captures the same graph and runs it uncompiled, which is quick."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    args = small(script, tmp_path / "run")
    torch.manual_seed(0)
    agent = script.Agent(args, script.make_envs(args, 2))
    vector = script.flatten_parameters(agent)
    compiled = script.compile_loss(agent, args, vector)
    for rows in (32, 31):
        obs = torch.randn(rows, len(agent.obs_moments.mean))
        inputs = [obs, torch.randn(rows, 1)]
        if script is ppo_discrete:
            inputs = [obs, torch.randint(2, (rows, 1)), torch.zeros(rows, 1, 2)]
        batch = [*inputs, *torch.randn(4, rows)]
        vector.grad.zero_()
        loss, *expected = script.ppo_loss(agent, args, batch, 1.0)
        loss.backward()
        gradient = vector.grad.clone()
        vector.grad.zero_()
        torch.testing.assert_close(compiled(batch, 1.0), expected)
        torch.testing.assert_close(vector.grad, gradient)


@pytest.mark.filterwarnings("default")
def test_a_compiled_run_samples_afresh_and_learns_the_same(tmp_path, monkeypatch) -> None:
    """A captured graph may freeze its random numbers; ours are drawn outside of it."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    saved = []
    for name, flag in (("eager", False), ("compiled", True)):
        args = small(ppo_discrete, tmp_path / name, compile=flag, total_timesteps=3 * 128)
        ppo_discrete.train(args)
        saved.append(torch.load(tmp_path / name / "checkpoint.pt", weights_only=True))
    eager, compiled = (x["processes"][0]["played"] for x in saved)  # (3, T, N, 1)
    assert torch.equal(eager, compiled)
    rows = compiled.flatten(0, 1).flatten(1).tolist()
    assert len({tuple(row) for row in rows}) > 8  # of 16 possible
    for parameter, other in zip(*(x["agent"].values() for x in saved)):
        torch.testing.assert_close(parameter, other, rtol=1e-4, atol=1e-5)
