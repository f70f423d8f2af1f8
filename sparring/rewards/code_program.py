"""From a completion to the program that is run: the last code block, and what the prompt began."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Any

from sparring.rewards.texts import after_thinking

MAX_PROGRAM_CHARACTERS = 200_000

_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})[ \t]*([\w+#.-]*)[^`]*")
_PYTHON_TAGS = frozenset({"python", "py", "python3"})
_CODE_LINE = re.compile(r"(?m)^(?:from|import|def|class|async|@)\b|^@")


def extract_code(text: str) -> str | None:
    """The code of a completion (prefill included): its last code block after the thinking.

    A block tagged as Python goes before one without a tag; other tags are no program. An open last
    block counts to the end. Without any fence the whole text counts. None: no code, or thinking
    that never ended.
    """
    answer = after_thinking(text)
    if answer is None:
        return None
    blocks = _blocks(answer)
    if not blocks:
        return answer.strip("\n") if answer.strip() else None
    for accepted in (_PYTHON_TAGS, frozenset({""})):
        found = [code for tag, code in blocks if tag in accepted and code.strip()]
        if found:
            return found[-1]
    return None


def _blocks(text: str) -> list[tuple[str, str]]:
    """(tag in lower case, content) of every fenced block, indentation of the fence removed."""
    blocks: list[tuple[str, str]] = []
    fence, tag, indent = "", "", 0
    lines: list[str] = []
    for line in text.replace("\r\n", "\n").split("\n"):
        mark = _FENCE.fullmatch(line)
        if fence:
            if mark and mark[1].startswith(fence) and not mark[2]:
                blocks.append((tag, "\n".join(lines)))
                fence, lines = "", []
            else:
                blank = line[:indent].strip() == ""
                lines.append(line[indent:] if blank else line)
        elif mark:
            fence, tag = mark[1], mark[2].lower()
            indent = len(line) - len(line.lstrip())
    if fence:
        blocks.append((tag, "\n".join(lines)))
    return blocks


def prompt_text(prompt: Any) -> str:
    """A prompt as one string: itself, or the last user message of a conversation."""
    if isinstance(prompt, str):
        return prompt
    texts = [str(turn.get("content") or "") for turn in prompt if turn.get("role") == "user"]
    return texts[-1] if texts else ""


def prompt_code(prompt: str, entry_point: str) -> str:
    """The Python that a prompt begins (imports, helpers, the open definition of `entry_point`).

    A prompt that is no such code, or holds it in a fence, is searched for it. "" if there is none.
    """
    candidates: Sequence[str] = [code for _, code in _blocks(prompt)] or [prompt]
    for text in candidates:
        start = _CODE_LINE.search(text)
        if start is None or not entry_point:
            continue
        lines = text[start.start() :].split("\n")
        for end in range(len(lines), max(0, len(lines) - 20), -1):
            code = "\n".join(lines[:end])
            tree = parse(close_definition(code))
            if tree is not None and entry_point in defined_names(tree):
                return code + "\n"
    return ""


def close_definition(code: str) -> str:
    """Prompt code as a whole program: its open definition returns nothing."""
    return code if parse(code) is not None else code.rstrip() + "\n    pass\n"


def without_definition(code: str, name: str) -> str:
    """The program without its top-level definition of `name`."""
    tree = parse(code)
    if tree is None:
        return ""
    tree.body = [node for node in tree.body if getattr(node, "name", None) != name]
    return ast.unparse(tree)


def assemble(code: str, *, prompt: str, entry_point: str) -> str:
    """The program to run: the completion's code with what the prompt's code gives it.

    Code that defines the entry point stands after the prompt's imports and helpers; code that does
    not is taken as the continuation of the prompt's open definition.
    """
    code = code[:MAX_PROGRAM_CHARACTERS]
    if not entry_point:
        return code
    opened = prompt_code(prompt, entry_point)
    if not opened:
        return code
    tree = parse(code)
    if tree is not None and entry_point in defined_names(tree):
        if any(
            isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body
        ):
            return code  # such an import must come first
        return close_definition(opened) + "\n" + code
    for body in (code, _indented(code)):
        tree = parse(opened + body)
        if tree is not None and not any(isinstance(node, ast.Return) for node in tree.body):
            return opened + body
    return code


def _indented(code: str) -> str:
    return "\n".join("    " + line for line in code.split("\n"))


def parse(code: str) -> ast.Module | None:
    """The syntax tree, or None for text that is no Python or too deep to parse."""
    if len(code) > MAX_PROGRAM_CHARACTERS:
        return None
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def defined_names(tree: ast.Module) -> set[str]:
    """Names that the program's top level defines: functions, classes, assignments, imports."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        else:
            names |= {
                part.id
                for part in ast.walk(node)
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
            }
    return names
