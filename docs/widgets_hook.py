"""Show arrays of docs/data/rollout.json as tables, where a page asks for them.

    <div class="widget" data-widget="values" data-names="obs actions rewards">a sentence</div>

Names are those of docs/values.py. The tables are part of the page, without any JavaScript.
"""

import functools
import html
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

DATA = Path(__file__).parent / "data" / "rollout.json"
WIDGET = re.compile(r'<div ([^>]*data-widget="values"[^>]*)>.*?</div>', re.DOTALL)
NAMES = re.compile(r'data-names="([^"]*)"')  # Markdown may have sorted the attributes
NUM_STEPS, NUM_ENVS = 4, 2
# What the first part of a name means, and the caption of every widget.
WORDS = {
    "en": {
        "comma": ", ",
        "first": "first minibatch",
        "last": "last minibatch",
        "caption": "Recorded in iteration {} of {}. ",
        "reset": "Hatched: the step that only resets its environment.",
    },
    "zh": {
        "comma": " ",
        "first": "第一个小批量",
        "last": "最后一个小批量",
        "caption": "记录自 {1} 的第 {0} 次迭代。",
        "reset": "带斜线的格子是只重置环境的那一步。",
    },
}


@functools.cache
def rollout() -> dict[str, Any]:
    return json.loads(DATA.read_text())


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Put the tables in place of the widgets."""
    words = WORDS["zh" if page.file.src_uri.startswith("zh/") else "en"]

    def tables(match: re.Match) -> str:
        names = NAMES.search(match[1])
        return widget(names[1].split() if names else [], words)

    return WIDGET.sub(tables, content)


def widget(names: list[str], words: dict[str, str]) -> str:
    """Return the tables of these names, with a caption."""
    unknown = set(names) - rollout()["tensors"].keys()
    if unknown or not names:
        raise PluginError(f"docs/data/rollout.json has no {' '.join(sorted(unknown)) or 'name'}")
    figures = "".join(figure(name, words) for name in names)
    command = re.sub(r"--[\w-]+", r'<span class="whole">\g<0></span>', rollout()["command"])
    command = f"<code>{command}</code>"
    caption = words["caption"].format(rollout()["iteration"], command)
    if 'class="reset"' in figures:
        caption += words["reset"]
    return (
        f'<div class="widget" data-widget="values"><div class="tensors">{figures}</div>'
        f"<p><small>{caption}</small></p></div>"
    )


def figure(name: str, words: dict[str, str]) -> str:
    """Return one array as a table, below its name and its shape."""
    tensor = rollout()["tensors"][name]
    where, _, rest = name.partition(".")
    title, note = (rest, words["comma"] + words[where]) if where in words else (name, "")
    shape = ", ".join(map(str, tensor["shape"])) + "," * (len(tensor["shape"]) == 1)
    shape = f" ({shape})" if shape else ""
    caption = f"<code>{html.escape(title)}</code>{shape}{note}"
    return (
        f"<figure><figcaption>{caption}</figcaption>"
        f'<table class="widget-table">{rows(tensor)}</table></figure>'
    )


def rows(tensor: dict[str, Any]) -> str:
    """Return the rows of a table: t down and n across, or the rows b of a batch down."""
    numbers, shape = tensor["numbers"], tensor["shape"]
    decimals = 0 if all(float(x).is_integer() for x in flat(numbers)) else 3
    if not shape:
        return f"<tbody><tr><td>{text(numbers, decimals)}</td></tr></tbody>"
    if shape[0] not in (NUM_STEPS, NUM_STEPS + 1) or shape[1:2] != [NUM_ENVS]:  # (B, ...)
        body = "".join(
            f'<tr><th scope="row">b = {b}</th><td>{text(x, decimals)}</td></tr>'
            for b, x in enumerate(numbers)
        )
        return f"<tbody>{body}</tbody>"
    head = "<th></th>" + "".join(f'<th scope="col">n = {n}</th>' for n in range(NUM_ENVS))
    body = "".join(
        f'<tr><th scope="row">t = {t}</th>'
        + "".join(cell(t, n, text(x, decimals)) for n, x in enumerate(row))
        + "</tr>"
        for t, row in enumerate(numbers)
    )
    return f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"


def cell(t: int, n: int, content: str) -> str:
    is_transition = rollout()["tensors"]["is_transition"]["numbers"]
    kind = ' class="reset"' if t < NUM_STEPS and not is_transition[t][n] else ""
    return f'<td data-step="{t},{n}"{kind}>{content}</td>'


def flat(numbers: Any) -> list[Any]:
    """Return the numbers of nested lists in one list."""
    return [x for y in numbers for x in flat(y)] if isinstance(numbers, list) else [numbers]


def text(value: Any, decimals: int) -> str:
    """Return a number, or the numbers of an observation on a line each."""
    if isinstance(value, list):
        return "".join(f"<span>{text(x, decimals)}</span>" for x in flat(value))
    return str(value) if isinstance(value, bool) else f"{value:.{decimals}f}"
