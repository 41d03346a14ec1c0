import importlib.util
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

import tests.envs  # noqa: F401  (registers the test environments)
from tests.helpers import ROOT

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


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site once, in a copy of the repository, by the command that the pages name."""
    if not all(map(importlib.util.find_spec, ("mkdocs", "material", "latex2mathml"))):
        pytest.skip("the docs extra is not installed")
    command = "mkdocs build"  # nothing more: under --quiet it would count no warnings
    for page in ROOT.glob("docs/*/index.md"):
        assert re.search(rf"(^|&& ){command}[`\n]", page.read_text(), re.MULTILINE), page
    copy = tmp_path_factory.mktemp("repository")
    folders = [ROOT / name for name in ("docs", "tests", "benchmarks")]
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.md"), ROOT / "LICENSE", ROOT / "mkdocs.yml"]:
        shutil.copy(path, copy)
    for path in folders:
        shutil.copytree(path, copy / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        command.split(), cwd=copy, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return copy / "site"
