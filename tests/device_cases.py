"""On a GPU, as far as an imitated one can tell: the numbers of the CPU, and few waits."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import experiment
import ppo_atari
import ppo_continuous
import ppo_discrete
import ppo_rlhf_toy
from tests.helpers import quick_args, read_metrics

device = pytest.importorskip("tests.device", reason="this PyTorch has no devices made in Python")

# Each kernel of the imitation takes the time of a hundred: as few as show everything.
FEW = dict(update_epochs=2, num_minibatches=2)
SETTINGS = {
    "discrete": (ppo_discrete, dict(norm_obs=True)),
    "minibatch_and_target": (ppo_discrete, dict(norm_adv="minibatch", target_kl=0.5)),
    "penalty": (ppo_discrete, dict(objective="penalty")),
    "masked": (ppo_discrete, dict(env_id="test/Masked-v0")),
    "continuous": (ppo_continuous, {}),
    "learned_std": (ppo_continuous, dict(log_std_fall=None, ent_coef=0.01)),
    "atari": (ppo_atari, {}),
}


def train_there(script, run_dir, **changes):
    """Train on the imitated device; return what it counted."""
    with device.imitated_device() as counts:
        script.train(quick_args(script, run_dir, device=device.DEVICE, **FEW | changes))
    return counts


def assert_equal_metrics(cpu, there) -> None:
    """Compare two iterations of two run folders."""
    here, there = read_metrics(cpu), read_metrics(there)
    assert len(here) == len(there) == 2 and here[0].keys() == there[0].keys()
    for key in here[0].keys() - {"charts/SPS"}:
        a, b = ([row[key] for row in rows] for rows in (here, there))
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("setting", SETTINGS)
def test_training_on_the_device_gives_the_numbers_of_the_cpu(tmp_path, setting: str) -> None:
    script, flags = SETTINGS[setting]
    flags = flags | dict(total_timesteps=2 * quick_args(script, None).batch_size)
    script.train(quick_args(script, tmp_path / "cpu", **FEW | flags))
    train_there(script, tmp_path / "there", **flags)
    assert_equal_metrics(tmp_path / "cpu", tmp_path / "there")


@pytest.mark.parametrize("setting", ["discrete", "masked", "continuous", "learned_std", "atari"])
def test_an_iteration_waits_for_the_device_a_few_times(tmp_path, setting: str) -> None:
    """Not in a loop over minibatches, and in one over steps only for the actions of images."""
    script, flags = SETTINGS[setting]
    args = quick_args(script, tmp_path / "x")
    waits = {}
    for iterations in (1, 3):
        total = iterations * args.batch_size
        counts = train_there(script, tmp_path / str(iterations), total_timesteps=total, **flags)
        waits[iterations] = counts.waits
    per_iteration = {
        line: (count - waits[1][line]) / 2
        for line, count in waits[3].items()
        if count != waits[1][line]
    }
    limit = 5 + args.num_steps if script is ppo_atari else 8
    assert 3 <= sum(per_iteration.values()) <= limit, per_iteration


def rlhf_args(run_dir, **changes):
    """Return flags of a run with two micro-batches a minibatch and two minibatches an epoch."""
    flags = dict(task="arithmetic", sft_steps=5, eval_prompts=16, num_iterations=2)
    flags |= dict(num_layers=1, batch_size=16, micro_batch_size=4, num_minibatches=2)
    return ppo_rlhf_toy.Args(run_dir=run_dir, **flags | dict(update_epochs=2) | changes)


@pytest.mark.parametrize(
    "changes", [{}, dict(baseline="group", kl_in_loss=True, kl_estimator="k3")]
)
def test_rlhf_on_the_device_waits_in_no_update_and_once_a_token(
    tmp_path, monkeypatch, changes
) -> None:
    """And it gives the numbers of the CPU."""
    monkeypatch.setattr(ppo_rlhf_toy, "Generator", lambda _: torch.Generator())
    args = rlhf_args(tmp_path / "cpu", device="cpu", **changes)
    ppo_rlhf_toy.train(args)
    waits: dict[str, list[int]] = {"update": [], "generate": []}

    def watch(name: str, function) -> None:
        def watched(*args):
            before = counts.waits.total()
            result = function(*args)
            waits[name].append(counts.waits.total() - before)
            return result

        monkeypatch.setattr(ppo_rlhf_toy, name, watched)

    for name in waits:
        watch(name, getattr(ppo_rlhf_toy, name))
    with device.imitated_device() as counts:
        ppo_rlhf_toy.train(rlhf_args(tmp_path / "there", device=device.DEVICE, **changes))
    assert waits["update"] == [0] * 8  # 2 iterations, 2 epochs, 2 minibatches
    # One for the check that the policy is finite.
    assert 1 < max(waits["generate"]) <= args.max_new_tokens + 1
    assert_equal_metrics(tmp_path / "cpu", tmp_path / "there")


def test_a_run_of_the_device_is_evaluated_and_resumed_on_another(tmp_path) -> None:
    train_there(ppo_discrete, tmp_path / "run", total_timesteps=256)
    args = quick_args(ppo_discrete, None, resume=tmp_path / "run", total_timesteps=512)
    agent, _ = ppo_discrete.train(args)
    assert all(p.device.type == "cpu" for p in agent.parameters())
    assert len(read_metrics(tmp_path / "run")) == 4
    train_there(ppo_discrete, None, evaluate=tmp_path / "run")


def test_load_agent_of_a_run_of_the_device_acts_on_the_cpu(tmp_path) -> None:
    train_there(ppo_discrete, tmp_path / "run", total_timesteps=256)
    agent = experiment.load_agent(tmp_path / "run", ppo_discrete.Args, ppo_discrete.Agent)
    shape = agent.obs_shape
    assert agent.act(np.zeros((2, *shape), np.float32), {}).shape == (2,)


# ---- The imitation -----------------------------------------------------------------------------


def test_imitated_device_refuses_what_a_gpu_refuses() -> None:
    with device.imitated_device():
        there = torch.ones(3, device=device.DEVICE)
        assert there.device == device.THERE and (there * 2.0).sum().item() == 6.0
        with pytest.raises(RuntimeError, match="two devices"):
            there + torch.ones(3)
        with pytest.raises(TypeError, match="no array"):
            there.numpy()
        with pytest.raises(TypeError, match="no array"):
            np.asarray(there)


@pytest.mark.parametrize(
    ("work", "waits"),
    [
        (lambda x: x + 1.0, 0),
        (lambda x: x[torch.tensor([0, 2]).to(device.DEVICE)], 0),
        (lambda x: x.cpu(), 1),
        (lambda x: x.sum().item(), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x[x > 0.0], 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: float(x.max()), 1),
        (lambda x: bool((x > 0.0).any()), 1),
    ],
)
def test_imitated_device_counts_waits(work, waits: int) -> None:
    with device.imitated_device() as counts:
        work(torch.ones(3, device=device.DEVICE))
    assert sum(counts.waits.values()) == waits


def test_every_seed_of_gymnasium_is_as_without_the_device(tmp_path) -> None:
    """The imitation leaves nothing behind that changes a later run."""
    env_id = "CartPole-v1"
    before = gym.make(env_id).reset(seed=1)[0]
    with device.imitated_device():
        torch.ones(2, device=device.DEVICE)
    assert (gym.make(env_id).reset(seed=1)[0] == before).all()
    assert torch.ones(2).device.type == "cpu"
