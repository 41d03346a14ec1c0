"""What the figures rest on: the statistics, the changes, and tables that can be continued."""

import ast
import contextlib
import dataclasses
import functools
import json
import sys
import threading
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import tyro

import ppo_continuous
import ppo_discrete
import ppo_rlhf_toy
from benchmarks import (
    ablation,
    classic,
    details,
    figures,
    gpu,
    jobs,
    lstm,
    overhead,
    pitfalls,
    rlhf,
    rlhf_details,
    run,
    scaling,
    speed,
    tables,
)
from benchmarks.peers import common
from tests.helpers import ROOT, import_file, spy


def test_gpu_measures_with_flags_that_exist(monkeypatch) -> None:
    works = list(gpu.runs(gpu.Args()))
    assert {part for part, *_ in works} == {"equal", "atari", "width"} and len(works) == 26
    assert len({work[:4] for work in works}) == len(works)
    for _, script, flags, device, _ in works:
        args = tyro.cli(import_file(ROOT / script).Args, args=[*flags.split(), "--device", device])
        if script != "ppo_rlhf_toy.py":  # it checks what the task has completed
            args.check()


def test_gpu_writes_equal_numbers_and_speeds(tmp_path, monkeypatch) -> None:
    """On the CPU, with the smallest of its runs."""
    small = "--total-timesteps 384 --num-envs 4 --num-steps 32 --eval-episodes 1"
    monkeypatch.setattr(gpu, "FEW", {"ppo_discrete.py": small})
    runs = gpu.runs
    ours = lambda args: (run for run in runs(args) if run[0] != "atari")  # noqa: E731
    monkeypatch.setattr(gpu, "runs", ours)
    words = ["gpu", "--device", "cpu", "--quick", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    gpu.main()
    equal, width = jobs.read(tmp_path / "gpu.csv")
    assert equal["difference"] == "0.0e+00" and equal["device"] == "cpu"
    assert float(width["steps_per_second"]) > 0.0 and float(width["memory_mb"]) > 50.0


def test_iqm_leaves_out_the_lowest_and_the_highest_quarter() -> None:
    assert tables.iqm(np.array([100.0, 1.0, 2.0, 3.0, -50.0, 4.0, 5.0, 0.0])) == 2.5
    assert tables.iqm(np.array([-9.0, 1.0, 2.0, 3.0, 9.0])) == 2.0
    assert tables.iqm(np.array([1.0, 2.0, 6.0])) == 3.0  # a quarter of three is none


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Five seeds each: some 380 of 400 intervals hold the true difference, 0."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        low, high = tables.change_interval(*rng.standard_normal((2, 5)))
        held += low <= 0.0 <= high
    assert 370 <= held <= 390


@pytest.mark.parametrize(("seeds", "share"), [(3, 0.76), (5, 0.89), (10, 0.94)])
def test_intervals_of_the_iqm_hold_the_truth_less_often_than_they_say(seeds, share) -> None:
    """What the docstring of tables.py says of them."""
    rng = np.random.default_rng(0)
    intervals = [tables.interval(rng.standard_normal(seeds), 1000) for _ in range(400)]
    held = np.mean([low <= 0.0 <= high for low, high in intervals])
    assert held == pytest.approx(share, abs=0.04)


def test_intervals_of_one_seed_or_of_equal_ones() -> None:
    assert tables.change_interval(np.ones(1), np.zeros(3)) == (-np.inf, np.inf)
    assert tables.change_interval(np.ones(3), np.zeros(3)) == (1.0, 1.0)


def strings_of(path: Path) -> list[str]:
    """Return the lines of the strings in a file, docstrings included."""
    nodes = ast.walk(ast.parse(path.read_text()))
    strings = [x.value for x in nodes if isinstance(x, ast.Constant) and isinstance(x.value, str)]
    return [line.strip() for string in strings for line in string.splitlines()]


def test_no_line_of_a_script_stands_in_a_benchmark() -> None:
    """Or to reword the line would break the benchmark: it must wrap a function instead."""
    texts = [path.read_text() for path in ROOT.glob("*.py")]
    lines = {line.strip() for text in texts for line in text.splitlines()}
    assert "is_transition = ~done[:-1]" in " ".join(lines)
    copied = [
        f"{path.name}: {line}"
        for path in (ROOT / "benchmarks").rglob("*.py")
        for line in strings_of(path)
        if len(line) >= 30 and line in lines
    ]
    assert not copied


def test_no_benchmark_changes_the_path_of_imports() -> None:
    for path in (ROOT / "benchmarks").glob("*.py"):
        assert "sys.path" not in path.read_text() and "E402" not in path.read_text(), path


CHANGES = [*details.CHANGES, *rlhf_details.CHANGES]
MODULES = {f"{m.__name__}.py": m for m in (ppo_discrete, ppo_continuous, ppo_rlhf_toy)}


def test_every_flag_of_the_changes_and_the_classic_tasks_exists() -> None:
    cases = [(script, change.flags) for change in CHANGES for script in change.scripts]
    cases += [(script, flags) for _, _, script, flags in classic.TASKS]
    cases += [(ablation.SCRIPT, flags) for flags in ablation.LINES.values()]
    for script, flags in cases:
        args = tyro.cli(MODULES[script].Args, args=flags.split())
        assert (args != MODULES[script].Args()) == bool(flags), f"{flags} changes nothing"


def change_script(stack: contextlib.ExitStack, script: ModuleType, *names: str) -> None:
    """Apply changes to a script until the stack is left."""
    for change in CHANGES:
        if change.name in names and f"{script.__name__}.py" in change.scripts:
            stack.enter_context(jobs.wrapped(script, change.wraps))


@pytest.mark.parametrize(
    "name, orthogonal, small",
    [
        ("default", True, True),
        ("PyTorch's initial weights", False, False),
        ("policy head not small", True, False),
    ],
)
def test_changes_of_the_first_weights(name: str, orthogonal: bool, small: bool) -> None:
    torch.manual_seed(0)
    args = ppo_discrete.Args()
    with contextlib.ExitStack() as stack:
        change_script(stack, ppo_discrete, name)
        actor = ppo_discrete.Agent(args, ppo_discrete.make_envs(args, 1)).actor
    hidden, head = actor[2].weight.detach(), actor[4].weight.detach()
    assert ((hidden @ hidden.T - 2 * torch.eye(64)).abs().max() < 1e-4) == orthogonal
    assert (head.std() < 0.01) == small


@pytest.mark.parametrize(
    "script, env",
    [
        (ppo_discrete, dict(env_kwargs=("max_episode_steps=9",), num_envs=4, num_steps=32)),
        (ppo_continuous, dict(num_steps=256)),  # an episode of Pendulum is cut off after 200
    ],
)
@pytest.mark.parametrize("changed", [False, True])
def test_changes_of_the_loop(script: ModuleType, env: dict, changed: bool, tmp_path: Path) -> None:
    """Truncation is death, reset rows count and Adam's eps is 1e-8, or nothing of it."""
    args = script.Args(**env, num_minibatches=1, eval_episodes=1, run_dir=tmp_path / "run")
    names = ("truncation taken for death", "reset rows learned from", "Adam's eps 1e-8")
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        gaes, losses = (spy(patch, name, script) for name in ("gae", "ppo_loss"))
        adams = spy(patch, "__init__", torch.optim.Adam)
        change_script(stack, script, *(names if changed else ()))
        script.train(args, on_iteration=lambda *_: True)
    assert gaes[0].done.any() and gaes[0].terminated.equal(gaes[0].done) == changed
    assert (len(losses[0].batch.obs) == args.batch_size) == changed
    assert adams[0].eps == (1e-8 if changed else 1e-5)


TINY = ppo_rlhf_toy.Args(
    d_model=16, num_layers=1, num_heads=2, sft_steps=8, sft_batch_size=8, rm_pairs=64,
    rm_min_accuracy=0.0, num_iterations=1, batch_size=16, eval_prompts=32,
)  # fmt: skip


def test_changes_of_the_models_of_rlhf() -> None:
    task, toy = ppo_rlhf_toy.TASKS["reviews"], ppo_rlhf_toy
    encode, block = task.tokenizer.encode, task.tokenizer.block
    tokens = block([encode("pool : the pool was good ."), encode("pool :")], True, "cpu")

    def ask(name: str) -> list[bool]:
        torch.manual_seed(0)
        with contextlib.ExitStack() as stack, torch.no_grad():
            change_script(stack, toy, name)
            model = toy.make_model(TINY, task, scalar=True)
            torch.nn.init.ones_(model.position.weight[3])
            alone, padded = model(tokens[1:, -2:])[0], model(tokens)[1, -2:]
            score = toy.read_scores(TINY, model, ["pool :"], ["good"])
            read = model(block([[*encode("pool : good"), 1]], True, "cpu"))[:, -1, 0]
            again = torch.equal(model(tokens), model(tokens))
            return [again, alone.allclose(padded), score.allclose(read), not model.head.bias.any()]

    assert ask("default") == [True, True, True, True]
    assert ask("dropout 0.1 in all models")[0] is False
    assert ask("positions count padding") == [True, False, True, True]
    assert ask("reward model read a token before EOS") == [True, True, False, True]
    assert ask("PyTorch's initial scalar head") == [True, True, True, False]


def test_changes_of_the_loop_of_rlhf(tmp_path: Path) -> None:
    """All of them at once, but for one that leaves the whitening out."""
    args, toy = dataclasses.replace(TINY, run_dir=tmp_path / "run"), ppo_rlhf_toy
    apart, generate, temperatures = "advantages not whitened", toy.generate, set()

    def noted(args, policy, *rest):
        temperatures.add(policy.temperature)
        return generate(args, policy, *rest)

    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        # What so few steps teach is worth nothing, and the judge tells nothing apart.
        patch.setattr(toy.Reviews, "gold", lambda _, __, response: len(response) % 97 / 97)
        patch.setattr(toy, "generate", noted)
        names = "token_rewards masked_whiten kl_penalty ppo_loss".split()
        rewards, whitened, kl, losses = (spy(patch, name, toy) for name in names)
        change_script(stack, toy, *(c.name for c in rlhf_details.CHANGES if c.name != apart))
        toy.train(args)
    assert rewards[0].kl.equal(-kl[0].result)
    assert temperatures == {0.7}
    mask, ends = losses[0].batch.mask, losses[0].batch.responses == toy.Tokenizer.eos
    assert ends.any() and not (mask & ends & (mask.sum(1, keepdim=True) > 1)).any()
    with contextlib.ExitStack() as stack:
        change_script(stack, toy, apart)
        assert toy.masked_whiten(rewards[0].kl, mask) is rewards[0].kl


@pytest.mark.parametrize("script", ["ppo_discrete.py", "ppo_continuous.py"])
def test_the_profile_marks_every_part_of_the_loop(script: str) -> None:
    flags = {"num_envs": 2, "num_steps": 16, "update_epochs": 1, "num_minibatches": 2}
    parts, rows, environment, products = scaling.profiled(script, 4, **flags)
    names = "acting environment advantages minibatches forward backward optimiser diagnostics"
    assert list(parts) == [*names.split(), "logging"]
    assert all(value > 0.0 for value in parts.values())
    assert rows == 32
    assert 0.0 < environment < 10.0 * sum(parts.values()) and products > 0.0


@pytest.mark.parametrize(
    "work, env_id", [("cart-pole", "CartPole-v1"), ("half-cheetah", "HalfCheetah-v5")]
)
def test_our_scripts_do_the_work_that_is_asked_of_the_peers(work: str, env_id: str) -> None:
    """Optimiser steps, environment steps and rows of two iterations, counted from outside."""
    if work == "half-cheetah":
        pytest.importorskip("mujoco")
    sizes = dict(num_envs=2, num_steps=16, update_epochs=2, num_minibatches=2)
    ours, _ = speed.our_contenders(work, common.Settings(env_id=env_id, **sizes))
    assert speed.check_work(ours) == "8 optimiser steps on 64 rows"


def test_other_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = common.Settings(num_envs=2, num_steps=16, update_epochs=2, num_minibatches=2)
    peer = speed.Contender("peer", Path(), Path(), settings)
    done = {"rows": 64, "env_steps": 60, "gradient_steps": 8}
    for wrong in ({}, {"rows": 32}, {"gradient_steps": 4}, {"env_steps": 32}, {"env_steps": 65}):
        monkeypatch.setattr(speed, "run", lambda *_, wrong=wrong, **__: (None, [done | wrong]))
        if not wrong:
            assert speed.check_work(peer) == "8 optimiser steps on 64 rows"
        else:
            with pytest.raises(jobs.Failed, match="peer did"):
                speed.check_work(peer)


def test_a_table_is_continued_and_a_failed_job_leaves_no_line(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    ran = []

    def measure(seed: int, core: int) -> list[dict]:
        ran.append(seed)
        if seed == 2 and ran.count(2) == 1:
            raise jobs.Failed("it broke")
        return [{"seed": seed, "flags": "", "core": core}]

    table = tmp_path / "new" / "table.csv"
    todo = [jobs.Job((seed,), functools.partial(measure, seed), "") for seed in (1, 2, 3)]
    with pytest.raises(SystemExit):
        jobs.run_jobs(todo, table, ("seed",))
    assert [row["seed"] for row in jobs.read(table)] == ["1", "3"]
    out, err = capsys.readouterr()
    assert err == "2: it broke\n" and out.count("measured") == 2
    jobs.run_jobs(todo, table, ("seed",))
    assert ran == [1, 2, 3, 2]
    assert [row["seed"] for row in jobs.read(table)] == ["1", "3", "2"]
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"{seed}: already in {table}" for seed in (1, 3)
    ]
    with pytest.raises(SystemExit, match="was measured with the flags ''"):
        jobs.run_jobs([dataclasses.replace(todo[0], flags="--gamma 0.9")], table, ("seed",))


def test_your_own_runs_stay_apart_from_the_committed_ones(tmp_path: Path) -> None:
    for module in (run, classic, details, ablation, rlhf, rlhf_details, overhead, pitfalls, speed):
        words = ["--env-ids", "CartPole-v1", "--seeds", "1"] if module is run else []
        table = tyro.cli(module.Args, args=words).path("runs.csv")
        assert table == jobs.RESULTS / "own" / "runs.csv", module
    assert speed.Args(quick=True).path("speed.csv") == jobs.RESULTS / "quick" / "speed.csv"
    committed = speed.Args(quick=True, results=jobs.RESULTS).path("speed.csv")
    assert committed == jobs.RESULTS / "speed.csv" and committed.exists()
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {"benchmarks/results/own/", "benchmarks/results/quick/"} <= set(ignored)


QUICK = "--num-envs 2 --num-steps 16 --eval-episodes 1"


def test_an_interrupted_run_continues_from_its_checkpoint(tmp_path: Path) -> None:
    flags = f"{QUICK} --checkpoint-every 2 --total-timesteps 320"
    training = run.Training("ppo_discrete.py", "CartPole-v1", "x", 1, flags)
    (whole,) = training.line(0, tmp_path / "whole")
    (curve,) = (tmp_path / "whole").glob("ppo_discrete__CartPole-v1__x__1.csv")
    assert curve.read_text().startswith("global_step,episodic_return\n")

    folder = tmp_path / "runs" / training.name
    args = ppo_discrete.Args(num_envs=2, num_steps=16, eval_episodes=1, total_timesteps=320)
    args.run_dir = folder
    ppo_discrete.train(args, on_iteration=lambda *_: True)  # stops after its first iteration
    assert jobs.read_run(folder)[0]["stopped"]
    words = ["--env-id", "CartPole-v1", "--seed", "1", *flags.split()]
    (folder / "origin.txt").write_text(f"{' '.join(words)} at {jobs.commit()}")
    begun = jobs.read(folder / "metrics.csv")
    (line,) = training.line(0, None, tmp_path / "runs")
    assert list(line) == list(whole) and line["process_seconds"] == ""
    metrics = jobs.read(folder / "metrics.csv")
    assert len(begun) == 1 and len(metrics) == 10 and metrics[0] == begun[0]
    assert training.line(0, None, tmp_path / "runs") == [line]  # it ended, and is not run again
    assert len(jobs.read(folder / "metrics.csv")) == 10
    other = dataclasses.replace(training, flags=f"{QUICK} --total-timesteps 640")
    with pytest.raises(jobs.Failed, match="holds another run than"):
        other.line(0, None, tmp_path / "runs")


def test_a_folder_without_a_checkpoint_is_emptied(tmp_path: Path) -> None:
    (tmp_path / "args.json").touch()  # killed before its first checkpoint
    with pytest.raises(jobs.Failed, match="status 2 after"):
        jobs.launch(["-c", "raise SystemExit(2)"], folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["origin.txt"]


def test_a_process_that_lives_too_long_is_killed() -> None:
    with pytest.raises(jobs.Failed, match="status -9 after"):
        jobs.launch(["-c", "import time; time.sleep(60)"], limit=0.5)
    done = jobs.launch(["-c", "print(7)"], limit=60.0)
    assert done.printed == "7\n" and 0.0 < done.seconds < 60.0 and done.memory > 1.0


def test_a_table_with_other_columns_is_refused(tmp_path: Path) -> None:
    jobs.append(tmp_path / "t.csv", [{"a": 1}])
    with pytest.raises(ValueError, match="name another table"):
        jobs.append(tmp_path / "t.csv", [{"b": 1}])


def test_tables_of_speed_pair_the_rounds(tmp_path: Path) -> None:
    """The ratio is the median over rounds, not the ratio of the medians."""
    rates = {"ppo_discrete.py": (100, 200, 300), "Peer": (10, 40, 100)}
    for name, values in rates.items():
        for number, value in enumerate(values):
            line = {"work": "cart-pole", "threads": 1, "contender": name, "round": number}
            line |= {"steps_per_second": value, "peak_mb": 100, "versions": "1", "remark": ""}
            jobs.append(tmp_path / "speed.csv", [line | {"settings": SETTINGS}])
    text = tables.markdown(tables.Args(table="speed.csv", results=tmp_path))
    assert "| Peer | 1 | 40 | 10 - 100 | 5.00x | 100 |  |" in text
    assert "4 environments x 128 steps, 4 epochs x 4 minibatches, tanh 64-64" in text


SETTINGS = json.dumps(dataclasses.asdict(common.Settings()))


def test_solved_counts_the_seeds_that_never_were(tmp_path: Path) -> None:
    for number, value in enumerate(("2.0", "4.0", "")):
        line = {"work": "solve", "threads": 1, "contender": "ppo_x", "round": number, "rows": 9}
        line |= {"solved_seconds": value, "peak_mb": 1, "versions": "1", "remark": ""}
        jobs.append(tmp_path / "speed.csv", [line | {"settings": SETTINGS}])
    text = tables.markdown(tables.Args(table="speed.csv", part="solve", results=tmp_path))
    assert "| ppo_x | 1 | 2 of 3 | 3.0 | 2.0 - 4.0 | 9 | 1 |  |" in text


@pytest.mark.parametrize(
    "module, flags, error",
    [
        (classic, "--env-ids CartPole-v1 Foo", "--env-ids: there is no Foo, but CartPole-v1, "),
        (details, "--env-ids Foo", "--env-ids: there is no Foo, but "),
        (details, "--changes Foo", "--changes: there is no Foo, but default, "),
        (rlhf_details, "--changes Foo", "--changes: there is no Foo, but "),
        (pitfalls, "--only Foo", "--only: there is no Foo, but "),
        (scaling, "--parts Foo", "--parts: there is no Foo, but environments, "),
        (speed, "--only LeanRl", "--only: there is no LeanRl, but ppo_discrete.py, "),
        (tables, "--table foo.csv", "--table foo.csv: .*results has no such table"),
        (figures, "--table foo.csv", "name the environments of --curves"),
    ],
)
def test_unknown_names_end_with_one_line(
    module: ModuleType, flags: str, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *flags.split()])
    with pytest.raises(SystemExit, match=error) as end:
        module.main()
    assert "\n" not in str(end.value)


def test_curves_of_ours_and_of_a_peer_come_from_their_own_files(tmp_path: Path) -> None:
    (tmp_path / "curves").mkdir()
    runs = (("ppo_discrete.py", "default", 7), ("Stable-Baselines3", "its zoo's", 9))
    for script, config, value in runs:
        line = {"script": script, "env_id": "CartPole-v1", "config": config}
        jobs.append(tmp_path / "classic.csv", [line])
        name = f"{Path(script).stem}__CartPole-v1__{config}__1.csv"
        text = f"global_step,episodic_return\n0,{value}\n100,{value}\n"
        (tmp_path / "curves" / name).write_text(text)
    args = figures.Args(table="classic.csv", curves=("CartPole-v1",), results=tmp_path)
    labels = figures.curves_of(args, "CartPole-v1")
    assert list(labels) == ["ours", "Stable-Baselines3"]
    for pair, (*_, value) in zip(labels.values(), runs):
        grid, curves = figures.seeds_on_a_grid(args, "CartPole-v1", *pair)
        assert grid[-1] == 100 and curves.shape == (1, 200) and (curves == value).all()
    with pytest.raises(SystemExit, match=r"there is no curve of ppo_x\.py"):
        figures.seeds_on_a_grid(args, "CartPole-v1", "ppo_x.py", "default")
    # Where no peer was run, it is the script and the configurations that were asked for.
    args = dataclasses.replace(args, configs=("a", "b"))
    assert figures.curves_of(args, "Pendulum-v1") == {c: ("ppo_discrete.py", c) for c in "ab"}


def test_readme_claims_match_classic_csv() -> None:
    """Ours end higher on three tasks, by Welch's interval, and alike on two."""
    scores: dict[tuple[str, bool], list[float]] = {}
    for row in jobs.read(jobs.RESULTS / "classic.csv"):
        key = row["env_id"], row["script"] == "Stable-Baselines3"
        scores.setdefault(key, []).append(float(row["eval_mean"]))
    assert {len(x) for x in scores.values()} == {10}
    marks = {
        env_id: tables.significance(*(np.array(scores[env_id, peer]) for peer in (False, True)))
        for env_id, *_ in classic.TASKS
    }
    higher = {"Acrobot-v1", "MountainCar-v0", "LunarLander-v3"}
    assert marks == {env_id: " ▲" if env_id in higher else "" for env_id in marks}


def test_ctrl_c_begins_no_other_job(tmp_path: Path) -> None:
    begun = []

    def measure(core: int) -> list[dict]:
        begun.append(core)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jobs.run_jobs([jobs.Job((i,), measure) for i in range(50)], tmp_path / "a.csv", ("i",))
    assert len(begun) < 50


def test_jobs_are_pinned_to_the_cores_that_the_command_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs.os, "sched_getaffinity", lambda _: {5, 3}, raising=False)
    pinned, both = [], threading.Barrier(2)

    def measure(core: int) -> list[dict]:
        pinned.append(core)
        both.wait(10)  # two at a time
        return [{"i": len(pinned)}]

    jobs.run_jobs([jobs.Job((x,), measure) for x in "ab"], tmp_path / "a.csv", ("i",), 2)
    assert sorted(pinned) == [3, 5]


def test_details_are_marked_beyond_the_noise_only(tmp_path: Path) -> None:
    worse, same = "policy head not small", "PPO-Penalty for PPO-Clip"
    scores = {same: (9, 11, 11, 13), worse: (1, 2, 3), "default": (10, 11, 12)}
    for config, values in scores.items():
        lines = [{"env_id": "Hopper-v5", "config": config, "eval_mean": x} for x in values]
        jobs.append(tmp_path / "details.csv", lines)
    args = tables.Args(table="details.csv", results=tmp_path)
    lines = tables.markdown(args).splitlines()[2:]
    assert lines[0].startswith("| default |")  # in the order of the changes, not of the file
    assert lines[1] == f"| {worse} | 2.0 (1, 2, 3) ▼ |"
    assert lines[2] == f"| {same} | 11.0 ± 1.4 |"


def test_measurements_take_turns_and_are_not_repeated(tmp_path: Path) -> None:
    calls, table = [], tmp_path / "scaling.csv"

    def measure(name: str) -> jobs.Quantities:
        calls.append(name)
        return {(name, "other"): 1.0, (name, "ms"): 0.123456789}

    def measure_all(rounds: int, *names: str) -> None:
        chosen = [("part", name, "ms", functools.partial(measure, name)) for name in names]
        jobs.measure_all(chosen, rounds, table)

    measure_all(1, "a")
    measure_all(2, "a", "b")
    measure_all(2, "a", "b")
    assert calls == ["a", "b", "a", "b"]  # rounds are taken in turn
    lines = [line for line in jobs.read(table) if line["quantity"] == "ms"]
    found = [(line["case"], line["round"]) for line in lines]
    assert found == [("a", "1"), ("b", "1"), ("a", "2"), ("b", "2")]
    assert {line["value"] for line in lines} == {"0.12346"}


def test_committed_measurements_are_known_as_such() -> None:
    """Each is in its table under the quantity that says that it was taken."""
    for table, measurements in (
        ("scaling.csv", scaling.measurements(scaling.Args())),
        ("overhead.csv", [*overhead.measurements("gains"), *overhead.measurements("checkpoints")]),
    ):
        rows = jobs.read(jobs.RESULTS / table)
        there = {(row["part"], row["case"], row["quantity"]) for row in rows}
        for *key, _ in measurements:
            assert tuple(key) in there


@pytest.mark.parametrize(
    "table, parts", [("scaling.csv", "gae, "), ("rlhf.csv", "reviews, arithmetic")]
)
def test_a_part_that_a_table_lacks_is_named(table: str, parts: str) -> None:
    with pytest.raises(SystemExit, match=f"--part: there is no nonsense, but .*{parts}"):
        tables.markdown(tables.Args(table=table, part="nonsense"))


@pytest.mark.parametrize(
    "part, heads",
    [("reviews", "| seed | beta |"), ("arithmetic", "| seed | sampled accuracy, SFT |")],
)
def test_beta_is_a_column_only_where_it_differs(part: str, heads: str) -> None:
    assert tables.markdown(tables.Args(table="rlhf.csv", part=part)).startswith(heads)


def test_scaling_pivots_to_medians(tmp_path: Path) -> None:
    for number, value in enumerate((1.0, 5.0, 2.0)):
        line = {"part": "gae", "case": "(1, 2)", "quantity": "us", "round": number, "value": value}
        jobs.append(tmp_path / "scaling.csv", [line])
    text = tables.markdown(tables.Args(table="scaling.csv", results=tmp_path))
    assert text == "|  | us |\n|---|---:|\n| (1, 2) | 2.00 |"


def test_a_contender_that_failed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def check_work(contender: speed.Contender) -> str:
        tried.append(contender.name)
        raise jobs.Failed("it did other work")

    monkeypatch.setattr(speed, "check_work", check_work)
    args = speed.Args(only=("ppo_discrete.py",), rounds=3)
    first, second, third = speed.runs_in_turn(args)
    assert first.key == ("cart-pole", 1, "ppo_discrete.py", 1)
    for job, error in ((first, "it did other work"), (third, "left out, because it failed")):
        with pytest.raises(jobs.Failed, match=error):
            job.measure(0)
    assert tried == ["ppo_discrete.py"]


def test_cartpole_counts_as_solved_by_whole_episodes() -> None:
    """The tilt alone lets the pole fall, always left fails at once; all four numbers keep it up."""
    assert common.evaluate(lambda obs: obs[:, 2] > 0) < common.SOLVED
    assert common.evaluate(lambda obs: np.zeros(len(obs), int)) < 12.0
    assert common.evaluate(lambda obs: obs @ (0.1, 0.5, 1.0, 1.0) > 0) == 500.0


def test_the_ablation_ends_one_change_before_the_default() -> None:
    flags = list(ablation.LINES.values())[1]
    last = dataclasses.asdict(tyro.cli(ppo_continuous.Args, args=flags.split()))
    default = dataclasses.asdict(ppo_continuous.Args())
    assert {name for name in last if last[name] != default[name]} == {"log_std_fall"}


# ---- Every benchmark's job at a tiny size ------------------------------------------------------


def test_a_changed_detail_is_a_line() -> None:
    program = jobs.wrapped_script("ppo_discrete.py", "details.WRAPS['policy head not small']")
    flags = f"{QUICK} --total-timesteps 64"
    training = run.Training("ppo_discrete.py", "CartPole-v1", "x", 1, flags, program)
    (line,) = training.line(0)
    (committed, *_) = jobs.read(jobs.RESULTS / "details.csv")
    assert list(line) == list(committed) and line["global_step"] in range(40, 65)


@pytest.mark.parametrize("more", ["", " --recurrent"])
def test_stable_baselines3_is_a_line_of_the_same_columns(more: str) -> None:
    """Its PPO, and with --recurrent sb3-contrib's with a memory."""
    flags = f"--total-timesteps 256{more}"
    (line,) = run.Training("Peer", "CartPole-v1", "x", 1, flags, [classic.SB3]).line(0)
    (committed, *_) = jobs.read(jobs.RESULTS / "classic.csv")
    assert list(line) == list(committed) and line["global_step"] == 256


def test_speed_is_a_line() -> None:
    settings = common.Settings(num_envs=2, num_steps=16, num_minibatches=2, total_timesteps=128)
    ours, _ = speed.our_contenders("cart-pole", settings)
    line = speed.measure(ours, "cart-pole", 1)
    (committed, *_) = jobs.read(jobs.RESULTS / "speed.csv")
    assert list(line) == list(committed)
    assert line["rows"] == 128 and line["steps_per_second"] > 0 and line["peak_mb"] > 50


def test_speed_with_a_memory_is_a_line() -> None:
    (committed, *_) = jobs.read(jobs.RESULTS / "lstm_speed.csv")
    for contender in lstm.contenders():
        small = dict(num_envs=4, num_steps=16, total_timesteps=192)
        settings = dataclasses.replace(contender.settings, **small)
        contender = dataclasses.replace(contender, settings=settings)
        (line,) = lstm.measure_speed(contender, 1, 0)
        assert list(line) == list(committed) and line["rows"] == 64
        assert line["steps_per_second"] > 0 and line["steps_per_cpu_second"] > 0


QUICK_RLHF = "--d-model 16 --num-layers 1 --num-heads 2 --sft-steps 2 --sft-batch-size 8"
QUICK_RLHF += " --sft-accuracy 0 --num-iterations 1 --batch-size 16 --update-epochs 1"
QUICK_RLHF += " --eval-prompts 32"


def test_a_run_of_rlhf_is_a_line(tmp_path: Path) -> None:
    run = rlhf.RlhfRun("arithmetic", 1, "", QUICK_RLHF)
    (line,) = run.line(tmp_path)
    (committed, *_) = jobs.read(jobs.RESULTS / "rlhf.csv")
    assert list(line) == list(committed) and line["first_ratio_error"] < 1e-3
    (committed, *_) = jobs.read(jobs.RESULTS / "rlhf_options.csv")
    (option,) = run.line(tmp_path, columns=list(committed))  # finished: it is only read
    assert {name: option[name] for name in line} == line
    assert option["option"] == "default" and option["optimum_kl"] > 0.0
    jobs.append(tmp_path / "rlhf_options.csv", [option])
    table = tables.markdown(tables.Args(table="rlhf_options.csv", results=tmp_path))
    assert table.splitlines()[-1].startswith(f"| default | 1 | {option['optimum_kl']:.2f} |")


def test_a_change_of_an_early_stage_holds_when_its_models_are_measured(tmp_path: Path) -> None:
    run = rlhf.RlhfRun("arithmetic", 1, "positions count padding", QUICK_RLHF, loads_models=False)
    (changed,) = rlhf_details.line(run, tmp_path)
    (unchanged,) = run.line(tmp_path)  # finished: it is only read
    assert changed["kl"] == unchanged["kl"] != 0.0  # the run's own
    assert changed["optimum_share"] != unchanged["optimum_share"]


def test_pitfalls_are_run_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    healthy = f"ppo_discrete.py {QUICK} --total-timesteps 320"
    cases = {
        "cartpole": pitfalls.Case(healthy, ""),
        "lr-high": pitfalls.Case(f"{healthy} --learning-rate 0.2", "cartpole"),
    }
    monkeypatch.setattr(pitfalls, "CASES", cases)
    monkeypatch.setattr(pitfalls, "SEEDS", (1,))
    monkeypatch.setattr(sys, "argv", ["pitfalls", "--results", str(tmp_path)])
    pitfalls.main()
    names = ["cartpole__1.csv", "lr-high.svg", "lr-high__1.csv"]
    assert sorted(path.name for path in (tmp_path / "pitfalls").iterdir()) == names
    (logged,) = pitfalls.load("lr-high", tmp_path / "pitfalls")
    assert {"charts/episodic_return", "losses/approx_kl"} <= set(logged)
    assert len(logged["global_step"]) == 10
    outcomes = pitfalls.outcomes(tmp_path / "pitfalls")
    assert "| [lr-high](#lr-high) | `--learning-rate 0.2` | " in outcomes


def test_overhead_is_measured() -> None:
    command = f"ppo_discrete.py {QUICK} --total-timesteps 640"
    share = overhead.checkpoints(command)
    assert 0.0 < share[command, "checkpoints, % of the time"] < 100.0
    rate, _ = overhead.rate_and_beginning(command)
    assert rate > 0.0


def test_scaling_is_measured() -> None:
    assert scaling.gae_times(8, 2)["(8, 2)", "`gae`"] > 0.0
    assert scaling.rlhf_tokens(2, 4)["2 answers of 4 tokens", "times"] > 0.0


@pytest.mark.parametrize("table", ["ablation.csv", "details.csv"])
def test_changes_are_drawn(table: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    jobs.append(tmp_path / table, jobs.read(jobs.RESULTS / table))
    figures.main(["--table", table, "--results", str(tmp_path)])
    drawn = (tmp_path / table).with_suffix(".svg").read_text()
    assert drawn.startswith("<?xml") and drawn.endswith("</svg>\n")
