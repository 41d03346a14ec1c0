"""How near a policy of ppo_rlhf_toy.py is to the best one, which is known in closed form.

    python -m benchmarks.rlhf_optimum runs/<folder>    # of a finished run

The best policy for score - beta KL is pi* = pi_ref exp(score / beta) / Z, and its J is
J* = E_prompt[beta log Z], Z = E_ref[exp(score / beta)].
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import experiment
import ppo_rlhf_toy as rlhf


@torch.no_grad()
def rate(args: rlhf.Args, sampler, models: tuple, reward_fn, texts: list[str], generator) -> Tensor:
    """Return scores of a model's answers, and their log pi under each of the models: (1 + N, B)."""
    parts = []
    size = args.micro_batch_size
    for i in range(0, len(texts), size):
        rollout = rlhf.answer(args, sampler, texts[i : i + size], generator)
        read = (rollout.prompts, rollout.responses)
        densities = [model.log_prob_and_entropy(*read)[0] for model in models]
        log_pi = [torch.where(rollout.mask, x, 0.0).sum(1) for x in densities]
        parts.append(torch.stack([rlhf.score_answers(args, reward_fn, rollout), *log_pi]))
    return torch.cat(parts, dim=1)


def known_optimum(
    args: rlhf.Args, task: rlhf.Task, policy, reference, reward_fn, prompts: int = 64
) -> tuple[float, float]:
    """Return the share of the way to the optimum, and KL(policy, pi*) in nats an answer.

    The share is (J(policy) - J(reference)) / (J* - J(reference)), J = E[score - beta KL]. The KL is
    (J* - J(policy)) / beta. The reference hardly ever samples what the best policy prefers, so half
    the samples for Z are the policy's (importance sampling).
    """
    beta, (rng, generator) = args.kl_coef, rlhf.streams(args, 5, policy.head.weight.device)
    texts = [x for x in task.prompts(prompts, rng, held_out=True) for _ in range(32)]
    rows = [
        rate(args, model, (policy, reference), reward_fn, texts, generator)
        for model in (policy, reference)
    ]
    # Each (prompts, 64): a row for each prompt, the policy's 32 samples before the reference's.
    score, log_pi, log_ref = torch.cat([x.view(3, prompts, 32) for x in rows], dim=2)
    log_mixture = torch.logaddexp(log_pi, log_ref) - np.log(2.0)
    log_z = (log_ref - log_mixture + score / beta).logsumexp(1) - np.log(64.0)
    reached = (score - beta * (log_pi - log_ref))[:, :32].mean()
    start, best = score[:, 32:].mean(), beta * log_z.mean()
    return ((reached - start) / (best - start)).item(), ((best - reached) / beta).item()


def load(folder: Path) -> tuple[rlhf.Args, rlhf.Task, rlhf.Models]:
    """Return the flags, the task and the models of a run."""
    saved, args = experiment.load_checkpoint(folder, rlhf.Args)
    task = rlhf.TASKS[args.task]  # a folder's own task is not imported
    models = rlhf.Models(args, task, learned=task.learned)
    models.load_state_dict(saved["agent"])
    torch.set_num_threads(1)
    return args, task, models


def optimum_of(folder: Path) -> tuple[float | None, float | None]:
    """Return what `known_optimum` says of a finished run, None if its beta had no optimum."""
    args, task, models = load(folder)
    if args.kl_coef == 0.0:
        return None, None
    score = task.gold_scores
    if task.learned:
        score = partial(rlhf.read_scores, args, models.reward_model)
    return known_optimum(args, task, models.policy, models.reference, score)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        share, kl = optimum_of(Path(name))
        print(f"{name}: share of the optimum {share}, KL(policy, pi*) {kl}")
