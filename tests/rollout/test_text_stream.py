"""Pieces of text while tokens arrive: joined they are the whole text, and none is taken back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparring.rollout.sampler import Sampling
from sparring.rollout.stopping import StopRule
from sparring.rollout.text_stream import TextStream


def decode(token_ids):
    """Bytes as tokens; 256 and up are special and write nothing."""
    return bytes(t for t in token_ids if t < 256).decode("utf-8", "replace")


def pieces(token_ids, *, stop=(), sizes=(1,)):
    """The pieces of a completion that the stop rule ends, fed in parts of these sizes in turn."""
    rule = StopRule(stop_ids=(300,), stop=stop, min_completion_tokens=0, decode=decode)
    end = next(
        (n for n in range(1, len(token_ids) + 1) if rule.reason(token_ids[:n], len(token_ids))),
        len(token_ids),
    )
    token_ids = token_ids[:end]
    stream = TextStream(decode, stop=stop, stop_ids=(300,))
    found, start, turn = [], 0, 0
    while start < len(token_ids):
        size = sizes[turn % len(sizes)]
        found.append(stream.add(token_ids[start : start + size]))
        start, turn = start + size, turn + 1
    text = rule.text(token_ids)
    return [*found, stream.finish(text)], text


def test_characters_of_several_bytes_come_whole():
    got, text = pieces(list("aé€😀b".encode()))
    assert [piece for piece in got if piece] == ["a", "é", "€", "😀", "b"]
    assert text == "aé€😀b"


def test_what_may_begin_a_stop_string_waits():
    got, text = pieces(list(b"1 < 2 <en <end> more"), stop=("<end>",))
    assert got[:5] == ["1", " ", "", "< ", "2"]
    assert "".join(got) == text == "1 < 2 <en "


def test_end_tokens_and_special_tokens_write_nothing():
    got, text = pieces([*b"hi", 270, *b"!", 300])
    assert got == ["h", "i", "", "!", "", ""]
    assert text == "hi!"


@given(
    st.lists(st.sampled_from([*b"ab<e>\xe2\x82\xac", 270, 300]), min_size=1, max_size=40),
    st.lists(st.integers(1, 7), min_size=1, max_size=3),
    st.sampled_from([(), ("<e>",), ("ab", "<e>"), ("<<",)]),
)
def test_joined_pieces_are_the_text(token_ids, sizes, stop):
    got, text = pieces(token_ids, stop=stop, sizes=sizes)
    assert "".join(got) == text


@pytest.mark.parametrize("num_samples", [1, 3])
def test_the_engine_tells_every_token_once(build_engine, build_prompts, model, num_samples):
    told: dict[tuple[int, int], list[int]] = {}

    def follow(prompt, sample, token_ids):
        assert token_ids
        told.setdefault((prompt, sample), []).extend(token_ids)

    rollouts = build_engine(model).generate(
        build_prompts([3, 9]),
        Sampling(max_completion_tokens=12),
        num_samples=num_samples,
        on_tokens=follow,
    )
    expected = {
        (p, s): rollout.token_ids.tolist()
        for p, group in enumerate(rollouts)
        for s, rollout in enumerate(group)
    }
    assert told == expected
