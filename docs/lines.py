"""Find the lines of code that a page speaks of, by name, by banner, or by how they begin.

    [`ppo_discrete.py`: `clipped_surrogate`](../../ppo_discrete.py)         a function or class
    [`ppo_discrete.py`: `[3] Update`](../../ppo_discrete.py)                what a banner heads
    [`ppo_discrete.py`: `log_ratio =` to `loss =`](../../ppo_discrete.py)   lines that begin so

Such a link in a paragraph of its own is a marker: docs/hooks.py puts those lines beside the text.
Anywhere else the link's text is the name alone: [`clipped_surrogate`](../../ppo_discrete.py).

A page that reads a script shows all of its lines in their order (docs/reader.py):

    <!-- reads ppo_discrete.py -->
    ## A heading
    [`ppo_discrete.py`: `docstring`](../../ppo_discrete.py)            begins a row: code, note
    The note.
    [`ppo_discrete.py`: `import math`](../../ppo_discrete.py) <!-- fold -->      folded: no PPO
    The first sentence is its label. The rest is its note.
    [`ppo_discrete.py`: `ppo_loss`](../../ppo_discrete.py) <!-- ppo 1 -->        part of "PPO only"
    <!-- end of ppo_discrete.py -->
    ## A heading without code

A row ends with the line before the next marker's. The first marker is line 1 of the file and the
last row ends with the file. A beginning that occurs more than once is the next one after the row
above. Markers of other files show those lines, folded, below the row's code.
"""

import ast
import functools
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
CODE = r"`((?:[^`\n])+)`"
MARKER = re.compile(
    rf"^\[`([\w./]+\.py)`: {CODE}(?: to {CODE})?\]\(([^)\s]+)\)(?: <!-- (fold|ppo \d) -->)?$",
    re.MULTILINE,
)
READS = re.compile(r"^<!-- reads ([\w./]+\.py) -->$", re.MULTILINE)
HEADING = re.compile(r"^#{1,6} ")
FENCE = re.compile(r"^ {0,3}(```+|~~~+)")
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


class Row(NamedTuple):
    """Lines of a script and what a page says of them."""

    headings: list[str]  # those right above the marker
    first: int
    last: int
    option: str  # "", "fold" or "ppo n"
    note: list[str]  # lines of Markdown


def rows(markdown: str) -> tuple[str, str, list[Row], str]:
    """Return the file that a page reads, the text above its rows, the rows, and the text below.

    Raises `LookupError` unless the rows hold every line of the file once, in order.
    """
    found = READS.search(markdown)
    file = found[1]
    end = f"<!-- end of {file} -->"
    body, _, below = markdown[found.end() :].partition(f"\n{end}\n")
    above: list[str] = []  # until the first marker
    headings: list[str] = []
    started: list[tuple[list[str], int, str, list[str]]] = []
    fence = ""
    for line in body.split("\n"):
        mark, marker = FENCE.match(line), MARKER.match(line)
        if mark and (not fence or line.strip().startswith(fence)):
            fence = "" if fence else mark[1]
        if not fence and marker and marker[1] == file:
            start, before = marker[2], started[-1][1] if started else 0
            if marker[3]:
                raise LookupError(f"{file}: the row at {start!r} ends where the next begins")
            try:
                first = select(file, start)[0]
            except LookupError:
                first = line_of(file, start, after=before)
            if first <= before or (not before and first > 1):
                raise LookupError(f"{file}: the row at {start!r} is line {first}, after {before}")
            started.append((headings, first, marker[5] or "", []))
            headings = []
        elif not fence and HEADING.match(line):
            headings.append(line)
        elif headings and line.strip():
            raise LookupError(f"{file}: no marker right under {headings[-1]!r}")
        elif not headings:
            (started[-1][3] if started else above).append(line)
    if headings or not started:
        raise LookupError(f"{file}: no marker under {headings or 'the page'}")
    lasts = [row[1] - 1 for row in started[1:]] + [len(source(file))]
    return (
        file,
        markdown[: found.start()] + "\n".join(above),
        [Row(h, first, last, option, n) for (h, first, option, n), last in zip(started, lasts)],
        below,
    )


@functools.cache
def readers() -> dict[str, str]:
    """Return the page that reads a script, by script; it has one name in all languages."""
    pages = sorted((ROOT / "docs" / "en").glob("*.md"))
    return {m[1]: page.name for page in pages if (m := READS.search(page.read_text()))}
