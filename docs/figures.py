"""Draw the figures of the pages, from the shipped functions and the committed data in docs/data/.

    python docs/figures.py clip                             # assets/clip.svg
    python docs/figures.py trust-region [--measure]         # assets/trust-region.svg
    python docs/figures.py answer --run-dir runs/rlhf       # data/answer.csv, of a finished run
    python docs/figures.py tables                           # write the tables into the pages

`--measure` makes the data anew: it trains CartPole for some seconds and then takes one update
apart. `tables` rewrites what stands between <!-- table NAME --> and <!-- end --> in the pages.
"""

import csv
import functools
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

DATA, ASSETS = ROOT / "docs" / "data", ROOT / "docs" / "assets"
BLUE, RED, GREY = "#4477aa", "#cc3344", "#777777"


@dataclass
class Args:
    """Draw the figures and tables of the documentation."""

    what: tyro.conf.Positional[Literal["clip", "trust-region", "answer", "tables"]]
    measure: bool = False  # trust-region: make the data anew
    run_dir: Path = Path("runs/rlhf")  # answer: a finished run of ppo_rlhf_toy.py


def pyplot():
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams |= {"svg.hashsalt": "same file every time", "svg.fonttype": "none"}
    return plt


def save(figure, name: str) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    # A white ground keeps the axes readable on a dark page.
    figure.savefig(ASSETS / f"{name}.svg", facecolor="white", metadata={"Date": None})
    print(f"drawn: {ASSETS / name}.svg")


def clip() -> None:
    """Draw the surrogate of one sample over its ratio, for an advantage of 1 and of -1."""
    from ppo_discrete import clipped_surrogate

    eps = 0.2
    ratios = torch.linspace(0.0, 2.0, 401)
    figure, panels = pyplot().subplots(1, 2, figsize=(7.5, 2.9), layout="constrained")
    for axes, advantage in zip(panels, (1.0, -1.0)):
        surrogate = [clipped_surrogate(r, torch.tensor(advantage), eps).item() for r in ratios]
        axes.plot(ratios, ratios * advantage, "--", color=GREY, label="r A, unclipped")
        axes.plot(ratios, surrogate, color=BLUE, linewidth=2.5, label="clipped_surrogate")
        axes.plot([1.0], [advantage], "o", color=RED, label="start of the update, r = 1")
        for edge in (1.0 - eps, 1.0 + eps):
            axes.axvline(edge, color=GREY, linewidth=0.8, linestyle=":")
        sign = ">" if advantage > 0 else "<"
        axes.set(title=f"A {sign} 0", xlabel="ratio r", xticks=[0, 0.8, 1, 1.2, 2])
    panels[0].set_ylabel("objective of one sample")
    panels[0].legend(fontsize="small", framealpha=1, edgecolor="white")
    save(figure, "clip")


def measure_trust_region() -> None:
    """Train a little, take one update, and rate the straight way from the old policy on."""
    import ppo_discrete as ppo
    from gae import gae

    eps, T = 0.2, 64
    args = ppo.Args(total_timesteps=8192, seed=3, eval_episodes=1, run_dir=DATA / "run")
    agent, _ = ppo.train(args)
    envs = ppo.make_envs(args, args.num_envs)
    N = args.num_envs
    obs = np.zeros((T + 1, N, envs.single_observation_space.shape[0]), np.float32)
    actions, rewards = np.zeros((T, N, 1), np.int64), np.zeros((T, N), np.float32)
    terminated, done = np.zeros((T, N), bool), np.zeros((T + 1, N), bool)
    rng, policy, no_masks = np.random.default_rng(0), agent.policy(), agent.choices.no_masks
    obs[0], _ = envs.reset(seed=0)
    for t in range(T):
        actions[t] = policy(obs[t], no_masks, rng)
        step = envs.step(agent.choices.to_env(actions[t]))
        obs[t + 1], rewards[t], terminated[t], truncated, _ = step
        done[t + 1] = terminated[t] | truncated
    keep = torch.as_tensor(~done[:-1])
    s, a, r, end, over = map(torch.as_tensor, (obs, actions, rewards, terminated, done[1:]))
    masks = torch.as_tensor(no_masks)
    with torch.no_grad():
        values = agent.critic(s).squeeze(-1)
        old_log_probs = agent.log_prob_and_entropy(s[:-1], a, masks)[0][keep]
        old_log_pi = torch.log_softmax(agent.actor(s[:-1][keep]), -1)
    advantages, _ = gae(r, values[:-1], values[1:], end, over, args.gamma, args.gae_lambda)
    advantages = ppo.normalise(advantages[keep])
    s, a = s[:-1][keep], a[keep]

    old = [p.detach().clone() for p in agent.actor.parameters()]
    optimizer = torch.optim.Adam(agent.actor.parameters(), lr=args.learning_rate, eps=1e-5)
    for _ in range(args.update_epochs):
        for part in torch.randperm(len(s)).tensor_split(args.num_minibatches):
            log_probs, _ = agent.log_prob_and_entropy(s[part], a[part], masks)
            ratio = (log_probs - old_log_probs[part]).exp()
            loss = -ppo.clipped_surrogate(ratio, advantages[part], eps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    new = [p.detach().clone() for p in agent.actor.parameters()]

    with open(DATA / "trust-region.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["way", "surrogate", "clipped", "kl", "clipfrac"])
        for way in np.linspace(0.0, 4.0, 81):
            with torch.no_grad():
                for p, start, end_ in zip(agent.actor.parameters(), old, new):
                    p.copy_(start + way * (end_ - start))
                ratio = (agent.log_prob_and_entropy(s, a, masks)[0] - old_log_probs).exp()
                log_pi = torch.log_softmax(agent.actor(s), -1)
                kl = (old_log_pi.exp() * (old_log_pi - log_pi)).sum(-1).mean().item()
                surrogate = (ratio * advantages).mean().item()
                clipped = ppo.clipped_surrogate(ratio, advantages, eps).item()
                clipfrac = ((ratio - 1.0).abs() > eps).float().mean().item()
            writer.writerow([f"{x:.5g}" for x in (way, surrogate, clipped, kl, clipfrac)])
    for path in sorted((DATA / "run").glob("*")):
        path.unlink()
    (DATA / "run").rmdir()


def trust_region() -> None:
    with open(DATA / "trust-region.csv") as file:
        header, *rows = csv.reader(file)
    way, surrogate, clipped, kl, clipfrac = np.array(rows, float).T
    figure, panels = pyplot().subplots(1, 2, figsize=(7.5, 2.9), layout="constrained")
    panels[0].plot(way, surrogate, "--", color=GREY, label="mean r A")
    panels[0].plot(way, clipped, color=BLUE, linewidth=2.5, label="clipped_surrogate")
    panels[0].set_ylabel("objective of the batch")
    panels[1].plot(way, kl, color=RED, linewidth=2, label="KL(old, new), nats")
    panels[1].plot(way, clipfrac, color=GREY, label="clipfrac")
    for axes in panels:
        axes.axvline(1.0, color=GREY, linewidth=0.8, linestyle=":")
        axes.legend(fontsize="small", framealpha=1, edgecolor="white")
    figure.supxlabel("way from the old policy (0) through the new one (1)", fontsize="medium")
    save(figure, "trust-region")


@torch.no_grad()
def answer(run_dir: Path) -> None:
    """Let the policy of a run answer two prompts; write every token with what PPO makes of it."""
    import experiment
    import ppo_rlhf_toy as rlhf
    from gae import gae

    saved, args = experiment.load_checkpoint(run_dir, rlhf.Args)
    task = rlhf.TASKS[args.task]
    models = rlhf.Models(args, task, learned=task.learned)
    models.load_state_dict(saved["agent"])
    policy, reference = models.policy, models.reference
    texts = ["pool :", "staff bath :"]  # of different length, so that there is padding
    generator = torch.Generator().manual_seed(1)
    rollout = rlhf.answer(args, policy, texts, generator)
    prompts, responses = rollout.prompts, rollout.responses
    reward_fn = functools.partial(rlhf.read_scores, args, models.reward_model)
    scores = rlhf.score_answers(args, reward_fn, rollout)
    mask = rollout.mask
    log_probs, _, values = models.read(prompts, responses)
    ref_log_probs, _ = reference.log_prob_and_entropy(prompts, responses)
    values = torch.where(mask, values, 0.0)
    kl = rlhf.kl_penalty(log_probs, ref_log_probs, args.kl_estimator)
    rewards = rlhf.token_rewards(scores, kl, mask, args.kl_coef)
    ends = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    next_values = torch.nn.functional.pad(values[:, 1:], (0, 1))
    columns = (x.T for x in (rewards, values, next_values, ends, ends))
    advantages, returns = (x.T for x in gae(*columns, args.gamma, args.gae_lambda))

    words = task.tokenizer.words
    header = "answer token attention_mask action_mask log_prob ref_log_prob kl reward value return "
    with open(DATA / "answer.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*header.split(), "advantage"])
        for i in range(len(texts)):
            for token in prompts[i].tolist():
                writer.writerow([i, words[token], int(token != task.tokenizer.pad), 0] + [""] * 7)
            for t, token in enumerate(responses[i].tolist()):
                row = (log_probs, ref_log_probs, kl, rewards, values, returns, advantages)
                cells = [f"{x[i, t].item():.3f}" if mask[i, t] else "" for x in row]
                seen = int(token != task.tokenizer.pad)
                writer.writerow([i, words[token], seen, int(mask[i, t]), *cells])
    print(f"written: {DATA / 'answer.csv'}, scores {scores.tolist()}")


def answer_table() -> str:
    with open(DATA / "answer.csv") as file:
        header, *rows = csv.reader(file)
    header = [name.replace("_", " ") for name in header]
    lines = [f"| {' | '.join(header)} |", "|---|---|" + "---:|" * (len(header) - 2)]
    for row in rows:
        cells = [f"`{cell}`" if i == 1 else cell for i, cell in enumerate(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """Return the tables that pages hold, by name, from the committed data."""
    from benchmarks import pitfalls

    # Over tasks whose rewards differ in size, ranges of these would exclude nothing.
    left_out = tuple(f"| `losses/{x}`" for x in ("value_loss", "grad_norm", "explained_variance"))
    ranges = [row for row in pitfalls.ranges().split("\n") if not row.startswith(left_out)]
    return {
        "ranges": "\n".join(ranges),
        "outcomes": pitfalls.outcomes(),
        "answer": answer_table(),
    }


def main() -> None:
    args = tyro.cli(Args)
    if args.what == "clip":
        clip()
    elif args.what == "trust-region":
        if args.measure:
            measure_trust_region()
        trust_region()
    elif args.what == "answer":
        answer(args.run_dir)
    else:
        ready = tables()
        for page in sorted((ROOT / "docs").glob("en/*.md")):  # the words of the others are theirs
            text = page.read_text()
            for name, table in ready.items():
                pattern = rf"(<!-- table {name} -->\n)(.*?)(\n<!-- end -->)"
                text = re.sub(pattern, lambda m, t=table: m[1] + t + m[3], text, flags=re.DOTALL)
            page.write_text(text)


if __name__ == "__main__":
    main()
