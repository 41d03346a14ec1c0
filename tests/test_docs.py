"""What the pages say is so: links, code, tables, formulas, commands and recipes."""

import functools
import html
import importlib.util
import json
import re
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import experiment
import ppo_atari
import ppo_continuous
import ppo_discrete
import ppo_lstm
import ppo_rlhf_toy
from benchmarks import pitfalls
from benchmarks.jobs import RESULTS, read
from benchmarks.tables import scores_of_changes, significance
from gae import gae
from tests.helpers import ROOT, import_file, quick_args, read_metrics, run_main

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*/*.md"))
NAMES = [str(page.relative_to(DOCS)) for page in PAGES]
SCRIPTS = (ppo_discrete, ppo_continuous, ppo_atari, ppo_lstm, ppo_rlhf_toy)
lines = runpy.run_path(str(DOCS / "lines.py"))
# Flags of a run of ppo_rlhf_toy.py that takes some seconds.
TINY = dict(
    d_model=16, num_layers=1, num_heads=2, sft_steps=8, sft_batch_size=8, sft_accuracy=0.0,
    rm_pairs=64, rm_min_accuracy=0.0, num_iterations=1, batch_size=16, update_epochs=1,
    eval_prompts=32,
)  # fmt: skip


@functools.cache
def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as mkdocs and code hosts make them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    slugs = (re.sub(r"[^\w\s-]", "", title).strip().lower() for title in titles)
    return {re.sub(r"[\s-]+", "-", slug) for slug in slugs}


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """Return a page's fenced blocks, each with the heading above it and its language."""
    found, heading = [], ""
    pattern = r"^#+ (?P<heading>[^\n]*)$|^```(?P<kind>\w*)\n(?P<body>.*?)^```$"
    for match in re.finditer(pattern, page.read_text(), re.MULTILINE | re.DOTALL):
        if match["heading"]:
            heading = match["heading"]
        else:
            found.append((heading, match["kind"], match["body"]))
    return found


# ---- Links and code ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, "index.md", "../README.md", "../README.zh.md"])
def test_links_resolve(name: str) -> None:
    page = DOCS / name
    for _, _, target in lines["LINK"].findall(prose(page)):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{name}: {target}"
        if anchor:
            assert anchor in anchors(path), f"{name}: {target}"


def test_links_that_wrap_over_a_line_end_are_found() -> None:
    text = "[two\nwords](gae.md) and [a\n\nnew paragraph](no.md), `x[0]`\n[`y`](../../gae.py)"
    assert [target for *_, target in lines["LINK"].findall(text)] == ["gae.md", "../../gae.py"]


@pytest.mark.parametrize("name", NAMES)
def test_code_that_a_page_speaks_of_is_there(name: str) -> None:
    """Functions, banners, lines and tests; docs/hooks.py stops the build in the same cases."""
    page = DOCS / name
    read = lines["READS"].search(page.read_text())
    for file, start, end, target, _ in lines["MARKER"].findall(page.read_text()):
        assert (page.parent / target).resolve() == ROOT / file
        if read and file == read[1]:
            continue  # a row, below
        first, last = lines["select"](file, start, end or None)
        assert 0 < first <= last <= first + 100
    text = lines["MARKER"].sub("", prose(page))
    for _, label, target in lines["LINK"].findall(text):
        code = re.fullmatch(lines["CODE"], label)
        path = (page.parent / target).resolve()
        if path.suffix == ".py" and code and code[1] != path.name:
            lines["select"](str(path.relative_to(ROOT)), code[1])


@pytest.mark.parametrize("what", ["no_function", "[9] Banner", "no line begins so", "return"])
def test_what_has_gone_or_is_not_unique_is_an_error(what: str) -> None:
    with pytest.raises(LookupError, match="not one"):
        lines["select"]("ppo_discrete.py", what)


def test_lines_are_found() -> None:
    source = (ROOT / "ppo_discrete.py").read_text().splitlines()
    first, last = lines["select"]("ppo_discrete.py", "Agent.forward")
    assert source[first - 1].startswith("    def forward(") and "squeeze" in source[last - 1]
    first, last = lines["select"]("ppo_discrete.py", "[2] Advantages")
    assert "# ---- [2]" in source[first - 1] and "[3]" in source[last + 1]
    first, last = lines["select"](
        "ppo_discrete.py", 'if args.objective == "clip":', "loss = -surrogate"
    )
    assert last > first and source[last - 1].strip().startswith("loss = -surrogate")


# ---- Pages that read a script ------------------------------------------------------------------


READERS = [name for name in NAMES if lines["READS"].search((DOCS / name).read_text())]


def is_script(file: str) -> bool:
    """Tell a script from gae.py, which has neither flags nor a loop."""
    return "class Args" in (ROOT / file).read_text()


@pytest.mark.parametrize("name", READERS)
def test_rows_hold_every_line_of_the_script_once(name: str) -> None:
    file, _, rows, _ = lines["rows"]((DOCS / name).read_text())
    shown = [n for row in rows for n in range(row.first, row.last + 1)]
    assert shown == list(range(1, len((ROOT / file).read_text().splitlines()) + 1))
    turns = {row.option for row in rows if row.option.startswith("ppo")}
    assert len(turns) == (3 if is_script(file) else 0)
    for row in rows:  # a paragraph of code, not a page of it
        assert row.option == "fold" or row.last - row.first < 30, row.first


ROWS = """# Title
<!-- reads gae.py -->
{}
"""
MARK = "[`gae.py`: `{}`](../../gae.py)"


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ([MARK.format("gae")], "is line"),  # lines above it are not shown
        ([MARK.format("docstring"), MARK.format("gae"), MARK.format("import")], "is no name|line"),
        ([MARK.format("docstring"), "## Two", "Text."], "no marker right under"),
        ([MARK.format("docstring"), "## Two"], "no marker under"),
        (["Text."], "no marker under"),
        ([MARK.format("docstring"), MARK.format("no line")], "begins 0 lines"),
        (
            [MARK.format("docstring").partition("](")[0] + " to `gae`](../../gae.py)"],
            "ends where the next",
        ),
    ],
)
def test_rows_that_would_leave_out_a_line_are_an_error(body: list[str], problem: str) -> None:
    with pytest.raises(LookupError, match=problem):
        lines["rows"](ROWS.format("\n\n".join(body)))


def test_rows_are_parsed() -> None:
    body = ["Above.", "## One", "### Two", MARK.format("docstring"), "Note.", "```", "# No heading"]
    body += ["```", MARK.format("import torch") + " <!-- fold -->", "Imports.", "## Three"]
    body += [MARK.format("gae") + " <!-- ppo 2 -->", "<!-- end of gae.py -->", "## Free", ""]
    file, above, rows, below = lines["rows"](ROWS.format("\n".join(body)))
    assert file == "gae.py" and above.endswith("Above.") and below.startswith("## Free")
    assert [row.headings for row in rows] == [["## One", "### Two"], [], ["## Three"]]
    assert [row.option for row in rows] == ["", "fold", "ppo 2"]
    assert rows[0].first == 1 and rows[0].note == ["Note.", "```", "# No heading", "```"]
    assert [row.last + 1 for row in rows[:-1]] == [row.first for row in rows[1:]]


def test_a_beginning_that_occurs_twice_is_the_next_one() -> None:
    _, _, rows, _ = lines["rows"]((DOCS / "en" / "discrete.md").read_text())
    source = (ROOT / "ppo_discrete.py").read_text().splitlines()
    starts = [i for i, line in enumerate(source, 1) if line.strip() == "if args.compile:"]
    assert len(starts) == 2
    assert starts[0] not in {row.first for row in rows}
    assert starts[1] in {row.first for row in rows}


def test_flags_that_the_pages_name_exist() -> None:
    flags = {"--only", "--ranges", "--results", "--measure", "--part", "--frozen-coef"}
    flags |= {"--work", "--what"}
    for module in SCRIPTS:
        for name in module.Args.__dataclass_fields__:
            flags |= {f"--{name.replace('_', '-')}", f"--no-{name.replace('_', '-')}"}
    for page in PAGES:
        if page.stem != "coming-from":  # that one names flags of others too
            named = set(re.findall(r"`(--[a-z][\w-]*)", prose(page)))
            assert named <= flags, f"{page.name}: {named - flags}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_logged_numbers_are_explained(script: ModuleType, run_dir: Path) -> None:
    if script is ppo_rlhf_toy:
        args = script.Args(run_dir=run_dir, task="arithmetic", **TINY)
    else:
        args = quick_args(script, run_dir)
    script.train(args)
    keys = read_metrics(run_dir)[0].keys() - {"global_step"}
    assert len(keys) > 8
    for page in DOCS.glob("*/debugging.md"):
        assert {key for key in keys if f"| `{key}` |" not in page.read_text()} == set()


@pytest.mark.parametrize("name", NAMES)
def test_figures_have_alt_text_and_a_ground(name: str) -> None:
    """A figure stands on white of its own, so its axes can be read on a dark page."""
    for image, text, target in lines["LINK"].findall(prose(DOCS / name)):
        if image:
            enough = 40 if name.startswith("en/") else 20  # Chinese says it in half the letters
            assert len(text) > enough, f"{name}: {target}"
            if target.endswith(".svg"):
                assert "fill: #ffffff" in (DOCS / name).parent.joinpath(target).read_text()


# ---- Tables ------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", sorted(DOCS.glob("*/gae.md")), ids=lambda page: page.parent.name)
def test_the_worked_table_is_what_gae_returns(page: Path) -> None:
    pattern = r"\| (\d)[^|]*\|" + r"([^|\n]*)\|" * 10
    rows = [row[1:] for row in re.findall(pattern, page.read_text())]
    assert len(rows) == 7
    yes = {"yes": True, "no": False, "是": True, "否": False}
    numbers = torch.tensor([[float(x) for x in (*row[:3], *row[5:])] for row in rows]).T
    rewards, values, next_values, delta, advantages, returns, td, monte_carlo = numbers
    terminated, done = (torch.tensor([yes[row[i].strip()] for row in rows]) for i in (3, 4))
    inputs = (rewards, values, next_values, terminated, done)
    for gae_lambda, expected in ((0.5, advantages), (0.0, td), (1.0, monte_carlo)):
        torch.testing.assert_close(gae(*inputs, 0.5, gae_lambda)[0], expected, rtol=0, atol=0)
    torch.testing.assert_close(gae(*inputs, 0.5, 0.5)[1], returns, rtol=0, atol=0)
    torch.testing.assert_close(delta, td, rtol=0, atol=0)
    assert torch.equal(values[1:], next_values[:-1])  # as the rows of one environment follow


def test_tables_are_those_of_the_committed_data() -> None:
    tables = runpy.run_path(str(DOCS / "figures.py"))["tables"]()
    seen = set()
    for page in PAGES:
        for name, table in re.findall(
            r"<!-- table (\w+) -->\n(.*?)\n<!-- end -->", page.read_text(), re.DOTALL
        ):
            if page.parent.name == "en":
                assert table == tables[name], f"{page.name}: python docs/figures.py tables"
            seen.add(name)
    assert seen == set(tables)


@pytest.mark.parametrize("page", sorted(DOCS.glob("*/discrete.md")), ids=lambda p: p.parent.name)
def test_defaults_are_those_of_the_scripts(page: Path) -> None:
    rows = re.findall(
        r"^\| `--([\w-]+)` \|([^|]*)\|([^|]*)\|([^|]*)\|([^|]*)\|([^|]*)\|", page.read_text(), re.M
    )
    assert len(rows) == 10
    scripts = (ppo_discrete, ppo_continuous, ppo_atari, ppo_rlhf_toy)
    task = ppo_rlhf_toy.TASKS["reviews"]
    for flag, _, *cells in rows:
        name = flag.replace("-", "_")
        for cell, script in zip(cells, scripts):
            if cell.strip():
                value = getattr(script.Args(), name)
                if value is None:  # of up to 17 inputs; the task decides for language models
                    value = 3e-4 if script is ppo_continuous else getattr(task, name)
                assert float(cell) == value, flag
    pattern = r"^\| [^`|]+ \| [^|]+ \| (\d+) \| (\d+) \| (\d+) \| (\d+) "
    sizes = re.search(pattern, page.read_text(), re.MULTILINE)
    assert sizes.groups() == (
        *(str(x.Args().batch_size) for x in scripts[:3]),
        str(task.batch_size),
    )


def test_the_answers_hold_together() -> None:
    """The table of tokens: rewards and advantages follow from the other columns."""
    header, *rows = (row.split(",") for row in (DOCS / "data" / "answer.csv").read_text().split())
    table = dict(zip(header, zip(*rows)))
    for answer in ("0", "1"):
        mine = [i for i, x in enumerate(table["answer"]) if x == answer]
        acts = [i for i in mine if table["action_mask"][i] == "1"]
        assert table["token"][acts[-1]] == "<eos>"
        for i in mine:
            assert (table["attention_mask"][i] == "0") == (table["token"][i] == "<pad>")
        column = {k: np.array([float(table[k][i]) for i in acts]) for k in header[4:]}
        kl = column["log_prob"] - column["ref_log_prob"]
        np.testing.assert_allclose(column["kl"], kl, atol=2e-3)
        np.testing.assert_allclose(column["reward"][:-1], -0.1 * kl[:-1], atol=2e-3)
        np.testing.assert_allclose(
            column["return"] - column["value"], column["advantage"], atol=2e-3
        )


# ---- Commands and recipes ----------------------------------------------------------------------

# Flags that shorten what the pages run; the last one of a name counts.
CONTROL = "--num-envs 4 --num-steps 16 --num-minibatches 4 --update-epochs 1"
CONTROL += " --total-timesteps 128 --eval-episodes 2"
LANGUAGE = " ".join(f"--{name.replace('_', '-')} {x}" for name, x in TINY.items())
# What is tested elsewhere, or changes nothing and only needs its parts to exist.
OTHERS = {
    # By tests/test_recipes.py.
    "mkdir mine && cp *.py docs/recipes/*.* mine && cd mine",
    "python ppo_discrete.py --env-id CartPole-v1 --seed 2",
    "diff ppo_discrete.py ppo_continuous.py",
    "diff ppo_discrete.py ppo_atari.py",
    "diff ppo_discrete.py ppo_lstm.py",
    "mkdocs build",  # by the site's tests below
    'pip install -c constraints.txt -e ".[docs]"',
    'pip install -c constraints.txt -e ".[benchmark,mujoco,box2d,atari]"',
    "python -m benchmarks.pitfalls --ranges",
    "python ppo_atari.py --env-id ALE/Breakout-v5",  # minutes; flags: tests/test_readme.py
    # Trained so by tests/test_processes.py.
    "torchrun --standalone --nproc-per-node 2 ppo_discrete.py --env-id LunarLander-v3",
}


HAS_MUJOCO = importlib.util.find_spec("mujoco") is not None


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("en/")])
def test_commands_and_recipes_run(name: str, monkeypatch, capsys, tmp_path) -> None:
    """Every sh block, shortened, in a copy of the scripts with the section's changes."""
    # A function of one's own trains a tiny model too.
    tiny_args = functools.partial(ppo_rlhf_toy.Args, **TINY)
    monkeypatch.setattr(ppo_rlhf_toy, "Args", lambda **changes: tiny_args(**(changes | TINY)))
    folder, before = tmp_path, ""
    for number, (heading, kind, body) in enumerate(blocks(DOCS / name)):
        if heading != before:
            folder, before = tmp_path / str(number), heading
            shutil.copytree(DOCS / "recipes", folder)
            for script in (*SCRIPTS, experiment):
                shutil.copy(script.__file__, folder)
            shutil.copy(ROOT / "gae.py", folder)
            monkeypatch.syspath_prepend(str(folder))
            monkeypatch.chdir(folder)
        if kind == "python" and body.startswith("# file: "):
            (folder / body.split()[2]).write_text(body)
        if kind != "sh":
            continue
        for i, command in enumerate(body.strip().split("\n")):
            if command in OTHERS:
                continue
            if "-v5" in command and not HAS_MUJOCO:
                continue  # its flags are parsed by tests/test_readme.py
            if command.startswith("git apply "):
                subprocess.run(command.split(), check=True)
                continue
            assert command.startswith("python "), command
            if command == f"python -m benchmarks.pitfalls --only {heading}":
                command = f"python {pitfalls.CASES[heading].command}"
            _, script, *flags = shlex.split(command)
            if not (folder / script).exists():
                assert script == "docs/figures.py", command
                continue
            module = import_file(folder / script)
            if hasattr(module, "Reviews"):  # a judge that tells a random model's answers apart
                by_length = lambda self, prompt, answer: 1.0 / (1.0 + len(answer))  # noqa: E731
                monkeypatch.setattr(module.Reviews, "gold", by_length)
            if hasattr(module, "Args"):
                flags += (LANGUAGE if "rlhf" in script else CONTROL).split()
                if "--resume" in flags:  # there must be something left to do
                    flags += ["--total-timesteps", "256"]
                if not {"--run-dir", "--resume", "--evaluate"} & set(flags):
                    flags += ["--run-dir", f"run{number}_{i}"]
                status, _, error = run_main(module, flags, monkeypatch, capsys)
                assert status == 0, f"{command}: {error}"
            assert list(folder.rglob("results.json")) or script == "record.py"


# ---- The site ----------------------------------------------------------------------------------


def test_the_site_builds_and_fetches_nothing(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text()
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", text):
            assert 'rel="alternate"' not in tag, "the theme fetches a sitemap that is not there"
            if 'rel="canonical"' not in tag:
                assert "//" not in "".join(re.findall(r'(?:src|href)="([^"]*)"', tag)), tag
    css = "".join(path.read_text() for path in site.rglob("*.css"))
    assert not re.findall(r"url\(['\"]?(?:https?:)?//", css)


def test_a_link_that_wraps_over_a_line_end_leads_to_its_page() -> None:
    pytest.importorskip("material")
    pytest.importorskip("latex2mathml")
    with_code = import_file(DOCS / "hooks.py").with_code
    text = "- [from the\n  start](docs/en/gae.md#three-ways-to-end)\n"
    assert with_code(text, "repo/README.md") == text.replace("docs/en", "../en")
    fenced = "```sh\n[from](docs/en/gae.md)\n```\n"
    assert with_code(fenced, "repo/README.md") == fenced


def test_lines_of_chinese_are_joined_without_a_space(site: Path) -> None:
    for page in (site / "zh").glob("*.html"):
        split = re.search(r"[\u3000-\u9fff\uff00-\uffef]\n[\u3400-\u9fff]", page.read_text())
        assert split is None, page.name
    text = (site / "zh/policy-gradient.html").read_text()
    assert re.search(r"ppo_discrete\.py</code>\uff0c第 \d+ 至 \d+ 行", text)


def test_the_site_has_code_beside_the_text_and_formulas(site: Path) -> None:
    text = (site / "en" / "policy-gradient.html").read_text()
    markers = lines["MARKER"].findall((DOCS / "en" / "policy-gradient.md").read_text())
    for part in ("where", "code highlight"):  # two of them in a section, too
        assert text.count(f'class="{part}"') == len(markers) > 3
    assert "<math" in text and "arithmatex" not in text


def lines_of(text: str) -> dict[int, str]:
    """Return the lines of code that have their address on a page, without their colours."""
    found = re.findall(
        r'<span class="line" id="L-(\d+)"><a href="#L-\1" data-line="\1"[^>]*></a>'
        r'<span class="text">(.*)\n</span></span>',
        text,
    )
    numbers = [int(n) for n, _ in found]
    assert numbers == sorted(set(numbers)) and len(numbers) == text.count('id="L-')
    return {int(n): html.unescape(re.sub("<[^>]+>", "", line)) for n, line in found}


@pytest.mark.parametrize("name", READERS)
def test_a_reader_page_shows_every_line_of_its_script_once(name: str, site: Path) -> None:
    file = lines["READS"].search((DOCS / name).read_text())[1]
    text = (site / name).with_suffix(".html").read_text()
    source = (ROOT / file).read_text().splitlines()
    assert lines_of(text) == dict(enumerate(source, 1))
    assert not (site / "repo" / f"{file}.html").exists()
    rows = lines["rows"]((DOCS / name).read_text())[2]
    folds = sum(row.option == "fold" for row in rows)
    assert text.count('<details class="fold">') == folds and bool(folds) == is_script(file)
    assert re.findall(r'<div class="row[^"]*" data-ppo="(\d)"', text) == [
        row.option[4:] for row in rows if row.option.startswith("ppo")
    ]


def test_a_file_without_a_reader_page_keeps_a_copy(site: Path) -> None:
    text = (site / "repo" / "experiment.py.html").read_text()
    assert lines_of(text) == dict(enumerate((ROOT / "experiment.py").read_text().splitlines(), 1))


def test_links_to_code_lead_to_the_page_that_reads_it(site: Path) -> None:
    first, _ = lines["select"]("ppo_discrete.py", "clipped_surrogate")
    for page in ("en/details", "en/policy-gradient", "zh/details", "zh/policy-gradient"):
        text = (site / f"{page}.html").read_text()
        assert f'href="discrete.html#L-{first}"' in text
        assert "repo/ppo_discrete.py.html" not in text
    first, _ = lines["select"]("experiment.py", "evaluate")
    assert f"../repo/experiment.py.html#L-{first}" in (site / "en/discrete.html").read_text()


def row_at(text: str, start: str) -> str:
    """Return the HTML of the row of ppo_discrete.py whose first line begins so."""
    first = lines["line_of"]("ppo_discrete.py", start)
    (row,) = (x for x in text.split('<div class="row')[1:] if x.count(f'id="L-{first}"'))
    return row


@pytest.mark.parametrize("language", ["en", "zh"])
def test_names_are_bound_to_code_formulas_and_facts(language: str, site: Path) -> None:
    text = (site / language / "discrete.html").read_text()
    row = row_at(text, "def clipped_surrogate(")
    assert '<code data-name="clipped" tabindex="0">' in row  # in the note
    assert row.count('<span class="n" data-name="clipped">clipped</span>') == 2  # in the code
    for name in ("ratio", "advantages", "clip_coef"):  # in formula and code
        assert (
            f'<mrow data-name="{name}"><m' in row and f'<span class="n" data-name="{name}">' in row
        )
    row = row_at(text, "entropy = entropies.mean()")
    assert re.search(r'<mrow data-name="ent_coef"><msub><mi>c</mi><mn>2</mn></msub></mrow>', row)

    cards = json.loads(re.search(r'id="cards">(.*?)</script>', text)[1])
    source = (ROOT / "ppo_discrete.py").read_text().splitlines()
    card = cards["clip_coef"]
    assert (card["flag"], card["default"]) == ("--clip-coef", "0.2")
    assert card["help"] in (ROOT / "ppo_discrete.py").read_text() and card["help"]
    assert "<mi>&#x003B5;</mi>" in card["symbol"][0] and card["meaning"]
    assert "debugging.html#clip-wide" in [link for _, link in card["effects"]]
    assert ["(T + 1, N)", "train"] in cards["values"]["shape"]
    assert ["(B,)", "Batch"] in cards["values"]["shape"]
    assert ["(T, N)", "train"] in cards["rewards"]["shape"]
    assert source[cards["normalise"]["line"] - 1].startswith("def normalise(")
    assert cards["norm_adv"]["help"].startswith("The rows over which")
    for name, card in cards.items():
        for _, link in card.get("effects", []):
            page, _, anchor = link.partition("#")
            assert f'id="{anchor}"' in (site / language / page).read_text(), f"{name}: {link}"


def test_the_footer_stays_within_a_language(site: Path) -> None:
    ways = re.compile(r'href="([^"]*)" class="md-footer__link')
    found = {}
    for language in ("en", "zh"):
        for page in (site / language).glob("*.html"):
            found[f"{language}/{page.name}"] = ways.findall(page.read_text())
    for page, targets in found.items():
        assert not any(".." in target for target in targets), page
    assert min(map(len, found.values())) == 1 and max(map(len, found.values())) == 2


def test_no_line_begins_with_the_mark_after_a_formula(site: Path) -> None:
    for page in site.glob("[ez][nh]/*.html"):
        rest = re.sub(r'<span class="whole">.*?</span>', "", page.read_text(), flags=re.DOTALL)
        inline = r'display="inline"(?:(?!</math>).)*</math>'
        assert not re.search(inline + r"[.,;:!?)\u3002\uff0c\uff1b\uff1a\uff09]", rest), page


def test_figures_and_long_names_break_where_they_should(site: Path) -> None:
    details = (site / "en" / "details.html").read_text()
    assert re.search(r"<td[^>]*>-85.2&nbsp;±&nbsp;2.8</td>", details)
    assert "test_<wbr>memory_<wbr>at_<wbr>first" in details
    assert '<span class="whole">1e-5</span>' in details
    assert "[6,075.2,&nbsp;6,934.5]" in (site / "en" / "results.html").read_text()


@pytest.mark.parametrize(
    ("tex", "parts"),
    [
        (r"[-1, 1]", '[</mo><mo form="prefix">&#x02212;</mo>'),
        (r"a - 1", "<mi>a</mi><mo>&#x02212;</mo>"),
        (r"x \sim p", "<mo>&#x0223C;</mo>"),
        (r"\beta \log Z", '</mi><mspace width="0.17em"/><mi>log</mi><mspace width="0.17em"/><mi>Z'),
        (r"\operatorname{KL}(p)", "<mrow><mi>KL</mi><mo"),
    ],
)
def test_signs_and_names_of_functions_are_spaced_as_in_latex(
    tex: str, parts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("latex2mathml")
    monkeypatch.syspath_prepend(str(DOCS))  # for docs/lines.py
    assert parts in import_file(DOCS / "formulas.py").mathml(tex)


def test_flags_do_not_break_over_a_line_end(site: Path) -> None:
    text = (site / "en" / "debugging.html").read_text()
    assert re.search(r'<code>[^<]*<span class="whole">--anneal-lr</span>', text)
    assert not re.search(r"<code[^>]*>[^<]*--[a-z]", text)


def test_the_site_shows_the_recipes(site: Path) -> None:
    for page in (site / "en" / "copying.html", site / "zh" / "copying.html"):
        text = html.unescape(re.sub(r"<[^>]+>", "", page.read_text()))
        for patch in (DOCS / "recipes").glob("*.patch"):
            assert patch.read_text() in text, patch.stem
    assert (site / "recipes" / "tasks.py").exists()


# ---- The details map ---------------------------------------------------------------------------


def test_all_details_are_mapped() -> None:
    text = (DOCS / "en" / "details.md").read_text()
    numbered = [int(n) for n in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)]
    assert numbered == list(range(1, 38))
    language = re.findall(r"^\| ([GRP]\d+) \|", text, re.MULTILINE)
    assert len(language) == len(set(language)) == 20
    for row in re.findall(r"^\| [GRP]?\d+ \|.*$", text, re.MULTILINE):
        mapped = "](../../" in row and "[`test_" in row
        assert mapped or "not used, because" in row or "recipe" in row, row


# An effect: its words, the section with its table, the line of the table.
EFFECT = re.compile(
    r"\[([^]|]+)\]\(#([^)]*(?:measured-effects|测得的效果)[^)]*)\): ([^;|]+)(?=;| \|)"
)
WORDS = {  # nothing, lower, higher, and
    "en": ("not significant", "worse on {}", "better on {}", ", "),
    "zh": ("无显著差异", "在 {} 上变差", "在 {} 上变好", "、"),
}
MEASURES = {
    "gold": "gold",
    "share of the optimum": "optimum_share",
    "达到最优值的比例": "optimum_share",
    "KL": "kl",
    "first ratios differ from 1 by up to": "first_ratio_error",
    "第一步之前的概率比偏离 1 最多达": "first_ratio_error",
}
EFFECTS = sorted(DOCS.glob("*/details.md"))


@pytest.mark.parametrize("page", EFFECTS, ids=lambda page: page.parent.name)
def test_effects_are_those_of_the_committed_runs(page: Path) -> None:
    nothing, worse, better, comma = WORDS[page.parent.name]
    effects = scores_of_changes(read(RESULTS / "details.csv"), "details")
    found = [e for e in EFFECT.findall(page.read_text()) if "rlhf" not in e[1]]
    assert len(found) >= 20
    for words, _, name in found:
        marks = {
            env_id.rpartition("-")[0]: significance(x, effects["default"][env_id])
            for env_id, x in effects[name].items()
        }
        tasks = {sign: [t for t, m in marks.items() if m.strip() == sign] for sign in "▼▲"}
        parts = [w.format(comma.join(tasks[sign])) for w, sign in ((worse, "▼"), (better, "▲"))]
        parts = [part for part, sign in zip(parts, "▼▲") if tasks[sign]]
        assert words == (comma.join(parts) or nothing), name


@pytest.mark.parametrize("page", EFFECTS, ids=lambda page: page.parent.name)
def test_effects_of_rlhf_are_those_of_the_committed_runs(page: Path) -> None:
    rows = read(RESULTS / "rlhf_details.csv")

    def scores(config: str, measure: str) -> np.ndarray:
        found = [row[measure] for row in rows if row["config"] == config]
        assert found, f"{config} is no line of the table"
        return np.array([float(x) for x in found if x])

    found = [e for e in EFFECT.findall(page.read_text()) if "rlhf" in e[1]]
    assert len(found) >= 19
    for words, _, name in found:
        if words == WORDS[page.parent.name][0]:
            for measure in ("gold", "optimum_share"):
                assert not significance(scores(name, measure), scores("default", measure)), name
        else:
            measure, value = words.rsplit(" ", 1)
            mean = scores(name, MEASURES[measure]).mean()
            assert value in (f"{mean:.2f}", f"{mean:.0f}"), f"{name}: {words}"


# ---- Languages ---------------------------------------------------------------------------------


TWINS = {n: n.replace("en/", "zh/") for n in NAMES if n.startswith("en/")}
TWINS |= {"../README.md": "../README.zh.md"}


def test_both_languages_have_the_same_pages() -> None:
    assert set(NAMES) == (TWINS.keys() | TWINS.values()) - {"../README.md", "../README.zh.md"}


@pytest.mark.parametrize("name", TWINS)
def test_both_languages_have_the_same_skeleton(name: str) -> None:
    """The same headings, markers, links, formulas, blocks (but for comments) and table rows."""

    def skeleton(page: Path) -> list:
        text = page.read_text()
        targets = [target.partition("#")[0] for *_, target in lines["LINK"].findall(prose(page))]
        return [
            re.findall(r"^#+ ", prose(page), re.MULTILINE),
            lines["MARKER"].findall(text),
            [t.replace("/zh/", "/en/").replace("README.zh.md", "README.md") for t in targets],
            len(re.findall(r"^\$\$$", text, re.MULTILINE)),
            [body for _, kind, body in blocks(page) if kind in ("sh", "diff", "")],
            [re.sub(" +#.*", "", body) for _, kind, body in blocks(page) if kind == "python"],
            len(re.findall(r"^\|", text, re.MULTILINE)),
        ]

    assert skeleton(DOCS / name) == skeleton(DOCS / TWINS[name])


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("zh/")])
def test_generated_tables_have_the_same_numbers_in_both_languages(name: str) -> None:
    def numbers(page: Path) -> list[list[str]]:
        found = re.findall(r"<!-- table \w+ -->\n(.*?)\n<!-- end -->", page.read_text(), re.DOTALL)
        return [re.findall(r"-?\d+(?:[.,]\d+)*(?:e-?\d+)?", table) for table in found]

    assert numbers(DOCS / name) == numbers(DOCS / "en" / Path(name).name)
