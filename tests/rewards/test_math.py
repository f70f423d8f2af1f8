"""The reward `math`: where the answer is found, what policies change, when there is no verdict."""

from __future__ import annotations

import time

import pytest

from sparring.errors import RewardError
from sparring.rewards.math import MathReward
from sparring.rewards.math_extract import DEFAULT_SOURCES, extract, gold
from sparring.rewards.math_normal import normalise
from sparring.rewards.math_numbers import parse_number
from sparring.rewards.verdicts import load_reward


def judged(completion, reference, **knobs):
    """The verdict of answers that need no formula worker."""
    return MathReward(**knobs).verdicts([completion], [reference])[0]


@pytest.mark.parametrize(
    ("completion", "answer", "source"),
    [
        ("<think>2+2</think><answer>4</answer>", "4", "answer"),
        ("<answer>3</answer> no, <answer>4</answer>", "4", "answer"),
        ("<answer>\\boxed{4}</answer>", "4", "answer"),
        ("<answer>The answer is 4.</answer>", "4", "answer"),
        ("so \\boxed{\\frac{1}{2}} it is", "\\frac{1}{2}", "boxed"),
        ("\\boxed{3} and then \\boxed{4}", "4", "boxed"),
        ("\\fbox{4}", "4", "boxed"),
        ("\\boxed 4", "4", "boxed"),
        ("\\boxed{a_{b_{c}}}", "a_{b_{c}}", "boxed"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}", "boxed"),
        ("steps\n#### 72", "72", "hash"),
        ("#### 71\n#### 72\nbye", "72", "hash"),
        ("The final answer is $\\frac{1}{2}$.", "\\frac{1}{2}", "answer_is"),
        ("**Answer:** 18", "18", "answer_is"),
        ("Answer: 3.5. That is all.", "3.5", "answer_is"),
        ("所以答案是 42。", "42", "answer_is"),
        ("答案：42", "42", "answer_is"),
        ("72", "72", "bare"),
        ("<think>never mind</think>\n72\n", "72", "bare"),
    ],
)
def test_the_answer_is_found(completion, answer, source):
    found = extract(completion, DEFAULT_SOURCES)
    assert (found.text, found.source) == (answer, source)


@pytest.mark.parametrize(
    ("completion", "why"),
    [
        ("<think>the answer is \\boxed{4}", "never ends"),
        ("<think>\\boxed{4}</think>\nI am not\nsure.", "no answer found"),
        ("<answer></answer>", "empty"),
        ("\\boxed{}", "empty"),
        ("\\boxed{4", "never closed"),
        ("\\boxed{4\\}", "never closed"),
        ("I bought 3 apples and 4 pears.\nThat is 7.", "no answer found"),
        ("\\boxed{" + "9" * 501 + "}", "501 characters"),
        ("", "no answer found"),
    ],
)
def test_there_is_no_answer(completion, why):
    verdict = judged(completion, "4")
    assert verdict.verdict is False
    assert verdict.stage == "extraction"
    assert why in verdict.reason


def test_sources_say_what_counts_and_in_which_order():
    text = "<answer>1</answer> \\boxed{2}\n#### 3"
    assert judged(text, "1").verdict is True
    assert judged(text, "2", sources=["boxed"]).verdict is True
    assert judged(text, "3", sources=["hash", "answer"]).verdict is True
    assert judged("so we get 5 in the end\nthanks", "5", sources=["last"]).verdict is True
    assert judged("so we get 5 in the end\nthanks", "5").verdict is False
    assert judged("\\boxed{2}", "2", sources=["answer"]).verdict is False


def test_several_boxes_may_have_to_agree():
    text = "\\boxed{3}, or \\boxed{4}"
    assert judged(text, "4").verdict is True
    assert judged(text, "4", several_boxes="agree").verdict is False
    assert judged("\\boxed{4} \\boxed{ 4}", "4", several_boxes="agree").verdict is True


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("Natalia sold 48/2 = 24.\n#### 72", "72"),
        ("#### 1,234", "1234"),
        ("So $x = \\boxed{\\frac{1}{2}}$.", "0.5"),
        ("$\\frac{1}{2}$", "0.5"),
        (72, "72"),
        (0.25, "1/4"),
    ],
)
def test_references_of_every_form(reference, answer):
    assert judged(f"\\boxed{{{answer}}}", reference).verdict is True
    assert judged("\\boxed{73}", reference).verdict is False


@pytest.mark.parametrize("reference", [None, "", "  ", "#### ", True, ["4"], "x" * 2001])
def test_a_reference_that_cannot_be_judged_gives_none(reference):
    verdict = judged("\\boxed{4}", reference)
    assert verdict.verdict is None
    assert verdict.stage == "reference"
    assert gold(reference)[1] == verdict.reason


def test_percent_policies():
    cases = {"value": (True, False), "match": (False, False), "ignore": (False, True)}
    for policy, (half, fifty) in cases.items():
        assert judged("\\boxed{50\\%}", "0.5", percent=policy).verdict is half, policy
        assert judged("\\boxed{50\\%}", "50", percent=policy).verdict is fifty, policy
        assert judged("\\boxed{50\\%}", "50 percent", percent=policy).verdict is True, policy


def test_unit_policies():
    cases = {"one_side": (True, False), "match": (False, False), "ignore": (True, True)}
    for policy, (bare, other) in cases.items():
        assert judged("\\boxed{5}", "5 cm", units=policy).verdict is bare, policy
        assert judged("\\boxed{5 m}", "5 cm", units=policy).verdict is other, policy
        assert judged("\\boxed{5 centimetres}", "5 cm", units=policy).verdict is True, policy


def test_fraction_decimal_and_mixed_number_policies():
    assert judged("\\boxed{2/4}", "1/2").verdict is True
    assert judged("\\boxed{2/4}", "1/2", fractions="reduced").verdict is False
    assert judged("\\boxed{3.14159}", "3.14").verdict is False
    assert judged("\\boxed{3.14159}", "3.14", decimals="rounded").verdict is True
    assert judged("\\boxed{3.146}", "3.14", decimals="rounded").verdict is False
    assert judged("\\boxed{7.4}", "7", decimals="rounded").verdict is False
    assert judged("\\boxed{3\\frac{1}{2}}", "3.5").verdict is True
    assert judged("\\boxed{3\\frac{1}{2}}", "3.5", mixed_numbers=False).verdict is False


def test_a_numeric_reference_asks_for_a_literal():
    for answer in ("3+4", "6=7", "7 \\approx 6", "\\frac{7!}{6!}", "2^3-1", "7x", "7 or 8", "7^1"):
        verdict = judged(f"\\boxed{{{answer}}}", "7")
        assert verdict.verdict is False, answer
        assert verdict.stage == "number"
    for answer in ("7", "x=7", "3+4=7", "7.00", "\\text{7 apples}", "seven", "七"):
        assert judged(f"\\boxed{{{answer}}}", "7").verdict is True, answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("twenty-one", 21), ("one hundred and five", 105), ("two thousand three hundred", 2300),
        ("two two", None), ("hundred", None), ("一百二十三", 123), ("三万五千", 35000), ("十", 10),
        ("两百零五", 205), ("1.5e3", 1500), ("10^{-2}", 0.01), ("1,23", None), ("12,345", 12345),
        ("--5", None), ("1/0", None), ("\\frac{1}{0}", None), ("1e9999", None), ("５", 5),
        ("2^{10}", None), ("1.2.3", None), ("", None), (".", None), ("-", None), ("1 2", None),
    ],
)  # fmt: skip
def test_what_is_a_literal(text, value):
    number = parse_number(normalise(text))
    assert (None if number is None else float(number.value)) == value


def test_batches_messages_prefills_and_what_is_logged():
    logged, metrics = {}, {}
    completions = [
        [{"role": "assistant", "content": "2 and 2</think>\\boxed{4}"}],
        "still thinking",
        "\\boxed{4}",
    ]
    values = MathReward()(
        completions=completions,
        reference=["4", "4", None],
        prefills=["<think>\n", "<think>\n", ""],
        log_extra=logged.__setitem__,
        log_metric=metrics.__setitem__,
    )
    assert values == [1.0, 0.0, None]
    assert logged["answer"] == ["4", None, None]
    assert logged["path"] == ["boxed > string", "extraction", "reference"]
    assert "never ends" in logged["reason"][1]
    assert sum(value for name, value in metrics.items() if name.startswith("share_")) == 1.0


def test_wrong_knobs_name_what_is_allowed():
    with pytest.raises(RewardError, match="'value', 'match', 'ignore'"):
        load_reward("math", knobs={"percent": "drop"})
    with pytest.raises(RewardError, match=r"takes no 'percents'.*several_boxes"):
        load_reward("math", knobs={"percents": "value"})
    with pytest.raises(RewardError, match="must be positive"):
        load_reward("math", knobs={"limit_seconds": 0})
    with pytest.raises(RewardError, match="sources"):
        load_reward("math", knobs={"sources": ["box"]})


LONG = 100_000


@pytest.mark.parametrize(
    "unit",
    [
        "{", "}", "\\boxed{", "\\boxed", "<answer>", "</answer>", "<think>", "</think>", "#",
        "####", "$", "$$", "\\(", "\\[", "answer is ", "answer ", "answer", "Answer: **", "答案是",
        "*", " ", "\n", "9", "9,", "9 ", "1.", "-", "\\", "\\frac", "\\text{", "(",
        "[1,", "x=", "^", "½",
        "√", "\\begin{", "\\pm", "a b ", "百", "万", "_", "`", "\x00", "😀", "%", "e1", "<",
        "answer is $1",
    ],
)  # fmt: skip
def test_no_text_of_a_hundred_thousand_characters_takes_long(unit):
    reward = MathReward(limit_seconds=0.5)
    long_text = (unit * (LONG // len(unit) + 1))[:LONG]
    boxed = (unit * 490)[:490]
    start = time.perf_counter()
    for reference in ("7", "(1,\\sqrt{2})", "Evelyn"):
        assert reward.verdicts([long_text], [reference])[0].verdict in (False, True)
        assert reward.verdicts([f"{long_text}\\boxed{{1}}"], [reference])[0].verdict is not True
    for reference in ("7", "Evelyn", "C"):
        reward.verdicts([f"\\boxed{{{boxed}}}"], [reference])
    reward.verdicts(["\\boxed{7}"], [long_text])
    assert time.perf_counter() - start < 3.0
    reward.close()
