"""The command `sparring`: words of a command line in, one function called, an exit code out.

What a machine reads goes to standard output alone, what a person reads to standard error. Exit
codes: 0 done, 1 a run failed, 2 the user's input is wrong, 130 interrupted (143 by SIGTERM). Heavy
imports wait until a command needs them, so that `sparring --help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
import traceback as tracebacks
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from sparring.errors import Interrupted, SparringError, UserError

if TYPE_CHECKING:
    from sparring.recipe import Recipe
    from sparring.types import Rollout

FAILED, WRONG_INPUT, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="sparring",
    help="Train language models to reason by GRPO, sample from them and measure them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

Words = Annotated[
    list[str],
    typer.Argument(
        metavar="RECIPE",
        help="A TOML file or a packaged recipe; --section.key VALUE overrides any key of it.",
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the newest checkpoint of run.dir.")
]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")]
Model = Annotated[
    str, typer.Option(help="A folder, a run directory, a Hub id, or: quickstart.", metavar="MODEL")
]
Adapter = Annotated[str, typer.Option(help="A PEFT adapter to put on it.", metavar="ADAPTER")]


def main() -> None:
    """Entry point of the console script."""
    app()


@app.callback(invoke_without_command=True)
def sparring(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Train language models to reason by GRPO, sample from them and measure them."""
    if version:
        from sparring import __version__

        print(__version__)
        raise typer.Exit


@app.command(context_settings=_PASS_ON)
def grpo(words: Words, resume: Resume = False, traceback: Traceback = False) -> None:
    """Train by GRPO: sample groups, judge them, reinforce what beat its own group."""
    with _reporting(traceback):
        recipe = _load_recipe(words, "grpo")
        from sparring.train import grpo as loop

        _show_before_and_after(loop.train(recipe, resume=resume))


@app.command(context_settings=_PASS_ON)
def sft(words: Words, resume: Resume = False, traceback: Traceback = False) -> None:
    """Train on given answers, token by token."""
    with _reporting(traceback):
        recipe = _load_recipe(words, "sft")
        from sparring.train import sft as loop

        loop.train(recipe, resume=resume)


@app.command(name="eval", context_settings=_PASS_ON)
def evaluate(
    words: Annotated[list[str] | None, typer.Argument(metavar="[RECIPE]")] = None,
    model: Model = "",
    adapter: Adapter = "",
    data: Annotated[str, typer.Option(help="Evaluation data.", metavar="FILE")] = "",
    reward: Annotated[str, typer.Option(help="What judges.", metavar="NAME")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    traceback: Traceback = False,
) -> None:
    """Measure accuracy with its 95% interval: of a RECIPE, or by --model --data --reward."""
    with _reporting(traceback):
        recipe = _evaluation_recipe(words or [], model, adapter, data, reward)
        from sparring.train.measure import measure

        with _progress("evaluating") as on_progress:
            evaluation, _ = measure(recipe, say=_say, on_progress=on_progress)
        values = evaluation.as_dict()
        if as_json:
            names = {"model": recipe.model.path, "data": recipe.data.eval}
            _emit({**names, **values}, sys.stdout)
        else:
            _say(_table({"model": values}))
            for title, at in (("pass", evaluation.pass_at), ("maj", evaluation.majority_at)):
                for k, found in at.items() if evaluation.num_samples > 1 else ():
                    _say(f"{title}@{k:5}{found['value']:>9.1%}  {_interval(found):^17}")


@app.command()
def generate(
    model: Annotated[
        str,
        typer.Option(help="A folder, a run directory, a Hub id, or: quickstart.", metavar="MODEL"),
    ],
    adapter: Adapter = "",
    prompt: Annotated[str, typer.Option(help="One user message.", metavar="TEXT")] = "",
    input_file: Annotated[
        str, typer.Option("--input", help='Rows with "prompt".', metavar="FILE.jsonl")
    ] = "",
    output_file: Annotated[
        str, typer.Option("--output", help="Where rows go; else printed.", metavar="FILE.jsonl")
    ] = "",
    system_prompt: Annotated[str, typer.Option(metavar="TEXT")] = "",
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it stands.")] = False,
    num_samples: int = 1,
    max_completion_tokens: int = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends a completion.", metavar="TEXT")
    ] = None,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON rows.")] = False,
    traceback: Traceback = False,
) -> None:
    """Sample completions of one prompt or of a file of prompts."""
    with _reporting(traceback):
        if bool(prompt) == bool(input_file):
            raise UserError("generate takes either --prompt TEXT or --input FILE.jsonl")
        if output_file and not input_file:
            raise UserError("--output goes with --input; one --prompt is printed")
        rows = _prompt_rows(prompt, input_file)
        with _opened(output_file) as target:
            import sparring
            from sparring.train.inference import template_of

            policy, tokenizer = sparring.load(
                model, adapter=adapter or None, dtype=dtype, device=device
            )
            has_template = template_of(tokenizer, system_prompt=system_prompt).source is not None
            as_message = has_template and not raw
            with _progress("sampling") as on_progress:
                groups = sparring.generate(
                    policy,
                    tokenizer,
                    [_asked(row["prompt"], as_message) for row in rows],
                    num_samples=num_samples,
                    max_completion_tokens=max_completion_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    top_k=top_k,
                    stop=stop or (),
                    seed=seed,
                    system_prompt=system_prompt,
                    on_progress=on_progress,
                )
            if prompt and not as_json:
                _print_texts(groups[0])
                return
            for row, group in zip(rows, groups, strict=True):
                for rollout in group:
                    _emit({**row, **_completion(rollout)}, target or sys.stdout)


@app.command(context_settings=_PASS_ON)
def reward(
    words: Annotated[
        list[str], typer.Argument(metavar="NAME", help="--knob VALUE turns its knobs.")
    ],
    input_file: Annotated[
        str, typer.Option("--input", help='Rows with "completion".', metavar="FILE.jsonl")
    ],
    explain: Annotated[bool, typer.Option("--explain", help="Add what the reward noted.")] = False,
    traceback: Traceback = False,
) -> None:
    """Judge the rows of a file; prints them with `reward` (a number or null) and `reason`."""
    with _reporting(traceback):
        names, knobs = _split(words)
        if len(names) != 1:
            raise UserError(f"reward takes one NAME, got {len(names)}: {', '.join(names)}")
        from sparring.data.rows import load_rows
        from sparring.recipe.toml_text import read_value
        from sparring.rewards.rows import judge_rows
        from sparring.rewards.verdicts import load_reward

        rows = load_rows(input_file)
        pairs = {option.removeprefix("--"): read_value(value) for option, value in knobs}
        judge = load_reward(names[0], knobs=pairs)
        try:
            judged = judge_rows(judge, rows.values, explain=explain)
        finally:
            judge.close()
        for row in judged:
            _emit(row, sys.stdout)
        values = [row["reward"] for row in judged if row["reward"] is not None]
        mean = f", mean {sum(values) / len(values):.4f}" if values else ""
        _say(f"{judge.name}: {len(values)} of {len(judged)} rows judged{mean}")


@contextmanager
def _reporting(traceback: bool) -> Iterator[None]:
    """Every error as one message on standard error and an exit code: the last resort."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(FAILED) from None
    except typer.Exit:
        raise
    except Interrupted as error:
        _fail(error, f"{error}; go on with --resume", traceback, error.exit_code)
    except KeyboardInterrupt as error:
        _fail(error, "interrupted", traceback, INTERRUPTED)
    except UserError as error:
        _fail(error, f"{type(error).__name__}: {error}", traceback, WRONG_INPUT)
    except SparringError as error:
        _fail(error, f"{type(error).__name__}: {error}", traceback, FAILED)
    except Exception as error:  # noqa: BLE001 (the last resort: shown in full, never swallowed)
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            remedy = "lower train.micro_batch_tokens, rollout.kv_memory or run.memory"
            _fail(error, f"out of memory: {error}; {remedy}", traceback, FAILED)
        _fail(error, f"a fault in Sparring: {type(error).__name__}: {error}", True, FAILED)


def _fail(error: BaseException, message: str, traceback: bool, code: int) -> None:
    if traceback:
        tracebacks.print_exception(error, file=sys.stderr)
    _say(message)
    raise typer.Exit(code) from None


def _split(words: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Plain words, and options with their values, of the words that no option of ours took."""
    plain, options, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            plain.append(word)
            continue
        option, equals, value = word.partition("=")
        if not equals:
            if not rest:
                raise UserError(f"{option} needs a value: {option} VALUE, or {option}=VALUE")
            value = rest.pop(0)
        options.append((option, value))
    return plain, options


def _load_recipe(words: Sequence[str], command: Any) -> Recipe:
    from sparring.recipe import load_recipe

    names, options = _split(words)
    if len(names) != 1:
        found = f"got {', '.join(names)}" if names else "got none"
        raise UserError(f"{command} takes one RECIPE, {found}; overrides are --section.key VALUE")
    return load_recipe(
        names[0], [f"{option}={value}" for option, value in options], command=command
    )


def _evaluation_recipe(
    words: Sequence[str], model: str, adapter: str, data: str, reward: str
) -> Recipe:
    from sparring.recipe import build_recipe

    names, options = _split(words)
    given = {"--model.path": model, "--model.adapter": adapter, "--data.eval": data}
    flags = [word for option, value in given.items() if value for word in (option, value)]
    overrides = [f"{option}={value}" for option, value in options]
    if names:
        if reward:
            raise UserError(
                "a RECIPE has its own [[reward]]; --reward goes with --model and --data"
            )
        return _load_recipe([*names, *flags, *overrides], "eval")
    if not (model and data and reward):
        raise UserError("eval takes a RECIPE, or --model MODEL, --data FILE and --reward NAME")
    return build_recipe({"reward": [{"name": reward}]}, [*flags, *overrides], command="eval")


def _prompt_rows(prompt: str, input_file: str) -> list[dict[str, Any]]:
    if prompt:
        return [{"prompt": prompt}]
    from sparring.data.rows import load_rows

    rows = load_rows(input_file)
    for index, row in enumerate(rows):
        if not isinstance(row.get("prompt"), str | list) or not row["prompt"]:
            raise UserError(
                f"{rows.where(index)}: no 'prompt' (a text or a list of messages); the row has"
                f" {', '.join(row) or 'no keys'}"
            )
    return [dict(row) for row in rows]


def _asked(prompt: Any, as_message: bool) -> Any:
    """A text as one user message where there is a template; messages as they are."""
    if isinstance(prompt, str) and as_message:
        return [{"role": "user", "content": prompt}]
    return prompt


def _completion(rollout: Rollout) -> dict[str, Any]:
    return {
        "completion": rollout.text,
        "prefill": rollout.prompt.prefill,
        "sample": rollout.sample_index,
        "finish_reason": rollout.finish_reason,
        "num_tokens": len(rollout.token_ids),
    }


def _print_texts(group: Sequence[Rollout]) -> None:
    for rollout in group:
        note = f"{len(rollout.token_ids)} tokens, {rollout.finish_reason}"
        print(rollout.text, flush=True)
        _say(f"({rollout.sample_index + 1} of {len(group)}: {note})")


@contextmanager
def _opened(name: str) -> Iterator[TextIO | None]:
    """A file that takes its name only when all is written; None where no name is given."""
    if not name:
        yield None
        return
    path = Path(name)
    partial = path.with_name(f".{path.name}.partial")
    try:
        file = partial.open("w", encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(f"{path.absolute()} cannot be written: {error.strerror}") from error
    try:
        with file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int, int], None] | None]:
    """A line on the terminal that follows sampling; nothing where standard error is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    with Console(stderr=True).status(what) as status:

        def follow(num_finished: int, num_all: int, num_tokens: int) -> None:
            status.update(f"{what}: {num_finished} of {num_all} completions, {num_tokens} tokens")

        yield follow


def _show_before_and_after(summary: Mapping[str, Any]) -> None:
    rows = {name: summary[name] for name in ("before", "after") if summary.get(name)}
    if rows:
        _say(_table(rows))


def _table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Evaluations by name as aligned text."""
    lines = [f"{'':10}{'accuracy':>9}  {'95% interval':^17}{'n':>6}{'greedy':>9}{'tokens':>8}"]
    for name, found in rows.items():
        greedy = "" if found.get("greedy") is None else f"{found['greedy']:.1%}"
        lines.append(
            f"{name:10}{found['accuracy']:>9.1%}  {_interval(found):^17}{found['n']:>6}{greedy:>9}"
            f"{found['mean_tokens']:>8.1f}"
        )
    return "\n".join(lines)


def _interval(found: Mapping[str, Any]) -> str:
    return f"{found['low']:.1%} to {found['high']:.1%}"


def _emit(row: Mapping[str, Any], target: TextIO) -> None:
    """One JSON line."""
    is_unicode = (getattr(target, "encoding", "") or "").lower().replace("-", "") == "utf8"
    print(json.dumps(row, ensure_ascii=not is_unicode, default=str), file=target)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
