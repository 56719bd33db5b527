"""The `engram` command: every subcommand is one file of this room; this one names them and turns errors into words."""

from __future__ import annotations

import sys

try:
    import atexit
    import os
    import shlex
    import signal
    from contextlib import suppress
    from types import FrameType
    from typing import Annotated

    import typer

    from engram import EngramError, __version__
    from engram.cli import (
        bench,
        build_vocab,
        convert,
        demo,
        doctor,
        export,
        fill,
        gates,
        inspect,
        plan,
        quantize,
        recipe,
        run,
        serve,
        train,
        ui,
        verify,
        warm,
    )
    from engram.cli import eval as evaluation
    from engram.cli import hash as hashing
except KeyboardInterrupt:
    print("\ninterrupted before anything was begun", file=sys.stderr)
    raise SystemExit(130) from None

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
app.command("convert")(convert.convert)
app.command("quantize")(quantize.quantize)
app.command("export")(export.export)
app.command("inspect")(inspect.inspect)
app.command("plan")(plan.plan)
app.command("verify")(verify.verify)
app.command("run")(run.run)
app.command("serve")(serve.serve)
app.command("gates")(gates.gates)
app.command("warm")(warm.warm)
app.command("eval")(evaluation.evaluate)
app.command("demo")(demo.demo)
app.command("doctor")(doctor.doctor)
app.add_typer(bench.app, name="bench", help="Measure rows, hashing and decoding against this machine's limits.")
app.add_typer(recipe.app, name="recipe", help="List, show and copy the shipped recipes.")


def main(argv: list[str] | None = None) -> None:
    """Run one command and leave with its exit code: 0 done, 1 an error of the user's, 2 usage, 130 interrupted."""
    words = sys.argv[1:] if argv is None else argv
    interrupts = _Interrupts(f"\ninterrupted; nothing half-written has its final name. To go on: {resume_line(words)}")
    try:
        interrupts.listen()
        code = _code_of(words)
        if interrupts.over():
            code = 130
    except KeyboardInterrupt:
        code = 130
    finally:
        if argv is not None:
            interrupts.give_back()
    if code == 130:
        interrupts.say()
    if argv is None and isinstance(code, int):  # the process ends with this command: Ctrl-C is ours to the last
        interrupts.leave_last(code)
    raise SystemExit(code)


def _code_of(argv: list[str]) -> int | str | None:
    try:
        app(argv, prog_name="engram")
    except EngramError as failure:
        ui.error(failure)
        return 1
    except OSError as wrong:
        where = f"{wrong.filename}: " if wrong.filename else ""
        hint = "check the path, its permissions and the free space"
        ui.error(EngramError(f"{where}{wrong.strerror or wrong}", hint=hint))
        return 1
    except SystemExit as leaving:
        return leaving.code
    return 0


class _Interrupts:
    """Ctrl-C as ever, but while something is imported it waits for the import to end; a second one waits for nothing.

    Raised while torch or transformers is imported, a KeyboardInterrupt meets C++ that aborts the process, Python code
    that reports it as a module that is broken, or code run from C, after which the exit code is the signal's.
    """

    def __init__(self, words: str) -> None:
        self._words = words
        self._said = self._waiting = self._stopping = False
        self._code: int | None = None
        self._before = signal.getsignal(signal.SIGINT)
        # not ours where it is somebody else's business, or without timers
        self._ours = self._before is signal.default_int_handler and hasattr(signal, "setitimer")

    def listen(self) -> None:
        """Take the signals over."""
        if self._ours:
            atexit.register(self._leave)  # the first to be registered is the last to be called
            self._alarm_before = signal.signal(signal.SIGALRM, self._heard)
            signal.signal(signal.SIGINT, self._heard)

    def over(self) -> bool:
        """The command is done, a Ctrl-C from now on ends the process; whether one still waits for its import."""
        self._stopping = True
        if self._ours:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return self._waiting

    def give_back(self) -> None:
        """The signals as they were."""
        if self._ours:
            atexit.unregister(self._leave)
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGINT, self._before)
            signal.signal(signal.SIGALRM, self._alarm_before)

    def leave_last(self, code: int) -> None:
        """Behind everything else that is to be done at exit, end the process with this code.

        Python would give the signals back before it takes its modules apart, which with torch takes a while.
        """
        self._code = code

    def _leave(self) -> None:
        if self._code is not None:
            with suppress(Exception):  # Python says it, and has a code for it
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(self._code)

    def say(self) -> None:
        """The usual words, once."""
        if not self._said:
            self._said = True
            ui.say(self._words)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and (self._waiting or self._stopping):
            with suppress(Exception):  # it may be the flush that was interrupted
                sys.stdout.flush()
            cursor = "\x1b[?25h" if os.isatty(2) else ""  # a bar hides it
            os.write(2, (cursor if self._said else f"{cursor}{self._words}\n").encode())
            os._exit(130)
        if number != signal.SIGINT and not self._waiting:
            return
        self._waiting = _importing(frame)
        if not self._waiting:
            self._stopping = True
            raise KeyboardInterrupt
        signal.setitimer(signal.ITIMER_REAL, 0.02)


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
