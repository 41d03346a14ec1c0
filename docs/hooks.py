"""What mkdocs does not do by itself: code beside the text, links into the code, formulas.

The pages are Markdown that a code host shows as well, and speak of the code by links only
(docs/lines.py). A page that reads a script shows all of its lines in rows (docs/reader.py). On
other pages, markers right under a heading set that section in two columns: the text on the left,
those lines of the shipped file on the right. Any other link to code leads to the line on the page
that reads the script, or in a copy of the file on the site. A name, banner or line that has gone
fails the build. A link to a file of docs/recipes in a paragraph of its own shows it below.
"""

import copy
import functools
import posixpath
import re
import sys
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).parent))

import reader
from formulas import mathml, named
from lines import CODE, FENCE, HEADING, LINK, MARKER, READS, ROOT, readers, select, source

# A new line that is no space: between Chinese characters, or after Chinese punctuation.
NO_SPACE = re.compile(
    "(?<=[\u3400-\u9fff])\n[ \t]*(?=[\u3000-\u9fff\uff00-\uffef])"
    "|(?<=[\u3000-\u303f\uff00-\uffef])\n[ \t]*"
    "|\n[ \t]*(?=[\u3001-\u3003\u3008-\u3011\uff01-\uff0f\uff1a-\uff1f])"
    "|(?<=[\u3002\uff01\uff1a\uff1f]</em>) |(?<=[\u3002\uff01\uff1a\uff1f]</strong>) "
)
# The space before and after a sign between numbers, and within an interval.
WITHIN = re.compile(r" (?=[±▲▼])|(?<=±) |(?<=\d) (?=- \d)|(?<=\d -) (?=\d)|(?<=\d,) (?=[-\d.,]+\])")
CELL = "<td[^>]*>.*?</td>"
FORMULA = r'<math[^>]*display="inline"[^>]*>(?:(?!</math>).)*</math>'
MARKS = "[.,;:!?)\u3001\u3002\uff01\uff09\uff0c\uff1a\uff1b\uff1f\u201d]"
WHOLE = (
    rf"[(\uff08]{FORMULA}{MARKS}*|{FORMULA}{MARKS}+"  # with what stands right before and after it
    r"|(?<![\w.-])[\d.]+e-\d+(?![^<>]*>)"  # 1e-5
)
RECIPE = re.compile(r"^\[`([\w.]+)`\]\(\.\./recipes/\1\)$", re.MULTILINE)


def repo_path(page: str, target: str) -> str:
    """Return a link's target from the repository's root; `page` is its path on the site."""
    here = page.removeprefix("repo/") if page.startswith("repo/") else f"docs/{page}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(here), target))


def site_path(path: str, page: str) -> str:
    """Return the way from a page to a file of the repository on the site."""
    there = path.removeprefix("docs/")
    if path in readers():
        language = "zh" if page.startswith("zh/") or page.endswith(".zh.md") else "en"
        there = f"{language}/{readers()[path]}"
    elif there == path:  # outside docs/: there is a copy, code as a page
        there = f"repo/{path}.md" if path.endswith(".py") else f"repo/{path}"
    return posixpath.relpath(there, posixpath.dirname(page) or ".")


def beside(match: re.Match, page: str) -> str:
    """Return the lines that a marker speaks of, with their numbers, as HTML."""
    file, start, end, target, _ = match.groups()
    if repo_path(page, target) != file:
        raise PluginError(f"{page}: the link to {file} leads to {target}")
    first, last = select(file, start, end)
    home = site_path(file, page).removesuffix(".md") + ".html"
    text, comma = reader.words(page)["lines"].format(first, last), reader.words(page)["comma"]
    return (
        f'<p class="where"><a href="{home}#L-{first}"><code>{file}</code>{comma}{text}</a></p>'
        + reader.placeholder(file, first, last)
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
        out += ['<div class="step" markdown="1">', "", line, ""]
        out += [
            '<div class="why" markdown="1">',
            "",
            *text,
            "",
            "</div>",
            f'<div class="lines">{"".join(blocks)}</div>',  # one line, or Markdown takes it apart
            "</div>",
            "",
        ]
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
            if path in added or path in readers() or not (ROOT / path).is_file():
                continue
            added.add(path)
            if path.endswith(".py"):
                content = "---\nsearch: {exclude: true}\nhide: [navigation, toc, footer]\n---\n\n"
                code = reader.placeholder(path, 1, len(source(path)))
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
    if READS.search(markdown):
        page.meta["hide"] = ["navigation", "toc"]  # the width is for the code
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
        elif readers().get(path) == posixpath.basename(name):
            anchor = "L-1"
        return f"{image}[{text}]({site_path(path, name)}{'#' * bool(anchor)}{anchor})"

    reads = READS.search(markdown)
    markdown = "".join(
        part if is_code else LINK.sub(lead, part)
        for part, is_code in parts(RECIPE.sub(with_recipe, markdown))
    )
    head = ""
    if reads:
        head, markdown = reader.with_rows(markdown, name)
    return head + "\n".join(in_columns(markdown.split("\n"), name))


def parts(markdown: str) -> list[tuple[str, bool]]:
    """Split a page into prose and code: fenced blocks and markers.

    Prose stays in one piece, for the text of a link may go on in the next line.
    """
    found: list[tuple[str, bool]] = []
    fence = ""
    for line in markdown.splitlines(keepends=True):
        mark = FENCE.match(line)
        is_code = bool(fence or mark or MARKER.match(line.rstrip("\n")))
        if mark and (not fence or line.strip().startswith(fence)):
            fence = "" if fence else mark[1]
        if found and found[-1][1] == is_code:
            found[-1] = found[-1][0] + line, is_code
        else:
            found.append((line, is_code))
    return found


def formula(match: re.Match, display: str, language: str) -> str:
    """Return TeX as MathML; on a page that reads a script, with the names of its symbols."""
    try:
        found = mathml(match[1], display)
    except ValueError as error:
        raise PluginError(str(error)) from error
    found = named(found, language) if language else found
    return f'<div class="formula">{found}</div>' if display == "block" else found


def at_home(content: str, page: str) -> str:
    """Return the file whose lines have their address on this page, if there is one."""
    reads = re.search(r'<div class="reader" data-file="([^"]+)"', content)
    if reads:
        return reads[1]
    return page.removeprefix("repo/").removesuffix(".md") if page.endswith(".py.md") else ""


def unbroken(content: str) -> str:
    """Return HTML in which no line breaks within a flag, nor in a table within 1.0 ± 0.2 ▼."""
    flag = r'(?<!"whole">)(?<![\w-])--?[a-z][\w-]*(?![^<>]*>)'
    kept = r'<span class="whole">\g<0></span>'
    for place in ("<code[^>]*>.*?</code>", CELL):
        content = re.sub(place, lambda m: re.sub(flag, kept, m[0]), content, flags=re.DOTALL)
    content = re.sub(CELL, lambda m: WITHIN.sub("&nbsp;", m[0]), content)
    # The long name of a test breaks between its words only.
    return re.sub(r"(?<=<code>)test_\w+(?=</code>)", lambda m: m[0].replace("_", "_<wbr>"), content)


def on_page_content(content, page, config, files):
    """Turn formulas into MathML, join lines of Chinese, put in the code as text."""
    name = page.file.src_uri
    reads = '<div class="reader"' in content
    content = NO_SPACE.sub("", content)
    for display, pattern in (
        ("block", r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>'),
        ("inline", r'<span class="arithmatex">\\\((.*?)\\\)</span>'),
    ):
        language = name[:2] if reads else ""
        set_it = functools.partial(formula, display=display, language=language)
        content = re.sub(pattern, set_it, content, flags=re.DOTALL)
    # No line begins with a full stop or ends with an opening bracket, or breaks within 1e-5.
    content = re.sub(WHOLE, r'<span class="whole">\g<0></span>', content)

    if reads:
        content = reader.finish(content, name, page.toc)
    if file := at_home(content, name):
        page.present_anchor_ids |= {f"L-{n}" for n in range(1, len(source(file)) + 1)}
    content = reader.with_plain_code(content)
    return unbroken(content)


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
    for way in ("previous_page", "next_page"):  # in the footer
        other = getattr(page, way)
        if other and other.url.partition("/")[0] != language:
            setattr(page, way, None)
    pages = "".join(
        f'<li><a href="{posixpath.basename(other.url)}">{other.title}</a></li>'
        for other in own.items
    )
    page.content = page.content.replace("<!-- pages -->", f"<ul>{pages}</ul>")
    name = page.file.src_uri
    page.content = reader.with_code(  # the search has read it by now
        page.content,
        at_home(page.content, name),
        lambda file: site_path(file, name).removesuffix(".md") + ".html",
    )
    return context


def on_post_page(output, page, config):
    """Drop the heads' links to the other languages: the theme would look for a sitemap at each.

    Search in one language, by docs/assets/search.js.
    """
    language = "zh" if re.match(r"zh/|.*\.zh\.", page.url) else "en"
    output = re.sub(
        r'("search": "[^"]*assets/)(javascripts/workers/[^"]*)"',
        rf'\1search.js?language={language}&theme=\2"',
        output,
    )
    return re.sub(r'\s*<link rel="alternate" [^>]*hreflang[^>]*>', "", output)
