"""The `engram` command: every subcommand is one file of this room; this one names them and turns errors into words."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated

import typer

from engram import EngramError, __version__
from engram.cli import bench, build_vocab, demo, export, fill, inspect, quantize, recipe, run, train, ui, verify, warm
from engram.cli import eval as evaluation
from engram.cli import hash as hashing

app = typer.Typer(
    name="engram",
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Language models whose n-gram memory lives on disk: from a corpus to tokens.",
    epilog="The path: build-vocab, fill or train, quantize, export, run. Start with: engram demo",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"engram {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Language models whose n-gram memory lives on disk: from a corpus to tokens."""


app.command("build-vocab")(build_vocab.build_vocab)
app.command("hash")(hashing.hash_rows)
app.command("train")(train.train)
app.command("fill")(fill.fill)
app.command("quantize")(quantize.quantize)
app.command("export")(export.export)
app.command("inspect")(inspect.inspect)
app.command("verify")(verify.verify)
app.command("run")(run.run)
app.command("warm")(warm.warm)
app.command("eval")(evaluation.evaluate)
app.command("demo")(demo.demo)
app.add_typer(bench.app, name="bench", help="Measure rows, hashing and decoding against this machine's limits.")
app.add_typer(recipe.app, name="recipe", help="List, show and copy the shipped recipes.")


def main(argv: list[str] | None = None) -> None:
    """Run one command and leave with its exit code: 0 done, 1 an error of the user's, 2 usage, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        with _interrupts_after_imports():
            app(argv, prog_name="engram")
    except EngramError as failure:
        ui.error(failure)
        raise SystemExit(1) from None
    except OSError as wrong:
        where = f"{wrong.filename}: " if wrong.filename else ""
        hint = "check the path, its permissions and the free space"
        ui.error(EngramError(f"{where}{wrong.strerror or wrong}", hint=hint))
        raise SystemExit(1) from None
    except SystemExit as leaving:
        if leaving.code == 130:
            ui.say(f"\ninterrupted; nothing half-written was left. To go on: {resume_line(argv)}")
        raise


@contextmanager
def _interrupts_after_imports() -> Iterator[None]:
    """Ctrl-C as ever, but while something is imported it waits for the import to end (a second one does not wait).

    Raised while torch or transformers is imported, a KeyboardInterrupt meets C++ that aborts the process, Python code
    that reports it as a module that is broken, or code run from C, after which the exit code is the signal's.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or not hasattr(signal, "setitimer"):
        yield  # somebody else's business
        return
    waiting = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal waiting
        if waiting and number == signal.SIGINT:
            os._exit(130)
        waiting = _importing(frame)
        if not waiting:
            raise KeyboardInterrupt
        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, 0.02)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def resume_line(argv: list[str]) -> str:
    """The command that goes on from where an interrupted one stopped."""
    resumed = [*argv, "--resume", "auto"] if argv[:1] == ["train"] and "--resume" not in argv else argv
    return shlex.join(["engram", *resumed])


if __name__ == "__main__":
    main()
