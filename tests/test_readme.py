"""What README and the pages say is so: tables, sizes, commands and claims."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tyro

import ppo_atari
import ppo_continuous
import ppo_discrete
import ppo_rlhf_toy
from benchmarks import tables
from benchmarks.jobs import RESULTS as COMMITTED
from benchmarks.jobs import read
from benchmarks.published import MUJOCO

ROOT = Path(__file__).parent.parent
README = sorted(ROOT.glob("README*.md"))
RESULTS = sorted(ROOT.glob("docs/*/results.md"))
PAGES = [*README, ROOT / "benchmarks" / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
SCRIPTS = {f"{m.__name__}.py": m for m in (ppo_discrete, ppo_continuous, ppo_atari, ppo_rlhf_toy)}
# What README's first command does not install, though it may be here.
EXTRAS = "ale_py Box2D cv2 matplotlib moviepy mujoco pygame pytest scipy stable_baselines3".split()


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands(page: Path) -> list[str]:
    """Return the lines of a page's sh blocks."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return "".join(blocks).splitlines()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_tables_are_what_the_reporter_prints(page: Path) -> None:
    text = page.read_text()
    assert tables.fill(text) == text, f"run: python -m benchmarks.tables --pages {page}"
    comments = re.findall(r"^<!-- python .*?-->", text, re.MULTILINE)
    assert len(comments) == len(tables.MARKED.findall(text)), "a comment without its end"


@pytest.mark.parametrize("page", README, ids=name_of)
def test_readme_fits_three_screens_and_two_tables(page: Path) -> None:
    text = page.read_text()
    assert len(text.splitlines()) <= 160
    assert [words.split()[1] for _, words, _ in tables.MARKED.findall(text)] == [
        "classic.csv",
        "speed.csv",
    ]
    assert text.index("| CleanRL") < len(text) / 2


@pytest.mark.parametrize("page", RESULTS, ids=name_of)
def test_results_show_every_table_of_returns_and_speed(page: Path) -> None:
    assert len(tables.MARKED.findall(page.read_text())) == 10


@pytest.mark.parametrize("page", README, ids=name_of)
def test_readme_names_the_lines_that_are_all_of_ppo(page: Path) -> None:
    """From the first loss to the end of `train`."""
    select = runpy.run_path(str(ROOT / "docs" / "lines.py"))["select"]
    first, last = (select("ppo_discrete.py", name) for name in ("clipped_surrogate", "train"))
    said = re.search(r"\*\*\D*(\d+) (?:to|至) (\d+)", page.read_text())
    assert said.groups() == (str(first[0]), str(last[1]))


@pytest.mark.parametrize("page", [*README, *RESULTS], ids=name_of)
def test_flags_of_every_command_parse(page: Path) -> None:
    found = re.findall(r"python (ppo_\w+\.py)([^\n&`|]*)", page.read_text())
    parsed = [(script, flags) for script, flags in found if script in SCRIPTS]
    assert len(parsed) >= 4
    for script, flags in parsed:
        if "--help" not in flags:
            tyro.cli(SCRIPTS[script].Args, args=shlex.split(flags))


# Runs scripts as `python script.py` would, and then lines of Python, in one process.
DRIVER = """
import json, runpy, sys
sys.modules.update(dict.fromkeys({extras}))
for script, *flags in json.loads(sys.argv[1]):
    sys.argv = [script, *flags]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:  # --help ends so, with 0
        if stop.code:
            raise
    print("{end}")
import tensorboard.main
"""


def test_commands_of_readme_run_with_what_its_first_command_installs(tmp_path: Path) -> None:
    """Shortened, in README's order and in one folder, then the lines of Python."""
    small = "--num-envs 4 --num-steps 16 --num-minibatches 4 --total-timesteps 64 --eval-episodes 1"
    tiny = "--task arithmetic --d-model 16 --num-layers 1 --num-heads 2 --sft-steps 2"
    tiny += " --sft-batch-size 8 --num-iterations 1 --batch-size 8 --eval-prompts 8"
    runs, others, end = [], [], "end of a command"
    for line in commands(ROOT / "README.md"):
        program, *words = shlex.split(line.rpartition("&& .venv/bin/")[2])
        if program == "python" and words[0] in SCRIPTS:
            script, *flags = words
            if "--help" not in flags:
                flags += (tiny if "rlhf" in script else small).split()
            if "--resume" in flags:  # there must be something left to do
                flags += ["--total-timesteps", "128"]
            runs.append([str(ROOT / script), *flags])
        else:
            others.append(program if program != "python" else words[1])
    assert len(runs) == 8 and others == ["source", "tensorboard", "pytest"]

    text = (ROOT / "README.md").read_text()
    (python,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    program = DRIVER.format(extras=EXTRAS, end=end) + f"{python}print(*actions)"
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(runs)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *printed, actions = done.stdout.split(f"{end}\n")
    assert len(printed) == 8 and actions.strip() in ("0", "1")
    folders = [path.parent.name for path in tmp_path.glob("runs/*/results.json")]
    assert len(folders) == 5 and "mine" in folders
    # What the first one prints, numbers and progress aside.
    shown = re.search(r"^```\n(CartPole.*?)^```$", text, re.MULTILINE | re.DOTALL)[1]
    shown, first = (
        [re.sub(r"\d+", "0", line) for line in output.splitlines() if " steps/s" not in line]
        for output in (shown, printed[0].replace(" 1 iteration ", " 1 iterations "))
    )
    assert len(shown) == 3 and first == shown


# ---- Claims ------------------------------------------------------------------------------------


def numbers_before(unit: str, page: Path) -> set[str]:
    return set(re.findall(rf"(\d+\.\d) {unit}", page.read_text()))


def test_pages_say_the_measured_seconds_and_ratios() -> None:
    rows = read(COMMITTED / "runs.csv")
    rows = [r for r in rows if (r["env_id"], r["config"]) == ("CartPole-v1", "default")]
    seconds = np.median([float(row["process_seconds"]) for row in rows])
    table = tables.markdown(tables.Args(table="speed.csv", part="cart-pole"))
    (ratio,) = re.findall(r"^\| CleanRL .* ([\d.]+)x \|", table, re.MULTILINE)
    solved = tables.markdown(tables.Args(table="speed.csv", part="solve"))
    times = re.findall(r"^\| ([^|]*) \| [^|]* \| 10 of 10 \| ([\d.]+) \|", solved, re.MULTILINE)
    theirs = [float(x) for name, x in times if not name.startswith("ppo_")]
    ours = float(dict(times)["ppo_discrete.py"])
    assert ours < min(theirs)
    for page in README:
        assert numbers_before("(?:times|倍)", page) == {f"{float(ratio):.1f}"}
    for page in RESULTS:
        assert {f"{seconds:.1f}", f"{ours:.1f}", f"{max(theirs):.1f}"} == numbers_before(
            "(?:seconds|秒)", page
        )
        text = page.read_text()
        assert re.search(rf"{min(theirs):.1f} (?:to|到) {max(theirs):.1f} ", text)


def test_the_default_matches_or_beats_the_published_figure_on_nine_of_ten_tasks() -> None:
    scores: dict[str, list[float]] = {}
    for row in read(COMMITTED / "continuous.csv"):
        if row["config"] == "default":
            scores.setdefault(row["env_id"], []).append(float(row["eval_mean"]))
    published = {k: float(x.split()[0].replace(",", "")) for k, x in MUJOCO.items()}
    assert scores.keys() == published.keys() and len(scores) == 10
    lower = {env_id for env_id, x in scores.items() if np.mean(x) < published[env_id]}
    assert lower == {"Ant-v5"}
