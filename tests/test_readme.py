"""The tables of the pages are those of the committed results."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import report  # noqa: E402

PAGES = [*sorted(ROOT.glob("README*.md")), ROOT / "benchmarks" / "README.md"]
PAGES += sorted(ROOT.glob("docs/**/*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_tables_are_what_the_reporter_prints(page: Path) -> None:
    text = page.read_text()
    assert report.fill(text) == text, f"run: python benchmarks/report.py --pages {page}"
    comments = re.findall(r"^<!-- python .*?-->", text, re.MULTILINE)
    assert len(comments) == len(report.MARKED.findall(text)), "a comment without its end"


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_readme_has_such_tables(name: str) -> None:
    assert len(report.MARKED.findall((ROOT / name).read_text())) >= 5
