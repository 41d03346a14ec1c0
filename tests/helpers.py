"""What several test files use."""

import csv
from pathlib import Path


def spy(monkeypatch, name: str, owner) -> list[tuple]:
    """Record the arguments and the result of every call of `owner.name`."""
    calls, original = [], getattr(owner, name)

    def recorder(*args):
        result = original(*args)
        calls.append((*args, result))
        return result

    monkeypatch.setattr(owner, name, recorder)
    return calls


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """Return what a run logged, a row an iteration."""
    with open(run_dir / "metrics.csv") as file:
        return [{name: float(x) for name, x in row.items()} for row in csv.DictReader(file)]
