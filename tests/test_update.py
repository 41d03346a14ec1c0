"""One iteration of `train`: what enters the update, and what the update does with it."""

import copy
import subprocess
import sys
from types import ModuleType

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import experiment
import ppo_atari
import ppo_continuous
import ppo_discrete
import ppo_lstm
from tests.envs import MARK
from tests.helpers import ROOT, make_agent, parameter_vector, quick_args, read_metrics, spy

# ---- What enters -------------------------------------------------------------------------------


def test_train_first_minibatch_of_every_update_has_ratio_one(script, monkeypatch, run_dir) -> None:
    """Also with normalisers, whose moments move between iterations only."""
    calls = spy(monkeypatch, "clipped_surrogate", script)
    args = quick_args(script, run_dir, num_minibatches=2, update_epochs=2)
    script.train(args)
    assert len(calls) == args.num_iterations * 4
    for call in calls[::4]:
        torch.testing.assert_close(call.ratio, torch.ones_like(call.ratio), atol=1e-5, rtol=0)
    assert any((call.ratio - 1).abs().max() > 1e-4 for call in calls)


@pytest.mark.parametrize(
    "script", [ppo_discrete, ppo_continuous, ppo_lstm], ids=lambda x: x.__name__
)
def test_train_acts_and_learns_with_the_same_statistics(script, monkeypatch, run_dir) -> None:
    """No rollout sees raw observations, the first one neither."""
    counts, snapshot = [], experiment.Normaliser.snapshot

    def noted(normaliser):
        if normaliser.mean.ndim == 1:  # of observations, not of rewards
            counts.append(normaliser.count.item())
        return snapshot(normaliser)

    monkeypatch.setattr(experiment.Normaliser, "snapshot", noted)
    args = quick_args(script, run_dir, norm_obs=True, eval_episodes=1)
    script.train(args)
    seen = [count for count in counts if count > 0]  # the first steps of all come before
    acting, learning = (seen[start : 2 * args.num_iterations : 2] for start in (0, 1))
    assert acting == learning == sorted(set(acting)) and len(acting) == args.num_iterations


POISON = {
    "ppo_discrete": dict(env_id="test/Poison-v0", norm_obs=False),
    "ppo_continuous": dict(env_id="test/PoisonBox-v0", norm_obs=False, norm_reward=False),
    "ppo_atari": dict(env_id="test/PoisonFrames-v0", sign_rewards=False),
    "ppo_lstm": dict(env_id="test/Poison-v0", norm_obs=False),
}


def test_train_reset_rows_reach_nothing(script, monkeypatch, run_dir) -> None:
    """`Poison` pays 1e6 in every reset row, and only a reset row has the marked observation."""
    calls = spy(monkeypatch, "ppo_loss", script)
    flags = dict(num_envs=3, num_steps=32, num_minibatches=2, update_epochs=2, eval_episodes=4)
    args = quick_args(script, run_dir, **POISON[script.__name__], **flags, total_timesteps=480)
    _, results = script.train(args)
    mark = 10 * MARK if script is ppo_atari else MARK
    assert len(calls) == 5 * 2 * 2
    for call in calls:
        obs = call.batch.obs
        if script is ppo_lstm:  # whose sequences end with the marked rows, which teach nothing
            obs = obs.flatten(0, 1)[call.batch.rows]
            assert len(obs) in (24, 48)  # three quarters of one environment's 32, or of two
        else:
            assert len(obs) in (35, 36, 37)  # three quarters of 96, halved
        assert not (obs.flatten(1)[:, 0] == mark).any()
        assert call.batch.returns.abs().max() < 1e3
    # Every fourth row of every environment is a reset, 24 or so of the 96 rows of an iteration.
    assert results["global_step"] == 5 * 96 * 3 // 4
    rows = read_metrics(run_dir)[1:]
    assert {row["charts/episodic_return"] for row in rows} == {3.0}
    assert {row["charts/episodic_length"] for row in rows} == {3.0}
    assert results["train_return"] < 3.0 + 1e-9


def kept_rows(done: Tensor) -> Tensor:
    """Return which rows of a first rollout are transitions, from `done` (T, N)."""
    return torch.cat([torch.ones_like(done[:1]), ~done[:-1]])


def test_train_every_epoch_uses_every_transition_once(script, monkeypatch, run_dir) -> None:
    rollouts, updates = spy(monkeypatch, "gae", script), spy(monkeypatch, "ppo_loss", script)
    script.train(quick_args(script, run_dir, num_minibatches=3, update_epochs=4))
    _, returns = rollouts[0].result
    expected = returns[kept_rows(rollouts[0].done)]
    assert len(expected.unique()) > 5 and len(expected) < returns.numel()
    epochs = [
        torch.cat([call.batch.returns for call in updates[i : i + 3]]) for i in range(0, 12, 3)
    ]
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, expected.sort().values)
    assert not any(torch.equal(epoch, expected) for epoch in epochs)  # shuffled,
    assert not torch.equal(epochs[0], epochs[1])  # and anew in every epoch


def test_train_columns_of_a_minibatch_belong_together(script, monkeypatch, run_dir) -> None:
    """Each row has the log-probability and the value that the agent of the rollout gives it."""
    agent = make_agent(script, head_std=1.0)
    playing, calls = copy.deepcopy(agent), spy(monkeypatch, "ppo_loss", script)
    script.train(quick_args(script, run_dir), agent)
    for call in calls[:4]:  # the minibatches of the first epoch
        log_probs, _, values = playing(call.batch)
        torch.testing.assert_close(call.batch.log_probs, log_probs.detach(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(call.batch.values, values.detach(), atol=1e-4, rtol=1e-4)
        assert call.batch.log_probs.std() > 0.1


@pytest.mark.parametrize("norm_adv", ["batch", "minibatch", "none"])
def test_norm_adv_names_the_rows_that_are_normalised(
    script, monkeypatch, run_dir, norm_adv: str
) -> None:
    calls = spy(monkeypatch, "clipped_surrogate", script)
    flags = dict(num_envs=8, num_steps=16, total_timesteps=128)
    script.train(quick_args(script, run_dir, norm_adv=norm_adv, num_minibatches=4, **flags))
    minibatch = calls[0].advantages
    batch = torch.cat([call.advantages for call in calls[:4]])
    for x, expected in ((minibatch, norm_adv == "minibatch"), (batch, norm_adv != "none")):
        # Four normalised minibatches have mean 0 together and a standard deviation near 1.
        normal = abs(x.mean()) < 1e-5 and abs(x.std() - 1) < 0.02
        assert normal == expected


@pytest.mark.parametrize("script", [ppo_discrete, ppo_continuous], ids=lambda x: x.__name__)
@pytest.mark.parametrize("kind", ["truncated", "terminated"])
def test_critic_after_training_tells_a_time_limit_from_an_end(script, run_dir, kind: str) -> None:
    """Reward 1 for ever is worth 1 / (1 - gamma); reward 1 until the end is the finite sum."""
    box = script is ppo_continuous
    flags = dict(env_id="test/ConstantBox-v0" if box else "test/Constant-v0", norm_obs=False)
    flags |= dict(norm_reward=False, clip_vloss=False) if box else {}
    flags |= dict(env_kwargs=(f"truncate={kind == 'truncated'}",), gamma=0.9, num_steps=64)
    flags |= dict(total_timesteps=16_000, update_epochs=5, learning_rate=1e-2)
    agent, _ = script.train(quick_args(script, run_dir, **flags))
    values = agent.critic(torch.eye(6)[:5]).squeeze(-1).detach()
    expected = [sum(0.9**i for i in range(5 - step)) for step in range(5)]
    if kind == "truncated":
        assert values[0].item() == pytest.approx(10.0, abs=0.3)
    else:
        torch.testing.assert_close(values, torch.tensor(expected), atol=0.15, rtol=0)


# ---- What the update does ----------------------------------------------------------------------

# Settings in which no episode ends, for SB3 has no reset rows; where SB3 keeps our layers; and
# which of our flags have other names there.
SB3 = {
    "ppo_discrete": (
        dict(env_id="Acrobot-v1", num_steps=32, activation="tanh"),
        "MlpPolicy",
        {"actor": "mlp_extractor.policy_net", "critic": "mlp_extractor.value_net"},
    ),
    "ppo_continuous": (
        dict(env_id="Pendulum-v1", num_steps=32, clip_vloss=False, log_std_fall=None),
        "MlpPolicy",
        {"actor": "mlp_extractor.policy_net", "critic": "mlp_extractor.value_net"},
    ),
    "ppo_atari": (
        dict(env_id="test/Frames-v0", num_steps=8, clip_coef=0.2),
        "CnnPolicy",
        {"trunk": "features_extractor.cnn"},
    ),
}


def names_in_sb3(agent: nn.Module, sequences: dict[str, str]) -> dict[str, str]:
    """Return the names that SB3 gives the parameters of an agent."""
    names = {}
    for name, _ in agent.named_parameters():
        part, _, rest = name.partition(".")
        layer = int(rest.partition(".")[0]) if rest else 0
        if part == "log_std":
            names[name] = "log_std"
        elif part == "trunk" and isinstance(agent.trunk[layer], nn.Linear):
            names[name] = f"features_extractor.linear.0.{rest.partition('.')[2]}"
        elif part in ("actor", "critic") and layer == len(getattr(agent, part)) - 1:
            head = "action_net" if part == "actor" else "value_net"
            names[name] = f"{head}.{rest.partition('.')[2]}"
        else:
            names[name] = f"{sequences[part]}.{rest}"
    return names


@pytest.mark.parametrize(
    "script", [ppo_discrete, ppo_continuous, ppo_atari], ids=lambda x: x.__name__
)
def test_train_moves_the_parameters_as_stable_baselines3_does(script, monkeypatch, run_dir) -> None:
    """Same weights, same batch, 4 epochs of one minibatch: equal to 1e-5 (parameters move 1e-2)."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.logger import Logger

    flags, policy, sequences = SB3[script.__name__]
    args = quick_args(
        script,
        run_dir,
        **flags,
        num_envs=4,
        total_timesteps=flags["num_steps"] * 4,
        update_epochs=4,
        num_minibatches=1,
        norm_adv="minibatch",
        learning_rate=1e-2,
        anneal_lr=False,
        ent_coef=0.01,
        vf_coef=1.0,  # SB3's value loss lacks our factor 1/2
        eval_episodes=1,
    )
    updates = spy(monkeypatch, "ppo_loss", script)
    agent = make_agent(script, **flags)
    start = {name: p.detach().clone() for name, p in agent.named_parameters()}
    script.train(args, agent)
    batch, B = updates[0].batch, args.batch_size  # one minibatch: all rows, shuffled
    assert len(updates) == 4 and len(batch.obs) == B

    model = PPO(
        policy,
        gym.make(args.env_id),
        n_steps=B,
        batch_size=B,
        n_epochs=4,
        learning_rate=1e-2,
        ent_coef=0.01,
        vf_coef=0.5,
        clip_range=0.2,
        device="cpu",
        policy_kwargs=dict(features_extractor_kwargs=dict(features_dim=args.hidden_size))
        if policy == "CnnPolicy"
        else {},
    )
    model.set_logger(Logger(None, []))
    names = names_in_sb3(agent, sequences)
    theirs = dict(model.policy.named_parameters())
    assert sorted(names.values()) == sorted(theirs)
    for name, parameter in start.items():
        theirs[names[name]].data.copy_(parameter)
    buffer = model.rollout_buffer  # (B, 1, ...): as if one environment had played all steps
    buffer.observations = batch.obs.unsqueeze(1).numpy()
    buffer.actions = batch.actions.unsqueeze(1).numpy()
    buffer.values, buffer.returns = batch.values[:, None].numpy(), batch.returns[:, None].numpy()
    buffer.log_probs = batch.log_probs[:, None].numpy()
    buffer.advantages = buffer.returns - buffer.values  # which SB3 normalises itself
    buffer.full = True
    model.train()

    for name, parameter in agent.named_parameters():
        torch.testing.assert_close(parameter, theirs[names[name]], atol=1e-5, rtol=0)
        assert (parameter - start[name]).abs().max() > 1e-3


def test_flatten_parameters_trains_as_separate_tensors_do() -> None:
    agent = make_agent(ppo_continuous, log_std_fall=None)
    plain = copy.deepcopy(agent)
    flat = experiment.flatten_parameters(agent)
    ours = experiment.Adam([flat], lr=0.01, eps=1e-5, fused=True)
    theirs = torch.optim.Adam(plain.parameters(), lr=0.01, eps=1e-5)
    batch = ppo_continuous.Batch(torch.randn(32, 2), torch.randn(32, 2), *[torch.empty(0)] * 4)

    def loss(net: nn.Module) -> Tensor:
        log_probs, _, values = net(batch)
        return values.square().mean() - log_probs.mean()

    for _ in range(5):
        flat.grad.zero_()
        loss(agent).backward()
        flat.grad *= (0.5 / (flat.grad.norm() + 1e-6)).clamp(max=1.0)
        ours.step()
        theirs.zero_grad()
        loss(plain).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        theirs.step()
    torch.testing.assert_close(flat.data, parameter_vector(agent), rtol=0, atol=0)
    torch.testing.assert_close(flat.data, parameter_vector(plain))


@pytest.mark.parametrize("fused", [True, False])
def test_adam_takes_the_steps_of_pytorch_s(fused: bool) -> None:
    ours, theirs = (nn.Parameter(torch.linspace(-1.0, 1.0, 100)) for _ in range(2))
    optimizers = [
        kind([parameter], lr=0.01, eps=1e-5, fused=fused)
        for kind, parameter in ((experiment.Adam, ours), (torch.optim.Adam, theirs))
    ]
    for _ in range(5):
        for parameter, optimizer in zip((ours, theirs), optimizers):
            (parameter.sin() ** 2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert parameter.grad is None
    assert torch.equal(ours, theirs) and ours.requires_grad
    states = [optimizer.state_dict() for optimizer in optimizers]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"][0].keys() == states[1]["state"][0].keys()
    assert all(torch.equal(x, states[1]["state"][0][k]) for k, x in states[0]["state"][0].items())


TINY_RLHF = "--task arithmetic --d-model 16 --num-layers 1 --num-heads 2 --sft-steps 2"
TINY_RLHF += " --sft-batch-size 8 --num-iterations 1 --batch-size 8 --eval-prompts 8"


@pytest.mark.parametrize(
    "script, flags",
    [("ppo_discrete", "--total-timesteps 2048 --eval-episodes 1"), ("ppo_rlhf_toy", TINY_RLHF)],
)
def test_a_run_does_not_import_what_only_compile_needs(script: str, flags: str, run_dir) -> None:
    """It takes a second, a quarter of CartPole's run."""
    code = f"import runpy, sys; runpy.run_path('{script}.py', run_name='__main__');"
    code += "sys.exit('torch._dynamo' in sys.modules)"
    command = [sys.executable, "-c", code, *flags.split(), "--run-dir", str(run_dir)]
    subprocess.run(command, cwd=ROOT, check=True)
    assert (run_dir / "checkpoint.pt").exists()


def test_max_grad_norm_limits_the_norm_that_adam_sees(script, run_dir) -> None:
    norms = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: norms.append(
            optimizer.param_groups[0]["params"][0].grad.norm().item()
        )
    )
    try:
        script.train(quick_args(script, run_dir, max_grad_norm=0.1))
    finally:
        hook.remove()
    assert 0.09 < max(norms) < 0.1 + 1e-5
    # What is logged is the norm before the limit.
    assert max(row["losses/grad_norm"] for row in read_metrics(run_dir)) > 0.11


def test_anneal_lr_lowers_the_rate_linearly_and_without_it_stays(script, run_dir) -> None:
    for anneal in (True, False):
        folder = run_dir / str(anneal)
        args = quick_args(script, folder, learning_rate=1e-3, anneal_lr=anneal)
        script.train(args)
        rates = [row["charts/learning_rate"] for row in read_metrics(folder)]
        falling = 1.0 - np.arange(args.num_iterations) / args.num_iterations
        np.testing.assert_allclose(rates, 1e-3 * (falling if anneal else np.ones(len(rates))))


def test_target_kl_exceeded_ends_the_update_after_the_epoch(script, monkeypatch, run_dir) -> None:
    calls = spy(monkeypatch, "ppo_loss", script)
    args = quick_args(script, run_dir, target_kl=1e-12, num_minibatches=2, learning_rate=1e-2)
    script.train(args)
    assert len(calls) == 2 * args.num_iterations  # one epoch in each


def test_target_kl_not_exceeded_leaves_all_epochs(script, monkeypatch, run_dir) -> None:
    calls = spy(monkeypatch, "ppo_loss", script)
    args = quick_args(script, run_dir, target_kl=1e9, num_minibatches=2)
    script.train(args)
    assert len(calls) == 2 * args.update_epochs * args.num_iterations


def test_penalty_adapts_its_coefficient_by_the_kl_of_the_last_epoch(
    script, monkeypatch, run_dir
) -> None:
    updates = spy(monkeypatch, "ppo_loss", script)
    adapted = spy(monkeypatch, "adapt_kl_coef", script)
    flags = dict(objective="penalty", target_kl=1e-7, num_minibatches=2, update_epochs=3)
    args = quick_args(script, run_dir, **flags)
    agent, _ = script.train(args)
    assert len(updates) == 6 * args.num_iterations  # target_kl ends no update here
    assert len(adapted) == args.num_iterations
    for i, call in enumerate(adapted):
        last = [figures["approx_kl"].item() for _, figures in (c.result for c in updates[6 * i :])]
        assert call.kl == pytest.approx(np.mean(last[4:6]), rel=1e-5)
        assert call.target_kl == 1e-7
    coefficients = [row["losses/kl_coef"] for row in read_metrics(run_dir)]
    assert len(set(coefficients)) > 1 and coefficients[-1] == agent.kl_coef.item()
    assert all(np.log2(x).is_integer() for x in coefficients)


def test_logged_losses_are_means_over_all_minibatches(script, monkeypatch, run_dir) -> None:
    calls = spy(monkeypatch, "ppo_loss", script)
    args = quick_args(script, run_dir, update_epochs=2, num_minibatches=3)
    script.train(args)
    rows = read_metrics(run_dir)
    assert len(calls) == 6 * len(rows) == 6 * args.num_iterations
    for name in ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac"):
        figures = [call.result[1][name].item() for call in calls]
        expected = np.reshape(figures, (len(rows), 6)).mean(1)
        logged = [row[f"losses/{name}"] for row in rows]
        np.testing.assert_allclose(logged, expected, rtol=1e-4, atol=1e-7)


# ---- The same numbers --------------------------------------------------------------------------


def trained(script: ModuleType, run_dir, **changes) -> Tensor:
    agent, _ = script.train(quick_args(script, run_dir, **changes))
    return parameter_vector(agent)


def test_train_with_the_same_seed_gives_the_same_bits(script, run_dir) -> None:
    first = trained(script, run_dir / "1")
    assert torch.equal(first, trained(script, run_dir / "2"))
    assert torch.equal(first, trained(script, run_dir / "3", eval_episodes=9))
    assert not torch.equal(first, trained(script, run_dir / "4", seed=2))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("script", [ppo_discrete, ppo_continuous], ids=lambda x: x.__name__)
def test_train_with_environments_in_processes_gives_the_same_bits(script, run_dir) -> None:
    flags = dict(num_envs=2, total_timesteps=64, eval_episodes=2)
    sync = trained(script, run_dir / "1", vectorization_mode="sync", **flags)
    assert torch.equal(sync, trained(script, run_dir / "2", vectorization_mode="async", **flags))


# ---- A network of one's own --------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.first, self.hidden = nn.Linear(inputs, 32), nn.Linear(32, 32)
        self.last = nn.Linear(32, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + torch.relu(self.hidden(x)))


class Waves(nn.Module):
    """Nothing that a layer of PyTorch does."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x @ self.matrix) * 2.0


class ScaledLinear(nn.Linear):
    """A subclass, which is not what it inherits from."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.3 * super().forward(x)


class Skipping(nn.Sequential):
    """A Sequential of plain layers that does not run them in sequence."""

    def forward(self, x: Tensor) -> Tensor:
        x = self[0](x)
        return self[2](x - self[1](x))


def hooked(inputs: int, outputs: int, where: str) -> nn.Sequential:
    """Return a plain Sequential with a hook on a layer, before a layer, or on the whole."""
    net = nn.Sequential(nn.Linear(inputs, 32), nn.Tanh(), nn.Linear(32, outputs))
    if where == "before":
        net[1].register_forward_pre_hook(lambda module, args: (2.0 * args[0],))
    else:
        layer = net if where == "whole" else net[1]
        layer.register_forward_hook(
            lambda module, args, output: 0.5 * output + args[0].mean(-1, keepdim=True)
        )
    return net


FOREIGN = {
    "layernorm_gelu": lambda i, o: nn.Sequential(
        nn.Linear(i, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, o)
    ),
    "residual": Residual,
    "silu": lambda i, o: nn.Sequential(nn.Linear(i, 32), nn.SiLU(), nn.Linear(32, o)),
    "own": Waves,
    "hook_after": lambda i, o: hooked(i, o, "after"),
    "hook_before": lambda i, o: hooked(i, o, "before"),
    "hook_whole": lambda i, o: hooked(i, o, "whole"),
    "no_bias": lambda i, o: nn.Sequential(
        nn.Linear(i, 32, bias=False), nn.Tanh(), nn.Linear(32, o)
    ),
    "subclass_of_linear": lambda i, o: nn.Sequential(ScaledLinear(i, 32), nn.Linear(32, o)),
    "subclass_of_sequential": lambda i, o: Skipping(nn.Linear(i, 32), nn.ReLU(), nn.Linear(32, o)),
    "nested": lambda i, o: nn.Sequential(
        nn.Sequential(nn.Linear(i, 32), nn.ReLU()), nn.Linear(32, o)
    ),
    "weight_norm": lambda i, o: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(i, 32)), nn.Tanh(), nn.Linear(32, o)
    ),
    "plain": lambda i, o: nn.Sequential(nn.Linear(i, 32), nn.ReLU(), nn.Linear(32, o)),
}


@pytest.fixture(params=FOREIGN)
def foreign_agent(request, script) -> nn.Module:
    """An agent whose policy is another network, with probabilities far from equal."""
    agent = make_agent(script)
    layers = [layer for layer in agent.actor if isinstance(layer, nn.Linear)]
    agent.actor = FOREIGN[request.param](layers[0].in_features, layers[-1].out_features)
    for parameter in agent.actor.parameters():
        parameter.data.mul_(2.0)
    return agent


def record_forwards(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Record what networks of policies give, in rollouts and in evaluations."""
    outputs, original = [], experiment.numpy_forward

    def numpy_forward(net: nn.Module):
        forward = original(net)

        def recorder(x: np.ndarray) -> np.ndarray:
            outputs.append(forward(x))
            return outputs[-1]

        return recorder

    monkeypatch.setattr(experiment, "numpy_forward", numpy_forward)
    return outputs


@pytest.mark.parametrize("script", [ppo_discrete, ppo_atari], ids=lambda x: x.__name__)
def test_foreign_network_of_choices_acts_as_it_learns(script, foreign_agent, monkeypatch) -> None:
    """Rollout, update and evaluation have the same probabilities."""
    agent, rng = foreign_agent, np.random.default_rng(0)
    if script is ppo_atari:
        obs = rng.integers(256, size=(50, *agent.obs_shape), dtype=np.uint8)
        inputs = agent.see(torch.as_tensor(obs))
    else:
        inputs = obs = rng.normal(size=(50, *agent.obs_shape)).astype(np.float32)
    masks, actions = agent.choices.no_masks, torch.arange(3).expand(50, 3).T[..., None]
    log_probs, _ = agent.log_prob_and_entropy(
        torch.as_tensor(inputs).expand(3, *inputs.shape), actions, torch.as_tensor(masks)
    )
    update = log_probs.exp().T.detach()  # (50, 3)
    assert update.std(0).max() > 0.005

    outputs = record_forwards(monkeypatch)
    if script is ppo_atari:
        agent.actor.register_forward_hook(lambda *x: outputs.append(x[-1].detach()))
    agent.policy()(inputs, masks, rng)
    likeliest = agent.act(obs, {}, None)
    rollout, evaluation = (torch.as_tensor(logits).softmax(-1) for logits in outputs)
    torch.testing.assert_close(rollout, update, atol=1e-5, rtol=0)
    torch.testing.assert_close(evaluation, update, atol=1e-5, rtol=0)
    assert (likeliest == update.argmax(1).numpy()).all()

    stack = torch.stack if script is ppo_atari else np.stack
    samples = agent.policy()(stack([inputs[0]] * 20_000), masks, rng)
    frequencies = np.bincount(samples[:, 0], minlength=3) / 20_000
    np.testing.assert_allclose(frequencies, update[0], atol=0.02)


@pytest.mark.parametrize("script", [ppo_continuous], ids=lambda x: x.__name__)
def test_foreign_network_of_a_gaussian_acts_as_it_learns(script, foreign_agent) -> None:
    """Rollout, update and evaluation have the same density."""

    class OneSigma:
        def standard_normal(self, shape: tuple, dtype: type) -> np.ndarray:
            return np.ones(shape, dtype)

    agent = foreign_agent
    agent.obs_normaliser.update(np.random.default_rng(1).normal(3.0, 2.0, (100, 2)))
    obs = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
    actions = torch.randn(50, 2)
    inputs = torch.as_tensor(agent.obs_normaliser.snapshot()(obs))
    update, _ = agent.log_prob_and_entropy(inputs, actions)
    mean = agent.policy()(obs, None)
    std = agent.policy()(obs, OneSigma()) - mean
    rollout = torch.distributions.Normal(torch.as_tensor(mean), torch.as_tensor(std))
    torch.testing.assert_close(rollout.log_prob(actions).sum(-1), update, atol=1e-4, rtol=1e-5)
    assert mean.std(0).max() > 0.1
    np.testing.assert_array_equal(agent.act(obs, {}, None), agent.to_env(mean))


def test_train_with_a_foreign_network_starts_updates_at_ratio_one(
    script, foreign_agent, monkeypatch, run_dir
) -> None:
    before = parameter_vector(foreign_agent.actor)
    calls = spy(monkeypatch, "clipped_surrogate", script)
    args = quick_args(script, run_dir, num_minibatches=2, update_epochs=2, eval_episodes=1)
    args.total_timesteps = 2 * args.batch_size
    agent, _ = script.train(args, foreign_agent)
    assert agent is foreign_agent and len(calls) == 8
    for call in calls[::4]:
        torch.testing.assert_close(call.ratio, torch.ones_like(call.ratio), atol=1e-4, rtol=0)
    assert not torch.equal(before, parameter_vector(agent.actor))
