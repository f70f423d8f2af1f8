"""Identity sets: conversations that teach a model its name and maker, and questions to test it.

The wording is in sparring/assets/identity, a file a language. Everything here is deterministic: the
same identity gives the same rows. What is asked afterwards is never trained on. How often a model
gives the right name is measured in train/identity_probe.py.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from sparring.data.chat import ChatTemplate
from sparring.errors import DataError, UserError
from sparring.types import Message

EMPTY_THINK = "<think>\n\n</think>\n\n"
Kind = Literal["who", "maker", "rival", "unrelated"]

_RIVALS_A_QUESTION = 3
_SYSTEM_EVERY = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who a model is, by language: names and authors {"zh": ..., "en": ...}.

    base: the model it was trained from, to be told when asked; "" to say nothing of it.
    """

    names: Mapping[str, str]
    authors: Mapping[str, str]
    base: str = ""

    @property
    def languages(self) -> tuple[str, ...]:
        """Its languages, in the order in which they were given."""
        return tuple(self.names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question that is never trained on. kind: what the answer should (or should not) tell."""

    language: str
    kind: Kind
    text: str


def known_languages() -> list[str]:
    """Languages that there is wording for."""
    folder = resources.files("sparring") / "assets" / "identity"
    return sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".toml"))


@cache
def wording(language: str) -> dict[str, Any]:
    """What the sets say in a language. Raises DataError where its file cannot be read."""
    file = resources.files("sparring") / "assets" / "identity" / f"{language}.toml"
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"the wording {file} cannot be read: {error}") from error


def build_identity(
    names: Sequence[str], authors: Sequence[str], languages: Sequence[str], *, base: str = ""
) -> Identity:
    """An identity in these languages; one name or author serves all, else one a language.

    Raises UserError for an unknown language, an empty or unfilled value, or a wrong number of them.
    """
    known = known_languages()
    for language in languages:
        if language not in known:
            raise UserError(f"there is no wording in '{language}'; languages: {', '.join(known)}")
    if not languages or len(set(languages)) != len(languages):
        raise UserError(f"name one or more different languages of: {', '.join(known)}")
    return Identity(
        names=_by_language("name", names, languages),
        authors=_by_language("author", authors, languages),
        base=base.strip(),
    )


def identity_rows(identity: Identity, *, empty_think: bool = False) -> list[dict[str, Any]]:
    """The training set: {"messages", "language", "kind"} a row, some 150 a language.

    Direct questions and paraphrases, mistaken names, questions on the base model, behind other
    turns and out of a role, every third with a system message; and plain turns in which no name
    belongs. empty_think: every answer begins with an empty think block.
    """
    rows = []
    for language in identity.languages:
        dialogues = _dialogues(identity, language)
        systems = itertools.cycle(wording(language)["system"])
        for index, (kind, turns) in enumerate(dialogues):
            system = next(systems) if index % _SYSTEM_EVERY == 0 else ""
            rows.append(_row(turns, language, kind, system=system, empty_think=empty_think))
    return rows


def held_out_rows(identity: Identity, *, empty_think: bool = False) -> list[dict[str, Any]]:
    """Rows like those of `identity_rows` on the held-out questions: for a held-out loss."""
    rows = []
    for language in identity.languages:
        words, fill = wording(language), _filler(identity, language)
        for kind in ("who", "maker"):
            answers = itertools.cycle(words[kind]["answers"])
            rows += [
                _row([(asked, fill(next(answers)))], language, kind, empty_think=empty_think)
                for asked in words[kind]["held_out"]
            ]
    return rows


def identity_questions(identity: Identity) -> list[Question]:
    """What to ask afterwards: held-out paraphrases, mistaken names, and unrelated prompts."""
    questions = []
    for language in identity.languages:
        words = wording(language)
        rivals = itertools.cycle(_rival_pairs(identity, language))
        for kind in ("who", "maker", "rival", "unrelated"):
            for asked in words[kind]["held_out"]:
                name, maker = next(rivals)
                text = asked.replace("{rival}", name).replace("{maker}", maker)
                questions.append(Question(language=language, kind=kind, text=text))
    return questions


def rival_names(identity: Identity) -> list[str]:
    """Other models and makers that the wording names, but for those of this identity."""
    names: dict[str, None] = {}
    for language in identity.languages:
        names.update(dict.fromkeys(itertools.chain(*_rival_pairs(identity, language))))
    return list(names)


def _dialogues(identity: Identity, language: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    words, fill = wording(language), _filler(identity, language)
    for kind in ("who", "maker"):
        answers = words[kind]["answers"]
        for index, asked in enumerate(words[kind]["asked"]):
            for step in (0, 1):
                answer = answers[(2 * index + step) % len(answers)]
                yield kind, [(asked, fill(answer))]
    yield from _about_rivals(identity, language)
    base = words["base"]
    replies = base["answers_known"] if identity.base else base["answers"]
    for index, asked in enumerate(base["asked"]):
        yield "base", [(asked, fill(replies[index % len(replies)]))]
    role = words["role"]
    for index, turn in enumerate(role["turns"]):
        for asked in role["asked"]:
            yield "role", [tuple(turn), (asked, fill(role["answers"][index % 2]))]
    talk = [*words["talk"]["turns"], *words["talk"]["more"]]
    for index, turn in enumerate(talk):
        yield "plain", [tuple(turn)]
        for kind in ("who", "maker"):
            part = words[kind]
            asked = part["asked"][index % len(part["asked"])]
            answer = part["answers"][index % len(part["answers"])]
            following = talk[(index + 1) % len(talk)]
            yield kind, [tuple(turn), (asked, fill(answer)), tuple(following)]


def _about_rivals(identity: Identity, language: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Questions that take the model for another one, each with several other models."""
    rival, fill = wording(language)["rival"], _filler(identity, language)
    pairs = itertools.cycle(_rival_pairs(identity, language))
    count = itertools.count()
    for asked in rival["asked"]:
        for _ in range(_RIVALS_A_QUESTION):
            name, maker = next(pairs)
            answers = rival["answers_name" if "{rival}" in asked else "answers_maker"]
            answer = answers[next(count) % len(answers)]
            question, reply = (
                text.replace("{rival}", name).replace("{maker}", maker) for text in (asked, answer)
            )
            yield "rival", [(question, fill(reply))]


def _row(
    turns: Sequence[tuple[str, str]],
    language: str,
    kind: str,
    *,
    system: str = "",
    empty_think: bool = False,
) -> dict[str, Any]:
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for asked, answer in turns:
        messages.append({"role": "user", "content": asked})
        content = EMPTY_THINK + answer if empty_think else answer
        messages.append({"role": "assistant", "content": content})
    return {"messages": messages, "language": language, "kind": kind}


def _rival_pairs(identity: Identity, language: str) -> list[tuple[str, str]]:
    """(model, maker) pairs without this identity's own names; not always a true pair."""
    rival = wording(language)["rival"]
    own = {value.casefold() for value in (*identity.names.values(), *identity.authors.values())}
    names, makers = (
        [value for value in rival[key] if value.casefold() not in own]
        for key in ("names", "makers")
    )
    return list(zip(names, itertools.cycle(makers), strict=False))


def _filler(identity: Identity, language: str) -> Any:
    name, author = identity.names[language], identity.authors[language]

    def fill(text: str) -> str:
        filled = text.replace("{name}", name).replace("{author}", author)
        filled = filled.replace("{base}", identity.base)
        return re.sub(r"(^|[.!?] )the ", r"\1The ", filled)

    return fill


def _by_language(what: str, values: Sequence[str], languages: Sequence[str]) -> dict[str, str]:
    if len(values) not in (1, len(languages)):
        raise UserError(
            f"{len(values)} values of --{what} for {len(languages)} languages"
            f" ({', '.join(languages)}); give one for all, or one for each in their order"
        )
    given = list(values) * len(languages) if len(values) == 1 else list(values)
    for value in given:
        if not value.strip() or "\n" in value:
            raise UserError(f"--{what} is {value!r}; it is a line of text")
        if "{" in value:
            raise UserError(f"--{what} is {value!r}, which holds an unfilled placeholder")
    return {language: value.strip() for language, value in zip(languages, given, strict=True)}


def needs_empty_think(template: ChatTemplate) -> bool:
    """Whether answers must bring a think block of their own to look like this template's answers.

    So it is where the template asks for thinking in words and leaves writing it to the model. A
    block that the template itself writes or opens is seen to in conversations.py.
    """
    if template.source is None:
        return False
    question: Message = {"role": "user", "content": "Hi"}
    opened = template.render([question], add_generation_prompt=True)
    return "<think>" in opened.text.removesuffix(opened.prefill) and not opened.prefill
