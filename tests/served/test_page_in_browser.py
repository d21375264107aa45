"""The live page in a headless Chromium, on a served cluster of its own: chat, heatmap, a shard's death and return.

CHROMIUM names the browser where it has another name than Debian's; without one, and without Playwright, all is skipped.
PAGE_PICTURES=1 writes the pictures of docs/page.md.
"""

import itertools
import json
import os
import re
import shutil

import pytest
import torch
from lora_tools import write_adapter
from page_tools import QUESTION, Cluster, ask, cielab_lightness, give_key, lit, picture, shard_card
from serving_tools import Serving, wait_until

from cluster.checkpoint.opening import open_checkpoint
from cluster.serving.admission.api_keys import new_key

playwright = pytest.importorskip("playwright.sync_api")
axe_playwright = pytest.importorskip("axe_playwright_python.sync_playwright")

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")]

TALL = {"width": 1440, "height": 1200}  # for pictures
DESKTOP, PHONE = {"width": 1440, "height": 900}, {"width": 360, "height": 740}
PATIENCE_MS = 60_000


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    key, line = new_key("root")
    (folder / "admins").write_text(line)
    options = ["--expert-shards", "3", "--attention-replicas", "2", "--admin-keys-file", str(folder / "admins")]
    serving = Serving("demo", folder, *options)
    try:
        serving.wait_ready(400.0)
        [url] = re.findall(r"HTTP     (http://\S+)/v1", serving.out.read_text())
        yield Cluster(url, key, serving)
    finally:
        serving.end()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


def is_fault(message):
    """A refused call, which the page shows, is none; a breach of the page's policy is one."""
    return message.type == "error" and not message.text.startswith("Failed to load resource")


@pytest.fixture
def visit(cluster, browser):
    """Opens the page; at the end no page may have asked another origin for anything, or have had an error."""
    asked, faults, contexts = [], [], []

    def open_page(viewport=DESKTOP, **options):
        context = browser.new_context(viewport=viewport, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if is_fault(message) else None)
        page.goto(cluster.url)
        playwright.expect(page.locator("#state")).to_have_attribute("data-state", "serving", timeout=PATIENCE_MS)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert {url for url in asked if not url.startswith(cluster.url)} == set()
    assert faults == []


def test_an_answer_streams_and_the_experts_light_up(visit):
    page = visit(TALL)
    page.evaluate(
        """() => {
            window.lengths = [];
            new MutationObserver(() => {
              const text = document.querySelector(".turn.assistant .text");
              if (text) window.lengths.push(text.textContent.length);
            }).observe(document.getElementById("log"), {childList: true, subtree: true, characterData: true});
        }"""
    )
    dark = page.locator("#heat").screenshot()
    before = lit(page)
    page.get_by_role("button", name=QUESTION).click()
    playwright.expect(page.locator("#heat")).not_to_have_attribute("data-lit", str(before))
    assert page.locator("#heat").screenshot() != dark
    playwright.expect(page.locator(".turn.assistant")).not_to_have_attribute("aria-busy", "true")
    grown = sorted(set(page.evaluate("window.lengths")))
    assert len(grown) > 3  # piece by piece
    assert "copies compute its rows" in page.locator(".turn.assistant .text").text_content()
    playwright.expect(page.locator(".turn.assistant .note")).to_contain_text("tokens/s")
    playwright.expect(page.locator("#heat-summary")).to_contain_text("Busiest in the last minute")
    playwright.expect(page.locator("[data-tile=first] .number")).to_contain_text(re.compile(r"\d m?s"))
    before = lit(page)
    page.get_by_label("Message").fill("What is an expert?")
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#heat")).not_to_have_attribute("data-lit", str(before))
    picture(page, "page-light")


def test_an_administrator_kills_a_shard_and_sees_it_come_back(visit, cluster):
    page = visit(TALL, color_scheme="dark")
    before = ask(page)
    card = shard_card(page, 1)
    assert not card.get_by_role("button").is_visible()
    give_key(page, cluster.key)
    playwright.expect(page.locator("#admin-text")).to_have_text("You may change this cluster, as root.")
    respawns, pid = cluster.shard(1)["respawns"], cluster.shard(1)["process"]["pid"]
    card.get_by_role("button", name="Kill shard 1").click()
    playwright.expect(page.get_by_role("dialog", name="Kill shard 1?")).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    assert cluster.shard(1)["respawns"] == respawns
    card.get_by_role("button", name="Kill shard 1").click()
    page.get_by_role("dialog").get_by_role("button", name="Kill", exact=True).click()
    playwright.expect(card.locator(".pill")).not_to_have_text("up", timeout=PATIENCE_MS)
    picture(page, "page-dark")
    playwright.expect(page.locator("#events li", has_text="shard 1 died").first).to_be_visible()
    playwright.expect(card.locator(".pill")).to_have_text("up", timeout=PATIENCE_MS)
    playwright.expect(card.locator(".facts")).to_contain_text(f"respawned {respawns + 1} time")
    assert cluster.shard(1)["process"]["pid"] != pid
    assert ask(page) == before  # greedy: no token has changed


def test_an_administrator_rebalances_and_scales(visit, cluster):
    page = visit()
    give_key(page, cluster.key)
    page.get_by_role("button", name="Rebalance").click()
    page.get_by_role("dialog").get_by_role("button", name="Rebalance").click()
    playwright.expect(page.locator("#admin-result")).to_contain_text("experts moved", timeout=PATIENCE_MS)
    page.get_by_role("spinbutton", name="Expert shards").fill("65")
    page.get_by_role("button", name="Scale: expert shards").click()
    page.get_by_role("dialog").get_by_role("button", name="Scale").click()
    playwright.expect(page.locator("#admin-result")).to_contain_text("ask for 1 to 64")  # a readable refusal
    page.get_by_role("spinbutton", name="Expert shards").fill("2")
    page.get_by_role("button", name="Scale: expert shards").click()
    page.get_by_role("dialog").get_by_role("button", name="Scale").click()
    playwright.expect(page.locator(".part.shard")).to_have_count(2, timeout=PATIENCE_MS)
    playwright.expect(page.locator("#events")).to_contain_text("moved from shard 2")


@pytest.fixture
def adapter(tmp_path):
    """Of the demo's first queries."""
    size = open_checkpoint("demo").config.hidden_size
    pair = torch.randn(2, size), torch.randn(size, 2)
    return write_adapter(tmp_path / "law", {"model.layers.0.self_attn.q_proj": pair}, layers_to_transform=[0])


def test_an_administrator_loads_an_adapter_and_unloads_it(visit, cluster, adapter):
    page = visit()
    give_key(page, cluster.key)
    bodies = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if "completions" in request.url else None)
    page.get_by_label("Adapter", exact=True).fill("law")
    for directory, result in (("/no/adapter", "is not a directory"), (str(adapter), "The adapter law is loaded")):
        page.get_by_label("Directory").fill(directory)
        page.get_by_role("button", name="Load adapter").click()
        page.get_by_role("dialog").get_by_role("button", name="Load", exact=True).click()
        playwright.expect(page.locator("#admin-result")).to_contain_text(result, timeout=PATIENCE_MS)
    playwright.expect(page.locator("#adapters li")).to_contain_text("law", timeout=PATIENCE_MS)
    page.locator(".sampling summary").click()
    page.get_by_role("combobox", name="LoRA adapter").select_option("law")
    ask(page)
    assert bodies[-1]["model"] == "law"
    found = axe_playwright.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    page.get_by_role("button", name="Unload law").click()
    page.get_by_role("dialog").get_by_role("button", name="Unload", exact=True).click()
    playwright.expect(page.locator("#adapters-part")).to_be_hidden(timeout=PATIENCE_MS)
    ask(page)
    assert "model" not in bodies[-1]


def test_without_a_key_the_page_is_read_only(visit):
    page = visit()
    playwright.expect(page.locator("#admin-text")).to_contain_text("Read-only")
    assert page.locator("button", has_text=re.compile("^(Kill|Rebalance|Scale)$")).filter(visible=True).count() == 0
    status = page.evaluate(
        """async () => (await fetch("cluster/kill-shard", {
            method: "POST", headers: {"content-type": "application/json"}, body: '{"shard_id": 0}'})).status"""
    )
    assert status == 403


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_axe_finds_nothing(visit, cluster, viewport, scheme):
    page = visit(viewport, color_scheme=scheme, reduced_motion="reduce")
    ask(page)
    give_key(page, cluster.key)
    page.locator("#as-table summary").click()
    page.locator(".sampling summary").click()
    playwright.expect(page.locator("#admin-actions")).to_be_visible()
    if viewport is PHONE and scheme == "dark":
        picture(page, "page-phone")
    found = axe_playwright.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    page.get_by_role("button", name="Key", exact=True).click()
    found = axe_playwright.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_the_keyboard_reaches_everything(visit):
    page = visit()
    page.keyboard.press("Tab")
    playwright.expect(page.get_by_role("link", name="Skip to the cluster")).to_be_focused()
    page.get_by_label("Message").focus()
    page.keyboard.type("What is an expert?")
    page.keyboard.press("Enter")
    playwright.expect(page.locator(".turn.assistant")).to_have_count(1)
    playwright.expect(page.locator(".turn.assistant")).not_to_have_attribute("aria-busy", "true")
    wanted = set(
        page.evaluate(
            """() => [...document.querySelectorAll("button, input, select, textarea, summary")]
                .filter((each) => each.checkVisibility() && !each.disabled && each.name !== "mode")
                .map((each, place) => (each.dataset.place = place, String(place)))"""
        )
    )
    page.evaluate("document.activeElement.blur()")
    reached, outlines = set(), set()
    for _ in range(60):
        page.keyboard.press("Tab")
        place, outline, mode = page.evaluate(
            """() => {
                const at = document.activeElement;
                const style = getComputedStyle(at.name === "mode" ? at.nextElementSibling : at);
                return [at.dataset.place ?? "", style.outlineStyle, at.name === "mode"];
            }"""
        )
        reached.add(place)
        if place or mode:
            outlines.add(outline)
    assert wanted - reached == set()
    assert outlines == {"solid"}  # the focus is seen
    page.locator("input[name=mode][value=now]").focus()
    page.keyboard.press("ArrowRight")
    playwright.expect(page.locator("input[name=mode][value=mean]")).to_be_checked()
    page.get_by_role("button", name="Key", exact=True).focus()
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#key-input")).to_be_focused()
    page.keyboard.press("Escape")
    playwright.expect(page.get_by_role("button", name="Key", exact=True)).to_be_focused()


@pytest.mark.parametrize("width", [320, 360, 768, 1080, 1920])
def test_no_width_scrolls_sideways(visit, width):
    page = visit({"width": width, "height": 800})
    ask(page, "a" * 300)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_dark_mode_follows_the_system_and_the_button_goes_before(visit):
    def ground(page):
        return sum(map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]))

    page = visit(color_scheme="dark")
    assert ground(page) < 120
    page.get_by_role("button", name="Theme").click()
    playwright.expect(page.get_by_role("button", name="Theme: light")).to_be_visible()
    assert ground(page) > 600
    page.emulate_media(color_scheme="light")
    page.get_by_role("button", name="Theme").click()
    assert ground(page) < 120


def test_an_answer_can_be_stopped_and_a_new_chat_knows_nothing_of_it(visit):
    page = visit()
    bodies = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if "completions" in request.url else None)
    page.get_by_label("Message").fill(QUESTION)
    page.keyboard.press("Enter")
    page.get_by_role("button", name="New chat").click()
    playwright.expect(page.locator(".turn")).to_have_count(0)
    playwright.expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert "copies compute" in ask(page)
    assert [len(body["messages"]) for body in bodies] == [1, 1]
    page.route("**/v1/chat/completions", lambda route: None)  # no answer comes
    page.get_by_label("Message").fill(QUESTION)
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Stop").press("Enter")
    playwright.expect(page.locator(".turn.assistant .note").last).to_contain_text("Stopped.")
    playwright.expect(page.get_by_label("Message")).to_be_focused()


def test_an_answer_outlives_a_killed_haproxy(visit, cluster):
    page, bodies = visit(), []
    page.on("request", lambda asked: bodies.append(asked.post_data_json) if asked.method == "POST" else None)
    page.evaluate("document.getElementById('temperature').value = '0'")
    whole = ask(page)
    for _ in range(10):  # until one is killed before the answer's end
        page.get_by_role("button", name="New chat").click()
        page.get_by_label("Message").fill(QUESTION)
        page.get_by_role("button", name="Send").click()
        answer = page.locator(".turn.assistant .text")
        playwright.expect(answer).not_to_be_empty()
        cluster.serving.kill("haproxy")
        page.locator(".turn.assistant:not([aria-busy])").wait_for()
        assert answer.text_content() == whole
        wait_until(lambda: page.request.get(f"{cluster.url}/health").ok)
        if any(body.get("continue_from") for body in bodies):
            break
    assert any(body.get("continue_from") for body in bodies)
    assert page.locator(".turn.failed").count() == 0


def test_an_answer_is_text_whatever_stands_in_it(visit):
    page = visit()
    evil = "<img src=x onerror=\"document.title='owned'\"><b>bold</b> **stars**"
    piece = json.dumps({"choices": [{"delta": {"content": evil}}]})
    stream = f"data: {piece}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=stream, content_type="text/event-stream"))
    assert ask(page) == evil
    assert page.locator("#log img, #log b").count() == 0
    assert "owned" not in page.title()


def test_errors_are_readable_and_the_page_comes_back(visit):
    page = visit()
    error = json.dumps({"error": {"message": "the server is full: try again"}})
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=200, body=f"data: {error}\n\n", content_type="text/event-stream"),
    )
    ask(page)
    playwright.expect(page.locator(".turn.failed .note")).to_have_text("the server is full: try again")
    page.unroute("**/v1/chat/completions")
    assert "copies compute" in ask(page)  # the question without an answer is not in the conversation
    broken = "event: beat\ndata: {\n\n"
    page.route("**/cluster/live", lambda route: route.fulfill(body=broken, content_type="text/event-stream"))
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    playwright.expect(page.get_by_role("alert")).to_contain_text("No news of the cluster")
    page.unroute("**/cluster/live")
    playwright.expect(page.locator("#state")).to_have_attribute("data-state", "serving")
    playwright.expect(page.get_by_role("alert")).to_be_hidden()


def test_a_server_that_asks_for_a_key_says_so(visit):
    page = visit()
    page.evaluate("sessionStorage.setItem('moe-cluster-key', 'moe-wrong')")
    page.reload()  # an open server takes no notice of it
    playwright.expect(page.locator("#state")).to_have_attribute("data-state", "serving")
    sent = []
    page.on("request", lambda request: sent.append(request.headers.get("authorization")))
    ask(page)
    assert sent == ["Bearer moe-wrong"]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_heatmaps_colours_are_even_steps_of_lightness(visit, theme):
    """L* of CIELAB, worked out here from sRGB: always on, away from the ground, no step far from the mean."""
    page = visit()
    colours = page.evaluate(f"import('/page/colour.js').then((module) => module.ramp('{theme}'))")
    lightness = [cielab_lightness(*map(int, re.findall(r"\d+", colour))) for colour in colours]
    steps = [after - before for before, after in itertools.pairwise(lightness)]
    mean = (lightness[-1] - lightness[0]) / len(steps)
    assert abs(lightness[-1] - lightness[0]) > 45
    assert all(0.3 < step / mean < 1.9 for step in steps)


def test_a_page_that_nobody_sees_asks_for_nothing(visit, cluster):
    page = visit()
    page.evaluate(
        """() => {
            Object.defineProperty(document, "hidden", {value: true, configurable: true});
            document.dispatchEvent(new Event("visibilitychange"));
        }"""
    )
    page.wait_for_timeout(300)
    seen = []
    page.on("request", lambda request: seen.append(request.url))
    page.wait_for_timeout(1500)
    assert seen == []
    wait_until(lambda: cluster.get("/cluster")["beat"]["number"] == 1)  # the reader had ended: this call began one
