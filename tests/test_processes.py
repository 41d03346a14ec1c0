"""Several processes (torchrun), PyTorch without them, and the compiled gradient."""

import csv
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import experiment
import ppo_continuous
import ppo_discrete
from experiment import UserError
from tests.helpers import ROOT, StopAfter, parameter_vector, quick_args, read_metrics, spy

# One minibatch is the whole batch, so that its rows need not be shuffled in the same order.
WHOLE = dict(num_envs=6, num_steps=32, num_minibatches=1, update_epochs=1, total_timesteps=192)
WHOLE |= dict(norm_adv="minibatch", eval_episodes=2)
JOINED = {  # Poison's episodes end in different rows; in the others processes see different numbers
    "poison": (ppo_discrete, WHOLE | dict(env_id="test/Poison-v0")),
    "identity": (ppo_discrete, WHOLE | dict(env_id="test/Identity-v0", norm_obs=True)),
    "target": (ppo_continuous, WHOLE | dict(env_id="test/Target-v0")),
}
PARTS = dict(num_envs=4, num_steps=32, update_epochs=2, eval_episodes=2, checkpoint_every=1)
PARTS |= dict(norm_adv="minibatch", target_kl=0.025, total_timesteps=6 * 128)

CHILD = """
import atexit, dataclasses, os, sys
sys.path.insert(0, {root!r})
from pathlib import Path
import numpy as np, torch, experiment, tests.envs, ppo_continuous, ppo_discrete
from tests.helpers import StopAfter
from tests.test_processes import JOINED, PARTS

class SharedNoise:
    # Draws the noise of all environments and takes this process's share of it.
    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.bit_generator = self.rng.bit_generator

    def share(self, draw, size):
        n, rank = size[0], experiment.rank()
        return draw((n * experiment.world_size(), *size[1:]))[rank * n : (rank + 1) * n]

    def gumbel(self, size):
        return self.share(lambda shape: self.rng.gumbel(size=shape), size)

    def standard_normal(self, size, dtype):
        return self.share(lambda shape: self.rng.standard_normal(shape, dtype), size)

original = experiment.Run.__init__
def init(self, args, *rest):
    original(self, args, *rest)
    self.sampling = SharedNoise(experiment.split_seed(args.seed)[2])

folder = Path({folder!r})
at_exit = folder / f"exit{{os.environ['RANK']}}"
atexit.register(lambda: at_exit.write_text(str(torch.distributed.is_initialized())))
agents = {{}}
for name, (script, flags) in JOINED.items():
    experiment.Run.__init__ = init
    agents[name], _ = script.train(script.Args(**flags, run_dir=folder / name))
experiment.Run.__init__ = original
args = ppo_discrete.Args(**PARTS, run_dir=folder / "parts")
ppo_discrete.train(args, on_iteration=StopAfter(3))
torch.distributed.barrier()  # until process 0 has saved
if experiment.rank() == 0:
    (folder / "half").write_bytes((folder / "parts/checkpoint.pt").read_bytes())
torch.distributed.barrier()
states = []
start = experiment.Run.start
def recording(self, *rest):
    start(self, *rest)
    states.append([rng.bit_generator.state for rng in (self.sampling, self.shuffling)])
experiment.Run.start = recording
agents["parts"], _ = ppo_discrete.train(dataclasses.replace(args, resume=args.run_dir))
saved = {{name: agent.state_dict() for name, agent in agents.items()}}
torch.save(saved | {{"rngs": states}}, folder / f"rank{{experiment.rank()}}")
"""


def launch(words: list[str], processes: int = 2, **kwargs: Any) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), *words]
    return subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, **kwargs)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """Train each of `JOINED`, and `PARTS` in two parts, in two processes; return the folder."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "child.py").write_text(CHILD.format(root=str(ROOT), folder=str(folder)))
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with launch([str(folder / "child.py")], **pipes) as group:
        output, error = group.communicate(timeout=300)
    assert group.returncode == 0, error
    assert output.count("iterations on") == 5  # one process speaks
    return folder


def ranks(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", JOINED)
def test_two_processes_do_what_one_does_with_the_joined_batch(
    two_processes, tmp_path, name
) -> None:
    script, flags = JOINED[name]
    agent, _ = script.train(script.Args(**flags, run_dir=tmp_path / name))
    first, second = (saved[name] for saved in ranks(two_processes))
    for key, alone in agent.state_dict().items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(alone, first[key], rtol=1e-4, atol=1e-6)
    (one,), (two,) = read_metrics(tmp_path / name), read_metrics(two_processes / name)
    for key in one.keys() - {"charts/SPS"}:
        assert np.isclose(one[key], two[key], 1e-3, 1e-5, equal_nan=True), key


def test_two_processes_stay_equal_and_resume_each_with_its_random_numbers(two_processes) -> None:
    first, second = ranks(two_processes)
    for name, parameter in first["parts"].items():
        assert torch.equal(parameter, second["parts"][name])
    steps = [row["global_step"] for row in read_metrics(two_processes / "parts")]
    assert len(steps) == 6 and steps == sorted(set(steps))
    saved = torch.load(two_processes / "half", weights_only=True)["rngs"]
    assert [first["rngs"][0], second["rngs"][0]] == saved and saved[0] != saved[1]


def test_processes_leave_their_group_before_they_exit(two_processes) -> None:
    """Otherwise Gloo's threads abort the interpreter now and then, and torchrun ends all."""
    assert [(two_processes / f"exit{rank}").read_text() for rank in range(2)] == ["False"] * 2


def test_a_run_saved_by_two_processes_is_not_resumed_by_one(two_processes, tmp_path) -> None:
    shutil.copytree(two_processes / "parts", tmp_path / "parts")
    flags = PARTS | dict(total_timesteps=8 * 128)
    args = ppo_discrete.Args(**flags, resume=tmp_path / "parts")
    with pytest.raises(UserError, match="saved by 2 processes, resumed by 1"):
        ppo_discrete.train(args)
    results = ppo_discrete.train(dataclasses.replace(args, resume=None, evaluate=args.resume))[1]
    assert results["eval_mean"] > 0  # to evaluate it, one is enough


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (dict(num_envs=5), "--num-envs must be a multiple of 2"),
        # Of 5 rows of an environment 3 may be resets: 4 x 2 are too few for 8 minibatches of 2.
        (dict(num_envs=8, num_steps=5, num_minibatches=8, total_timesteps=40), "minibatches 8"),
    ],
)
def test_environments_that_cannot_be_divided_are_one_clear_line(
    run_dir, monkeypatch, flags: dict, said: str
) -> None:
    monkeypatch.setattr(experiment, "world_size", lambda: 2)
    with pytest.raises(UserError, match=said):
        ppo_discrete.train(quick_args(ppo_discrete, run_dir, **flags))


def wait_for(path: Path, group: subprocess.Popen, rows: int = 0) -> None:
    while not path.exists() or path.read_bytes().count(b"\n") < rows:
        assert group.poll() is None
        time.sleep(0.1)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_killed_process_ends_all_and_the_run_can_continue(run_dir) -> None:
    flags = f"--run-dir {run_dir} --total-timesteps 2000000 --checkpoint-every 2"
    with launch(["ppo_discrete.py", *flags.split()], stderr=subprocess.PIPE) as group:
        wait_for(run_dir / "checkpoint.pt", group)
        children = Path(f"/proc/{group.pid}/task/{group.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        group.communicate(timeout=60)
    assert group.returncode != 0
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert len(saved["rngs"]) == 2 and saved["run"]["iteration"] % 2 == 0


def test_sigterm_to_all_processes_saves_once_and_evaluates(run_dir) -> None:
    """As schedulers send it: to the launcher, which passes it on, and to the processes."""
    flags = f"--run-dir {run_dir} --total-timesteps 2000000 --eval-episodes 2"
    with launch(["ppo_discrete.py", *flags.split()], stderr=subprocess.PIPE) as group:
        wait_for(run_dir / "metrics.csv", group, rows=3)
        os.killpg(group.pid, signal.SIGTERM)
        group.communicate(timeout=60)
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    with open(run_dir / "metrics.csv") as file:
        assert saved["run"]["iteration"] == len(list(csv.DictReader(file)))
    results = json.loads((run_dir / "results.json").read_text())
    assert results["stopped"] == "SIGTERM" and results["eval_cut_off"] == 0


def test_train_works_where_pytorch_has_no_distributed(run_dir, monkeypatch) -> None:
    """As on a Jetson: there is the module, but of its functions only `is_available`."""
    for name in ("is_initialized", "is_torchelastic_launched", "get_rank", "get_world_size"):
        monkeypatch.delattr(torch.distributed, name)
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    _, results = ppo_discrete.train(quick_args(ppo_discrete, run_dir))
    assert results["global_step"] > 1000


# ---- Compiling ---------------------------------------------------------------------------------


def first_batches(script: Any, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the arguments, an agent, and the minibatches of a run's first update."""
    calls = spy(monkeypatch, "ppo_loss", script)
    args = quick_args(script, run_dir, update_epochs=1)
    args.total_timesteps = args.num_envs * args.num_steps
    agent, _ = script.train(args)
    return args, agent, [call.batch for call in calls]


@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_the_compiled_gradient_is_the_eager_one(run_dir, monkeypatch) -> None:
    script = ppo_discrete
    args, agent, batches = first_batches(script, run_dir, monkeypatch)
    monkeypatch.undo()
    parameters = experiment.flatten_parameters(agent)
    compiled = experiment.compile_gradient(script.ppo_loss, agent, args, parameters)
    short = type(batches[1])(*(column[:-1] for column in batches[1]))  # of another size
    for batch in (batches[0], short):
        parameters.grad.zero_()
        loss, expected = script.ppo_loss(agent, args, batch)
        loss.backward()
        gradient = parameters.grad.clone()
        parameters.grad.zero_()
        torch.testing.assert_close(compiled(batch), expected)
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(parameters.grad, gradient)


@pytest.mark.filterwarnings("default")
def test_a_compiled_run_samples_afresh_and_learns_the_same(tmp_path, monkeypatch) -> None:
    """A captured graph may freeze its random numbers; ours are drawn outside of it.

    aot_eager captures the same graph and runs it uncompiled, which is quick.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    vectors, calls = [], spy(monkeypatch, "to_env", ppo_continuous.Agent)
    flags = dict(squash=True, log_std_fall=None, ent_coef=0.01, learning_rate=1e-4)
    for name, flag in (("eager", False), ("compiled", True)):
        args = quick_args(ppo_continuous, tmp_path / name, compile=flag, **flags)
        agent, _ = ppo_continuous.train(args, on_iteration=StopAfter(3))
        vectors.append(parameter_vector(agent))
    calls = [call for call in calls if len(call.actions) == args.num_envs]  # one step
    half, steps = len(calls) // 2, 3 * args.num_steps
    for eager, compiled in zip(calls[:steps], calls[half : half + steps]):
        np.testing.assert_allclose(eager.actions, compiled.actions, atol=1e-4)
    sampled = np.stack([call.actions for call in calls[half : half + steps]])
    assert len(np.unique(sampled.round(3).reshape(steps, -1), axis=0)) == steps
    torch.testing.assert_close(*vectors, rtol=1e-4, atol=1e-5)
