"""Find the lines of code that a page speaks of, by name, by banner, or by how they begin.

    [`ppo_discrete.py`: `clipped_surrogate`](../../ppo_discrete.py)         a function or class
    [`ppo_discrete.py`: `[3] Update`](../../ppo_discrete.py)                what a banner heads
    [`ppo_discrete.py`: `log_ratio =` to `loss =`](../../ppo_discrete.py)   lines that begin so

Such a link in a paragraph of its own is a marker: docs/hooks.py puts those lines beside the text.
Anywhere else the link's text is the name alone: [`clipped_surrogate`](../../ppo_discrete.py).
"""

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
CODE = r"`((?:[^`\n])+)`"
MARKER = re.compile(rf"^\[`([\w./]+\.py)`: {CODE}(?: to {CODE})?\]\(([^)\s]+)\)$", re.MULTILINE)
# The text of a link may wrap over a line end, but not over an empty line.
LINK = re.compile(r"(!?)\[((?:[^\[\]`\n]|\n(?!\s*\n)|`[^`\n]*`)*)\]\(([^)\s]+)\)")


@functools.cache
def source(file: str) -> list[str]:
    return (ROOT / file).read_text().splitlines()


@functools.cache
def definitions(file: str) -> dict[str, tuple[int, int]]:
    """Return first and last line, from 1, of every function, class and method of a file."""
    found = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                start = min([child.lineno, *(d.lineno for d in child.decorator_list)])
                found[prefix + child.name] = (start, child.end_lineno)
                visit(child, f"{prefix}{child.name}.")

    visit(ast.parse("\n".join(source(file))), "")
    return found


@functools.cache
def statement_ends(file: str) -> dict[int, int]:
    """Return the last line of each statement, by its first line."""
    nodes = ast.walk(ast.parse("\n".join(source(file))))
    return {node.lineno: node.end_lineno for node in nodes if isinstance(node, ast.stmt)}


def line_of(file: str, start: str, after: int = 0) -> int:
    """Return the number of the one line that begins so, or of the first such line `after`."""
    lines = source(file)
    hits = [i for i in range(after, len(lines)) if lines[i].lstrip().startswith(start)]
    if not hits or (len(hits) > 1 and not after):
        raise LookupError(f"{file}: {start!r} is no name, and begins {len(hits)} lines, not one")
    return hits[0] + 1


def select(file: str, start: str, end: str | None = None) -> tuple[int, int]:
    """Return the first and the last line that a link speaks of."""
    lines = source(file)
    if end is not None:
        first = line_of(file, start)
        last = line_of(file, end, after=first - 1)
        return first, statement_ends(file).get(last, last)
    if start in definitions(file):
        return definitions(file)[start]
    if start == "docstring":
        return 1, next(i for i, line in enumerate(lines, 1) if i > 5 and line.endswith('"""'))
    if re.match(r"\[\d\] |Stage \d", start):
        first = last = line_of(file, f"# ---- {start}")
        indent = len(lines[first - 1]) - len(lines[first - 1].lstrip())
        for i, line in enumerate(lines[first:], first + 1):
            if line.strip():
                if len(line) - len(line.lstrip()) < indent or line[indent:].startswith("# ---- "):
                    break
                last = i
        return first, last
    first = line_of(file, start)
    return first, statement_ends(file).get(first, first)
