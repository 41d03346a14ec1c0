"""The figures in README are those of the committed results."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_results_are_those_of_the_committed_runs() -> None:
    report = runpy.run_path(str(ROOT / "benchmarks" / "report.py"))
    table = report["markdown"](ROOT / "benchmarks" / "results" / "runs.csv")
    assert table in (ROOT / "README.md").read_text()
