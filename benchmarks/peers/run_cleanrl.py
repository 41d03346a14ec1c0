"""Run the work of benchmarks/speed.py with a script of CleanRL or LeanRL: the one named last.

The script runs unchanged. What it calls is wrapped: an iteration tells its time when it ends, and
what changed since the script was written is as it was.
"""

import contextlib
import runpy
import sys
from types import SimpleNamespace

import common
import gymnasium as gym
import torch

sys.argv[0] = sys.argv.pop()

with contextlib.suppress(ImportError):  # CleanRL ends an iteration by logging its speed
    from torch.utils.tensorboard import SummaryWriter

    def add_scalar(self, tag, value, step, add=SummaryWriter.add_scalar):
        add(self, tag, value, step)
        if tag == "charts/SPS":
            agent = sys._getframe(1).f_globals["agent"]
            common.tick(step, lambda obs: agent.actor(torch.Tensor(obs)).argmax(-1).numpy())

    SummaryWriter.add_scalar = add_scalar

with contextlib.suppress(ImportError):  # LeanRL's iterations are those of a progress bar
    import tqdm

    class TickingBar(tqdm.tqdm):
        def __iter__(self):
            for iteration in super().__iter__():
                yield iteration
                args = sys._getframe(1).f_globals["args"]
                common.tick(iteration * args.batch_size)

    tqdm.tqdm = TickingBar

sys.modules["wandb"] = SimpleNamespace(init=lambda **_: None, log=lambda *_, **__: None)


# The copy of LeanRL's agent that acts asks for gradients with PyTorch 2.13, and .numpy() fails.
def compile_without_gradients(function, compile=torch.compile, **kwargs):
    compiled = compile(function, **kwargs)
    acts = getattr(function, "__name__", "") in ("get_action_and_value", "gae")
    return torch.no_grad()(compiled) if acts else compiled


torch.compile = compile_without_gradients


# Since Gymnasium 1.0 a wrapper needs a third argument, two have other names, and games are
# registered by importing them.
def transform_observation(env, function, space=None, wrap=gym.wrappers.TransformObservation):
    return wrap(env, function, space)


gym.wrappers.TransformObservation = transform_observation
gym.wrappers.GrayScaleObservation = gym.wrappers.GrayscaleObservation
gym.wrappers.FrameStack = gym.wrappers.FrameStackObservation
with contextlib.suppress(ImportError):
    import ale_py  # noqa: F401

runpy.run_path(sys.argv[0], run_name="__main__")
