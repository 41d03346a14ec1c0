"""What the scripts share is the same, letter by letter: the repetition is the design."""

import inspect
import re
from pathlib import Path

import pytest

import ppo_continuous
import ppo_discrete
import ppo_rlhf_toy

SHARED = [
    "UserError",
    "RunningMoments",
    "mlp",
    "flatten_parameters",
    "clipped_surrogate",
    "kl_penalised_surrogate",
    "adapt_kl_coef",
    "adapt_learning_rate",
    "value_loss",
    "diagnostics",
    "normalise",
    "critique",
    "ppo_loss",
    "all_sum",
    "moments",
    "split_seed",
    "join_processes",
    "gather",
    "compile_loss",
    "report",
    "film",
    "write",
    "write_json",
    "open_run",
    "log",
    "save",
    "load",
    "evaluate_run",
    "main",
]


@pytest.mark.parametrize("name", SHARED)
def test_shared_functions_are_equal(name: str) -> None:
    discrete, continuous = getattr(ppo_discrete, name), getattr(ppo_continuous, name)
    assert inspect.getsource(discrete) == inspect.getsource(continuous)


@pytest.mark.parametrize("name", ["clipped_surrogate", "value_loss"])
def test_the_losses_of_rlhf_are_the_same(name: str) -> None:
    rlhf, discrete = getattr(ppo_rlhf_toy, name), getattr(ppo_discrete, name)
    assert inspect.getsource(rlhf) == inspect.getsource(discrete)


def test_the_update_is_equal() -> None:
    def block(module) -> str:
        source = Path(module.__file__).read_text()
        return re.search(r"# ---- \[3\].*?# ---- \[4\]", source, re.DOTALL)[0]

    assert block(ppo_discrete) == block(ppo_continuous)


def test_flags_that_both_have_mean_the_same() -> None:
    """Same order, same type, same help; only defaults may differ."""

    def fields(module) -> dict[str, str]:
        source = inspect.getsource(module.Args)
        return dict(re.findall(r"^    (\w+): (.*?) = ", source, re.MULTILINE))

    discrete, continuous = fields(ppo_discrete), fields(ppo_continuous)
    both = [k for k in continuous if k in discrete]
    assert len(both) > 35 and both == [k for k in discrete if k in continuous]
    assert {k: discrete[k] for k in both} == {k: continuous[k] for k in both}
