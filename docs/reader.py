"""Pages that read a script from its first line to its last, and code as the site shows it.

docs/lines.py has the form of such a page. Here its rows become HTML, and what is known of the names
in the code is collected: symbol, shape, flag, measured effect. docs/assets/reader.js shows it.
"""

import ast
import functools
import html
import itertools
import json
import re

from formulas import ALIASES, FORMS, mathml, symbols
from lines import MARKER, ROOT, Row, definitions, rows, select, source
from pygments.lexers import PythonLexer
from pygments.token import STANDARD_TYPES, Token

WORDS = {
    "en": {
        "contents": "Contents",
        "ppo": "PPO only",
        "ppo_title": "Only the loss, the advantages and the loop, in this order",
        "comma": ", ",
        "lines": "lines {} to {}",
        "line": "line {}",
        "back": "Back",
        "names": {
            "shape": "shape", "flag": "flag", "default": "default", "effect": "measured",
            "defined": "defined in", "symbol": "symbol", "in": "in",
        },
        "pages": "Other pages",
    },
    "zh": {
        "contents": "目录",
        "ppo": "只看 PPO",
        "ppo_title": "依次显示损失、优势和主循环",
        "comma": "\uff0c",
        "lines": "第 {} 至 {} 行",
        "line": "第 {} 行",
        "back": "返回",
        "names": {
            "shape": "形状", "flag": "命令行参数", "default": "默认值", "effect": "实测",
            "defined": "定义于", "symbol": "符号", "in": "见",
        },
        "pages": "其他页面",
    },
}  # fmt: skip
# Where code goes: empty for Markdown, plain for the search, then in colours. Markdown and the
# search would take their time over every colour.
CODE_HERE = re.compile(
    r'<div class="code" data-code="([^" ]+) (\d+) (\d+)">(?:<pre>.*?</pre>)?</div>', re.DOTALL
)
INLINE_CODE = re.compile(r"(<a [^>]*>)?<code>([^<>\n]{1,80})</code>")
SHAPE = re.compile(r"^\s*([A-Za-z_]\w*)\b[^#]*#\s*(\((?:[A-Z]|\.\.\.)[^)]*\))")
ZEROS = re.compile(r"^\s*(\w+) = np\.zeros\(\((.*?)\)[,)]")
EFFECT = re.compile(r"\[([^]]+)\]\(([^)\s]+)\)(?:: ([^;|]+))?")


def words(page: str) -> dict:
    return WORDS["zh" if page.startswith("zh/") else "en"]


# ---- Code --------------------------------------------------------------------------------------


def name_in(code: str) -> str:
    """Return the name that a piece of inline code speaks of: `--clip-coef` and `args.clip_coef`
    are clip_coef, `obs[t + 1]` is obs, `gae(` is gae."""
    match = re.match(r"(?:--(?:no-)?)?((?:[A-Za-z_][\w-]*\.)*[A-Za-z_][\w-]*)", html.unescape(code))
    return match[1].rpartition(".")[2].replace("-", "_") if match else ""


@functools.cache
def names_of(file: str) -> frozenset[str]:
    """Return all names in the code of a file."""
    tokens = PythonLexer().get_tokens("\n".join(source(file)))
    return frozenset(text for kind, text in tokens if is_name(kind, text))


def is_name(kind, text: str) -> bool:
    """Tell whether a token is a name, or a string that is one, such as a key of the log."""
    return kind in Token.Name or (kind in Token.Literal.String and text.isidentifier())


@functools.cache
def code_lines(file: str, names: frozenset[str]) -> list[str]:
    """Return the lines of a file as HTML, coloured, in which `names` carry themselves as data."""
    out = [""]
    for kind, text in PythonLexer(stripnl=False).get_tokens("\n".join(source(file)) + "\n"):
        while kind not in STANDARD_TYPES:
            kind = kind.parent
        css = STANDARD_TYPES[kind]
        data = f' data-name="{text}"' if is_name(kind, text) and text in names else ""
        for i, part in enumerate(text.split("\n")):
            if i:
                out.append("")
            if part:
                part = html.escape(part, quote=False)
                out[-1] += f'<span class="{css}"{data}>{part}</span>' if css else part
    return out


def block(file: str, first: int, last: int, names=frozenset(), home: str = "") -> str:
    """Return lines of a file with their numbers. `home` is where they have their own address."""
    lines = source(file)[first - 1 : last]
    indent = min((len(x) - len(x.lstrip()) for x in lines if x.strip()), default=0)
    out = []
    for n, line in enumerate(code_lines(file, names)[first - 1 : last], first):
        here = "" if home else f' id="L-{n}"'
        link = f'<a href="{home}#L-{n}" data-line="{n}" aria-label="{n}" tabindex="-1"></a>'
        out.append(f'<span class="line"{here}>{link}<span class="text">{line}\n</span></span>')
    return (
        f'<div class="code highlight" style="--indent: {indent}">'
        f"<pre><code>{''.join(out)}</code></pre></div>"
    )


def placeholder(file: str, first: int, last: int, content: str = "") -> str:
    return f'<div class="code" data-code="{file} {first} {last}">{content}</div>'


def with_plain_code(content: str) -> str:
    """Put in the code as the search reads it: text."""

    def plain(match: re.Match) -> str:
        file, first, last = match[1], int(match[2]), int(match[3])
        code = html.escape("\n".join(source(file)[first - 1 : last]), quote=False)
        return placeholder(file, first, last, f"<pre><code>{code}</code></pre>")

    return CODE_HERE.sub(plain, content)


def with_code(content: str, file: str, home) -> str:
    """Put in the code as it is shown. `file` has its home on this page, in other files' `home`."""
    known = re.search(r'id="cards">(.*?)</script>', content)
    names = set(re.findall(r'<code data-name="(\w+)"', content)) | set(
        json.loads(known[1]) if known else ()
    )

    def code(match: re.Match) -> str:
        other, first, last = match[1], int(match[2]), int(match[3])
        marked = frozenset(names) if other == file else frozenset()
        return block(other, first, last, marked, "" if other == file else home(other))

    return CODE_HERE.sub(code, content)


# ---- Rows --------------------------------------------------------------------------------------


def label_and_note(row: Row) -> tuple[str, list[str]]:
    """Return a folded row's label, the first sentence of its note, and the rest of the note."""
    text = "\n".join(row.note).strip()
    paragraph, _, rest = text.partition("\n\n")
    match = re.match(r"((?:`[^`]*`|[^`])+?(?:[.](?=\s|$)|。))\s*(.*)$", paragraph, re.DOTALL)
    if match:
        return match[1].rstrip(".。"), f"{match[2]}\n\n{rest}".strip().split("\n")
    if paragraph or not row.headings:
        raise LookupError(f"the folded row at line {row.first} has no first sentence")
    return row.headings[-1].lstrip("# "), []


def with_rows(markdown: str, page: str) -> tuple[str, str]:
    """Return a page that reads a script until the end of its rows, these as HTML, and the rest."""
    file, above, found, below = rows(markdown)
    out = [above, "", f'<div class="reader" data-file="{file}" markdown="1">', ""]
    for i, row in enumerate(found):
        if row.headings or not i:
            rest = itertools.takewhile(lambda r: not r.headings, found[i + 1 :])
            turns = [turn for r in (row, *rest) if (turn := ppo_turn(r))]
            out += ["</div>", ""] * bool(i)
            out += [f'<div class="part"{ppo_order(min(turns, default=""))} markdown="1">', ""]
            out += [*row.headings, ""]
        out += row_html(file, row, words(page)["lines"])
    return "\n".join([*out, "</div>", "</div>", "", ""]), below


def ppo_turn(row: Row) -> str:
    """Return the turn of a row in "PPO only", or nothing if it is left out."""
    return row.option[4:] if row.option.startswith("ppo ") else ""


def ppo_order(turn: str) -> str:
    return f' data-ppo="{turn}" style="--ppo: {turn}"' if turn else ""


def row_html(file: str, row: Row, line_words: str) -> list[str]:
    """Return a row: its note, its lines, and below them those of other files, folded."""
    note, fold = row.note, row.option == "fold"
    out = []
    if fold:
        label, note = label_and_note(row)
        out += ['<details class="fold" markdown="1">', '<summary markdown="span">']
        out += [
            f"{label} <small>{line_words.format(row.first, row.last)}</small>",
            "</summary>",
            "",
        ]
    others = [match.groups() for line in note if (match := MARKER.match(line))]
    note = [line for line in note if not MARKER.match(line)]
    bare = "" if any(line.strip() for line in note) else " bare"
    out += [f'<div class="row{bare}"{ppo_order(ppo_turn(row))} markdown="1">']
    out += ['<div class="note" markdown="1">', "", *note, "", "</div>"]
    out += ['<div class="lines">', placeholder(file, row.first, row.last)]
    for other, start, end, *_ in others:
        first, last = select(other, start, end)
        text = f"<code>{other}</code>, {line_words.format(first, last)}"
        out += [f'<details class="aside"><summary>{text}</summary>']
        out += [placeholder(other, first, last), "</details>"]
    return [*out, "</div>", "</div>", *["</details>"] * fold, ""]


def finish(content: str, page: str, toc) -> str:
    """Mark the names that the notes speak of, and add the bar and the cards."""
    file = re.search(r'<div class="reader" data-file="([^"]+)"', content)[1]
    known = cards(file, page[:2])
    said = {name_in(code) for _, code in INLINE_CODE.findall(content)}
    names = (said | known.keys()) & names_of(file)

    def mark(match: re.Match) -> str:
        link, code = match[1] or "", match[2]
        name = name_in(code)
        if name not in names:
            return match[0]
        focus = "" if link else ' tabindex="0"'
        return f'{link}<code data-name="{name}"{focus}>{code}</code>'

    content = INLINE_CODE.sub(mark, content)
    data = json.dumps({k: known[k] for k in sorted(names & known.keys())}, ensure_ascii=False)
    data = data.replace("</", "<\\/")
    cards_here = f'<script type="application/json" id="cards">{data}</script>'
    return (
        content.replace('<div class="reader"', bar(page, toc) + '<div class="reader"') + cards_here
    )


def bar(page: str, toc) -> str:
    """Return the bar on top of the rows: contents, and the switch, which waits for reader.js."""
    say = words(page)

    def items(entries) -> str:
        inner = "".join(
            f'<li><a href="{entry.url}">{entry.title}</a>{items(entry.children)}</li>'
            for entry in entries
        )
        return f"<ul>{inner}</ul>" if inner else ""

    contents = items([e for top in toc for e in top.children])
    labels = html.escape(json.dumps(say["names"] | {"line": say["line"]}, ensure_ascii=False))
    return (
        f'<div class="reader-bar" data-search-exclude data-labels="{labels}">'
        f'<details class="contents"><summary>{say["contents"]}</summary>{contents}'
        f"<p>{say['pages']}</p><!-- pages --></details>"
        f'<label title="{say["ppo_title"]}" hidden><input type="checkbox" id="ppo-only"> '
        f"{say['ppo']}</label></div>"
    )


# ---- What is known of a name -------------------------------------------------------------------


@functools.cache
def flags(file: str) -> dict[str, tuple[str, str]]:
    """Return default and help of every flag of a script: the comment behind it, or above it."""
    found = {}
    for path in ("experiment.py", file):
        for node in ast.parse("\n".join(source(path))).body:
            if not (isinstance(node, ast.ClassDef) and node.name.endswith("Args")):
                continue
            for field in node.body:
                if not isinstance(field, ast.AnnAssign) or field.value is None:
                    continue
                behind = source(path)[field.end_lineno - 1][field.end_col_offset :]
                text = behind.partition("#")[2].strip()
                n = field.lineno - 2
                while not behind.strip() and source(path)[n].lstrip().startswith("#"):
                    text = f"{source(path)[n].strip('# ')} {text}".strip()
                    n -= 1
                found[field.target.id] = (ast.unparse(field.value), text)
    return found


@functools.cache
def shapes(file: str) -> dict[str, dict[str, str]]:
    """Return the shapes of names by comments and by buffers, with where it holds."""
    found: dict[str, dict[str, str]] = {}
    places = sorted(definitions(file).items(), key=lambda x: x[1][0])
    for n, line in enumerate(source(file), 1):
        match = SHAPE.match(line)
        zeros = ZEROS.match(line)
        if match or zeros:
            name = (match or zeros)[1]
            shape = match[2] if match else f"({zeros[2]})"
            inside = [p for p, (first, last) in places if first <= n <= last]
            found.setdefault(name, {}).setdefault(shape, inside[-1] if inside else "")
    return found


@functools.cache
def effects(language: str) -> dict[str, list[tuple[str, str]]]:
    """Return what docs/*/details.md says was measured, by flag or function: words and link."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in (ROOT / f"docs/{language}/details.md").read_text().split("\n"):
        cells = re.split(r" \| ", line.strip("| "))
        if len(cells) != 6:
            continue
        names = [name_in(x) for x in re.findall(r"`(--[\w-]+|\w+)`", cells[2] + cells[3])]
        for text, target, which in EFFECT.findall(cells[4]):
            target = target.replace(".md", ".html")
            link = f"details.html{target}" if target.startswith("#") else target
            for name in names:
                entry = (f"{which}: {text}" if which else text, link)
                if entry not in found.setdefault(name, []):
                    found[name].append(entry)
    return found


def cards(file: str, language: str) -> dict[str, dict]:
    """Return what is known of each name of a script, as HTML where there are formulas."""
    found: dict[str, dict] = {}
    for tex, (name, meaning) in symbols(language).items():
        card = found.setdefault(name, {})
        if tex not in FORMS or "symbol" not in card:
            card.setdefault("symbol", []).append(mathml(tex))
        if meaning:
            card["meaning"] = inline(meaning)
    for name, where in shapes(file).items():
        found.setdefault(name, {})["shape"] = [[k, v] for k, v in where.items()]
    for name, (default, text) in flags(file).items():
        card = found.setdefault(name, {})
        card |= {"flag": f"--{name.replace('_', '-')}", "default": default, "help": text}
    for name, (first, _) in definitions(file).items():
        if "." not in name and not name.startswith("_"):
            found.setdefault(name, {})["line"] = first
    for name, alias in ALIASES.items():
        found[alias] = found[name]
    for name, which in effects(language).items():
        if name in found:
            found[name]["effects"] = [list(x) for x in which]
    return found


def inline(markdown: str) -> str:
    """Return a sentence of a table as HTML: formulas and code only."""
    text = html.escape(markdown, quote=False)
    text = re.sub(r"\$(.+?)\$", lambda m: mathml(m[1]), text)
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
