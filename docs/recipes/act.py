"""Load a trained agent and play an episode with it.

Run it beside the scripts:
    python ppo_discrete.py --run-dir runs/mine
    python act.py runs/mine
"""

import json
import sys
from pathlib import Path

import gymnasium as gym

import experiment
import ppo_discrete

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    agent = experiment.load_agent(folder, ppo_discrete.Args, ppo_discrete.Agent)
    policy = agent.policy()  # made once: it copies the weights
    env = gym.make(json.loads((folder / "args.json").read_text())["env_id"])
    env = gym.wrappers.FlattenObservation(env)  # what the script does too
    obs, _ = env.reset(seed=1)
    score, over = 0.0, False
    while not over:
        action = agent.act(obs[None], {}, None, policy)[0]  # a batch of one; the most likely action
        obs, reward, terminated, truncated, _ = env.step(action)
        score, over = score + float(reward), terminated or truncated
    env.close()
    print(f"return {score}")
