"""The reward `language`: how much of the thinking is written in the language that was asked for.

As in DeepSeek-R1 (arXiv 2501.12948): words of the target language over all words. Words are counted
by Unicode script, characters one by one where a script writes without spaces. Scripts tell English
from Chinese exactly, and English from French not at all; for that there is an optional detector.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

from sparring.errors import RewardError
from sparring.rewards.language_scripts import (
    LATIN_LANGUAGES,
    SCRIPTS,
    count_scripts,
    latin_passages,
)
from sparring.rewards.texts import after_thinking, full_texts, thinking

MIN_DETECTED_CHARACTERS = 200
"""A shorter passage is too little for a detector: it is left out of the count as unsure."""


class Language:
    """Share of the words in the target language, 0 to 1; 1 where there is nothing to count."""

    def __init__(
        self,
        *,
        target: str = "en",
        part: Literal["thinking", "answer", "all"] = "thinking",
        detector: Literal["none", "py3langid"] = "none",
    ) -> None:
        """target: a language code such as "en", "zh", "ja"; a data column `language` goes first.

        part: what is looked at; a completion without think tags is looked at whole. detector
        "py3langid": passages of 200 characters and more in Latin script are told apart by py3langid
        (pip install py3langid), shorter ones are left out as unsure; "none": the script decides.
        """
        self._target, self._part = _known(target), part
        self._identify: Callable[[str], str] | None = None
        if detector == "py3langid":
            self._identify = _identifier()

    def __call__(
        self,
        completions: Sequence[Any],
        prefills: Sequence[str] | None = None,
        language: Sequence[Any] | None = None,
        log_extra: Callable[..., None] | None = None,
    ) -> list[float | None]:
        """Judge a batch. None where a row's `language` is no known code."""
        texts = full_texts(completions, prefills)
        targets = language if language is not None else [None] * len(texts)
        values: list[float | None] = []
        notes = []
        for text, wanted in zip(texts, targets, strict=True):
            code = str(wanted).lower() if wanted else self._target
            if code not in SCRIPTS:
                values.append(None)
                notes.append(f"'{wanted}' is no known language code")
                continue
            share, note = self._share(self._looked_at(text), code)
            values.append(share)
            notes.append(note)
        if log_extra is not None:
            log_extra("reason", notes)
        return values

    def _looked_at(self, text: str) -> str:
        if self._part == "thinking":
            return thinking(text) or ("" if "think>" in text else text)
        return text if self._part == "all" else after_thinking(text) or ""

    def _share(self, text: str, code: str) -> tuple[float, str]:
        counts = count_scripts(text)
        inside = sum(counts[script] for script in SCRIPTS[code])
        total = sum(counts.values())
        note = ", ".join(f"{count} {script}" for script, count in counts.most_common())
        if self._identify is not None and code in LATIN_LANGUAGES and counts["Latin"]:
            own, others, unsure = self._detected(text, code)
            inside, total = inside - others - unsure, total - unsure
            note += f"; of the Latin words {own} {code}, {others} other, {unsure} unsure"
        if total <= 0:
            return 1.0, f"nothing to count ({note or 'no words'})"
        return max(0, inside) / total, note

    def _detected(self, text: str, code: str) -> tuple[int, int, int]:
        """Latin words in the target language, in others, and in passages too short to tell."""
        words: Counter[str] = Counter()
        identify = self._identify
        assert identify is not None, "called with a detector only"
        for passage, count in latin_passages(text, MIN_DETECTED_CHARACTERS):
            if len(passage) < MIN_DETECTED_CHARACTERS:
                words["unsure"] += count
            else:
                words["own" if identify(passage) == code else "other"] += count
        return words["own"], words["other"], words["unsure"]


def _known(target: str) -> str:
    code = target.lower()
    if code not in SCRIPTS:
        raise RewardError(
            f"reward 'language': target = '{target}' is not known; "
            f"known: {', '.join(sorted(SCRIPTS))}"
        )
    return code


def _identifier() -> Callable[[str], str]:
    if importlib.util.find_spec("py3langid") is None:
        raise RewardError(
            "reward 'language': detector = \"py3langid\" needs that package; "
            "pip install 'py3langid>=0.4'"
        )
    langid = importlib.import_module("py3langid.langid")
    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE)
    identifier.set_languages(sorted(LATIN_LANGUAGES & set(identifier.nb_classes)))
    return lambda passage: str(identifier.classify(passage)[0])
