"""The far end of math_pool.py: compares pairs of LaTeX with Math-Verify, in lines of JSON.

Run as `python -m sparring.rewards.math_worker LIMIT_SECONDS`. Only Math-Verify's LaTeX extraction
is used, on text that was extracted and wrapped before, and SymPy is told how to read numbers
without its parse_expr, which runs Python: that is never reached. The parent keeps the wall clock;
limits here are a second line.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import queue
import re
import resource
import signal
import sys
import threading
from functools import lru_cache
from typing import Any

MEMORY_BYTES = 1 << 30
"""Address space of one worker. Start-up takes about a quarter of it."""


def main() -> None:
    """Serve until the parent closes standard input."""
    limit_seconds = float(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    gc.set_threshold(100_000)  # memory has its limit, and the process is replaced before long
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    try:
        comparer = Comparer()
    except ImportError as error:
        _say({"error": f"Math-Verify cannot be imported ({error}); pip install math-verify"})
        return
    _say({"ready": True})
    while True:
        reference, answer, *places = json.loads(requests.get())
        # The default action of SIGALRM ends this process even inside a long C call, should the
        # parent be gone or stopped. Math-Verify's own alarms are switched off.
        signal.setitimer(signal.ITIMER_REAL, limit_seconds + 2.0)
        _say(comparer.compare(reference, answer, *places))
        signal.setitimer(signal.ITIMER_REAL, 0.0)


MAX_SYMBOLS = 8
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)", re.ASCII)
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)


class Comparer:
    """Math-Verify behind one method, with a cache of parsed references."""

    def __init__(self) -> None:
        from math_verify import LatexExtractionConfig, parse, verify
        from math_verify.parser import NormalizationConfig
        from sympy.core.sympify import converter

        # SymPy asks its converters before it hands text to parse_expr; this one hands on nothing.
        converter[str] = read_literal
        self._config = (
            LatexExtractionConfig(
                boxed_match_priority=-1,
                normalization_config=NormalizationConfig(
                    basic_latex=True,
                    units=False,
                    malformed_operators=True,
                    nits=True,
                    boxed="none",
                    equations=False,
                ),
            ),
        )
        self._parse, self._verify = parse, verify
        self._reference = lru_cache(maxsize=512)(self.read)

    def compare(self, reference: str, answer: str, places: int | None = None) -> dict[str, Any]:
        """{"verdict": true, false or null (the reference cannot be read), "reason"}.

        places: the answer is a decimal that rounds the reference to so many places.
        """
        known = self._reference.cache_info().misses
        try:
            parsed = self._reference(reference)
        except (MemoryError, RecursionError) as error:
            return {"verdict": None, "reason": _name(error, "the reference"), "recycle": True}
        if parsed is None:
            return {"verdict": None, "reason": "the reference cannot be read as mathematics"}
        if self._reference.cache_info().misses > known:
            _say({"reference": True})
        try:
            return self._judge(answer, parsed, places)
        except (MemoryError, RecursionError) as error:
            return {"verdict": False, "reason": _name(error, "the answer"), "recycle": True}
        except Exception as error:  # SymPy on odd input: reported, and no verdict for the answer
            reason = f"the comparison failed: {type(error).__name__}"
            return {"verdict": False, "reason": reason}

    def read(self, latex: str) -> list[Any] | None:
        """Math-Verify's reading of one formula, None where it finds nothing."""
        wrapped = "$" + latex.replace("$", " ").replace("\n", " ") + "$"
        parsed = self._parse(
            wrapped,
            extraction_config=self._config,
            fallback_mode="no_fallback",
            extraction_mode="first_match",
            parsing_timeout=None,
        )
        return parsed or None

    def _judge(self, answer: str, parsed: list[Any], places: int | None) -> dict[str, Any]:
        read = self.read(answer)
        if read is None:
            return {"verdict": False, "reason": "the answer cannot be read as mathematics"}
        if places is not None:
            near = _rounds(parsed[0], read[0], places)
            return {
                "verdict": near,
                "reason": f"{'a' if near else 'no'} rounding to {places} places",
            }
        if _differ_at_a_point(parsed[0], read[0]):
            return {"verdict": False, "reason": "other values than the reference at a point"}
        equal = self._verify(
            parsed, read, float_rounding=12, numeric_precision=30, timeout_seconds=None
        )
        if equal and _differ_in_size(parsed[0], read[0]):
            return {"verdict": False, "reason": "not equal: small numbers of different size"}
        return {
            "verdict": bool(equal),
            "reason": "Math-Verify: " + ("equal" if equal else "not equal"),
        }


def read_literal(text: str) -> Any:
    """What SymPy makes of text in this process: an exact number, a symbol, or an error."""
    from sympy import Rational, Symbol
    from sympy.core.sympify import SympifyError

    text = text.strip()
    if _NUMBER.fullmatch(text):
        return Rational(text)
    if _IDENTIFIER.fullmatch(text):
        return Symbol(text)
    raise SympifyError(f"text is not run here: {text[:80]}")


def _rounds(exact: Any, rounded: Any, places: int) -> bool:
    """Whether a decimal is the reference within half a unit of its last place."""
    difference = abs(exact.evalf(30) - rounded)
    return bool(difference.is_number and difference <= 0.5000001 * 10.0**-places)


def _differ_at_a_point(exact: Any, other: Any) -> bool:
    """Whether two expressions have different values where both have one: then they are not equal.

    Cheap beside SymPy's simplify, and most wrong answers end here. False says nothing.
    """
    from sympy import Derivative, Expr, Integral, Limit, Product, Rational, Sum
    from sympy.core.function import AppliedUndef

    if not (isinstance(exact, Expr) and isinstance(other, Expr)):
        return False
    if exact.has(*(unevaluated := (Derivative, Integral, Limit, Product, Sum, AppliedUndef))):
        return False
    symbols = sorted(exact.free_symbols | other.free_symbols, key=str)
    if len(symbols) > MAX_SYMBOLS or other.has(*unevaluated):
        return False
    point = {symbol: Rational(7 + 4 * place, 5) for place, symbol in enumerate(symbols)}
    first, second = exact.evalf(20, subs=point), other.evalf(20, subs=point)
    if not (first.is_Float or first.is_Integer) or not (second.is_Float or second.is_Integer):
        return False
    return bool(abs(first - second) > 1e-8 * max(abs(first), abs(second)))


def _differ_in_size(exact: Any, other: Any) -> bool:
    """Whether two closed forms differ by more than rounding, measured by their own size.

    Math-Verify compares with an absolute bound, so 2^{-199} equals 2^{-200} to it.
    """
    free = getattr(exact, "free_symbols", None), getattr(other, "free_symbols", None)
    if free != (set(), set()) or not hasattr(exact, "evalf") or not hasattr(other, "evalf"):
        return False
    first, second = exact.evalf(30), other.evalf(30)
    if not (getattr(first, "is_number", False) and getattr(second, "is_number", False)):
        return False
    size = max(abs(first), abs(second))
    return bool(1e-100 < size < 1e-10 and abs(first - second) > 1e-20 * size)


def _name(error: BaseException, what: str) -> str:
    limit = "memory" if isinstance(error, MemoryError) else "depth"
    return f"{what} is beyond the limit of {limit}"


def _listen(requests: queue.SimpleQueue[bytes]) -> None:
    for line in sys.stdin.buffer:
        requests.put(line)
    os._exit(0)


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
