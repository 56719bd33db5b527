"""`engram serve`: OpenAI's interface and a page to chat on, over a package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from engram.cli import options, progress, ui
from engram.cli.run import Engine
from engram.cli.sizes import parse_size
from engram.cli.threads import share_processors


def serve(
    package: Annotated[Path, typer.Argument(metavar="PACKAGE", help="A package folder.")],
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen; other than this machine needs --api-key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="0 takes any that is free.", min=0, max=65535)] = 8080,
    slots: Annotated[int, typer.Option(metavar="N", help="Requests written at once.", min=1, max=256)] = 4,
    queue: Annotated[
        int, typer.Option(metavar="N", help="Requests that may wait; one more is answered 429.", min=0)
    ] = 16,
    context: Annotated[
        int, typer.Option(metavar="N", help="Tokens of one request, prompt and answer; the model's own at most.", min=1)
    ] = 4096,
    api_key: Annotated[
        Optional[str],
        typer.Option(metavar="KEY", envvar="ENGRAM_API_KEY", help="Ask for this key; better set in the environment."),
    ] = None,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="Time of one request, waiting included.", min=0.1)
    ] = 600.0,
    grace: Annotated[
        float, typer.Option(metavar="SECONDS", help="Time for what still runs after Ctrl-C or SIGTERM.", min=0.0)
    ] = 30.0,
    offload: options.Placement = options.Offload.disk,
    table_cache: Annotated[
        Optional[str], typer.Option(metavar="SIZE", help="For disk: the most bytes of tables that may stay resident.")
    ] = None,
    verify: options.Verification = options.Verify.first_touch,
    table_io: options.RowIo = options.TableIo.auto,
    engine: Annotated[
        Engine, typer.Option(help="What computes the backbone; auto takes llama.cpp for a GGUF, where it is installed.")
    ] = Engine.auto,
) -> None:
    """Serve a package: OpenAI's interface at /v1, a page at /, until Ctrl-C."""
    share_processors(package)
    from engram.runtime.server import ServeConfig
    from engram.runtime.server import serve as work

    config = ServeConfig(
        package=package,
        host=host,
        port=port,
        slots=slots,
        queue=queue,
        context=context,
        api_key=api_key,
        timeout=timeout,
        grace=grace,
        offload=offload.value,
        table_cache=None if table_cache is None else parse_size(table_cache),
        verify=verify.value,
        table_io=table_io.value,
        engine=engine.value,
    )
    totals = work(config, progress.on_screen())
    ui.say(f"served {totals['generated_tokens']:,.0f} tokens, {totals['rows_read']:,.0f} rows read")
