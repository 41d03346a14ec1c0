"""The command line: wrong input gives one clear line and status 2, README's command runs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ppo_discrete

ROOT = Path(__file__).parent.parent

WRONG = {  # flags -> what the message must say
    "--gamma 1.5": "--gamma 1.5 must lie in [0, 1]",
    "--gamma nan": "--gamma nan must lie",
    "--gae-lambda -0.1": "--gae-lambda -0.1 must lie",
    "--num-envs 0": "--num-envs 0 must be at least 1",
    "--num-steps -5": "--num-steps -5 must be at least 2",
    "--num-steps 1": "--num-steps 1 must be at least 2",
    "--update-epochs 0": "--update-epochs 0",
    "--eval-episodes 0": "--eval-episodes 0",
    "--hidden-size 0": "--hidden-size 0",
    "--seed -1": "--seed -1 must not be negative",
    "--learning-rate 0": "--learning-rate 0.0 must be > 0",
    "--learning-rate inf": "--learning-rate inf",
    "--clip-coef -0.2": "--clip-coef -0.2",
    "--target-kl 0": "--target-kl 0.0",
    "--desired-kl 0.03 --target-kl 0.01": "--target-kl 0.01 needs --desired-kl None",
    "--desired-kl 0.03 --objective penalty": "--objective penalty needs --desired-kl None",
    "--ent-coef -1": "--ent-coef -1",
    "--total-timesteps 1000": "--total-timesteps 1000 is below one batch, --num-envs 32",
    "--num-envs 1 --num-steps 8 --num-minibatches 8": "8 rows are too few for --num-minibatches 8",
    "--num-envs 1 --num-steps 2 --num-minibatches 1": "2 rows are too few",
    "--device cuda": "--device cuda: PyTorch finds no CUDA device",
    "--env-id CartPol-v1": "Did you mean: `CartPole`",
    "--env-id CartPole-v9": "version `v9`",
    "--env-id nothing:Nothing-v5": "No module named 'nothing'",
    "--env-id Taxi-v3": "use `Taxi-v4`",
    "--env-id Pendulum-v1": "use ppo_continuous.py",
    "--env-id test/TwoActions-v0": "not Discrete",
    "--env-id test/Endless-v0": "of no fixed size",
    "--env-id test/Film-v0": "a stack in colour, not grey",
    "--env-id test/SameStep-v0": "NEXT_STEP",
    "--env-id CartPole-v1 --env-kwargs nonsense=1": "nonsense",
    "--env-id Acrobot-v1 --vectorization-mode vector_entry_point": "vector entry point",
    "--run-dir pyproject.toml": "--run-dir pyproject.toml",
    "--run-dir /proc/run": "--run-dir /proc/run",
}
PARSER = {  # what the library that parses the flags finds, in a box of its own
    "--gama 0.9": "Unrecognized options: --gama",
    "--gamma high": "could not convert string to float",
    "--norm-adv sometimes": "invalid choice 'sometimes'",
    "--num-envs 2.5": "invalid literal",
    "nonsense": "Unrecognized options: nonsense",
}


def run_main(monkeypatch, flags: str) -> int:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["ppo_discrete.py", *flags.split()])
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with pytest.raises(SystemExit) as stopped:
            ppo_discrete.main()
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)
    return stopped.value.code


@pytest.mark.filterwarnings("ignore:.*is out of date|.*is deprecated:")
@pytest.mark.parametrize("flags", WRONG)
def test_wrong_input_is_one_clear_line(monkeypatch, capsys, tmp_path, flags: str) -> None:
    if flags == "--device cuda" and ppo_discrete.torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    run_dir = "" if "--run-dir" in flags else f" --run-dir {tmp_path}/run"
    assert run_main(monkeypatch, flags + run_dir) == 2
    output, error = capsys.readouterr()
    assert error.count("\n") == 1 and error.startswith("ppo_discrete.py: ")
    assert WRONG[flags] in error and output == ""
    assert not (tmp_path / "run").exists()  # nothing half-written


def test_atari_that_is_not_installed_is_named(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "ale_py", None)  # importing it raises ImportError
    assert run_main(monkeypatch, "--env-id ALE/Pong-v5") == 2
    error = capsys.readouterr().err
    assert 'pip install "gymnasium[atari]"' in error and error.count("\n") == 1


@pytest.mark.parametrize("flags", PARSER)
def test_flags_that_cannot_be_parsed(monkeypatch, capsys, flags: str) -> None:
    assert run_main(monkeypatch, flags) == 2
    output, error = capsys.readouterr()
    assert PARSER[flags] in " ".join(error.split()) and "Traceback" not in error + output


def test_help_explains_every_flag(monkeypatch, capsys) -> None:
    assert run_main(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    for name in vars(ppo_discrete.Args()):
        assert f"--{name.replace('_', '-')}" in text
    assert "the gradient's global norm is clipped to this" in " ".join(text.split())


def start(command: str, **kwargs) -> subprocess.Popen:
    words = [sys.executable, *command.split()[1:]]
    return subprocess.Popen(words, cwd=ROOT, text=True, stdout=-1, stderr=-1, **kwargs)


def test_the_command_of_the_readme_runs(tmp_path) -> None:
    commands = re.findall(r"python ppo_discrete\.py[^\n&`]*", (ROOT / "README.md").read_text())
    assert "python ppo_discrete.py --env-id CartPole-v1" in [c.strip() for c in commands]
    process = start(
        "python ppo_discrete.py --env-id CartPole-v1 --total-timesteps 3072 --eval-episodes 5 "
        f"--run-dir {tmp_path}/run"
    )
    output, error = process.communicate(timeout=100)
    assert process.returncode == 0 and error == ""
    assert re.search(r"^deterministic evaluation: \d+\.\d ± \d+\.\d$", output, re.MULTILINE)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["eval_episodes"] == 5


def test_a_run_names_its_own_folder(tmp_path) -> None:
    script = ROOT / "ppo_discrete.py"
    flags = ["--total-timesteps", "1024", "--eval-episodes", "2"]
    subprocess.run([sys.executable, script, *flags], cwd=tmp_path, check=True)
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"CartPole-v1__ppo_discrete__1__\d+", folder.name)
    names = {path.name.split(".")[0] for path in folder.iterdir()}
    assert names == {"args", "metrics", "results", "events", "checkpoint"}


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_ctrl_c_ends_the_run_in_order(tmp_path) -> None:
    process = start(f"python ppo_discrete.py --total-timesteps 100000000 --run-dir {tmp_path}/run")
    metrics = tmp_path / "run" / "metrics.csv"
    for _ in range(600):
        time.sleep(0.1)
        if metrics.exists():
            break
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error
    assert "stopped after" in output and "stochastic evaluation" in output
    last = metrics.read_text().splitlines()[-1].split(",")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert int(last[0]) == results["global_step"]


def test_the_scripts_name_their_dependencies() -> None:
    """The PEP 723 header and pyproject.toml agree, so `uv run` and `pip install` do too."""

    def packages(pattern: str, file: str) -> set[str]:
        found = re.search(pattern, (ROOT / file).read_text(), re.MULTILINE | re.DOTALL)
        return {re.split(r"[<>=]", word)[0] for word in re.findall(r'"(.*?)"', found[1])}

    project = packages(r"^dependencies = \[(.*?)\]", "pyproject.toml")
    assert project == {"torch", "gymnasium", "numpy", "tensorboard", "tyro", "tqdm"}
    assert project == packages(r"^# dependencies = \[(.*?)\]", "ppo_discrete.py")
