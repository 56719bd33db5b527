"""`engram gates`: gates against those computed by hand, and the page, the picture and the terminal that show them."""

from __future__ import annotations

import importlib.util
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from chrome import BROWSER, Page
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from serving import FakeSlots, Says
from tokenizers import Tokenizer

from engram import EngramError
from engram.cli import main as cli
from engram.kernels import reference
from engram.kernels.reference import Floats
from engram.quantize.package import ExportConfig, export_package
from engram.runtime import gates as work
from engram.runtime import gates_picture
from engram.runtime.engine import Model
from engram.runtime.gates import SCHEMA, GatesConfig, GatesError, gates, pieces
from engram.runtime.gates_page import page
from engram.runtime.gates_picture import PictureError, draw, label, wrap
from engram.runtime.gates_scale import background, contrast, ink, share

HOSTILE = 'A <script>alert("1")</script>\n&amp; <img src=x onerror=alert(2)> $\\frac{1}$ \x00\x1b[31m é漢🙂 [bold]'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gates")
    export_package(ExportConfig(source=tiny.write_checkpoint(folder), out=folder / "package"))
    return folder


@pytest.fixture(scope="module")
def package(folder: Path) -> Path:
    return folder / "package"


@pytest.fixture(scope="module")
def hostile(package: Path) -> dict[str, Any]:
    return gates(GatesConfig(package, HOSTILE))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))


def by_hand(folder: Path, ids: list[int], layout: Any) -> dict[int, Floats]:
    """Gates at layers 1 and 3 [T]: transformers' own Llama, with the memory added by the reference before block 1."""
    from transformers import LlamaForCausalLM

    manifest = json.loads((folder / "checkpoint" / "engram.json").read_text())
    dense = load_file(folder / "checkpoint" / "layers.safetensors")
    generator = np.random.default_rng(2)  # as tests/tiny.py makes the tables
    tables = {n: generator.normal(size=(layout.table_rows[n], 8)).astype(np.float32) for n in (1, 3)}
    rows = layout.rows(np.array([ids]))
    found = {}

    def added(layer: int, hidden_BTD: Floats) -> Floats:
        config = manifest["gate"][str(layer)]
        weights = {name.rpartition(f".{layer}.")[2]: value for name, value in dense.items() if f".{layer}." in name}
        memory_BTE = tables[layer][rows[layer]].reshape(1, len(ids), -1)
        key, value = (memory_BTE @ weights[f"{n}_proj.weight"].T + weights[f"{n}_proj.bias"] for n in ("key", "value"))
        stream, key = hidden_BTD[:, :, None], key[:, :, None]
        norms, how = (weights["norm_query"], weights["norm_key"]), {"eps": config["eps"], "kind": config["kind"]}
        found[layer] = reference.gate(stream, key, *norms, **how)[0, :, 0]
        conv = reference.Convolution(
            weights["norm_conv"], weights["conv_weight"], config["conv_dilation"], config["conv_eps"]
        )
        return reference.gate_step(stream, key, value, *norms, **how, conv=conv)[0][:, :, 0]

    def before_block(_: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return torch.from_numpy(added(1, given[0].numpy())).to(given[0].dtype), *given[1:]

    model = LlamaForCausalLM.from_pretrained(folder / "backbone").eval()
    model.model.layers[1].register_forward_pre_hook(before_block)
    with torch.inference_mode():
        added(3, model.model(torch.tensor([ids])).last_hidden_state.numpy())
    return found


def test_gates_are_those_computed_by_hand(folder: Path, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tiny.TEXT[:150]
    result = gates(GatesConfig(package, text))
    model = Model.open(package)
    ids, layout = model.encode(text), model.layout
    tokens = result["tokens"]
    expected = by_hand(folder, ids, layout)
    rows = layout.rows(np.array([ids]))
    assert [note["id"] for note in tokens] == ids and "".join(note["text"] for note in tokens) == text
    for layer in (1, 3):
        opened = [note["gates"][str(layer)] for note in tokens]
        np.testing.assert_allclose(opened, expected[layer], atol=2e-4)
        assert np.ptp(opened) > 0.2, "a figure of one colour would prove nothing"
        assert [note["rows"][str(layer)] for note in tokens] == rows[layer][0].tolist()
        figures = result["layers"][str(layer)]
        found = [figures[name] for name in ("mean", "lowest", "highest")]
        assert found == pytest.approx([np.mean(opened), np.min(opened), np.max(opened)], abs=1e-4)
    assert tokens[0]["ngrams"] == [] and tokens[5]["ngrams"][1] == model.tokenizer.decode(ids[3:6])
    model.close()
    monkeypatch.setattr(work, "_CHUNK", 7)
    apart = gates(GatesConfig(package, text))["tokens"]
    assert [note["gates"] for note in apart] == [
        {name: pytest.approx(value, abs=2e-4) for name, value in note["gates"].items()} for note in tokens
    ]


def test_the_object_has_the_stated_fields(hostile: dict[str, Any], package: Path) -> None:
    stated = (Path(__file__).parents[1] / "docs" / "gates.md").read_text("utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", stated, re.MULTILINE)) == {*hostile, "html", "png"}
    assert set(re.findall(r"^\| `tokens\[\]\.(\w+)` \|", stated, re.MULTILINE)) == set(hostile["tokens"][0])
    assert hostile["schema"] == SCHEMA and f"`{SCHEMA}`" in stated
    assert (hostile["package"], hostile["engine"], hostile["codecs"]) == ("package", "torch", ["f32"])


def test_what_begins_a_text_is_shown_but_not_of_the_text(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "begin", lambda self: [0])
    tokens = gates(GatesConfig(package, "A table"))["tokens"]
    assert (tokens[0]["id"], tokens[0]["text"], tokens[0]["token"]) == (0, "", "<eos>")
    assert "".join(note["text"] for note in tokens) == "A table"
    assert gates(GatesConfig(package, "A \udcff"))["text"] == "A \ufffd", "bytes of a command line that are no UTF-8"


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
def test_pieces_joined_are_the_text(tokenizer: Tokenizer, text: str) -> None:
    found = tokenizer.encode(text, add_special_tokens=False)
    cut = pieces(text, [end for _, end in found.offsets])
    assert len(cut) == len(found.ids) and "".join(cut) == text


def test_what_a_tokenizer_drops_stays_in_the_text() -> None:
    assert pieces("a  b ", [1, 4]) == ["a", "  b "]
    assert pieces("漢b", [1, 1, 1, 2]) == ["漢", "", "", "b"]


# Engines


class Sparse(FakeSlots):
    """Knows the gates of layer 3 only at the last token of a step, as llama.cpp those of the last norm."""

    def step(self, feeds: Any) -> Any:
        start = self.length(0)
        found = super().step(feeds)
        opened = (np.arange(start, self.length(0)) / 100)[:, None].astype(np.float32)
        self.watch(0, 1, opened)
        self.watch(0, 3, opened[-1:] + 0.5)
        return found


def test_a_layer_known_at_last_tokens_alone_is_read_one_by_one(tokenizer: Tokenizer) -> None:
    says, slots = Says(), Sparse(tokenizer)
    opened = work.read(slots, list(range(20, 50)), (1, 3), says)
    np.testing.assert_allclose(opened[1], np.arange(30) / 100, atol=1e-6)
    np.testing.assert_allclose(opened[3], np.arange(30) / 100 + 0.5, atol=1e-6)
    assert says.said == ["layer 3 is computed only where a token's logits are wanted: read one by one"]


def test_gates_that_an_engine_never_tells_are_an_error_not_zeros(tokenizer: Tokenizer) -> None:
    with pytest.raises(GatesError, match=r"layers \[1\] at token 0"):
        work.read(FakeSlots(tokenizer), [70, 71], (1,))


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="needs llama-cpp-python")
def test_both_engines_agree_also_at_the_last_norm(tmp_path: Path) -> None:
    from test_llama import package as write_package

    package, says = write_package(tmp_path / "both"), Says()
    text = " ".join(f"t{number}" for number in np.random.default_rng(4).integers(3, 90, 40))
    llama = gates(GatesConfig(package, text, engine="auto"), says)
    other = gates(GatesConfig(package, text, engine="torch"))
    assert (llama["engine"], other["engine"]) == ("llama.cpp", "torch")
    assert any("read one by one" in line for line in says.said)
    for layer in ("1", "2"):
        one, two = ([note["gates"][layer] for note in result["tokens"]] for result in (llama, other))
        assert len(one) == 40 and np.ptp(two) > 0.1
        np.testing.assert_allclose(one, two, atol=2e-2)
    assert [note["rows"] for note in llama["tokens"]] == [note["rows"] for note in other["tokens"]]
    long = " ".join(["t5"] * 130)
    for engine in ("llama", "torch"):
        with pytest.raises(GatesError, match="130 tokens, the model's context holds 128"):
            gates(GatesConfig(package, long, engine=engine))


# What is refused


def test_no_text_and_too_much_text_are_refused(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("the model was opened")

    with monkeypatch.context() as patched:
        patched.setattr(work, "open_torch", never)
        with pytest.raises(GatesError, match="the text is empty"):
            gates(GatesConfig(package, ""))
        with pytest.raises(GatesError, match="20,000 tokens, a figure holds 8,192"):
            gates(GatesConfig(package, "#~" * 10_000))
        (tmp_path / "big.txt").write_bytes(b"a" * ((1 << 20) + 1))
        with pytest.raises(GatesError, match=r"big\.txt has more than 1,048,576 bytes"):
            gates(GatesConfig(package, tmp_path / "big.txt"))
        with pytest.raises(GatesError, match="the text has more than 1,048,576 bytes"):
            gates(GatesConfig(package, "a" * ((1 << 20) + 1)))
        (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
        with pytest.raises(GatesError, match=r"latin\.txt is not UTF-8 at byte 3"):
            gates(GatesConfig(package, tmp_path / "latin.txt"))
        with pytest.raises(PictureError, match="300 lines, a picture of 2 layers holds 80"):
            gates(GatesConfig(package, "a\n" * 300, png=tmp_path / "a.png"))
    with pytest.raises(GatesError, match="400 tokens, the model's context holds 256"):
        gates(GatesConfig(package, "#~" * 200))


@pytest.mark.parametrize(("option", "name", "words"), [
    ("html", "a.htm", "does not end in .html"), ("png", "a.jpg", "does not end in .png"),
    ("html", "none/a.html", "the folder .* does not exist"), ("png", "there.png", "exists"),
    ("html", "dead.html", "exists"), ("html", "folder.html", "is a folder"),
])  # fmt: skip
def test_files_that_cannot_be_written_are_refused(tmp_path: Path, option: str, name: str, words: str) -> None:
    (tmp_path / "there.png").write_bytes(b"kept")
    (tmp_path / "dead.html").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(GatesError, match=words):
        GatesConfig(tmp_path, "a", **{option: tmp_path / name})
    with pytest.raises(GatesError, match="scale 'half'"):
        GatesConfig(tmp_path, "a", scale="half")
    assert (tmp_path / "there.png").read_bytes() == b"kept"


def test_files_are_replaced_only_by_force_and_whole(package: Path, tmp_path: Path, capsys: Any) -> None:
    out, picture = tmp_path / "a.html", tmp_path / "b.png"
    out.write_text("old")
    words = ["gates", str(package), "--text", "A table", "--html", str(out), "--png", str(picture), "--json"]
    with pytest.raises(SystemExit) as leaving:
        cli.main(words)
    assert leaving.value.code == 1 and "pass --force" in capsys.readouterr().err
    assert out.read_text() == "old" and not picture.exists()
    with pytest.raises(SystemExit) as leaving:
        cli.main([*words, "--force"])
    printed = capsys.readouterr()
    assert not leaving.value.code, printed.err
    result = json.loads(printed.out)
    assert (result["html"], result["png"]) == (str(out), str(picture)) and "written:" in printed.err
    assert out.read_text().startswith("<!doctype html>") and picture.read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.png"]


# The page


class Shown(HTMLParser):
    """Tags that were opened, and the text inside marks without what is shown on pointing."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.blocks: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "div" and ("class", "text") in attributes:
            self.blocks.append("")
        if tag in ("mark", "span"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("mark", "span"):
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open == ["mark"]:
            self.blocks[-1] += data


def test_hostile_text_is_shown_and_does_nothing(hostile: dict[str, Any]) -> None:
    hostile = {**hostile, "package": "<b>p", "backbone": '"><script>', "codecs": ["<i>"]}
    text = page(hostile)
    shown = Shown(text)
    assert shown.blocks == [HOSTILE.replace("\x00", "\ufffd").replace("\x1b", "\ufffd")] * 2
    assert not {"script", "img", "i"} & {tag for tag, _ in shown.tags}
    assert text.count("<b>") == 5 * 2 * len(hostile["tokens"]), "ours alone"
    assert not any(name.startswith("on") or name in ("style", "src") for _, given in shown.tags for name in given)
    assert [given["href"] for _, given in shown.tags if "href" in given] == ["#table"]
    assert not re.search(r"https?:|@import|url\(", text)
    assert "default-src 'none'; style-src 'sha256-" in text


def test_colours_are_the_gates(hostile: dict[str, Any]) -> None:
    marks = [given for tag, given in Shown(page(hostile)).tags if tag == "mark"]
    expected = [note["gates"][layer] for layer in ("1", "3") for note in hostile["tokens"]]
    assert [int(re.match(r"a(\d+) ", str(given["class"]))[1]) for given in marks] == [  # type: ignore[index]
        round(100 * value) for value in expected
    ]
    fitted = [int(str(given["class"]).split()[1][1:]) for given in marks]
    assert (min(fitted), max(fitted)) == (0, 100)
    assert all(given["tabindex"] == "0" for given in marks)
    for scale in ("full", "fit"):
        tags = Shown(page({**hostile, "scale": scale})).tags
        assert [given["id"] for tag, given in tags if tag == "input" and "checked" in given] == [scale]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_the_page(hostile: dict[str, Any], tmp_path: Path, dark: bool) -> None:
    (tmp_path / "a.html").write_text(page(hostile), "utf-8")
    with Page(dark=dark) as browser:
        browser.open(f"file://{tmp_path}/a.html")
        assert browser.problems == [] and browser.js("document.scripts.length") == 0
        tip = "getComputedStyle(document.querySelectorAll('.tip')[5]).display"
        assert browser.js(tip) == "none"
        for _ in range(8):  # a radio group, a link, then the tokens
            browser.key("Tab", 9)
        assert browser.js(tip) == "block" and browser.js("document.activeElement.tagName") == "MARK"
        note = hostile["tokens"][5]
        behind = browser.js("document.activeElement.querySelector('.tip').textContent")
        assert f"({note['id']})" in behind and " ".join(map(str, note["rows"]["1"])) in behind
        colour = "getComputedStyle(document.querySelectorAll('mark')[5]).backgroundColor"
        before = browser.js(colour)
        browser.js("document.getElementById('fit').click()")
        assert browser.js(colour) != before, "the scale is changed without a script"
        ground = browser.js("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(20, 22, 26)" if dark else "rgb(255, 255, 255)")


# The picture


@pytest.mark.parametrize("scale", ["full", "fit"])
def test_the_picture_has_the_colours_of_the_gates(hostile: dict[str, Any], scale: str) -> None:
    from matplotlib.image import imread

    says = Says()
    pixels = (imread(io.BytesIO(draw({**hostile, "scale": scale}, says)))[:, :, :3] * 255).round().astype(int)
    assert 1500 < pixels.shape[1] < 1900 and "no sign for a character" in says.said[0]
    step = gates_picture._ROW * 3 + gates_picture._GAP
    for line, cells in enumerate(wrap([note["text"] for note in hostile["tokens"]])):
        for number, column, _ in cells:
            for row, layer in enumerate(("1", "3")):
                y = gates_picture._TOP + line * step + gates_picture._ROW * (row + 1) + 0.04
                x = gates_picture._LEFT + column * gates_picture._ADVANCE + 0.04
                found = pixels[round(y * gates_picture.DPI), round(x * gates_picture.DPI)]
                gate, figures = hostile["tokens"][number]["gates"][layer], hostile["layers"][layer]
                if scale == "fit":
                    gate = (gate - figures["lowest"]) / (figures["highest"] - figures["lowest"])
                expected = background(min(max(gate, 0.0), 1.0))
                np.testing.assert_allclose(found, expected, atol=2, err_msg=f"token {number}, layer {layer}")


def test_formulas_in_a_text_stay_text(hostile: dict[str, Any]) -> None:
    note = {**hostile["tokens"][0], "text": "$\\frac{$"}  # an error to matplotlib
    assert draw({**hostile, "tokens": [note], "package": "$\\frac{$"}).startswith(b"\x89PNG")


def test_lines_of_the_picture_break_at_line_ends_and_hold_long_tokens() -> None:
    lines = wrap(["ab\n", "c", "d" * 300, "e", "漢字漢字"])
    assert [[number for number, *_ in line] for line in lines] == [[0], [1], [2], [3, 4]]
    assert lines[2][0][2] <= gates_picture.COLUMNS and label("d" * 300).endswith("…")
    assert lines[3][1][2] == 9, "wide signs take two columns"
    assert (label("a\tb\n"), label(""), label("\x1b")) == ("a⇥b↵", "·", "\ufffd")


def test_letters_on_every_colour_can_be_read() -> None:
    light = [sum(background(part / 50)) for part in range(51)]
    assert light == sorted(light, reverse=True), "darker is wider open, also without colours"
    assert min(contrast(background(part / 50), ink(background(part / 50))) for part in range(51)) >= 4.5
    assert (share(0.5, 0.0, 1.0), share(2.0, 0.0, 1.0), share(0.3, 0.3, 0.3)) == (0.5, 1.0, 0.0)


# The terminal


def test_a_pipe_gets_digits(package: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.main(["gates", str(package), "--text", HOSTILE.replace("\x00", "")])
    out = capsys.readouterr().out
    assert not leaving.value.code and "\x1b" not in out
    tokens = gates(GatesConfig(package, HOSTILE.replace("\x00", "")))["tokens"]
    rows = [line.split() for line in out.splitlines() if re.search(r"\d\.\d{4}\s+\d\.\d{4}\s*$", line)]
    assert [row[-2:] for row in rows] == [[f"{note['gates'][layer]:.4f}" for layer in ("1", "3")] for note in tokens]


def test_a_terminal_gets_colours_and_none_of_the_texts_own(package: Path, monkeypatch: Any, capsys: Any) -> None:
    from engram.cli import gates as command

    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("NO_COLOR", raising=False)
    result = gates(GatesConfig(package, "A \x1b[31m [bold] table"))
    assert command._shades()
    command._coloured(result)
    out = capsys.readouterr().out
    plain = re.sub(r"\x1b\[[\d;]*m", "", out)
    assert plain.count("A \\x1b[31m [bold] table") == 2 and "\x1b[31m" not in out
    for note in result["tokens"]:
        red, green, blue = background(note["gates"]["3"])
        assert f"48;2;{red};{green};{blue}" in out
    monkeypatch.setenv("NO_COLOR", "1")
    assert not command.ui.coloured(type("Tty", (), {"isatty": lambda self: True})())


def test_either_text_or_file_is_asked_for(package: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    (tmp_path / "a.txt").write_text("A table")
    from_file = ["--text-file", str(tmp_path / "a.txt")]
    for words, code in (([], 2), (["--text", "a", "--text-file", "b"], 2), (from_file, 0)):
        with pytest.raises(SystemExit) as leaving:
            cli.main(["gates", str(package), *words])
        assert (leaving.value.code or 0) == code
    monkeypatch.setattr("sys.stdin", type("In", (), {"buffer": io.BytesIO(b"A \xff table")})())
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["gates", str(package), "--text", "-", "--json"])
    assert json.loads(capsys.readouterr().out)["text"] == "A \ufffd table"


def test_a_package_without_a_backbone_is_refused_in_words(package: Path) -> None:
    with pytest.raises(EngramError):
        gates(GatesConfig(package.parent / "nothing", "a"))
