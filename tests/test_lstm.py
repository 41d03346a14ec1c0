"""`ppo_lstm.py`: what its memory holds, where it is emptied, and what only a memory can solve."""

import re

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.utils import save_video
from torch import Tensor, nn

import experiment
import ppo_discrete
import ppo_lstm
from benchmarks import lstm
from benchmarks.jobs import RESULTS, read, wrapped
from experiment import RecordedEnvs, Run, UserError, load_agent
from ppo_lstm import Agent, train
from tests.helpers import ROOT, StopAfter, make_agent, parameter_vector, quick_args, spy


class Counter(gym.Env):
    """Its first number is the episode's, 1 and up, times `scale`; the second one is noise.

    Episodes have 3 to 9 steps. With `poison` the numbers of the first episode are huge.
    """

    observation_space = Box(-np.inf, np.inf, (2,), np.float32)
    action_space = Discrete(2)

    def __init__(self, poison: float = 1.0):
        self.poison, self.episode = poison, 0

    def observe(self) -> np.ndarray:
        row = np.array([0.1 * self.episode, self.np_random.normal()], np.float32)
        return row * (self.poison if self.episode == 1 else 1.0)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode += 1
        self.steps, self.length = 0, int(self.np_random.integers(3, 10))
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        over = self.steps == self.length
        return self.observe(), 1.0, over and self.length % 2 == 0, over and self.length % 2 == 1, {}


gym.register("test/Counter-v0", Counter)
COUNTER = dict(env_id="test/Counter-v0", norm_obs=False, num_steps=32)


def random_agent(**changes) -> Agent:
    """Return an agent whose policy is far from uniform and whose LSTMs have biases."""
    agent = make_agent(ppo_lstm, head_std=1.0, **changes)
    for name, parameter in agent.memory.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return agent


def step_by_step(agent: Agent, obs: Tensor, begins: Tensor, state: Tensor) -> tuple:
    """Return what `remember` returns and the state after it, by a loop over rows with cells."""
    outputs, states = [], []
    for net, (h, c) in ((agent.memory.actor, state[:2]), (agent.memory.critic, state[2:])):
        rows = []
        for x, new in zip(obs, begins):
            h, c = (torch.where(new[:, None], 0.0, part) for part in (h, c))
            gates = x @ net.weight_ih_l0.T + h @ net.weight_hh_l0.T
            i, f, g, o = (gates + net.bias_ih_l0 + net.bias_hh_l0).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            rows.append(h)
        outputs.append(torch.stack(rows))
        states += [h, c]
    return *outputs, torch.stack(states)


def run_policy(agent: Agent, obs: Tensor, begins: Tensor, state: Tensor) -> Tensor:
    """Return the states (T, 4, N, H) after each row, as a rollout has them."""
    state, states = state.clone(), []
    policy = agent.policy(state)
    for x, new in zip(obs, begins):
        policy(x.numpy(), agent.choices.no_masks, new.numpy(), None)
        states.append(state.clone())
    return torch.stack(states)


def sequences(T: int, N: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return observations (T, N, 3), where episodes begin, and a first state of 16 units."""
    torch.manual_seed(seed)
    return torch.randn(T, N, 3), torch.rand(T, N) < 0.15, 0.5 * torch.randn(4, N, 16)


# ---- The state ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (40, 1), (64, 6)])
def test_remember_equals_a_loop_over_rows_with_cells(shape: tuple) -> None:
    agent, inputs = random_agent(), sequences(*shape)
    *expected, _ = step_by_step(agent, *inputs)
    for ours, theirs in zip(agent.remember(*inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_gradient_through_time_is_that_of_a_loop_and_stops_where_an_episode_begins() -> None:
    agent, (obs, begins, state) = random_agent(), sequences(20, 3)
    begins[:], begins[8, 1] = False, True
    gradients = []
    for function in (agent.remember, lambda *x: step_by_step(agent, *x)[:2]):
        x = obs.clone().requires_grad_()
        outputs = function(x, begins, state)
        agent.zero_grad()
        sum(output[12].square().sum() for output in outputs).backward()
        gradients.append((x.grad, *(p.grad.clone() for p in agent.memory.parameters())))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    of_obs = gradients[0][0].abs().sum(-1)  # (T, N)
    assert (of_obs[:13, [0, 2]] > 0).all() and (of_obs[8:13, 1] > 0).all()
    assert not of_obs[:8, 1].any() and not of_obs[13:].any()


def test_states_of_an_update_are_those_of_the_rollout() -> None:
    """Of one environment to the bit, if PyTorch's LSTM is; in batches to 1e-6."""
    agent = random_agent()
    for T, N in ((64, 1), (64, 6)):
        obs, begins, state = sequences(T, N)
        states = run_policy(agent, obs, begins, state)
        with torch.no_grad():
            actor, critic = agent.remember(obs, begins, state)
            whole, _ = agent.memory.actor(obs[:, :1])
            one_by_one, last = [], None
            for x in obs[:, :1]:
                output, last = agent.memory.actor(x[None], last)
                one_by_one.append(output)
        torch.testing.assert_close(actor, states[:, 0], atol=1e-6, rtol=0)
        torch.testing.assert_close(critic, states[:, 2], atol=1e-6, rtol=0)
        if N == 1 and torch.equal(whole, torch.cat(one_by_one)):  # true of most processors
            assert torch.equal(actor, states[:, 0]) and torch.equal(critic, states[:, 2])
        # Rows of any minibatch of the environments.
        some = torch.randperm(N)[: (N + 1) // 2]
        part = agent.remember(obs[:, some], begins[:, some], state[:, some])
        torch.testing.assert_close(part[0], actor[:, some], atol=1e-6, rtol=0)


def test_train_rebuilds_the_states_of_the_rollout(monkeypatch, run_dir) -> None:
    """Over three rollouts whose episodes go on from one to the next."""
    agent, inner, played = random_agent(**COUNTER), [], []
    policy = Agent.policy

    def spied(self, state=None):
        choose = policy(self, state)

        def chosen(*args):
            actions = choose(*args)
            if state is not None:
                inner.append(state.clone())
            return actions

        return chosen

    remember = Agent.remember

    def noted(self, *args):
        outputs = remember(self, *args)
        if not torch.is_grad_enabled():
            played.append((torch.stack(inner), args[1].clone(), outputs))
            inner.clear()
        return outputs

    monkeypatch.setattr(Agent, "policy", spied)
    monkeypatch.setattr(Agent, "remember", noted)
    train(quick_args(ppo_lstm, run_dir, **COUNTER), agent, on_iteration=StopAfter(3))
    assert len(played) == 3
    for states, _, (actor, critic) in played:
        torch.testing.assert_close(actor[:-1], states[:, 0], atol=1e-6, rtol=0)
        torch.testing.assert_close(critic[:-1], states[:, 2], atol=1e-6, rtol=0)
    assert played[0][1][0].all() and not played[1][1][0].all()
    assert torch.equal(
        played[1][1][0], played[0][1][-1]
    )  # the last row of one, the first of the next


def test_train_minibatches_are_whole_environments(monkeypatch, run_dir) -> None:
    calls = spy(monkeypatch, "ppo_loss", ppo_lstm)
    rollouts = spy(monkeypatch, "gae", ppo_lstm)
    args = quick_args(ppo_lstm, run_dir, **COUNTER, num_minibatches=3, update_epochs=2)
    train(args, on_iteration=StopAfter(1))
    done = rollouts[0].done  # (T, N)
    keep = torch.cat([torch.ones_like(done[:1]), ~done[:-1]])
    returns = rollouts[0].result[1]
    for epoch in (calls[:3], calls[3:]):
        columns = []
        for call in epoch:
            batch = call.batch
            M = batch.obs.shape[1]
            assert M in (2, 3) and batch.state.shape == (4, M, 16) and len(batch.obs) == 32
            whole = torch.full((32 * M,), torch.nan)
            whole[batch.rows] = batch.returns
            columns += whole.view(32, M).unbind(1)
        expected = [torch.where(k, r, torch.nan) for k, r in zip(keep.T, returns.T)]
        order = [
            next(i for i, x in enumerate(expected) if torch.equal(x.nan_to_num(), c.nan_to_num()))
            for c in columns
        ]
        assert sorted(order) == list(range(8)) and order != sorted(order)


# ---- Where it ends -----------------------------------------------------------------------------


@pytest.mark.parametrize("terminated", [True, False])
def test_begins_says_where_an_episode_begins(terminated: bool) -> None:
    kwargs = dict(env_id="test/Constant-v0", env_kwargs=(f"truncate={not terminated}",))
    args = quick_args(ppo_lstm, None, **kwargs, norm_obs=False)
    envs = experiment.RecordedEnvs(ppo_lstm.make_envs(args, 2))
    _, info = envs.reset(seed=1)
    begins = [info["begins"]]
    for _ in range(13):
        *_, info = envs.step(np.zeros(2, int))
        begins.append(info["begins"])
    envs.close()
    # Five steps, of which the last one shows the end; then the reset, which shows the beginning.
    assert [row.tolist() for row in begins] == [[t in (0, 6, 12)] * 2 for t in range(14)]


def test_state_never_crosses_the_end_of_an_episode(monkeypatch, run_dir) -> None:
    """With a first episode a million times as large, all that belongs to later ones is the same."""
    agent, seen = random_agent(**COUNTER), []
    for poison in (1.0, 1e6):
        calls = spy(monkeypatch, "ppo_loss", ppo_lstm)
        flags = COUNTER | dict(env_kwargs=(f"poison={poison}",), vectorization_mode="sync")
        flags |= dict(num_minibatches=1, update_epochs=1, norm_adv="none", learning_rate=1e-12)
        args = quick_args(ppo_lstm, run_dir / f"{poison:g}", **flags)
        agent = random_agent(**COUNTER)
        # A policy that does not look, so that both play the same episodes.
        nn.init.zeros_(agent.actor[-1].weight)
        train(args, agent, on_iteration=StopAfter(1))
        monkeypatch.undo()
        batch = calls[0].batch
        episode = batch.begins.long().cumsum(0).flatten()[batch.rows]
        order = batch.obs[:, :, 1].flatten()[batch.rows]
        later = episode > 1
        values = calls[0].batch.values
        seen.append((later, values[later], values[~later], order[later]))
    (later, values, first, noise), (again, poisoned, first_poisoned, same_noise) = seen
    assert later.sum() > 50 and torch.equal(later, again)
    assert sorted(noise.tolist()) == sorted(same_noise.tolist())
    torch.testing.assert_close(values.sort().values, poisoned.sort().values, atol=1e-5, rtol=1e-5)
    assert (first.sort().values - first_poisoned.sort().values).abs().max() > 0.1


def test_act_forgets_where_the_info_says_and_a_new_policy_knows_nothing() -> None:
    agent, rng = random_agent(), np.random.default_rng(0)
    obs = rng.normal(size=(30, 4, 3)).astype(np.float32)

    def logits_after(rows: np.ndarray, infos: list[dict]) -> list[np.ndarray]:
        seen = []
        forward = experiment.numpy_forward(agent.actor)
        experiment_forward = experiment.numpy_forward
        experiment.numpy_forward = lambda net: lambda x: seen.append(forward(x)) or seen[-1]
        try:
            policy = agent.policy()
        finally:
            experiment.numpy_forward = experiment_forward
        for x, info in zip(rows, infos):
            agent.act(x, info, None, policy)
        return seen

    nothing = [{}] * 30
    emptied = [{"begins": np.array([t == 20, False, False, t == 5])} for t in range(30)]
    whole, fresh = logits_after(obs, nothing), logits_after(obs[20:], nothing)
    resets = logits_after(obs, emptied)
    np.testing.assert_allclose(resets[29][0], fresh[9][0], atol=1e-6)
    np.testing.assert_allclose(resets[29][1:3], whole[29][1:3], atol=1e-6)
    numbers = [{"begins": info["begins"].astype(int).tolist()} for info in emptied]
    np.testing.assert_allclose(logits_after(obs.astype(np.float64), numbers), resets, atol=1e-5)
    assert np.abs(resets[20][0] - whole[20][0]).max() > 1e-3
    assert np.abs(resets[5][3] - whole[5][3]).max() > 1e-3


def test_permuting_environments_permutes_everything() -> None:
    agent, (obs, begins, state) = random_agent(), sequences(32, 6)
    order = torch.randperm(6)
    mixed = (obs[:, order], begins[:, order], state[:, order])
    for ours, theirs in zip(agent.remember(obs, begins, state), agent.remember(*mixed)):
        torch.testing.assert_close(ours[:, order], theirs, atol=1e-6, rtol=0)
    states, theirs = run_policy(agent, obs, begins, state), run_policy(agent, *mixed)
    torch.testing.assert_close(states[:, :, order], theirs, atol=1e-6, rtol=0)
    columns = [torch.randint(3, (32, 6, 1)), torch.zeros(32, 6, 1, 3), *torch.randn(4, 32, 6)]
    rollout = ppo_lstm.Batch(obs, begins, state, torch.rand(32, 6) < 0.9, *columns)
    args, gradients = ppo_lstm.Args(), []
    for envs in (torch.arange(6), order):
        agent.zero_grad()
        loss, _ = ppo_lstm.ppo_loss(agent, args, rollout.of(envs))
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in agent.parameters()]))
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


# ---- The network -------------------------------------------------------------------------------


def test_memory_at_first_is_orthogonal_with_zero_biases() -> None:
    """Detail 32; PyTorch would draw both uniformly."""
    agent = make_agent(ppo_lstm)
    for net in (agent.memory.actor, agent.memory.critic):
        assert not net.bias_ih_l0.any() and not net.bias_hh_l0.any()
        for w in (net.weight_ih_l0, net.weight_hh_l0):
            torch.testing.assert_close(w.T @ w, torch.eye(w.shape[1]), atol=1e-5, rtol=0)


def test_policy_starts_from_a_state_of_zero() -> None:
    agent, (obs, *_) = random_agent(), sequences(4, 2)
    policy, fed = agent.policy(), agent.policy(torch.zeros(4, 2, 16))
    nothing = np.zeros(2, bool)
    for x in obs.numpy():
        rngs = [np.random.default_rng(7) for _ in range(2)]
        first, second = (
            p(x, agent.choices.no_masks, nothing, g) for p, g in zip((policy, fed), rngs)
        )
        assert (first == second).all()


def test_critic_and_actor_remember_apart() -> None:
    agent, (obs, begins, state) = random_agent(), sequences(16, 2)
    before = agent.remember(obs, begins, state)
    for parameter in agent.memory.critic.parameters():
        parameter.data.mul_(2.0)
    after = agent.remember(obs, begins, state)
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1], atol=0.01)


# ---- Flags and environments --------------------------------------------------------------------


def test_hide_sets_numbers_of_the_observation_to_zero(run_dir) -> None:
    args = quick_args(ppo_lstm, run_dir, env_id="CartPole-v1", hide=(1, 3))
    hidden, whole = (ppo_lstm.make_envs(x, 3) for x in (args, ppo_lstm.Args()))
    for obs, every in [(envs.reset(seed=1)[0] for envs in (hidden, whole))]:
        assert (obs[:, [1, 3]] == 0).all() and (every[:, [1, 3]] != 0).all()
        assert (obs[:, [0, 2]] == every[:, [0, 2]]).all()
    with pytest.raises(UserError, match="--hide takes numbers from 0 to 3"):
        train(quick_args(ppo_lstm, run_dir, env_id="CartPole-v1", hide=(4,)))


@pytest.mark.parametrize(
    ("flags", "words"), [(dict(compile=True), "--compile"), (dict(num_envs=2), "--num-minibatches")]
)
def test_what_an_lstm_cannot_do_is_refused(run_dir, flags: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        train(quick_args(ppo_lstm, run_dir, **flags))


@pytest.mark.parametrize("env", ["Masked", "Parts"])
def test_train_with_masks_and_parts_learns_them_all(run_dir, env: str) -> None:
    flags = dict(env_id=f"test/{env}-v0", num_steps=32, total_timesteps=10_240, update_epochs=4)
    args = quick_args(ppo_lstm, run_dir, **flags, learning_rate=1e-2, eval_episodes=20)
    _, results = train(args)
    assert results["eval_mean"] > 8.5  # of 10; chance gives 5 or less


def test_train_with_blackjack_whose_rows_are_half_resets_runs(run_dir) -> None:
    flags = dict(num_envs=2, num_steps=4, total_timesteps=80, num_minibatches=2)
    _, results = train(quick_args(ppo_lstm, run_dir, env_id="Blackjack-v1", **flags))
    assert np.isfinite(results["eval_mean"]) and results["global_step"] > 0


# ---- What only a memory can solve --------------------------------------------------------------

MAZE = dict(env_id="TMaze-v0", num_envs=16, num_steps=64)


def test_resume_evaluate_film_and_load_agent_carry_the_memory(run_dir, monkeypatch) -> None:
    """The cue of a short maze is two steps back: without a state none of them passes."""
    flags = MAZE | dict(env_kwargs=("length=2",), hidden_size=32, learning_rate=5e-3)
    args = quick_args(ppo_lstm, run_dir, **flags, total_timesteps=16_384, update_epochs=4)
    train(args, on_iteration=StopAfter(8))
    args.run_dir, args.resume = None, run_dir
    agent, results = train(args)
    assert results["eval_mean"] == 1.0 and results["eval_std"] == 0.0
    args.resume, args.evaluate = None, run_dir
    assert train(args)[1]["eval_mean"] == 1.0
    monkeypatch.undo()
    loaded, env = load_agent(run_dir, ppo_lstm.Args, Agent), lstm.TMaze(length=2)
    rewards = 0.0
    for seed in range(10):
        policy, over, (obs, info) = loaded.policy(), False, env.reset(seed=seed)
        while not over:
            action = loaded.act(obs[None], info, None, policy)[0]
            obs, reward, over, _, info = env.step(action)
            rewards += reward
    assert rewards == 10.0
    filmed, frames = [], []
    monkeypatch.setattr(
        save_video, "save_video", lambda pictures, *_, **__: frames.extend(pictures)
    )
    monkeypatch.setattr(experiment, "picture", lambda envs, obs: np.zeros((2, 2, 3)))
    monkeypatch.setattr(RecordedEnvs, "close", lambda self: filmed.extend(self.finished))
    with Run(args) as run:
        run.film(lambda args, num_envs, **_: ppo_lstm.make_envs(args, num_envs), agent)
    assert filmed == [(0, 1.0, 3)] and len(frames) == 4  # before, and after each of three steps
    assert parameter_vector(loaded).equal(parameter_vector(agent).cpu())


def test_maze_without_a_memory_stays_at_chance(run_dir) -> None:
    flags = MAZE | dict(env_kwargs=("length=2",), total_timesteps=16_384, eval_episodes=100)
    _, results = ppo_discrete.train(quick_args(ppo_discrete, run_dir, **flags))
    assert 0.3 < results["eval_mean"] < 0.7


# ---- What the pages say ------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["en", "zh"])
def test_effects_of_details_of_the_memory_are_those_of_the_committed_runs(language: str) -> None:
    means: dict[str, list[float]] = {}
    for row in read(RESULTS / "lstm.csv"):
        if row["env_id"] == lstm.MAZE and row["script"] == "ppo_lstm.py":
            means.setdefault(row["config"], []).append(float(row["eval_mean"]))
    page = (ROOT / "docs" / language / "details.md").read_text()
    found = re.findall(r"\[(\d\.\d\d)\]\(lstm\.md#[^)]*\): ([^|]*) \|", page)
    assert len(found) == 3 and np.mean(means["default"]) == 1.0
    for value, config in found:
        assert value == f"{np.mean(means[config]):.2f}", config


@pytest.mark.parametrize("language", ["en", "zh"])
def test_speeds_of_the_page_are_the_medians_of_the_committed_runs(language: str) -> None:
    page = (ROOT / "docs" / language / "lstm.md").read_text()
    rows = read(RESULTS / "lstm_speed.csv")
    for name in ("ppo_lstm.py", "RecurrentPPO"):
        speeds = [float(row["steps_per_second"]) for row in rows if row["contender"] == name]
        assert re.search(rf"(?<![\d,.]){np.median(speeds):,.0f}(?![\d,])", page), name


# ---- What benchmarks/lstm.py changes -----------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, wraps in lstm.WRAPS.items() if wraps])
def test_changes_of_the_benchmark_change_what_is_learned(run_dir, name: str) -> None:
    learned = []
    for changes in ({}, lstm.WRAPS[name]):
        with wrapped(ppo_lstm, changes):
            args = quick_args(ppo_lstm, run_dir / str(len(learned)), **COUNTER, update_epochs=1)
            agent, _ = train(args, on_iteration=StopAfter(2))
        learned.append(parameter_vector(agent))
    shared = name == "one LSTM for actor and critic"
    assert (len(learned[0]) > len(learned[1])) == shared
    assert shared or not torch.equal(*learned)


def test_four_frames_without_velocities_are_what_the_benchmark_gives_to_ppo_discrete() -> None:
    with wrapped(ppo_discrete, lstm.STACKED):
        envs = ppo_discrete.make_envs(ppo_discrete.Args(), 2)
        obs, _ = envs.reset(seed=1)
        after, *_ = envs.step(np.zeros(2, int))
        envs.close()
    assert obs.shape == after.shape == (2, 16)
    assert not after[:, 1::2].any() and after[:, ::2].all()
    np.testing.assert_array_equal(after[:, :12], obs[:, 4:])
    assert not np.array_equal(after[:, 12:], obs[:, 12:])


def test_right_turn_at_the_end_of_the_maze_pays() -> None:
    env = lstm.TMaze(length=20)
    for seed in range(8):
        obs, _ = env.reset(seed=seed)
        right, rows = 1 + int(obs[0] > 0), [obs]
        turn, over = (right if seed < 4 else 3 - right), False
        while not over:
            obs, reward, over, *_ = env.step(turn if obs[1] else 0)
            rows.append(obs)
        assert reward == float(seed < 4) and len(rows) == 22
        assert not np.any(rows[1:20]) and rows[20].tolist() == [0.0, 1.0]
