"""The page of `engram serve`, in headless Chromium where there is one, and what holds without."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tiny
from chrome import BROWSER, Page
from serving import FakeSlots, Running, ask

from engram.builders.tokenizer import load_tokenizer
from engram.quantize.package import ExportConfig, export_package
from engram.runtime.engine import Model
from engram.runtime.server import PAGE
from engram.runtime.slots_torch import TorchSlots

TEXT = PAGE.read_text("utf-8")
TOKENS = "[...document.querySelectorAll('.assistant .token')]"
browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web")
    export_package(ExportConfig(source=tiny.write_checkpoint(folder), out=folder / "package"))
    return folder / "package"


@pytest.fixture(scope="module")
def running(package: Path) -> Iterator[Running]:
    served = Running(TorchSlots(Model.open(package), 2), package)
    yield served
    served.close()


def say(page: Page, words: str, tokens: int = 12) -> None:
    """Type a message and press Enter."""
    page.js(f"document.getElementById('most').value = {tokens}; document.getElementById('message').focus()")
    page.type(words)
    page.key("Enter", 13, "\r")


def said(page: Page) -> None:
    page.wait("document.getElementById('status').textContent.startsWith('The model wrote')")


def test_the_page_is_one_file_that_takes_nothing_from_elsewhere() -> None:
    assert not re.search(r"https?://|//cdn|@import|url\(|\bsrc=|\bhref=", TEXT)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|\son\w+=", TEXT)
    assert not re.search(r"\sstyle=", TEXT), "the policy would refuse it"


def test_the_policy_lets_nothing_in_but_the_pages_own_code(running: Running) -> None:
    status, headers, text = ask(running.port, "/")
    policy = headers["content-security-policy"]
    assert (status, text) == (200, TEXT) and headers["x-content-type-options"] == "nosniff"
    for tag in ("script", "style"):
        content = re.findall(rf"<{tag}>(.*?)</{tag}>", TEXT, re.DOTALL)
        assert len(content) == 1
        value = base64.b64encode(hashlib.sha256(content[0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{value}';" in policy
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy


def test_every_field_has_a_label_and_ids_are_unique() -> None:
    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.ids: list[str] = []
            self.labelled: set[str] = set()
            self.inside, self.bare = 0, list[str]()

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            given = dict(attrs)
            self.ids += [given["id"]] if given.get("id") else []
            if tag == "label":
                self.inside += 1
                self.labelled.add(given.get("for") or "")
            if tag in ("input", "select", "textarea") and not self.inside:
                self.bare.append(given.get("id") or tag)

        def handle_endtag(self, tag: str) -> None:
            self.inside -= tag == "label"

    reader = Reader()
    reader.feed(TEXT)
    assert len(set(reader.ids)) == len(reader.ids)
    assert set(reader.bare) <= reader.labelled
    assert 'lang="en"' in TEXT and "<main" in TEXT and "<h1>" in TEXT


@browser
def test_a_chat_in_the_browser(running: Running) -> None:
    with Page() as page:
        page.open(f"http://127.0.0.1:{running.port}/")
        page.wait("document.activeElement.id === 'message'")
        say(page, "The memory of a model <b>is</b>")
        said(page)
        assert page.js("document.querySelector('.user .text').textContent") == "The memory of a model <b>is</b>"
        assert page.js("document.querySelectorAll('#talk b').length") == 0, "text is never taken for HTML"
        expected = ask(running.port, "/v1/chat/completions", {
            "messages": [{"role": "user", "content": "The memory of a model <b>is</b>"}], "max_tokens": 12,
            "temperature": 0, "engram": {"gates": True}})[2]  # fmt: skip
        text = expected["choices"][0]["message"]["content"]
        assert page.js("document.querySelector('.assistant .text').textContent") == text
        notes = [note for note in expected["engram"] if "prompt" not in note]
        opened = page.js(f"{TOKENS}.map(e => e.style.getPropertyValue('--open'))")
        assert len(opened) == 12
        for value, note in zip(opened[:-1], notes[:-1], strict=True):
            assert float(value) == pytest.approx(max(note["gates"].values()), abs=1e-3)
        colours = page.js(f"{TOKENS}.map(e => getComputedStyle(e).backgroundColor)")
        assert len(set(colours)) > 3, "the gate shows as a colour"
        assert page.js("document.getElementById('model').textContent") == "· tiny"
        page.wait("document.getElementById('rows').textContent !== '–'")
        assert page.js("document.querySelectorAll('.user .token').length") > 5, "the prompt is coloured too"
        say(page, "again")
        page.wait("document.querySelectorAll('.assistant').length === 2")
        said(page)
        assert not page.problems


@browser
def test_the_keyboard_alone_shows_what_lies_behind_a_token(running: Running) -> None:
    with Page() as page:
        page.open(f"http://127.0.0.1:{running.port}/")
        say(page, "The rows are read")
        said(page)
        page("Input.dispatchKeyEvent", type="keyDown", key="Tab", windowsVirtualKeyCode=9, modifiers=8)
        for _ in range(12):  # backwards, to the answer
            if page.js("document.activeElement.closest('.assistant') !== null"):
                break
            page("Input.dispatchKeyEvent", type="keyDown", key="Tab", windowsVirtualKeyCode=9, modifiers=8)
        assert page.js("document.activeElement.className") == "token"
        codes = {"ArrowLeft": 37, "ArrowRight": 39, "End": 35, "Home": 36}
        steps = [("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 11), ("ArrowRight", 11), ("Home", 0)]
        for key, place in steps:
            page.key(key, codes[key])
            here = f"{TOKENS}.indexOf(document.activeElement)"
            assert page.js(here) == place, key
        behind = page.js("document.getElementById('token').textContent")
        note = ask(running.port, "/v1/chat/completions", {
            "messages": [{"role": "user", "content": "The rows are read"}], "max_tokens": 2, "temperature": 0,
            "engram": {"gates": True}})[2]["engram"][1]  # fmt: skip
        for layer in ("1", "3"):
            assert f"layer {layer}: {note['gates'][layer] * 100:.1f} %" in behind
            assert " ".join(map(str, note["rows"][layer])) in behind
        assert "Codec f32" in behind
        assert page.js("document.querySelectorAll('.assistant .token[tabindex=\"0\"]').length") == 1
        label = page.js("document.querySelector('.assistant .token').getAttribute('aria-label')")
        assert label.endswith(f"gate {max(note['gates'].values()) * 100:.1f} %")


@browser
def test_stop_ends_the_request_and_errors_are_told(package: Path) -> None:
    slots = FakeSlots(load_tokenizer(package), seconds=0.01)
    served = Running(slots, package)
    try:
        with Page() as page:
            page.open(f"http://127.0.0.1:{served.port}/")
            say(page, "x", 50_000)
            page.wait("document.querySelectorAll('.assistant .token, .assistant .text').length > 0")
            served.wait_for(lambda: len(slots.steps) > 5)
            page.js("document.getElementById('stop').click()")
            served.wait_for(lambda: served.app.batcher.idle)
            page.wait("document.querySelector('.wrong') !== null && !document.getElementById('send').disabled")
            assert page.js("document.querySelector('.wrong').textContent") == "Stopped."

            say(page, "z", 50_000)
            served.wait_for(lambda: not served.app.batcher.idle)
            page.js("document.getElementById('clear').click()")
            served.wait_for(lambda: served.app.batcher.idle)
            page.wait("!document.getElementById('send').disabled")
            assert page.js("[messages.length, document.querySelectorAll('article').length].join()") == "0,0"

            def fault(feeds: object) -> None:
                raise RuntimeError("broken")

            slots.fault = fault
            say(page, "y")
            page.wait("document.querySelector('[role=alert]') !== null")
            assert "could not compute" in page.js("document.querySelector('[role=alert]').textContent")
    finally:
        served.close()


@browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits_a_narrow_screen_and_can_be_read(running: Running, dark: bool) -> None:
    with Page(360, 740, dark) as page:
        page.open(f"http://127.0.0.1:{running.port}/")
        say(page, "The memory of a model is a table. " * 3)
        said(page)
        page.js("document.querySelector('.assistant .token').focus()")
        assert page.js("document.documentElement.scrollWidth") <= 360
        page.js("document.querySelectorAll('.token').forEach(e => e.style.setProperty('--open', 1))")
        pairs = page.js("""(() => {
          const paint = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
          const rgb = (ground, colour) => {
            paint.fillStyle = ground; paint.fillRect(0, 0, 1, 1);
            if (colour) { paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1); }
            return [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3);
          };
          const base = getComputedStyle(document.body).backgroundColor;
          const raised = getComputedStyle(document.querySelector('.user .text')).backgroundColor;
          const ink = (q) => rgb(getComputedStyle(document.querySelector(q)).color);
          const token = getComputedStyle(document.querySelector('.assistant .token')).backgroundColor;
          return {token: [ink('.token'), rgb(base, token)], user: [ink('.user .text'), rgb(raised)],
            label: [ink('label'), rgb(base)], title: [ink('h2'), rgb(base)], panel: [ink('#behind'), rgb(base)]};
        })()""")
    assert (sum(pairs["title"][1]) < 200) == dark
    for name, (ink, ground) in pairs.items():
        assert contrast(ink, ground) >= 4.5, name


def contrast(one: list[int], other: list[int]) -> float:
    """WCAG 2: 1 to 21."""

    def light(colour: list[int]) -> float:
        parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    dim, bright = sorted([light(one), light(other)])
    return (bright + 0.05) / (dim + 0.05)


@browser
def test_with_a_key_the_page_asks_with_it(package: Path) -> None:
    served = Running(FakeSlots(load_tokenizer(package)), package, api_key="correct horse")
    try:
        with Page() as page:
            page.open(f"http://127.0.0.1:{served.port}/")
            say(page, "x", 3)
            page.wait("document.querySelector('[role=alert]') !== null")
            assert "API key" in page.js("document.querySelector('[role=alert]').textContent")
            page.js("(() => { const k = document.getElementById('key'); k.value = 'correct horse';"
                    " k.dispatchEvent(new Event('change')); })()")  # fmt: skip
            say(page, "x", 3)
            said(page)
            page.wait("document.getElementById('model').textContent === '· tiny'")
    finally:
        served.close()
