import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import tests.envs  # noqa: F401  (registers the test environments)
from tests.helpers import ROOT

if importlib.util.find_spec("Box2D"):
    with warnings.catch_warnings():  # as errors, its own warnings crash the import
        warnings.simplefilter("ignore")
        import Box2D  # noqa: F401


CHROMIUM_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()


@pytest.fixture(autouse=True)
def sigpipe() -> Iterator[None]:
    """Undo what `--help` does to a signal, or the next broken pipe ends the tests."""
    before = signal.getsignal(signal.SIGPIPE) if hasattr(signal, "SIGPIPE") else None
    yield
    if before is not None:
        signal.signal(signal.SIGPIPE, before)


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


@pytest.fixture(scope="session")
def browser():
    """Start one chromium for all tests of the pages."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if not path or not importlib.util.find_spec("playwright"):
        pytest.skip("needs the package playwright and chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


class Watched:
    """Opens pages of the site; an error on a page, or a fetch from elsewhere, fails the test."""

    def __init__(self, browser: Any):
        self.browser, self.contexts, self.wrong = browser, [], []

    def open(self, url: str, width: int = 1280, scheme: str = "light", **options: Any) -> Any:
        context = self.browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, **options
        )
        self.contexts.append(context)
        context.set_default_timeout(120_000)  # a loaded machine is slow, not wrong
        context.on("console", lambda m: self.wrong.append(m.text) if m.type == "error" else None)
        context.on("weberror", lambda error: self.wrong.append(str(error.error)))
        home = ("file:///", "http://127.0.0.1:")
        context.on(
            "request", lambda r: None if r.url.startswith(home) else self.wrong.append(r.url)
        )
        page = context.new_page()
        page.goto(url)
        return page

    def close(self) -> None:
        for context in self.contexts:
            context.close()
        assert not self.wrong


@pytest.fixture(scope="module")
def watched(browser):
    """Pages that several tests of a file share."""
    watched = Watched(browser)
    yield watched
    watched.close()


@pytest.fixture
def open_page(browser, site):
    """Return a function that opens a page from the disk, for one test."""
    watched = Watched(browser)

    def open_page(path: str, *args: Any, **options: Any) -> Any:
        path, _, anchor = path.partition("#")
        return watched.open((site / path).as_uri() + "#" * bool(anchor) + anchor, *args, **options)

    yield open_page
    watched.close()
