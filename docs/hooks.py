"""What mkdocs does not do by itself: code beside the text, links into the code, formulas.

The pages are Markdown that a code host shows as well, and speak of the code by links only
(docs/lines.py). Markers right under a heading set that section in two columns: the text on the
left, those lines of the shipped file on the right. Any other link to code leads to the line in a
copy of the file on the site. A name, banner or line that has gone fails the build. A link in a
paragraph of its own to a file of docs/recipes shows that file below it.
"""

import copy
import functools
import html
import posixpath
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

sys.path.insert(0, str(Path(__file__).parent))

from lines import CODE, LINK, MARKER, ROOT, select, source

HEADING = re.compile(r"^#{1,6} ")
# A new line that is no space: between Chinese characters, or after Chinese punctuation.
NO_SPACE = re.compile(
    "(?<=[\u3400-\u9fff])\n[ \t]*(?=[\u3000-\u9fff\uff00-\uffef])"
    "|(?<=[\u3000-\u303f\uff00-\uffef])\n[ \t]*"
)
RECIPE = re.compile(r"^\[`([\w.]+)`\]\(\.\./recipes/\1\)$", re.MULTILINE)
FENCE = re.compile(r"^ {0,3}(```+|~~~+)")


def repo_path(page: str, target: str) -> str:
    """Return a link's target from the repository's root; `page` is its path on the site."""
    here = page.removeprefix("repo/") if page.startswith("repo/") else f"docs/{page}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(here), target))


def site_path(path: str, page: str) -> str:
    """Return the way from a page to a file of the repository on the site."""
    there = path.removeprefix("docs/")
    if there == path:  # outside docs/: there is a copy, code as a page
        there = f"repo/{path}.md" if path.endswith(".py") else f"repo/{path}"
    return posixpath.relpath(there, posixpath.dirname(page) or ".")


def beside(match: re.Match, page: str) -> str:
    """Return the lines that a marker speaks of as a fenced block, with their numbers."""
    file, start, end, target = match.groups()
    if repo_path(page, target) != file:
        raise PluginError(f"{page}: the link to {file} leads to {target}")
    first, last = select(file, start, end)
    body = source(file)[first - 1 : last]
    indent = min(len(line) - len(line.lstrip()) for line in body if line.strip())
    body = [line[indent:] for line in body]
    way = f"{site_path(file, page)}#L-{first}"
    words = f"第 {first} 至 {last} 行" if page.startswith("zh/") else f"lines {first} to {last}"
    return (
        f"[`{file}`, {words}]({way}){{ .where }}\n\n"
        f'```python linenums="{first}"\n' + "\n".join(body) + "\n```\n"
    )


def with_recipe(match: re.Match) -> str:
    """Return a link to a recipe, followed by the recipe as a fenced block."""
    path = ROOT / "docs" / "recipes" / match[1]
    kind = {".patch": "diff", ".py": "python"}[path.suffix]
    return f"{match[0]}\n\n```{kind}\n{path.read_text()}```"


def in_columns(lines: list[str], page: str) -> list[str]:
    """Set every section that begins with links to code in two columns."""
    out: list[str] = []
    fence, i = "", 0
    while i < len(lines):
        line, mark = lines[i], FENCE.match(lines[i])
        if mark and (not fence or line.strip().startswith(fence)):
            fence = "" if fence else mark[1]
        if fence or not HEADING.match(line):
            out.append(line)
            i += 1
            continue
        j, blocks = i + 1, []
        while j < len(lines) and (not lines[j].strip() or MARKER.match(lines[j])):
            if lines[j].strip():
                blocks.append(beside(MARKER.match(lines[j]), page))
            j += 1
        if not blocks:
            out.append(line)
            i += 1
            continue
        text = []
        while j < len(lines) and (fence or not HEADING.match(lines[j])):
            mark = FENCE.match(lines[j])
            if mark and (not fence or lines[j].strip().startswith(fence)):
                fence = "" if fence else mark[1]
            text.append(lines[j])
            j += 1
        out += ['<div class="step" markdown="1">', '<div class="why" markdown="1">', "", line, ""]
        out += [*text, "", "</div>", '<div class="lines" markdown="1">', "", *blocks]
        out += ["", "</div>", "</div>", ""]
        i = j
    return out


def on_files(files, config):
    """Add copies of what the pages link to outside docs/: code as pages."""
    todo = [(file.src_uri, Path(file.abs_src_path)) for file in files.documentation_pages()]
    added = set()
    for page, source_file in todo:  # grows by the Markdown files that are linked to
        for _, _, target in LINK.findall(source_file.read_text()):
            path = repo_path(page, target.partition("#")[0])
            if ":" in target or target.startswith("#") or path.startswith("docs/"):
                continue
            if not (ROOT / path).exists():
                raise PluginError(f"{page} links to {path}, which does not exist")
            if path in added or not (ROOT / path).is_file():
                continue
            added.add(path)
            if path.endswith(".py"):
                formatter = HtmlFormatter(linenos="table", lineanchors="L", anchorlinenos=True)
                code = highlight((ROOT / path).read_text(), PythonLexer(), formatter)
                content = "---\nsearch: {exclude: true}\nhide: [navigation, toc, footer]\n---\n\n"
                content += f'# {path}\n\n<div class="whole">{code}</div>\n'
                files.append(File.generated(config, f"repo/{path}.md", content=content))
            else:
                copied = File.generated(config, f"repo/{path}", abs_src_path=str(ROOT / path))
                files.append(copied)
                if path.endswith(".md"):
                    todo.append((f"repo/{path}", ROOT / path))
    return files


def on_page_markdown(markdown, page, config, files):
    """Put the code beside the text and lead links into the code to their lines."""
    name = page.file.src_uri
    if name.endswith(".py.md"):
        return markdown
    try:
        return with_code(markdown, name)
    except LookupError as error:
        raise PluginError(f"{name}: {error}") from error


def with_code(markdown: str, name: str) -> str:
    """Return a page with the lines of its markers, and with links that lead to lines."""

    def lead(match: re.Match) -> str:
        image, text, target = match.groups()
        file, _, anchor = target.partition("#")
        if ":" in target or not file:
            return match[0]
        path = repo_path(name, file)
        if path.startswith("docs/") and not name.startswith("repo/"):
            return match[0]
        if (ROOT / path).is_dir():
            return text
        code = re.fullmatch(CODE, text)
        if path.endswith(".py") and code and code[1] not in (path, posixpath.basename(path)):
            anchor = f"L-{select(path, code[1])[0]}"
        return f"{image}[{text}]({site_path(path, name)}{'#' * bool(anchor)}{anchor})"

    markdown = RECIPE.sub(with_recipe, markdown)
    return "".join(
        part if is_code else LINK.sub(lead, part)
        for part, is_code in parts("\n".join(in_columns(markdown.split("\n"), name)))
    )


def parts(markdown: str) -> list[tuple[str, bool]]:
    """Split a page into prose and code: fenced blocks, and the lines that say where they are from.

    Prose stays in one piece, for the text of a link may go on in the next line.
    """
    found: list[tuple[str, bool]] = []
    fence = ""
    for line in markdown.splitlines(keepends=True):
        mark = FENCE.match(line)
        is_code = bool(fence or mark) or line.rstrip().endswith("{ .where }")
        if mark and (not fence or line.strip().startswith(fence)):
            fence = "" if fence else mark[1]
        if found and found[-1][1] == is_code:
            found[-1] = found[-1][0] + line, is_code
        else:
            found.append((line, is_code))
    return found


def formula(match: re.Match, display: str) -> str:
    """Return TeX as MathML, which browsers set by themselves."""
    tex = " ".join(html.unescape(match[1]).split())
    mathml = convert(tex, display=display)
    # A function's name and its argument: LaTeX sets a thin space between them.
    space = r'\1<mspace width="0.17em"/>'
    mathml = re.sub(r"(?<!<msup>)(<mi>(?:log|exp|tanh)</mi>)(?!<mo)", space, mathml)
    children = {"msup": 2, "msub": 2, "mfrac": 2, "munder": 2, "mover": 2, "munderover": 3}
    try:
        elements = list(ElementTree.fromstring(mathml).iter())
    except ElementTree.ParseError as error:
        raise PluginError(f"no MathML for {tex}") from error
    wrong = [e for e in elements if len(e) != children.get(e.tag.partition("}")[2], len(e))]
    if wrong or "\\" in mathml:
        raise PluginError(f"no MathML for {tex}")
    return f'<div class="formula">{mathml}</div>' if display == "block" else mathml


def on_page_content(content, page, config, files):
    """Turn formulas into MathML, and join lines of Chinese."""
    content = NO_SPACE.sub("", content)
    content = re.sub(
        r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>',
        functools.partial(formula, display="block"),
        content,
        flags=re.DOTALL,
    )
    return re.sub(
        r'<span class="arithmatex">\\\((.*?)\\\)</span>',
        functools.partial(formula, display="inline"),
        content,
        flags=re.DOTALL,
    )


def on_page_context(context, page, config, nav):
    """Show the pages of the page's own language, and the way to its twin in the others."""
    language, _, rest = page.url.partition("/")
    names = config["extra"]["languages"]
    present = [name for name in names if (ROOT / "docs" / name).is_dir()]
    config["extra"]["alternate"] = [
        {"name": names[name], "lang": name, "link": f"{name}/{rest}"} for name in present
    ]
    if language not in present or len(present) < 2:
        del config["extra"]["alternate"]
    config["theme"]["language"] = language if language in present else "en"
    own = copy.copy(nav)
    own.items = [
        child for item in nav.items if item.title == names.get(language) for child in item.children
    ]
    context["nav"] = own if own.items else nav
    return context


def on_post_page(output, page, config):
    """Drop the heads' links to the other languages: the theme would look for a sitemap at each."""
    return re.sub(r'\s*<link rel="alternate" [^>]*hreflang[^>]*>', "", output)
