"""The quickstart's problems: arithmetic and word problems that need steps, in English and Chinese.

A problem is drawn from a kind (what the story is about), a level (how many steps it takes and how
large its numbers are) and a language. Everything follows from the generator of random numbers that
is handed in. Whether a problem is held out is decided by its signature, that is its kind and its
numbers and not its wording: so no problem that is held out can be met in training under other names
or in the other language.

This file makes problems; which of them become which data set is told in quickstart/datasets.py.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

LEVELS = (1, 2, 3, 4)
LANGUAGES = ("en", "zh")
HELD_OUT_SHARE = 16
"""One signature in so many is held out."""

LARGEST = 120
"""No number on the way to an answer is larger; none is smaller than 1."""

Operation = tuple[int, str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem with its worked steps.

    prompt: the question. steps: lines such as "12*3=36", in order; the last one ends in the answer.
    signature: kind and numbers, the same for every wording of the same problem.
    """

    prompt: str
    answer: int
    steps: tuple[str, ...]
    kind: str
    level: int
    language: str
    signature: str

    @property
    def is_held_out(self) -> bool:
        """Whether this problem belongs to the held-out set, in whatever words it is put."""
        return zlib.crc32(self.signature.encode()) % HELD_OUT_SHARE == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """What a kind returns: the operations of the solution and the question in each language."""

    operations: tuple[Operation, ...]
    en: str
    zh: str


def apply(operation: Operation) -> int:
    """The result of one operation; ValueError where a division leaves a remainder."""
    left, sign, right = operation
    if sign == "+":
        return left + right
    if sign == "-":
        return left - right
    if sign == "*":
        return left * right
    if sign == "/":
        if right == 0 or left % right:
            raise ValueError(f"{left}/{right} leaves a remainder")
        return left // right
    raise ValueError(f"unknown sign {sign!r}; known: + - * /")


EN_NAMES = ("Tom", "Ann", "Ben", "Mia", "Leo", "Eva")
ZH_NAMES = ("小明", "小红", "小刚", "小丽", "小华", "小芳")
ITEMS = (("pens", "笔", "支"), ("books", "书", "本"), ("cups", "杯子", "个"), ("balls", "球", "个"))
SWEETS = (("apples", "苹果"), ("sweets", "糖"), ("nuts", "坚果"), ("eggs", "鸡蛋"))


def _names(rng: random.Random, count: int) -> list[tuple[str, str]]:
    return rng.sample(list(zip(EN_NAMES, ZH_NAMES, strict=True)), count)


def _factor(rng: random.Random) -> int:
    return rng.randint(2, 9)


def _expression(rng: random.Random, level: int) -> _Draft:
    """A bare expression with `level` operations."""
    a, b, c, d = rng.randint(11, 99), _factor(rng), _factor(rng), rng.randint(3, 12)
    if level == 1:
        sign = rng.choice("+-*")
        left, right = (d, b) if sign == "*" else (a, rng.randint(5, 89))
        operations: tuple[Operation, ...] = ((left, sign, right),)
        text = f"{left} {sign} {right}"
    elif level == 2:
        sign = rng.choice("+-")
        e = rng.randint(5, 60)
        operations = ((b, "*", d), (b * d, sign, e))
        text = f"{b} * {d} {sign} {e}"
    elif level == 3:
        sign, e = rng.choice("+-"), rng.randint(3, 12)
        operations = ((b, "*", d), (c, "*", e), (b * d, sign, c * e))
        text = f"{b} * {d} {sign} {c} * {e}"
    else:
        x, y, sign = rng.randint(2, 9), rng.randint(2, 11), rng.choice("+-")
        total = (x + y) * b
        operations = ((x, "+", y), (x + y, "*", b), (c, "*", d), (total, sign, c * d))
        text = f"({x} + {y}) * {b} {sign} {c} * {d}"
    return _Draft(operations=operations, en=f"Compute {text}.", zh=f"计算 {text}。")


def _sum(rng: random.Random, level: int) -> _Draft:
    """A long sum: `level` + 1 numbers are added or taken away, from left to right."""
    value = start = rng.randint(2, 99)
    operations: list[Operation] = []
    text = str(start)
    for _ in range(level + 1):
        is_more = value < 4 or (value < 100 and rng.random() < 0.5)
        number = rng.randint(2, min(70, LARGEST - value)) if is_more else rng.randint(2, value - 1)
        sign = "+" if is_more else "-"
        operations.append((value, sign, number))
        text += f" {sign} {number}"
        value = apply(operations[-1])
    return _Draft(operations=tuple(operations), en=f"Compute {text}.", zh=f"计算 {text}。")


def _chain(rng: random.Random, level: int) -> _Draft:
    """A number that is changed `level` times, one order after the other."""
    value = start = rng.randint(4, 50)
    operations: list[Operation] = []
    en, zh = [f"Start with {start}."], [f"从{start}开始，"]
    for _ in range(level):
        divisors = [n for n in range(2, 10) if value % n == 0 and value // n > 1]
        signs = ["+", "-"]
        signs += ["*", "*"] if value <= 30 else []
        signs += ["/"] if divisors and value <= 90 else []
        sign = rng.choice(signs)
        if sign == "*":
            number = rng.randint(2, 5)
        elif sign == "/":
            number = rng.choice(divisors)
        else:
            number = rng.randint(3, 60) if sign == "+" else rng.randint(2, max(2, value - 1))
        words = {"+": "Add {}.", "-": "Subtract {}.", "*": "Multiply by {}.", "/": "Divide by {}."}
        zh_words = {"+": "加{}，", "-": "减{}，", "*": "乘{}，", "/": "除以{}，"}
        en.append(words[sign].format(number))
        zh.append(zh_words[sign].format(number))
        operations.append((value, sign, number))
        value = apply(operations[-1])
    return _Draft(
        operations=tuple(operations),
        en=" ".join(en) + " What is the result?",
        zh="".join(zh) + "得多少？",
    )


def _shopping(rng: random.Random, level: int) -> _Draft:
    """Things at a price: the cost, the change, two sorts, two sorts and the change."""
    ((en_name, zh_name),) = _names(rng, 1)
    (first, zh_first, unit), (second, zh_second, unit_2) = rng.sample(ITEMS, 2)
    n, price, m, price_2 = _factor(rng), rng.randint(3, 12), _factor(rng), rng.randint(3, 12)
    cost, cost_2 = n * price, m * price_2
    en = f"{en_name} buys {n} {first} at {price} coins each"
    zh = f"{zh_name}买{n}{unit}{zh_first}，每{unit}{price}元"
    operations: list[Operation] = [(n, "*", price)]
    if level >= 3:
        en += f" and {m} {second} at {price_2} coins each"
        zh += f"，又买{m}{unit_2}{zh_second}，每{unit_2}{price_2}元"
        operations += [(m, "*", price_2), (cost, "+", cost_2)]
        cost += cost_2
    if level in (2, 4):
        paid = 50 if cost < 50 else 100
        operations.append((paid, "-", cost))
        en += f" and pays with {paid}. How much is the change?"
        zh += f"，付了{paid}元，找回多少元？"
    else:
        en += ". What is the cost?"
        zh += "，一共多少元？"
    return _Draft(operations=tuple(operations), en=en, zh=zh)


def _bus(rng: random.Random, level: int) -> _Draft:
    """People on a bus: some get on, some get off, `level` times."""
    value = start = rng.randint(12, 60)
    operations: list[Operation] = []
    en, zh = [], []
    for _ in range(level):
        is_on = rng.random() < 0.5
        number = rng.randint(3, 40) if is_on else rng.randint(2, max(2, value - 2))
        operations.append((value, "+" if is_on else "-", number))
        en.append(f"{number} get {'on' if is_on else 'off'}")
        zh.append(f"{'上来' if is_on else '下去'}{number}人")
        value = apply(operations[-1])
    return _Draft(
        operations=tuple(operations),
        en=f"A bus has {start} people. Then {', '.join(en)}. How many are on it now?",
        zh=f"车上有{start}人，{'，'.join(zh)}，现在有多少人？",
    )


def _compare(rng: random.Random, level: int) -> _Draft:
    """Who has more: more, times as many, altogether, three people."""
    (en_a, zh_a), (en_b, zh_b), (en_c, zh_c) = _names(rng, 3)
    item, zh_item = rng.choice(SWEETS)
    a, times, more = rng.randint(5, 24), rng.randint(2, 5), rng.randint(3, 30)
    if level == 1:
        a = rng.randint(11, 80)
        operations: tuple[Operation, ...] = ((a, "+", more),)
        en = f"{en_a} has {a} {item}. {en_b} has {more} more. How many has {en_b}?"
        zh = f"{zh_a}有{a}个{zh_item}，{zh_b}比{zh_a}多{more}个，{zh_b}有多少个？"
        return _Draft(operations=operations, en=en, zh=zh)
    en = f"{en_a} has {a} {item}. {en_b} has {times} times as many."
    zh = f"{zh_a}有{a}个{zh_item}，{zh_b}的是{zh_a}的{times}倍，"
    b = a * times
    if level == 2:
        operations = ((a, "*", times), (a, "+", b))
        return _Draft(operations=operations, en=en + " How many in all?", zh=zh + "一共有多少个？")
    sign = rng.choice("+-")
    more = rng.randint(2, b - 1) if sign == "-" else more
    c = apply((b, sign, more))
    en += f" {en_c} has {more} {'more' if sign == '+' else 'fewer'} than {en_b}."
    zh += f"{zh_c}比{zh_b}{'多' if sign == '+' else '少'}{more}个，"
    if level == 3:
        operations = ((a, "*", times), (b, sign, more), (c, "+", b))
        en += f" How many have {en_b} and {en_c}?"
        zh += f"{zh_b}和{zh_c}有多少个？"
    else:
        operations = ((a, "*", times), (b, sign, more), (a, "+", b), (a + b, "+", c))
        en += " How many in all?"
        zh += "一共有多少个？"
    return _Draft(operations=operations, en=en, zh=zh)


def _sharing(rng: random.Random, level: int) -> _Draft:
    """Things shared fairly, then some more, or some eaten."""
    item, zh_item = rng.choice(SWEETS)
    children, each = _factor(rng), rng.randint(3, 12)
    total = children * each
    if level <= 2:
        operations: list[Operation] = [(total, "/", children)]
        en = f"{total} {item} are shared by {children} children."
        zh = f"{total}个{zh_item}分给{children}个孩子，"
    else:
        bags = rng.choice([n for n in range(2, 13) if total % n == 0 and total // n > 1] or [1])
        operations = [(bags, "*", total // bags), (total, "/", children)]
        en = f"{bags} bags of {total // bags} {item} are shared by {children} children."
        zh = f"{bags}袋{zh_item}，每袋{total // bags}个，分给{children}个孩子，"
    if level >= 2:
        is_more = rng.random() < 0.5
        number = rng.randint(2, 40) if is_more else rng.randint(1, each - 1)
        operations.append((each, "+" if is_more else "-", number))
        en += f" Each {'gets' if is_more else 'eats'} {number}{' more' if is_more else ''}."
        zh += f"每人又{'拿' if is_more else '吃'}了{number}个，"
        each = apply(operations[-1])
    if level == 4:
        count = rng.randint(2, 5)
        operations.append((each, "*", count))
        return _Draft(
            operations=tuple(operations),
            en=en + f" How many do {count} of them have?",
            zh=zh + f"其中{count}人有多少个？",
        )
    return _Draft(
        operations=tuple(operations), en=en + " How many has each?", zh=zh + "每人有多少个？"
    )


def _travel(rng: random.Random, level: int) -> _Draft:
    """Hours at a speed: one leg, what is left, two legs, two legs and what is left."""
    ((en_name, zh_name),) = _names(rng, 1)
    hours, speed, hours_2, speed_2 = _factor(rng), rng.randint(3, 12), _factor(rng), _factor(rng)
    way = hours * speed
    en = f"{en_name} walks {hours} hours at {speed} km an hour"
    zh = f"{zh_name}走了{hours}小时，每小时{speed}千米"
    operations: list[Operation] = [(hours, "*", speed)]
    if level >= 3:
        en += f", then {hours_2} hours at {speed_2} km an hour"
        zh += f"，又走了{hours_2}小时，每小时{speed_2}千米"
        operations += [(hours_2, "*", speed_2), (way, "+", hours_2 * speed_2)]
        way += hours_2 * speed_2
    if level in (2, 4):
        whole = way + rng.randint(4, 50)
        operations.append((whole, "-", way))
        en += f". The way is {whole} km. How far is left?"
        zh += f"，全程{whole}千米，还剩多少千米？"
    else:
        en += ". How far is that?"
        zh += "，一共多少千米？"
    return _Draft(operations=tuple(operations), en=en, zh=zh)


def _rectangle(rng: random.Random, level: int) -> _Draft:
    """A garden: its area, its fence, its fence and a price, two beds and what is left."""
    length, width = rng.randint(5, 12), rng.randint(2, 9)
    en, zh = f"A garden is {length} m by {width} m.", f"花园长{length}米，宽{width}米，"
    half = length + width
    if level == 1:
        operations: tuple[Operation, ...] = ((length, "*", width),)
        en, zh = en + " What is its area?", zh + "面积是多少？"
    elif level == 2:
        operations = ((length, "+", width), (half, "*", 2))
        en, zh = en + " How long is its fence?", zh + "周长是多少？"
    elif level == 3:
        price = rng.randint(2, 5)
        operations = ((length, "+", width), (half, "*", 2), (2 * half, "*", price))
        en += f" Fencing costs {price} coins a metre. What is the cost?"
        zh += f"围栏每米{price}元，一共多少元？"
    else:
        a, b = rng.randint(2, 6), _factor(rng)
        area, beds = length * width, a * b
        more = rng.randint(2, 30)
        operations = (
            (length, "*", width),
            (a, "*", b),
            (area, "+", beds),
            (area + beds, "+", more),
        )
        en += f" A field is {a} m by {b} m. A path has {more} square m. What is the area in all?"
        zh += f"菜地长{a}米，宽{b}米，小路有{more}平方米，总面积是多少？"
    return _Draft(operations=operations, en=en, zh=zh)


KINDS: dict[str, Callable[[random.Random, int], _Draft]] = {
    "expression": _expression,
    "sum": _sum,
    "chain": _chain,
    "shopping": _shopping,
    "bus": _bus,
    "compare": _compare,
    "sharing": _sharing,
    "travel": _travel,
    "rectangle": _rectangle,
}


def draw_problem(rng: random.Random, *, kind: str, level: int, language: str) -> Problem:
    """Draw one problem of a kind, a level (1 to 4) and a language ("en" or "zh").

    Every number on the way to the answer is between 1 and LARGEST. Raises ValueError for an unknown
    kind, level or language.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; known: {', '.join(KINDS)}")
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r}; known: {LEVELS}")
    if language not in LANGUAGES:
        raise ValueError(f"unknown language {language!r}; known: {', '.join(LANGUAGES)}")
    while True:
        draft = KINDS[kind](rng, level)
        results = [apply(operation) for operation in draft.operations]
        if all(1 <= number <= LARGEST for number in results):
            break
    signs = zip(draft.operations, results, strict=True)
    steps = tuple(f"{left}{sign}{right}={result}" for (left, sign, right), result in signs)
    return Problem(
        prompt=draft.en if language == "en" else draft.zh,
        answer=results[-1],
        steps=steps,
        kind=kind,
        level=level,
        language=language,
        signature=f"{kind}:" + ";".join(steps),
    )
