"""RLHF: its transformer, its formulas, its tasks, its three stages, and the known optimum."""

import copy
import dataclasses
import itertools
import json
import math
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import experiment
import ppo_rlhf_toy as rlhf
from benchmarks.rlhf import GRAMMARS
from benchmarks.rlhf_optimum import known_optimum
from ppo_rlhf_toy import Args, UserError
from tests.helpers import StopAfter, read_metrics, run_main, spy

CPU = torch.device("cpu")
REVIEWS, ARITHMETIC = rlhf.TASKS["reviews"], rlhf.TASKS["arithmetic"]
PAD, EOS = rlhf.Tokenizer.pad, rlhf.Tokenizer.eos
# Of models that are small and stages that take a second or less.
TINY = dict(d_model=16, num_layers=1, num_heads=2, sft_steps=8, sft_batch_size=8, rm_pairs=64)
TINY |= dict(rm_min_accuracy=0.0, num_iterations=2, batch_size=16, update_epochs=2, eval_prompts=32)
RECORD = 10**9  # iterations after which StopAfter never stops anything


class Lengths(rlhf.Reviews):
    """Reviews whose gold tells even a random model's answers apart: the shorter the better."""

    def gold(self, prompt: str, response: str) -> float:
        return 1.0 / (1.0 + len(response.split()))


LENGTHS = Lengths()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def lengths(monkeypatch) -> None:
    """Let the task reviews prefer short answers."""
    monkeypatch.setitem(rlhf.TASKS, "reviews", LENGTHS)


def tiny(run_dir: Path | None = None, **changes: Any) -> Args:
    return Args(**TINY | dict(run_dir=run_dir) | changes)


def flags_of(args: Args) -> str:
    """Return the flags of a command line that gives these arguments."""
    default = vars(Args())
    changed = {name: x for name, x in vars(args).items() if x != default[name]}
    return " ".join(f"--{name.replace('_', '-')} {x}" for name, x in changed.items())


def random_model(args: Args, task: rlhf.Task, scalar: bool = False, seed: int = 0):
    torch.manual_seed(seed)
    model = rlhf.make_model(args, task, scalar)
    model.temperature = args.temperature
    for parameter in model.parameters():  # away from zero biases and unit gains
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def sampled(args: Args, count: int = 24, seed: int = 0) -> tuple:
    """A random policy and its answers of different lengths to prompts of different lengths."""
    policy = random_model(args, REVIEWS, seed=seed)
    policy.head.bias[EOS] += 2.0
    rng, generator = rlhf.streams(args, 9, CPU)
    rollout = rlhf.answer(args, policy, REVIEWS.prompts(count, rng), generator)
    assert len({len(text.split()) for text in rollout.texts}) > 1
    assert len(set(rlhf.action_mask(rollout.responses, PAD).sum(1).tolist())) > 3
    return policy, rollout


def decode(task: rlhf.Task, responses: torch.Tensor) -> list[str]:
    """Return the texts of responses (B, R), without EOS and padding."""
    rows = ([token for token in row if token > EOS] for row in responses.tolist())
    return list(map(task.tokenizer.decode, rows))


def as_rollout(texts: list[str], responses: torch.Tensor) -> rlhf.Rollout:
    """Answers that no policy gave."""
    nothing, mask = torch.zeros(responses.shape), rlhf.action_mask(responses, PAD)
    ended = (responses == EOS).any(1)
    answers = decode(REVIEWS, responses)
    return rlhf.Rollout(texts, answers, nothing, responses, nothing, mask, ended)


# ---- The transformer ---------------------------------------------------------------------------


def test_forward_with_cache_equals_the_full_pass() -> None:
    policy, rollout = sampled(Args())
    tokens, cache = torch.cat([rollout.prompts, rollout.responses], 1), {}
    full = policy(tokens)
    P = rollout.prompts.shape[1]
    parts = [policy(tokens[:, :P], cache)]
    parts += [policy(tokens[:, t : t + 1], cache) for t in range(P, tokens.shape[1])]
    real = tokens != PAD
    torch.testing.assert_close(torch.cat(parts, 1)[real], full[real], atol=1e-5, rtol=0)


def test_generate_without_cache_gives_the_same_answers(monkeypatch) -> None:
    args = Args()
    policy, rollout = sampled(args)
    forward, read = rlhf.Transformer.forward, []

    def without_cache(self, tokens, cache=None):
        if cache is None:
            return forward(self, tokens)
        cache["tokens"] = torch.cat([cache.get("tokens", tokens[:, :0]), tokens], 1)
        read.append(tokens.shape[1])
        return forward(self, cache["tokens"])

    answers = []
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(rlhf.Transformer, "forward", without_cache)
        generator = torch.Generator().manual_seed(5)
        answers.append(rlhf.generate(args, policy, generator, rollout.prompts))
    assert torch.equal(answers[0][0], answers[1][0])
    torch.testing.assert_close(answers[0][1], answers[1][1], atol=1e-5, rtol=0)
    assert set(read[1:]) == {1}  # after the prompt one token a step


def test_padding_left_or_right_changes_nothing() -> None:
    policy, rollout = sampled(Args())
    batched, entropy = policy.log_prob_and_entropy(rollout.prompts, rollout.responses)
    for i, text in enumerate(rollout.texts):
        length = int(rlhf.action_mask(rollout.responses, PAD)[i].sum())
        prompt, response = (
            torch.tensor([REVIEWS.tokenizer.encode(text)]),
            rollout.responses[i : i + 1],
        )
        alone = policy.log_prob_and_entropy(prompt, response[:, :length])
        torch.testing.assert_close(batched[i, :length], alone[0][0], atol=1e-5, rtol=0)
        torch.testing.assert_close(entropy[i, :length], alone[1][0], atol=1e-5, rtol=0)


def test_pad_embedding_and_later_words_are_not_seen() -> None:
    policy, (_, _, prompts, responses, *_) = sampled(Args())
    before = policy.before(prompts, responses)
    mask = rlhf.action_mask(responses, PAD)
    policy.word.weight[PAD] += 100.0
    torch.testing.assert_close(policy.before(prompts, responses)[mask], before[mask])
    changed = responses.clone()
    changed[:, 3:] = 5  # the logits of the first four tokens come from what stands before them
    torch.testing.assert_close(policy.before(prompts, changed)[:, :4], before[:, :4])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_log_probs_at_sampling_are_the_recomputed_ones(temperature: float) -> None:
    policy, (_, _, prompts, responses, log_probs, *_) = sampled(Args(temperature=temperature))
    again, _ = policy.log_prob_and_entropy(prompts, responses)
    again = torch.where(rlhf.action_mask(responses, PAD), again, 0.0)
    torch.testing.assert_close(log_probs, again, atol=1e-5, rtol=0)


def test_log_softmax_divides_by_the_temperature_and_excludes_padding() -> None:
    logits = torch.tensor([[3.0, 0.0, 1.0, 2.0]])  # PAD, EOS and two words
    expected = F.log_softmax(logits[:, 1:] / 0.5, -1)
    log_pi = random_model(tiny(temperature=0.5), REVIEWS).log_softmax(logits)
    torch.testing.assert_close(log_pi[:, 1:], expected)
    assert log_pi[0, PAD] < -1e8


def test_generate_samples_with_the_softmax_at_the_temperature() -> None:
    args = Args(max_new_tokens=1, temperature=0.5)
    policy = random_model(args, REVIEWS)
    prompts = torch.tensor([REVIEWS.tokenizer.encode("pool :")]).expand(20_000, -1)
    words, _ = rlhf.generate(args, policy, torch.Generator().manual_seed(0), prompts)
    frequency = torch.bincount(words[:, 0], minlength=len(policy.head.bias)) / len(words)
    expected = F.softmax(policy(prompts[:1])[0, -1, 1:] / 0.5, -1)
    torch.testing.assert_close(frequency[1:], expected, atol=0.015, rtol=0)


def test_responses_end_with_eos_and_then_pad() -> None:
    _, rollout = sampled(Args())
    for row, log_prob in zip(rollout.responses.tolist(), rollout.log_probs):
        end = row.index(EOS) + 1 if EOS in row else len(row)
        assert PAD not in row[:end] and set(row[end:]) <= {PAD}
        assert (log_prob[:end] < 0).all() and (log_prob[end:] == 0).all()


def test_answer_in_parts_of_512_keeps_prompts_and_answers_together() -> None:
    args = Args(max_new_tokens=6)
    policy, generator = random_model(args, REVIEWS), torch.Generator()
    policy.temperature = 1e-6  # the likeliest word every time: one answer a prompt
    texts = ["pool :"] * 512 + ["view food music :"] * 8
    rollout = rlhf.answer(args, policy, texts, generator)
    for text in set(texts):
        alone = rlhf.answer(args, policy, [text], generator)
        assert {rollout.answers[i] for i in range(520) if texts[i] == text} == {alone.answers[0]}
    assert rollout.responses.shape == rollout.log_probs.shape


def test_answer_is_as_wide_as_the_longest_response() -> None:
    args = Args()
    policy, _ = sampled(args)
    policy.head.bias[EOS] += 3.0  # short answers
    rollout = rlhf.answer(args, policy, ["pool :"] * 4, torch.Generator().manual_seed(0))
    longest = max(len(answer.split()) for answer in rollout.answers) + 1
    assert rollout.responses.shape[1] == rollout.log_probs.shape[1] == longest < 24


def test_scalar_head_starts_small() -> None:
    """Deviation 1 / sqrt(d + 1) and no bias (N details, R2)."""
    args = Args()
    heads = [rlhf.make_model(args, REVIEWS, scalar=True).head for _ in range(40)]
    weights = torch.stack([head.weight.detach() for head in heads])
    assert weights.numel() == 40 * args.d_model
    assert weights.std() == pytest.approx((args.d_model + 1) ** -0.5, rel=0.05)
    assert all(head.bias == 0 for head in heads)


# ---- Formulas ----------------------------------------------------------------------------------


def test_token_rewards_put_the_score_on_eos_which_is_an_action() -> None:
    responses = torch.tensor([[7, 8, EOS, PAD], [7, EOS, PAD, PAD], [7, 8, 9, 7], [EOS, 0, 0, 0]])
    mask = rlhf.action_mask(responses, PAD)
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    kl = torch.tensor([[1.0, 2.0, 3.0, 99.0]]).expand(4, -1)
    rewards = rlhf.token_rewards(torch.tensor([10.0, 20.0, 30.0, 40.0]), kl, mask, 0.5)
    # The third was cut off: its score is on its last token.
    expected = [[-0.5, -1, 8.5, 0], [-0.5, 19, 0, 0], [-0.5, -1, -1.5, 30 - 49.5], [39.5, 0, 0, 0]]
    assert rewards.tolist() == expected


def test_score_without_eos_is_less_by_the_penalty() -> None:
    rollout = as_rollout(["pool :"] * 3, torch.tensor([[2, 3, EOS], [2, 3, 4], [EOS, PAD, PAD]]))
    scores = rlhf.score_answers(Args(missing_eos_penalty=0.7), lambda p, r: [1.0] * 3, rollout)
    torch.testing.assert_close(scores, torch.tensor([1.0, 0.3, 1.0]))


@pytest.mark.parametrize(("estimator", "exact"), [("k1", True), ("k3", True), ("k2", False)])
def test_kl_penalty_is_the_kl_on_average(estimator: str, exact: bool) -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.2, 0.4])
    mean = (p * rlhf.kl_penalty(p.log(), q.log(), estimator)).sum().item()
    kl = (p * (p / q).log()).sum().item()
    assert mean == pytest.approx(kl, abs=1e-6 if exact else 0.02)
    likelier = rlhf.kl_penalty(torch.tensor(-1.0), torch.tensor(-2.0), estimator)
    assert likelier > 0.3  # what the policy says more often than the reference costs


def test_masked_whiten_equals_numpy() -> None:
    rng = np.random.default_rng(0)
    x, mask = 3.0 + 2.0 * rng.normal(size=(5, 7)), rng.random((5, 7)) < 0.6
    got = rlhf.masked_whiten(torch.tensor(x), torch.tensor(mask)).numpy()
    real = x[mask]
    expected = (real - real.mean()) / real.std(ddof=1)
    np.testing.assert_allclose(got[mask], expected, rtol=1e-6)
    assert (got[~mask] == 0).all()


def test_bradley_terry_loss_and_gradient_equal_those_by_hand() -> None:
    chosen = torch.tensor([1.0, -2.0], requires_grad=True)
    rejected = torch.tensor([0.5, 1.0], requires_grad=True)
    loss = rlhf.bradley_terry_loss(chosen, rejected)
    loss.backward()
    p = [1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(3.0))]
    assert loss.item() == pytest.approx(-(math.log(p[0]) + math.log(p[1])) / 2, rel=1e-6)
    expected = torch.tensor([(p[0] - 1) / 2, (p[1] - 1) / 2])  # d(-log sigmoid(d)) / dd = P - 1
    torch.testing.assert_close(chosen.grad, expected)
    torch.testing.assert_close(rejected.grad, -expected)


def test_read_scores_are_those_at_eos() -> None:
    args = Args()
    model = random_model(args, REVIEWS, scalar=True)
    texts, answers = ["pool :", "bath view bed :"], ["the pool was good .", "bad ."]
    scores = rlhf.read_scores(args, model, texts, answers)
    for text, answer, score in zip(texts, answers, scores):
        tokens = torch.tensor(
            [[*REVIEWS.tokenizer.encode(text), *REVIEWS.tokenizer.encode(answer), EOS]]
        )
        torch.testing.assert_close(model(tokens)[0, -1, 0], score, atol=1e-5, rtol=0)


def test_read_scores_of_the_longest_answer_fit_the_context() -> None:
    args = tiny(context_size=29, max_new_tokens=24)  # and the EOS that a cut-off answer lacks
    model, longest = random_model(args, REVIEWS, scalar=True), " ".join(["the"] * 24)
    rlhf.read_scores(args, model, ["pool view bed :"], [longest])
    with pytest.raises(UserError, match="context-size 28 must lie between 29 and"):
        rlhf.train(dataclasses.replace(args, context_size=28))


@pytest.mark.parametrize(("clip_vloss", "vf_coef"), [(True, 0.5), (False, 2.0)])
def test_ppo_loss_equals_the_sum_over_tokens_by_hand(clip_vloss: bool, vf_coef: float) -> None:
    args = tiny(clip_coef=0.1, clip_vloss=clip_vloss, vf_coef=vf_coef, ent_coef=0.3)
    _, (_, _, prompts, responses, *_) = sampled(args)
    models = rlhf.Models(args, REVIEWS, learned=False)
    mask, (B, R) = rlhf.action_mask(responses, PAD), responses.shape
    rng = torch.Generator().manual_seed(0)
    advantages, returns, old_values = torch.randn(3, B, R, generator=rng)
    log_probs, entropies = models.policy.log_prob_and_entropy(prompts, responses)
    old_log_probs = log_probs.detach() + 0.2 * torch.randn(B, R, generator=rng)
    batch = rlhf.Batch(
        prompts, responses, mask, old_log_probs, old_log_probs, advantages, returns, old_values
    )
    loss, figures = rlhf.ppo_loss(models, args, batch)

    values, tokens = models.value.before(prompts, responses)[..., 0], []
    for b, t in itertools.product(range(B), range(R)):
        if mask[b, t]:
            r, A = (log_probs[b, t] - old_log_probs[b, t]).exp().item(), advantages[b, t].item()
            surrogate = min(r * A, min(max(r, 0.9), 1.1) * A)
            v, old, target = values[b, t].item(), old_values[b, t].item(), returns[b, t].item()
            error = (v - target) ** 2
            if clip_vloss:
                error = max(error, (min(max(v, old - 0.1), old + 0.1) - target) ** 2)
            tokens.append((r, surrogate, error / 2.0, entropies[b, t].item()))
    ratios, surrogates, errors, entropy = np.array(tokens).T
    expected = -surrogates.mean() + vf_coef * errors.mean() - 0.3 * entropy.mean()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert figures["clipfrac"].item() == pytest.approx((abs(ratios - 1) > 0.1).mean())
    assert figures["approx_kl"].item() == pytest.approx(
        (ratios - 1 - np.log(ratios)).mean(), rel=1e-3
    )


# ---- Tasks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "response", "gold", "grammatical"),
    [
        ("pool :", "the pool was good .", 1.0, True),
        ("pool :", "the pool was very bad .", 0.0, True),
        ("pool bed :", "the pool was good but the bed was rather dull .", 0.5, True),
        ("pool bed :", "the bed was good and the pool was warm .", 1.0, True),
        ("pool :", "the pool was good . i would never return .", 0.5, True),
        ("pool bed :", "the pool was good and the bed was fine . i would gladly return .", 1, True),
        ("pool bed :", "the pool was good .", 0.0, True),  # misses a noun
        ("pool :", "the pool was good", 0.0, False),
        ("pool :", "pool was good .", 0.0, False),
        ("pool :", "the pool was very very good .", 0.0, False),
        ("pool :", "the pool was good and .", 0.0, False),
        ("pool :", "the pool was good . .", 0.0, False),
        ("pool :", "the pool was good . i would return .", 0.0, False),
        ("pool :", "", 0.0, False),
    ],
)
def test_gold_of_reviews_is_the_share_of_praise(prompt, response, gold, grammatical) -> None:
    assert REVIEWS.gold(prompt, response) == pytest.approx(gold)
    assert (REVIEWS.grammar.fullmatch(response) is not None) == grammatical


def test_gold_of_arithmetic_is_one_for_the_sum_alone() -> None:
    assert ARITHMETIC.gold("27+8=", "35") == 1.0
    assert [ARITHMETIC.gold("27+8=", r) for r in ("34", "035", "", "3 5", "35=")] == [0.0] * 5
    assert GRAMMARS["arithmetic"].fullmatch("35") and not GRAMMARS["arithmetic"].fullmatch("035")


def test_prompts_of_arithmetic_held_out_are_never_trained_on() -> None:
    rng = np.random.default_rng(0)
    shown, held_out = (set(ARITHMETIC.prompts(100_000, rng, h)) for h in (False, True))
    assert not shown & held_out and len(shown) + len(held_out) > 9_700


def test_one_digit_numbers_of_arithmetic_are_twice_as_frequent_in_training() -> None:
    rng = np.random.default_rng(0)
    for held_out, share in ((False, 0.1 ** (2 / 3)), (True, 0.1)):
        numbers = "".join(ARITHMETIC.prompts(5_000, rng, held_out)).replace("=", "+").split("+")
        digits = [len(number) for number in numbers if number]
        assert np.mean(np.array(digits) == 1) == pytest.approx(share, abs=0.015)


@pytest.mark.parametrize("name", rlhf.TASKS)
def test_demonstrations_are_grammatical_and_fit(name: str) -> None:
    rng, args, task = np.random.default_rng(0), Args(), rlhf.TASKS[name]
    texts = task.prompts(500, rng)
    demonstrations = [task.demonstration(text, rng) for text in texts]
    assert all(map(GRAMMARS[name].fullmatch, demonstrations))
    assert max(len(task.tokenizer.encode(text)) for text in texts) <= task.prompt_size
    lengths = {len(task.tokenizer.encode(text)) + 1 for text in demonstrations}
    assert max(lengths) <= args.max_new_tokens and len(lengths) > 2
    rows = [[*task.tokenizer.encode(text), EOS] for text in demonstrations]
    responses = task.tokenizer.block(rows, False, CPU)
    assert decode(task, responses) == demonstrations
    if task is REVIEWS:
        assert 0.4 < np.mean(task.gold_scores(texts, demonstrations)) < 0.6
        assert (min(lengths), max(lengths)) == (6, 24)


# ---- Stage 3 -----------------------------------------------------------------------------------


@pytest.fixture
def run_ppo(monkeypatch, tmp_path) -> Callable:
    """Return a function that trains with given models in place of those of stages 1 and 2."""
    folders = (tmp_path / f"ppo{i}" for i in itertools.count())

    def run(
        args: Args,
        task: rlhf.Task,
        reference: rlhf.Transformer,
        reward_model: rlhf.Transformer | None = None,
    ) -> SimpleNamespace:
        folder, record = next(folders), StopAfter(RECORD)
        with monkeypatch.context() as patch:
            patch.setitem(rlhf.TASKS, args.task, task)
            patch.setattr(rlhf, "sft", lambda args, task, run: copy.deepcopy(reference))
            patch.setattr(rlhf, "train_reward_model", lambda *_: copy.deepcopy(reward_model))
            reward_fn = task.gold_scores if reward_model is None else None
            args = dataclasses.replace(args, run_dir=folder)
            policy, results = rlhf.train(args, reward_fn, record)
        state = torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]
        return SimpleNamespace(
            policy=policy, results=results, metrics=record.metrics, state=state, folder=folder
        )

    return run


def part(state: dict, name: str) -> dict:
    """Return the state of one of the four models."""
    return {k.removeprefix(f"{name}."): x for k, x in state.items() if k.startswith(f"{name}.")}


@pytest.mark.parametrize("anneal_lr", [True, False])
def test_learning_rate_warms_up_and_falls(anneal_lr: bool, run_ppo) -> None:
    args = tiny(num_iterations=5, warmup_iterations=3, learning_rate=0.6, anneal_lr=anneal_lr)
    rows = run_ppo(args, LENGTHS, random_model(args, LENGTHS)).metrics
    expected = [0.2, 0.4, 0.36, 0.24, 0.12] if anneal_lr else [0.2, 0.4, 0.6, 0.6, 0.6]
    assert [row["charts/learning_rate"] for row in rows] == pytest.approx(expected)


def test_update_uses_every_answer_once_an_epoch_in_another_order(run_ppo, monkeypatch) -> None:
    args = tiny(num_iterations=1, batch_size=16, num_minibatches=4, update_epochs=3)
    losses = spy(monkeypatch, "ppo_loss", rlhf)
    answers = spy(monkeypatch, "answer", rlhf)
    run_ppo(args, LENGTHS, random_model(args, LENGTHS))
    used = [call.batch.responses.tolist() for call in losses]
    assert [len(rows) for rows in used] == 12 * [4]
    epochs = [list(itertools.chain(*used[i : i + 4])) for i in (0, 4, 8)]
    rollout = answers[0].result.responses.tolist()
    assert all(sorted(rows) == sorted(rollout) for rows in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_gamma_discounts_the_score_at_the_first_word(gamma: float, run_ppo, monkeypatch) -> None:
    """With lambda 1 the first return is gamma^(L - 1) score, whatever the critic says."""
    assert Args().gamma == 1.0  # detail P6
    calls = spy(monkeypatch, "gae", rlhf)
    args = tiny(num_iterations=1, gamma=gamma, gae_lambda=1.0, kl_coef=0.0)
    run_ppo(args, LENGTHS, random_model(args, LENGTHS))
    _, returns = calls[0].result
    scores, length = calls[0].rewards.sum(0), calls[0].done.float().argmax(0) + 1
    torch.testing.assert_close(returns[0], gamma ** (length - 1) * scores)


def test_credit_response_gives_all_tokens_what_the_answer_earned(run_ppo, monkeypatch) -> None:
    losses, rewards = spy(monkeypatch, "ppo_loss", rlhf), spy(monkeypatch, "token_rewards", rlhf)
    args = tiny(num_iterations=1, credit="response", num_minibatches=1)
    run_ppo(args, LENGTHS, random_model(args, LENGTHS))
    batch = losses[0].batch
    advantages = torch.where(batch.mask, batch.advantages, math.nan)
    torch.testing.assert_close(
        advantages.nan_to_num(-9.0).amax(1), advantages.nan_to_num(9.0).amin(1)
    )
    totals = rewards[0].result.sum(1)
    torch.testing.assert_close(batch.returns[:, 0].sort()[0], totals.sort()[0])


def test_group_baseline_answers_each_prompt_several_times(run_ppo, monkeypatch) -> None:
    calls, answers = spy(monkeypatch, "gae", rlhf), spy(monkeypatch, "answer", rlhf)
    args = tiny(num_iterations=1, baseline="group", group_size=4)
    result = run_ppo(args, LENGTHS, random_model(args, LENGTHS))
    texts = answers[0].texts
    assert all(len(set(texts[i : i + 4])) == 1 for i in range(0, 16, 4))
    assert calls[0].gae_lambda == 1.0 and not calls[0].values.any()
    assert not part(result.state, "value")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ratio_is_one_on_the_first_minibatch(temperature: float, run_ppo) -> None:
    args = tiny(temperature=temperature, num_iterations=3, num_minibatches=1)
    result = run_ppo(args, LENGTHS, random_model(args, LENGTHS))
    rows = result.metrics
    assert len(rows) == 3
    # Policy and reference have the temperature of the flag, so they are one at first.
    assert result.policy.temperature == temperature and abs(rows[0]["objective/kl"]) < 1e-4
    assert max(row["losses/first_ratio_error"] for row in rows) < 1e-4
    assert rows[-1]["losses/approx_kl"] > 1e-6  # the later ones are not 1, so it is not a constant


@pytest.mark.parametrize("fault", ["another temperature", "a token beside", "padding counts"])
def test_first_ratio_error_shows_a_fault(fault: str, run_ppo, monkeypatch) -> None:
    args, generate, before = tiny(num_iterations=1), rlhf.generate, rlhf.Transformer.before
    if fault == "another temperature":

        def colder(args, policy, *rest):
            with monkeypatch.context() as patch:
                patch.setattr(policy, "temperature", 0.7)
                return generate(args, policy, *rest)

        monkeypatch.setattr(rlhf, "generate", colder)
    elif fault == "padding counts":
        monkeypatch.setattr(rlhf, "action_mask", lambda responses, pad: responses == responses)
    else:

        def shifted(*args):
            return torch.roll(before(*args), 1, dims=1)

        monkeypatch.setattr(rlhf.Transformer, "before", shifted)
    rows = run_ppo(args, LENGTHS, random_model(args, LENGTHS)).metrics
    assert rows[0]["losses/first_ratio_error"] > 0.01


def test_ppo_moves_policy_and_value_and_leaves_reference_and_reward_model(run_ppo) -> None:
    args = tiny()
    reference, reward_model = (random_model(args, LENGTHS, scalar) for scalar in (False, True))
    state = run_ppo(args, LENGTHS, reference, reward_model).state
    for name, before in (("reference", reference), ("reward_model", reward_model)):
        after = part(state, name)
        assert all(torch.equal(x, after[key]) for key, x in before.state_dict().items())
    assert not torch.equal(state["policy.head.weight"], state["reference.head.weight"])
    assert not torch.equal(state["value.head.weight"], state["reward_model.head.weight"])


def test_advantages_of_a_batch_have_mean_0_and_standard_deviation_1(run_ppo, monkeypatch) -> None:
    losses = spy(monkeypatch, "ppo_loss", rlhf)
    args = tiny(num_iterations=1, num_minibatches=1)
    run_ppo(args, LENGTHS, random_model(args, LENGTHS))
    advantages = losses[0].batch.advantages[losses[0].batch.mask]
    assert advantages.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert advantages.std().item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("init", ["reward", "policy"])
def test_policy_starts_as_the_reference_and_the_value_model_as_the_flag_says(
    init: str, run_ppo
) -> None:
    args = tiny(value_init=init, learning_rate=1e-12, num_iterations=1)
    reference = random_model(args, LENGTHS)
    reward_model = random_model(args, LENGTHS, scalar=True, seed=1)
    state = run_ppo(args, LENGTHS, reference, reward_model).state
    for name, weights in reference.state_dict().items():
        torch.testing.assert_close(state[f"policy.{name}"], weights)
    parent = reward_model if init == "reward" else reference
    torch.testing.assert_close(state["value.word.weight"], parent.word.weight)
    same_head = torch.allclose(state["value.head.weight"], reward_model.head.weight)
    assert same_head == (init == "reward")


# ---- Stages 1 and 2 ----------------------------------------------------------------------------


class NoRun:
    """A run that nobody stops, whose log nobody reads."""

    device, folder, stopped = CPU, None, ""
    writer = SimpleNamespace(add_scalars=lambda *_: None)


def test_sft_lowers_the_loss_on_demonstrations() -> None:
    args = tiny(sft_steps=60)
    rng = np.random.default_rng(0)
    texts = REVIEWS.prompts(64, rng)
    prompts = REVIEWS.tokenizer.block([REVIEWS.tokenizer.encode(text) for text in texts], True, CPU)
    rows = [[*REVIEWS.tokenizer.encode(REVIEWS.demonstration(text, rng)), EOS] for text in texts]
    responses = REVIEWS.tokenizer.block(rows, False, CPU)

    def loss(model) -> float:
        log_probs, _ = model.log_prob_and_entropy(prompts, responses)
        return -log_probs[rlhf.action_mask(responses, PAD)].mean().item()

    assert loss(rlhf.sft(args, REVIEWS, NoRun)) < 0.8 * loss(random_model(args, REVIEWS))


def test_sft_of_arithmetic_stops_at_the_accuracy(monkeypatch) -> None:
    steps = spy(monkeypatch, "descend", rlhf)
    for accuracy, expected in ((0.0, 25), (0.99, 30)):  # it is measured every 25 steps
        steps.clear()
        monkeypatch.setattr(ARITHMETIC, "gold", lambda *_: 0.5, raising=False)
        rlhf.sft(tiny(sft_steps=30, sft_accuracy=accuracy), ARITHMETIC, NoRun)
        assert len(steps) == expected


def test_reward_model_learns_the_judges_taste_and_is_normalised() -> None:
    args = tiny(rm_pairs=256)
    reference = random_model(args, LENGTHS)
    reference.head.bias[EOS] += 2.0
    models = rlhf.Models(args, LENGTHS, learned=True)
    models.reference = reference
    model = rlhf.train_reward_model(args, LENGTHS, NoRun, models)
    accuracy, correlation = models.reward_model_quality
    assert correlation > 0.5 and accuracy > 0.5  # an untrained one has a random sign
    rng, generator = rlhf.streams(args, 8, CPU)
    rollout = rlhf.answer(args, reference, LENGTHS.prompts(512, rng), generator)
    scores = rlhf.read_scores(args, model, rollout.texts, rollout.answers)
    assert abs(scores.mean()) < 0.2 and abs(scores.std() - 1) < 0.2


def test_reward_model_below_the_accuracy_or_without_pairs_is_refused() -> None:
    args = tiny(rm_min_accuracy=1.0)
    models = rlhf.Models(args, LENGTHS, learned=True)
    models.reference = random_model(args, LENGTHS)
    with pytest.raises(UserError, match="rm-min-accuracy"):
        rlhf.train_reward_model(args, LENGTHS, NoRun, models)
    with pytest.raises(UserError, match="0 pairs apart"):
        rlhf.train_reward_model(args, REVIEWS, NoRun, models)


# ---- The proof: an enumerable vocabulary -------------------------------------------------------


class Spelling(rlhf.Task):
    """Three letters, at most three of them: 40 answers, each with a known probability in pi*."""

    tokenizer, prompt_size = rlhf.Tokenizer(["a", "b", "c"], separator=""), 1

    def prompts(self, count: int, rng: np.random.Generator, held_out: bool = False) -> list[str]:
        return [str(letter) for letter in rng.choice(["a", "b"], count)]

    def gold(self, prompt: str, response: str) -> float:
        score = 1.5 * (response.count(prompt) - response.count("c")) - 0.7 * len(response)
        return score + 2.0 * (response == "ca")


SPELLING = Spelling()


def proof_args(beta: float, **changes: Any) -> Args:
    sizes = dict(d_model=16, num_layers=1, num_heads=2, context_size=6, max_new_tokens=3)
    budget = dict(num_iterations=40, batch_size=256, num_minibatches=4, update_epochs=4)
    return Args(kl_coef=beta, learning_rate=5e-3, **(sizes | budget | changes))


def exact_kl(
    args: Args, policy: rlhf.Transformer, reference: rlhf.Transformer, scaled: bool = False
) -> float:
    """KL(pi || pi*) over all answers, pi* = pi_ref exp(score / beta) / Z, mean of both prompts.

    With `scaled`, beta is multiplied by the deviation that the scores have under the policy.
    """
    size = args.max_new_tokens
    rows = [
        [*word, EOS][:size] + [PAD] * (size - length - 1)
        for length in range(size + 1)
        for word in itertools.product((2, 3, 4), repeat=length)
    ]
    responses, kls = torch.tensor(rows), []
    mask = responses != PAD
    assert responses.shape == (40, 3)
    for prompt in ("a", "b"):
        prompts = torch.tensor([SPELLING.tokenizer.encode(prompt)] * len(rows))
        log_pi, log_ref = (
            (model.log_prob_and_entropy(prompts, responses)[0] * mask).sum(1).detach().double()
            for model in (policy, reference)
        )
        assert log_pi.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
        scores = SPELLING.gold_scores([prompt] * len(rows), decode(SPELLING, responses))
        scores = torch.tensor(scores) - args.missing_eos_penalty * (responses != EOS).all(1)
        beta = args.kl_coef
        if scaled:
            mean = (log_pi.exp() * scores).sum()
            beta = beta * (log_pi.exp() * (scores - mean) ** 2).sum().sqrt()
        log_optimum = (log_ref + scores / beta).log_softmax(0)
        kls.append((log_pi.exp() * (log_pi - log_optimum)).sum().item())
    return sum(kls) / 2


@pytest.fixture
def prove(run_ppo) -> Callable:
    """Return KL(pi || pi*) before and after PPO, and the share of the optimum, as estimated."""

    def run(args: Args) -> tuple[float, float, float]:
        reference = random_model(args, SPELLING)
        policy = run_ppo(args, SPELLING, reference).policy
        share, kl = known_optimum(args, SPELLING, policy, reference, SPELLING.gold_scores)
        before, after = (exact_kl(args, model, reference) for model in (reference, policy))
        assert kl == pytest.approx(after, abs=0.3 * after + 0.05)  # as it is estimated
        return before, after, share

    return run


@pytest.mark.parametrize(("beta", "far", "near"), [(1.0, 1.0, 0.02), (0.3, 5.0, 0.05)])
def test_ppo_reaches_the_enumerated_optimum(beta, far, near, prove) -> None:
    before, after, share = prove(proof_args(beta))
    assert before > far
    assert after < near
    assert share == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("baseline", ["group", "critic"])
def test_ppo_with_credit_response_reaches_the_enumerated_optimum(baseline: str, prove) -> None:
    before, after, _ = prove(proof_args(1.0, baseline=baseline, credit="response"))
    assert before > 1.0
    assert after < 0.05


def test_ppo_misses_the_optimum_with_the_kl_sign_flipped(prove, monkeypatch) -> None:
    right = rlhf.kl_penalty
    monkeypatch.setattr(rlhf, "kl_penalty", lambda *tensors: -right(*tensors))
    _, after, _ = prove(proof_args(1.0))
    assert after > 0.2


def test_ppo_misses_the_optimum_with_eos_outside_the_action_mask(prove, monkeypatch) -> None:
    def no_eos(*args) -> rlhf.Rollout:
        rollout = original(*args)
        mask = rollout.mask & (rollout.responses != EOS)
        first = torch.arange(mask.shape[1]) == 0  # an empty answer keeps one action
        return rollout._replace(mask=mask | first)

    original = rlhf.answer
    monkeypatch.setattr(rlhf, "answer", no_eos)
    _, after, _ = prove(proof_args(0.3))
    assert after > 0.1  # 0.19 and 0.79 on two seeds, 0.01 if right


def test_kl_after_ppo_falls_with_beta(run_ppo) -> None:
    def final_kl(beta: float) -> float:
        args = proof_args(beta, num_iterations=15)
        rows = run_ppo(args, SPELLING, random_model(args, SPELLING)).metrics
        return float(np.mean([row["objective/kl"] for row in rows[-5:]]))

    kls = [final_kl(beta) for beta in (0.3, 3.0)]
    assert kls[0] > 3 * kls[1] > 0


# ---- A run: what it writes, how it is continued and evaluated ----------------------------------


def without_times(results: dict) -> dict:
    return {k: x for k, x in results.items() if k not in ("wall_seconds", "run_dir")}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def expect_one_line(outcome: tuple[int, str, str], *words: str) -> None:
    status, _, err = outcome
    assert status == 2 and err.count("\n") == 1 and "Traceback" not in err, err
    assert err.startswith("ppo_rlhf_toy.py: ") and all(word in err for word in words), err


@pytest.mark.parametrize("task", ["reviews", "arithmetic"])
def test_train_writes_results_and_a_second_run_can_load_its_models(
    task: str, tmp_path, lengths, capsys
) -> None:
    flags = dict(task=task, sft_accuracy=0.0, missing_eos_penalty=0.5)
    policy, results = rlhf.train(tiny(tmp_path / "a", **flags))
    out = capsys.readouterr().out
    assert "SFT answers" in out and "PPO answers" in out and " prompts  " in out
    assert json.loads((tmp_path / "a" / "results.json").read_text()) == results
    keys = "sft_gold gold proxy kl length eos_rate run_dir wall_seconds "
    keys += "rm_accuracy rm_correlation" if task == "reviews" else ""
    assert set(keys.split()) <= set(results)
    assert [row["global_step"] for row in read_metrics(tmp_path / "a")] == [16, 32]

    # PPO on the loaded models is the same to the last bit.
    again, more = rlhf.train(tiny(tmp_path / "b", **flags, load_models=tmp_path / "a"))
    assert all(map(torch.equal, policy.parameters(), again.parameters()))
    assert without_times(results) == without_times(more)


def test_train_with_a_reward_function_needs_no_reward_model(run_dir) -> None:
    seen = []

    def shorter(prompts: list[str], responses: list[str]) -> list[int]:
        seen.extend(zip(prompts, responses))
        return [-len(response) for response in responses]

    _, results = rlhf.train(tiny(run_dir, kl_coef=0.0), shorter)
    assert results["proxy"] < 0 and "rm_accuracy" not in results
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"]
    assert not part(state, "reward_model")
    assert all(text.endswith(" :") and "<" not in response for text, response in seen)


@pytest.mark.parametrize("credit", ["token", "response"])
def test_reward_tensor_with_a_gradient_is_taken_as_a_number(credit: str, run_dir) -> None:
    weight = torch.ones(1, requires_grad=True)

    def reward(prompts: list[str], responses: list[str]) -> torch.Tensor:
        return weight * torch.tensor([float(len(response)) for response in responses])

    _, results = rlhf.train(tiny(run_dir, credit=credit), reward)
    assert results["proxy"] > 0 and weight.grad is None


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0] * 15, "16 finite numbers"),
        ([float("nan")] * 16, "16 finite numbers"),
        ([[1.0]] * 16, "16 finite numbers"),
    ],
)
def test_reward_function_without_a_finite_number_an_answer_is_refused(
    scores, message: str, run_dir
) -> None:
    with pytest.raises(UserError, match=message):
        rlhf.train(tiny(run_dir), reward_fn=lambda prompts, responses: scores)


@pytest.mark.parametrize("error", [ValueError, EOFError, ConnectionError, KeyError])
def test_error_inside_the_reward_function_keeps_its_traceback(error: type, run_dir) -> None:
    def my_reward(prompts: list[str], responses: list[str]) -> list[float]:
        raise error("mine")

    with pytest.raises(error, match="mine") as raised:
        rlhf.train(tiny(run_dir), my_reward)
    assert not isinstance(raised.value, UserError)
    assert raised.traceback[-1].name == "my_reward"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--task chess", "--task chess"),
        ("--context-size 28", "--context-size 28"),
        ("--max-new-tokens 28", "--context-size 32"),
        ("--kl-coef -0.1", "--kl-coef"),
        ("--baseline group --group-size 7", "--group-size"),
        ("--temperature 0", "--temperature"),
        ("--temperature 1e-90", "--temperature"),
        ("--d-model 31", "--d-model"),
        ("--batch-size 1", "--batch-size"),
        ("--batch-size 1 --max-new-tokens 1", "--batch-size"),
        ("--num-minibatches 17", "--num-minibatches"),
        ("--learning-rate inf", "--learning-rate"),
        ("--load-models nowhere", "nowhere"),
        ("--task arithmetic --load-models nowhere", "nowhere"),
        # Sizes that fit no memory, and the flags of the options.
        ("--d-model 1000000", "--d-model"),
        ("--d-model 8192 --num-layers 2", "--num-layers"),
        ("--num-layers 100000000", "--num-layers"),
        ("--num-heads 1000000", "--num-heads"),
        ("--context-size 1000000000", "--context-size"),
        ("--max-new-tokens 1000000000", "--max-new-tokens"),
        ("--batch-size 1000000000", "--batch-size"),
        ("--sft-batch-size 1000000000", "--sft-batch-size"),
        ("--rm-batch-size 1000000000", "--rm-batch-size"),
        ("--rm-pairs 1000000000", "--rm-pairs"),
        ("--rm-epochs 1000000000", "--rm-epochs"),
        ("--eval-prompts 1000000000", "--eval-prompts"),
        ("--micro-batch-size 0", "--micro-batch-size"),
        ("--kl-in-loss", "--kl-in-loss"),
        ("--clip-coef-high 0", "--clip-coef-high"),
    ],
)
def test_bad_flag_is_one_line_that_names_it_and_leaves_no_folder(
    flags: str, named: str, run_dir, monkeypatch, capsys
) -> None:
    outcome = run_main(rlhf, f"{flags_of(tiny(run_dir))} {flags}", monkeypatch, capsys)
    expect_one_line(outcome, named)
    assert not run_dir.exists()


def test_train_in_several_processes_is_refused(run_dir, monkeypatch, capsys) -> None:
    monkeypatch.setattr(experiment, "world_size", lambda: 2)
    outcome = run_main(rlhf, flags_of(tiny(run_dir)), monkeypatch, capsys)
    expect_one_line(outcome, "one process", "torchrun")
    assert not run_dir.exists()


@pytest.mark.parametrize(
    "changes",
    [
        dict(d_model=32),
        dict(num_layers=2),
        dict(num_heads=4),
        dict(context_size=33),
        dict(task="arithmetic"),
        dict(task="twin"),
    ],
    ids=lambda changes: " ".join(map(str, *changes.items())),
)
def test_load_of_a_model_of_another_shape_is_one_line_and_leaves_no_folder(
    changes: dict, tmp_path, lengths, monkeypatch, capsys
) -> None:
    twin = rlhf.Reviews()  # another task, of which all weights have the same shapes
    monkeypatch.setitem(rlhf.TASKS, "twin", twin)
    rlhf.train(tiny(tmp_path / "a", num_iterations=1, eval_prompts=2, kl_coef=0.0))
    before = snapshot(tmp_path / "a")
    words = f"{flags_of(tiny(tmp_path / 'run', **changes))} --load-models {tmp_path / 'a'}"
    expect_one_line(run_main(rlhf, words, monkeypatch, capsys), str(tmp_path / "a"))
    assert not (tmp_path / "run").exists() and snapshot(tmp_path / "a") == before


def die(*_: Any) -> None:
    raise RuntimeError("as a run that is killed")


def interrupt(*_: Any) -> None:
    signal.raise_signal(signal.SIGINT)


def end_at(step: int, how: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `how` happen in a gradient step, counted over all stages."""
    descend, calls = rlhf.descend, itertools.count(1)

    def patched(*args: Any) -> torch.Tensor:
        if next(calls) == step:
            how()
        return descend(*args)

    monkeypatch.setattr(rlhf, "descend", patched)


@pytest.mark.parametrize(("step", "stage"), [(4, "SFT"), (11, "reward model")])
def test_run_killed_in_stage_1_or_2_ends_after_a_resume_as_if_it_never_was(
    step: int, stage: str, tmp_path, lengths, monkeypatch
) -> None:
    whole, expected = rlhf.train(tiny(tmp_path / "whole"))
    args = tiny(tmp_path / "parts")
    with monkeypatch.context() as patch:
        end_at(step, die, patch)
        with pytest.raises(RuntimeError, match="killed"):
            rlhf.train(args)
    stages = spy(monkeypatch, "sft", rlhf)
    policy, results = rlhf.train(dataclasses.replace(args, run_dir=None, resume=args.run_dir))
    assert len(stages) == (stage == "SFT")  # a complete stage is not repeated
    assert all(map(torch.equal, whole.parameters(), policy.parameters()))
    assert without_times(results) == without_times(expected)


def test_resume_of_a_run_with_loaded_models_trains_none_of_them(
    tmp_path, lengths, monkeypatch
) -> None:
    whole, _ = rlhf.train(tiny(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        end_at(1, die, patch)
        with pytest.raises(RuntimeError, match="killed"):
            rlhf.train(tiny(tmp_path / "parts", load_models=tmp_path / "whole"))
    shutil.rmtree(tmp_path / "whole")
    monkeypatch.setattr(rlhf, "sft", die)
    monkeypatch.setattr(rlhf, "train_reward_model", die)
    policy, _ = rlhf.train(tiny(resume=tmp_path / "parts"))
    assert all(map(torch.equal, whole.parameters(), policy.parameters()))


@pytest.mark.parametrize(("step", "stage"), [(4, "SFT"), (11, "reward model")])
def test_ctrl_c_in_stage_1_or_2_is_one_line_and_the_run_can_be_resumed(
    step: int, stage: str, run_dir, lengths, monkeypatch, capsys
) -> None:
    with monkeypatch.context() as patch:
        end_at(step, interrupt, patch)
        outcome = run_main(rlhf, flags_of(tiny(run_dir)), patch, capsys)
    assert outcome[0] == 2 and "Traceback" not in outcome[2]
    assert f"stopped in the {stage} stage" in outcome[2] and f"--resume {run_dir}" in outcome[2]
    expect_one_line(run_main(rlhf, f"--evaluate {run_dir}", monkeypatch, capsys), "--resume it")
    status, out, _ = run_main(rlhf, f"--resume {run_dir}", monkeypatch, capsys)
    assert status == 0 and " prompts  " in out


@pytest.mark.parametrize("flags", [{}, dict(task="arithmetic", baseline="group", group_size=4)])
def test_run_stopped_in_stage_3_ends_after_a_resume_as_if_it_never_was(
    flags: dict, tmp_path, lengths
) -> None:
    flags = flags | dict(num_iterations=5, checkpoint_every=2)
    whole, expected = rlhf.train(tiny(tmp_path / "whole", **flags))
    _, stopped = rlhf.train(tiny(tmp_path / "parts", **flags), on_iteration=StopAfter(3))
    assert stopped["stopped"] == "on_iteration"
    with open(tmp_path / "parts" / "metrics.csv", "a") as file:
        file.write("64,half a li")  # as a run leaves it that is killed before its next checkpoint
    policy, results = rlhf.train(tiny(resume=tmp_path / "parts", **flags))
    assert all(map(torch.equal, whole.parameters(), policy.parameters()))
    assert without_times(results) == without_times(expected)
    rows = [read_metrics(tmp_path / name) for name in ("parts", "whole")]
    assert len(rows[0]) == 5
    for first, second in zip(*rows, strict=True):
        assert first | {"charts/SPS": 0} == pytest.approx(
            second | {"charts/SPS": 0}, rel=0, abs=0, nan_ok=True
        )


def test_evaluate_of_a_run_killed_in_stage_3_takes_the_newest_checkpoint(
    run_dir, lengths, monkeypatch, capsys
) -> None:
    _, first = rlhf.train(tiny(run_dir))
    args = tiny(resume=run_dir, num_iterations=4, checkpoint_every=1)

    def killed(step: int, metrics: dict) -> None:
        if step == 64:
            die()

    with pytest.raises(RuntimeError, match="killed"):
        rlhf.train(args, on_iteration=killed)
    assert not (run_dir / "results.json").exists()  # nothing of an earlier end stays
    before = snapshot(run_dir)
    _, results = rlhf.train(dataclasses.replace(args, resume=None, evaluate=run_dir))
    assert snapshot(run_dir) == before

    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert saved["run"]["iteration"] == 3
    models = rlhf.Models(args, LENGTHS, learned=True)
    models.load_state_dict(saved["agent"])
    rng, generator = rlhf.streams(args, 4, CPU)
    texts = LENGTHS.prompts(32, rng)
    rollout = rlhf.answer(args, models.policy, texts, generator)
    assert results["gold"] == np.mean(LENGTHS.gold_scores(texts, rollout.answers))
    assert results["kl"] != first["kl"]


def test_evaluate_prints_the_table_of_the_training(run_dir, lengths, monkeypatch, capsys) -> None:
    _, out, _ = run_main(rlhf, flags_of(tiny(run_dir)), monkeypatch, capsys)
    status, again, _ = run_main(rlhf, f"--evaluate {run_dir}", monkeypatch, capsys)
    assert status == 0 and again.count("\n") > 10
    assert again[again.index("SFT answers") :] == out[out.index("SFT answers") :]


def test_resume_applies_a_changed_beta_and_keeps_the_curves_of_the_stages(
    run_dir, lengths, monkeypatch
) -> None:
    rlhf.train(tiny(run_dir, sft_steps=75))
    rlhf.train(tiny(resume=run_dir, sft_steps=75, num_iterations=4, kl_coef=5.0))
    assert [row["losses/kl_coef"] for row in read_metrics(run_dir)] == [0.1, 0.1, 5.0, 5.0]
    (curve,) = run_dir.glob("sft_loss*")
    events = EventAccumulator(str(curve)).Reload()
    assert [event.step for event in events.Scalars("sft/loss")] == [25, 50, 75]


def test_resume_with_a_flag_that_cannot_change_is_refused_and_writes_nothing(
    run_dir, lengths, monkeypatch, capsys
) -> None:
    rlhf.train(tiny(run_dir), on_iteration=StopAfter(1))
    before = snapshot(run_dir)
    for flag in ("batch-size 32", "seed 2", "task arithmetic", "baseline group", "d-model 32"):
        words = f"--resume {run_dir} --kl-coef 0.3 --{flag}"
        expect_one_line(run_main(rlhf, words, monkeypatch, capsys), flag.split()[0])
        assert snapshot(run_dir) == before
    status, _, _ = run_main(rlhf, f"--resume {run_dir}", monkeypatch, capsys)
    assert status == 0 and {row["losses/kl_coef"] for row in read_metrics(run_dir)} == {0.1}


def forge_cuda_state(saved: dict) -> None:
    saved["rngs"][0][0] = torch.zeros(16, dtype=torch.uint8)  # as a CUDA generator's is


def forge_moments(saved: dict) -> None:
    saved["optimizer"][0]["exp_avg_sq"] = torch.zeros(1)


def forge_shape(saved: dict) -> None:
    saved["agent"]["reference.word.weight"] = torch.zeros(3, 3)


def forge_missing(saved: dict) -> None:
    del saved["agent"]["reference.word.weight"]


@pytest.mark.parametrize("forge", [forge_cuda_state, forge_moments, forge_shape, forge_missing])
def test_forged_checkpoint_is_one_line_and_stays(
    forge: Callable, run_dir, lengths, monkeypatch, capsys
) -> None:
    rlhf.train(tiny(run_dir), on_iteration=StopAfter(1))
    path = run_dir / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    forge(saved)
    torch.save(saved, path)
    before = snapshot(run_dir)
    expect_one_line(run_main(rlhf, f"--resume {run_dir}", monkeypatch, capsys), str(run_dir))
    if forge in (forge_shape, forge_missing):
        other = run_dir.parent / "other"
        words = f"{flags_of(tiny(other))} --load-models {run_dir}"
        expect_one_line(run_main(rlhf, words, monkeypatch, capsys), str(run_dir))
        assert not other.exists()
    assert snapshot(run_dir) == before


def test_damaged_checkpoint_is_one_line(run_dir, lengths, monkeypatch, capsys) -> None:
    rlhf.train(tiny(run_dir), on_iteration=StopAfter(1))
    path, other = run_dir / "checkpoint.pt", run_dir.parent / "other"
    for data in (path.read_bytes()[:1000], b"", b"text"):
        path.write_bytes(data)
        for flags in ("--resume", "--evaluate", f"{flags_of(tiny(other))} --load-models"):
            outcome = run_main(rlhf, f"{flags} {run_dir}", monkeypatch, capsys)
            expect_one_line(outcome, str(run_dir))
    assert not other.exists()


def test_prompt_longer_than_the_context_is_a_user_error() -> None:
    args = tiny()
    policy = random_model(args, REVIEWS)
    with pytest.raises(UserError, match="context-size"):
        rlhf.answer(args, policy, ["pool " * 32 + ":"], torch.Generator())


def test_demonstration_longer_than_the_context_is_a_user_error(run_dir) -> None:
    with pytest.raises(UserError, match="--context-size is too small for a text of"):
        rlhf.train(tiny(run_dir, context_size=18, max_new_tokens=8))


def test_tyro_reads_the_flags_that_the_tests_write() -> None:
    args = tiny(Path("x"), baseline="group", clip_coef_high=0.3)
    assert tyro.cli(Args, args=flags_of(args).split()) == args


# ---- Names of the field: formulas written down from the papers ---------------------------------

SCORES = torch.tensor([20.0, 55.0, 31.0, 90.0, 7.0, 7.0, 7.0, 64.0])  # two groups of four


def by_hand(kind: str, scores: list[float], own: int) -> float:
    """Return the advantage of one answer of a group, in float64."""
    others = [score for i, score in enumerate(scores) if i != own]
    mean = sum(scores) / len(scores)
    if kind == "rloo":  # Ahmadian et al. 2024, the leave-one-out baseline
        return scores[own] - sum(others) / len(others)
    if kind == "dr_grpo":  # Liu et al. 2025, eq. 3
        return scores[own] - mean
    # Shao et al. 2024, eq. 3; verl and TRL take the deviation with n - 1, and add 1e-6 or 1e-4
    variance = sum((score - mean) ** 2 for score in scores) / (len(scores) - 1)
    return (scores[own] - mean) / math.sqrt(variance)


@pytest.mark.parametrize("kind", ["rloo", "grpo", "dr_grpo"])
def test_group_advantages_equal_those_of_the_papers(kind: str) -> None:
    got = rlhf.group_advantages(SCORES, 4, kind)
    for i in range(8):
        group = SCORES.view(2, 4)[i // 4].tolist()
        assert got[i].item() == pytest.approx(by_hand(kind, group, i % 4), rel=1e-5)


def test_whitened_group_mean_is_that_of_reinforce_plus_plus(run_ppo, monkeypatch) -> None:
    """verl's reinforce_plus_plus_baseline: s - mean on every token, whitened over all tokens."""
    losses, answers = spy(monkeypatch, "ppo_loss", rlhf), spy(monkeypatch, "answer", rlhf)
    args = tiny(num_iterations=1, num_minibatches=1, update_epochs=1, kl_coef=0.0)
    args = dataclasses.replace(args, baseline="group", group_size=4, group_advantage="dr_grpo")
    run_ppo(dataclasses.replace(args, whiten_advantages=True), LENGTHS, random_model(args, LENGTHS))
    rollout, batch = answers[0].result, losses[0].batch
    scores = np.array(LENGTHS.gold_scores(rollout.texts, rollout.answers))
    scores -= args.missing_eos_penalty * ~rollout.ended.numpy()
    centred = (scores.reshape(4, 4) - scores.reshape(4, 4).mean(1, keepdims=True)).reshape(16, 1)
    mask = rollout.mask.numpy()
    tokens = np.broadcast_to(centred, mask.shape)[mask]
    expected = (tokens - tokens.mean()) / math.sqrt(tokens.var(ddof=1) + 1e-8)
    got = {tuple(row[m].tolist()): row[m] for row, m in zip(batch.advantages, batch.mask)}
    assert len(got) > 1
    np.testing.assert_allclose(
        np.sort(batch.advantages[batch.mask].numpy()), np.sort(expected), atol=1e-5
    )


@pytest.mark.parametrize("high", [None, 0.28])
def test_policy_loss_equals_the_sum_of_the_paper(high: float | None) -> None:
    """DAPO (Yu et al. 2025): eq. 10 of clip-higher, eq. 12 over tokens."""
    rng = np.random.default_rng(15)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    ratio, advantages = rng.uniform(0.5, 1.6, (3, 4)), rng.normal(size=(3, 4))
    upper, tokens = high or 0.2, []
    for i in range(3):
        for t in range(int(mask[i].sum())):
            clipped = min(max(ratio[i, t], 0.8), 1.0 + upper)
            tokens.append(min(ratio[i, t] * advantages[i, t], clipped * advantages[i, t]))
    r, A = (torch.tensor(x, dtype=torch.float32)[mask] for x in (ratio, advantages))
    got = rlhf.clipped_surrogate(r, A, 0.2, high)
    assert got.item() == pytest.approx(sum(tokens) / 7, abs=1e-5)
    assert ((ratio > 1.2) & (ratio < 1.28) & (advantages > 0) & mask.numpy()).any()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators_equal_those_of_schulman(estimator: str) -> None:
    pi, ref = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.2, 0.4])
    r = ref / pi  # Schulman 2020 samples from q = pi, and p is the reference
    expected = {"k1": -np.log(r), "k2": np.log(r) ** 2 / 2, "k3": r - 1 - np.log(r)}[estimator]
    got = rlhf.kl_penalty(torch.tensor(pi).log(), torch.tensor(ref).log(), estimator)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_in_the_loss_has_the_gradient_that_the_page_says(estimator: str) -> None:
    """On average over the policy's own samples: k1 none, k2 of KL(pi, ref), k3 of KL(ref, pi)."""
    torch.manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    log_pi, log_ref = logits.log_softmax(0), torch.randn(5, dtype=torch.float64).log_softmax(0)
    pi, ref = log_pi.exp(), log_ref.exp()
    per_sample = rlhf.kl_penalty(log_pi, log_ref, estimator)
    expected = {
        "k1": 0.0 * logits.sum(),
        "k2": (pi * (log_pi - log_ref)).sum(),
        "k3": (ref * (log_ref - log_pi)).sum(),
    }[estimator]
    (got,) = torch.autograd.grad((pi.detach() * per_sample).sum(), logits, retain_graph=True)
    (exact,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(got, exact, atol=1e-12, rtol=1e-9)


def test_kl_in_the_loss_leaves_the_reward_to_the_score(run_ppo, monkeypatch) -> None:
    rewards, losses = spy(monkeypatch, "token_rewards", rlhf), spy(monkeypatch, "ppo_loss", rlhf)
    args = tiny(num_iterations=2, kl_in_loss=True, kl_estimator="k2", kl_coef=0.7)
    args = dataclasses.replace(args, num_minibatches=1, update_epochs=1)
    run_ppo(args, LENGTHS, random_model(args, LENGTHS))
    torch.testing.assert_close(rewards[1].result.sum(1), rewards[1].scores)
    call = losses[1]  # the second iteration, in which the policy is not the reference any more
    loss, figures = call.result
    log_probs, _, _ = call.models.read(call.batch.prompts, call.batch.responses)
    assert not torch.equal(call.batch.ref_log_probs, call.batch.log_probs)
    kl = (call.batch.log_probs - call.batch.ref_log_probs)[call.batch.mask].square().mean() / 2
    expected = figures["policy_loss"] + 0.5 * figures["value_loss"] + 0.7 * kl
    torch.testing.assert_close(loss, expected)


# ---- Ties --------------------------------------------------------------------------------------


class Ties(rlhf.Reviews):
    """Reviews worth .3 or .9 by their prompt alone, neither of which a float holds exactly."""

    def gold(self, prompt: str, response: str) -> float:
        return 0.3 if len(prompt) % 2 else 0.9


@pytest.mark.parametrize("kind", ["rloo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("credit", ["token", "response"])
@pytest.mark.parametrize("whiten", [False, True])
def test_ties_in_all_groups_change_no_weight(kind, credit, whiten, run_ppo) -> None:
    args = tiny(kl_coef=0.0, missing_eos_penalty=0.0, num_iterations=2, group_size=7, batch_size=14)
    args = dataclasses.replace(args, baseline="group", group_advantage=kind, credit=credit)
    args = dataclasses.replace(args, whiten_advantages=whiten)
    reference = random_model(args, REVIEWS)
    state = run_ppo(args, Ties(), reference).state
    for name, weights in reference.state_dict().items():
        assert torch.equal(state[f"policy.{name}"], weights), name


def test_tie_in_one_group_leaves_the_others_alone() -> None:
    scores = torch.tensor([0.3] * 7 + [0.3] * 6 + [0.9])
    for kind in ("rloo", "grpo", "dr_grpo"):
        advantages = rlhf.group_advantages(scores, 7, kind)
        assert (advantages[:7] == 0).all() and (advantages[7:] != 0).all()


def test_masked_whiten_of_equal_numbers_is_zero() -> None:
    x, mask = torch.full((3, 7), 0.3), torch.ones(3, 7, dtype=torch.bool)
    x[0, 0] += 3e-8  # a rounding error
    assert (rlhf.masked_whiten(x, mask) == 0).all()


def test_group_baseline_is_of_scores_alone(run_ppo, monkeypatch) -> None:
    """The prices of the KL come afterwards, each token's own and those of the tokens to come."""
    losses = spy(monkeypatch, "ppo_loss", rlhf)
    rewards, groups = (spy(monkeypatch, x, rlhf) for x in ("token_rewards", "group_advantages"))
    args = tiny(num_iterations=2, num_minibatches=1, update_epochs=1, kl_coef=0.5, batch_size=16)
    args = dataclasses.replace(args, whiten_advantages=False)
    run_ppo(
        dataclasses.replace(args, baseline="group", group_size=4),
        LENGTHS,
        random_model(args, LENGTHS),
    )
    scores, call = groups[1].scores, rewards[2]
    torch.testing.assert_close(scores, call.scores)
    prices = torch.where(call.mask, 0.5 * call.kl, 0.0)
    assert prices.abs().max() > 0
    to_come = prices.flip(1).cumsum(1).flip(1)
    expected = torch.where(call.mask, groups[1].result[:, None] - to_come, 0.0)
    got = losses[1].batch.advantages
    torch.testing.assert_close(got.sort(0)[0], expected.sort(0)[0])


# ---- The proof, for each baseline --------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        dict(baseline="group", whiten_advantages=False),
        dict(baseline="group", whiten_advantages=False, kl_in_loss=True, kl_estimator="k2"),
        dict(baseline="group"),
    ],
    ids=str,
)
def test_options_reach_the_enumerated_optimum(flags: dict, prove) -> None:
    before, after, share = prove(proof_args(1.0, **flags))
    assert before > 1.0
    assert after < (0.12 if "kl_in_loss" in flags else 0.05)  # k2's gradient has more variance
    assert share == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(("kind", "factor"), [("rloo", 1.0), ("dr_grpo", 1.5)])
def test_dr_grpo_has_the_optimum_of_a_larger_beta(kind: str, factor: float) -> None:
    """The exact gradient over all groups of 3 of three answers vanishes at one optimum only."""
    scores, beta, size = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64), 0.5, 3
    log_ref = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    groups = torch.cartesian_prod(*[torch.arange(3)] * size)  # (27, 3)
    advantages = rlhf.group_advantages(scores[groups].flatten(), size, kind).view(-1, size)
    for times in (1.0, 1.5):  # 1.5 = G / (G - 1)
        logits = (log_ref + scores / (beta * times)).requires_grad_()
        log_pi = logits.log_softmax(0)
        kl = rlhf.kl_penalty(log_pi, log_ref, "k1").detach()
        probabilities = log_pi.detach()[groups].sum(1, keepdim=True).exp()
        objective = probabilities * (advantages - beta * kl[groups]) * log_pi[groups]
        (gradient,) = torch.autograd.grad(objective.sum(), logits)
        assert (gradient.abs().max().item() < 1e-9) == (times == factor)


def test_grpo_reaches_the_optimum_of_beta_times_the_deviation(run_ppo) -> None:
    """To divide scores by their deviation is to multiply beta by it, prompt by prompt."""
    args = proof_args(0.3, baseline="group", group_advantage="grpo", group_size=32)
    args = dataclasses.replace(args, whiten_advantages=False)
    reference = random_model(args, SPELLING)
    policy = run_ppo(args, SPELLING, reference).policy
    assert exact_kl(args, policy, reference) > 0.4  # 0.63: it is not the optimum of beta
    assert exact_kl(args, policy, reference, scaled=True) < 0.25  # 0.16; 7.8 at the start


# ---- Micro-batches -----------------------------------------------------------------------------


def test_gradient_of_micro_batches_is_that_of_the_minibatch() -> None:
    args = tiny(kl_in_loss=True, kl_estimator="k3", kl_coef=0.4, ent_coef=0.3)
    _, (_, _, prompts, responses, *_) = sampled(args)
    models = rlhf.Models(args, REVIEWS, learned=False)
    parameters = [x for x in models.parameters() if x.requires_grad]
    mask, (B, R) = rlhf.action_mask(responses, PAD), responses.shape
    log_probs, _, values = models.read(prompts, responses)
    noise = 0.2 * torch.randn(5, B, R, generator=torch.Generator().manual_seed(0))
    log_probs, values = log_probs.detach(), values.detach()
    columns = (log_probs + noise[0], log_probs + noise[1], noise[2], noise[3], values + noise[4])
    batch = rlhf.Batch(prompts, responses, mask, *columns)
    gradients, figures = [], []
    for size in (B, 5):
        optimizer = torch.optim.SGD(parameters, lr=0.0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rlhf, "descend", lambda *_: [x.grad.clone() for x in parameters])
            cut = dataclasses.replace(args, micro_batch_size=size)
            stats = rlhf.update(models, cut, optimizer, batch)
        optimizer.zero_grad()
        gradients.append(stats.pop("grad_norm"))
        figures.append(stats)
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, parts, atol=1e-6, rtol=1e-4)
    assert any(x.abs().max() > 1e-3 for x in gradients[0])
    for name in ("policy_loss", "value_loss", "entropy"):
        assert figures[0][name].item() == pytest.approx(figures[1][name].item(), abs=1e-5)


def test_no_model_gets_more_answers_than_a_micro_batch(tmp_path, lengths, monkeypatch) -> None:
    calls = spy(monkeypatch, "forward", rlhf.Transformer)
    sizes = dict(micro_batch_size=4, sft_batch_size=4)
    rlhf.train(tiny(tmp_path / "run", num_iterations=1, sft_steps=2, **sizes))
    assert max(len(call.tokens) for call in calls) == 4


# ---- A task and a network of one's own ---------------------------------------------------------

TASK = """
import ppo_rlhf_toy

class Echo(ppo_rlhf_toy.Task):
    tokenizer = ppo_rlhf_toy.Tokenizer(["x", "y"], separator="")
    tokenizer.pad, tokenizer.eos = 1, 0  # the other way round
    prompt_size, batch_size = 1, 16

    def prompts(self, count, rng, held_out=False):
        return [str(letter) for letter in rng.choice(["x", "y"], count)]

    def demonstration(self, prompt, rng):
        return prompt

    def gold(self, prompt, response):
        return float(response == prompt)
"""


def test_task_of_ones_own_trains_from_the_folder_of_the_command(
    tmp_path, monkeypatch, capsys
) -> None:
    (tmp_path / "my_task.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_task", raising=False)
    flags = TINY | dict(task="my_task:Echo", run_dir="run", num_iterations=3, sft_steps=50)
    words = " ".join(
        f"--{name.replace('_', '-')} {x}" for name, x in flags.items() if name != "batch_size"
    )
    status, out, err = run_main(rlhf, words, monkeypatch, capsys)
    assert status == 0, err
    assert json.loads((tmp_path / "run" / "results.json").read_text())["gold"] > 0.3
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["run"]["global_step"] == 48  # its own batch size
    # The folder alone does not import the module; the command line does.
    for flag in ("--evaluate", "--resume"):
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, "my_task")
            outcome = run_main(rlhf, f"{flag} run", patch, capsys)
            expect_one_line(outcome, "my_task:Echo", "--task")
            assert "my_task" not in sys.modules
    status, again, _ = run_main(rlhf, "--evaluate run --task my_task:Echo", monkeypatch, capsys)
    assert status == 0 and again[again.index("SFT") :] == out[out.index("SFT") :]


@pytest.mark.parametrize(
    "name", ["nothing:Echo", "nothing.sub:Echo", "my_task:Other", ":Echo", "my_task:"]
)
def test_task_that_is_not_there_is_one_line(name: str, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "my_task.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_task", raising=False)
    expect_one_line(run_main(rlhf, f"--task {name}", monkeypatch, capsys), f"--task {name}")
    sys.modules.pop("my_task", None)


@pytest.mark.parametrize("line", ["import no_such_module", "1 / 0", "str.nothing"])
def test_error_inside_a_task_keeps_its_traceback(line: str, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "broken_task.py").write_text(line)
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ModuleNotFoundError, ZeroDivisionError, AttributeError)):
        run_main(rlhf, "--task broken_task:Echo", monkeypatch, capsys)


class Tied(rlhf.Transformer):
    """A network of one's own: its head is the table of words."""

    def __init__(self, args: Args, tokenizer: rlhf.Tokenizer, head_size: int):
        super().__init__(args, tokenizer, head_size)
        if head_size > 1:
            self.head.weight = self.word.weight


class TiedReviews(Lengths):
    def network(self, args: Args, head_size: int) -> Tied:
        return Tied(args, self.tokenizer, head_size)


def test_network_of_ones_own_is_all_four_models(run_dir, monkeypatch) -> None:
    monkeypatch.setitem(rlhf.TASKS, "reviews", TiedReviews())
    policy, _ = rlhf.train(tiny(run_dir))
    assert isinstance(policy, Tied) and policy.head.weight is policy.word.weight
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"]
    assert torch.equal(state["policy.head.weight"], state["policy.word.weight"])
    assert not torch.equal(state["policy.head.weight"], state["reference.head.weight"])


# ---- What an attacker found --------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["sft-learning-rate", "learning-rate"])
def test_weights_that_are_not_finite_are_one_line(
    flag: str, run_dir, lengths, monkeypatch, capsys
) -> None:
    words = f"{flags_of(tiny(run_dir))} --{flag} 1e12 --rm-min-accuracy 0"
    outcome = run_main(rlhf, words, monkeypatch, capsys)
    status, _, err = outcome
    assert (
        status == 2
        and "Traceback" not in err
        and f"lower --{flag}" in err.replace(" or ", " lower ")
    )


def test_reward_model_that_is_not_finite_is_not_the_reward_functions_fault(
    run_dir, lengths, monkeypatch, capsys
) -> None:
    words = f"{flags_of(tiny(run_dir))} --rm-learning-rate 1e12 --rm-min-accuracy 0"
    status, _, err = run_main(rlhf, words, monkeypatch, capsys)
    assert status == 2 and "lower --rm-learning-rate" in err and "reward function" not in err


@pytest.mark.parametrize("call", [1, 2])
def test_signal_in_the_evaluation_ends_it_early(
    call: int, run_dir, lengths, monkeypatch, capsys
) -> None:
    rlhf.train(tiny(run_dir))
    answer, calls = rlhf.answer, itertools.count(1)

    def interrupted(*args: Any) -> rlhf.Rollout:
        if next(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return answer(*args)

    monkeypatch.setattr(rlhf, "answer", interrupted)
    words = f"--evaluate {run_dir} --eval-prompts 120 --micro-batch-size 8"
    outcome = run_main(rlhf, words, monkeypatch, capsys)
    assert outcome[0] == 2 and "stopped during the evaluation" in outcome[2]
    assert next(calls) == call + 1


@pytest.mark.parametrize("stages_done", [0, 1, 2])
def test_evaluate_of_a_checkpoint_without_a_stage_trains_nothing(
    stages_done: int, run_dir, lengths, monkeypatch, capsys
) -> None:
    rlhf.train(tiny(run_dir))
    path = run_dir / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    saved["agent"]["stages_done"].fill_(stages_done)
    torch.save(saved, path)
    steps = spy(monkeypatch, "descend", rlhf)
    outcome = run_main(rlhf, f"--evaluate {run_dir}", monkeypatch, capsys)
    expect_one_line(outcome, "--resume it")
    assert not steps


@pytest.mark.parametrize(("name", "size"), [("d_model", 10**6), ("context_size", 10**9)])
def test_sizes_of_a_strangers_checkpoint_are_checked_before_they_are_allocated(
    name: str, size: int, run_dir, lengths, monkeypatch, capsys
) -> None:
    rlhf.train(tiny(run_dir, num_iterations=1, eval_prompts=2))
    path = run_dir / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    saved["args"][name] = size
    torch.save(saved, path)
    for flag in ("--evaluate", "--resume"):
        outcome = run_main(rlhf, f"{flag} {run_dir}", monkeypatch, capsys)
        expect_one_line(outcome, f"--{name.replace('_', '-')}")
