"""The command line's promises: light help, exit codes, errors in words, pure JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from engram import EngramError, __version__
from engram.cli import main as cli
from engram.cli import progress, quantize, sizes, ui
from engram.cli.help import command_names

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("numpy", "torch", "transformers", "triton", "safetensors", "tokenizers", "rich.markdown")
NAMES = [[], *command_names()]


def engram(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "engram.cli.main", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )


def in_process(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command."""
    with pytest.raises(SystemExit) as leaving:
        cli.main(list(words))
    out, err = capsys.readouterr()
    return int(leaving.value.code or 0), out, err


@pytest.mark.parametrize("words", NAMES, ids=[" ".join(words) or "engram" for words in NAMES])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\nfrom engram.cli.main import main\n"
        f"try: main({[*words, '--help']!r})\nexcept SystemExit as leaving: assert not leaving.code\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "[]"
    assert "Usage: engram" in done.stdout


def test_the_contract_has_its_commands() -> None:
    promised = {"build-vocab", "hash", "train", "fill", "quantize", "export", "verify", "run", "eval", "recipe"}
    assert promised <= {words[0] for words in command_names()}


def test_version() -> None:
    done = engram("--version")
    assert (done.returncode, done.stdout) == (0, f"engram {__version__}\n")


def test_wrong_usage_leaves_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["nonsense"], ["train"], ["run", "x", "--offload", "moon"], ["hash", "x"]):
        code, out, err = in_process(capsys, *words)
        assert (code, out) == (2, ""), words
        assert "Error" in err


def test_both_or_neither_of_ids_and_text_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = in_process(capsys, "hash", "x", "--ids", "1", "--text", "a")
    assert code == 2
    assert "--ids or --text" in err


def test_error_is_said_in_words_with_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = in_process(capsys, "recipe", "show", "nothing-like-it")
    assert (code, out) == (1, "")
    first, blank, hint = err.strip().splitlines()
    assert first == "error: `nothing-like-it` is not a shipped recipe"
    assert blank == ""
    assert hint.startswith("hint: choose one of: ")


@pytest.mark.parametrize(
    ("asked", "first"), [("int-8", "int8"), ("NF4", "nf4"), ("fp8", "fp8-row"), ("q4_k_m", "q4_0"), ("xx", "f32"),
                         ("fp8-tensor", "fp8-row"), ("nvfp4", "nf4")],
)  # fmt: skip
def test_an_unknown_codec_is_answered_with_those_that_can_be_written(
    capsys: pytest.CaptureFixture[str], asked: str, first: str
) -> None:
    code, _, err = in_process(capsys, "quantize", "x", "--out", "y", "--tables", asked)
    offered = err.strip().rsplit("one of: ", 1)[1].split(", ")
    assert (code, offered[0]) == (1, first)
    assert sorted(offered) == sorted(quantize.CODECS), "the option's list and the codecs' own differ"


def test_a_file_cannot_write_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    ui.error(EngramError("the file \x1b[2Jx\ud800 is é", hint="a\nb\x07"))
    assert capsys.readouterr().err == "error: the file \\x1b[2Jx\\ud800 is é\n\nhint: a\nb\\x07\n"


def test_error_without_hint_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    ui.error(EngramError("the file `x` is empty"))
    assert capsys.readouterr().err == "error: the file `x` is empty\n"


def test_error_is_red_on_a_terminal_unless_unwanted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert ui.coloured(Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not ui.coloured(Terminal())


def test_defects_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> str:
        raise ZeroDivisionError(name)

    monkeypatch.setattr("engram.cli.recipe.text_of", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["recipe", "show", "x"])


def test_interrupt_leaves_with_130_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(name: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("engram.cli.recipe.text_of", interrupted)
    code, out, err = in_process(capsys, "recipe", "show", "x y")
    assert (code, out) == (130, "")
    assert err.strip().endswith("To go on: engram recipe show 'x y'")


SLOW_IMPORT = """
import sys, threading, os, signal
from engram.cli import main, recipe
def work(name):
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    import slow_to_import
    slow_to_import.done = True
    import time
    time.sleep(10)
recipe.text_of = work
main.main(["recipe", "show", "x"])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGALRM")
def test_an_interrupt_waits_for_an_import_to_end(tmp_path: Path) -> None:
    """A module that turns a KeyboardInterrupt into another error, as large libraries do, never sees one."""
    module = "import time\ntry:\n    time.sleep(1)\nexcept BaseException:\n    raise RuntimeError('broken') from None\n"
    (tmp_path / "slow_to_import.py").write_text(module)
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    begin = time.monotonic()
    child = subprocess.run(
        [sys.executable, "-c", SLOW_IMPORT], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert child.returncode == 130, child.stderr
    assert "interrupted" in child.stderr and "broken" not in child.stderr
    assert time.monotonic() - begin < 9


NEAR_THE_END = """
import atexit, os, signal, sys, time
from engram.cli import main, recipe
def press():
    os.kill(os.getpid(), signal.SIGINT)
def work(name):
    {moment}
    return "done"
recipe.text_of = work
sys.argv = ["engram", "recipe", "show", "x"]
main.main()
"""
MOMENTS = {
    "in an import with which the command ends": "import presses",
    "twice in an import": "import presses_twice",
    "in the command": "press()",
    "while the first one unwinds": "try: press()\n    finally: press()",
    "at exit": "atexit.register(press)",
    "at exit, the first one in an import": "atexit.register(time.sleep, 0.1); import presses",
    "at exit, again": "atexit.register(press); press()",
    "when all but the end of Python is done": "sys.stderr.flush = press",
}


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGALRM")
@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_an_interrupt_leaves_with_130_and_its_words_once_at_any_moment(tmp_path: Path, moment: str) -> None:
    pressing = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    (tmp_path / "presses.py").write_text(pressing)
    (tmp_path / "presses_twice.py").write_text(pressing + "os.kill(os.getpid(), signal.SIGINT)\n")
    child = subprocess.run(
        [sys.executable, "-c", NEAR_THE_END.format(moment=moment)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}, timeout=60,
    )  # fmt: skip
    words = "\ninterrupted; nothing half-written has its final name. To go on: engram recipe show x\n"
    assert (child.returncode, child.stderr) == (130, words)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGALRM")
def test_a_command_called_by_a_program_gives_the_signals_back() -> None:
    code = (
        "import signal\nfrom engram.cli import main\nbefore = signal.getsignal(signal.SIGALRM)\n"
        "try: main.main(['recipe', 'ls'])\nexcept SystemExit: pass\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL)[0] == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_an_interrupted_train_resumes() -> None:
    assert cli.resume_line(["train", "r.yaml", "lr=1"]) == "engram train r.yaml lr=1 --resume auto"
    assert cli.resume_line(["train", "r.yaml", "--resume", "auto"]) == "engram train r.yaml --resume auto"
    assert cli.resume_line(["export", "a", "--out", "b"]) == "engram export a --out b"


def test_json_is_one_object_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = in_process(capsys, "recipe", "ls", "--json")
    assert (code, err) == (0, "")
    assert isinstance(json.loads(out)["recipes"], dict)
    assert out.count("\n") == 1


def test_emit_writes_strict_json(capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    ui.emit({"a": float("nan"), "b": [float("inf"), 1.5], 3: Path("x"), "n": np.int64(7), "v": np.arange(2), "t": "é"})
    out = capsys.readouterr().out
    assert json.loads(out) == {"a": None, "b": [None, 1.5], "3": "x", "n": 7, "v": [0, 1], "t": "é"}


def test_report_for_people_names_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    ui.report({"bytes": 98_362_432, "seconds": 187.0, "ok": True, "rows": {"1": 12345}, "note": "[red]"}, False, "Done")
    out = capsys.readouterr().out
    for word in ("Done", "98.4 MB", "3:07", "yes", "1: 12,345", "[red]"):
        assert word in out


def test_recipes_are_listed_shown_and_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = in_process(capsys, "recipe", "ls", "--json")
    names = list(json.loads(out)["recipes"])
    assert code == 0 and names
    code, shown, _ = in_process(capsys, "recipe", "show", names[0])
    assert code == 0
    code, _, err = in_process(capsys, "recipe", "cp", names[0], str(tmp_path))
    copy = tmp_path / f"{names[0]}.yaml"
    assert code == 0 and copy.read_text("utf-8") == shown and str(copy) in err
    assert list(tmp_path.iterdir()) == [copy]
    copy.write_text("mine", "utf-8")
    assert in_process(capsys, "recipe", "cp", names[0], str(copy))[0] == 1
    assert copy.read_text("utf-8") == "mine"
    assert in_process(capsys, "recipe", "cp", names[0], str(copy), "--force")[0] == 0
    assert copy.read_text("utf-8") == shown


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MB", 512_000_000), ("2GiB", 2**31), ("1.5k", 1500), ("7", 7), ("3 kib", 3072), ("0.5GB", 500_000_000)],
)
def test_sizes(text: str, size: int) -> None:
    assert sizes.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "5XB", "1e9", "2 G i B"])
def test_not_a_size(text: str) -> None:
    with pytest.raises(Exception, match="not a size"):
        sizes.parse_size(text)


def test_counts_times_and_lists() -> None:
    assert sizes.parse_count("20M") == 20_000_000
    assert sizes.parse_seconds("1h30m") == 5400
    assert sizes.parse_seconds("90") == 90
    assert sizes.parse_ints("2,3") == (2, 3)
    assert sizes.parse_ints("") == ()
    assert sizes.parse_rows("auto") is None
    assert sizes.parse_rows("65536") == 65536
    for parse, text in ((sizes.parse_count, "many"), (sizes.parse_seconds, "3 weeks"), (sizes.parse_ints, "2;3")):
        with pytest.raises(Exception, match="write for example"):
            parse(text)


def test_sizes_for_people() -> None:
    assert [sizes.show_bytes(n) for n in (5, 98_362_432, 2e12)] == ["5 B", "98.4 MB", "2.0 TB"]
    assert [sizes.show_count(n) for n in (12345, 1_230_000)] == ["12,345", "1.23M"]
    assert [sizes.show_seconds(n) for n in (4.21, 187, 3753)] == ["4.2 s", "3:07", "1:02:33"]


def test_plain_progress_says_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with progress.PlainProgress().task("read", 200, "documents") as task:
        for _ in range(100):
            now += 0.25
            task.advance()
        task.note("loss 3.2")
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "read: 20% of 200 documents, 4.00/s, 40.0 s left",
        "read: 40% of 200 documents, 4.00/s, 30.0 s left",
        "read: 100 documents in 25.0 s — loss 3.2",
    ]


def test_a_short_task_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.PlainProgress().task("quick", 1) as task:
        task.advance()
    assert capsys.readouterr().err == ""


def test_bars_go_to_stderr_and_leave_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "WORTH_A_LINE_S", 0.0)
    bars = progress.BarProgress()
    with bars.task("outer", 2, "B") as outer, bars.task("inner") as inner:
        inner.advance()
        outer.advance(2)
        bars.say("a [word]")
    said: Any = capsys.readouterr()
    assert said.out == ""
    for word in ("outer: 2 B in", "inner: 1 in", "a [word]"):
        assert word in said.err


def test_progress_follows_the_terminal() -> None:
    done = engram("recipe", "ls", TERM="xterm")
    assert "\x1b" not in done.stdout + done.stderr
    assert type(progress.on_screen()) is progress.PlainProgress


def test_completion_can_be_shown() -> None:
    done = engram("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "complete" in done.stdout
