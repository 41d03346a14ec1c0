"""Record one iteration of ppo_discrete.py, every array by its name in the code.

    python docs/values.py          # data/rollout.json

The third iteration of a run with T = 4 and N = 2, in which an episode ends. The pages show the
numbers by <div class="widget" data-widget="values" data-names="obs actions rewards">.
Functions of the script are wrapped, nothing is computed here.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ppo_discrete  # noqa: E402
from benchmarks.jobs import wrapped  # noqa: E402

PATH = ROOT / "docs" / "data" / "rollout.json"
FLAGS = dict(num_envs=2, num_steps=4, num_minibatches=2, seed=34)
ITERATION = 3
MINIBATCHES = 10 * FLAGS["num_minibatches"]  # of an update


class Recorder:
    """Wraps functions of ppo_discrete.py and keeps what goes in and comes out."""

    def __init__(self) -> None:
        self.iteration, self.minibatch = 1, 0
        self.arrays: dict[str, Any] = {}

    def keep(self, prefix: str = "", **arrays: Any) -> None:
        if self.iteration == ITERATION:
            for name, array in arrays.items():
                if isinstance(array, torch.Tensor):
                    array = array.detach().numpy()
                self.arrays[prefix + name] = np.array(array)

    def count_steps(self, original, run, is_transition, obs, rewards):
        self.keep(is_transition=is_transition, obs=obs)
        self.done = torch.as_tensor(~is_transition[:1])  # (1, N); gae gets the other T rows
        return original(run, is_transition, obs, rewards)

    def log_prob_and_entropy(self, original, agent, obs, actions, masks):
        log_probs, entropies = original(agent, obs, actions, masks)
        if actions.ndim == 3:  # (T, N, P): the rollout, not a minibatch
            self.keep(actions=actions, log_probs=log_probs)
        return log_probs, entropies

    def gae(self, original, values, next_values, done, **inputs):
        advantages, returns = original(values=values, next_values=next_values, done=done, **inputs)
        self.keep(rewards=inputs["rewards"], terminated=inputs["terminated"])
        self.keep(values=torch.cat([values, next_values[-1:]]))  # (T + 1, N), as in the script
        self.keep(done=torch.cat([self.done, done]))  # (T + 1, N)
        self.keep(advantages=advantages, returns=returns)
        return advantages, returns

    def normalise(self, original, advantages):
        normalised = original(advantages)
        self.keep("batch.", advantages=normalised)
        return normalised

    def ppo_loss(self, original, agent, args, minibatch):
        self.minibatch += 1
        loss, stats = original(agent, args, minibatch)
        if self.prefix():
            self.keep(self.prefix() + "minibatch.", **minibatch._asdict())
            self.keep(self.prefix(), loss=loss, **stats)
        return loss, stats

    def forward(self, original, agent, minibatch):
        log_probs, entropies, values = original(agent, minibatch)
        if self.prefix():
            self.keep(self.prefix(), log_probs=log_probs, entropies=entropies, values=values)
        return log_probs, entropies, values

    def clipped_surrogate(self, original, ratio, advantages, clip_coef):
        if self.prefix():
            self.keep(self.prefix(), ratio=ratio)
        return original(ratio, advantages, clip_coef)

    def prefix(self) -> str:
        """Return which minibatch of the update it is: the first, the last or another."""
        return {1: "first.", MINIBATCHES: "last."}.get(self.minibatch, "")

    def end_iteration(self, step: int, metrics: dict[str, float]) -> bool:
        self.iteration, self.minibatch = self.iteration + 1, 0
        return self.iteration > ITERATION

    def wraps(self) -> dict[str, Any]:
        return {
            "experiment.Run.count_steps": self.count_steps,
            "Agent.log_prob_and_entropy": self.log_prob_and_entropy,
            "Agent.forward": self.forward,
            "gae": self.gae,
            "normalise": self.normalise,
            "ppo_loss": self.ppo_loss,
            "clipped_surrogate": self.clipped_surrogate,
        }


def record(**changes: Any) -> dict[str, np.ndarray]:
    """Train for three iterations; return the arrays of the last one, by name."""
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as folder:
        args = ppo_discrete.Args(run_dir=Path(folder) / "run", eval_episodes=1, **FLAGS | changes)
        with wrapped(ppo_discrete, recorder.wraps()):
            ppo_discrete.train(args, on_iteration=recorder.end_iteration)
    return recorder.arrays


def rounded(array: np.ndarray) -> Any:
    """Return an array as a list, or a number, that can be read."""
    return array.tolist() if array.dtype.kind in "bi" else np.round(array.astype(float), 4).tolist()


def as_data(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    flags = " ".join(f"--{name.replace('_', '-')} {x}" for name, x in FLAGS.items())
    tensors = {
        name: {"shape": list(array.shape), "numbers": rounded(array)}
        for name, array in arrays.items()
    }
    command = f"python ppo_discrete.py {flags}"
    return {"command": command, "iteration": ITERATION, "tensors": tensors}


def main() -> None:
    data = as_data(record())
    tensors = ",\n    ".join(f'"{name}": {json.dumps(x)}' for name, x in data["tensors"].items())
    head = f'"command": "{data["command"]}",\n  "iteration": {data["iteration"]}'
    PATH.write_text(f'{{\n  {head},\n  "tensors": {{\n    {tensors}\n  }}\n}}\n')
    print(f"written: {PATH}")


if __name__ == "__main__":
    main()
