"""Export a trained policy of ppo_continuous.py, its normalisation included, to ONNX.

Run it beside the scripts:
    pip install onnx onnxscript onnxruntime
    python ppo_continuous.py --env-id Pendulum-v1 --run-dir runs/mine
    python export_onnx.py runs/mine  # writes runs/mine/policy.onnx
"""

import sys

import torch
from torch import Tensor, nn

import experiment
import ppo_continuous


class Policy(nn.Module):
    """Raw observations (N, D) to the most likely actions (N, A), as the environment takes them."""

    def __init__(self, agent: ppo_continuous.Agent):
        super().__init__()
        self.actor, self.squash, normaliser = agent.actor, agent.squash, agent.obs_normaliser
        self.clip = normaliser.clip if normaliser.enabled else torch.inf
        self.mean = nn.Buffer(normaliser.mean.float())
        self.std = nn.Buffer((normaliser.var + 1e-8).sqrt().float())
        box = (agent.centre, agent.half_width, agent.box.low, agent.box.high)
        self.centre, self.half_width, self.low, self.high = map(nn.Buffer, map(torch.tensor, box))

    def forward(self, obs: Tensor) -> Tensor:
        actions = self.actor(((obs - self.mean) / self.std).clamp(-self.clip, self.clip))
        actions = actions.tanh() if self.squash else actions
        return (self.centre + self.half_width * actions).clamp(self.low, self.high)


if __name__ == "__main__":
    folder = sys.argv[1]
    agent = experiment.load_agent(folder, ppo_continuous.Args, ppo_continuous.Agent)
    torch.onnx.export(
        Policy(agent).eval(),
        (torch.zeros(2, *agent.obs_shape),),
        f"{folder}/policy.onnx",
        input_names=["obs"],
        output_names=["actions"],
        dynamic_shapes=({0: torch.export.Dim("N")},),
        external_data=False,  # one file
        verbose=False,
    )
