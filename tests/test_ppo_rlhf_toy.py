import csv
import dataclasses
import itertools
import json
import math
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ppo_rlhf_toy as rlhf
from ppo_rlhf_toy import EOS, PAD, Args, UserError

SCRIPT = Path(rlhf.__file__)
REVIEWS, ARITHMETIC = rlhf.TASKS["reviews"], rlhf.TASKS["arithmetic"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def no_log(step, metrics):
    pass


class Lengths(rlhf.Reviews):
    """Reviews whose gold tells even a random model's answers apart: the shorter the better."""

    def gold(self, prompt, response):
        return 1.0 / (1.0 + len(response.split()))


LENGTHS = Lengths()


def tiny(**changes) -> Args:
    """Arguments whose models are small and whose stages take a second or less."""
    sizes = dict(d_model=16, num_layers=1, num_heads=2, sft_steps=8, sft_batch_size=8, rm_pairs=64)
    more = dict(
        rm_min_accuracy=0.0, num_iterations=2, batch_size=16, update_epochs=2, eval_prompts=32
    )
    return Args(**(sizes | more | changes))


def random_model(args: Args, task: rlhf.Task, scalar: bool = False, seed: int = 0):
    torch.manual_seed(seed)
    model = rlhf.make_model(args, task, scalar)
    for parameter in model.parameters():  # away from zero biases and unit gains
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def sampled(args: Args, count: int = 24, seed: int = 0):
    """A random policy's answers of different lengths to prompts of different lengths."""
    policy = random_model(args, REVIEWS, seed=seed)
    policy.head.bias[EOS] += 2.0
    rng, generator = rlhf.streams(args, 9)
    texts = REVIEWS.prompts(count, rng)
    prompts = rlhf.pad([REVIEWS.encode(text) for text in texts], True, args)
    responses, log_probs = rlhf.generate(args, policy, prompts, generator)
    assert len({len(text.split()) for text in texts}) > 1
    assert len(set(rlhf.action_mask(responses).sum(1).tolist())) > 3
    return policy, texts, prompts, responses, log_probs


# ---- The transformer ---------------------------------------------------------------------------


def test_cached_forward_equals_the_full_one():
    args = Args()
    policy, _, prompts, responses, _ = sampled(args)
    tokens, cache = torch.cat([prompts, responses], 1), []
    full = policy(tokens)
    P = prompts.shape[1]
    parts = [policy(tokens[:, :P], cache)]
    parts += [policy(tokens[:, t : t + 1], cache) for t in range(P, tokens.shape[1])]
    real = tokens != PAD
    torch.testing.assert_close(torch.cat(parts, 1)[real], full[real], atol=1e-5, rtol=0)


@pytest.mark.parametrize("generator_seed", [None, 5])
def test_generation_is_the_same_with_and_without_cache(generator_seed):
    args = Args()
    policy, _, prompts, *_ = sampled(args)
    answers = []
    for cached in (True, False):
        generator = generator_seed and torch.Generator().manual_seed(generator_seed)
        answers.append(rlhf.generate(args, policy, prompts, generator, cached))
    assert torch.equal(answers[0][0], answers[1][0])
    torch.testing.assert_close(answers[0][1], answers[1][1], atol=1e-5, rtol=0)


def test_padding_changes_nothing():
    args = Args()
    policy, texts, prompts, responses, _ = sampled(args)
    batched, entropy = policy.log_prob_and_entropy(prompts, responses, 1.0)
    for i, text in enumerate(texts):
        length = int(rlhf.action_mask(responses)[i].sum())
        alone = rlhf.pad([REVIEWS.encode(text)], True, args), responses[i : i + 1, :length]
        log_probs, alone_entropy = policy.log_prob_and_entropy(*alone, 1.0)
        torch.testing.assert_close(batched[i, :length], log_probs[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(entropy[i, :length], alone_entropy[0], atol=1e-5, rtol=0)


def test_what_stands_in_the_pad_embedding_and_later_words_is_not_seen():
    policy, _, prompts, responses, _ = sampled(Args())
    before = policy.before(prompts, responses)
    mask = rlhf.action_mask(responses)
    policy.word.weight[PAD] += 100.0
    torch.testing.assert_close(policy.before(prompts, responses)[mask], before[mask])
    changed = responses.clone()
    changed[:, 3:] = 5  # the logits of the first four tokens come from what stands before them
    torch.testing.assert_close(policy.before(prompts, changed)[:, :4], before[:, :4])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_log_probs_at_sampling_are_the_recomputed_ones(temperature):
    args = Args(temperature=temperature)
    policy, _, prompts, responses, log_probs = sampled(args)
    again, _ = policy.log_prob_and_entropy(prompts, responses, temperature)
    again = torch.where(rlhf.action_mask(responses), again, 0.0)
    torch.testing.assert_close(log_probs, again, atol=1e-5, rtol=0)


def test_temperature_sharpens_what_is_sampled():
    logits = torch.tensor([[3.0, 0.0, 1.0, 2.0]])  # PAD, EOS and two words
    expected = F.log_softmax(logits[:, 1:] / 0.5, -1)
    torch.testing.assert_close(rlhf.log_softmax(logits, 0.5)[:, 1:], expected)
    assert rlhf.log_softmax(logits, 0.5)[0, PAD] < -1e8
    args = Args(max_new_tokens=1, temperature=0.5)
    policy = random_model(args, REVIEWS)
    prompts = torch.tensor([REVIEWS.encode("pool :")]).expand(20_000, -1)
    words, _ = rlhf.generate(args, policy, prompts, torch.Generator().manual_seed(0))
    frequency = torch.bincount(words[:, 0], minlength=len(policy.head.bias)) / len(words)
    expected = F.softmax(policy(prompts[:1])[0, -1, 1:] / 0.5, -1)
    torch.testing.assert_close(frequency[1:], expected, atol=0.015, rtol=0)


def test_responses_end_with_eos_and_then_pad():
    _, _, _, responses, log_probs = sampled(Args())
    for row, log_prob in zip(responses.tolist(), log_probs):
        end = row.index(EOS) + 1 if EOS in row else len(row)
        assert PAD not in row[:end] and set(row[end:]) <= {PAD}
        assert (log_prob[:end] < 0).all() and (log_prob[end:] == 0).all()


# ---- Pure functions ----------------------------------------------------------------------------


def test_eos_is_an_action_and_carries_the_score():
    responses = torch.tensor([[7, 8, EOS, PAD], [7, EOS, PAD, PAD], [7, 8, 9, 7], [EOS, 0, 0, 0]])
    mask = rlhf.action_mask(responses)
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    kl = torch.tensor([[1.0, 2.0, 3.0, 99.0]]).expand(4, -1)
    rewards = rlhf.token_rewards(torch.tensor([10.0, 20.0, 30.0, 40.0]), kl, mask, 0.5)
    expected = [[-0.5, -1, 8.5, 0], [-0.5, 19, 0, 0], [-0.5, -1, -1.5, -19.5], [39.5, 0, 0, 0]]
    # The third was cut off: its score is on its last token.
    expected[2][3] = 30 - 49.5
    assert rewards.tolist() == expected


def test_missing_eos_costs_the_penalty():
    args = Args(missing_eos_penalty=0.7)
    responses = torch.tensor([[2, 3, EOS], [2, 3, 4], [EOS, PAD, PAD]])
    scores = rlhf.score_answers(
        args, REVIEWS, lambda p, r: [1.0, 1.0, 1.0], ["pool :"] * 3, responses
    )
    torch.testing.assert_close(scores, torch.tensor([1.0, 0.3, 1.0]))


@pytest.mark.parametrize("estimator, exact", [("k1", True), ("k3", True), ("k2", False)])
def test_kl_estimators(estimator, exact):
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.2, 0.4])
    mean = (p * rlhf.kl_penalty(p.log(), q.log(), estimator)).sum().item()
    kl = (p * (p / q).log()).sum().item()
    assert mean == pytest.approx(kl, abs=1e-6 if exact else 0.02)
    likelier = rlhf.kl_penalty(torch.tensor(-1.0), torch.tensor(-2.0), estimator)
    assert likelier > 0.3  # what the policy says more often than the reference costs


@pytest.mark.parametrize("shift_mean", [True, False])
def test_masked_whitening_is_numpys(shift_mean):
    rng = np.random.default_rng(0)
    x, mask = 3.0 + 2.0 * rng.normal(size=(5, 7)), rng.random((5, 7)) < 0.6
    got = rlhf.masked_whiten(torch.tensor(x), torch.tensor(mask), shift_mean).numpy()
    real = x[mask]
    expected = (real - real.mean()) / real.std(ddof=1) + (0.0 if shift_mean else real.mean())
    np.testing.assert_allclose(got[mask], expected, rtol=1e-6)
    assert (got[~mask] == 0).all()


def test_adaptive_kl_controller():
    step = lambda kl: rlhf.adapt_kl_coef(0.1, kl, 2.0, 100, 1000)  # noqa: E731
    assert step(2.0) == pytest.approx(0.1)
    assert step(2.2) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert step(50.0) == pytest.approx(0.1 * (1 + 0.2 * 0.1))  # the error is clipped to 0.2
    assert step(0.0) == pytest.approx(0.1 * (1 - 0.2 * 0.1))
    assert rlhf.adapt_kl_coef(0.1, 0.0, 2.0, 512, 100) == pytest.approx(0.08)  # and never negative


def test_bradley_terry_loss_and_gradient():
    chosen = torch.tensor([1.0, -2.0], requires_grad=True)
    rejected = torch.tensor([0.5, 1.0], requires_grad=True)
    loss = rlhf.bradley_terry_loss(chosen, rejected)
    loss.backward()
    p = [1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(3.0))]
    assert loss.item() == pytest.approx(-(math.log(p[0]) + math.log(p[1])) / 2, rel=1e-6)
    expected = torch.tensor([(p[0] - 1) / 2, (p[1] - 1) / 2])  # d(-log sigmoid(d)) / dd = P - 1
    torch.testing.assert_close(chosen.grad, expected)
    torch.testing.assert_close(rejected.grad, -expected)


def test_scores_are_read_at_eos():
    args = Args()
    model = random_model(args, REVIEWS, scalar=True)
    texts, answers = ["pool :", "bath view bed :"], ["the pool was good .", "bad ."]
    scores = rlhf.read_scores(args, REVIEWS, model, texts, answers)
    for text, answer, score in zip(texts, answers, scores):
        tokens = torch.tensor([[*REVIEWS.encode(text), *REVIEWS.encode(answer), EOS]])
        torch.testing.assert_close(model(tokens)[0, -1, 0], score, atol=1e-5, rtol=0)


# ---- Tasks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, response, gold, grammatical",
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
def test_gold_of_reviews(prompt, response, gold, grammatical):
    assert REVIEWS.gold(prompt, response) == pytest.approx(gold)
    assert REVIEWS.grammatical(response) == grammatical


def test_gold_of_arithmetic():
    assert ARITHMETIC.gold("27+8=", "35") == 1.0
    assert [ARITHMETIC.gold("27+8=", r) for r in ("34", "035", "", "3 5", "35=")] == [0.0] * 5
    rng = np.random.default_rng(0)
    shown, held_out = (set(ARITHMETIC.prompts(30_000, rng, h)) for h in (False, True))
    assert not shown & held_out and len(shown) + len(held_out) > 9_700


@pytest.mark.parametrize("task", rlhf.TASKS.values())
def test_demonstrations_are_grammatical_and_fit(task):
    rng, args = np.random.default_rng(0), Args()
    texts = task.prompts(500, rng)
    demonstrations = [task.demonstration(text, rng) for text in texts]
    assert all(map(task.grammatical, demonstrations))
    assert max(len(task.encode(text)) for text in texts) <= task.prompt_size
    lengths = {len(task.encode(text)) + 1 for text in demonstrations}
    assert max(lengths) <= args.max_new_tokens and len(lengths) > 2
    responses = rlhf.pad([[*task.encode(text), EOS] for text in demonstrations], False, args)
    assert task.decode(responses) == demonstrations
    if task is REVIEWS:
        assert 0.4 < np.mean(task.gold_scores(texts, demonstrations)) < 0.6
        assert (min(lengths), max(lengths)) == (6, 24)


# ---- The stages --------------------------------------------------------------------------------


def test_the_scalar_head_starts_small():
    """Deviation 1 / sqrt(d + 1) and no bias (N details, R2)."""
    args = Args()
    heads = [rlhf.make_model(args, REVIEWS, scalar=True).head for _ in range(40)]
    weights = torch.stack([head.weight.detach() for head in heads])
    assert weights.numel() == 40 * args.d_model
    assert weights.std() == pytest.approx((args.d_model + 1) ** -0.5, rel=0.05)
    assert all(head.bias == 0 for head in heads)


@pytest.mark.parametrize("falls", [True, False])
def test_the_learning_rate_warms_up_and_falls(falls):
    rates = []
    args = tiny(num_iterations=5, warmup_iterations=3, learning_rate=0.6, anneal_lr=falls)
    reference = random_model(args, LENGTHS)
    log = lambda step, metrics: rates.append(metrics["charts/learning_rate"])  # noqa: E731
    rlhf.ppo(args, LENGTHS, reference, LENGTHS.gold_scores, None, log)
    expected = [0.2, 0.4, 0.36, 0.24, 0.12] if falls else [0.2, 0.4, 0.6, 0.6, 0.6]
    assert rates == pytest.approx(expected)


def test_every_answer_is_used_once_an_epoch_in_an_order_of_its_own(monkeypatch):
    args = tiny(num_iterations=1, batch_size=16, num_minibatches=4, update_epochs=3)
    reference, read, used = random_model(args, LENGTHS), [], []
    forward = rlhf.Transformer.log_prob_and_entropy

    def watched(self, prompts, responses, temperature):
        rows = torch.cat([prompts, responses], 1).tolist()
        (used if torch.is_grad_enabled() else read).append([tuple(row) for row in rows])
        return forward(self, prompts, responses, temperature)

    monkeypatch.setattr(rlhf.Transformer, "log_prob_and_entropy", watched)
    rlhf.ppo(args, LENGTHS, reference, LENGTHS.gold_scores, None, no_log)
    assert [len(rows) for rows in used] == 12 * [4]
    epochs = [list(itertools.chain(*used[i : i + 4])) for i in (0, 4, 8)]
    assert all(sorted(rows) == sorted(read[0]) for rows in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("clipped", [True, False])
def test_the_value_loss_is_clipped_if_asked(clipped, monkeypatch):
    clips, value_loss = [], rlhf.value_loss
    monkeypatch.setattr(rlhf, "value_loss", lambda *a: clips.append(a[3]) or value_loss(*a))
    args = tiny(num_iterations=1, clip_coef=0.3, clip_vloss=clipped)
    rlhf.ppo(args, LENGTHS, random_model(args, LENGTHS), LENGTHS.gold_scores, None, no_log)
    assert set(clips) == {0.3 if clipped else None}


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_the_discount_reaches_the_first_word(gamma, monkeypatch):
    """Without a critic's forecasts, and with lambda 1, the first return is gamma^(L - 1) score."""
    calls = []
    gae = rlhf.gae
    monkeypatch.setattr(rlhf, "gae", lambda *a: calls.append((a, gae(*a))) or calls[-1][1])
    assert Args().gamma == 1.0  # detail P6
    args = tiny(num_iterations=1, gamma=gamma, gae_lambda=1.0, kl_coef=0.0)
    rlhf.ppo(args, LENGTHS, random_model(args, LENGTHS), LENGTHS.gold_scores, None, no_log)
    ((rewards, _, _, _, ends, *_), (_, returns)) = calls[0]
    scores, length = rewards.sum(0), ends.float().argmax(0) + 1
    torch.testing.assert_close(returns[0], gamma ** (length - 1) * scores)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ratio_is_one_on_the_first_minibatch(temperature):
    args = tiny(temperature=temperature, num_iterations=3, num_minibatches=1)
    reference, rows = random_model(args, REVIEWS), []
    gold = lambda texts, answers: [float(len(a)) for a in answers]  # noqa: E731
    rlhf.ppo(args, REVIEWS, reference, gold, None, lambda step, m: rows.append(m))
    assert len(rows) == 3
    assert max(row["losses/first_ratio_error"] for row in rows) < 1e-4
    assert rows[-1]["losses/approx_kl"] > 1e-6  # the later ones are not 1, so it is not a constant


def test_the_first_ratio_shows_another_temperature_and_a_shift(monkeypatch):
    args, rows = tiny(num_iterations=1), []
    reference = random_model(args, REVIEWS)
    gold = lambda texts, answers: [float(len(a)) for a in answers]  # noqa: E731
    generate, before = rlhf.generate, rlhf.Transformer.before

    def colder(args, *rest, **flags):
        return generate(dataclasses.replace(args, temperature=0.7), *rest, **flags)

    def shifted(model, prompts, responses):
        return torch.roll(before(model, prompts, responses), 1, dims=1)

    for owner, name, wrong in (
        (rlhf, "generate", colder),
        (rlhf.Transformer, "before", shifted),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, wrong)
            rlhf.ppo(args, REVIEWS, reference, gold, None, lambda step, m: rows.append(m))
    assert len(rows) == 2
    assert min(row["losses/first_ratio_error"] for row in rows) > 0.01


def test_reference_and_reward_model_stay_frozen():
    args = tiny()
    reference, reward_model = (random_model(args, REVIEWS, scalar) for scalar in (False, True))
    weights = [m.state_dict() for m in (reference, reward_model)]
    old = [{k: v.clone() for k, v in w.items()} for w in weights]
    reward_fn = rlhf.learned_reward(args, REVIEWS, reward_model)
    policy, value = rlhf.ppo(args, REVIEWS, reference, reward_fn, reward_model, no_log)
    for before, now in zip(old, weights):
        assert all(torch.equal(before[name], now[name]) for name in before)
    assert not torch.equal(policy.head.weight, reference.head.weight)
    assert not torch.equal(value.head.weight, reward_model.head.weight)


@pytest.mark.parametrize("init", ["reward", "policy"])
def test_value_model_starts_as_the_flag_says(init):
    args = tiny(value_init=init, learning_rate=1e-12, num_iterations=1)
    reference = random_model(args, REVIEWS)
    reward_model = random_model(args, REVIEWS, scalar=True, seed=1)
    reward_fn = rlhf.learned_reward(args, REVIEWS, reward_model)
    _, value = rlhf.ppo(args, REVIEWS, reference, reward_fn, reward_model, no_log)
    parent = reward_model if init == "reward" else reference
    torch.testing.assert_close(value.word.weight, parent.word.weight)
    same_head = torch.allclose(value.head.weight, reward_model.head.weight)
    assert same_head == (init == "reward")


def test_reward_model_learns_the_judges_taste_and_is_normalised():
    args = tiny(rm_pairs=256)
    reference = random_model(args, LENGTHS)
    reference.head.bias[EOS] += 2.0
    model, metrics = rlhf.train_reward_model(args, LENGTHS, reference, no_log)
    assert metrics["rm_correlation"] > 0.5  # an untrained one has a random sign
    rng, generator = rlhf.streams(args, 8)
    texts = LENGTHS.prompts(512, rng)
    answers = LENGTHS.decode(rlhf.answer(args, LENGTHS, reference, texts, generator)[1])
    scores = rlhf.read_scores(args, LENGTHS, model, texts, answers)
    assert abs(scores.mean()) < 0.2 and abs(scores.std() - 1) < 0.2


def test_gate_on_the_reward_model():
    args = tiny(rm_min_accuracy=1.0)
    with pytest.raises(UserError, match="rm-min-accuracy"):
        rlhf.train_reward_model(args, LENGTHS, random_model(args, LENGTHS), no_log)
    with pytest.raises(UserError, match="0 pairs apart"):
        rlhf.train_reward_model(args, REVIEWS, random_model(args, REVIEWS), no_log)


# ---- The proof: an enumerable vocabulary -------------------------------------------------------


class Spelling(rlhf.Task):
    """Three letters, at most three of them: 40 answers, each with a known probability in pi*."""

    words, separator, prompt_size, learned = ("a", "b", "c"), "", 1, False

    def prompts(self, count, rng, held_out=False):
        return [str(letter) for letter in rng.choice(["a", "b"], count)]

    def gold(self, prompt, response):
        score = 1.5 * (response.count(prompt) - response.count("c")) - 0.7 * len(response)
        return score + 2.0 * (response == "ca")


SPELLING = Spelling()


def proof_args(beta: float, **changes) -> Args:
    sizes = dict(d_model=16, num_layers=1, num_heads=2, context_size=6, max_new_tokens=3)
    budget = dict(num_iterations=40, batch_size=256, num_minibatches=4, update_epochs=4)
    return Args(kl_coef=beta, learning_rate=5e-3, **(sizes | budget | changes))


def exact_kl(args: Args, policy, reference) -> float:
    """KL(pi || pi*) over all answers, pi* = pi_ref exp(score / beta) / Z, mean of both prompts."""
    size = args.max_new_tokens
    rows = [
        [*word, EOS][:size] + [PAD] * (size - length - 1)
        for length in range(size + 1)
        for word in itertools.product((2, 3, 4), repeat=length)
    ]
    responses, kls = torch.tensor(rows), []
    assert responses.shape == (40, 3)
    for prompt in ("a", "b"):
        prompts = torch.tensor([SPELLING.encode(prompt)] * len(rows))
        log_pi, log_ref = (
            rlhf.log_density(args, m, prompts, responses).double() for m in (policy, reference)
        )
        assert log_pi.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
        scores = SPELLING.gold_scores([prompt] * len(rows), SPELLING.decode(responses))
        scores = torch.tensor(scores) - args.missing_eos_penalty * (responses != EOS).all(1)
        log_optimum = (log_ref + scores / args.kl_coef).log_softmax(0)
        kls.append((log_pi.exp() * (log_pi - log_optimum)).sum().item())
    return sum(kls) / 2


def prove(args: Args) -> tuple[float, float, float]:
    """KL(pi || pi*) before and after PPO, and the share of the optimum that the script reports."""
    reference = random_model(args, SPELLING)
    policy, _ = rlhf.ppo(args, SPELLING, reference, SPELLING.gold_scores, None, no_log)
    share = rlhf.optimum_share(args, SPELLING, policy, reference, SPELLING.gold_scores)
    return exact_kl(args, reference, reference), exact_kl(args, policy, reference), share


@pytest.mark.parametrize("beta, far, near", [(1.0, 1.0, 0.02), (0.3, 5.0, 0.05)])
def test_ppo_reaches_the_enumerated_optimum(beta, far, near):
    before, after, share = prove(proof_args(beta))
    assert before > far
    assert after < near
    assert share == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("baseline, credit", [("group", "response"), ("critic", "response")])
def test_the_other_baseline_and_credit_reach_it_too(baseline, credit):
    before, after, _ = prove(proof_args(1.0, baseline=baseline, credit=credit))
    assert before > 1.0
    assert after < 0.05


def test_ppo_misses_the_optimum_with_the_kl_sign_flipped(monkeypatch):
    right = rlhf.kl_penalty
    monkeypatch.setattr(rlhf, "kl_penalty", lambda *tensors: -right(*tensors))
    _, after, _ = prove(proof_args(1.0))
    assert after > 0.2


def test_ppo_misses_the_optimum_with_eos_outside_the_action_mask(monkeypatch):
    def no_eos(responses):
        mask = (responses != PAD) & (responses != EOS)
        return mask | (torch.arange(responses.shape[1]) == 0)  # an empty answer keeps one action

    args = proof_args(0.3)
    reference = random_model(args, SPELLING)
    with monkeypatch.context() as patch:
        patch.setattr(rlhf, "action_mask", no_eos)
        policy, _ = rlhf.ppo(args, SPELLING, reference, SPELLING.gold_scores, None, no_log)
    assert exact_kl(args, policy, reference) > 0.1  # 0.19 and 0.79 on two seeds, 0.01 if right


def test_raising_beta_lowers_the_kl():
    def final_kl(beta):
        args, rows = proof_args(beta, num_iterations=15), []
        reference = random_model(args, SPELLING)
        rlhf.ppo(args, SPELLING, reference, SPELLING.gold_scores, None, lambda s, m: rows.append(m))
        return np.mean([row["objective/kl"] for row in rows[-5:]])

    kls = [final_kl(beta) for beta in (0.3, 3.0)]
    assert kls[0] > 3 * kls[1] > 0


def test_adaptive_beta_brings_the_kl_to_its_target():
    rows = []
    args = proof_args(0.1, ref_kl_target=0.5, kl_horizon=250)
    reference = random_model(args, SPELLING)
    rlhf.ppo(args, SPELLING, reference, SPELLING.gold_scores, None, lambda s, m: rows.append(m))
    assert np.mean([row["objective/kl"] for row in rows[-10:]]) == pytest.approx(0.5, abs=0.2)
    assert rows[-1]["losses/kl_coef"] > 0.5


# ---- The command -------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["reviews", "arithmetic"])
def test_run_folder_and_reuse(task, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rlhf.Reviews, "gold", Lengths.gold)
    flags = dict(task=task, sft_accuracy=0.0, missing_eos_penalty=0.5)
    policy, results = rlhf.train(tiny(run_dir=tmp_path / "a", **flags))
    assert "PPO answers" in capsys.readouterr().out
    names = {p.name.split(".")[0] for p in (tmp_path / "a").iterdir()}
    assert {"args", "metrics", "results", "events", "sft", "policy", "value"} <= names
    assert ("reward_model" in names) == (task == "reviews")
    assert json.loads((tmp_path / "a" / "results.json").read_text()) == results
    common = "kl length eos_rate distinct optimum_share proxy wall_seconds grammatical "
    keys = "sft_accuracy accuracy greedy_accuracy"
    if task == "reviews":
        keys = "sft_gold sft_grammatical gold rm_accuracy rm_correlation"
    assert set((common + keys).split()) <= set(results)
    rows = list(csv.DictReader((tmp_path / "a" / "metrics.csv").read_text().splitlines()))
    assert [row["global_step"] for row in rows] == ["16", "32"]

    # A second run from the saved models is the same PPO to the last bit.
    loads = dict(load_sft=tmp_path / "a" / "sft.pt")
    if task == "reviews":
        loads["load_reward_model"] = tmp_path / "a" / "reward_model.pt"
    again, more = rlhf.train(tiny(run_dir=tmp_path / "b", **flags, **loads))
    assert all(map(torch.equal, policy.parameters(), again.parameters()))
    del results["wall_seconds"], more["wall_seconds"]
    assert results == more


def test_a_reward_of_ones_own(tmp_path):
    shorter = lambda prompts, responses: [-len(r) for r in responses]  # noqa: E731
    _, results = rlhf.train(tiny(run_dir=tmp_path / "a", kl_coef=0.0), reward_fn=shorter)
    assert results["proxy"] < 0 and results["optimum_share"] is None
    assert not (tmp_path / "a" / "reward_model.pt").exists()


@pytest.mark.parametrize(
    "scores, message",
    [([1.0] * 15, "15"), ([float("nan")] * 16, "NaN"), ([[1.0]] * 16, "16, 1"), (None, "no list")],
)
def test_bad_reward_function(scores, message, tmp_path):
    with pytest.raises(UserError, match=message):
        rlhf.train(tiny(run_dir=tmp_path / "a"), reward_fn=lambda prompts, responses: scores)
    assert not (tmp_path / "a" / "policy.pt").exists()


def test_saved_model_of_another_shape(tmp_path):
    path = tmp_path / "sft.pt"
    rlhf.save_model(path, random_model(tiny(), REVIEWS))
    before = path.read_bytes()
    for changes in (dict(d_model=32), dict(task="arithmetic"), dict(num_layers=2)):
        with pytest.raises(UserError, match="another shape"):
            rlhf.train(tiny(load_sft=path, run_dir=tmp_path / "run", **changes))
    with pytest.raises(UserError, match="another shape"):
        rlhf.train(tiny(load_reward_model=path, run_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists() and path.read_bytes() == before
    path.write_text("no model")
    for bad in (path, tmp_path / "missing.pt", tmp_path):
        with pytest.raises(UserError, match="not a model"):
            rlhf.train(tiny(load_sft=bad, run_dir=tmp_path / "run"))


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--task chess", "--task chess is unknown"),
        ("--context-size 28", "too short for prompts of 4 tokens"),
        ("--max-new-tokens 28", "too short for prompts of 4 tokens"),
        ("--kl-coef 0 --ref-kl-target 2", "--ref-kl-target needs --kl-coef above 0"),
        ("--resume elsewhere", "run: the run stays in its folder, elsewhere"),
        ("--kl-coef -0.1", "--kl-coef -0.1 must not be negative"),
        ("--task arithmetic --load-reward-model x.pt", "--load-reward-model"),
        ("--baseline group --group-size 7", "--group-size"),
        ("--temperature 0", "--temperature"),
        ("--d-model 30", "--d-model"),
    ],
)
def test_bad_flags_raise_and_leave_no_folder(flags, message, tmp_path):
    args = __import__("tyro").cli(Args, args=flags.split())
    args.run_dir = tmp_path / "run"
    with pytest.raises(UserError, match=message):
        rlhf.train(args)
    assert not (tmp_path / "run").exists()


def test_demonstrations_longer_than_the_context(tmp_path):
    with pytest.raises(UserError, match="--context-size 18: a demonstration takes"):
        rlhf.train(tiny(context_size=18, max_new_tokens=8, run_dir=tmp_path / "run"))


def test_an_answer_that_was_cut_off_is_read_to_an_eos_of_its_own():
    args = tiny(context_size=29, max_new_tokens=24)
    args.check()
    rlhf.read_scores(
        args, REVIEWS, random_model(args, REVIEWS, True), ["pool view bed :"], ["the " * 23 + "the"]
    )


def test_a_reward_function_raises_its_own_errors():
    def reward_fn(texts, answers):
        return [int(answer) for answer in answers]

    with pytest.raises(ValueError, match="invalid literal") as raised:
        rlhf.score_answers(tiny(), REVIEWS, reward_fn, ["pool :"], torch.tensor([[5, EOS]]))
    assert not isinstance(raised.value, UserError)


def test_prompts_longer_than_the_context():
    args = tiny()
    with pytest.raises(UserError, match="context-size"):
        rlhf.answer(args, REVIEWS, random_model(args, REVIEWS), ["pool " * 20 + ":"], None)
    with pytest.raises(UserError, match="vocabulary"):
        rlhf.answer(args, REVIEWS, random_model(args, REVIEWS), ["xylophone :"], None)


def test_command_line_error_is_one_line(tmp_path):
    command = [sys.executable, str(SCRIPT), "--kl-coef=-1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "ppo_rlhf_toy.py: --kl-coef -1.0 must not be negative\n"
    assert not list(tmp_path.iterdir())


def test_existing_run_is_not_overwritten(tmp_path):
    (tmp_path / "args.json").write_text("mine")
    with pytest.raises(UserError, match="holds a run: --resume it"):
        rlhf.train(tiny(run_dir=tmp_path))
    assert (tmp_path / "args.json").read_text() == "mine"


def test_stop_ends_ppo_in_order(tmp_path):
    args = tiny(run_dir=tmp_path / "a")
    stop, reference = threading.Event(), random_model(tiny(), REVIEWS)
    stop.set()
    rows = []
    rlhf.ppo(args, REVIEWS, reference, REVIEWS.gold_scores, None, lambda s, m: rows.append(m), stop)
    assert len(rows) == 1
    with pytest.raises(UserError, match="stopped"):
        rlhf.train(args, stop)


class StopAfter(threading.Event):
    """Is set as soon as a run has logged so many iterations of PPO."""

    def __init__(self, run_dir, iterations: int):
        super().__init__()
        self.metrics, self.iterations = run_dir / "metrics.csv", iterations

    def is_set(self) -> bool:
        return self.metrics.exists() and self.metrics.read_text().count("\n") > self.iterations


@pytest.mark.parametrize("flags", [{}, dict(task="arithmetic", baseline="group", group_size=4)])
def test_a_resumed_run_ends_as_one_that_was_never_stopped(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(rlhf.Reviews, "gold", Lengths.gold)  # or all answers are worth nothing yet
    flags = flags | dict(num_iterations=5, ref_kl_target=1.0, checkpoint_every=2)
    whole, expected = rlhf.train(tiny(run_dir=tmp_path / "whole", **flags))
    args = tiny(run_dir=tmp_path / "parts", **flags)
    rlhf.train(args, StopAfter(args.run_dir, 3))
    with open(args.run_dir / "metrics.csv", "a") as file:
        file.write("64,half a li")  # as a run leaves it that is killed before its next checkpoint
    args = dataclasses.replace(args, resume=args.run_dir)
    policy, results = rlhf.train(args)
    assert all(map(torch.equal, whole.parameters(), policy.parameters()))
    assert results | {"wall_seconds": 0} == expected | {"wall_seconds": 0}
    rows = [(tmp_path / x / "metrics.csv").read_text().splitlines() for x in ("whole", "parts")]
    for first, second in zip(*rows, strict=True):
        cells = [row.split(",") for row in (first, second)]
        assert cells[0][:4] == cells[1][:4] and cells[0][5:] == cells[1][5:]  # 4 is the speed


def test_a_resumed_run_heeds_another_beta_and_keeps_the_curves_of_its_stages(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(rlhf.Reviews, "gold", Lengths.gold)
    args = tiny(run_dir=tmp_path / "a", sft_steps=75)
    rlhf.train(args)
    args = dataclasses.replace(args, resume=args.run_dir, num_iterations=4, kl_coef=5.0)
    rlhf.train(args)
    rows = list(csv.DictReader((tmp_path / "a" / "metrics.csv").read_text().splitlines()))
    assert [float(row["losses/kl_coef"]) for row in rows] == [0.1, 0.1, 5.0, 5.0]
    events = EventAccumulator(str(tmp_path / "a" / "stages")).Reload()
    assert [event.step for event in events.Scalars("sft/loss")] == [25, 50, 75]


def test_what_a_resumed_run_was_told_is_what_its_folder_says(tmp_path, monkeypatch):
    monkeypatch.setattr(rlhf.Reviews, "gold", Lengths.gold)
    args = tiny(run_dir=tmp_path / "a")
    rlhf.train(args)
    rlhf.train(dataclasses.replace(args, resume=args.run_dir, num_iterations=3, kl_coef=0.3))
    for flag in ("--resume", "--evaluate"):
        monkeypatch.setattr(sys, "argv", ["ppo_rlhf_toy.py", flag, str(tmp_path / "a")])
        again = rlhf.parse()
        assert (again.num_iterations, again.kl_coef) == (3, 0.3)
    with pytest.raises(UserError, match="--batch-size was 16"):
        rlhf.train(dataclasses.replace(args, resume=args.run_dir, batch_size=32))


def test_a_signal_ends_an_evaluation_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(rlhf.Reviews, "gold", Lengths.gold)
    handlers, numbers = [], (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    rlhf.train(tiny(run_dir=tmp_path / "a"))
    watch = lambda *_: handlers.extend(map(signal.getsignal, numbers))  # noqa: E731
    monkeypatch.setattr(rlhf, "evaluate_run", watch)
    monkeypatch.setattr(sys, "argv", ["ppo_rlhf_toy.py", "--evaluate", str(tmp_path / "a")])
    try:
        rlhf.main()
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
    assert handlers == [signal.SIG_DFL, signal.SIG_DFL]


def test_a_run_stopped_before_ppo_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(rlhf.Reviews, "gold", Lengths.gold)
    args = tiny(run_dir=tmp_path / "a")
    stop = threading.Event()
    stop.set()
    with pytest.raises(UserError, match="stopped in the stage SFT"):
        rlhf.train(args, stop)
    policy, _ = rlhf.train(dataclasses.replace(args, resume=args.run_dir))
    whole, _ = rlhf.train(tiny(run_dir=tmp_path / "b"))
    assert all(map(torch.equal, whole.parameters(), policy.parameters()))


def test_a_damaged_checkpoint_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(rlhf.Reviews, "gold", Lengths.gold)
    args = tiny(run_dir=tmp_path / "a")
    rlhf.train(args)
    path = args.run_dir / "checkpoint.pt"
    for data in (path.read_bytes()[:1000], b"", b"text"):
        path.write_bytes(data)
        with pytest.raises(UserError, match="cannot be read"):
            rlhf.train(dataclasses.replace(args, resume=args.run_dir))


def test_evaluating_a_folder_gives_the_figures_of_the_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rlhf.Reviews, "gold", Lengths.gold)
    rlhf.train(tiny(run_dir=tmp_path / "a"))
    table = capsys.readouterr().out.partition("fresh prompts")[2]
    monkeypatch.setattr(sys, "argv", ["ppo_rlhf_toy.py", "--evaluate", str(tmp_path / "a")])
    rlhf.main()
    assert capsys.readouterr().out.partition("fresh prompts")[2] == table
    monkeypatch.setattr(sys, "argv", ["ppo_rlhf_toy.py", "--evaluate", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        rlhf.main()
    assert stopped.value.code == 2 and "holds no run" in capsys.readouterr().err
