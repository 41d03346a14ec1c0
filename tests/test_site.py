"""The site in a browser: what a reader sees and does on a page that reads a script."""

import functools
import http.server
import importlib.util
import threading
from pathlib import Path

import pytest

from tests.helpers import ROOT

CHROMIUM = Path("/usr/bin/chromium")
ARGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
PAGES = ("en/discrete.html", "zh/discrete.html")
PHONE = 412

pytestmark = pytest.mark.skipif(
    not (importlib.util.find_spec("playwright") and CHROMIUM.exists()),
    reason="needs the package playwright and chromium",
)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path):
    """Serve the site, as a reader gets it."""
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    """Return a function that opens a page; whatever it complains of or fetches fails the test."""
    contexts, wrong = [], []

    def open_page(path: str, width: int = 1280, scheme: str = "light", **options):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, **options
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(120_000)  # a loaded machine is slow, not wrong
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith(address) else wrong.append(r.url))
        page.goto(f"{address}/{path}")
        page.wait_for_load_state("networkidle")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


@pytest.mark.parametrize(
    ("width", "scheme"), [(1280, "light"), (1440, "dark"), (PHONE, "light"), (PHONE, "dark")]
)
@pytest.mark.parametrize("path", PAGES)
def test_page_fits(path: str, width: int, scheme: str, open_page) -> None:
    """No line of code is cut on a desktop, no page moves sideways anywhere."""
    page = open_page(path, width, scheme)
    page.evaluate("document.querySelectorAll('details.fold, .aside').forEach(d => d.open = true)")
    page.evaluate("window.scrollTo(1000, 0)")
    assert page.evaluate("window.scrollX") == 0
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
    dark = page.evaluate("document.body.dataset.mdColorScheme")
    assert dark == {"light": "default", "dark": "slate"}[scheme]


@pytest.mark.parametrize("path", PAGES)
def test_note_stands_beside_its_code_and_on_a_phone_above(path: str, open_page) -> None:
    boxes = """() => [...document.querySelectorAll('.reader .row')].filter(
        row => row.checkVisibility() && !row.matches('.bare')
      ).map(row => ['.note', '.lines'].map(part => {
        const box = row.querySelector(part).getBoundingClientRect();
        return [box.left, box.top, box.right, box.bottom];
      }))"""
    beside = open_page(path, 1280).evaluate(boxes)
    assert len(beside) > 40
    for note, lines in beside:
        assert note[2] <= lines[0] and lines[1] < note[3] and note[1] < lines[3]
    above = open_page(path, PHONE).evaluate(boxes)
    assert len(above) == len(beside)
    bottom = -1.0
    for note, lines in above:  # note, lines, note, lines, ...
        assert bottom <= note[1] and note[3] <= lines[1] < note[3] + 30
        bottom = lines[3]


def test_pointing_at_a_name_lights_up_code_and_formula(open_page) -> None:
    page = open_page(PAGES[0])
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


def test_card_of_a_name_by_keyboard(open_page) -> None:
    page = open_page(PAGES[0])
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
    page = open_page(PAGES[0], PHONE, has_touch=True, is_mobile=True)
    page.locator(".note code[data-name=clip_coef]").first.tap()
    assert "--clip-coef" in page.locator(".name-card").inner_text()
    box = page.locator(".name-card").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE
    page.locator("h1").first.dispatch_event("click")
    assert page.locator(".name-card").count() == 0


def test_ppo_only_shows_the_loss_the_advantages_and_the_loop(open_page) -> None:
    page = open_page(PAGES[0])
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


def test_page_is_whole_without_javascript(open_page) -> None:
    page = open_page(PAGES[0], java_script_enabled=False)
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
    page.wait_for_load_state("networkidle")
    line = page.locator(".line:target")
    top = line.bounding_box()["y"]
    assert 80 < top < 900  # below the header and the bar
    assert page.evaluate(
        "getComputedStyle(document.querySelector('.line:target')).backgroundColor"
    ) not in ("rgba(0, 0, 0, 0)", "transparent")
    page.get_by_text("← Back").click()
    page.wait_for_url("**/policy-gradient.html*")
    page = open_page("en/discrete.html#L-30")  # folded
    assert page.locator("[id='L-30']").is_visible()


def test_copy_of_a_file_has_its_numbers_beside_the_lines(open_page) -> None:
    page = open_page("repo/experiment.py.html#L-100")
    for number in (1, 100, 700):
        line = page.locator(f"[id='L-{number}']")
        link, text = line.locator("a").bounding_box(), line.locator(".text").bounding_box()
        assert abs(link["y"] + link["height"] / 2 - text["y"] - text["height"] / 2) < 2
    assert 48 < page.locator(".line:target").bounding_box()["y"] < 900
    assert page.get_by_text("← Back").is_visible()


def test_copied_code_has_no_numbers(open_page) -> None:
    page = open_page(PAGES[0], permissions=["clipboard-read", "clipboard-write"])
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
    page = open_page(PAGES[0], scheme="light")
    page.reload()  # the first visit is remembered
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(200)
    assert page.evaluate("document.body.dataset.mdColorScheme") == "slate"
