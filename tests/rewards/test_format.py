"""Layout: one think block, then one answer; partial credit by tags; a gate on top of it."""

from __future__ import annotations

import pytest

from sparring.rewards.format import format_reward, tags
from sparring.rewards.verdicts import load_reward

GOOD = "<think>two and two</think><answer>4</answer>"


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "<think>\nlines\n</think>\n\n<answer>\n4\n</answer>\n",
        "  <think>a</think>\r\n<answer>4</answer>  ",
        "<think>a < b and b > c</think> <answer>x</answer>",
    ],
)
def test_the_layout_holds(text):
    assert format_reward([text]) == [1.0]
    assert format_reward([text], mode="lenient") == [1.0]
    assert tags([text]) == [1.0]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "<think> occurs 0 times"),
        ("4", "<think> occurs 0 times"),
        ("<think></think><answer>4</answer>", "think block is blank"),
        ("<think> \n </think><answer>4</answer>", "think block is blank"),
        ("<think>a</think><answer> </answer>", "answer is blank"),
        ("<think>a</think>4", "<answer> occurs 0 times"),
        ("<think>a</think><answer>4", "</answer> occurs 0 times"),
        ("<think>a</think><think>b</think><answer>4</answer>", "<think> occurs 2 times"),
        ("<think>a</think></think><answer>4</answer>", "</think> occurs 2 times"),
        ("<think>a</think><answer>4</answer><answer>5</answer>", "<answer> occurs 2 times"),
        ("<answer>4</answer><think>a</think>", "not in the order"),
        ("<think>a<answer>4</answer></think>", "not in the order"),
        ("Hm. <think>a</think><answer>4</answer>", "text before"),
        ("<think>a</think>so<answer>4</answer>", "text between"),
        ("<think>a</think><answer>4</answer> bye", "text after"),
        ("<think>a</think><answer>4</answer>\nHuman:", "text after"),
        ("<THINK>a</THINK><answer>4</answer>", "<think> occurs 0 times"),
    ],
)
def test_the_layout_does_not_hold_and_the_reason_says_why(text, why):
    logged = {}
    assert format_reward([text], log_extra=logged.__setitem__) == [0.0]
    assert why in logged["reason"][0]


def test_lenient_allows_text_around_the_blocks_and_nothing_else():
    assert format_reward(["Hm. " + GOOD + " bye"], mode="lenient") == [1.0]
    assert format_reward(["<think>a</think>so<answer>4</answer>"], mode="lenient") == [1.0]
    assert format_reward([GOOD + GOOD], mode="lenient") == [0.0]
    assert format_reward(["<think></think><answer>4</answer>"], mode="lenient") == [0.0]


def test_a_prefilled_tag_counts_and_a_doubled_one_does_not():
    rest = "two and two</think><answer>4</answer>"
    assert format_reward([rest]) == [0.0]
    assert format_reward([rest], prefills=["<think>\n"]) == [1.0]
    assert format_reward([GOOD], prefills=["<think>\n"]) == [0.0]
    assert tags([rest], prefills=["<think>\n"]) == [1.0]


def test_the_think_layout_asks_for_text_after_one_block():
    assert format_reward(["<think>a</think>4"], layout="think") == [1.0]
    assert format_reward(["<think>a</think> "], layout="think") == [0.0]
    assert format_reward(["so <think>a</think>4"], layout="think") == [0.0]


def test_empty_thinking_may_be_allowed_and_a_cut_completion_is_not():
    text = "<think></think><answer>4</answer>"
    assert format_reward([text], allow_empty_thinking=True) == [1.0]
    assert format_reward([GOOD, GOOD], finish_reasons=["stop", "length"]) == [1.0, 0.0]


def test_messages_are_read_like_text():
    assert format_reward([[{"role": "assistant", "content": GOOD}]]) == [1.0]


@pytest.mark.parametrize(
    ("text", "credit"),
    [
        ("", 0.0),
        ("<think>a", 0.25),
        ("<think>a</think>", 0.5),
        ("<think>a</think><answer>4", 0.75),
        ("<think></think><answer></answer>", 0.5),
        ("<think><think>a</think><answer>4</answer>", 0.75),
        ("</answer><answer></think><think>", 0.25),
        ("<answer>4</answer>", 0.5),
    ],
)
def test_tags_give_a_quarter_each_in_order(text, credit):
    assert tags([text]) == [credit]


def test_tags_never_pay_in_full_where_the_format_does_not_hold():
    for text in ("<think> </think><answer>4</answer>", "x</answer><think>a</think><answer>4"):
        assert tags([text])[0] < 1.0


def test_knobs_are_checked_when_the_reward_is_loaded():
    with pytest.raises(ValueError, match="'strict', 'lenient'"):
        load_reward("format", knobs={"mode": "loose"})
