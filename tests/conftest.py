import pytest

import tests.envs  # noqa: F401  (registers the test environments)


@pytest.fixture
def run_dir(tmp_path):
    """A folder that does not exist yet."""
    return tmp_path / "run"
