# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "numpy", "tensorboard", "tyro", "tqdm"]
# ///
"""PPO for language models: the whole RLHF pipeline in one file, read top to bottom.

    python ppo_rlhf_toy.py                      # gold .45 -> .97 in about a minute on one CPU core
    python ppo_rlhf_toy.py --task arithmetic    # accuracy .49 -> .94 by a verifiable reward

`train` runs three stages, each a function, and saves the four models that they make:
    sft                 the policy learns from demonstrations; a frozen copy is the reference
    train_reward_model  a copy with a scalar head learns from noisy preferences over SFT answers
    ppo                 policy and value model learn to earn score - beta KL(policy, reference)
One iteration of `ppo`:
    [1] Rollout     the policy answers B prompts, token by token
    [2] Score       the reward function rates each answer, leaving the reference costs each token
    [3] Advantages  the value model values every token, GAE turns rewards into advantages
    [4] Update      K epochs of shuffled minibatches on the clipped surrogate and the value loss
    [5] Log         means over the iteration, to TensorBoard, metrics.csv and the terminal

Shapes: B answers of an iteration, P tokens of the longest prompt, R of the longest response, V
vocabulary, M tokens of a minibatch. A token is an action, an answer an episode. Prompts are padded
on the left, responses on the right, so that all responses begin in the same column.

Papers: PPO (Schulman et al. 2017, arXiv 1707.06347); RLHF (Ziegler et al. 2019, 1909.08593);
GRPO (Shao et al. 2024, 2402.03300). "N details" is "The N Implementation Details of RLHF with PPO"
(Huang et al. 2023), which are not numbered through.
"""

import copy
import dataclasses
import io
import json
import os
import pickle
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from gae import gae

PAD, EOS = 0, 1  # not one token: a mask of the padding would hide the end of the answer (N details)
# Takes prompts and responses, texts without <eos>, and returns one score a pair: yours fits in too.
RewardFunction = Callable[[list[str], list[str]], list[float]]
Log = Callable[[int, dict[str, float]], None]  # takes a step and its metrics


class UserError(ValueError):
    """A flag, a file or a number to mend: one line on the command line, no traceback."""


@dataclasses.dataclass
class Args:
    """Train the four models of RLHF, PPO last, and evaluate the policy."""

    task: str = "reviews"  # reviews (learned reward model) or arithmetic (verifiable reward)
    seed: int = 1  # seed of the data, the first weights, the sampling and the shuffling
    run_dir: Path | None = None  # default: runs/<task>__ppo_rlhf_toy__<seed>__<time>
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda only if the network is wide
    num_threads: int = 1  # PyTorch's CPU threads; more help wide networks only
    load_sft: Path | None = None  # skip stage 1: sft.pt of an earlier run
    load_reward_model: Path | None = None  # skip stage 2: reward_model.pt of an earlier run
    checkpoint_every: int = (
        10  # iterations of PPO between checkpoints; one more at the end or Ctrl-C
    )
    resume: Path | None = None  # go on with the run in this folder, with its arguments
    evaluate: Path | None = None  # only evaluate the run in this folder
    eval_prompts: int = 1024  # prompts of the final evaluation, in arithmetic none trained on

    num_layers: int = 2  # of each of the four transformers
    num_heads: int = 4  # attention heads
    d_model: int = 64  # width
    context_size: int = 32  # tokens of the longest prompt and response together
    max_new_tokens: int = 24  # a response is cut off here

    sft_steps: int = 500  # updates of stage 1; arithmetic: ten times as many at most
    sft_accuracy: float = 0.46  # arithmetic: accuracy at training prompts at which stage 1 ends
    sft_batch_size: int = 64  # demonstrations in an update
    sft_learning_rate: float = 3e-3  # falls linearly to 0
    rm_pairs: int = 2048  # pairs of answers, one preferred to the other
    rm_epochs: int = 3  # passes over the pairs
    rm_batch_size: int = 32  # pairs in an update
    rm_learning_rate: float = 2e-3  # falls linearly to 0
    rm_min_accuracy: float = 0.8  # PPO does not start below, counted on held-out pairs

    learning_rate: float = 2e-3  # PPO: Adam's learning rate at the start
    anneal_lr: bool = True  # let the learning rate fall linearly to 0 (N details)
    warmup_iterations: int = 10  # before, let it rise linearly from 0
    num_iterations: int | None = None  # rollouts, each with its update; default 40, arithmetic 120
    batch_size: int | None = None  # B, answers in a rollout; default 128, arithmetic 512
    update_epochs: int | None = None  # K, passes over the batch; default 4, arithmetic 2
    num_minibatches: int = 4  # minibatches in an epoch
    temperature: float = 1.0  # divides the logits wherever an answer is sampled or rated
    kl_coef: float = 0.1  # beta, the price of a nat of KL(policy, reference)
    ref_kl_target: float | None = None  # adapt beta until an answer's KL is this, in nats
    kl_horizon: int = 500  # answers in which the adaptive beta moves by a fifth at most
    # What a token pays, of l = log pi - log pi_ref: k1 = l, k2 = l^2 / 2, k3 = exp(-l) - 1 + l.
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    missing_eos_penalty: float = 1.0  # taken from the score of an answer that was cut off
    value_init: Literal["reward", "policy"] = "reward"  # policy also where no reward model is
    # group: no value model but the mean of several answers to the prompt, as in GRPO.
    baseline: Literal["critic", "group"] = "critic"
    group_size: int = 8  # group: answers to each prompt
    # token: what is earned from the token on; response: what the whole answer earns, for each.
    credit: Literal["token", "response"] = "token"
    whiten_rewards: bool = False  # bring rewards to standard deviation 1, their mean unmoved
    gamma: float = 1.0  # discount factor; no part in --credit response
    gae_lambda: float = 0.95  # 0 trusts the critic, 1 the rewards, as --baseline group does
    clip_coef: float = 0.2  # epsilon: moving the ratio further than this from 1 earns nothing
    clip_vloss: bool = True  # clip the value loss by clip_coef too (N details)
    ent_coef: float = 0.0  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 1.0  # the gradient's global norm is clipped to this

    def check(self) -> None:
        """Raise `UserError` for a value or a combination that cannot work."""
        counts = "num_threads eval_prompts num_layers num_heads d_model max_new_tokens sft_steps"
        more_counts = "sft_batch_size rm_pairs rm_epochs rm_batch_size num_iterations batch_size"
        of_ppo = "checkpoint_every warmup_iterations update_epochs num_minibatches kl_horizon"
        rates = "learning_rate sft_learning_rate rm_learning_rate temperature ref_kl_target"
        for names, low, high, rule in (
            (counts, 1, np.inf, "must be at least 1"),
            (more_counts, 1, np.inf, "must be at least 1"),
            (of_ppo, 1, np.inf, "must be at least 1"),
            ("group_size", 2, np.inf, "must be at least 2"),
            ("seed kl_coef missing_eos_penalty ent_coef", 0, sys.maxsize, "must not be negative"),
            ("gamma gae_lambda sft_accuracy rm_min_accuracy", 0, 1, "must lie in [0, 1]"),
            (rates, 1e-99, 1e99, "must be > 0"),
            ("clip_coef vf_coef max_grad_norm", 1e-99, 1e99, "must be > 0"),
        ):
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not low <= value <= high:
                    raise UserError(f"--{name.replace('_', '-')} {value} {rule}")
        if self.task not in TASKS:
            raise UserError(f"--task {self.task} is unknown: choose {' or '.join(TASKS)}")
        task = TASKS[self.task]
        # A reward model reads one token more: the EOS that a cut-off answer lacks.
        room = self.context_size - self.max_new_tokens - task.learned
        copies = self.group_size if self.baseline == "group" else 1
        batch, folder = self.batch_size or task.batch_size, self.resume or self.evaluate
        for wrong, message in (
            (task.prompt_size > room, f"context-size {self.context_size} less --max-new-tokens "
             f"{self.max_new_tokens} is too short for prompts of {task.prompt_size} tokens"),
            (self.d_model % self.num_heads, f"d-model {self.d_model} must divide by --num-heads"),
            (batch % copies, f"batch-size {batch} must divide by --group-size {copies}"),
            (batch < self.num_minibatches, f"num-minibatches exceeds --batch-size {batch}"),
            (self.load_reward_model and not task.learned, f"load-reward-model: not in {self.task}"),
            (self.ref_kl_target and not self.kl_coef, "ref-kl-target needs --kl-coef above 0"),
            (folder and self.run_dir not in (None, folder), f"run-dir {self.run_dir}: the run "
             f"stays in its folder, {folder}"),
            (self.device == "cuda" and not torch.cuda.is_available(), "device cuda: none found"),
        ):  # fmt: skip
            if wrong:
                raise UserError("--" + message)


class Task:
    """Words, prompts, demonstrations, and `gold`, the true worth of an answer in [0, 1]."""

    words: tuple[str, ...]  # the vocabulary after <pad> and <eos>
    separator = " "  # stands between the words of a text
    prompt_size: int  # tokens of the longest prompt
    learned: bool  # whether PPO sees a reward model's scores, or gold itself
    batch_size, num_iterations, update_epochs = 128, 40, 4  # of PPO, where the user names none

    def encode(self, text: str) -> list[int]:
        words = text.split(self.separator) if self.separator and text else text
        try:
            return [2 + self.words.index(word) for word in words]
        except ValueError as error:
            raise UserError(f"{text!r} holds a word that the vocabulary lacks") from error

    def decode(self, responses: Tensor) -> list[str]:
        """Return the texts of responses (B, R), each up to its <eos>."""
        rows = responses.tolist()
        return [self.separator.join(self.words[t - 2] for t in row if t > EOS) for row in rows]

    def gold_scores(self, prompts: list[str], responses: list[str]) -> list[float]:
        return list(map(self.gold, prompts, responses))


class Reviews(Task):
    """Review each noun of "pool view :"; gold is the share of praise, 0 for a noun left out."""

    nouns = tuple("food service room staff music view bed coffee pool price garden bath".split())
    good = tuple("good great lovely superb fine perfect charming clean warm".split())
    bad = tuple("bad awful dirty cold dull horrible poor noisy broken".split())
    adverbs = tuple("very really quite rather".split())
    rest = tuple(": the was and but . i would gladly never return".split())
    words = (*rest, *nouns, *good, *bad, *adverbs)
    prompt_size, learned = 4, True
    samples = ("pool :", "staff bath :", "view food music :", "price garden coffee :")
    clause = f"the ({'|'.join(nouns)}) was (?:(?:{'|'.join(adverbs)}) )?({'|'.join(good + bad)})"
    closing = r" \. i would (gladly|never) return"
    grammar = re.compile(rf"{clause}(?: (?:and|but) {clause})*(?:{closing})? \.")

    def prompts(self, count: int, rng: np.random.Generator, held_out: bool = False) -> list[str]:
        # There are only 1,464: none is held out, a fresh one was seen before.
        named = (rng.permutation(self.nouns)[: rng.integers(1, 4)] for _ in range(count))
        return [" ".join((*nouns, ":")) for nouns in named]

    def demonstration(self, prompt: str, rng: np.random.Generator) -> str:
        text, praise = "", rng.random(4) < 0.5
        for i, noun in enumerate(prompt.split()[:-1]):
            text += (" and " if praise[i] == praise[i - 1] else " but ") if i else ""
            adverb = f"{rng.choice(self.adverbs)} " if rng.random() < 0.4 else ""
            text += f"the {noun} was {adverb}{rng.choice(self.good if praise[i] else self.bad)}"
        closing = f" . i would {'gladly' if praise[: i + 1].mean() > 0.5 else 'never'} return"
        return text + (closing if rng.random() < 0.3 else "") + " ."

    def grammatical(self, response: str) -> bool:
        return self.grammar.fullmatch(response) is not None

    def gold(self, prompt: str, response: str) -> float:
        clauses = re.findall(self.clause, response)
        named = {noun for noun, _ in clauses}
        if not self.grammatical(response) or not named >= set(prompt.split()[:-1]):
            return 0.0
        praise = [adjective in self.good for _, adjective in clauses]
        praise += [word == "gladly" for word in re.findall(self.closing, response)]
        return sum(praise) / len(praise)


class Arithmetic(Task):
    """Answer "27+8=": what can be checked needs no reward model."""

    words, separator = tuple("0123456789+="), ""
    prompt_size, learned = 6, False
    batch_size, num_iterations, update_epochs = 512, 120, 2  # answers are short
    samples = ("2+2=", "27+8=", "46+39=", "95+87=")

    def prompts(self, count: int, rng: np.random.Generator, held_out: bool = False) -> list[str]:
        pairs = rng.integers(0, 100, (10 * count + 100, 2)).tolist()  # a seventh is held out
        return [f"{a}+{b}=" for a, b in pairs if held_out == ((a + 3 * b) % 7 == 0)][:count]

    def demonstration(self, prompt: str, rng: np.random.Generator | None = None) -> str:
        return str(sum(map(int, prompt[:-1].split("+"))))

    def grammatical(self, response: str) -> bool:
        return re.fullmatch("0|[1-9][0-9]*", response) is not None

    def gold(self, prompt: str, response: str) -> float:
        return float(response == self.demonstration(prompt))


TASKS: dict[str, Task] = {"reviews": Reviews(), "arithmetic": Arithmetic()}


class Block(nn.Module):
    """Attention, then a two-layer perceptron; each normalises its input and adds to it."""

    def __init__(self, d_model: int, num_heads: int, context_size: int):
        super().__init__()
        self.num_heads, self.context_size = num_heads, context_size
        self.norm_1, self.norm_2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        wide, narrow = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)
        self.mlp = nn.Sequential(wide, nn.ReLU(), narrow)

    def forward(self, x: Tensor, visible: Tensor, cache: list[Tensor] | None) -> Tensor:
        """Take and return (B, S, D); `cache` holds the keys and values of the tokens so far."""
        (B, S, D), total = x.shape, visible.shape[-1]
        qkv = self.qkv(self.norm_1(x)).view(B, S, 3, self.num_heads, D // self.num_heads)
        q, *past = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, S, D / heads)
        if cache is not None:
            if not cache:  # room for the whole context at once: to append would copy all each time
                cache += [new.new_empty(B, self.num_heads, self.context_size, D // self.num_heads)
                          for new in past]  # fmt: skip
            for room, new in zip(cache, past):
                room[:, :, total - S : total] = new
            past = [room[:, :, :total] for room in cache]
        x = x + self.out(
            F.scaled_dot_product_attention(q, *past, visible).transpose(1, 2).reshape(B, S, D)
        )
        return x + self.mlp(self.norm_2(x))


class Transformer(nn.Module):
    """A small GPT-2: pre-LN and learned positions; no dropout, which would move the ratio from 1.

    Its head gives a logit a word (policy, reference) or one number (value, reward model).
    """

    def __init__(self, config: dict[str, int]):
        super().__init__()
        self.config, d_model = config, config["d_model"]
        self.word = nn.Embedding(config["vocab_size"], d_model)
        self.position = nn.Embedding(config["context_size"], d_model)
        sizes = (d_model, config["num_heads"], config["context_size"])
        blocks = (Block(*sizes) for _ in range(config["num_layers"]))
        self.blocks, self.norm = nn.ModuleList(blocks), nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, config["head_size"])
        if config["head_size"] == 1:  # N(0, 1 / (d + 1)) (N details)
            nn.init.normal_(self.head.weight, std=(d_model + 1) ** -0.5)
            nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor, cache: list | None = None) -> Tensor:
        """Take tokens (B, S), padded anywhere, to the head's output (B, S, head).

        With `cache`, [] at first, the tokens follow those of the last call: what earlier ones
        computed stands, for none of them sees a later one.
        """
        caches = [None if cache is None else [] for _ in self.blocks]
        past, caches = cache or (tokens[:, :0], caches)
        seen = torch.cat([past, tokens], dim=1)
        real, S, total = seen != PAD, tokens.shape[1], seen.shape[1]
        # Positions count real tokens, so that left padding moves nothing (N details).
        positions = (real.cumsum(1) - 1).clamp(min=0)[:, -S:]
        column = torch.arange(total, device=tokens.device)
        row = column[-S:, None]
        # Padding in front sees itself alone, for a softmax over nothing is NaN; no word sees it.
        visible = ((real[:, None] & (column < row)) | (column == row))[:, None]  # (B, 1, S, total)
        x = self.word(tokens) + self.position(positions)
        for block, block_cache in zip(self.blocks, caches):
            x = block(x, visible, block_cache)
        if cache is not None:
            cache[:] = seen, caches
        return self.head(self.norm(x))

    def log_prob_and_entropy(
        self, prompts: Tensor, responses: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Return log pi of the response tokens and the policy's entropy in nats, both (B, R)."""
        log_pi = log_softmax(self.before(prompts, responses), temperature)  # (B, R, V)
        log_probs = log_pi.gather(-1, responses.unsqueeze(-1)).squeeze(-1)
        return log_probs, -(log_pi.exp() * log_pi).sum(-1)

    def value(self, prompts: Tensor, responses: Tensor) -> Tensor:
        """Return V(s) before each response token, (B, R)."""
        return self.before(prompts, responses).squeeze(-1)

    def before(self, prompts: Tensor, responses: Tensor) -> Tensor:
        """Return the head's output (B, R, head) one position before each response token."""
        return self(torch.cat([prompts, responses], dim=1))[:, prompts.shape[1] - 1 : -1]


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Return log pi (..., V); the same temperature everywhere, or no ratio is 1 (N details)."""
    logits = logits / temperature
    logits[..., PAD] = -1e9  # padding is no action
    return F.log_softmax(logits, dim=-1)


def resolve_device(args: Args) -> torch.device:
    """Return the device that `args` ask for."""
    auto_device = "cuda" if args.d_model >= 512 and torch.cuda.is_available() else "cpu"
    return torch.device(auto_device if args.device == "auto" else args.device)


def make_model(args: Args, task: Task, scalar: bool, trunk: Transformer | None = None):
    """Make a transformer with a scalar or a word head, on new weights or a copy of `trunk`'s."""
    names = ("context_size", "d_model", "num_layers", "num_heads")
    sizes = {"vocab_size": 2 + len(task.words), "head_size": 1 if scalar else 2 + len(task.words)}
    model = Transformer({name: getattr(args, name) for name in names} | sizes)
    if trunk is not None:
        weights = {k: v for k, v in trunk.state_dict().items() if not k.startswith("head")}
        model.load_state_dict(weights, strict=False)
    return model.to(resolve_device(args))


def streams(args: Args, stage: int) -> tuple[np.random.Generator, torch.Generator]:
    """Seed a stage's first weights; return its random numbers for the data and for the sampling.

    Stages share none, so PPO is the same to the last bit after an SFT that was trained or loaded.
    """
    seeds = (np.random.SeedSequence((args.seed, stage)).generate_state(3) >> 2).tolist()
    torch.manual_seed(seeds[0])
    generator = torch.Generator(resolve_device(args)).manual_seed(seeds[1])
    return np.random.default_rng(seeds[2]), generator


def pad(sequences: list[list[int]], left: bool, args: Args) -> Tensor:
    """Return one block (B, longest) of token sequences, padded on the left or the right."""
    longest = max(map(len, sequences))
    fills = [[PAD] * (longest - len(sequence)) for sequence in sequences]
    rows = [fill + row if left else row + fill for fill, row in zip(fills, sequences)]
    return torch.tensor(rows, device=resolve_device(args))


@torch.no_grad()
def generate(
    args: Args, policy: Transformer, prompts: Tensor, generator: torch.Generator | None, cached=True
) -> tuple[Tensor, Tensor]:
    """Answer prompts (B, P): tokens (B, R), EOS the last and PAD after it, and their log pi (B, R).

    Samples from all words (top-k 0 and top-p 1, N details); without `generator`, the likeliest.
    """
    tokens, log_probs, cache = prompts, [], [] if cached else None
    running = torch.ones_like(prompts[:, :1], dtype=torch.bool)  # (B, 1)
    for _ in range(args.max_new_tokens):
        new = tokens[:, -1:] if cache else tokens  # the cache knows the rest
        log_pi = log_softmax(policy(new, cache)[:, -1], args.temperature)
        if generator is None:
            token = log_pi.argmax(-1, keepdim=True)
        else:
            token = torch.multinomial(log_pi.exp(), 1, generator=generator)  # (B, 1)
        log_probs.append(torch.where(running, log_pi.gather(-1, token), 0.0))
        tokens = torch.cat([tokens, torch.where(running, token, PAD)], dim=1)
        running = running & (token != EOS)
        if not running.any():
            break
    return tokens[:, prompts.shape[1] :], torch.cat(log_probs, dim=1)


def answer(
    args: Args, task: Task, policy: Transformer, texts: list[str], generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the prompts (B, P) of texts, the policy's responses and their log pi, both (B, R)."""
    prompts = pad([task.encode(text) for text in texts], True, args)
    if prompts.shape[1] + args.max_new_tokens > args.context_size:
        raise UserError(
            f"a prompt of {prompts.shape[1]} tokens does not fit: --context-size "
            f"{args.context_size} less --max-new-tokens {args.max_new_tokens}"
        )
    parts = [generate(args, policy, part, generator) for part in prompts.split(512)]
    longest = max(part.shape[1] for part, _ in parts)
    responses, log_probs = (
        torch.cat([F.pad(x, (0, longest - x.shape[1])) for x in xs]) for xs in zip(*parts)
    )
    return prompts, responses, log_probs


def action_mask(responses: Tensor) -> Tensor:
    """Return which of (B, R) are actions: all but the padding. EOS is one: ending is a choice."""
    return responses != PAD


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return -mean(log P) over pairs, P = sigmoid(chosen - rejected) that the judge chose so."""
    return -F.logsigmoid(chosen - rejected).mean()


def read_scores(
    args: Args, task: Task, model: Transformer, prompts: list[str], responses: list[str]
) -> Tensor:
    """Return a reward model's scores (B,) of texts: its output at EOS (N details)."""
    pairs = zip(prompts, responses)
    tokens = pad([[*task.encode(p), *task.encode(r), EOS] for p, r in pairs], True, args)
    return model(tokens)[:, -1, 0]  # padding on the left puts every EOS last


def learned_reward(args: Args, task: Task, model: Transformer) -> RewardFunction:
    """Return a reward model as a function of texts."""
    return lambda texts, answers: read_scores(args, task, model, texts, answers).tolist()


def score_answers(
    args: Args, task: Task, reward_fn: RewardFunction, texts: list[str], responses: Tensor
) -> Tensor:
    """Return scores (B,) of responses (B, R): the reward, less a penalty where EOS is missing.

    Raises `UserError` if `reward_fn` does not return one finite number an answer.
    """
    rewards = reward_fn(texts, task.decode(responses))
    try:
        scores = torch.as_tensor(rewards, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the reward function gave no list of numbers: {error}") from error
    scores = scores.to(responses.device)
    if scores.shape != (len(texts),):
        shape = tuple(scores.shape)
        raise UserError(f"the reward function gave scores {shape} to {len(texts)} answers")
    if not scores.isfinite().all():
        text = texts[int(scores.isfinite().int().argmin())]
        raise UserError(f"the reward function gave a NaN or infinity to an answer to {text!r}")
    return scores - args.missing_eos_penalty * (responses != EOS).all(1)


def kl_penalty(log_probs: Tensor, ref_log_probs: Tensor, estimator: str) -> Tensor:
    """Return an estimate of KL(policy, reference) in nats from each sampled token, (B, R).

    k1 is right on average, and so is the gradient of the KL if k1 is the reward. k2 and k3
    (Schulman 2020) are never negative and vary less, but as rewards they pull elsewhere.
    """
    log_ratio = log_probs - ref_log_probs
    if estimator == "k2":
        return log_ratio.square() / 2.0
    return log_ratio if estimator == "k1" else (-log_ratio).exp() - 1.0 + log_ratio


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Return -beta KL of each token, plus the score on an answer's last action, its EOS: (B, R)."""
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    return rewards.scatter_add(1, mask.sum(1, keepdim=True) - 1, scores[:, None])


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Return `x` brought to standard deviation 1, and mean 0 if asked, under the mask; 0 elsewhere.

    Rewards keep their mean m (N details): one of 0 becomes m - m / std, and else would be -m / std.
    """
    mean, std = x[mask].mean(), x[mask].std()
    return torch.where(mask, (x - mean) / (std + 1e-8) + (0.0 if shift_mean else mean), 0.0)


def adapt_kl_coef(kl_coef: float, kl: float, target: float, answers: int, horizon: int) -> float:
    """Return beta, moved in proportion to the KL's relative error (Ziegler et al. 2019, 2.2)."""
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * min(answers / horizon, 1.0))


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """Return mean(min(r A, clip(r, 1 - eps, 1 + eps) A)) over (M,), to be maximised (PPO eq. 7).

    The min is pessimistic: beyond the range a good move earns no more, a bad one still costs.
    """
    clipped = ratio.clamp(1.0 - clip_coef, 1.0 + clip_coef)
    return torch.min(ratio * advantages, clipped * advantages).mean()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """Return mean((V - returns)^2) / 2 over (M,).

    With `clip`, the larger of that error and the one with V held within `clip` of its old value.
    """
    errors = (values - returns).square()
    if clip is not None:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        errors = torch.max(errors, (clipped - returns).square())
    return 0.5 * errors.mean()


def diagnostics(log_ratio: Tensor, clip_coef: float) -> tuple[float, float]:
    """Return approx_kl, which is KL(old, new) in nats, and the share of ratios out of the range."""
    ratio = log_ratio.exp()
    outside = (ratio - 1.0).abs() > clip_coef
    return (ratio - 1.0 - log_ratio).mean().item(), outside.float().mean().item()


def steps_of(stage: str, steps: int, stop: threading.Event | None) -> Iterator[int]:
    """Count a stage's steps behind a progress bar; Ctrl-C here ends the run."""
    for step in tqdm(range(steps), stage, disable=None):
        if stop is not None and stop.is_set():
            raise UserError(f"stopped in the stage {stage}, before there is a policy to evaluate")
        yield step


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, args: Args) -> Tensor:
    """Take one step down the loss; return the norm that the gradient had before it was clipped."""
    optimizer.zero_grad()
    loss.backward()
    parameters = optimizer.param_groups[0]["params"]
    grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
    optimizer.step()
    return grad_norm


def sft(args: Args, task: Task, log: Log, stop: threading.Event | None = None) -> Transformer:
    """Stage 1, supervised fine-tuning: return a model that imitates demonstrations, frozen.

    Where gold can be checked, it ends at `sft_accuracy`, so that something is left to PPO.
    """
    rng, generator = streams(args, 1)
    model = make_model(args, task, scalar=False)
    optimizer = torch.optim.Adam(model.parameters(), eps=1e-5, fused=True)
    steps = args.sft_steps if task.learned else 10 * args.sft_steps
    for step in steps_of("SFT", steps, stop):
        optimizer.param_groups[0]["lr"] = args.sft_learning_rate * (1.0 - step / steps)
        texts = task.prompts(args.sft_batch_size, rng)
        prompts = pad([task.encode(text) for text in texts], True, args)
        demonstrations = [[*task.encode(task.demonstration(text, rng)), EOS] for text in texts]
        responses = pad(demonstrations, False, args)
        if (size := prompts.shape[1] + responses.shape[1]) > args.context_size:
            raise UserError(f"--context-size {args.context_size}: a demonstration takes {size}")
        log_probs, _ = model.log_prob_and_entropy(prompts, responses, 1.0)
        loss = -log_probs[action_mask(responses)].mean()
        descend(optimizer, loss, args)
        if step % 25 == 24:
            metrics = {"sft/loss": loss.item()}
            if not task.learned:
                texts = task.prompts(512, rng)
                responses = answer(args, task, model, texts, generator)[1]
                gold = task.gold_scores(texts, task.decode(responses))
                metrics["sft/accuracy"] = float(np.mean(gold))
            log(step + 1, metrics)
            if metrics.get("sft/accuracy", 0.0) > args.sft_accuracy:
                break
    return model.requires_grad_(False)


def train_reward_model(
    args: Args, task: Task, reference: Transformer, log: Log, stop: threading.Event | None = None
) -> tuple[Transformer, dict[str, float]]:
    """Stage 2: return a model of the judge's taste, frozen, and its accuracy and correlation.

    The judge prefers a to b with probability sigmoid(10 (gold of a - gold of b)) and skips ties.
    Raises `UserError` below `rm_min_accuracy`: PPO would find the model's faults and nothing else.
    """
    rng, generator = streams(args, 2)
    model = make_model(args, task, scalar=True, trunk=reference)
    held_out = max(args.rm_pairs // 4, 16)
    texts = task.prompts(2 * (args.rm_pairs + held_out), rng)  # some ties will go
    answers = task.decode(answer(args, task, reference, texts * 2, generator)[1])
    pairs = []  # of prompt, chosen answer, rejected answer
    for text, a, b in zip(texts, answers, answers[len(texts) :]):
        margin = task.gold(text, a) - task.gold(text, b)
        if margin != 0.0:
            prefers_a = rng.random() < 1.0 / (1.0 + np.exp(-10.0 * margin))
            pairs.append((text, a, b) if prefers_a else (text, b, a))
    if len(pairs) < 2 * held_out:
        raise UserError(f"the judge could tell only {len(pairs)} pairs apart: raise --sft-steps")
    test, pairs = pairs[:held_out], pairs[held_out:][: args.rm_pairs]

    def compare(some: list[tuple[str, str, str]]) -> tuple[Tensor, Tensor]:
        texts, chosen, rejected = map(list, zip(*some))
        return read_scores(args, task, model, texts * 2, chosen + rejected).chunk(2)

    optimizer = torch.optim.Adam(model.parameters(), eps=1e-5, fused=True)
    orders = (torch.as_tensor(rng.permutation(len(pairs))) for _ in range(args.rm_epochs))
    batches = [batch for order in orders for batch in order.split(args.rm_batch_size)]
    for step in steps_of("reward model", len(batches), stop):
        optimizer.param_groups[0]["lr"] = args.rm_learning_rate * (1.0 - step / len(batches))
        loss = bradley_terry_loss(*compare([pairs[i] for i in batches[step].tolist()]))
        descend(optimizer, loss, args)
        if step % 25 == 24:
            log(step + 1, {"reward_model/loss": loss.item()})
    model.requires_grad_(False)
    chosen, rejected = compare(test)
    accuracy = (chosen > rejected).float().mean().item()
    if accuracy < args.rm_min_accuracy:
        raise UserError(
            f"the reward model is right on {accuracy:.2f} of the held-out pairs, less than "
            f"--rm-min-accuracy {args.rm_min_accuracy}: raise --rm-pairs or --sft-steps"
        )
    texts = task.prompts(512, rng)
    answers = task.decode(answer(args, task, reference, texts, generator)[1])
    scores = read_scores(args, task, model, texts, answers)
    correlation = np.corrcoef(scores.cpu(), task.gold_scores(texts, answers))[0, 1]
    # Mean 0 and standard deviation 1 on the reference's answers (N details), so beta has a scale.
    model.head.bias.sub_(scores.mean()).div_(scores.std())
    model.head.weight.div_(scores.std())
    return model, {"rm_accuracy": accuracy, "rm_correlation": float(correlation)}


def ppo(
    args: Args,
    task: Task,
    reference: Transformer,
    reward_fn: RewardFunction,
    reward_model: Transformer | None,
    log: Log,
    stop: threading.Event | None = None,
    run_dir: Path | None = None,
    saved: dict | None = None,
) -> tuple[Transformer, Transformer | None]:
    """Stage 3: return the policy, which starts as the reference, and the value model, if any.

    Checkpoints go to `run_dir`; the stage goes on from the checkpoint `saved`, if there is one.
    """
    rng, generator = streams(args, 3)
    policy, value = copy.deepcopy(reference).requires_grad_(True), None
    copies = args.group_size if args.baseline == "group" else 1
    if args.baseline == "critic":  # the reward model can tell good from bad already (N details)
        value = make_model(args, task, scalar=True, trunk=reference)
        if args.value_init == "reward" and reward_model is not None:
            value = copy.deepcopy(reward_model).requires_grad_(True)
    parameters = [p for model in (policy, value) if model is not None for p in model.parameters()]
    optimizer = torch.optim.Adam(parameters, eps=1e-5, fused=True)
    first_iteration, kl_coef = 0, args.kl_coef
    keep = (policy, value, optimizer, rng, generator)
    if saved is not None:
        first_iteration, adapted = restore(saved, *keep)
        kl_coef = adapted if args.ref_kl_target is not None else kl_coef
    done, num_answers = (n * args.batch_size for n in (first_iteration, args.num_iterations))
    bar = tqdm(initial=done, total=num_answers, desc="PPO", unit=" answers", disable=None)
    loop_time = print_time = time.perf_counter()

    for iteration in range(first_iteration, args.num_iterations):
        fraction = 1.0 - iteration / args.num_iterations if args.anneal_lr else 1.0
        # Adam's first steps have full length in every weight: unwarmed, they wreck the policy.
        fraction = min(fraction, (iteration + 1) / args.warmup_iterations)
        optimizer.param_groups[0]["lr"] = learning_rate = fraction * args.learning_rate

        # ---- [1] Rollout: only the policy runs; log-probs come from one pass afterwards ---------
        texts = task.prompts(args.batch_size // copies, rng)
        texts = [text for text in texts for _ in range(copies)]
        prompts, responses, sampled = answer(args, task, policy, texts, generator)
        mask = action_mask(responses)  # (B, R)

        # ---- [2] Score: one number an answer on its EOS, the price of the KL on every token -----
        scores = score_answers(args, task, reward_fn, texts, responses)  # (B,)
        with torch.no_grad():
            read = (prompts, responses, args.temperature)
            log_probs, _ = policy.log_prob_and_entropy(*read)  # (B, R)
            ref_log_probs, _ = reference.log_prob_and_entropy(*read)
            values = torch.zeros_like(log_probs)
            if value is not None:
                values = torch.where(mask, value.value(prompts, responses), 0.0)
        kl = kl_penalty(log_probs, ref_log_probs, args.kl_estimator)
        rewards = token_rewards(scores, kl, mask, kl_coef)
        episodic_return = rewards.sum(1).mean().item()  # score - beta KL
        if args.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False)

        # ---- [3] Advantages: GAE along the answers; gae() wants time first, hence .T ------------
        total, gae_lambda = rewards.sum(1, keepdim=True), args.gae_lambda
        if value is None:  # GRPO's baseline: what the prompt's answers earn on average
            values = total.view(-1, copies).mean(1).repeat_interleave(copies)[:, None] * mask
            gae_lambda = 1.0
        ends = mask & ~F.pad(mask[:, 1:], (0, 1))  # the last action; a cut-off answer ends as well
        buffers = (rewards, values, F.pad(values[:, 1:], (0, 1)), ends, ends)
        advantages, returns = (x.T for x in gae(*(x.T for x in buffers), args.gamma, gae_lambda))
        if args.credit == "response":  # a bandit: the answer is one action, valued before it
            advantages, returns = (x.expand_as(values) for x in (total - values[:, :1], total))
        advantages = masked_whiten(advantages, mask)

        # ---- [4] Update: K epochs of shuffled minibatches ---------------------------------------
        batch = (prompts, responses, mask, log_probs, advantages, returns, values)
        losses, log_ratios = [], []
        for _ in range(args.update_epochs):
            order = torch.as_tensor(rng.permutation(args.batch_size), device=prompts.device)
            for mb in zip(*(x[order].tensor_split(args.num_minibatches) for x in batch)):
                mb_prompts, mb_responses, mb_mask, *mb_rows = mb
                mb_rows = [x[mb_mask] for x in mb_rows]  # each (M,): padding never enters a loss
                mb_log_probs, mb_advantages, mb_returns, mb_values = mb_rows
                read = (mb_prompts, mb_responses, args.temperature)
                new_log_probs, entropy = (x[mb_mask] for x in policy.log_prob_and_entropy(*read))
                log_ratio = new_log_probs - mb_log_probs
                surrogate = clipped_surrogate(log_ratio.exp(), mb_advantages, args.clip_coef)
                v_loss = torch.zeros_like(surrogate)
                if value is not None:
                    new_values = value.value(mb_prompts, mb_responses)[mb_mask]
                    v_clip = args.clip_coef if args.clip_vloss else None
                    v_loss = value_loss(new_values, mb_values, mb_returns, v_clip)
                entropy = entropy.mean()
                # PPO eq. 9 with its sign turned, for an optimiser minimises.
                loss = -surrogate + args.vf_coef * v_loss - args.ent_coef * entropy
                grad_norm = descend(optimizer, loss, args)
                losses.append((-surrogate.detach(), v_loss.detach(), entropy.detach(), grad_norm))
                log_ratios.append(log_ratio.detach())

        # ---- [5] Log: means over the iteration --------------------------------------------------
        means = [torch.stack(loss).mean().item() for loss in zip(*losses)]
        policy_loss, v_loss, entropy, grad_norm = means
        global_step = (iteration + 1) * args.batch_size
        if not np.isfinite(means).all():
            raise UserError(
                f"the loss is not finite at answer {global_step}: lower --learning-rate"
            )
        sps = int((global_step - done) / (time.perf_counter() - loop_time))
        approx_kl, clipfrac = diagnostics(torch.cat(log_ratios), args.clip_coef)
        # Before any step: what sampling said against the pass after it, that against the update.
        first_log_ratios = torch.cat([(log_probs - sampled)[mask], log_ratios[0]])
        unexplained = (returns - values)[mask].var() / returns[mask].var()
        metrics = {
            "charts/episodic_return": episodic_return,
            "charts/episodic_length": mask.sum(1).float().mean().item(),
            "charts/learning_rate": learning_rate,
            "charts/SPS": sps,
            "objective/score": scores.mean().item(),
            "objective/gold": np.mean(task.gold_scores(texts, task.decode(responses))),
            "objective/kl": (log_probs - ref_log_probs)
            .masked_fill(~mask, 0.0)
            .sum(1)
            .mean()
            .item(),
            "objective/eos_rate": (responses == EOS).any(1).float().mean().item(),
            "losses/policy_loss": policy_loss,
            "losses/value_loss": v_loss,
            "losses/entropy": entropy,
            "losses/approx_kl": approx_kl,
            "losses/clipfrac": clipfrac,
            "losses/first_ratio_error": (first_log_ratios.exp() - 1.0).abs().max().item(),
            "losses/explained_variance": 1.0 - unexplained.item(),
            "losses/grad_norm": grad_norm,
            "losses/kl_coef": kl_coef,
        }
        log(global_step, metrics)
        if args.ref_kl_target is not None:
            settings = (args.ref_kl_target, args.batch_size, args.kl_horizon)
            kl_coef = adapt_kl_coef(kl_coef, metrics["objective/kl"], *settings)
        progress = f"score {metrics['objective/score']:.2f}  KL {metrics['objective/kl']:.2f}"
        bar.set_postfix_str(progress)
        bar.update(args.batch_size)
        if bar.disable and time.perf_counter() - print_time > 5:  # no terminal: a line now and then
            print_time = time.perf_counter()
            print(f"answer {global_step:,}  {progress}  {sps:,} answers/s", flush=True)
        stopped = stop is not None and stop.is_set()
        last = stopped or iteration + 1 == args.num_iterations
        if run_dir is not None and (last or (iteration + 1) % args.checkpoint_every == 0):
            save(run_dir, *keep, iteration + 1, kl_coef)
        if stopped:
            print(f"stopped after {global_step} answers")
            break
    bar.close()
    return policy.requires_grad_(False), value


@torch.no_grad()
def log_density(args: Args, model: Transformer, prompts: Tensor, responses: Tensor) -> Tensor:
    """Return log pi of whole answers, (B,)."""
    log_probs, _ = model.log_prob_and_entropy(prompts, responses, args.temperature)
    return torch.where(action_mask(responses), log_probs, 0.0).sum(1)


def evaluate(
    args: Args, task: Task, policy: Transformer, reference: Transformer, reward_fn: RewardFunction
) -> dict[str, float]:
    """Return means over answers to fresh prompts; `distinct` is the share of different answers."""
    rng, generator = streams(args, 4)
    texts = task.prompts(args.eval_prompts, rng, held_out=True)
    prompts, responses, _ = answer(args, task, policy, texts, generator)
    answers = task.decode(responses)
    kl = log_density(args, policy, prompts, responses)
    kl -= log_density(args, reference, prompts, responses)
    greedy = task.decode(answer(args, task, policy, texts, None)[1])
    return {
        "gold": np.mean(task.gold_scores(texts, answers)).item(),
        "proxy": score_answers(args, task, reward_fn, texts, responses).mean().item(),
        "grammatical": np.mean(list(map(task.grammatical, answers))).item(),
        "greedy_gold": np.mean(task.gold_scores(texts, greedy)).item(),
        "kl": kl.mean().item(),
        "length": action_mask(responses).sum(1).float().mean().item(),
        "eos_rate": (responses == EOS).any(1).float().mean().item(),
        "distinct": len(set(answers)) / len(answers),
    }


def optimum_share(
    args: Args, task: Task, policy: Transformer, reference: Transformer, reward_fn: RewardFunction
) -> float | None:
    """Return (J(policy) - J(reference)) / (J* - J(reference)), with J = E[score - beta KL].

    No policy earns more than J* = E_prompt[beta log Z], Z = E_ref[exp(score / beta)], and only
    pi* = pi_ref exp(score / beta) / Z earns that much. The reference alone hardly ever samples what
    pi* prefers, so half the samples for Z are the policy's, weighed by multiple importance
    sampling. None at beta 0, where J* is the best score of any text, and where beta was adapted.
    """
    if args.kl_coef == 0.0 or args.ref_kl_target is not None:
        return None
    rng, generator = streams(args, 5)
    texts = [text for text in task.prompts(64, rng, held_out=True) for _ in range(32)]
    columns = []
    for model in (policy, reference):
        prompts, responses, _ = answer(args, task, model, texts, generator)
        densities = [log_density(args, m, prompts, responses) for m in (policy, reference)]
        columns.append([score_answers(args, task, reward_fn, texts, responses), *densities])
    # (64, 64): a row a prompt, the policy's 32 samples before the reference's.
    score, log_pi, log_ref = (torch.cat([x.view(64, 32) for x in c], 1) for c in zip(*columns))
    log_mixture = torch.logaddexp(log_pi, log_ref) - np.log(2.0)
    log_z = (log_ref - log_mixture + score / args.kl_coef).logsumexp(1) - np.log(64.0)
    reached = (score - args.kl_coef * (log_pi - log_ref))[:, :32].mean()
    start, best = score[:, 32:].mean(), args.kl_coef * log_z.mean()
    return ((reached - start) / (best - start)).item()


def train(
    args: Args, stop: threading.Event | None = None, reward_fn: RewardFunction | None = None
) -> tuple[Transformer, dict]:
    """Run the stages, or until `stop` is set; return the policy and what results.json holds.

    A `reward_fn` of yours takes the place of the reward model, and of stage 2, or of gold.
    """
    start_time = time.perf_counter()
    args.check()
    torch.set_num_threads(args.num_threads)
    task, rm_results = TASKS[args.task], {}
    sizes = ("num_iterations", "batch_size", "update_epochs")
    args = dataclasses.replace(args, **{x: getattr(args, x) or getattr(task, x) for x in sizes})
    saved = None
    if args.resume is not None:  # the stages that are complete have left their models
        saved = load_checkpoint(args.resume)
        begun = json.loads((args.resume / "args.json").read_text())
        if args.batch_size != begun["batch_size"]:  # steps are counted in answers
            raise UserError(f"--resume: --batch-size was {begun['batch_size']}")
        names = {"load_sft": "sft.pt", "load_reward_model": "reward_model.pt"}
        there = {k: args.resume / v for k, v in names.items() if (args.resume / v).exists()}
        args = dataclasses.replace(args, **there)
    reference = load_model(args, task, False, args.load_sft)[0] if args.load_sft else None
    reward_model = None
    if args.load_reward_model:
        reward_model, rm_results = load_model(args, task, True, args.load_reward_model)
    run_dir, writer = open_run(args, saved["iteration"] if saved is not None else 0)
    print(f"{args.task}: three stages on {resolve_device(args)}, logged to {run_dir}")

    def log(step: int, metrics: dict[str, float]) -> None:
        of_ppo = "losses/policy_loss" in metrics
        for name, number in metrics.items():
            if not np.isnan(number):
                (writer if of_ppo else early_writer).add_scalar(name, number, step)
        if of_ppo:  # metrics.csv holds the iterations of PPO
            with open(run_dir / "metrics.csv", "a") as file:
                if file.tell() == 0:
                    print("global_step", *metrics, sep=",", file=file)
                print(step, *metrics.values(), sep=",", file=file)

    def show(name: str, model: Transformer, step: int) -> None:
        responses = answer(args, task, model, list(task.samples), streams(args, 6)[1])[1]
        lines = [f"{text} {reply}" for text, reply in zip(task.samples, task.decode(responses))]
        writer.add_text("samples", "  \n".join(lines), step)
        print(f"{name} answers:", *lines, sep="\n    ")

    # Stages 1 and 2 count other steps. A resumed stage 3 drops what it will log again, not theirs.
    with writer, SummaryWriter(run_dir / "stages") as early_writer:
        # ---- Stage 1: the reference, which is also the first policy ----------------------------
        if reference is None:
            reference = sft(args, task, log, stop)
        save_model(run_dir / "sft.pt", reference)
        show("SFT", reference, 0)

        # ---- Stage 2: the reward model, where nothing better is known --------------------------
        if task.learned and reward_fn is None:
            if reward_model is None:
                reward_model, rm_results = train_reward_model(args, task, reference, log, stop)
            save_model(run_dir / "reward_model.pt", reward_model, rm_results)
            print(", ".join(f"{name} {number:.3f}" for name, number in rm_results.items()))
            reward_fn = learned_reward(args, task, reward_model)

        # ---- Stage 3: PPO ----------------------------------------------------------------------
        reward_fn = reward_fn or task.gold_scores
        policy, value = ppo(
            args, task, reference, reward_fn, reward_model, log, stop, run_dir, saved
        )
        save_model(run_dir / "policy.pt", policy)
        if value is not None:
            save_model(run_dir / "value.pt", value)
        show("PPO", policy, args.num_iterations * args.batch_size)

    before, after = report(args, task, policy, reference, reward_fn)
    results = {"task": args.task, "seed": args.seed, "kl_coef": args.kl_coef}
    results |= {f"sft_{name}": before[name] for name in ("gold", "grammatical", "greedy_gold")}
    results |= rm_results | after
    if not task.learned:
        results = {name.replace("gold", "accuracy"): x for name, x in results.items()}
    results["wall_seconds"] = round(time.perf_counter() - start_time, 2)
    write_json(run_dir / "results.json", results)
    return policy, results


def report(
    args: Args, task: Task, policy: Transformer, reference: Transformer, reward_fn: RewardFunction
) -> tuple[dict, dict]:
    """Evaluate reference and policy, print and return the figures of each."""
    before, after = (evaluate(args, task, m, reference, reward_fn) for m in (reference, policy))
    after["optimum_share"] = optimum_share(args, task, policy, reference, reward_fn)
    print(f"{args.eval_prompts} fresh prompts        SFT       PPO")
    for name, number in after.items():
        cells = (
            f"{x:10.3f}" if x is not None else "         -" for x in (before.get(name), number)
        )
        print(f"    {name:16}", *cells, sep="")
    return before, after


def evaluate_run(args: Args, folder: Path) -> None:
    """Evaluate the policy in a folder, as at the end of its training."""
    args.check()
    torch.set_num_threads(args.num_threads)
    task = TASKS[args.task]
    policy, reference = (
        load_model(args, task, False, folder / f"{x}.pt")[0] for x in ("policy", "sft")
    )
    reward_fn: RewardFunction = task.gold_scores
    if task.learned:
        reward_model, _ = load_model(args, task, True, folder / "reward_model.pt")
        reward_fn = learned_reward(args, task, reward_model)
    report(args, task, policy, reference, reward_fn)


def save(
    run_dir: Path,
    policy: Transformer,
    value: Transformer | None,
    optimizer: torch.optim.Optimizer,
    rng: np.random.Generator,
    generator: torch.Generator,
    iteration: int,
    kl_coef: float,
) -> None:
    """Write checkpoint.pt, from which `restore` goes on."""
    checkpoint = {
        "policy": policy.state_dict(),
        "value": value.state_dict() if value is not None else {},
        "optimizer": optimizer.state_dict(),
        "rng": rng.bit_generator.state,
        "generator": generator.get_state(),
        "iteration": iteration,
        "kl_coef": kl_coef,
    }
    file = io.BytesIO()
    torch.save(checkpoint, file)
    write(run_dir / "checkpoint.pt", file.getvalue())


def load_checkpoint(folder: Path) -> dict | None:
    """Read a folder's checkpoint, if it has one, as data: `weights_only` refuses a program."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if {"policy", "value", "optimizer", "rng", "iteration", "kl_coef"} <= saved.keys():
            return saved
    except Exception as error:
        reason = f"{type(error).__name__} {error}".splitlines()[0]
        raise UserError(f"{path} cannot be read: {reason}") from error
    raise UserError(f"{path} is no checkpoint of a run")


def restore(
    saved: dict,
    policy: Transformer,
    value: Transformer | None,
    optimizer: torch.optim.Optimizer,
    rng: np.random.Generator,
    generator: torch.Generator,
) -> tuple[int, float]:
    """Take up a checkpoint; return the iterations done and the KL coefficient."""
    try:
        policy.load_state_dict(saved["policy"])
        if value is not None:
            value.load_state_dict(saved["value"])
        optimizer.load_state_dict(saved["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise UserError("--resume: its networks are not those of the flags given") from error
    rng.bit_generator.state = saved["rng"]
    generator.set_state(saved["generator"])
    return saved["iteration"], saved["kl_coef"]


def save_model(path: Path, model: Transformer, metrics: dict[str, float] | None = None) -> None:
    """Write the weights, and what it takes to see whether they fit."""
    file = io.BytesIO()
    state = {"config": model.config, "metrics": metrics or {}, "model": model.state_dict()}
    torch.save(state, file)
    write(path, file.getvalue())


def load_model(args: Args, task: Task, scalar: bool, path: Path) -> tuple[Transformer, dict]:
    """Return a saved model, frozen, and its metrics; `UserError` if it does not fit `args`."""
    model = make_model(args, task, scalar)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        config, metrics, weights = state["config"], state["metrics"], state["model"]
    except (OSError, EOFError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} is not a model that this script saved: {reason}") from error
    other = [f"{name} {config.get(name)}, not {size}" for name, size in model.config.items()
             if config.get(name) != size]  # fmt: skip
    if other:
        raise UserError(f"{path} is a model of another shape: {'; '.join(other)}")
    model.load_state_dict(weights)
    return model.requires_grad_(False), metrics


def write(path: Path, data: bytes) -> None:
    """Write beside `path`, then rename: a killed run leaves the old file or the new, never half."""
    with open(path.with_suffix(".tmp"), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path.with_suffix(".tmp"), path)


def write_json(path: Path, data: dict) -> None:
    """Write `data` as JSON."""
    write(path, (json.dumps(data, indent=2, default=str) + "\n").encode())


def open_run(args: Args, iterations: int) -> tuple[Path, SummaryWriter]:
    """Make the folder of a new run, or drop what a resumed one logged after its checkpoint."""
    name = f"{args.task}__{Path(__file__).stem}__{args.seed}__{time.time_ns() // 10**6}"
    run_dir = args.resume or args.run_dir or Path("runs", name)
    if args.resume is None:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--run-dir {run_dir}: {error}") from error
        if (run_dir / "args.json").exists():
            raise UserError(f"--run-dir {run_dir} holds a run: --resume it, or name another")
    elif (run_dir / "metrics.csv").exists():
        lines = (run_dir / "metrics.csv").read_bytes().splitlines(keepends=True)
        write(run_dir / "metrics.csv", b"".join(lines[: iterations + 1]))  # and the header
    write_json(run_dir / "args.json", dataclasses.asdict(args) | {"resume": None})
    return run_dir, SummaryWriter(run_dir, purge_step=iterations * args.batch_size + 1)


def parse() -> Args:
    """Return the arguments; those of a run that is resumed or evaluated are the defaults."""
    args = tyro.cli(Args)
    folder = args.resume or args.evaluate
    if folder is None:
        return args
    try:
        saved = json.loads((folder / "args.json").read_text())
        paths = {"run_dir": folder, "resume": None, "evaluate": None}
        if args.evaluate is not None:
            paths["device"] = "auto"  # the run may have been on another machine
        paths |= {k: Path(saved[k]) for k in ("load_sft", "load_reward_model") if saved[k]}
        defaults = Args(**saved | paths)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no run of {Path(__file__).name}: {error}") from error
    return tyro.cli(Args, default=defaults)


def main() -> None:
    """Run from the command line: Ctrl-C ends the training in order, `UserError` is one line."""
    stop, status = threading.Event(), 0

    def on_signal(number: int, _: object) -> None:
        nonlocal status
        status = 128 + number  # what a shell expects
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one ends it at once
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    try:
        args = parse()
        if args.evaluate is not None:
            for number in (signal.SIGINT, signal.SIGTERM):  # nothing is to be saved
                signal.signal(number, signal.SIG_DFL)
            evaluate_run(args, args.evaluate)
        else:
            train(args, stop)
    except (UserError, OSError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(status or 2)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
