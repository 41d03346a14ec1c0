"""Evaluate every ten iterations, and keep the best policy in a folder of its own.

Run it beside the scripts:
    python keep_best.py
    python ppo_discrete.py --evaluate runs/best
"""

from pathlib import Path

import numpy as np
import torch

import experiment
import ppo_discrete


class KeepBest:
    """An `on_iteration` that evaluates `agent` and remembers its best parameters."""

    def __init__(self, agent: ppo_discrete.Agent, envs: experiment.RecordedEnvs, every: int):
        self.agent, self.envs, self.every = agent, envs, every
        self.calls, self.scores, self.best = 0, [], {}

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        self.calls += 1
        if self.calls % self.every == 0:
            returns, _ = experiment.evaluate(self.agent, self.envs, episodes=20, seed=0, rng=None)
            self.scores.append(np.mean(returns))
            if self.scores[-1] == max(self.scores):
                self.best = {name: x.clone() for name, x in self.agent.state_dict().items()}


if __name__ == "__main__":
    args = ppo_discrete.Args(env_id="CartPole-v1")
    envs = experiment.RecordedEnvs(ppo_discrete.make_envs(args, 10))
    keep_best = KeepBest(ppo_discrete.Agent(args, envs), envs, every=10)
    _, results = ppo_discrete.train(args, keep_best.agent, keep_best)
    envs.close()
    checkpoint = torch.load(Path(results["run_dir"], "checkpoint.pt"), weights_only=True)
    Path("runs/best").mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint | {"agent": keep_best.best}, "runs/best/checkpoint.pt")
    print("evaluations:", *keep_best.scores)
