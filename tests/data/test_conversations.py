"""Conversations: what is learned is exactly what the assistant writes, in every format."""

from __future__ import annotations

import json

import pytest
import torch

from sparring.data.chat import build_template
from sparring.data.conversations import load_conversations
from sparring.data.rows import build_rows, load_rows
from sparring.errors import DataError

END = "<|im_end|>"


def load(rows, tokenizer, **knobs):
    return load_conversations(
        build_rows(rows, name="data"), tokenizer, **{"max_tokens": 999, **knobs}
    )


def learned(sample, tokenizer):
    """The runs of tokens that bear loss, as text."""
    runs, last = [], False
    for token, mask in zip(sample.token_ids.tolist(), sample.loss_mask.tolist(), strict=True):
        if mask and not last:
            runs.append([])
        if mask:
            runs[-1].append(token)
        last = mask
    return [tokenizer.decode(run) for run in runs]


def whole(sample, tokenizer):
    return tokenizer.decode(sample.token_ids)


def chat(*contents, roles=("user", "assistant")):
    return [
        {"role": roles[index % 2], "content": content} for index, content in enumerate(contents)
    ]


def test_every_assistant_turn_is_learned_with_its_end_token(make_tokenizer, chatml):
    tokenizer = make_tokenizer(chatml)
    rows = [{"messages": [{"role": "system", "content": "S"}, *chat("q1", "a1", "q2", "a2")]}]
    (sample,) = load(rows, tokenizer)
    assert learned(sample, tokenizer) == ["a1" + END, "a2" + END]
    text = tokenizer.apply_chat_template(rows[0]["messages"], tokenize=False)
    assert whole(sample, tokenizer) == text.rstrip("\n")
    assert sample.token_ids.dtype == torch.int64
    assert sample.loss_mask.dtype == torch.bool


def test_generation_markers_make_no_difference(make_tokenizer, chatml):
    marked = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
        "{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rows = [{"messages": chat("q1", "first answer", "q2", "second")}]
    tokenizer = make_tokenizer(marked)
    (sample,) = load(rows, tokenizer)
    (plain,) = load(rows, make_tokenizer(chatml))
    assert torch.equal(sample.token_ids, plain.token_ids)
    assert torch.equal(sample.loss_mask, plain.loss_mask)
    by_markers = tokenizer.apply_chat_template(
        rows[0]["messages"], return_dict=True, return_assistant_tokens_mask=True
    )
    count = len(sample.token_ids)  # the sample stops behind the last token that is learned
    assert by_markers["input_ids"][:count] == sample.token_ids.tolist()
    assert by_markers["assistant_masks"][:count] == sample.loss_mask.int().tolist()


def test_a_template_that_rewrites_history_gives_a_sample_a_turn(make_tokenizer, rewriting):
    tokenizer = make_tokenizer(rewriting)
    turns = chat("q1", "<think>\nx\n</think>\n\na1", "q2", "<think>\ny\n</think>\n\na2")
    samples = load([{"messages": turns}], tokenizer)
    assert [learned(sample, tokenizer) for sample in samples] == [
        ["<think>\nx\n</think>\n\na1" + END],
        ["<think>\ny\n</think>\n\na2" + END],
    ]
    assert "<think>\nx" not in whole(samples[1], tokenizer)
    assert "assistant\na1" + END in whole(samples[1], tokenizer)
    assert samples.num_split == 1
    assert "template rewrites history" in "\n".join(samples.report())
    (kept,) = load([{"messages": chat("q1", "a1", "q2", "<think>\ny\n</think>\n\na2")}], tokenizer)
    assert learned(kept, tokenizer) == ["a1" + END, "<think>\ny\n</think>\n\na2" + END]


@pytest.mark.parametrize("name", ["auto", "think", "think-open", "chatml"])
def test_each_turn_is_learned_behind_its_generation_prompt(make_tokenizer, rewriting, name):
    tokenizer = make_tokenizer(rewriting, begin=True)
    template = build_template(tokenizer, name)
    turns = chat("q1", "<think>\nx\n</think>\n\na1", "q2", "<think>\ny\n</think>\n\na2", "q3", "a3")
    samples = load([{"messages": turns}], tokenizer, template=name)
    for index in (1, 3, 5):
        rendered = template.render(turns[:index], add_generation_prompt=True)
        content, prefill = turns[index]["content"], rendered.prefill
        closes = "<think>" in prefill and "</think>" not in content
        if content.startswith(prefill) or closes:
            prefill = ""
        ids = template.encode(rendered.text.removesuffix(prefill) if prefill else rendered.text)
        behind = [
            sample
            for sample in samples
            if sample.token_ids[: len(ids)].tolist() == ids
            and bool(sample.loss_mask[len(ids)])
            and not bool(sample.loss_mask[len(ids) - 1])
        ]
        assert len(behind) == 1


def test_prefill_belongs_to_the_prompt(make_tokenizer, chatml):
    opened = chatml.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    tokenizer = make_tokenizer(opened)
    thinking, direct = load(
        [{"messages": chat("q", "<think>\nx\n</think>\n\na")}, {"messages": chat("q", "a")}],
        tokenizer,
    )
    assert learned(thinking, tokenizer) == ["x\n</think>\n\na" + END]
    assert whole(thinking, tokenizer).endswith("assistant\n<think>\nx\n</think>\n\na" + END)
    assert learned(direct, tokenizer) == ["\n</think>\n\na" + END]
    assert whole(direct, tokenizer).endswith("assistant\n<think>\n\n</think>\n\na" + END)


def test_an_empty_think_block_of_the_template_stays_in_the_prompt(make_tokenizer, chatml):
    block = "<think>\n\n</think>\n\n"
    opened = chatml.replace("assistant\n{% endif %}", f"assistant\n{block}{{% endif %}}")
    tokenizer = make_tokenizer(opened)
    for answer in ("a", block + "a"):
        (sample,) = load([{"messages": chat("q", answer)}], tokenizer)
        assert learned(sample, tokenizer) == ["a" + END]
        assert whole(sample, tokenizer).endswith(f"assistant\n{block}a{END}")


def test_rows_of_ms_swift(make_tokenizer, chatml):
    rows = [{"query": "q2", "response": "a2", "history": [["q1", "a1"]], "tag": "en"}]
    (sample,) = load(rows, make_tokenizer(chatml))
    assert learned(sample, make_tokenizer(chatml)) == ["a1" + END, "a2" + END]


def test_prompt_and_completion_text(make_tokenizer, chatml):
    rows = [{"prompt": "What is 3 + 4?", "completion": " 7."}]
    bare = make_tokenizer(begin=True)
    (sample,) = load(rows, bare)
    assert learned(sample, bare) == [" 7." + END]
    assert whole(sample, bare) == "<s>What is 3 + 4? 7." + END
    (ended,) = load([{"prompt": "What is 3 + 4?", "completion": " 7." + END}], bare)
    assert torch.equal(ended.token_ids, sample.token_ids)
    templated = make_tokenizer(chatml)
    (sample,) = load(rows, templated, system_prompt="S")
    assert learned(sample, templated) == [" 7." + END]
    assert whole(sample, templated).startswith(
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nWhat"
    )
    (raw,) = load(rows, templated, template="none")
    assert whole(raw, templated) == "What is 3 + 4? 7." + END


def test_prompt_and_completion_that_join_into_one_token(make_tokenizer):
    tokenizer = make_tokenizer()
    (sample,) = load([{"prompt": "12 app", "completion": "les"}], tokenizer)
    assert learned(sample, tokenizer) == ["les" + END]
    assert sample.token_ids[:-1].tolist() != tokenizer("12 apples")["input_ids"]


def test_completion_messages_are_learned_and_the_prompts_turns_are_not(make_tokenizer, chatml):
    tokenizer = make_tokenizer(chatml)
    row = {
        "prompt": chat("q1", "a1", "q2"),
        "completion": [{"role": "assistant", "content": "a2"}, *chat("q3", "a3")],
    }
    (sample,) = load([row], tokenizer)
    assert learned(sample, tokenizer) == ["a2" + END, "a3" + END]
    (mixed,) = load([{"prompt": chat("q1"), "completion": "a1"}], tokenizer)
    assert learned(mixed, tokenizer) == ["a1" + END]


def test_alpaca_rows(make_tokenizer, chatml):
    tokenizer = make_tokenizer(chatml)
    rows = [
        {"instruction": "Add.", "input": "3, 4", "output": "7", "system": "S"},
        {"instruction": "Say hello.", "input": "", "output": "hello", "history": [["q", "a"]]},
    ]
    first, second = load(rows, tokenizer)
    assert "system\nS" + END in whole(first, tokenizer)
    assert "user\nAdd.\n3, 4" + END in whole(first, tokenizer)
    assert learned(first, tokenizer) == ["7" + END]
    assert learned(second, tokenizer) == ["a" + END, "hello" + END]
    bare = make_tokenizer()
    (sample,) = load([{"instruction": "Add 3.", "output": "7"}], bare)
    assert whole(sample, bare) == "Add 3.7" + END


def test_sharegpt_rows(make_tokenizer, chatml):
    tokenizer = make_tokenizer(chatml)
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    (sample,) = load([{"conversations": turns, "system": "S"}], tokenizer)
    assert learned(sample, tokenizer) == ["a" + END]
    assert "system\nS" + END in whole(sample, tokenizer)
    (same,) = load([{"conversations": chat("q", "a")}], tokenizer)
    assert learned(same, tokenizer) == ["a" + END]
    with pytest.raises(DataError, match="'from' 'alien'; known speakers are human, user, gpt"):
        load([{"conversations": [{"from": "alien", "value": "q"}]}], tokenizer)


def test_a_template_without_an_end_token_gets_one(make_tokenizer):
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    samples = load([{"messages": chat("q1", "a1", "q2", "a2")}], tokenizer)
    assert [learned(sample, tokenizer) for sample in samples] == [[" a1" + END], [" a2" + END]]
    assert whole(samples[1], tokenizer) == "user: q1\nassistant: a1\nuser: q2\nassistant: a2" + END


def test_tool_turns_are_context(make_tokenizer, chatml):
    tokenizer = make_tokenizer(
        chatml.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls }}")
    )
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": ["f()"]},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "a"},
    ]
    (sample,) = load([{"messages": turns}], tokenizer)
    assert learned(sample, tokenizer) == ["['f()']" + END, "a" + END]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": []}, "the conversation is empty"),
        ({"messages": "hello"}, "is a str"),
        ({"messages": None}, "the row has no 'messages'"),
        ({"messages": chat("q")}, "no assistant turn"),
        ({"messages": chat("q", " \n")}, "message 2, the assistant's, is empty"),
        ({"messages": chat("a", roles=("assistant", "user"))}, "begins with the assistant's turn"),
        ({"messages": chat("q", "EMPTY")}, "message 2, the assistant's, is empty after templating"),
        ({"messages": chat("q", "DIFFERENT")}, "differently from the generation prompt"),
        ({"messages": chat("q", "DROP <think>\nx\n</think>a")}, "drops the thinking of message 2"),
    ],
)
def test_bad_row_is_named_or_skipped(make_tokenizer, row, what):
    source = (
        "{% for m in messages %}{% set said = m.content %}"
        "{% if 'EMPTY' in said %}{% set said = '' %}{% endif %}"
        "{% if 'DROP' in said %}{% set said = said.split('</think>')[-1] %}{% endif %}"
        "<|im_start|>{{ 'model' if 'DIFFERENT' in said else m.role }}\n{{ said }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make_tokenizer(source)
    good = {"messages": chat("q", "a")}
    with pytest.raises(DataError, match=what) as caught:
        load([good, row, good], tokenizer)
    assert str(caught.value).startswith("data:row 2: ")
    samples = load([good, row, good], tokenizer, bad_rows="skip")
    assert [sample.row for sample in samples] == [0, 2]
    assert samples.num_bad == 1
    assert "data:row 2: " in "\n".join(samples.report())


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "q", "completion": " "}, "'completion' is empty"),
        ({"prompt": "", "completion": "a"}, "'prompt' is empty"),
        ({"prompt": "q", "completion": 7}, "'completion' is a int"),
        ({"prompt": "q"}, "the row has no 'completion'"),
        ({"prompt": "q", "completion": "a", "weight": "x"}, "'weight' is 'x'; it is a number"),
        ({"prompt": "q", "completion": "a", "weight": 0}, "positive number"),
        ({"prompt": "q", "completion": "a", "weight": float("nan")}, "positive number"),
    ],
)
def test_bad_prompt_and_completion(make_tokenizer, row, what):
    rows = [{"prompt": "q", "completion": "a", "weight": 1}, {"weight": 1, **row}]
    with pytest.raises(DataError, match=what):
        load(rows, make_tokenizer(), weight_column="weight")


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"instruction": "", "output": "a"}, "'instruction' is empty"),
        ({"instruction": "q", "output": ""}, "'output' is empty"),
        ({"instruction": "q", "output": "a", "input": 3}, "'input' is a int"),
        ({"instruction": "q", "output": "a", "history": [["x"]]}, "'history' is a list of"),
    ],
)
def test_bad_alpaca(make_tokenizer, chatml, row, what):
    with pytest.raises(DataError, match=what):
        load([row], make_tokenizer(chatml))


def test_wrong_settings(make_tokenizer, chatml):
    with pytest.raises(DataError, match=r"its columns are question, answer; expected messages, or"):
        load([{"question": "q", "answer": "a"}], make_tokenizer())
    with pytest.raises(DataError, match="no column 'weight'"):
        load([{"messages": chat("q", "a")}], make_tokenizer(chatml), weight_column="weight")
    with pytest.raises(DataError, match=r"data:row 1: the data holds messages.*\.jinja"):
        load([{"messages": chat("q", "a")}], make_tokenizer(), bad_rows="skip")
    with pytest.raises(DataError, match="no end token"):
        load([{"prompt": "q", "completion": "a"}], make_tokenizer(end=None))
    with pytest.raises(DataError, match="all 1 rows are bad"):
        load([{"messages": chat("q")}], make_tokenizer(chatml), bad_rows="skip")


def test_other_column_names_and_weights(make_tokenizer):
    rows = [{"q": "x", "a": "y", "w": 2}, {"q": "x", "a": "y", "w": "0.5"}]
    samples = load(
        rows, make_tokenizer(), prompt_column="q", completion_column="a", weight_column="w"
    )
    assert [sample.weight for sample in samples] == [2.0, 0.5]


def test_too_long_samples_are_dropped_and_counted(make_tokenizer):
    rows = [{"prompt": "q", "completion": "a" * length} for length in (3, 200, 5)]
    tokenizer = make_tokenizer()
    longest = len(tokenizer("q" + "a" * 200)["input_ids"]) + 1
    samples = load(rows, tokenizer, max_tokens=20)
    assert [sample.row for sample in samples] == [0, 2]
    assert (samples.num_too_long, samples.longest) == (1, longest)
    assert (
        f"1 dropped: longer than 20 tokens (the longest, data:row 2, has {longest})"
        in "\n".join(samples.report())
    )
    assert load(rows, tokenizer, max_tokens=longest).num_too_long == 0
    with pytest.raises(
        DataError, match=r"all 3 samples are longer than 2 .* the longest, data:row 2,"
    ):
        load(rows, tokenizer, max_tokens=2)


def test_identity_file_as_json_array(make_tokenizer, chatml, tmp_path):
    path = tmp_path / "identity.json"
    path.write_text(json.dumps([{"instruction": "你是谁？", "input": "", "output": "我是小明。"}]))
    tokenizer = make_tokenizer(chatml)
    (sample,) = load_conversations(load_rows(str(path)), tokenizer, max_tokens=200)
    assert learned(sample, tokenizer) == ["我是小明。" + END]


REAL = [
    {"messages": chat("Hi", "Hello!", "2+2?", "<think>\nadd\n</think>\n\n4")},
    {"messages": chat("三加四？", "<think>\n加\n</think>\n\n七", "why?", "because")},
]


@pytest.mark.shared
@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "minimind", "smollm", "mistral-v3", "gpt2"])
def test_real_tokenizers(shared_dir, name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "tokenizers" / name)
    kind = "auto" if tokenizer.chat_template else "think"
    samples = load(REAL, tokenizer, template=kind)
    template = samples.template
    said = [run for sample in samples for run in learned(sample, tokenizer)]
    contents = ["Hello!", "4", "七", "because"]
    assert len(said) == len(contents)
    for run, content in zip(said, contents, strict=True):
        assert run.endswith(content + tokenizer.eos_token)
    assert "add" in said[1]
    assert "加" in said[2]
    assert samples.num_split == (2 if name == "qwen3" else 0)
    for sample in samples:
        assert bool(sample.loss_mask[-1])
        turns = REAL[sample.row]["messages"]
        if samples.num_split == 0 and kind == "auto":
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            assert whole(sample, tokenizer) == text.rstrip("\n")
            assert sample.token_ids.tolist() == template.encode(text)[: len(sample.token_ids)]


@pytest.mark.shared
@pytest.mark.parametrize("name", ["mistral-v3", "gpt2", "qwen2.5"])
def test_real_tokenizers_on_plain_text(shared_dir, name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "tokenizers" / name)
    texts = [("What is 1+1? ", "2"), ("Say ab", "cd"), ("Q: x\n", "\n  y = 3"), ("问：", "答案")]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in texts]
    for sample, (prompt, completion) in zip(
        load(rows, tokenizer, template="none"), texts, strict=True
    ):
        ids = sample.token_ids.tolist()
        begin = len(build_template(tokenizer, "none").begin_ids)
        assert tokenizer.decode(ids[begin:-1]) == prompt + completion
        assert ids[-1] == tokenizer.eos_token_id
        start = int(sample.loss_mask.int().argmax())
        assert tokenizer.decode(ids[begin:start]) == prompt
