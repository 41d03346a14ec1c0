"""The command line: wrong input is one clear line and status 2; nothing printed can lose a run."""

import csv
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import experiment
import ppo_atari
import ppo_continuous
import ppo_discrete
import ppo_lstm
from tests.helpers import ROOT, StopAfter, quick_args, read_metrics, run_main

SCRIPTS = [ppo_discrete, ppo_continuous, ppo_atari, ppo_lstm]
QUICK = "--total-timesteps 1024 --eval-episodes 2"

WRONG = {  # flags -> what the message must say
    "--gamma 1.5": "--gamma 1.5 must lie between 0 and 1",
    "--gamma nan": "--gamma nan must lie",
    "--gae-lambda -0.1": "--gae-lambda -0.1 must lie",
    "--num-envs 0": "--num-envs 0 must lie between 1",
    "--num-steps -5": "--num-steps -5 must lie between 1",
    "--update-epochs 0": "--update-epochs 0",
    "--eval-episodes 0": "--eval-episodes 0",
    "--hidden-size 0": "--hidden-size 0",
    "--seed -1": "--seed -1 must lie between 0",
    "--seed 9223372036854775808": "--seed 9223372036854775808 must lie",
    "--learning-rate 0": "--learning-rate 0.0 must lie",
    "--learning-rate inf": "--learning-rate inf",
    "--clip-coef -0.2": "--clip-coef -0.2",
    "--clip-coef 1e98": "--clip-coef 1e+98",
    "--target-kl 0": "--target-kl 0.0",
    "--ent-coef -1": "--ent-coef -1",
    "--ent-coef inf": "--ent-coef inf",
    "--vf-coef nan": "--vf-coef nan",
    "--max-grad-norm 0": "--max-grad-norm 0.0",
    "--num-threads 0": "--num-threads 0",
    "--num-threads 100000": "--num-threads 100000",
    "--checkpoint-every 0": "--checkpoint-every 0",
    "--total-timesteps 1000": "--total-timesteps 1000 is below one batch, --num-envs 32",
    "--num-envs 1 --num-steps 8 --num-minibatches 8": "too few for --num-minibatches 8",
    "--num-envs 1 --num-steps 2 --num-minibatches 1": "too few for --num-minibatches 1",
    "--num-steps 1": "too few for --num-minibatches",
    "--device cuda": "--device cuda",
    "--device nonsense": "--device nonsense",
    "--device meta": "--device meta",
    "--device privateuseone": "--device privateuseone",
    "--env-id CartPol-v1": "Did you mean: `CartPole`",
    "--env-id nothing:Nothing-v5": "No module named 'nothing'",
    "--env-id ..nothing:Nothing-v5": "relative import",
    "--env-id Pendulum-v1": "ppo_continuous.py",
    "--env-id test/SameStep-v0": "NEXT_STEP",
    "--env-id CartPole-v1 --env-kwargs nonsense=1": "nonsense",
    "--run-dir pyproject.toml": "pyproject.toml",
    "--run-dir /proc/run": "/proc/run",
    "--run-dir=": "--run-dir",
    "--hidden-size 1000000": "not enough memory",
    "--evaluate /nowhere": "/nowhere",
    "--resume /nowhere": "/nowhere",
    "--resume /etc/passwd": "/etc/passwd",
}
PARSER = {  # what the library that parses the flags finds, in a box of its own
    "--gama 0.9": "--gama",
    "--gamma high": "high",
    "--norm-adv sometimes": "sometimes",
    "--num-envs 2.5": "2.5",
    "--norm-obs maybe": "maybe",
    "nonsense": "nonsense",
}


@pytest.mark.parametrize("flags", WRONG)
def test_a_wrong_flag_is_one_clear_line_and_leaves_no_folder(
    monkeypatch, capsys, tmp_path, flags: str
) -> None:
    if flags == "--device cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path)
    status, output, error = run_main(ppo_discrete, flags, monkeypatch, capsys)
    assert status == 2 and output == ""
    assert error.count("\n") == 1 and error.startswith("ppo_discrete.py: ")
    assert WRONG[flags] in error
    assert [path.name for path in tmp_path.iterdir()] == ["pyproject.toml"]


@pytest.mark.parametrize("flags", PARSER)
def test_a_flag_that_cannot_be_parsed_is_named(monkeypatch, capsys, flags: str) -> None:
    status, output, error = run_main(ppo_discrete, flags, monkeypatch, capsys)
    assert status == 2 and PARSER[flags] in error and "Traceback" not in error + output


def bad_flags(cls: type) -> list[str]:
    """Make a command line wrong in one place, for every flag in every way that its type allows."""
    lines = []
    for field in dataclasses.fields(cls):
        flag, kind = f"--{field.name.replace('_', '-')}", str(field.type)
        if "bool" in kind:
            lines += [f"{flag} maybe", f"{flag}s"]
        elif "Literal" in kind:
            lines += [f"{flag} nonsense", f"{flag} -1"]
        elif "Path" in kind and field.name != "run_dir":
            lines += [f"{flag} /nowhere", f"{flag} /dev/null", f"{flag} /etc/passwd"]
        elif "float" in kind:
            lines += [f"{flag} {x}" for x in ("x", "nan", "inf", "1e98", "1,5", "")]
            if not field.name.startswith("log_std"):
                lines += [f"{flag} -0.5"]
        elif "int" in kind:
            lines += [f"{flag} {x}" for x in ("x", "1.5", "-3", "")]
    return [
        *lines,
        "--env-id No-v0",
        "--env-id /etc",
        "--env-id=",
        "--env-id a:b:c",
        "nonsense",
        "-x",
    ]


@pytest.mark.filterwarnings("ignore:.*is out of date|.*is deprecated:")
@pytest.mark.parametrize("script", [ppo_discrete, ppo_continuous])
def test_a_hundred_bad_command_lines_have_no_traceback_and_no_folder(
    script, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = bad_flags(script.Args)
    if script is ppo_continuous:  # the others are those of ppo_discrete
        own = {f"--{x.replace('_', '-')}" for x in vars(script.Args())} - {
            f"--{x.replace('_', '-')}" for x in vars(ppo_discrete.Args())
        }
        lines = [line for line in lines if line.split()[0].rstrip("s") in own]
    assert len(lines) > (15 if script is ppo_continuous else 100)
    for line in lines:
        flags = f"--total-timesteps 4096 {line}"
        status, output, error = run_main(script, flags, monkeypatch, capsys)
        assert status == 2 and error.strip() and output == "", line
        assert "Traceback" not in error and not list(tmp_path.iterdir()), line
        if "For full helptext" not in error:  # the library that parses the flags draws a box
            assert error.count("\n") == 1, line


@pytest.mark.parametrize("flags", ["--evaluate one --resume other", "--resume one --run-dir other"])
def test_two_folders_are_one_clear_line_and_not_touched(
    tmp_path, monkeypatch, capsys, flags: str
) -> None:
    """The weights of one run with the arguments of the other would be nonsense."""
    monkeypatch.chdir(tmp_path)
    for name in ("one", "other"):
        ppo_discrete.train(quick_args(ppo_discrete, Path(name)), on_iteration=StopAfter(1))
    before = {path: path.read_bytes() for path in tmp_path.glob("*/*")}
    status, output, error = run_main(ppo_discrete, flags, monkeypatch, capsys)
    assert status == 2 and error.count("\n") == 1 and output == ""
    assert "--resume" in error and "name one folder" in error
    assert {path: path.read_bytes() for path in tmp_path.glob("*/*")} == before


# ---- Help --------------------------------------------------------------------------------------


def help_of(script, monkeypatch, capsys) -> dict[str, dict[str, str]]:
    """Return what `--help` says of each flag, in its groups."""
    monkeypatch.setenv("COLUMNS", "300")
    status, text, _ = run_main(script, "--help", monkeypatch, capsys)
    assert status == 0
    groups: dict[str, dict[str, str]] = {}
    for line in re.sub("[╭╮╰╯│─]", " ", text).splitlines():
        if line.strip().endswith("options"):
            group = groups.setdefault(line.strip(), {})
        elif flag := re.match(r" *--([a-z][\w-]*)(.*)", line):
            name = flag[1]
            group[name] = re.split(r"  +", flag[2].strip(), maxsplit=1)[-1]
        elif line.startswith(" " * 15) and line.strip():
            group[name] = f"{group[name]} {line.strip()}"
    return groups


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_every_flag_in_one_of_two_groups(script, monkeypatch, capsys) -> None:
    groups = help_of(script, monkeypatch, capsys)
    first, second = (groups[name] for name in groups if name != "options")
    own = {field.replace("_", "-") for field in vars(script.Args)["__annotations__"]}
    every = {field.name.replace("_", "-") for field in dataclasses.fields(script.Args)}
    assert first.keys() == own and second.keys() == every - own
    assert list(first)[:2] == ["env-id", "total-timesteps"]
    assert {"seed", "run-dir", "device", "resume", "evaluate"} <= second.keys()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_each_flag_in_whole_sentences_with_its_default(
    script, monkeypatch, capsys
) -> None:
    for group in help_of(script, monkeypatch, capsys).values():
        for name, text in group.items():
            if (field := name.replace("-", "_")) not in vars(script.Args()):
                continue
            sentence = re.sub(r" ?\(default: .*?\)$", "", text)
            sentence = re.sub(r"^(, --no-\S+|\{.*?\}(\|\w+)?|\[.*\]|[A-Z]+) ", "", sentence)
            assert len(sentence.split()) > 1 and re.match(r"[A-Z]", sentence), text
            assert sentence.endswith("."), text
            default = getattr(script.Args(), field)
            assert f"(default: {default or ''})" in text or default in (None, 0, 0.0, False), text


# ---- Evaluating --------------------------------------------------------------------------------


def evaluations(text: str) -> list[str]:
    return [line for line in text.splitlines() if "evaluation" in line]


@pytest.mark.parametrize("script", SCRIPTS)
def test_evaluate_gives_the_figures_of_the_training_and_writes_nothing(
    script, tmp_path, monkeypatch, capsys
) -> None:
    script.train(quick_args(script, tmp_path / "run"))
    figures = evaluations(capsys.readouterr().out)
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    before = {path: path.read_bytes() for path in (tmp_path / "elsewhere").iterdir()}
    monkeypatch.chdir(tmp_path)
    flags = f"--evaluate {tmp_path / 'elsewhere'}"
    status, output, error = run_main(script, flags, monkeypatch, capsys)
    assert status == 0 and error == ""
    assert evaluations(output) == figures and len(figures) == 2
    assert {path: path.read_bytes() for path in (tmp_path / "elsewhere").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_evaluate_takes_the_number_of_episodes_typed(run_dir, monkeypatch, capsys) -> None:
    ppo_discrete.train(quick_args(ppo_discrete, run_dir), on_iteration=StopAfter(1))
    calls = []
    evaluate = experiment.evaluate
    monkeypatch.setattr(
        experiment, "evaluate", lambda *x, **y: calls.append(x[2]) or evaluate(*x, **y)
    )
    flags = f"--evaluate {run_dir} --eval-episodes 7"
    assert run_main(ppo_discrete, flags, monkeypatch, capsys)[0] == 0 and calls == [7, 7]


def test_evaluate_of_a_run_of_another_machine_chooses_the_device_anew(run_dir, monkeypatch) -> None:
    """There it was on a GPU, which this one need not have."""
    ppo_discrete.train(quick_args(ppo_discrete, run_dir), on_iteration=StopAfter(1))
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    saved["args"]["device"] = "cuda"
    torch.save(saved, run_dir / "checkpoint.pt")
    for words, device in (
        ([f"--evaluate={run_dir}"], "auto"),
        ([f"--resume={run_dir}"], "cuda"),
        ([f"--evaluate={run_dir}", "--device=cpu"], "cpu"),
    ):
        monkeypatch.setattr(sys, "argv", ["ppo_discrete.py", *words])
        assert experiment.parse(ppo_discrete.Args).device == device


def test_resume_from_the_command_line_keeps_the_flags_it_had(run_dir, monkeypatch, capsys) -> None:
    args = quick_args(ppo_discrete, run_dir, gamma=0.5, anneal_lr=False)
    ppo_discrete.train(args, on_iteration=StopAfter(2))
    flags = f"--resume {run_dir} --ent-coef 0.5"
    assert run_main(ppo_discrete, flags, monkeypatch, capsys)[0] == 0
    written = json.loads((run_dir / "args.json").read_text())
    assert written["gamma"] == 0.5 and written["anneal_lr"] is False
    assert written["ent_coef"] == 0.5 and len(read_metrics(run_dir)) == 10


# ---- Terminals ---------------------------------------------------------------------------------


def test_a_run_names_a_folder_of_its_own_without_forbidden_letters(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = f"--env-id tests.envs:test/Identity-v0 --seed 3 {QUICK}"
    assert run_main(ppo_discrete, flags, monkeypatch, capsys)[0] == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"[\w.-]*Identity-v0__test_command_line|[\w.-]+__3__\d+", folder.name)
    assert "ppo_discrete__3__" in folder.name and not set(folder.name) & set('<>:"/\\|?*')


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of /dev/null
def test_a_terminal_of_ascii_loses_no_result(run_dir, monkeypatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    _, results = ppo_discrete.train(quick_args(ppo_discrete, run_dir))
    assert json.loads((run_dir / "results.json").read_text()) == results


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of /dev/null
def test_a_terminal_that_has_gone_loses_no_result(run_dir, monkeypatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    monkeypatch.setattr(sys, "stderr", Gone())
    ppo_discrete.train(quick_args(ppo_discrete, run_dir))
    assert len(read_metrics(run_dir)) == 10 and (run_dir / "results.json").exists()


@pytest.mark.parametrize("redirection", ["| head -1", ">&- 2>&-"])
def test_a_run_whose_output_is_cut_off_ends_as_any_other(tmp_path, redirection: str) -> None:
    script = f"{sys.executable} {ROOT / 'ppo_discrete.py'} {QUICK} --run-dir run"
    command = f"({script} {redirection.replace('|', '')}; echo $? > status)"
    if "|" in redirection:
        command = f"({script}; echo $? > status) {redirection}"
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert (tmp_path / "status").read_text() == "0\n" and done.stderr == ""
    assert len(read_metrics(tmp_path / "run")) == 1 and (tmp_path / "run/results.json").exists()


# ---- Processes of their own --------------------------------------------------------------------

MODULE = """
import gymnasium as gym
class Mine(gym.Env):
    action_space, observation_space = gym.spaces.Discrete(2), gym.spaces.Discrete(2)
    def reset(self, *, seed=None, options=None):
        return 0, {}
    def step(self, action):
        return 0, 1.0, True, False, {}
gym.register("Mine-v0", Mine)
"""


def test_a_script_with_gae_and_experiment_runs_alone_from_a_folder_with_ones_own_module(
    tmp_path,
) -> None:
    scripts, work = tmp_path / "scripts", tmp_path / "work"
    scripts.mkdir()
    work.mkdir()
    for name in ("ppo_discrete.py", "gae.py", "experiment.py"):
        shutil.copy(ROOT / name, scripts)
    (work / "mine.py").write_text(MODULE)
    words = [sys.executable, str(scripts / "ppo_discrete.py"), "--env-id", "mine:Mine-v0"]
    done = subprocess.run(
        [*words, *QUICK.split()], cwd=work, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (work / "runs").iterdir()
    assert re.fullmatch(r"mine-Mine-v0__ppo_discrete__1__\d+", folder.name)


def test_the_command_of_the_readme_runs(tmp_path) -> None:
    commands = re.findall(r"python ppo_discrete\.py[^\n&`#]*", (ROOT / "README.md").read_text())
    command = "python ppo_discrete.py --env-id CartPole-v1"
    assert command in [c.strip() for c in commands]
    words = [sys.executable, *command.split()[1:], "--total-timesteps", "3072"]
    words += ["--eval-episodes", "5", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stderr == ""
    assert re.search(r"^deterministic evaluation: \d+\.\d ± \d+\.\d$", done.stdout, re.MULTILINE)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["eval_episodes"] == 5


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_every_command_of_the_readme_has_flags_that_exist(name: str, monkeypatch, capsys) -> None:
    scripts = {f"{script.__name__}.py": script for script in SCRIPTS}
    commands = re.findall(r"python (ppo_\w+\.py)([^\n&`#|]*)", (ROOT / name).read_text())
    known = [(scripts[script], flags) for script, flags in commands if script in scripts]
    assert len(known) >= 3
    for script, flags in known:
        words = flags.replace("...", "").replace("…", "").split()
        flags_typed = {word.split("=")[0] for word in words if word.startswith("--")}
        fields = {f"--{x.replace('_', '-')}" for x in vars(script.Args())}
        fields |= {f"--no-{x[2:]}" for x in fields} | {"--help"}
        assert flags_typed <= fields, flags


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_ctrl_c_reaches_the_workers_too_and_ends_the_run_cleanly(tmp_path) -> None:
    """A terminal sends it to the whole group of processes."""
    words = [sys.executable, "ppo_discrete.py", "--total-timesteps", "100000000", "--num-envs", "4"]
    words += ["--vectorization-mode", "async", "--run-dir", str(tmp_path / "run")]
    metrics = tmp_path / "run" / "metrics.csv"
    with subprocess.Popen(
        [*words, "--eval-episodes", "2"],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        while not (metrics.exists() and metrics.read_text().count("\n") > 2):
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        output, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error
    assert "stopped after" in output and "stochastic evaluation" in output
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    with open(metrics) as file:
        *_, last = csv.DictReader(file)
    assert int(last["global_step"]) == results["global_step"]
    assert results["eval_cut_off"] == 0 and results["stopped"] == "SIGINT"
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nothing is left of the group


THREADS = """
import sys
sys.path.insert(0, {root!r})
import numpy as np, experiment, ppo_discrete
from pathlib import Path
def ticks():  # of the processor, for each thread
    tasks = Path("/proc/self/task").glob("*/stat")
    return sorted(int(path.read_text().rpartition(")")[2].split()[11]) for path in tasks)
for number in (1, 2):
    experiment.start(ppo_discrete.Args(num_threads=number))
    before = ticks()
    for _ in range(12):
        np.ones((1200, 1200), np.float32) @ np.ones((1200, 1200), np.float32)
    after = ticks()
    print(sum(after) - sum(before), sum(after[:-1]) - sum(before[:-1]))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.skipif(os.cpu_count() == 1, reason="needs two cores")
def test_num_threads_1_keeps_numpy_to_one_thread_and_2_to_two() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    command = [sys.executable, "-c", THREADS.format(root=str(ROOT))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    (total, others), (total_of_two, others_of_two) = (
        map(int, line.split()) for line in done.stdout.splitlines()
    )
    assert total > 5 and others / total < 0.05  # hundredths of a second
    assert others_of_two / total_of_two > 0.15


def packages(pattern: str, text: str) -> dict[str, str]:
    found = re.search(pattern, text, re.MULTILINE | re.DOTALL)
    words = re.findall(r'"(.*?)"', found[1])
    return {re.split(r"[<>=]", word)[0]: word for word in words}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_header_of_a_script_names_the_dependencies_of_the_project(script) -> None:
    """So `uv run` and `pip install` agree."""
    project = packages(r"^dependencies = \[(.*?)\]", (ROOT / "pyproject.toml").read_text())
    header = packages(r"^# dependencies = \[(.*?)\]", Path(script.__file__).read_text())
    assert header.keys() == project.keys()
    assert project.keys() == {"torch", "gymnasium", "numpy", "tensorboard", "tyro", "tqdm"}
    for name, word in header.items():
        assert word in (name, project[name])


def test_the_project_installs_every_script_and_what_they_import() -> None:
    modules = packages(r"^py-modules = \[(.*?)\]", (ROOT / "pyproject.toml").read_text())
    assert modules.keys() == {path.stem for path in ROOT.glob("*.py")}
