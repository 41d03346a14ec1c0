"""What several test files use."""

import csv
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import experiment

ROOT = Path(__file__).parent.parent

# Flags of runs that take about a second. Their environments are those of tests/envs.py.
QUICK = {
    # 10 iterations of 128 steps
    "ppo_discrete": dict(env_id="test/Identity-v0", num_envs=8, num_steps=16, total_timesteps=1280),
    "ppo_continuous": dict(env_id="test/Target-v0", num_envs=8, num_steps=16, total_timesteps=1280),
    # 2 iterations of 32 steps, and the smallest network
    "ppo_atari": dict(env_id="test/Frames-v0", num_envs=2, num_steps=16, total_timesteps=64),
}
QUICK["ppo_discrete"] |= dict(num_minibatches=4, eval_episodes=4)
QUICK["ppo_continuous"] |= dict(num_minibatches=4, eval_episodes=4)
QUICK["ppo_atari"] |= dict(num_minibatches=4, eval_episodes=2, hidden_size=16)
QUICK["ppo_lstm"] = QUICK["ppo_discrete"] | dict(hidden_size=16)


def quick_args(script: ModuleType, run_dir: Path | None, **changes: Any) -> Any:
    """Return a script's `Args` for a run of about a second, on an environment of tests/envs.py.

    `ppo_atari` takes 2 iterations of 32 steps, the others 10 of 128.
    """
    return script.Args(**(QUICK[script.__name__] | dict(run_dir=run_dir) | changes))


def make_agent(script: ModuleType, head_std: float | None = None, **changes: Any) -> nn.Module:
    """Return a new agent for the environment of `quick_args`, or for another `env_id`.

    The weights of the policy's last layer are normal with standard deviation `head_std`, if given:
    as they are initialised, all actions are equally good.
    """
    torch.manual_seed(0)
    args = quick_args(script, None, **changes)
    envs = script.make_envs(args, 1)
    agent = script.Agent(args, envs)
    envs.close()
    if head_std is not None:
        nn.init.normal_(agent.actor[-1].weight, std=head_std)
    return agent


def run_main(
    script: ModuleType,
    flags: str | list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> tuple[int, str, str]:
    """Run a script's command line in this process; return exit status, stdout and stderr.

    An exception that `main` lets pass is not caught.
    """
    words = flags.split() if isinstance(flags, str) else [str(flag) for flag in flags]
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *words])
    capsys.readouterr()
    status = 0
    try:
        experiment.main(script.Args, script.train)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    out, err = capsys.readouterr()
    return status, out, err


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """Return what a run logged, one row per iteration."""
    with open(run_dir / "metrics.csv") as file:
        return [{name: float(x) for name, x in row.items()} for row in csv.DictReader(file)]


def snapshot(x: Any) -> Any:
    """Return a copy of a tensor, an array or a tuple of those; anything else as it is."""
    if isinstance(x, Tensor):
        return x.detach().clone()
    if isinstance(x, np.ndarray):
        return x.copy()
    if isinstance(x, tuple):
        parts = [snapshot(part) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return x


def spy(monkeypatch: pytest.MonkeyPatch, name: str, owner: Any) -> list[SimpleNamespace]:
    """Record every call of `owner.name`: its arguments by their names, and its `result`.

    `calls = spy(monkeypatch, "ppo_loss", ppo_discrete)` gives `calls[0].batch.actions` and
    `calls[0].result`. Of a method, the object is `calls[0].self`. Tensors and arrays are copies,
    taken before the call, for the scripts write to theirs again.
    """
    calls: list[SimpleNamespace] = []
    original = getattr(owner, name)
    signature = inspect.signature(original)

    def recorder(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = {key: snapshot(value) for key, value in bound.arguments.items()}
        result = original(*args, **kwargs)
        calls.append(SimpleNamespace(**arguments, result=snapshot(result)))
        return result

    monkeypatch.setattr(owner, name, recorder)
    return calls


class StopAfter:
    """An `on_iteration` that ends the training after `n` iterations.

    `.steps` and `.metrics` hold what it was given, an item an iteration.
    """

    def __init__(self, n: int):
        self.n = n
        self.steps: list[int] = []
        self.metrics: list[dict[str, float]] = []

    def __call__(self, step: int, metrics: dict[str, float]) -> bool:
        self.steps.append(step)
        self.metrics.append(metrics)
        return len(self.steps) >= self.n


def import_file(path: Path) -> ModuleType:
    """Import a file as a module of its own, also if one of the same name is imported already."""
    spec = importlib.util.spec_from_file_location(f"{path.stem} in {path.parent}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and `inspect` look for it
    spec.loader.exec_module(module)
    return module


def parameter_vector(module: nn.Module) -> Tensor:
    """Return a copy of all parameters of a module, one after the other."""
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
