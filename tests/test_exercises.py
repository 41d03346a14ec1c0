"""What the first page shows, and what the exercises say happens: each "Break it", shortened."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import ppo_continuous
import ppo_discrete
import ppo_rlhf_toy
from tests.helpers import ROOT, read_metrics, run_main

Metrics = dict[str, np.ndarray]
SCRIPTS = {f"{s.__name__}.py": s for s in (ppo_discrete, ppo_continuous, ppo_rlhf_toy)}
CARTPOLE = "--total-timesteps 20480 --eval-episodes 1"
LANGUAGE = "--sft-steps 150 --sft-batch-size 32 --sft-learning-rate 5e-3 --learning-rate 4e-3"
LANGUAGE += " --rm-pairs 256 --rm-min-accuracy 0 --num-iterations 12 --warmup-iterations 1"
LANGUAGE += " --d-model 32 --num-layers 1 --num-heads 2 --batch-size 64 --update-epochs 2"
LANGUAGE += " --eval-prompts 32"


def command(page: str) -> list[str]:
    """Return script and flags of the page's "Break it"."""
    text = (ROOT / "docs" / "en" / f"{page}.md").read_text()
    (found,) = re.findall(r"^### Break it\n.*?^```sh\npython (.*?)\n```$", text, re.M | re.S)
    return shlex.split(found)


def run(words: list[str], folder: Path, monkeypatch, capsys) -> Metrics:
    """Run a script; return one column per metric."""
    script, *flags = words
    status, _, error = run_main(SCRIPTS[script], [*flags, "--run-dir", folder], monkeypatch, capsys)
    assert status == 0, error
    rows = read_metrics(folder)
    return {name.split("/")[-1]: np.array([row[name] for row in rows]) for name in rows[0]}


def mean(metrics: Metrics, name: str) -> float:
    return float(np.nanmean(metrics[name]))


def too_few_updates(broken: Metrics, healthy: Metrics) -> None:
    assert len(broken["episodic_return"]) < 4 < 10 < len(healthy["episodic_return"])
    assert broken["episodic_return"][-1] < 0.5 * healthy["episodic_return"][-1]


def no_clip(broken: Metrics, healthy: Metrics) -> None:
    assert mean(broken, "approx_kl") > 5 * mean(healthy, "approx_kl")
    assert mean(broken, "clipfrac") < 0.2 * mean(healthy, "clipfrac")
    assert mean(broken, "episodic_return") < mean(healthy, "episodic_return")


def the_critic_alone(broken: Metrics, healthy: Metrics) -> None:
    assert mean(broken, "episodic_return") < 0.7 * mean(healthy, "episodic_return")
    assert mean(broken, "explained_variance") > mean(healthy, "explained_variance")


def no_critic(broken: Metrics, healthy: Metrics) -> None:
    assert np.abs(broken["explained_variance"]).max() < 0.1 < healthy["explained_variance"].max()
    assert broken["episodic_return"][-1] > 2 * broken["episodic_return"][0]  # it learns, but less
    assert broken["episodic_return"][-1] < 0.7 * healthy["episodic_return"][-1]


def narrow_clip(broken: Metrics, healthy: Metrics) -> None:
    assert mean(broken, "clipfrac") > 2 * mean(healthy, "clipfrac")
    assert mean(broken, "approx_kl") < 0.1 * mean(healthy, "approx_kl")


def raw_rewards(broken: Metrics, healthy: Metrics) -> None:
    assert broken["value_loss"][0] > 100 * healthy["value_loss"][0]


def chance(broken: Metrics, healthy: Metrics) -> None:
    assert 0.35 < mean(broken, "episodic_return") < 0.65
    assert broken["entropy"][-1] < broken["entropy"][0]


def free_of_charge(broken: Metrics, healthy: Metrics) -> None:
    assert broken["kl"][-1] > 1.5 * healthy["kl"][-1]
    assert broken["score"][-1] > healthy["score"][-1]


# A page: flags that shorten its run, the flags that break it, and what then shows.
EXERCISES: dict[str, tuple[str, str, Callable[[Metrics, Metrics], None]]] = {
    "start": (CARTPOLE, "--num-steps 512", too_few_updates),
    "policy-gradient": (CARTPOLE, "--clip-coef 10", no_clip),
    "gae": (CARTPOLE, "--gae-lambda 0", the_critic_alone),
    "discrete": (CARTPOLE, "--vf-coef 0", no_critic),
    "debugging": (CARTPOLE, "--clip-coef 0.01", narrow_clip),
    "continuous": (
        "--total-timesteps 2048 --eval-episodes 1", "--no-norm-obs --no-norm-reward", raw_rewards
    ),
    "lstm": ("--total-timesteps 10240 --eval-episodes 1", "", chance),
    "rlhf": (LANGUAGE, "--kl-coef 0", free_of_charge),
}  # fmt: skip


@pytest.fixture(scope="module")
def healthy_runs() -> dict[tuple[str, ...], Metrics]:
    """Metrics of runs without the flags that break them, by their command."""
    return {}


@pytest.mark.parametrize("page", EXERCISES)
def test_what_a_page_says_of_the_broken_run_is_so(
    page: str, healthy_runs, tmp_path, monkeypatch, capsys
) -> None:
    shorter, change, check = EXERCISES[page]
    words = command(page)
    cut = len(words) - len(change.split())
    assert words[cut:] == change.split()
    healthy = (*words[:cut], *shorter.split())
    if change and healthy not in healthy_runs:
        healthy_runs[healthy] = run(list(healthy), tmp_path / "healthy", monkeypatch, capsys)
    if page == "rlhf":  # stages 1 and 2 are the same in both runs
        words += [f"--load-models={tmp_path / 'healthy'}"]
    broken = run([*words, *shorter.split()], tmp_path / "broken", monkeypatch, capsys)
    check(broken, healthy_runs.get(healthy, {}))


def test_each_page_with_exercises_has_three_questions_and_as_many_answers() -> None:
    for language, title, answers in (("en", "Exercises", "Answers"), ("zh", "练习", "答案")):
        for page in EXERCISES:
            text = (ROOT / "docs" / language / f"{page}.md").read_text()
            text = text[text.index(f"\n## {title}\n") :]
            questions, rest = text.split(f'<details markdown="1"><summary>{answers}</summary>')
            rest = rest[: rest.index("</details>")]
            for part in (questions, rest):
                assert re.findall(r"^\d\. ", part, re.M) == ["1. ", "2. ", "3. "], page
            assert text.count("<details") == text.count("</details>") == 2, page


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_program_of_the_first_page_gets_what_the_page_says(language: str, capsys) -> None:
    text = (ROOT / "docs" / language / "start.md").read_text()
    (program,) = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    for _ in range(300):
        exec(program, {})
    returns = [float(line.removeprefix("return:")) for line in capsys.readouterr().out.splitlines()]
    assert len(returns) == 300
    said = re.search(r"the return is about (\d+) |平均回报大约是 (\d+)。", text)
    assert abs(np.mean(returns) - int(said[1] or said[2])) < 4.5  # six standard errors


@pytest.mark.parametrize("language", ["en", "zh"])
def test_films_are_small_and_start_only_when_asked(language: str) -> None:
    page = ROOT / "docs" / language / "start.md"
    films = re.findall(r"<video (.*?)>", page.read_text(), re.S)
    assert len(films) == 2
    size = 0
    for attributes in films:
        assert "controls" in attributes and "autoplay" not in attributes
        for path in re.findall(r'(?:src|poster)="([^"]+)"', attributes):
            size += (page.parent / path).stat().st_size
    assert 0 < size < 400_000
