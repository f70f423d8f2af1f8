"""Language consistency: exact by script, neutral where there is nothing to count."""

from __future__ import annotations

import importlib.util
import time

import pytest

from sparring.errors import RewardError
from sparring.rewards.language import Language
from sparring.rewards.language_scripts import count_scripts

ENGLISH = "First we add the two numbers, then we multiply the result by three."
FRENCH = "D'abord nous additionnons les deux nombres, puis nous multiplions par trois. "
CHINESE = "首先我们把两个数相加，然后把结果乘以三。"
JAPANESE = "まず二つの数を足してから、その結果に三を掛けます。"
RUSSIAN = "Сначала сложим два числа, затем умножим результат на три."
KOREAN = "먼저 두 수를 더한 다음 결과에 셋을 곱합니다."
ARABIC = "أولا نجمع العددين ثم نضرب النتيجة في ثلاثة."
HINDI = "पहले हम दोनों संख्याओं को जोड़ते हैं।"
TEXTS = {
    "en": ENGLISH, "zh": CHINESE, "ja": JAPANESE, "ru": RUSSIAN, "ko": KOREAN, "ar": ARABIC,
    "hi": HINDI,
}  # fmt: skip


def share(text, **knobs):
    return Language(**knobs)([f"<think>{text}</think><answer>4</answer>"])[0]


@pytest.mark.parametrize("target", TEXTS)
def test_each_script_counts_for_its_own_language_alone(target):
    for code, text in TEXTS.items():
        assert share(text, target=target) == (1.0 if code == target else 0.0), code


def test_a_mixture_is_the_share_of_words():
    assert share("one two three 四五六", target="en") == 0.5
    assert share("one two three 四五六", target="zh") == 0.5
    assert share("一 two 三 四", target="zh") == 0.75


def test_notation_is_no_language():
    text = (
        "设 $x$ 为未知数，则 \\frac{alpha}{beta} = 3，见 https://example.com/some/words ，"
        "`print` \n"
        "```python\nfor index in range(10): print(index)\n```\n\\[ area = width \\] 令 x = 3 cm。"
    )
    assert share(text, target="zh") == 1.0
    assert set(count_scripts(text)) == {"Han"}


def test_nothing_to_count_is_neutral():
    for text in ("", "12 + 3 = 15", "$x^2$", "x = y", "```code words```"):
        assert share(text, target="zh") == 1.0


def test_han_alone_in_a_japanese_text_follows_its_sentence():
    assert share("これは答えです。東京。", target="ja") == 1.0
    assert share("これは答えです。" + CHINESE, target="ja") < 0.5


def test_the_part_that_is_looked_at():
    text = f"<think>{CHINESE}</think><answer>{ENGLISH}</answer>"
    assert Language(target="en")([text]) == [0.0]
    assert Language(target="en", part="answer")([text]) == [1.0]
    assert 0.0 < Language(target="en", part="all")([text])[0] < 1.0
    assert Language(target="en")([ENGLISH]) == [1.0]
    assert Language(target="en")([f"{CHINESE}</think>{ENGLISH}"], prefills=["<think>"]) == [0.0]


def test_a_column_sets_the_target_of_each_row():
    reward = Language(target="en")
    texts = [f"<think>{CHINESE}</think>", f"<think>{CHINESE}</think>", f"<think>{ENGLISH}</think>"]
    assert reward(texts, language=["zh", None, "xx"]) == [1.0, 0.0, None]


def test_an_unknown_target_names_the_known_ones():
    with pytest.raises(RewardError, match="known: ar, bg"):
        Language(target="klingon")


def test_latin_languages_are_alike_without_the_detector():
    assert share(FRENCH, target="en") == 1.0
    assert share(FRENCH, target="fr") == 1.0


def test_the_detector_is_an_extra_that_has_to_be_there():
    if importlib.util.find_spec("py3langid") is not None:
        pytest.skip("py3langid is installed")
    with pytest.raises(RewardError, match="pip install 'py3langid"):
        Language(target="fr", detector="py3langid")


def test_the_detector_tells_long_latin_passages_apart_and_leaves_short_ones_out():
    pytest.importorskip("py3langid")
    knobs = {"detector": "py3langid"}
    assert share(FRENCH * 4, target="fr", **knobs) == 1.0
    assert share(FRENCH * 4, target="en", **knobs) == 0.0
    assert share((ENGLISH + " ") * 4, target="en", **knobs) == 1.0
    assert share(FRENCH[:70], target="en", **knobs) == 1.0  # too short to tell: not counted


@pytest.mark.parametrize("unit", ["a", "$", "`", "<a", "\\(", "我", "http://", "a@", "\\begin{"])
def test_long_texts_take_linear_time(unit):
    start = time.perf_counter()
    share((unit * 100_000)[:100_000], target="en")
    assert time.perf_counter() - start < 2.0
