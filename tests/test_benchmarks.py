"""What the figures rest on: the statistics, the changes, and tables that resume."""

import contextlib
import csv
import dataclasses
import functools
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import tyro

import ppo_continuous
import ppo_discrete
import ppo_rlhf_toy
from tests.helpers import spy

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))
sys.path.append(str(ROOT / "benchmarks" / "peers"))

import ablation  # noqa: E402
import classic  # noqa: E402
import common  # noqa: E402
import details  # noqa: E402
import gallery  # noqa: E402
import report  # noqa: E402
import rlhf  # noqa: E402
import rlhf_details  # noqa: E402
import run  # noqa: E402
import scaling  # noqa: E402
import speed  # noqa: E402


def test_iqm_leaves_out_the_lowest_and_the_highest_quarter() -> None:
    assert report.iqm(np.array([100.0, 1.0, 2.0, 3.0, -50.0, 4.0, 5.0, 0.0])) == 2.5
    assert report.iqm(np.array([-9.0, 1.0, 2.0, 3.0, 9.0])) == 2.0
    assert report.iqm(np.array([1.0, 2.0, 6.0])) == 3.0  # a quarter of three is none


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Five seeds each: some 380 of 400 intervals hold the true difference, 0."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        low, high = report.change_interval(*rng.standard_normal((2, 5)))
        held += low <= 0.0 <= high
    assert 370 <= held <= 390


@pytest.mark.parametrize(("seeds", "share"), [(3, 0.76), (5, 0.89), (10, 0.94)])
def test_intervals_of_the_iqm_hold_the_truth_less_often_than_they_say(seeds, share) -> None:
    """What the docstring of report.py says of them."""
    rng = np.random.default_rng(0)
    intervals = [report.interval(rng.standard_normal(seeds), 1000) for _ in range(400)]
    held = np.mean([low <= 0.0 <= high for low, high in intervals])
    assert held == pytest.approx(share, abs=0.04)


def test_intervals_of_one_seed_or_of_equal_ones() -> None:
    assert report.change_interval(np.ones(1), np.zeros(3)) == (-np.inf, np.inf)
    assert report.change_interval(np.ones(3), np.zeros(3)) == (1.0, 1.0)


@pytest.mark.parametrize("source", ["no such line", "twice twice"])
def test_a_patch_must_fit_exactly_once(source: str) -> None:
    with pytest.raises(ValueError, match="places, not one"):
        speed.patched(source, {"twice": "once"})


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
            stack.enter_context(run.wrapped(script, change.wraps))


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
    rm_min_accuracy=0.0, num_iterations=1, batch_size=16, eval_prompts=32, whiten_rewards=True,
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
            score = toy.read_scores(TINY, task, model, ["pool :"], ["good"])
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
    apart = "advantages not whitened"
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        # What so few steps teach is worth nothing, and the judge tells nothing apart.
        patch.setattr(toy.Reviews, "gold", lambda _, __, response: len(response) % 97 / 97)
        names = "token_rewards masked_whiten generate kl_penalty ppo_loss".split()
        rewards, whitened, generated, kl, losses = (spy(patch, name, toy) for name in names)
        change_script(stack, toy, *(c.name for c in rlhf_details.CHANGES if c.name != apart))
        toy.train(args)
    assert rewards[0].kl.equal(-kl[0].result)
    assert [x.shift_mean for x in whitened] == [True, True]  # rewards and advantages
    assert {x.args.temperature for x in generated} == {0.7}
    mask, ends = losses[0].batch.mask, losses[0].batch.responses == toy.Tokenizer.eos
    assert ends.any() and not (mask & ends & (mask.sum(1, keepdim=True) > 1)).any()
    with contextlib.ExitStack() as stack:
        change_script(stack, toy, apart)
        assert toy.masked_whiten(rewards[0].kl, mask) is rewards[0].kl


@pytest.mark.parametrize("script", ["ppo_discrete.py", "ppo_continuous.py"])
def test_the_profile_marks_every_part_of_the_loop(script: str) -> None:
    flags = {"num_envs": 2, "num_steps": 16, "update_epochs": 1, "num_minibatches": 2}
    parts, rows, environment, products = scaling.profiled(script, 4, **flags)
    names = "logging acting environment advantages diagnostics minibatches forward backward"
    assert list(parts) == [*names.split(), "optimiser"]
    assert all(value > 0.0 for value in parts.values())
    assert rows == 32
    assert 0.0 < environment < 10.0 * sum(parts.values()) and products > 0.0


def test_our_scripts_do_the_work_that_is_asked_of_the_peers() -> None:
    """Optimiser steps, environment steps and rows of two iterations, counted from outside."""
    settings = common.Settings(num_envs=2, num_steps=16, update_epochs=2, num_minibatches=2)
    (ours, _) = speed.ours("cart-pole", settings)
    assert speed.check_work(ours) == "8 optimiser steps on 64 rows"


def test_other_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = common.Settings(num_envs=2, num_steps=16, update_epochs=2, num_minibatches=2)
    peer = speed.Contender("peer", Path(), Path(), settings)
    done = {"rows": 64, "env_steps": 60, "gradient_steps": 8}
    for wrong in ({}, {"rows": 32}, {"gradient_steps": 4}, {"env_steps": 32}, {"env_steps": 65}):
        monkeypatch.setattr(speed, "run", lambda *_, wrong=wrong, **__: ({}, [done | wrong]))
        if not wrong:
            assert speed.check_work(peer) == "8 optimiser steps on 64 rows"
        else:
            with pytest.raises(RuntimeError, match="peer did"):
                speed.check_work(peer)


def test_a_table_resumes_and_a_failed_run_leaves_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def one_run(job: run.Job, core: int, curves: Path | None, runs: Path | None) -> dict:
        ran.append(job.seed)
        if job.seed == 2 and ran.count(2) == 1:
            raise subprocess.CalledProcessError(2, "python")
        names = ("script", "env_id", "config", "seed")
        return dict(zip(names, job.key)) | {"eval_mean": 1.0, "flags": job.flags}

    monkeypatch.setattr(run, "one_run", one_run)
    table = tmp_path / "new" / "table.csv"
    jobs = [run.Job("a.py", "CartPole-v1", "default", seed, "") for seed in (1, 2, 3)]
    with pytest.raises(SystemExit):
        run.run_all(jobs, table, 1)
    assert [row["seed"] for row in run.read(table)] == ["1", "3"]
    run.run_all(jobs, table, 1)
    assert ran == [1, 2, 3, 2]
    assert [row["seed"] for row in run.read(table)] == ["1", "3", "2"]
    with pytest.raises(SystemExit, match="stands there with ''"):
        run.run_all([dataclasses.replace(jobs[0], flags="--gamma 0.9")], table, 1)


def test_an_interrupted_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    flags = "--num-envs 2 --num-steps 16 --eval-episodes 1 --checkpoint-every 2"
    job = run.Job("ppo_discrete.py", "CartPole-v1", "x", 1, flags + " --total-timesteps 320")
    whole = run.one_run(job, 0, tmp_path / "whole")

    folder = tmp_path / "runs" / job.name
    folder.mkdir(parents=True)
    (folder / "args.json").touch()  # killed before its first checkpoint: done anew
    assert run.one_run(job, 0, None, tmp_path / "runs")["global_step"] == whole["global_step"]

    shutil.rmtree(folder)
    args = ppo_discrete.Args(num_envs=2, num_steps=16, eval_episodes=1, total_timesteps=320)
    args.run_dir = folder
    ppo_discrete.train(args, on_iteration=lambda *_: True)  # stops after its first iteration
    (folder / "origin.txt").write_text(f"{job.flags} at {run.commit()}")
    begun = run.read(folder / "metrics.csv")
    line = run.one_run(job, 0, tmp_path / "resumed", tmp_path / "runs")
    assert list(line) == list(whole) and line["process_seconds"] == ""
    metrics = run.read(folder / "metrics.csv")
    assert len(begun) == 1 and len(metrics) == 10 and metrics[0] == begun[0]
    other = dataclasses.replace(job, flags=f"{flags} --total-timesteps 640")
    with pytest.raises(ValueError, match="was begun with"):
        run.one_run(other, 0, None, tmp_path / "runs")


def test_a_table_with_other_columns_is_refused(tmp_path: Path) -> None:
    run.append(tmp_path / "t.csv", {"a": 1})
    with pytest.raises(ValueError, match="name another table"):
        run.append(tmp_path / "t.csv", {"b": 1})


def test_tables_of_speed_pair_the_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ratio is the median over rounds, not the ratio of the medians."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    rates = {"ppo_discrete.py": (100, 200, 300), "Peer": (10, 40, 100)}
    for name, values in rates.items():
        for number, value in enumerate(values):
            line = {"work": "cart-pole", "threads": 1, "contender": name, "round": number}
            line |= {"steps_per_second": value, "peak_mb": 100, "versions": "1", "remark": ""}
            run.append(tmp_path / "speed.csv", line | {"settings": SETTINGS})
    text = report.markdown(report.Args(table="speed.csv"))
    assert "| Peer | 1 | 40 | 10 - 100 | 5.00x | 100 |  |" in text
    assert "4 environments x 128 steps, 4 epochs x 4 minibatches, tanh 64-64" in text


SETTINGS = speed.json.dumps(speed.asdict(common.Settings()))


def test_solved_counts_the_seeds_that_never_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for number, value in enumerate(("2.0", "4.0", "")):
        line = {"work": "solve", "threads": 1, "contender": "ppo_x", "round": number, "rows": 9}
        line |= {"solved_seconds": value, "peak_mb": 1, "versions": "1", "remark": ""}
        run.append(tmp_path / "speed.csv", line | {"settings": SETTINGS})
    text = report.markdown(report.Args(table="speed.csv", work="solve"))
    assert "| ppo_x | 1 | 2 of 3 | 3.0 | 2.0 - 4.0 | 9 | 1 |  |" in text


@pytest.mark.parametrize(
    "module, flags, error",
    [
        (classic, "--env-ids CartPole-v1 Foo", "--env-ids: there is no Foo, but CartPole-v1, "),
        (details, "--env-ids Foo", "--env-ids: there is no Foo, but "),
        (details, "--changes Foo", "--changes: there is no Foo, but default, "),
        (rlhf_details, "--changes Foo", "--changes: there is no Foo, but "),
        (gallery, "--only Foo", "--only: there is no Foo, but "),
        (scaling, "--parts Foo", "--parts: there is no Foo, but environments, "),
        (report, "--table foo.csv", "--table foo.csv: benchmarks/results/ has no such table"),
    ],
)
def test_unknown_names_end_with_one_line(
    module: ModuleType, flags: str, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *flags.split()])
    with pytest.raises(SystemExit, match=error) as end:
        module.main()
    assert "\n" not in str(end.value)


def test_curves_of_ours_and_of_a_peer_come_from_their_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "curves").mkdir()
    runs = (("ppo_discrete.py", "default", 7), ("Stable-Baselines3", "its zoo's", 9))
    for script, config, value in runs:
        line = {"script": script, "env_id": "CartPole-v1", "config": config}
        run.append(tmp_path / "classic.csv", line)
        name = f"{Path(script).stem}__CartPole-v1__{config}__1.csv"
        text = f"global_step,episodic_return\n0,{value}\n100,{value}\n"
        (tmp_path / "curves" / name).write_text(text)
    args = report.Args(table="classic.csv", curves=("CartPole-v1",))
    labels = report.drawn(args, "CartPole-v1")
    assert list(labels) == ["ours", "Stable-Baselines3"]
    for pair, (*_, value) in zip(labels.values(), runs):
        grid, curves = report.seeds_on_a_grid(args, "CartPole-v1", *pair)
        assert grid[-1] == 100 and curves.shape == (1, 200) and (curves == value).all()
    with pytest.raises(SystemExit, match=r"there is no curve of ppo_x\.py"):
        report.seeds_on_a_grid(args, "CartPole-v1", "ppo_x.py", "default")
    # Where no peer was run, it is the script and the configurations that were asked for.
    args = dataclasses.replace(args, configs=("a", "b"))
    assert report.drawn(args, "Pendulum-v1") == {c: ("ppo_discrete.py", c) for c in "ab"}


def test_what_readme_says_of_the_classic_tasks() -> None:
    """Ours end higher on three tasks, by Welch's interval, and alike on two."""
    scores: dict[tuple[str, bool], list[float]] = {}
    for row in run.read(report.RESULTS / "classic.csv"):
        key = row["env_id"], row["script"] == "Stable-Baselines3"
        scores.setdefault(key, []).append(float(row["eval_mean"]))
    assert {len(x) for x in scores.values()} == {10}
    marks = {
        env_id: report.mark(*(np.array(scores[env_id, peer]) for peer in (False, True)))
        for env_id, *_ in classic.TASKS
    }
    higher = {"Acrobot-v1", "MountainCar-v0", "LunarLander-v3"}
    assert marks == {env_id: " ▲" if env_id in higher else "" for env_id in marks}


def test_ctrl_c_begins_no_other_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def one_run(job: run.Job, *_: object) -> dict:
        begun.append(job)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "one_run", one_run)
    jobs = [run.Job("ppo_discrete.py", "CartPole-v1", "default", seed, "") for seed in range(50)]
    with pytest.raises(KeyboardInterrupt):
        run.run_all(jobs, tmp_path / "runs.csv", 1)
    assert len(begun) < 50


def test_a_folder_of_other_flags_is_not_taken_for_the_run(tmp_path: Path) -> None:
    other = rlhf.Run("reviews", 1, "beta 0.0", "--kl-coef 0.7")
    folder = tmp_path / other.folder
    folder.mkdir()
    (folder / "origin.txt").write_text(f"{' '.join(other.flags)} at {run.commit()}")
    assert rlhf.train(other, tmp_path) == folder
    wanted = rlhf.Run("reviews", 1, "beta 0.0", "--kl-coef 0.0 --no-such-flag", after="")
    with pytest.raises(subprocess.CalledProcessError):
        rlhf.train(wanted, tmp_path)
    assert not folder.exists()


def test_details_are_marked_beyond_the_noise_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    worse, same = "policy head not small", "PPO-Penalty for PPO-Clip"
    scores = {same: (9, 11, 11, 13), worse: (1, 2, 3), "default": (10, 11, 12)}
    with open(tmp_path / "details.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("env_id", "config", "seed", "eval_mean"))
        for config, values in scores.items():
            writer.writerows(("Hopper-v5", config, seed, x) for seed, x in enumerate(values))
    lines = report.markdown(report.Args(table="details.csv")).splitlines()[2:]
    assert lines[0].startswith("| default |")  # in the order of the changes, not of the file
    assert lines[1] == f"| {worse} | 2.0 (1, 2, 3) ▼ |"
    assert lines[2] == f"| {same} | 11.0 ± 1.4 |"


def test_a_measurement_that_stands_in_the_table_is_not_taken_again(tmp_path: Path) -> None:
    calls = []

    def measure(name: str) -> scaling.Quantities:
        calls.append(name)
        return {(name, "ms"): 0.123456789}

    def take(rounds: int, *names: str) -> None:
        measurements = [("part", name, functools.partial(measure, name)) for name in names]
        scaling.take(tmp_path / "scaling.csv", rounds, lambda: measurements)

    take(1, "a")
    take(2, "a", "b")
    take(2, "a", "b")
    assert calls == ["a", "b", "a", "b"]  # rounds are taken in turn
    lines = run.read(tmp_path / "scaling.csv")
    assert [(line["case"], line["round"]) for line in lines] == [
        ("a", "1"),
        ("b", "1"),
        ("a", "2"),
        ("b", "2"),
    ]
    assert {line["value"] for line in lines} == {"0.12346"}


@pytest.mark.parametrize(
    "table, parts", [("scaling.csv", "atari, "), ("rlhf.csv", "reviews, arithmetic")]
)
def test_a_part_that_a_table_lacks_is_named(table: str, parts: str) -> None:
    with pytest.raises(SystemExit, match=f"--part: there is no nonsense, but .*{parts}"):
        report.markdown(report.Args(table=table, part="nonsense"))


@pytest.mark.parametrize(
    "part, heads",
    [("reviews", "| seed | beta |"), ("arithmetic", "| seed | sampled accuracy, SFT |")],
)
def test_beta_is_a_column_only_where_it_differs(part: str, heads: str) -> None:
    assert report.markdown(report.Args(table="rlhf.csv", part=part)).startswith(heads)


def test_scaling_pivots_to_medians(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for number, value in enumerate((1.0, 5.0, 2.0)):
        line = {"part": "gae", "case": "(1, 2)", "quantity": "us", "round": number, "value": value}
        run.append(tmp_path / "scaling.csv", line)
    text = report.markdown(report.Args(table="scaling.csv", part="gae"))
    assert text == "|  | us |\n|---|---:|\n| (1, 2) | 2.00 |"


def test_skip_leaves_a_contender_out_and_knows_their_names() -> None:
    names = [c.name for c in speed.contenders(speed.Args())]
    assert "ppo_discrete.py" in names
    left = [c.name for c in speed.contenders(speed.Args(skip=("ppo_discrete.py",)))]
    assert left == [name for name in names if name != "ppo_discrete.py"]
    with pytest.raises(SystemExit, match="--skip: there is no LeanRl"):
        speed.contenders(speed.Args(skip=("LeanRl",)))


def test_cartpole_counts_as_solved_by_whole_episodes() -> None:
    """By the tilt alone the pole falls; always to the left at once; by all four it stands."""
    assert common.evaluate(lambda obs: obs[:, 2] > 0) < common.SOLVED
    assert common.evaluate(lambda obs: np.zeros(len(obs), int)) < 12.0
    assert common.evaluate(lambda obs: obs @ (0.1, 0.5, 1.0, 1.0) > 0) == 500.0


def test_the_ablation_ends_one_change_before_the_default() -> None:
    flags = list(ablation.LINES.values())[1]
    last = dataclasses.asdict(tyro.cli(ppo_continuous.Args, args=flags.split()))
    default = dataclasses.asdict(ppo_continuous.Args())
    assert {name for name in last if last[name] != default[name]} == {"log_std_fall"}
