# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "gymnasium>=1.1", "numpy", "tensorboard", "tyro", "tqdm"]
# ///
"""PPO for language models: the whole RLHF pipeline in one file that reads from top to bottom.

    python ppo_rlhf_toy.py                      # gold .45 -> .98 in about a minute on one CPU core
    python ppo_rlhf_toy.py --task arithmetic    # accuracy .50 -> .98 with a verifiable reward

`train` runs three stages:
    sft                 the policy learns from demonstrations; a frozen copy is the reference
    train_reward_model  a copy with a scalar head learns from noisy preferences over SFT answers
    ppo                 the policy learns to earn score - beta KL, the value model to predict it
Each iteration of `ppo` has five parts:
    [1] Rollout     the policy answers B prompts, token by token
    [2] Score       the reward function rates each answer; each token pays for its KL
    [3] Advantages  from a value model and GAE, or by comparing several answers to each prompt
    [4] Update      K epochs of minibatches on the clipped surrogate and the value loss
    [5] Log         averages over the iteration

Shapes: B answers in a batch, P tokens of the longest prompt, R of the longest response, V words,
M response tokens in a minibatch. A token is an action, an answer is an episode. Prompts are padded
on the left, responses on the right, so that all responses begin in the same column.

What is not PPO (run folder, checkpoints, command line) is in experiment.py.
Papers: arXiv 1707.06347 (PPO), 1909.08593 (RLHF), 2402.14740 (RLOO), 2402.03300 (GRPO).
"N details" is "The N Implementation Details of RLHF with PPO" (Huang et al. 2023).
"""

import importlib
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

import experiment
from experiment import Adam, Run, RunArgs, UserError, to_device
from gae import gae


@dataclass
class Args(RunArgs):
    """Train the four models of RLHF, then evaluate the policy."""

    task: str = "reviews"  # reviews, arithmetic (its reward is verifiable), or your module:Task.
    load_models: Path | None = None  # Skip stages 1 and 2: take their models from this run folder.
    checkpoint_every: int = 10  # Iterations of PPO between checkpoints. The last is always saved.
    eval_prompts: int = 1024  # Prompts of the final evaluation.

    num_layers: int = 2  # Layers of each of the four transformers.
    num_heads: int = 4  # Attention heads of each layer.
    d_model: int = 64  # Width of the transformers.
    context_size: int = 32  # Maximum number of tokens in a prompt and its response.
    max_new_tokens: int = 24  # Maximum number of tokens in a response, which is cut off there.
    micro_batch_size: int = 512  # Maximum answers per forward pass; gradients are accumulated.

    sft_steps: int | None = None  # Updates of stage 1: 500, for arithmetic 5,000 at most.
    sft_accuracy: float = 0.46  # Mean gold that ends stage 1, if the task is not `learned`.
    sft_batch_size: int = 64  # Demonstrations in an update of stage 1.
    sft_learning_rate: float = 3e-3  # Learning rate of stage 1, which falls linearly to 0.
    rm_pairs: int = 2048  # Maximum number of pairs that the reward model learns from.
    rm_epochs: int = 3  # Passes over the pairs.
    rm_batch_size: int = 32  # Pairs in an update of stage 2.
    rm_learning_rate: float = 2e-3  # Learning rate of stage 2, which falls linearly to 0.
    rm_min_accuracy: float = 0.8  # Accuracy on held-out pairs below which PPO does not start.

    learning_rate: float = 2e-3  # Adam's learning rate in PPO.
    anneal_lr: bool = True  # Lower the learning rate linearly to 0 (N details).
    warmup_iterations: int = 10  # First iterations, in which the learning rate rises linearly.
    num_iterations: int | None = None  # Iterations of PPO: 40 by default, 240 for arithmetic.
    batch_size: int | None = None  # B: answers in a rollout. 128 by default, 512 for arithmetic.
    update_epochs: int | None = None  # K: passes over the batch. 4 by default, 2 for arithmetic.
    num_minibatches: int = 4  # Minibatches in one pass over the batch.
    temperature: float = 1.0  # Temperature of the softmax, in sampling and in training.
    kl_coef: float = 0.1  # Beta: what one nat of KL(policy, reference) costs.
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"  # Estimator of a token's KL (Schulman 2020).
    kl_in_loss: bool = False  # Put the KL into the loss, with k2 or k3, instead of the reward.
    missing_eos_penalty: float = 1.0  # Penalty on the score of a response that was cut off.
    value_init: Literal["reward", "policy"] = "reward"  # Model that the value model starts from.
    baseline: Literal["critic", "group"] = "critic"  # A critic, or a group of answers.
    group_size: int = 8  # G: answers to each prompt with baseline group.
    group_advantage: Literal["rloo", "grpo", "dr_grpo"] = "rloo"  # How a group's scores compare.
    whiten_advantages: bool = True  # Bring advantages to mean 0, deviation 1 over the batch.
    credit: Literal["token", "response"] = "token"  # Credit each token, or the answer as a whole.
    gamma: float = 1.0  # Discount factor. It is not used with credit response.
    gae_lambda: float = 0.95  # Lambda of GAE, used with baseline critic and credit token.
    clip_coef: float = 0.2  # Epsilon: beyond this distance from 1 the ratio gains nothing more.
    clip_coef_high: float | None = None  # Epsilon above 1, if it differs (clip-higher, DAPO).
    clip_vloss: bool = True  # Limit the change in the value to clip_coef as well (N details).
    ent_coef: float = 0.0  # Weight of the entropy bonus.
    vf_coef: float = 0.5  # Weight of the value loss.
    max_grad_norm: float = 1.0  # The gradient's global norm is clipped to this.

    fixed = "task num_layers num_heads d_model context_size baseline"  # in the networks
    fixed_to_resume = "seed batch_size"
    unit, subject = "answers", property(lambda self: self.task)  # for the log

    def check(self) -> None:
        """Raise `UserError`, which names the flag, for a value that cannot work."""
        super().check()
        self.check_range("num_heads d_model context_size max_new_tokens update_epochs", 1, 2**13)
        self.check_range("num_layers", 1, 1e9 / 12 / self.d_model**2)  # a billion weights
        self.check_range("sft_batch_size rm_batch_size rm_pairs rm_epochs eval_prompts", 1, 2**20)
        self.check_range("micro_batch_size sft_steps num_iterations warmup_iterations", 1)
        self.check_range("batch_size group_size", 2, 2**17)
        self.check_range("kl_coef missing_eos_penalty ent_coef", 0)
        self.check_range("gamma gae_lambda sft_accuracy rm_min_accuracy", 0, 1)
        self.check_range("learning_rate sft_learning_rate rm_learning_rate", 1e-12)
        self.check_range("clip_coef clip_coef_high vf_coef max_grad_norm temperature", 1e-12)
        self.check_range("num_minibatches", 1, self.batch_size)
        if self.d_model % self.num_heads:
            raise UserError(f"--d-model {self.d_model} must be a multiple of --num-heads")
        if self.baseline == "group" and self.batch_size % self.group_size:
            raise UserError(f"--batch-size {self.batch_size} must be a multiple of --group-size")
        if self.kl_in_loss and self.kl_estimator == "k1":
            raise UserError("--kl-in-loss: k1's gradient is 0 on average, use --kl-estimator k2")


class Tokenizer:
    """Turns texts into tokens and back. Words differ; without a separator, they are characters."""

    pad, eos = 0, 1  # two tokens: if they were one, a mask of padding would hide EOS (N details)

    def __init__(self, words: list[str], separator: str = " "):
        self.words, self.separator = ["<pad>", "<eos>", *words], separator

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        words = text.split(self.separator) if self.separator and text else text
        return [self.words.index(word) for word in words]

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens, none of which is PAD or EOS."""
        return self.separator.join(self.words[token] for token in tokens)

    def block(self, rows: Iterable[list[int]], left: bool, device: torch.device) -> Tensor:
        """Return sequences of tokens as (B, longest), padded on the left or on the right."""
        tensors, side = [torch.tensor(row) for row in rows], "left" if left else "right"
        return nn.utils.rnn.pad_sequence(tensors, True, self.pad, side).to(device)


class Task:
    """What is asked, and what an answer is worth. A task of your own has to define

    tokenizer, prompt_size            and whatever should differ from the defaults here
    prompts(count, rng, held_out)     draw `count` prompts, held-out ones for the evaluation
    demonstration(prompt, rng)        write an answer to imitate, below max_new_tokens long
    gold(prompt, response)            return the true worth of an answer, in [0, 1]
    """

    tokenizer: Tokenizer
    prompt_size: int  # tokens of the longest prompt
    learned = False  # whether PPO sees the scores of a reward model, or gold itself
    batch_size, num_iterations, update_epochs, sft_steps = 128, 40, 4, 500  # defaults of the flags

    def network(self, args: Args, head_size: int) -> "Transformer":
        """Return a network. Yours is a Transformer with a linear `head`, with a bias if scalar."""
        return Transformer(args, self.tokenizer, head_size)

    def gold_scores(self, prompts: list[str], responses: list[str]) -> list[float]:
        return list(map(self.gold, prompts, responses))


class Reviews(Task):
    """Review each noun of "pool view :". Gold is the share of praise, 0 if a noun is missing."""

    nouns = tuple("food service room staff music view bed coffee pool price garden bath".split())
    good = tuple("good great lovely superb fine perfect charming clean warm".split())
    bad = tuple("bad awful dirty cold dull horrible poor noisy broken".split())
    adverbs = tuple("very really quite rather".split())
    rest = tuple(": the was and but . i would gladly never return".split())
    tokenizer = Tokenizer([*rest, *nouns, *good, *bad, *adverbs])
    prompt_size, learned = 4, True
    clause = f"the ({'|'.join(nouns)}) was (?:(?:{'|'.join(adverbs)}) )?({'|'.join(good + bad)})"
    closing = r" \. i would (gladly|never) return"
    grammar = re.compile(rf"{clause}(?: (?:and|but) {clause})*(?:{closing})? \.")

    def prompts(self, count: int, rng: np.random.Generator, held_out: bool = False) -> list[str]:
        nouns = (rng.permutation(self.nouns)[: rng.integers(1, 4)] for _ in range(count))
        return [" ".join((*some, ":")) for some in nouns]  # only 1,464: too few to hold any out

    def demonstration(self, prompt: str, rng: np.random.Generator) -> str:
        nouns = prompt.split()[:-1]
        praised = rng.random(4)[: len(nouns)] < 0.5
        text = ""
        for i, noun in enumerate(nouns):
            if i > 0:
                text += " and " if praised[i] == praised[i - 1] else " but "
            adverb = f"{rng.choice(self.adverbs)} " if rng.random() < 0.4 else ""
            text += f"the {noun} was {adverb}{rng.choice(self.good if praised[i] else self.bad)}"
        if rng.random() < 0.3:
            text += f" . i would {'gladly' if praised.mean() > 0.5 else 'never'} return"
        return text + " ."

    def gold(self, prompt: str, response: str) -> float:
        clauses = re.findall(self.clause, response)
        named = {noun for noun, _ in clauses}
        if not self.grammar.fullmatch(response) or not named >= set(prompt.split()[:-1]):
            return 0.0
        praise = [adjective in self.good for _, adjective in clauses]
        praise += [word == "gladly" for word in re.findall(self.closing, response)]
        return sum(praise) / len(praise)


class Arithmetic(Task):
    """Answer "27+8=". The answer can be checked, so there is no reward model."""

    tokenizer, prompt_size = Tokenizer(list("0123456789+="), separator=""), 6
    batch_size, num_iterations, update_epochs, sft_steps = 512, 240, 2, 5000  # of short answers

    def prompts(self, count: int, rng: np.random.Generator, held_out: bool = False) -> list[str]:
        power = 1.0 if held_out else 1.5  # 1.5 doubles the one-digit numbers, else too rare
        pairs = (100.0 * rng.random((10 * count + 100, 2)) ** power).astype(int).tolist()
        return [f"{a}+{b}=" for a, b in pairs if held_out == ((a + 3 * b) % 7 == 0)][:count]

    def demonstration(self, prompt: str, rng: np.random.Generator | None = None) -> str:
        return str(sum(map(int, prompt[:-1].split("+"))))

    def gold(self, prompt: str, response: str) -> float:
        return float(response == self.demonstration(prompt))


TASKS: dict[str, Task] = {"reviews": Reviews(), "arithmetic": Arithmetic()}


def find_task(name: str) -> Task:
    """Return a task of this file, or import one of yours from module:Class."""
    if name in TASKS:
        return TASKS[name]
    sys.path.append("")  # the folder in which the command was typed
    module, _, class_name = name.partition(":")
    try:
        return getattr(importlib.import_module(module), class_name)()
    except Exception as error:
        if not experiment.is_fault_of_a_flag(error, __file__):
            raise
        choice = " or ".join([*TASKS, "module:Class"])
        raise UserError(f"--task {name}: {error}; choose {choice}") from error


class Block(nn.Module):
    """Attention, then a two-layer perceptron. Each normalises its input and adds to it."""

    def __init__(self, args: Args):
        super().__init__()
        D, self.num_heads = args.d_model, args.num_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.ReLU(), nn.Linear(4 * D, D))

    def forward(self, x: Tensor, visible: Tensor, cache: dict | None) -> Tensor:
        """Take and return (B, S, D)."""
        B, S, D = x.shape
        qkv = self.qkv(self.norm_1(x)).view(B, S, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, S, D / heads)
        if cache is not None:
            past_k, past_v = cache.get(self, (k[:, :, :0], v[:, :, :0]))
            k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
            cache[self] = k, v
        attended = F.scaled_dot_product_attention(q, k, v, visible)
        x = x + self.out(attended.transpose(1, 2).reshape(B, S, D))
        return x + self.mlp(self.norm_2(x))


class Transformer(nn.Module):
    """A small GPT-2 without dropout, which would move the ratio away from 1 (N details)."""

    temperature = 1.0  # of the softmax. In PPO policy and reference have the flag's (N details).

    def __init__(self, args: Args, tokenizer: Tokenizer, head_size: int):
        super().__init__()
        self.tokenizer = tokenizer
        self.word = nn.Embedding(len(tokenizer), args.d_model)
        self.position = nn.Embedding(args.context_size, args.d_model)
        self.blocks = nn.ModuleList(Block(args) for _ in range(args.num_layers))
        self.norm, self.head = nn.LayerNorm(args.d_model), nn.Linear(args.d_model, head_size)
        if head_size == 1:  # N(0, 1 / (d + 1)) (N details)
            nn.init.normal_(self.head.weight, std=(args.d_model + 1) ** -0.5)
            nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor, cache: dict | None = None) -> Tensor:
        """Map tokens (B, S), which follow those in the cache, to the head's output (B, S, head)."""
        seen = tokens
        if cache is not None:  # keys and values stay valid: no token attends to a later one
            seen = cache["tokens"] = torch.cat([cache.get("tokens", tokens[:, :0]), tokens], dim=1)
        real, S, total = seen != self.tokenizer.pad, tokens.shape[1], seen.shape[1]
        if total > self.position.num_embeddings:
            raise UserError(f"--context-size is too small for a text of {total} tokens")
        # Positions count real tokens, so padding on the left changes nothing (N details).
        positions = (real.cumsum(1) - 1).clamp(min=0)[:, -S:]
        column = torch.arange(total, device=tokens.device)
        row = column[-S:, None]
        # Padding sees only itself: of nothing, some kernels give NaN. No word sees padding.
        visible = ((real[:, None] & (column < row)) | (column == row))[:, None]  # (B, 1, S, total)
        x = self.word(tokens) + self.position(positions)
        for block in self.blocks:
            x = block(x, visible, cache)
        return self.head(self.norm(x))

    def log_softmax(self, logits: Tensor) -> Tensor:
        """Return log pi (..., V)."""
        logits = logits / self.temperature
        logits[..., self.tokenizer.pad] = -1e9  # padding is not an action
        return F.log_softmax(logits, dim=-1)

    def before(self, prompts: Tensor, responses: Tensor) -> Tensor:
        """Return the output (B, R, head) one position before each response token."""
        return self(torch.cat([prompts, responses], dim=1))[:, prompts.shape[1] - 1 : -1]

    def log_prob_and_entropy(self, prompts: Tensor, responses: Tensor) -> tuple[Tensor, Tensor]:
        """Return log pi of the response tokens and the policy's entropy in nats, both (B, R)."""
        log_pi = self.log_softmax(self.before(prompts, responses))  # (B, R, V)
        log_probs = log_pi.gather(-1, responses.unsqueeze(-1)).squeeze(-1)
        return log_probs, -(log_pi.exp() * log_pi).sum(-1)


def make_model(args: Args, task: Task, scalar: bool, trunk: nn.Module | None = None) -> Transformer:
    """Return a network with a scalar head or one for words, new or with `trunk`'s weights."""
    model = task.network(args, 1 if scalar else len(task.tokenizer))
    if trunk is not None:
        weights = {k: v for k, v in trunk.state_dict().items() if not k.startswith("head.")}
        model.load_state_dict(weights, strict=False)
    return model


class Models(nn.Module):
    """The four models, saved together, and the number of stages that are done."""

    def __init__(self, args: Args, task: Task, learned: bool):
        super().__init__()
        self.policy = make_model(args, task, scalar=False)
        self.reference = make_model(args, task, scalar=False).requires_grad_(False)
        self.policy.temperature = self.reference.temperature = args.temperature
        self.value = make_model(args, task, scalar=True) if args.baseline == "critic" else None
        self.reward_model = None
        if learned:
            self.reward_model = make_model(args, task, scalar=True).requires_grad_(False)
        self.stages_done = nn.Buffer(torch.tensor(0))
        self.reward_model_quality = nn.Buffer(torch.zeros(2))  # accuracy, correlation with gold

    def read(self, prompts: Tensor, responses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log pi of the tokens, the policy's entropy, and V before each token: (B, R)."""
        log_probs, entropies = self.policy.log_prob_and_entropy(prompts, responses)
        values = torch.zeros_like(log_probs)
        if self.value is not None:
            values = self.value.before(prompts, responses).squeeze(-1)
        return log_probs, entropies, values

    def take(self, args: Args) -> None:
        """Take the reference and the reward model from the run in the folder `load_models`."""
        saved, theirs = experiment.load_checkpoint(args.load_models, type(args))
        names = [name for name in self.state_dict() if not name.startswith(("policy", "value"))]
        with experiment.as_user_error(f"{args.load_models} holds no models that fit", Exception):
            if (theirs.task, theirs.num_heads) != (args.task, args.num_heads):  # no shape shows it
                raise ValueError(f"they are for {theirs.task}, with {theirs.num_heads} heads")
            self.load_state_dict({name: saved["agent"][name] for name in names}, strict=False)
        self.stages_done.clamp_(max=2)


def streams(args: Args, stage: int, device: torch.device) -> tuple[np.random.Generator, Generator]:
    """Seed a stage's weights; return random numbers of its own for data and for sampling."""
    seeds = (np.random.SeedSequence((args.seed, stage)).generate_state(3) >> 2).tolist()
    torch.manual_seed(seeds[0])
    return np.random.default_rng(seeds[2]), Generator(device).manual_seed(seeds[1])


@torch.no_grad()
def in_parts(args: Args, function: Callable, *columns: Tensor) -> list[Tensor]:
    """Call a function on `micro_batch_size` rows at a time; join the tensors that it returns."""
    parts = [function(*part) for part in zip(*(x.split(args.micro_batch_size) for x in columns))]
    return [torch.cat(tensors) for tensors in zip(*parts)]


class Rollout(NamedTuple):
    """Prompts and the answers of a policy, as texts and as tokens."""

    texts: list[str]  # B prompts
    answers: list[str]  # B responses, without EOS
    prompts: Tensor  # (B, P)
    responses: Tensor  # (B, R)
    log_probs: Tensor  # (B, R), of the responses, as they were sampled
    mask: Tensor  # (B, R), which tokens are actions
    ended: Tensor  # (B,), whether the policy ended its answer; otherwise it was cut off


def action_mask(responses: Tensor, pad: int) -> Tensor:
    """Return which of (B, R) are actions: all but the padding. EOS is one: ending is a choice."""
    return responses != pad


def generate(
    args: Args, policy: Transformer, generator: Generator, prompts: Tensor
) -> tuple[Tensor, Tensor]:
    """Sample answers to prompts (B, P), top-k off (N details); return them and log pi, (B, R)."""
    pad, eos = policy.tokenizer.pad, policy.tokenizer.eos
    responses = prompts.new_full((len(prompts), args.max_new_tokens), pad)
    log_probs = torch.zeros(responses.shape, device=prompts.device)
    running = torch.ones_like(prompts[:, :1], dtype=torch.bool)  # (B, 1)
    cache: dict = {}
    new = prompts  # the tokens that the cache does not know yet
    for t in range(args.max_new_tokens):
        log_pi = policy.log_softmax(policy(new, cache)[:, -1])
        noise = torch.empty_like(log_pi).exponential_(generator=generator)
        token = (log_pi.exp() / noise).argmax(-1, keepdim=True)  # (B, 1)
        log_probs[:, t : t + 1] = torch.where(running, log_pi.gather(-1, token), 0.0)
        new = responses[:, t : t + 1] = torch.where(running, token, pad)
        running = running & (token != eos)
        if not running.any():  # a GPU waits only here
            break
    if not log_probs.isfinite().all():
        raise UserError("the policy is not finite: lower --learning-rate or --sft-learning-rate")
    return responses, log_probs


def answer(args: Args, policy: Transformer, texts: list[str], generator: Generator) -> Rollout:
    """Answer prompts given as texts."""
    tokenizer, device = policy.tokenizer, policy.head.weight.device
    prompts = tokenizer.block(map(tokenizer.encode, texts), True, device)
    responses, log_probs = in_parts(args, partial(generate, args, policy, generator), prompts)
    mask = action_mask(responses, tokenizer.pad)
    longest = mask.sum(1).max()
    responses, log_probs, mask = (x[:, :longest] for x in (responses, log_probs, mask))
    ended = (responses == tokenizer.eos).any(1)
    rows, lengths = responses.tolist(), (mask.sum(1) - ended.int()).tolist()
    answers = [tokenizer.decode(row[:length]) for row, length in zip(rows, lengths)]
    return Rollout(texts, answers, prompts, responses, log_probs, mask, ended)


def descend(optimizer: Optimizer, args: Args) -> Tensor:
    """Take one step down the gradient; return its norm before clipping."""
    parameters = optimizer.param_groups[0]["params"]
    grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return grad_norm


def sft(args: Args, task: Task, run: Run) -> Transformer:
    """Return a model that imitates demonstrations."""
    rng, generator = streams(args, 1, run.device)
    tokenizer = task.tokenizer
    model = make_model(args, task, scalar=False).to(run.device)
    optimizer = Adam(model.parameters(), eps=1e-5, fused=True)
    for step in tqdm(range(args.sft_steps), "SFT", disable=None):
        if run.stopped:
            raise UserError(f"stopped in the SFT stage: --resume {run.folder} restarts it")
        optimizer.param_groups[0]["lr"] = args.sft_learning_rate * (1.0 - step / args.sft_steps)
        texts = task.prompts(args.sft_batch_size, rng)
        replies = [[*tokenizer.encode(task.demonstration(x, rng)), tokenizer.eos] for x in texts]
        prompts = tokenizer.block(map(tokenizer.encode, texts), True, run.device)
        responses = tokenizer.block(replies, False, run.device)
        log_probs, _ = model.log_prob_and_entropy(prompts, responses)
        loss = -log_probs[action_mask(responses, tokenizer.pad)].mean()
        loss.backward()
        descend(optimizer, args)
        if step % 25 == 24:
            run.writer.add_scalars("sft/loss", {"stage_1": loss.item()}, step + 1)
        if step % 25 == 24 and not task.learned:
            texts = task.prompts(512, rng)
            answers = answer(args, model, texts, generator).answers
            gold = np.mean(task.gold_scores(texts, answers))
            run.writer.add_scalars("sft/accuracy", {"stage_1": gold}, step + 1)
            if gold > args.sft_accuracy:
                break  # something is left for PPO to learn
    return model


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return -mean(log P(chosen over rejected)), P = sigmoid(chosen - rejected), scores (B,)."""
    return -F.logsigmoid(chosen - rejected).mean()


def read_scores(args: Args, model: Transformer, prompts: list[str], responses: list[str]) -> Tensor:
    """Return a reward model's scores (B,): its output at EOS (N details)."""
    encode, eos = model.tokenizer.encode, model.tokenizer.eos
    rows = [[*encode(prompt), *encode(reply), eos] for prompt, reply in zip(prompts, responses)]
    tokens = model.tokenizer.block(rows, True, model.head.weight.device)
    # Padding on the left puts every EOS last.
    return torch.cat([model(some)[:, -1, 0] for some in tokens.split(args.micro_batch_size)])


def train_reward_model(args: Args, task: Task, run: Run, models: Models) -> Transformer:
    """Return a model of a judge's taste."""
    rng, generator = streams(args, 2, run.device)
    model = make_model(args, task, scalar=True, trunk=models.reference).to(run.device)
    held_out = max(args.rm_pairs // 4, 16)
    texts = task.prompts(2 * (args.rm_pairs + held_out), rng)  # more than needed: some will tie
    answers = answer(args, models.reference, texts * 2, generator).answers
    pairs = []  # (prompt, chosen, rejected), as a noisy judge decided; ties are skipped
    golds = np.reshape(task.gold_scores(texts * 2, answers), (2, -1))
    for text, a, b, margin in zip(texts, answers, answers[len(texts) :], golds[0] - golds[1]):
        if margin != 0.0:
            prefers_a = rng.random() < 1.0 / (1.0 + np.exp(-10.0 * margin))
            pairs.append((text, a, b) if prefers_a else (text, b, a))
    if len(pairs) < 2 * held_out:
        raise UserError(f"the judge could tell only {len(pairs)} pairs apart: raise --sft-steps")
    test_pairs, pairs = pairs[:held_out], pairs[held_out:][: args.rm_pairs]

    def compare(some_pairs: list[tuple[str, str, str]]) -> tuple[Tensor, ...]:
        texts, chosen, rejected = map(list, zip(*some_pairs))
        return read_scores(args, model, texts * 2, chosen + rejected).chunk(2)

    optimizer = Adam(model.parameters(), eps=1e-5, fused=True)
    orders = [torch.as_tensor(rng.permutation(len(pairs))) for _ in range(args.rm_epochs)]
    batches = [rows for order in orders for rows in order.split(args.rm_batch_size)]
    for step, rows in enumerate(tqdm(batches, "reward model", disable=None)):
        if run.stopped:
            raise UserError(f"stopped in the reward model stage: --resume {run.folder} restarts it")
        optimizer.param_groups[0]["lr"] = args.rm_learning_rate * (1.0 - step / len(batches))
        loss = bradley_terry_loss(*compare([pairs[i] for i in rows.tolist()]))
        loss.backward()
        descend(optimizer, args)
        if step % 25 == 24:
            run.writer.add_scalars("reward_model/loss", {"stage_2": loss.item()}, step + 1)
    model.requires_grad_(False)
    chosen_scores, rejected_scores = compare(test_pairs)
    accuracy = (chosen_scores > rejected_scores).float().mean().item()
    if accuracy < args.rm_min_accuracy:  # PPO would exploit the model's errors
        raise UserError(f"--rm-min-accuracy: got {accuracy:.2f}, raise --rm-pairs or --sft-steps")
    texts = task.prompts(512, rng)
    answers = answer(args, models.reference, texts, generator).answers
    scores = read_scores(args, model, texts, answers)
    if not 0.0 < scores.std() < torch.inf:
        raise UserError("the reward model is constant or not finite: lower --rm-learning-rate")
    correlation = np.nan_to_num(np.corrcoef(scores.cpu(), task.gold_scores(texts, answers))[0, 1])
    # Mean 0 and standard deviation 1 on the reference's answers (N details) give beta a scale.
    model.head.bias.sub_(scores.mean()).div_(scores.std())
    model.head.weight.div_(scores.std())
    models.reward_model_quality.copy_(torch.tensor([accuracy, correlation]))
    return model


def score_answers(args: Args, reward_fn: Callable, rollout: Rollout) -> Tensor:
    """Return scores (B,): `reward_fn(prompts, answers)` less a penalty where EOS is missing."""
    rewards, ended = reward_fn(rollout.texts, rollout.answers), rollout.ended
    scores = torch.as_tensor(rewards, dtype=torch.float32).detach().to(ended.device)
    if scores.shape != ended.shape or not scores.isfinite().all():
        raise UserError(f"the reward function must return {len(ended)} finite numbers")
    return scores - args.missing_eos_penalty * ~ended


def kl_penalty(log_probs: Tensor, ref_log_probs: Tensor, estimator: str) -> Tensor:
    """Return an estimate of KL(policy, reference) in nats from each sampled token.

    In the reward only k1 gives the KL's gradient. In the loss, k2 does, k3 gives KL(ref, pi)'s.
    """
    log_ratio = log_probs - ref_log_probs
    if estimator == "k2":
        return log_ratio.square() / 2.0
    if estimator == "k3":
        return (-log_ratio).exp() - 1.0 + log_ratio
    return log_ratio


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Return -beta KL of each token, plus the score on a response's last action: (B, R)."""
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    return rewards.scatter_add(1, mask.sum(1, keepdim=True) - 1, scores[:, None])


def group_advantages(scores: Tensor, group_size: int, kind: str) -> Tensor:
    """Return by how much each score exceeds those of the other answers to its prompt, (B,).

    dr_grpo: s - mean. rloo: s - mean of the others, which is G / (G - 1) times as much.
    grpo: (s - mean) / standard deviation.
    """
    groups = scores.view(-1, group_size)  # (B / G, G)
    advantages = groups - groups.mean(1, keepdim=True)
    # Equal scores leave only rounding errors, which a division by std or Adam would blow up.
    is_tie = advantages.abs() < 1e-6 * groups.abs().amax(1, keepdim=True)
    advantages = advantages.masked_fill(is_tie, 0.0)
    if kind == "rloo":
        advantages = advantages * group_size / (group_size - 1)
    if kind == "grpo":
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-6)
    return advantages.flatten()


def masked_whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Return `x` with mean 0 and standard deviation 1 under the mask, and 0 elsewhere."""
    mean, std = x[mask].mean(), x[mask].std()
    varies = std > 1e-6 * x[mask].abs().max()  # beyond rounding errors
    return torch.where(mask & varies, (x - mean) / (std + 1e-8), 0.0)


class Batch(NamedTuple):
    """The answers of a rollout, or a minibatch of them."""

    prompts: Tensor  # (B, P)
    responses: Tensor  # (B, R)
    mask: Tensor  # (B, R), which tokens are actions; on the CPU
    log_probs: Tensor  # (B, R), of the actions, under the policy that took them
    ref_log_probs: Tensor  # (B, R), of the actions, under the reference
    advantages: Tensor  # (B, R)
    returns: Tensor  # (B, R), targets of the value model
    values: Tensor  # (B, R), the value model's estimates before the update


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip_coef: float, clip_coef_high: float | None = None
) -> Tensor:
    """Return mean(min(r A, clip(r, 1 - eps, 1 + eps) A)), to be maximised (PPO eq. 7).

    The min is pessimistic: outside the range gains no longer count, but losses still do.
    """
    clipped = ratio.clamp(1.0 - clip_coef, 1.0 + (clip_coef_high or clip_coef))
    return torch.min(ratio * advantages, clipped * advantages).mean()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """Return mean((V - returns)^2) / 2.

    With `clip`, take the larger of that error and that of V kept within `clip` of its old value.
    """
    errors = (values - returns).square()
    if clip is not None:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        errors = torch.max(errors, (clipped - returns).square())
    return 0.5 * errors.mean()


def ppo_loss(models: Models, args: Args, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss to minimise (PPO's eq. 9, negated) and statistics to log."""
    log_probs, entropies, values = models.read(batch.prompts, batch.responses)
    # Where the actions are: the padding stays out. The CPU knows, and so need not wait for a GPU.
    at = tuple(to_device(x, log_probs.device) for x in batch.mask.nonzero(as_tuple=True))
    log_probs, entropies, values = log_probs[at], entropies[at], values[at]  # each (M,)
    log_ratio = log_probs - batch.log_probs[at]
    ratio = log_ratio.exp()  # 1, up to rounding, in the first minibatch of an update
    clip_low, clip_high = args.clip_coef, args.clip_coef_high or args.clip_coef

    surrogate = clipped_surrogate(ratio, batch.advantages[at], clip_low, clip_high)
    v_loss = torch.zeros_like(surrogate)
    if args.baseline == "critic":
        value_clip = args.clip_coef if args.clip_vloss else None
        v_loss = value_loss(values, batch.values[at], batch.returns[at], value_clip)
    entropy = entropies.mean()
    loss = -surrogate + args.vf_coef * v_loss - args.ent_coef * entropy
    if args.kl_in_loss:
        kl = kl_penalty(log_probs, batch.ref_log_probs[at], args.kl_estimator)
        loss = loss + args.kl_coef * kl.mean()
    with torch.no_grad():
        clipped = (ratio < 1.0 - clip_low) | (ratio > 1.0 + clip_high)
        stats = {
            "policy_loss": -surrogate,
            "value_loss": v_loss.detach(),
            "entropy": entropy.detach(),
            "approx_kl": (ratio - 1.0 - log_ratio).mean(),  # KL(old, new) in nats
            "clipfrac": clipped.float().mean(),
        }
    return loss, stats


def update(models: Models, args: Args, optimizer: Optimizer, minibatch: Batch) -> dict[str, Tensor]:
    """Take one step down the sum of the micro-batches' gradients; return statistics to log."""
    stats: dict[str, Any] = {}
    for columns in zip(*(x.split(args.micro_batch_size) for x in minibatch)):
        part = Batch(*columns)
        weight = part.mask.sum() / minibatch.mask.sum()  # this part's share of all tokens
        loss, figures = ppo_loss(models, args, part)
        (weight * loss).backward()
        stats = {name: stats.get(name, 0.0) + weight * x for name, x in figures.items()}
    return stats | {"grad_norm": descend(optimizer, args)}


def ppo(args: Args, task: Task, run: Run, models: Models, reward_fn: Callable) -> None:
    """Train the policy, which starts as the reference, and the value model, if any."""
    group_size = args.group_size if args.baseline == "group" else 1
    for iteration in range(run.iteration, args.num_iterations):
        remaining = 1.0 - iteration / args.num_iterations if args.anneal_lr else 1.0
        # Adam's first steps are full-sized in every weight: without warm-up, gold falls at first.
        warmup = (iteration + 1) / args.warmup_iterations
        run.optimizer.param_groups[0]["lr"] = min(remaining, warmup) * args.learning_rate

        # ---- [1] Rollout: the policy answers prompts, token by token ----------------------------
        texts = task.prompts(args.batch_size // group_size, run.shuffling)
        texts = [text for text in texts for _ in range(group_size)]
        rollout = answer(args, models.policy, texts, run.sampling)
        prompts, responses, mask = rollout.prompts, rollout.responses, rollout.mask

        # ---- [2] Score: one number for each answer, at its EOS; every token pays for its KL -----
        scores = score_answers(args, reward_fn, rollout)  # (B,)
        log_probs, _, values = in_parts(args, models.read, prompts, responses)  # each (B, R)
        ref_log_probs, _ = in_parts(args, models.reference.log_prob_and_entropy, prompts, responses)
        price = kl_penalty(log_probs, ref_log_probs, args.kl_estimator)
        price_coef = 0.0 if args.kl_in_loss else args.kl_coef
        rewards = token_rewards(scores, price, mask, price_coef)
        episodic_return = rewards.sum(1).mean().item()  # score less the KL's price

        # ---- [3] Advantages: GAE along the answers ----------------------------------------------
        gae_lambda = args.gae_lambda
        if args.baseline == "group":  # the scores are compared, then V = 0 and lambda = 1
            scores_within = group_advantages(scores, group_size, args.group_advantage)
            rewards, gae_lambda = token_rewards(scores_within, price, mask, price_coef), 1.0
        values = torch.where(mask, values, 0.0)
        next_values = F.pad(values[:, 1:], (0, 1))
        ends = mask & ~F.pad(mask[:, 1:], (0, 1))  # the last action; a cut-off answer ends as well
        advantages, returns = gae(  # takes time first, hence .T
            rewards.T, values.T, next_values.T, ends.T, ends.T, args.gamma, gae_lambda
        )
        advantages, returns = advantages.T, returns.T
        if args.credit == "response":  # a bandit: the answer is one action, valued before it
            returns = rewards.sum(1, keepdim=True).expand_as(values)
            advantages = returns - values[:, :1]
        if args.whiten_advantages:
            advantages = masked_whiten(advantages, mask)
        batch = Batch(
            prompts, responses, mask.cpu(), log_probs, ref_log_probs, advantages, returns, values
        )

        # ---- [4] Update: K epochs of shuffled minibatches ---------------------------------------
        stats = []  # of each minibatch
        for _ in range(args.update_epochs):
            order = run.shuffling.permutation(len(texts))
            shuffled = [x[to_device(order, x.device)] for x in batch]
            parts = [x.tensor_split(args.num_minibatches) for x in shuffled]
            for minibatch in map(Batch, *parts):  # the i-th part of every field
                stats.append(update(models, args, run.optimizer, minibatch))

        # ---- [5] Log: means over the iteration --------------------------------------------------
        run.global_step += args.batch_size
        losses = {f"losses/{name}": x for name, x in run.average(stats).items()}
        first_ratios = (log_probs - rollout.log_probs)[mask].exp()  # all 1, up to rounding
        unexplained = (returns - values)[mask].var() / returns[mask].var()
        kl = (log_probs - ref_log_probs).masked_fill(~mask, 0.0).sum(1).mean().item()
        metrics = {
            "charts/episodic_return": episodic_return,
            "charts/episodic_length": mask.sum(1).float().mean().item(),
            "objective/score": scores.mean().item(),
            "objective/gold": float(np.mean(task.gold_scores(texts, rollout.answers))),
            "objective/kl": kl,
            "objective/eos_rate": rollout.ended.float().mean().item(),
            **losses,
            "losses/first_ratio_error": (first_ratios - 1.0).abs().max().item(),
            "losses/explained_variance": 1.0 - unexplained.item(),
            "losses/kl_coef": args.kl_coef,
        }
        if run.end_iteration(metrics):
            break


def evaluate(
    args: Args, task: Task, run: Run, models: Models, policy: Transformer, score: Callable
) -> dict[str, float]:
    """Let a model answer prompts; print some answers, return means over all of them."""
    rng, generator = streams(args, 4, run.device)
    prompts = task.prompts(args.eval_prompts, rng, held_out=True)
    rollout = answer(args, policy, prompts, generator)
    if run.stopped:
        raise UserError("stopped during the evaluation")
    for text, reply in zip(prompts[:4], rollout.answers):
        experiment.say(f"    {text} {reply}")
    read = models.reference.log_prob_and_entropy
    ref_log_probs, _ = in_parts(args, read, rollout.prompts, rollout.responses)
    kl = torch.where(rollout.mask, rollout.log_probs - ref_log_probs, 0.0).sum(1)
    return {
        "gold": np.mean(task.gold_scores(prompts, rollout.answers)).item(),
        "proxy": score_answers(args, score, rollout).mean().item(),
        "kl": kl.mean().item(),
        "length": rollout.mask.sum(1).float().mean().item(),
        "eos_rate": rollout.ended.float().mean().item(),
    }


def train(
    args: Args, reward_fn: Callable | None = None, on_iteration: Callable | None = None
) -> tuple[Transformer, dict[str, Any]]:
    """Run the stages; `reward_fn(prompts, answers)` gives scores; return policy and results.

    `on_iteration(step, metrics)` is called after each iteration of PPO; True ends the training.
    """
    task = find_task(args.task)
    for name in ("num_iterations", "batch_size", "update_epochs", "sft_steps"):
        if getattr(args, name) is None:
            args = replace(args, **{name: getattr(task, name)})
    with Run(args, on_iteration) as run:
        if experiment.world_size() > 1:
            raise UserError("this script runs in one process: start it without torchrun")
        args.check_range("context_size", task.prompt_size + args.max_new_tokens + 1)  # and an EOS
        models = Models(args, task, learned=task.learned and reward_fn is None).to(run.device)
        if args.load_models is not None:
            models.take(args)
        trained = [parameter for parameter in models.parameters() if parameter.requires_grad]
        optimizer = Adam(trained, eps=1e-5, fused=True)
        run.shuffling, run.sampling = streams(args, 3, run.device)
        run.start(models, optimizer)
        if args.evaluate and models.stages_done < 3:
            raise UserError(f"--evaluate {args.evaluate}: it has no policy yet: --resume it")
        run.save()  # from now on the run can be resumed

        # ---- Stage 1: the reference, which is also the first policy ----------------------------
        if models.stages_done < 1:
            models.reference.load_state_dict(sft(args, task, run).state_dict())
            models.stages_done.fill_(1)
            run.save()

        # ---- Stage 2: the reward model, unless the reward is known ------------------------------
        if models.reward_model is not None and models.stages_done < 2:
            models.reward_model = train_reward_model(args, task, run, models)
            models.stages_done.fill_(2)
            run.save()
        score = reward_fn or task.gold_scores
        if models.reward_model is not None:
            score = partial(read_scores, args, models.reward_model)

        # ---- Stage 3: PPO ----------------------------------------------------------------------
        if models.stages_done < 3:
            models.policy.load_state_dict(models.reference.state_dict())
            streams(args, 3, run.device)  # seeds the head of a value model
            if models.value is not None:
                first = make_model(args, task, scalar=True, trunk=models.reference)
                if args.value_init == "reward" and models.reward_model is not None:
                    first = models.reward_model  # it can tell good from bad (N details)
                models.value.load_state_dict(first.state_dict())
            models.stages_done.fill_(3)
        ppo(args, task, run, models, score)
        stopped, run.stopped = run.stopped or None, ""  # another signal ends the evaluation
        if stopped:
            experiment.say(f"stopped after {run.global_step} answers")

        # ---- Evaluation: the reference and the policy on the same prompts ------------------------
        experiment.say("SFT answers:")
        before = evaluate(args, task, run, models, models.reference, score)
        experiment.say("PPO answers:")
        after = evaluate(args, task, run, models, models.policy, score)
        experiment.say(f"{args.eval_prompts} prompts              SFT       PPO")
        for name in after:
            experiment.say(f"    {name:16}{before[name]:10.3f}{after[name]:10.3f}")
        results: dict[str, Any] = {"run_dir": str(run.folder or args.evaluate), "stopped": stopped}
        results |= {f"sft_{name}": x for name, x in before.items()} | after
        if models.reward_model is not None:
            results["rm_accuracy"], results["rm_correlation"] = models.reward_model_quality.tolist()
        run.write_results(results)
        return models.policy, results


if __name__ == "__main__":
    experiment.main(Args, train)
