"""When a completion ends, and where its text is cut.

Knows token ids and one function that decodes them; nothing of tokenizers, models or memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sparring.types import FinishReason

Decode = Callable[[Sequence[int]], str]
"""Token ids -> text, without special tokens."""

_MARGIN_TOKENS = 8


class StopRule:
    """The end tokens, stop strings and minimum length of one generate call.

    decode: token ids -> text without special tokens. A stop string counts once the completion has
    min_completion_tokens tokens, and only where it ends in the text of a token from there on.
    """

    def __init__(
        self,
        *,
        stop_ids: Sequence[int],
        stop: Sequence[str],
        min_completion_tokens: int,
        decode: Decode,
    ) -> None:
        self._stop_ids = frozenset(stop_ids)
        self._stop = tuple(stop)
        self._min_completion_tokens = min_completion_tokens
        self._decode = decode
        self._max_chars = max((len(text) for text in stop), default=0)
        num_bytes = max((len(text.encode("utf-8", "replace")) for text in stop), default=0)
        self._window = num_bytes + _MARGIN_TOKENS

    def reason(self, token_ids: Sequence[int], max_completion_tokens: int) -> FinishReason | None:
        """Why the completion ends with its last token, or None where it goes on."""
        if token_ids[-1] in self._stop_ids:
            return "stop"
        if self._stop and self._find(token_ids) is not None:
            return "stop"
        return "length" if len(token_ids) >= max_completion_tokens else None

    def text(self, token_ids: Sequence[int]) -> str:
        """The completion's text: without its end token, cut before a stop string that ended it."""
        if token_ids[-1] in self._stop_ids:
            return self._decode(token_ids[:-1])
        cut = self._find(token_ids) if self._stop else None
        return self._decode(token_ids)[:cut]

    def _find(self, token_ids: Sequence[int]) -> int | None:
        """Where in the text the first stop string begins, if the last tokens hold one."""
        if len(token_ids) < self._min_completion_tokens:
            return None
        tail = self._tail(token_ids)
        if not any(stop in tail for stop in self._stop):
            return None
        text = self._decode(token_ids)
        early = 0
        if self._min_completion_tokens > 1:
            early = len(self._decode(token_ids[: self._min_completion_tokens - 1]))
        places = [text.find(stop, max(0, early - len(stop) + 1)) for stop in self._stop]
        return min((place for place in places if place >= 0), default=None)

    def _tail(self, token_ids: Sequence[int]) -> str:
        """The text of the last tokens, long enough for any stop string that ends in the newest one.

        A stop string of n bytes lies in the last n tokens that write anything; more are taken where
        tokens write nothing.
        """
        window = self._window
        while True:
            tail = self._decode(token_ids[-window:])
            if len(tail) > self._max_chars or window >= len(token_ids):
                return tail
            window *= 2
