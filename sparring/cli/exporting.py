"""The command that writes a policy for other programs: export."""

from __future__ import annotations

from typing import Annotated

import typer

from sparring.cli.app import Adapter, Traceback, app
from sparring.cli.terminal import reporting, say


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(help="A run directory, a folder or a Hub id.", metavar="RUN_OR_MODEL")
    ],
    output: Annotated[str, typer.Option("--output", help="A new folder.", metavar="DIR")],
    format_name: Annotated[
        str,
        typer.Option(
            "--format", help="merged or adapter; gguf says how it is made.", metavar="FORMAT"
        ),
    ] = "merged",
    adapter: Adapter = "",
    dtype: Annotated[str, typer.Option(help="Of merged weights; auto: the base's.")] = "auto",
    system_prompt: Annotated[
        str, typer.Option("--system-prompt", help="In place of the recorded one.", metavar="TEXT")
    ] = "",
    traceback: Traceback = False,
) -> None:
    """Write a policy for vLLM, llama.cpp, transformers or PEFT, its system prompt along with it."""
    with reporting(traceback):
        from sparring.recipe import locate_model
        from sparring.train.publish import export as write

        folder = write(
            locate_model(source),
            output,
            format_name=format_name,
            adapter=adapter,
            dtype=dtype,
            system_prompt=system_prompt,
            say=say,
        )
        say(f"written: {folder.absolute()}")
