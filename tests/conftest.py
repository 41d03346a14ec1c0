import importlib.util
import warnings
from types import ModuleType

import pytest

import tests.envs  # noqa: F401  (registers the test environments)

if importlib.util.find_spec("Box2D"):
    with warnings.catch_warnings():  # as errors, its own warnings crash the import
        warnings.simplefilter("ignore")
        import Box2D  # noqa: F401


@pytest.fixture
def run_dir(tmp_path):
    """A folder that does not exist yet."""
    return tmp_path / "run"


@pytest.fixture(params=["ppo_discrete", "ppo_continuous", "ppo_atari", "ppo_lstm"])
def script(request: pytest.FixtureRequest) -> ModuleType:
    """Each of the siblings in turn."""
    return importlib.import_module(request.param)
