"""Run the work of benchmarks/speed.py with ours: the script named last, by the flags before it."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import common  # before the script: it counts what that does, if asked to

script = importlib.import_module(Path(sys.argv.pop()).stem)
Run = script.experiment.Run


def first_observations(self, agent, observe: Callable = Run.first_observations):
    obs = observe(self, agent)
    common.COUNTS.update(dict.fromkeys(common.COUNTS, 0))  # these steps are no batch's
    return obs


def end_iteration(self, metrics: dict, end: Callable = Run.end_iteration) -> bool:
    stop = end(self, metrics)
    rows = self.iteration * self.args.batch_size
    common.tick(rows, lambda obs: self.agent.act(obs, {}, None))
    return stop


Run.first_observations, Run.end_iteration = first_observations, end_iteration
script.experiment.main(script.Args, script.train)
