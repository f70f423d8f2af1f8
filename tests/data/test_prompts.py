"""Prompts: columns, formats, limits, every bad row, the warning about shared questions."""

from __future__ import annotations

import pytest

from sparring.data.chat import build_template
from sparring.data.prompts import load_prompts, shared_prompts
from sparring.data.rows import build_rows, load_rows
from sparring.errors import DataError

TEXT = [
    {"prompt": "What is 3 + 4?", "reference": "7", "level": 1},
    {"prompt": "三加四等于几？", "reference": "7", "hint": [1, 2]},
]


def load(rows, tokenizer, **knobs):
    knobs = {"max_prompt_tokens": 500, **knobs}
    return load_prompts(build_rows(rows, name="data"), tokenizer, **knobs)


def test_text_rows_without_a_template_stand_as_they_are(make_tokenizer):
    tokenizer = make_tokenizer(begin=True)
    prompts = load(TEXT, tokenizer)
    assert [prompt.text for prompt in prompts] == [row["prompt"] for row in TEXT]
    assert list(prompts[0].token_ids) == tokenizer(TEXT[0]["prompt"])["input_ids"]
    assert prompts[0].messages is None
    assert prompts[0].columns == {"reference": "7", "level": 1, "hint": None}
    assert prompts[1].columns == {"reference": "7", "level": None, "hint": [1, 2]}
    assert [prompt.id for prompt in prompts] == [0, 1]


def test_text_rows_become_one_user_message(make_tokenizer, chatml):
    prompts = load(TEXT, make_tokenizer(chatml), system_prompt="be brief")
    assert prompts[0].messages is None
    assert prompts[0].text == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nWhat is 3 + 4?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    raw = load(TEXT, make_tokenizer(chatml), template="none")
    assert raw[0].text == "What is 3 + 4?"


def test_message_rows_keep_their_messages(make_tokenizer, chatml):
    turns = [
        {"role": "user", "content": "hello", "name": None},
        {"role": "assistant", "content": "world"},
        {"role": "user", "content": "question"},
    ]
    tokenizer = make_tokenizer(chatml + "{% if add_generation_prompt %}<think>\n{% endif %}")
    prompts = load([{"prompt": turns, "reference": 7}], tokenizer, system_prompt="be brief")
    prompt = prompts[0]
    assert [turn["role"] for turn in prompt.messages] == ["system", "user", "assistant", "user"]
    assert prompt.text.endswith("user\nquestion<|im_end|>\n<|im_start|>assistant\n<think>\n")
    assert prompt.prefill == "<think>\n"
    assert tokenizer.decode(prompt.token_ids) == prompt.text
    assert "the template begins the completion with '<think>\\n'" in "\n".join(prompts.report())


def test_reference_column_keeps_its_name_and_is_the_reference(make_tokenizer):
    rows = [{"question": "a", "answer": "7", "reference": "old"}]
    prompts = load(rows, make_tokenizer(), prompt_column="question", reference_column="answer")
    assert prompts[0].columns == {"answer": "7", "reference": "7"}
    assert "'reference' is hidden" in "\n".join(prompts.report())
    none = load([{"prompt": "a"}], make_tokenizer(), reference_column="")
    assert none[0].columns == {}


@pytest.mark.parametrize(
    ("knobs", "what"),
    [
        (
            {"prompt_column": "question"},
            "no column 'question'; its columns are: prompt, reference, level, hint; set data",
        ),
        ({"reference_column": "answer"}, "no column 'answer'.*set data.reference"),
        ({"max_prompt_tokens": 0}, "0 tokens are left for prompts"),
        ({"bad_rows": "maybe"}, "'error' or 'skip'"),
    ],
)
def test_wrong_settings(make_tokenizer, knobs, what):
    with pytest.raises(DataError, match=what):
        load(TEXT, make_tokenizer(), **knobs)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": 7, "reference": "7"}, "'prompt' is a int; it is text or a list of messages"),
        ({"prompt": {"role": "user"}, "reference": "7"}, "'prompt' is a dict"),
        ({"prompt": " \n", "reference": "7"}, "'prompt' is empty"),
        ({"prompt": None, "reference": "7"}, "the row has no 'prompt'"),
        ({"reference": "7"}, r"the row has no 'prompt' \(its columns: reference\)"),
        ({"prompt": "a", "reference": None}, "the row has no 'reference'"),
        ({"prompt": "a"}, "the row has no 'reference'"),
        ({"prompt": [], "reference": "7"}, "the conversation is empty"),
        ({"prompt": [{"role": "user"}], "reference": "7"}, "'content'"),
        (
            {"prompt": [{"role": "assistant", "content": "a"}], "reference": "7"},
            "ends with the assistant's turn",
        ),
        (
            {"prompt": [{"role": "user", "content": "refuse me"}], "reference": "7"},
            "the chat template .* refuses",
        ),
    ],
)
def test_bad_row_is_named_or_skipped(make_tokenizer, chatml, row, what):
    strict = "{% if 'refuse' in messages[-1].content %}{{ raise_exception('no') }}{% endif %}"
    tokenizer = make_tokenizer(strict + chatml)
    rows = [TEXT[0], row, TEXT[1]]
    with pytest.raises(DataError, match=what) as caught:
        load(rows, tokenizer)
    assert str(caught.value).startswith("data:row 2: ")
    prompts = load(rows, tokenizer, bad_rows="skip")
    assert [prompt.id for prompt in prompts] == [0, 2]
    assert prompts.num_bad == 1
    report = "\n".join(prompts.report())
    assert "2 prompts of 3 rows" in report
    assert "1 bad row skipped" in report
    assert "data:row 2: " in report


def test_a_bad_row_of_a_file_is_named_by_its_line(make_tokenizer, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a", "reference": "1"}\n\n\n{"prompt": 3, "reference": "1"}\nx\n')
    with pytest.raises(DataError, match=r"x\.jsonl:4: 'prompt' is a int"):
        load_prompts(load_rows(str(path), bad_rows="skip"), make_tokenizer(), max_prompt_tokens=50)
    rows = load_rows(str(path), bad_rows="skip")
    prompts = load_prompts(rows, make_tokenizer(), max_prompt_tokens=50, bad_rows="skip")
    assert (len(prompts), prompts.num_rows, prompts.num_bad) == (1, 3, 2)
    assert [message.split(": ")[0][-2:] for message in prompts.bad] == [":5", ":4"]


def test_all_rows_bad(make_tokenizer):
    with pytest.raises(DataError, match="all 2 rows are bad; the first is data:row 1"):
        load([{"prompt": 1, "reference": 1}] * 2, make_tokenizer(), bad_rows="skip")


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_messages_without_a_template_are_the_recipes_mistake(make_tokenizer, policy):
    rows = [TEXT[0], {"prompt": [{"role": "user", "content": "a"}], "reference": "1"}]
    with pytest.raises(DataError, match="data:row 2: the data holds messages") as caught:
        load(rows, make_tokenizer(), bad_rows=policy)
    assert '"think" (base models), "chatml" or a .jinja file' in str(caught.value)
    with pytest.raises(DataError, match='template = "none" is set'):
        load(rows, make_tokenizer(), bad_rows=policy, template="none")


def test_too_long_prompts_are_dropped_and_counted_never_cut(make_tokenizer):
    tokenizer = make_tokenizer()
    rows = [{"prompt": "a" * length, "reference": "1"} for length in (3, 50, 10, 90)]
    lengths = [len(tokenizer(row["prompt"])["input_ids"]) for row in rows]
    assert sorted(lengths) == [lengths[0], lengths[2], lengths[1], lengths[3]]
    prompts = load(rows, tokenizer, max_prompt_tokens=lengths[2])
    assert [prompt.id for prompt in prompts] == [0, 2]
    assert [len(prompt.token_ids) for prompt in prompts] == [lengths[0], lengths[2]]
    assert (prompts.num_too_long, prompts.longest) == (2, lengths[3])
    assert (
        f"2 dropped: longer than {lengths[2]} tokens (the longest, data:row 4, has {lengths[3]})"
        in "\n".join(prompts.report())
    )
    with pytest.raises(DataError, match=r"all 4 prompts are longer than 1 tokens") as caught:
        load(rows, tokenizer, max_prompt_tokens=1)
    assert f"the shortest has {lengths[0]}, the longest, data:row 4, {lengths[3]}" in str(
        caught.value
    )
    assert "max_completion_tokens" in str(caught.value)


def test_shared_prompts_are_found_whatever_their_case_spacing_and_form(make_tokenizer, chatml):
    tokenizer = make_tokenizer(chatml)
    train = load(TEXT, tokenizer)
    turns = [{"role": "system", "content": "x"}, {"role": "user", "content": "what is 3 + 4?"}]
    evaluation = load(
        [
            {"prompt": "What is 3 + 5?", "reference": "8"},
            {"prompt": " WHAT  is\n3 + 4? ", "reference": "7"},
            {"prompt": turns, "reference": "7"},
        ],
        tokenizer,
        system_prompt="be brief",
    )
    assert shared_prompts(train, evaluation) == (1, 2)
    assert shared_prompts(evaluation, train) == (0,)


def test_a_built_template_is_used_as_it_is(make_tokenizer, chatml):
    tokenizer = make_tokenizer(chatml)
    template = build_template(tokenizer, "think", "be brief")
    assert load(TEXT, tokenizer, template=template).template is template
    with pytest.raises(ValueError, match="own system prompt"):
        load(TEXT, tokenizer, template=template, system_prompt="be long")


def test_long_prompts_raise_no_warning_of_the_tokenizer(make_tokenizer, caplog, capfd):
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 4
    load([{"prompt": "a b c d e f g h", "reference": "1"}], tokenizer)
    assert "longer than" not in caplog.text + capfd.readouterr().err


@pytest.mark.shared
def test_gsm8k_with_a_real_tokenizer(shared_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "tokenizers" / "minimind")
    folder = str(shared_dir / "data" / "gsm8k")
    train = load_prompts(load_rows(folder, limit=300), tokenizer, max_prompt_tokens=150)
    assert len(train) + train.num_too_long == 300
    assert train.num_too_long > 0
    for prompt in train.prompts[:20]:
        assert tokenizer.decode(prompt.token_ids) == prompt.text
        assert prompt.text.endswith(prompt.prefill)
        assert set(prompt.columns) == {"reference", "solution"}
    test = load_prompts(
        load_rows(folder, split="test", limit=200), tokenizer, max_prompt_tokens=1000
    )
    assert shared_prompts(train, test) == ()
