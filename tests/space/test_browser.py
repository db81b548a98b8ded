"""The Space as a person meets it, in headless Chromium: `make test-browser`.

Skipped where there is no Playwright or no Chromium. With SPACE_MODEL and SPACE_SHOTS set, it also takes the pictures
of docs/ with that model.
"""

import os
import re
import shutil
import time
from pathlib import Path

import pytest
from space_load import bad_files, good_picture, running_space
from transformers import AutoTokenizer, GenerationConfig

from granulon.hub.assemble import assemble_tiny

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium")]

QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    model = assemble_tiny(folder / "tiny")
    # Random weights say long things without a space; streams are cut at spaces, so they get some, and no end.
    tokenizer, settings = AutoTokenizer.from_pretrained(model), GenerationConfig.from_pretrained(model)
    settings.suppress_tokens = [*settings.suppress_tokens, tokenizer.eos_token_id]
    settings.sequence_bias = [[tokenizer(" ")["input_ids"], 4.0]]
    settings.save_pretrained(model)
    with running_space(model, folder) as (address, _):
        yield address


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*QUIET, "--disable-sync"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, address):
    """A function that opens the page with options of the browser's context; nothing may leave this machine."""
    contexts, foreign, broken = [], [], []

    def visit(query="", **options):
        contexts.append(chromium.new_context(**({"viewport": DESKTOP} | options)))
        page = contexts[-1].new_page()
        page.set_default_timeout(15_000)
        page.on("request", lambda request: note(request.url))
        page.on("pageerror", lambda error: broken.append(str(error)))
        page.goto(f"{address}/{query}")
        page.get_by_role("button", name="Ask", exact=True).wait_for()
        return page

    def note(url):
        if not url.startswith((address, "data:", "blob:")):
            foreign.append(url)

    yield visit
    for context in contexts:
        context.close()
    assert not foreign, "the page fetches from elsewhere"
    assert not broken, "a script of the page failed"


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(good_picture())
    return path


def upload(page, path):
    page.locator("#image input[type=file]").set_input_files(path)
    page.locator("#image img").wait_for()


def ask(page, question="What is it?", wait=True):
    page.get_by_role("textbox", name="Question", exact=True).fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator("#status [aria-busy=true]").wait_for()
    if wait:
        answered(page)


def answered(page):
    page.locator("#seen figure.clusters").wait_for()
    page.locator("#status [aria-busy=false]").wait_for()


def tile(page, number):
    return page.locator("#facts dd").nth(number).inner_text().splitlines()[0]


def drawn(page, where="#seen"):
    return page.locator(f"{where} .picture svg").evaluate("(svg) => svg.innerHTML.replace(/f\\d+[cl]/g, '')")


def test_upload_ask_streamed_answer_and_clusters(visit, picture):
    page = visit("?temperature=1&tokens=200")
    upload(page, picture)
    # Every text that the answer shows is noted, to see it grow.
    page.evaluate("""() => {
      window.texts = [];
      new MutationObserver(() => window.texts.push(document.querySelector('#answer').innerText))
        .observe(document.querySelector('#answer'), {subtree: true, childList: true, characterData: true});
    }""")
    ask(page)
    texts = page.evaluate("window.texts")
    lengths = sorted({len(text) for text in texts if "appears" not in text})
    assert len(lengths) > 3, "the answer came in pieces"
    assert tile(page, 0) in ("coarse", "medium", "fine") and int(tile(page, 1)) > 64
    assert page.locator("#bars li").count() == 3 and page.locator("#bars li.chosen").count() == 1
    clusters = page.locator("#seen .picture g")
    assert clusters.count() == page.locator("#seen .legend button").count() > 3
    assert page.locator("#seen .picture").bounding_box()["width"] > 300


def test_pointing_at_a_cluster_and_clicking_it_shows_its_score_and_share(visit, picture):
    page = visit()
    upload(page, picture)
    ask(page)
    detail, entry = page.locator("#seen .detail"), page.locator("#seen .legend button").nth(1)
    hint = detail.inner_text()
    page.locator("#seen .picture g[data-cluster='1'] .fill").hover(force=True)
    said = detail.inner_text()
    assert re.fullmatch(
        r"Cluster 2, sky blue: score \d\.\d\d, \d+% of the image; without it the answer loses -?\d+\.\d\d nats", said
    )
    assert "on" in entry.get_attribute("class")
    page.mouse.move(2, 2)
    assert detail.inner_text() == hint
    page.locator("#seen .picture g[data-cluster='1'] .fill").click(force=True)
    page.mouse.move(2, 2)
    assert detail.inner_text() == said, "a click keeps it"
    assert entry.get_attribute("aria-pressed") == "true"
    entry.click()
    page.locator("#question textarea, #question input").first.focus()
    page.mouse.move(2, 2)
    assert detail.inner_text() == hint, "a second click lets it go"


def test_a_forced_level_changes_the_clusters_and_a_view_the_tokens(visit, picture):
    page = visit("?tokens=20")
    upload(page, picture)
    seen = {}
    for level, kept in (("coarse", 5), ("fine", 20)):
        page.locator("#level").get_by_text(level, exact=True).click()
        ask(page)
        seen[level] = drawn(page)
        assert tile(page, 0) == level and int(tile(page, 1)) <= 64 + kept
        assert "your choice" in page.locator("#bars li.chosen").inner_text()
    assert seen["coarse"] != seen["fine"]
    page.get_by_text("More settings").click()
    page.locator("#view").get_by_text("semantic", exact=True).click()
    ask(page)
    assert int(tile(page, 1)) <= 20


def test_the_first_screen_has_one_heading_and_nothing_empty(visit):
    page = visit()
    assert page.get_by_role("heading").count() == 1
    for name in ("facts", "bars", "seen", "compared"):
        assert not page.locator(f"#{name}").is_visible(), name
    assert "arxiv.org" in page.locator("#notice a").last.get_attribute("href")
    assert page.locator(".example img").count() == 3


def test_what_carried_the_answer_is_a_heat_map_and_a_sorted_list(visit, picture):
    page = visit()
    upload(page, picture)
    ask(page)
    page.locator("#seen .why input").wait_for()
    before = page.locator("#seen .legend b").all_inner_texts()
    page.locator("#seen .why input").check()
    entries = page.locator("#seen .legend li").evaluate_all(
        "(items) => items.map((e) => [e.getBoundingClientRect().top, parseFloat(e.querySelector('.nats').innerText)])"
    )
    page.wait_for_timeout(400)  # the colours change slowly
    nats = [value for _, value in sorted(entries)]
    assert nats == sorted(nats, reverse=True) and len(nats) == len(before) > 3
    fills = page.locator("#seen .picture .fill").evaluate_all(
        "(all) => all.map((e) => getComputedStyle(e).fillOpacity)"
    )
    assert len(set(fills)) > 1


def test_a_second_question_goes_on_and_another_image_begins_again(visit, picture, tmp_path):
    page = visit("?tokens=8")
    upload(page, picture)
    ask(page)
    ask(page, "And why?")
    assert page.locator("#answer .message.user, #answer .user .message").count() >= 2
    text = page.locator("#answer").inner_text()
    assert text.index("What is it?") < text.index("And why?")
    (tmp_path / "other.png").write_bytes(good_picture(5))
    page.get_by_role("button", name=re.compile("Clear|Remove", re.IGNORECASE)).first.click()
    page.wait_for_function("!document.querySelector('#seen figure')")
    assert "What is it?" not in page.locator("#answer").inner_text()


def test_an_error_stands_in_its_place_and_nowhere_else(visit, picture):
    page = visit()
    page.get_by_role("textbox", name="Question", exact=True).fill("What is it?")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator("#status [role=alert]").wait_for()
    assert page.locator("#status").inner_text() == "There is no image yet; upload one, or take an example."
    page.wait_for_timeout(500)
    assert page.locator(".toast-wrap .toast-body").count() == 0
    assert page.get_by_text("Error", exact=True).count() == 0


def test_all_levels_side_by_side(visit, picture):
    page = visit()
    upload(page, picture)
    page.get_by_role("textbox", name="Question", exact=True).fill("What is it?")
    page.get_by_role("button", name="Compare all levels").click()
    page.locator("#compared figure").nth(2).wait_for()
    page.wait_for_timeout(2500)  # it comes into view
    boxes = [page.locator("#compared section").nth(number).bounding_box() for number in range(3)]
    assert boxes[0]["x"] < boxes[1]["x"] < boxes[2]["x"] and abs(boxes[0]["y"] - boxes[2]["y"]) < 2
    assert page.locator("#compared .answer").count() == 3


def test_stop_ends_a_long_answer(visit, picture):
    page = visit("?tokens=512&temperature=1")
    upload(page, picture)
    ask(page, wait=False)
    page.get_by_role("button", name="Stop").click()
    page.wait_for_timeout(1000)
    text = page.locator("#answer").inner_text()
    page.wait_for_timeout(1500)
    assert page.locator("#answer").inner_text() == text
    page.locator("#status [aria-busy=false]").wait_for()
    start = time.time()
    ask(page, wait=False)  # the model is free for the next question at once
    assert time.time() - start < 5
    page.locator("#status [aria-busy=false]").wait_for(timeout=60_000)
    assert len(page.locator("#answer").inner_text()) > len(text)


def test_an_example_and_enter_are_enough_by_keyboard(visit):
    page = visit()

    def tab_to(reached):
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate(f"(() => {{ const e = document.activeElement; return {reached}; }})()"):
                return
        pytest.fail(f"no way by keyboard to {reached}")

    tab_to("e.innerText?.startsWith('fine:') || e.closest?.('button')?.innerText?.startsWith('fine:')")
    page.keyboard.press("Enter")
    page.locator("#image img").wait_for()
    page.wait_for_function("document.querySelector('#question textarea, #question input').value !== ''")
    page.locator("body").press("Home")
    page.get_by_role("textbox", name="Question", exact=True).focus()
    page.keyboard.press("Enter")
    answered(page)
    tab_to("e.matches('#seen .legend button')")
    assert page.locator("#seen .detail").inner_text().startswith("Cluster 1, orange: score")
    page.keyboard.press("Tab")
    assert page.locator("#seen .detail").inner_text().startswith("Cluster 2, sky blue: score")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", "focus is seen"


def test_everything_to_be_used_has_a_name_for_screen_readers(visit, picture):
    page = visit()
    upload(page, picture)
    ask(page)
    nameless = page.evaluate("""() => [...document.querySelectorAll('button, input, textarea, select')]
      .filter((e) => e.offsetParent !== null && e.type !== 'file')
      .filter((e) => !(e.innerText || e.getAttribute('aria-label') || e.title || e.labels?.length
        || e.getAttribute('aria-labelledby'))).map((e) => e.outerHTML.slice(0, 200))""")
    assert not nameless
    assert page.locator("#status [aria-live=polite]").count() == 1
    assert "clusters over the image" in page.locator("#seen .picture img").get_attribute("alt")
    assert page.locator("h1").count() == 1 and "not for clinical use" in page.locator("#intro").inner_text()


def contrast(page, selector):
    """The contrast of an element's text with what lies behind it (WCAG 2)."""
    return page.locator(selector).first.evaluate("""(element) => {
      const parse = (text) => text.match(/[\\d.]+/g).map(Number);
      const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92
        : ((v + 0.055) / 1.055) ** 2.4).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
      let behind = element, colour;
      do { colour = parse(getComputedStyle(behind).backgroundColor); behind = behind.parentElement; }
      while (behind && colour.length > 3 && colour[3] === 0);
      const [a, b] = [light(parse(getComputedStyle(element).color)), light(colour)].sort((x, y) => y - x);
      return (a + 0.05) / (b + 0.05);
    }""")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(scheme, visit, picture):
    page = visit(color_scheme=scheme)
    upload(page, picture)
    ask(page)
    light = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0] > 128")
    assert light == (scheme == "light")
    for selector in ("#intro p", "#answer .message", ".tiles dt", ".tiles dd", ".tiles small", "#bars .name",
                     "#bars .mark", "#seen .detail", "#seen .legend button", "#seen .legend i"):  # fmt: skip
        assert contrast(page, selector) >= 4.5, selector


def test_a_phone_needs_no_sideways_scrolling(visit, picture):
    page = visit(viewport=PHONE, is_mobile=True, has_touch=True)
    upload(page, picture)
    ask(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.wait_for_timeout(2000)  # it comes into view
    page.mouse.move(2, 2)  # a phone has no pointer that rests where "Ask" was
    page.locator("#seen .picture g[data-cluster='0'] text").tap(force=True)  # the number stands on its own cluster
    assert page.locator("#seen .detail").inner_text().startswith("Cluster 1, orange: score")
    in_view = (
        "(id) => { const r = document.querySelector(id).getBoundingClientRect(); return r.top < innerHeight - 40; }"
    )
    assert page.evaluate(in_view, "#status"), "the answer came into view"
    page.get_by_role("button", name="Compare all levels").click()
    page.locator("#compared figure").nth(2).wait_for()
    page.wait_for_timeout(1500)
    assert page.evaluate(in_view, "#compared")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_a_link_carries_question_and_settings(visit):
    page = visit()
    page.get_by_role("textbox", name="Question", exact=True).fill("How many <b>trees</b> & houses?")
    page.locator("#level").get_by_text("fine", exact=True).click()
    page.get_by_text("More settings").click()
    page.get_by_role("button", name="Share this question").click()
    page.wait_for_function("document.querySelector('#link textarea, #link input').value !== ''")
    link = page.locator("#link textarea, #link input").first.input_value()
    other = visit(link.partition("/?")[2] and "?" + link.partition("/?")[2])
    other.wait_for_function("document.querySelector('#question textarea, #question input').value !== ''")
    assert other.get_by_role("textbox", name="Question", exact=True).input_value() == "How many <b>trees</b> & houses?"
    assert other.locator("#level input:checked").get_attribute("value") == "fine"


@pytest.mark.parametrize("name", ["text.png", "cut.png", "bomb.png"])
def test_a_bad_upload_shows_an_error_and_the_page_keeps_working(name, visit, picture, tmp_path):
    path = tmp_path / name
    path.write_bytes(bad_files(good_picture())[name])
    page = visit()
    page.locator("#image input[type=file]").set_input_files(path)
    page.wait_for_timeout(1000)
    page.get_by_role("textbox", name="Question", exact=True).fill("What is it?")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_text(re.compile("This image (cannot be read|is not an image|has 13000)")).first.wait_for()
    page.reload()
    page.get_by_role("button", name="Ask", exact=True).wait_for()
    upload(page, picture)
    ask(page)


@pytest.mark.skipif("SPACE_SHOTS" not in os.environ, reason="pictures for docs/ are taken on demand")
def test_pictures_for_the_documentation(chromium, tmp_path):
    looks = {
        "space": {"viewport": DESKTOP},
        "space-dark": {"viewport": {"width": 900, "height": 900}, "color_scheme": "dark"},
        "space-phone": {"viewport": PHONE, "is_mobile": True, "has_touch": True, "device_scale_factor": 2},
    }
    with running_space(Path(os.environ["SPACE_MODEL"]).resolve(), tmp_path) as (address, _):
        for name, options in looks.items():
            page = chromium.new_context(**options).new_page()
            page.goto(address)
            page.get_by_text("medium: What is this?").click()
            page.wait_for_function("document.querySelector('#question textarea, #question input').value !== ''")
            page.locator("#image img").wait_for()
            page.get_by_role("button", name="Ask", exact=True).click()
            answered(page)
            if name == "space":
                page.get_by_role("button", name="Compare all levels").click()
                page.locator("#compared figure").nth(2).wait_for()
            if name == "space-dark":
                page.locator("#seen .why input").check()
            page.locator("#seen .legend button").nth(1).focus()
            page.wait_for_timeout(800)
            page.evaluate("window.scrollTo(0, 0)")
            page.screenshot(path=Path(os.environ["SPACE_SHOTS"]) / f"{name}.png", full_page=True)
            page.context.close()
