"""The text of a completion while its tokens arrive: only what no later token can change.

Knows token ids and one function that decodes them; nothing of terminals.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparring.rollout.stopping import Decode

_BROKEN = "\ufffd"
"""What decoding writes for bytes that are no whole character yet."""


class TextStream:
    """Pieces of one completion's text, which joined are the text of its rollout.

    stop: the strings that end it; what may be the beginning of one is held back. stop_ids: tokens
    that end it and write nothing.
    """

    def __init__(self, decode: Decode, *, stop: Sequence[str], stop_ids: Sequence[int]) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._stop_ids = frozenset(stop_ids)
        self._token_ids: list[int] = []
        self._start = 0  # tokens before it are written and no longer needed as context
        self._end = 0  # tokens before it are in the text
        self._pending = ""
        self._written = ""

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now, beyond what was returned before."""
        for token_id in token_ids:
            if token_id in self._stop_ids:
                continue
            self._token_ids.append(token_id)
            known = self._decode(self._token_ids[self._start : self._end])
            text = self._decode(self._token_ids[self._start :])
            if len(text) > len(known) and not text.endswith(_BROKEN):
                self._pending += text[len(known) :]
                self._start, self._end = self._end, len(self._token_ids)
        return self._release()

    def finish(self, text: str) -> str:
        """What is left of the rollout's whole text; empty where the pieces do not begin it."""
        self._pending = ""
        return text[len(self._written) :] if text.startswith(self._written) else ""

    def _release(self) -> str:
        held = 0
        for stop in self._stop:
            place = self._pending.find(stop)
            if place >= 0:
                held = max(held, len(self._pending) - place)
            for size in range(min(len(stop) - 1, len(self._pending)), held, -1):
                if stop.startswith(self._pending[-size:]):
                    held = size
                    break
        cut = len(self._pending) - held
        piece, self._pending = self._pending[:cut], self._pending[cut:]
        self._written += piece
        return piece
