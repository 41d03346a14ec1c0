"""RLHF: its transformer, its formulas, its tasks, its three stages, and the known optimum."""

import copy
import dataclasses
import itertools
import json
import math
import re
import shutil
import signal
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
from ppo_rlhf_toy import EOS, PAD, Args, UserError
from tests.helpers import StopAfter, read_metrics, run_main, spy

CPU = torch.device("cpu")
REVIEWS, ARITHMETIC = rlhf.TASKS["reviews"], rlhf.TASKS["arithmetic"]
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
    for parameter in model.parameters():  # away from zero biases and unit gains
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def sampled(args: Args, count: int = 24, seed: int = 0) -> tuple:
    """A random policy and its answers of different lengths to prompts of different lengths."""
    policy = random_model(args, REVIEWS, seed=seed)
    policy.head.bias[EOS] += 2.0
    rng, generator = rlhf.streams(args, 9, CPU)
    rollout = rlhf.answer(args, REVIEWS, policy, REVIEWS.prompts(count, rng), generator)
    assert len({len(text.split()) for text in rollout.texts}) > 1
    assert len(set(rlhf.action_mask(rollout.responses).sum(1).tolist())) > 3
    return policy, rollout


def as_rollout(texts: list[str], responses: torch.Tensor) -> rlhf.Rollout:
    """Answers that no policy gave."""
    nothing = torch.zeros(responses.shape)
    return rlhf.Rollout(texts, REVIEWS.decode(responses), nothing, responses, nothing)


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


@pytest.mark.parametrize("seed", [None, 5])
def test_generate_without_cache_gives_the_same_answers(seed, monkeypatch) -> None:
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
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        answers.append(rlhf.generate(args, policy, rollout.prompts, generator))
    assert torch.equal(answers[0][0], answers[1][0])
    torch.testing.assert_close(answers[0][1], answers[1][1], atol=1e-5, rtol=0)
    assert set(read[1:]) == {1}  # after the prompt one token a step


def test_padding_left_or_right_changes_nothing() -> None:
    policy, rollout = sampled(Args())
    batched, entropy = policy.log_prob_and_entropy(rollout.prompts, rollout.responses, 1.0)
    for i, text in enumerate(rollout.texts):
        length = int(rlhf.action_mask(rollout.responses)[i].sum())
        prompt, response = torch.tensor([REVIEWS.encode(text)]), rollout.responses[i : i + 1]
        alone = policy.log_prob_and_entropy(prompt, response[:, :length], 1.0)
        torch.testing.assert_close(batched[i, :length], alone[0][0], atol=1e-5, rtol=0)
        torch.testing.assert_close(entropy[i, :length], alone[1][0], atol=1e-5, rtol=0)


def test_pad_embedding_and_later_words_are_not_seen() -> None:
    policy, (_, _, prompts, responses, _) = sampled(Args())
    before = policy.before(prompts, responses)
    mask = rlhf.action_mask(responses)
    policy.word.weight[PAD] += 100.0
    torch.testing.assert_close(policy.before(prompts, responses)[mask], before[mask])
    changed = responses.clone()
    changed[:, 3:] = 5  # the logits of the first four tokens come from what stands before them
    torch.testing.assert_close(policy.before(prompts, changed)[:, :4], before[:, :4])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_log_probs_at_sampling_are_the_recomputed_ones(temperature: float) -> None:
    policy, (_, _, prompts, responses, log_probs) = sampled(Args(temperature=temperature))
    again, _ = policy.log_prob_and_entropy(prompts, responses, temperature)
    again = torch.where(rlhf.action_mask(responses), again, 0.0)
    torch.testing.assert_close(log_probs, again, atol=1e-5, rtol=0)


def test_log_softmax_divides_by_the_temperature_and_excludes_padding() -> None:
    logits = torch.tensor([[3.0, 0.0, 1.0, 2.0]])  # PAD, EOS and two words
    expected = F.log_softmax(logits[:, 1:] / 0.5, -1)
    torch.testing.assert_close(rlhf.log_softmax(logits, 0.5)[:, 1:], expected)
    assert rlhf.log_softmax(logits, 0.5)[0, PAD] < -1e8


def test_generate_samples_with_the_softmax_at_the_temperature() -> None:
    args = Args(max_new_tokens=1, temperature=0.5)
    policy = random_model(args, REVIEWS)
    prompts = torch.tensor([REVIEWS.encode("pool :")]).expand(20_000, -1)
    words, _ = rlhf.generate(args, policy, prompts, torch.Generator().manual_seed(0))
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
    policy = random_model(args, REVIEWS)
    texts = ["pool :"] * 512 + ["view food music :"] * 8
    rollout = rlhf.answer(args, REVIEWS, policy, texts, None)  # greedy: one answer a prompt
    for text in set(texts):
        alone = rlhf.answer(args, REVIEWS, policy, [text], None)
        assert {rollout.answers[i] for i in range(520) if texts[i] == text} == {alone.answers[0]}
    assert rollout.responses.shape == rollout.log_probs.shape


def test_answer_is_as_wide_as_the_longest_response() -> None:
    args = Args()
    policy, _ = sampled(args)
    policy.head.bias[EOS] += 3.0  # short answers
    rollout = rlhf.answer(args, REVIEWS, policy, ["pool :"] * 4, torch.Generator().manual_seed(0))
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
    mask = rlhf.action_mask(responses)
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


@pytest.mark.parametrize("shift_mean", [True, False])
def test_masked_whiten_equals_numpy(shift_mean: bool) -> None:
    rng = np.random.default_rng(0)
    x, mask = 3.0 + 2.0 * rng.normal(size=(5, 7)), rng.random((5, 7)) < 0.6
    got = rlhf.masked_whiten(torch.tensor(x), torch.tensor(mask), shift_mean).numpy()
    real = x[mask]
    expected = (real - real.mean()) / real.std(ddof=1) + (0.0 if shift_mean else real.mean())
    np.testing.assert_allclose(got[mask], expected, rtol=1e-6)
    assert (got[~mask] == 0).all()


@pytest.mark.parametrize(
    ("kl", "answers", "horizon", "expected"),
    [
        (2.0, 100, 1000, 0.1),
        (2.2, 100, 1000, 0.1 * (1 + 0.1 * 0.1)),
        (50.0, 100, 1000, 0.1 * (1 + 0.2 * 0.1)),  # the error is clipped to 0.2
        (0.0, 100, 1000, 0.1 * (1 - 0.2 * 0.1)),
        (0.0, 512, 100, 0.08),  # and never negative
    ],
)
def test_adapt_kl_coef_moves_beta_towards_the_target(kl, answers, horizon, expected) -> None:
    assert rlhf.adapt_kl_coef(0.1, kl, 2.0, answers, horizon) == pytest.approx(expected)


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
    model = random_model(Args(), REVIEWS, scalar=True)
    texts, answers = ["pool :", "bath view bed :"], ["the pool was good .", "bad ."]
    scores = rlhf.read_scores(REVIEWS, model, texts, answers)
    for text, answer, score in zip(texts, answers, scores):
        tokens = torch.tensor([[*REVIEWS.encode(text), *REVIEWS.encode(answer), EOS]])
        torch.testing.assert_close(model(tokens)[0, -1, 0], score, atol=1e-5, rtol=0)


def test_read_scores_of_the_longest_answer_fit_the_context() -> None:
    args = tiny(context_size=29, max_new_tokens=24)  # and the EOS that a cut-off answer lacks
    args.check()
    model, longest = random_model(args, REVIEWS, scalar=True), " ".join(["the"] * 24)
    rlhf.read_scores(REVIEWS, model, ["pool view bed :"], [longest])
    with pytest.raises(UserError, match="context-size"):
        dataclasses.replace(args, context_size=28).check()


@pytest.mark.parametrize(("clip_vloss", "vf_coef"), [(True, 0.5), (False, 2.0)])
def test_ppo_loss_equals_the_sum_over_tokens_by_hand(clip_vloss: bool, vf_coef: float) -> None:
    args = tiny(clip_coef=0.1, clip_vloss=clip_vloss, vf_coef=vf_coef, ent_coef=0.3)
    _, (_, _, prompts, responses, old_log_probs) = sampled(args)
    models = rlhf.Models(args, REVIEWS, learned=False)
    mask, (B, R) = rlhf.action_mask(responses), responses.shape
    rng = torch.Generator().manual_seed(0)
    advantages, returns, old_values = torch.randn(3, B, R, generator=rng)
    log_probs, entropies = models.policy.log_prob_and_entropy(prompts, responses, 1.0)
    old_log_probs = log_probs.detach() + 0.2 * torch.randn(B, R, generator=rng)
    batch = rlhf.Batch(prompts, responses, mask, old_log_probs, advantages, returns, old_values)
    loss, figures, ratio = rlhf.ppo_loss(models, args, batch)

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
    np.testing.assert_allclose(ratio, ratios, rtol=1e-4)


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
    assert REVIEWS.grammatical(response) == grammatical


def test_gold_of_arithmetic_is_one_for_the_sum_alone() -> None:
    assert ARITHMETIC.gold("27+8=", "35") == 1.0
    assert [ARITHMETIC.gold("27+8=", r) for r in ("34", "035", "", "3 5", "35=")] == [0.0] * 5
    assert ARITHMETIC.grammatical("35") and not ARITHMETIC.grammatical("035")


def test_prompts_of_arithmetic_held_out_are_never_trained_on() -> None:
    rng = np.random.default_rng(0)
    shown, held_out = (set(ARITHMETIC.prompts(30_000, rng, h)) for h in (False, True))
    assert not shown & held_out and len(shown) + len(held_out) > 9_700


@pytest.mark.parametrize("task", rlhf.TASKS.values(), ids=rlhf.TASKS)
def test_demonstrations_are_grammatical_and_fit(task: rlhf.Task) -> None:
    rng, args = np.random.default_rng(0), Args()
    texts = task.prompts(500, rng)
    demonstrations = [task.demonstration(text, rng) for text in texts]
    assert all(map(task.grammatical, demonstrations))
    assert max(len(task.encode(text)) for text in texts) <= task.prompt_size
    lengths = {len(task.encode(text)) + 1 for text in demonstrations}
    assert max(lengths) <= args.max_new_tokens and len(lengths) > 2
    responses = rlhf.pad([[*task.encode(text), EOS] for text in demonstrations], False, CPU)
    assert task.decode(responses) == demonstrations
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
        share: bool = False,  # of the optimum: takes as long as all the rest
    ) -> SimpleNamespace:
        folder, record = next(folders), StopAfter(RECORD)
        frozen = copy.deepcopy(reward_model), torch.zeros(2, dtype=torch.float64)
        with monkeypatch.context() as patch:
            patch.setitem(rlhf.TASKS, args.task, task)
            patch.setattr(rlhf, "sft", lambda args, task, run: copy.deepcopy(reference))
            patch.setattr(rlhf, "train_reward_model", lambda *_: frozen)
            if not share:
                patch.setattr(rlhf, "optimum_share", lambda *_: None)
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


def test_whiten_rewards_changes_what_gae_gets_and_not_the_logged_return(
    run_ppo, monkeypatch
) -> None:
    reference, metrics = random_model(tiny(), LENGTHS), []
    calls, rewards = spy(monkeypatch, "gae", rlhf), spy(monkeypatch, "token_rewards", rlhf)
    for whiten in (False, True):
        args = tiny(num_iterations=1, whiten_rewards=whiten)
        metrics += run_ppo(args, LENGTHS, reference).metrics
    assert metrics[0]["charts/episodic_return"] == metrics[1]["charts/episodic_return"]
    mask, plain = rewards[0].mask, rewards[0].result
    assert torch.equal(calls[0].rewards.T, plain)
    x = plain[mask]
    expected = (x - x.mean()) / x.std() + x.mean()  # the mean does not move
    torch.testing.assert_close(calls[1].rewards.T[mask], expected)


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


def test_group_baseline_is_the_mean_of_the_prompts_answers(run_ppo, monkeypatch) -> None:
    calls = spy(monkeypatch, "gae", rlhf)
    answers = spy(monkeypatch, "answer", rlhf)
    args = tiny(num_iterations=1, baseline="group", group_size=4)
    result = run_ppo(args, LENGTHS, random_model(args, LENGTHS))
    texts = answers[0].texts
    assert all(len(set(texts[i : i + 4])) == 1 for i in range(0, 16, 4))
    means = calls[0].rewards.sum(0).view(4, 4).mean(1).repeat_interleave(4)
    torch.testing.assert_close(calls[0].values[0], means)
    assert calls[0].gae_lambda == 1.0 and not part(result.state, "value")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ratio_is_one_on_the_first_minibatch(temperature: float, run_ppo) -> None:
    args = tiny(temperature=temperature, num_iterations=3, num_minibatches=1)
    rows = run_ppo(args, LENGTHS, random_model(args, LENGTHS)).metrics
    assert len(rows) == 3
    assert max(row["losses/first_ratio_error"] for row in rows) < 1e-4
    assert rows[-1]["losses/approx_kl"] > 1e-6  # the later ones are not 1, so it is not a constant


@pytest.mark.parametrize("fault", ["another temperature", "a token beside"])
def test_first_ratio_error_shows_a_fault(fault: str, run_ppo, monkeypatch) -> None:
    args, generate, before = tiny(num_iterations=1), rlhf.generate, rlhf.Transformer.before
    if fault == "another temperature":

        def colder(args, *rest):
            return generate(dataclasses.replace(args, temperature=0.7), *rest)

        monkeypatch.setattr(rlhf, "generate", colder)
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
    prompts = rlhf.pad([REVIEWS.encode(text) for text in texts], True, CPU)
    rows = [[*REVIEWS.encode(REVIEWS.demonstration(text, rng)), EOS] for text in texts]
    responses = rlhf.pad(rows, False, CPU)

    def loss(model) -> float:
        log_probs, _ = model.log_prob_and_entropy(prompts, responses, 1.0)
        return -log_probs[rlhf.action_mask(responses)].mean().item()

    assert loss(rlhf.sft(args, REVIEWS, NoRun)) < 0.8 * loss(random_model(args, REVIEWS))


def test_sft_of_arithmetic_stops_at_the_accuracy(monkeypatch) -> None:
    steps = spy(monkeypatch, "descend", rlhf)
    for accuracy, expected in ((0.0, 25), (0.99, 30)):  # it is measured every 25 steps
        steps.clear()
        monkeypatch.setattr(ARITHMETIC, "gold", lambda *_: 0.5, raising=False)
        rlhf.sft(tiny(sft_steps=3, sft_accuracy=accuracy), ARITHMETIC, NoRun)
        assert len(steps) == expected


def test_reward_model_learns_the_judges_taste_and_is_normalised() -> None:
    args = tiny(rm_pairs=256)
    reference = random_model(args, LENGTHS)
    reference.head.bias[EOS] += 2.0
    model, (accuracy, correlation) = rlhf.train_reward_model(args, LENGTHS, NoRun, reference)
    assert correlation > 0.5 and accuracy > 0.5  # an untrained one has a random sign
    rng, generator = rlhf.streams(args, 8, CPU)
    rollout = rlhf.answer(args, LENGTHS, reference, LENGTHS.prompts(512, rng), generator)
    scores = rlhf.read_scores(LENGTHS, model, rollout.texts, rollout.answers)
    assert abs(scores.mean()) < 0.2 and abs(scores.std() - 1) < 0.2


def test_reward_model_below_the_accuracy_or_without_pairs_is_refused() -> None:
    args = tiny(rm_min_accuracy=1.0)
    with pytest.raises(UserError, match="rm-min-accuracy"):
        rlhf.train_reward_model(args, LENGTHS, NoRun, random_model(args, LENGTHS))
    with pytest.raises(UserError, match="0 pairs apart"):
        rlhf.train_reward_model(args, REVIEWS, NoRun, random_model(args, REVIEWS))


# ---- The proof: an enumerable vocabulary -------------------------------------------------------


class Spelling(rlhf.Task):
    """Three letters, at most three of them: 40 answers, each with a known probability in pi*."""

    words, separator, prompt_size, learned = ["a", "b", "c"], "", 1, False
    grammar = re.compile("[abc]*")

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


def exact_kl(args: Args, policy: rlhf.Transformer, reference: rlhf.Transformer) -> float:
    """KL(pi || pi*) over all answers, pi* = pi_ref exp(score / beta) / Z, mean of both prompts."""
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
        prompts = torch.tensor([SPELLING.encode(prompt)] * len(rows))
        log_pi, log_ref = (
            (model.log_prob_and_entropy(prompts, responses, 1.0)[0] * mask).sum(1).detach().double()
            for model in (policy, reference)
        )
        assert log_pi.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
        scores = SPELLING.gold_scores([prompt] * len(rows), SPELLING.decode(responses))
        scores = torch.tensor(scores) - args.missing_eos_penalty * (responses != EOS).all(1)
        log_optimum = (log_ref + scores / args.kl_coef).log_softmax(0)
        kls.append((log_pi.exp() * (log_pi - log_optimum)).sum().item())
    return sum(kls) / 2


@pytest.fixture
def prove(run_ppo) -> Callable:
    """Return KL(pi || pi*) before and after PPO, and the share of the optimum that it reports."""

    def run(args: Args) -> tuple[float, float, float]:
        reference = random_model(args, SPELLING)
        result = run_ppo(args, SPELLING, reference, share=True)
        share = result.results["optimum_share"]
        return exact_kl(args, reference, reference), exact_kl(args, result.policy, reference), share

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
    def no_eos(responses: torch.Tensor) -> torch.Tensor:
        mask = (responses != PAD) & (responses != EOS)
        return mask | (torch.arange(responses.shape[1]) == 0)  # an empty answer keeps one action

    original = rlhf.answer

    def answer(*args) -> rlhf.Rollout:
        with monkeypatch.context() as patch:
            patch.setattr(rlhf, "action_mask", lambda responses: responses != PAD)
            return original(*args)

    monkeypatch.setattr(rlhf, "answer", answer)
    monkeypatch.setattr(rlhf, "action_mask", no_eos)
    _, after, _ = prove(proof_args(0.3))
    assert after > 0.1  # 0.19 and 0.79 on two seeds, 0.01 if right


def test_kl_after_ppo_falls_with_beta(run_ppo) -> None:
    def final_kl(beta: float) -> float:
        args = proof_args(beta, num_iterations=15)
        rows = run_ppo(args, SPELLING, random_model(args, SPELLING)).metrics
        return float(np.mean([row["objective/kl"] for row in rows[-5:]]))

    kls = [final_kl(beta) for beta in (0.3, 3.0)]
    assert kls[0] > 3 * kls[1] > 0


def test_adaptive_beta_brings_the_kl_to_its_target(run_ppo) -> None:
    args = proof_args(0.1, ref_kl_target=0.5, kl_horizon=250)
    result = run_ppo(args, SPELLING, random_model(args, SPELLING), share=True)
    rows = result.metrics
    assert np.mean([row["objective/kl"] for row in rows[-10:]]) == pytest.approx(0.5, abs=0.2)
    assert rows[-1]["losses/kl_coef"] > 0.5
    assert result.results["optimum_share"] is None  # no fixed beta, no optimum


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
    assert "SFT answers" in out and "PPO answers" in out and "fresh prompts" in out
    assert json.loads((tmp_path / "a" / "results.json").read_text()) == results
    common = "kl length eos_rate distinct optimum_share proxy wall_seconds grammatical "
    keys = "sft_accuracy accuracy greedy_accuracy"
    if task == "reviews":
        keys = "sft_gold sft_grammatical gold rm_accuracy rm_correlation"
    assert set((common + keys).split()) <= set(results)
    assert [row["global_step"] for row in read_metrics(tmp_path / "a")] == [16, 32]

    # PPO on the loaded models is the same to the last bit.
    flags["load_sft"] = tmp_path / "a"
    if task == "reviews":
        flags["load_reward_model"] = tmp_path / "a"
    again, more = rlhf.train(tiny(tmp_path / "b", **flags))
    assert all(map(torch.equal, policy.parameters(), again.parameters()))
    assert without_times(results) == without_times(more)


def test_train_with_a_reward_function_needs_no_reward_model(run_dir) -> None:
    seen = []

    def shorter(prompts: list[str], responses: list[str]) -> list[int]:
        seen.extend(zip(prompts, responses))
        return [-len(response) for response in responses]

    _, results = rlhf.train(tiny(run_dir, kl_coef=0.0), shorter)
    assert (
        results["proxy"] < 0 and results["optimum_share"] is None and "rm_accuracy" not in results
    )
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
        (None, "list of numbers"),
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
        ("--kl-coef 0 --ref-kl-target 2", "--ref-kl-target"),
        ("--kl-coef -0.1", "--kl-coef"),
        ("--baseline group --group-size 7", "--group-size"),
        ("--temperature 0", "--temperature"),
        ("--temperature 1e-90", "--temperature"),
        ("--d-model 31", "--d-model"),
        ("--batch-size 1", "--batch-size"),
        ("--batch-size 1 --max-new-tokens 1", "--batch-size"),
        ("--num-minibatches 17", "--num-minibatches"),
        ("--learning-rate inf", "--learning-rate"),
        ("--load-sft nowhere", "nowhere"),
        ("--load-reward-model nowhere", "nowhere"),
        ("--task arithmetic --load-reward-model nowhere", "nowhere"),
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
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_load_of_a_model_of_another_shape_is_one_line_and_leaves_no_folder(
    changes: dict, tmp_path, lengths, monkeypatch, capsys
) -> None:
    rlhf.train(tiny(tmp_path / "a", num_iterations=1, eval_prompts=2, kl_coef=0.0))
    before = snapshot(tmp_path / "a")
    for flag in ("--load-sft", "--load-reward-model"):
        words = f"{flags_of(tiny(tmp_path / 'run', **changes))} {flag} {tmp_path / 'a'}"
        expect_one_line(run_main(rlhf, words, monkeypatch, capsys), str(tmp_path / "a"))
    assert not (tmp_path / "run").exists() and snapshot(tmp_path / "a") == before


def die(*_: Any) -> None:
    raise MemoryError("as a run that is killed")


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
        with pytest.raises(MemoryError):
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
    loads = dict(load_sft=tmp_path / "whole", load_reward_model=tmp_path / "whole")
    with monkeypatch.context() as patch:
        end_at(1, die, patch)
        with pytest.raises(MemoryError):
            rlhf.train(tiny(tmp_path / "parts", **loads))
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
    assert f"stopped in the stage {stage}" in outcome[2] and f"--resume {run_dir}" in outcome[2]
    expect_one_line(run_main(rlhf, f"--evaluate {run_dir}", monkeypatch, capsys), "--resume it")
    words = f"{flags_of(tiny(run_dir.parent / 'b'))} --load-reward-model {run_dir}"
    expect_one_line(run_main(rlhf, words, monkeypatch, capsys), "no reward_model yet")
    status, out, _ = run_main(rlhf, f"--resume {run_dir}", monkeypatch, capsys)
    assert status == 0 and "fresh prompts" in out


@pytest.mark.parametrize("flags", [{}, dict(task="arithmetic", baseline="group", group_size=4)])
def test_run_stopped_in_stage_3_ends_after_a_resume_as_if_it_never_was(
    flags: dict, tmp_path, lengths
) -> None:
    flags = flags | dict(num_iterations=5, ref_kl_target=1.0, checkpoint_every=2)
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

    with pytest.raises(MemoryError):
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
    rollout = rlhf.answer(args, LENGTHS, models.policy, texts, generator)
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
        words = f"{flags_of(tiny(other))} --load-sft {run_dir}"
        expect_one_line(run_main(rlhf, words, monkeypatch, capsys), str(run_dir))
        assert not other.exists()
    assert snapshot(run_dir) == before


def test_damaged_checkpoint_is_one_line(run_dir, lengths, monkeypatch, capsys) -> None:
    rlhf.train(tiny(run_dir), on_iteration=StopAfter(1))
    path, other = run_dir / "checkpoint.pt", run_dir.parent / "other"
    for data in (path.read_bytes()[:1000], b"", b"text"):
        path.write_bytes(data)
        for flags in ("--resume", "--evaluate", f"{flags_of(tiny(other))} --load-sft"):
            outcome = run_main(rlhf, f"{flags} {run_dir}", monkeypatch, capsys)
            expect_one_line(outcome, str(run_dir))
    assert not other.exists()


def test_prompt_longer_than_the_context_is_a_user_error() -> None:
    args = tiny()
    policy = random_model(args, REVIEWS)
    with pytest.raises(UserError, match="context-size"):
        rlhf.answer(args, REVIEWS, policy, ["pool " * 32 + ":"], None)


def test_demonstration_longer_than_the_context_is_a_user_error(run_dir) -> None:
    with pytest.raises(UserError, match="--context-size 18"):
        rlhf.train(tiny(run_dir, context_size=18, max_new_tokens=8))


def test_tyro_reads_the_flags_that_the_tests_write() -> None:
    args = tiny(Path("x"), baseline="group", ref_kl_target=2.0)
    assert tyro.cli(Args, args=flags_of(args).split()) == args
