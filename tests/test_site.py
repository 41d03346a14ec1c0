"""The site in a browser: what a reader sees and does on a page that reads a script."""

import functools
import http.server
import json
import re
import threading
from pathlib import Path

import pytest

from tests.helpers import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("en/*.md"))
READERS = [page.stem for page in PAGES if "\n<!-- reads " in page.read_text()]
# Each of them in one language and in one scheme.
READER_PAGES = [(name, *(("en", "light"), ("zh", "dark"))[i % 2]) for i, name in enumerate(READERS)]
OTHER_PAGES = [f"{x}/{p.stem}.html" for p in PAGES if p.stem not in READERS for x in ("en", "zh")]
OTHER_PAGES += ["index.html", "repo/index.html"]
DISCRETE = "en/discrete.html"
PHONE = 412


@pytest.fixture(scope="module")
def desktop(watched, site: Path):
    """The discrete page, for tests that leave it as it was."""
    permissions = ["clipboard-read", "clipboard-write"]
    return watched.open((site / DISCRETE).as_uri(), permissions=permissions)


# ---- Every page --------------------------------------------------------------------------------


def check_code_and_prose(page, width: int) -> None:
    cut = page.evaluate(
        """() => [...document.querySelectorAll('.reader .line')].filter(line => {
          const box = line.closest('pre').getBoundingClientRect();
          return line.lastChild.getBoundingClientRect().right > box.right + 1;
        }).map(line => line.textContent)"""
    )
    if width > PHONE:
        assert cut == []
    else:
        assert cut  # they scroll inside their block, which is as wide as the screen at most
        wide = """() => Math.max(
          ...[...document.querySelectorAll('.code')].map(e => e.getBoundingClientRect().right)
        )"""
        assert page.evaluate(wide) <= PHONE
        scroll = "() => getComputedStyle(document.querySelector('.code pre > code')).overflowX"
        assert page.evaluate(scroll) == "auto"
    prose = page.evaluate(
        """() => {
          const probe = document.createElement('span');
          probe.textContent = '0'.repeat(75);
          document.querySelector('.note > p').append(probe);
          const most = probe.getBoundingClientRect().width;
          probe.remove();
          const all = [...document.querySelectorAll('.note > p')];
          return Math.max(...all.map(p => p.getBoundingClientRect().width)) / most;
        }"""
    )
    assert prose <= 1.03


def check_notes(page, width: int) -> None:
    """A note stands beside its code, and on a phone above."""
    boxes = page.evaluate(
        """() => [...document.querySelectorAll('.reader .row')].filter(
          row => row.checkVisibility() && !row.matches('.bare')
        ).map(row => ['.note', '.lines'].map(part => {
          const box = row.querySelector(part).getBoundingClientRect();
          return [box.left, box.top, box.right, box.bottom];
        }))"""
    )
    assert len(boxes) > 8
    bottom = -1.0
    for note, lines in boxes:
        if width > PHONE:
            assert note[2] <= lines[0] and lines[1] < note[3] and note[1] < lines[3]
        else:  # note, lines, note, lines, ...
            assert bottom <= note[1] and note[3] <= lines[1] < note[3] + 30
            bottom = lines[3]


def check_no_sideways_scroll(page) -> None:
    page.evaluate("window.scrollTo(1000, 0)")
    assert page.evaluate("window.scrollX") == 0, page.url


@pytest.mark.parametrize(("name", "language", "scheme"), READER_PAGES)
def test_a_page_that_reads_a_script_fits(name, language, scheme, open_page) -> None:
    """No line of code is cut on a desktop, no page moves sideways anywhere."""
    page = open_page(f"{language}/{name}.html", PHONE, scheme)  # opened once: that costs seconds
    check_notes(page, PHONE)
    page.evaluate("document.querySelectorAll('details.fold, .aside').forEach(d => d.open = true)")
    check_code_and_prose(page, PHONE)
    check_no_sideways_scroll(page)
    page.set_viewport_size({"width": 1280, "height": 900})
    check_notes(page, 1280)
    check_code_and_prose(page, 1280)
    check_no_sideways_scroll(page)
    dark = page.evaluate("document.body.dataset.mdColorScheme")
    assert dark == {"light": "default", "dark": "slate"}[scheme]


def test_other_pages_fit_a_phone(open_page, site: Path) -> None:
    page = open_page(OTHER_PAGES[0], PHONE)
    for path in OTHER_PAGES:
        page.goto((site / path).as_uri())
        check_no_sideways_scroll(page)


# ---- A page that reads a script ----------------------------------------------------------------


def test_pointing_at_a_name_lights_up_code_and_formula(desktop) -> None:
    page = desktop
    row = page.locator(".row", has=page.locator("#L-178"))
    row.scroll_into_view_if_needed()
    page.wait_for_timeout(100)  # scrolling closes what is open
    note = row.locator(".note code[data-name=clipped]")
    note.hover()
    assert row.locator(".code .lit").all_inner_texts() == ["clipped", "clipped"]
    row.locator(".code [data-name=ratio]").first.hover()  # from the code to the formula
    assert row.locator("math .lit").count() == 2
    assert row.locator(".code .lit").all_inner_texts() == ["ratio"] * 3
    assert page.locator(".lit").count() == 5  # in no other row
    row.locator("math [data-name=clip_coef]").first.hover()  # and from the formula
    assert set(row.locator(".code .lit").all_inner_texts()) == {"clip_coef"}
    page.mouse.move(5, 400)
    page.wait_for_timeout(500)
    assert page.locator(".lit, .name-card").count() == 0


def test_card_of_a_name_by_keyboard(desktop) -> None:
    page = desktop
    name = page.locator("[id='L-221']").locator("xpath=ancestor::div[contains(@class,'row')]")
    name = name.locator(".note code[data-name=ent_coef]")
    name.focus()
    page.wait_for_timeout(100)
    name.blur()
    name.focus()
    card = page.locator(".name-card")
    assert "--ent-coef" in card.inner_text() and "0.01" in card.inner_text()
    assert card.locator("math").count() == 1
    box = card.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 1280
    page.keyboard.press("Enter")  # into the card
    assert card.locator("a:focus").count() == 1
    page.keyboard.press("Escape")
    assert card.count() == 0
    assert page.evaluate("document.activeElement.dataset.name") == "ent_coef"


def test_card_opens_by_a_tap(open_page) -> None:
    page = open_page(DISCRETE, PHONE, has_touch=True, is_mobile=True)
    page.locator(".note code[data-name=clip_coef]").first.tap()
    assert "--clip-coef" in page.locator(".name-card").inner_text()
    box = page.locator(".name-card").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE
    page.locator("h1").first.dispatch_event("click")
    assert page.locator(".name-card").count() == 0
    left = "s => document.querySelector(s).getBoundingClientRect()"
    switch = page.evaluate(left, ".reader-bar label")
    assert page.evaluate(left, ".md-top")["left"] > switch["right"], "it covers the switch"


def test_ppo_only_shows_the_loss_the_advantages_and_the_loop(desktop) -> None:
    page = desktop
    visible = """() => [...document.querySelectorAll('.reader .row')].filter(r => r.offsetParent)
      .sort((a, b) => a.getBoundingClientRect().top - b.getBoundingClientRect().top)
      .map(r => r.dataset.ppo)"""
    whole = page.evaluate(visible)
    assert None in whole
    page.get_by_label("PPO only").check()
    only = page.evaluate(visible)
    assert len(only) > 20 and only == sorted(only) and set(only) == {"1", "2", "3"}
    first = page.evaluate(visible.replace("r.dataset.ppo", "r.textContent"))[0]
    assert "def clipped_surrogate(" in first
    assert page.locator("[id='L-43']").is_hidden()
    page.evaluate("location.hash = 'L-43'")  # what is called is shown
    page.wait_for_timeout(200)
    assert page.locator("[id='L-43']").is_visible()
    assert not page.get_by_label("PPO only").is_checked()
    assert page.evaluate(visible) == whole


@pytest.mark.parametrize("anchor", ["the-clipped-surrogate", "what-to-set"])
def test_a_heading_that_is_called_stands_below_the_bar(anchor: str, desktop) -> None:
    desktop.evaluate("anchor => { location.hash = anchor; }", anchor)
    desktop.wait_for_timeout(300)
    box = "s => document.querySelector(s).getBoundingClientRect()"
    assert desktop.evaluate(box, ":target")["top"] > desktop.evaluate(box, ".reader-bar")["bottom"]


def test_page_is_whole_without_javascript(open_page) -> None:
    page = open_page(DISCRETE, java_script_enabled=False)
    count = len((ROOT / "ppo_discrete.py").read_text().splitlines())
    assert page.locator(".reader .line[id]").count() == count
    assert page.locator("#ppo-only").is_hidden()
    fold = page.locator("details.fold").first
    assert fold.locator(".line").first.is_hidden()
    fold.locator("summary").click()
    assert fold.locator(".line").first.is_visible()


def test_a_jump_lights_up_the_line_and_has_a_way_back(open_page) -> None:
    page = open_page("en/policy-gradient.html")
    page.locator("a[href*='discrete.html#L-']").first.click()
    page.wait_for_url("**/discrete.html#L-*")
    line = page.locator(".line:target")
    top = line.bounding_box()["y"]
    assert 80 < top < 900  # below the header and the bar
    assert page.evaluate(
        "getComputedStyle(document.querySelector('.line:target')).backgroundColor"
    ) not in ("rgba(0, 0, 0, 0)", "transparent")
    page.get_by_text("← Back").click()
    page.wait_for_url("**/policy-gradient.html*")
    page.goto(page.url.replace("policy-gradient.html", "discrete.html") + "#L-30")  # folded
    assert page.locator("[id='L-30']").is_visible()
    assert not page.get_by_text("← Back").is_visible()  # nobody jumped here


def test_copy_of_a_file_has_its_numbers_beside_the_lines(open_page) -> None:
    page = open_page("repo/experiment.py.html#L-100")
    for number in (1, 100, 700):
        line = page.locator(f"[id='L-{number}']")
        link, text = line.locator("a").bounding_box(), line.locator(".text").bounding_box()
        assert abs(link["y"] + link["height"] / 2 - text["y"] - text["height"] / 2) < 2
    assert 48 < page.locator(".line:target").bounding_box()["y"] < 900


def test_copied_code_has_no_numbers(desktop) -> None:
    page = desktop
    source = (ROOT / "ppo_discrete.py").read_text().splitlines()
    block = page.locator(".code", has=page.locator("#L-178"))
    select = "e => { getSelection().selectAllChildren(e); return `${getSelection()}`; }"
    by_hand = block.locator("code").evaluate(select)
    block.hover()
    block.get_by_role("button").click()
    by_button = page.evaluate("navigator.clipboard.readText()")
    assert by_hand.rstrip() == by_button.rstrip() == "\n".join(source[172:181]).rstrip()


@pytest.mark.parametrize("path", ["en/coming-from.html", "zh/details.html", "en/debugging.html"])
def test_tables_fit_a_phone(path: str, open_page) -> None:
    """They scroll inside themselves, and their columns are wide enough to read."""
    page = open_page(path, PHONE)
    page.evaluate("window.scrollTo(1000, 0)")
    assert page.evaluate("window.scrollX") == 0
    widths = "s => [...document.querySelectorAll(s)].map(e => e.offsetWidth)"
    assert min(page.evaluate(widths, "article td")) >= 80
    assert max(page.evaluate(widths, "article td:first-child")) < 300


def test_dark_mode_follows_the_system(open_page) -> None:
    page = open_page("en/index.html", scheme="light")
    page.reload()  # the first visit is remembered
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(200)
    assert page.evaluate("document.body.dataset.mdColorScheme") == "slate"


# ---- Search ------------------------------------------------------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


@pytest.fixture(scope="module")
def search(watched, site: Path):
    """Return a function that searches on a page in a language: addresses, the best one first."""
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()

        @functools.cache
        def page_in(language: str):
            return watched.open(f"http://127.0.0.1:{server.server_port}/{language}/start.html")

        def search(language: str, query: str) -> list[str]:
            page = page_in(language)
            field = page.locator(".md-search__input")
            links = page.locator("a.md-search-result__link")
            field.fill("")
            field.press("End")
            page.wait_for_function("!document.querySelector('a.md-search-result__link')")
            field.fill(query)
            field.press("End")
            links.first.wait_for()
            found = links.evaluate_all("links => links.map(a => decodeURI(a.pathname + a.hash))")
            return [re.sub(r"^/", "", x) for x in found]

        yield search
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("language", "query", "section"),
    [
        ("en", "--ent-coef", "en/continuous.html#the-flags"),
        ("en", "--ent-coef", "en/debugging.html#symptom-cause-remedy"),
        ("en", "ent_coef", "en/continuous.html#the-flags"),
        ("en", "clipped_surrogate", "en/discrete.html#the-clipped-surrogate"),
        ("en", "approx_kl", "en/debugging.html#what-each-number-means"),
        ("zh", "clipped_surrogate", "zh/discrete.html#裁剪的替代目标"),
        ("zh", "截断", "zh/gae.html#三种结束方式"),
        ("zh", "归一化", "zh/discrete.html#优势的归一化"),
        ("zh", "--ent-coef", "zh/debugging.html#症状原因对策"),
    ],
)
def test_search_finds_the_section(language: str, query: str, section: str, search) -> None:
    found = search(language, query)
    assert section in found
    assert "copying" not in found[0]  # a recipe has every name, other pages explain them
    if query == "clipped_surrogate" and language == "en":
        assert found.index(section) == 1  # below its page
    own = "zh/" if language == "zh" else "en/"
    assert all(x.startswith(own) or (".zh." in x) == (language == "zh") for x in found)


def test_characters_of_a_chinese_word_are_found_together(search, site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    text = {x["location"]: x["title"] + x["text"] for x in index}
    found = {x for x in search("zh", "归一化") if "#" in x}
    assert found and all("归一化" in text[x] for x in found)
    apart = [x for x in text if {*"归一化"} <= {*text[x]} and "归一化" not in text[x]]
    assert apart, "nothing shows the difference"
