"""The commands on who a model is and what it should know: identity and facts."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparring.cli.app import Adapter, Traceback, app
from sparring.cli.terminal import emit, opened, progress, reporting, say
from sparring.errors import UserError

if TYPE_CHECKING:
    from sparring.data.identity import Identity
    from sparring.train.identity_probe import IdentityReport

Output = Annotated[
    str, typer.Option("--output", help="Where rows go; else printed.", metavar="FILE.jsonl")
]
HeldOut = Annotated[
    str,
    typer.Option("--held-out", help="Rows on questions not trained on.", metavar="FILE.jsonl"),
]
EmptyThink = Annotated[
    bool, typer.Option("--empty-think", help="Begin every answer with an empty think block.")
]


@app.command()
def identity(
    name: Annotated[
        list[str], typer.Option(help="The model's name; one for all languages, or one for each.")
    ],
    author: Annotated[list[str], typer.Option(help="Who made it; likewise.")],
    language: Annotated[str, typer.Option(help="Languages, such as: zh,en.")] = "en",
    base: Annotated[str, typer.Option(help="The model it was trained from, to be told.")] = "",
    input_file: Annotated[
        str,
        typer.Option(
            "--input", help="Fill {{name}} and {{author}} of this file instead.", metavar="FILE"
        ),
    ] = "",
    output_file: Output = "",
    held_out: HeldOut = "",
    empty_think: EmptyThink = False,
    template_of: Annotated[
        str,
        typer.Option(
            "--template-of", help="Begin with one where this model needs it.", metavar="MODEL"
        ),
    ] = "",
    probe: Annotated[
        str,
        typer.Option(
            "--probe", help="Ask this model who it is, and write no rows.", metavar="MODEL"
        ),
    ] = "",
    adapter: Adapter = "",
    system_prompt: Annotated[
        str, typer.Option("--system-prompt", help="For --probe.", metavar="TEXT")
    ] = "",
    num_samples: Annotated[int, typer.Option(help="For --probe: of each question.", min=1)] = 3,
    temperature: Annotated[float, typer.Option(help="For --probe; 0 is greedy.")] = 0.7,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    traceback: Traceback = False,
) -> None:
    """Write rows that teach a model its name, or ask a model who it is."""
    with reporting(traceback):
        from sparring.data.identity import build_identity, held_out_rows, identity_rows

        languages = [part.strip() for part in language.split(",") if part.strip()]
        made = build_identity(name, author, languages, base=base)
        if probe:
            settings = (adapter, system_prompt, num_samples, temperature)
            _probe(made, probe, *settings, output_file=output_file, as_json=as_json)
            return
        if input_file:
            _write(_filled(made, input_file), output_file)
            return
        blocks = empty_think or (bool(template_of) and _needs_block(template_of))
        _write(identity_rows(made, empty_think=blocks), output_file)
        if held_out:
            _write(held_out_rows(made, empty_think=blocks), held_out)


@app.command()
def facts(
    table: Annotated[
        str, typer.Argument(help="Columns subject, statement, paraphrases.", metavar="TABLE")
    ],
    output_file: Output = "",
    held_out: HeldOut = "",
    empty_think: EmptyThink = False,
    traceback: Traceback = False,
) -> None:
    """Write rows that teach the facts of a table, each asked in several ways."""
    with reporting(traceback):
        from sparring.data.facts import fact_rows, held_out_fact_rows, read_facts
        from sparring.data.rows import load_rows

        found = read_facts(load_rows(table))
        _write(fact_rows(found, empty_think=empty_think), output_file)
        if held_out:
            _write(held_out_fact_rows(found, empty_think=empty_think), held_out)


def _write(rows: Sequence[Mapping[str, Any]], name: str) -> None:
    with opened(name) as target:
        for row in rows:
            emit(row, target or sys.stdout)
    say(f"{len(rows)} rows" + (f" in {name}" if name else ""))


def _filled(made: Identity, input_file: str) -> list[Mapping[str, Any]]:
    """The rows of an identity file of the ecosystem, its placeholders filled."""
    from sparring.data.placeholders import KNOWN, fill_placeholders
    from sparring.data.rows import load_rows

    values = {key: made.names if key.endswith("name") else made.authors for key in KNOWN}
    return list(fill_placeholders(load_rows(input_file), values))


def _needs_block(model: str) -> bool:
    from sparring.data.identity import needs_empty_think
    from sparring.recipe import locate_model
    from sparring.train.inference import model_template

    return needs_empty_think(model_template(locate_model(model)))


def _probe(
    made: Identity,
    model: str,
    adapter: str,
    system_prompt: str,
    num_samples: int,
    temperature: float,
    *,
    output_file: str,
    as_json: bool,
) -> None:
    from sparring.recipe import locate_model
    from sparring.train.identity_probe import probe_identity
    from sparring.train.inference import open_policy, system_prompt_note, template_of

    if temperature < 0:
        raise UserError(f"--temperature is {temperature}; it is 0 or more")
    with opened(output_file) as target:
        policy = open_policy(locate_model(model), adapter=adapter or None)
        if note := system_prompt_note(policy.tokenizer, system_prompt):
            say(note)
        with progress("asking") as on_progress:
            report, rows = probe_identity(
                policy,
                template_of(policy.tokenizer, system_prompt=system_prompt),
                made,
                num_samples=num_samples,
                temperature=temperature,
                on_progress=on_progress,
            )
        for row in rows if target is not None else ():
            emit(row, target or sys.stdout)
    if as_json:
        emit({"model": model, **report.as_dict()}, sys.stdout)
    else:
        _show(report)


def _show(report: IdentityReport) -> None:
    lines = {
        "tells its name": report.name,
        "tells its author": report.author,
        "claims to be another": report.rival,
        "speaks of itself unasked": report.false_mention,
    }
    for what, rate in lines.items():
        if rate is not None:
            interval = f"95% interval {rate.low:.1%} to {rate.high:.1%}"
            say(f"{what:26}{rate.value:>7.1%}  ({interval}, {rate.n} questions)")
