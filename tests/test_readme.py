"""The tables of the pages are those of the committed results."""

import re
from pathlib import Path

import pytest

from benchmarks import tables

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("README*.md")), ROOT / "benchmarks" / "README.md"]
PAGES += sorted(ROOT.glob("docs/**/*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_tables_are_what_the_reporter_prints(page: Path) -> None:
    text = page.read_text()
    assert tables.fill(text) == text, f"run: python -m benchmarks.tables --pages {page}"
    comments = re.findall(r"^<!-- python .*?-->", text, re.MULTILINE)
    assert len(comments) == len(tables.MARKED.findall(text)), "a comment without its end"


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_readme_has_such_tables(name: str) -> None:
    assert len(tables.MARKED.findall((ROOT / name).read_text())) >= 5
