"""The command that samples: generate."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sparring.cli.app import Adapter, Model, Traceback, app
from sparring.cli.terminal import emit, opened, progress, reporting, say
from sparring.errors import UserError

if TYPE_CHECKING:
    from sparring.types import Rollout


@app.command()
def generate(
    model: Model,
    adapter: Adapter = "",
    prompt: Annotated[str, typer.Option("--prompt", help="One user message.", metavar="TEXT")] = "",
    input_file: Annotated[
        str, typer.Option("--input", help='Rows with "prompt".', metavar="FILE.jsonl")
    ] = "",
    output_file: Annotated[
        str, typer.Option("--output", help="Where rows go; else printed.", metavar="FILE.jsonl")
    ] = "",
    system_prompt: Annotated[str, typer.Option("--system-prompt", metavar="TEXT")] = "",
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it stands.")] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Talk; answers appear as they are written.")
    ] = False,
    num_samples: int = 1,
    max_completion_tokens: Annotated[
        int | None, typer.Option(help="512; with --chat 4096.", show_default=False)
    ] = None,
    min_completion_tokens: Annotated[int, typer.Option(help="No end before it.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest of this share.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep so many; 0: all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Keep from this share of the likeliest.")] = 0.0,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", help="A text that ends a completion.", metavar="TEXT"),
    ] = None,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    memory: Annotated[str, typer.Option(help="The budget, such as 8GiB; else all free.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON rows.")] = False,
    traceback: Traceback = False,
) -> None:
    """Sample completions of one prompt or of a file of prompts, or talk to the model."""
    knobs: dict[str, Any] = {
        "max_completion_tokens": max_completion_tokens,
        "min_completion_tokens": min_completion_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "stop": tuple(stop or ()),
        "seed": seed,
    }
    if max_completion_tokens is None:
        knobs["max_completion_tokens"] = 4096 if chat else 512
    opening = {"adapter": adapter or None, "dtype": dtype, "device": device}
    with reporting(traceback):
        budget: int | Literal["auto"] = _budget(memory) if memory else "auto"
        if chat:
            _refuse_with_chat(
                {
                    "--prompt": prompt, "--input": input_file, "--output": output_file,
                    "--raw": raw, "--json": as_json, "--num-samples": num_samples != 1,
                }
            )  # fmt: skip
            _chat(model, opening, system_prompt, knobs, budget)
            return
        if bool(prompt) == bool(input_file):
            raise UserError("generate takes one of --prompt TEXT, --input FILE.jsonl and --chat")
        if output_file and not input_file:
            raise UserError("--output goes with --input; one --prompt is printed")
        rows = _prompt_rows(prompt, input_file)
        with opened(output_file) as target:
            groups = _sample(
                model, opening, rows, system_prompt, raw,
                {**knobs, "num_samples": num_samples, "memory": budget},
            )  # fmt: skip
            if prompt and not as_json:
                _print_texts(groups[0])
                return
            for row, group in zip(rows, groups, strict=True):
                for rollout in group:
                    emit({**row, **_completion(rollout)}, target or sys.stdout)


def _sample(
    model: str,
    opening: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    system_prompt: str,
    raw: bool,
    knobs: Mapping[str, Any],
) -> list[list[Rollout]]:
    """The completions of every row's prompt."""
    import sparring
    from sparring.train.inference import system_prompt_note, template_of

    policy, tokenizer = sparring.load(model, **opening)
    if note := system_prompt_note(tokenizer, system_prompt):
        say(note)
    has_template = template_of(tokenizer, system_prompt=system_prompt).source is not None
    with progress("sampling") as on_progress:
        return sparring.generate(
            policy,
            tokenizer,
            [_asked(row["prompt"], has_template and not raw) for row in rows],
            system_prompt=system_prompt,
            on_progress=on_progress,
            **knobs,
        )


def _refuse_with_chat(given: Mapping[str, Any]) -> None:
    if wrong := [name for name, value in given.items() if value]:
        raise UserError(f"--chat takes its messages as you type; leave out {', '.join(wrong)}")


def _budget(memory: str) -> int:
    from sparring.recipe.sections import parse_size

    try:
        return parse_size(memory)
    except ValueError as error:
        raise UserError(f"--memory {memory}: {error}") from error


def _chat(
    model: str,
    opening: Mapping[str, Any],
    system_prompt: str,
    knobs: Mapping[str, Any],
    memory: int | Literal["auto"],
) -> None:
    from sparring.cli.chatting import talk
    from sparring.recipe import locate_model
    from sparring.rollout.sampler import Sampling
    from sparring.train.conversation import Conversation
    from sparring.train.inference import open_policy, system_prompt_note, template_of

    sampling = Sampling(**knobs)
    policy = open_policy(locate_model(model), **opening)
    if note := system_prompt_note(policy.tokenizer, system_prompt):
        say(note)
    template = template_of(policy.tokenizer, system_prompt=system_prompt)
    talk(Conversation(policy, template, sampling, memory=memory))


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
        say(f"({rollout.sample_index + 1} of {len(group)}: {note})")
