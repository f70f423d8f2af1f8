"""End tokens and stop strings over token boundaries, and where the text is cut."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from sparring.rollout.stopping import StopRule

END = 256
SILENT = 257


def decode(token_ids: Sequence[int]) -> str:
    """A byte-level tokenizer: id = byte, ids from 256 up write nothing."""
    return bytes(token for token in token_ids if token < 256).decode("utf-8", errors="replace")


def rule(*stop: str, minimum: int = 0, stop_ids: Sequence[int] = (END,)) -> StopRule:
    return StopRule(stop_ids=stop_ids, stop=stop, min_completion_tokens=minimum, decode=decode)


def run(stop_rule: StopRule, token_ids: Sequence[int], limit: int = 10_000) -> tuple[str, int, str]:
    """Feeds token by token: (reason or "", tokens until the end, text)."""
    for length in range(1, len(token_ids) + 1):
        reason = stop_rule.reason(token_ids[:length], limit)
        if reason is not None:
            return reason, length, stop_rule.text(token_ids[:length])
    return "", len(token_ids), decode(token_ids)


def test_an_end_token_ends_and_writes_nothing() -> None:
    assert run(rule(), [65, 66, END, 67]) == ("stop", 3, "AB")
    assert run(rule(), [END]) == ("stop", 1, "")
    assert run(rule(stop_ids=(66,)), [65, 66]) == ("stop", 2, "A")


def test_the_limit_ends_with_length_but_an_end_token_there_is_a_stop() -> None:
    assert run(rule(), [65, 66, 67], limit=2) == ("length", 2, "AB")
    assert run(rule(), [65, END], limit=2) == ("stop", 2, "A")
    assert run(rule("B"), [65, 66], limit=2) == ("stop", 2, "A")


@pytest.mark.parametrize("stop", ["\n\n", "Question:", "答案", "é", "🙂!", "a" * 40])
@pytest.mark.parametrize(
    "head", ["", "x", "中文 mixed ü text, long enough to leave the window " * 3]
)
def test_a_stop_string_over_byte_tokens_is_found_at_its_last_byte(stop: str, head: str) -> None:
    token_ids = list((head + stop + "tail").encode())
    wanted = len((head + stop).encode())
    assert run(rule(stop), token_ids) == ("stop", wanted, head)


def test_a_stop_string_may_begin_and_end_inside_tokens() -> None:
    words = ["Hel", "lo 答", "案是4", "2\n", "\nQ"]

    def decode_words(token_ids: Sequence[int]) -> str:
        return "".join(words[token] for token in token_ids)

    for stop, length, text in (
        ("答案", 3, "Hello "),
        ("\n\n", 5, "Hello 答案是42"),
        ("l", 1, "He"),
    ):
        stop_rule = StopRule(
            stop_ids=(), stop=(stop,), min_completion_tokens=0, decode=decode_words
        )
        for taken in range(1, length):
            assert stop_rule.reason(range(taken), 99) is None
        assert stop_rule.reason(range(length), 99) == "stop"
        assert stop_rule.text(range(length)) == text


def test_the_earliest_of_several_stop_strings_cuts() -> None:
    words = ["one two three"]
    stop_rule = StopRule(
        stop_ids=(), stop=("three", "two"), min_completion_tokens=0, decode=lambda ids: words[0]
    )
    assert stop_rule.reason([0], 9) == "stop"
    assert stop_rule.text([0]) == "one "


def test_tokens_that_write_nothing_do_not_hide_a_stop_string() -> None:
    token_ids = [65, *list(b"##"), *[SILENT] * 50, 35, 66]
    assert run(rule("###"), token_ids) == ("stop", len(token_ids) - 1, "A")


def test_an_unfinished_character_is_no_stop() -> None:
    token_ids = list("答".encode())
    assert run(rule("案"), token_ids)[0] == ""
    assert run(rule("\n"), [0xE7, 0xAD, 10]) == ("stop", 3, "�")


def test_before_the_minimum_no_stop_string_counts() -> None:
    token_ids = list(b"a.b.c.d")
    assert run(rule(".", minimum=3), token_ids) == ("stop", 4, "a.b")
    assert run(rule(".", minimum=4), token_ids) == ("stop", 4, "a.b")
    assert run(rule(".", minimum=5), token_ids) == ("stop", 6, "a.b.c")
    assert run(rule("b.", minimum=4), token_ids) == ("stop", 4, "a.")


def test_without_stop_strings_nothing_is_decoded_on_the_way() -> None:
    calls: list[int] = []

    def counted(token_ids: Sequence[int]) -> str:
        calls.append(len(token_ids))
        return ""

    stop_rule = StopRule(stop_ids=(), stop=(), min_completion_tokens=0, decode=counted)
    for length in range(1, 50):
        stop_rule.reason([1] * length, 100)
    assert calls == []
