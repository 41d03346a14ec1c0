"""Log a run of ppo_discrete.py to Weights & Biases, without a network: `wandb sync` uploads it.

Run it beside the scripts:
    pip install wandb
    python track_wandb.py

Other trackers go into the same two places.
"""

import wandb

import ppo_discrete

if __name__ == "__main__":
    args = ppo_discrete.Args(env_id="CartPole-v1")
    with wandb.init(project="ppo", config=vars(args), mode="offline") as tracker:

        def on_iteration(step: int, metrics: dict[str, float]) -> None:
            tracker.log({name: x for name, x in metrics.items() if x == x}, step=step)  # no NaN

        _, results = ppo_discrete.train(args, on_iteration=on_iteration)
        tracker.summary.update(results)
