"""Templates: rendering, the assistant's header and prefill, begin and end tokens, refusals."""

from __future__ import annotations

import pytest

from sparring.data.chat import NAMES, build_template, parse_messages
from sparring.errors import DataError

ASK = [{"role": "user", "content": "hello"}]


def generation(end: str) -> str:
    """A template whose generation prompt ends in `end` behind the header "[A]"."""
    return (
        "{% for m in messages %}{{ '[U]' if m.role == 'user' else '[A]' }}{{ m.content }}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}[A]" + end + "{% endif %}"
    )


@pytest.mark.parametrize(
    ("source", "header", "prefill"),
    [
        (generation(""), "[A]", ""),
        (generation("<think>\n"), "[A]", "<think>\n"),
        (generation("<think>\n\n</think>\n\n"), "[A]", "<think>\n\n</think>\n\n"),
        (generation("Answer:"), "[A]", "Answer:"),
        (generation("\n"), "[A]", ""),
        # the assistant turn always carries a think block, as in Qwen3
        (
            "{% for m in messages %}{% if m.role == 'user' %}[U]{{ m.content }}{% else %}"
            "[A]<think>\n{{ m.content.split('</think>')[0].split('<think>\n')[1] "
            "if '</think>' in m.content }}</think>{{ m.content.split('</think>')[-1] }}{% endif %}"
            "<|im_end|>{% endfor %}{% if add_generation_prompt %}[A]<think>\n\n</think>{% endif %}",
            "[A]",
            "<think>\n\n</think>",
        ),
        # thinking is removed from answers but opened for generation, as in R1-Distill
        (
            "{% for m in messages %}{{ '[U]' if m.role == 'user' else '[A]' }}"
            "{{ m.content.split('</think>')[-1] }}{{ '' if m.role == 'user' else '<|im_end|>' }}"
            "{% endfor %}{% if add_generation_prompt %}[A]<think>\n{% endif %}",
            "[A]",
            "<think>\n",
        ),
        # a space behind the header in a finished turn, none in the generation prompt
        (
            generation("<think>\n").replace("'[A]' }}{{ m.content", "'[A] ' }}{{ m.content"),
            "[A] ",
            "<think>\n",
        ),
        # no generation prompt at all, as in Mistral; a space stands before the answer
        (
            "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
            "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}",
            " ",
            "",
        ),
    ],
)
def test_prefill_is_what_follows_the_header(make_tokenizer, source, header, prefill):
    template = build_template(make_tokenizer(source))
    rendered = template.render(ASK, add_generation_prompt=True)
    assert template.header == header
    assert rendered.prefill == prefill
    assert rendered.text.endswith(prefill)
    assert template.render(ASK, add_generation_prompt=False).prefill == ""


def test_prefill_where_closing_changes_the_text_before_it(make_tokenizer):
    source = (
        "{{ 'open' if add_generation_prompt else 'closed' }}{{ messages[-1].content }}"
        "{% if add_generation_prompt %}[A]<think>\n{% endif %}"
    )
    template = build_template(make_tokenizer(source))
    assert template.render(ASK, add_generation_prompt=True).prefill == "<think>\n"


def test_prefill_may_hang_on_the_messages(make_tokenizer, chatml):
    source = chatml.replace(
        "assistant\n{% endif %}",
        "assistant\n{% if '/no_think' in messages[-1].content %}<think></think>{% endif %}"
        "{% endif %}",
    )
    template = build_template(make_tokenizer(source))
    no_think = [{"role": "user", "content": "hello /no_think"}]
    assert template.render(no_think, add_generation_prompt=True).prefill == "<think></think>"
    assert template.render(ASK, add_generation_prompt=True).prefill == ""


def test_options_reach_the_template(make_tokenizer, chatml):
    source = (
        chatml + "{% if add_generation_prompt and thinking is false %}<think></think>{% endif %}"
    )
    tokenizer = make_tokenizer(source)
    off = build_template(tokenizer, options={"thinking": False})
    assert off.render(ASK, add_generation_prompt=True).prefill == "<think></think>"
    assert build_template(tokenizer).render(ASK, add_generation_prompt=True).prefill == ""


def test_our_templates(make_tokenizer):
    tokenizer = make_tokenizer()
    turns = [*ASK, {"role": "assistant", "content": "<think>\nx\n</think>"}, *ASK]
    think = build_template(tokenizer, "think").render(turns, add_generation_prompt=True)
    assert think.prefill == ""
    assert think.text.endswith(
        "Assistant: <think>\nx\n</think><|im_end|>\n\nUser: hello\nAssistant:"
    )
    assert all(tag in think.text for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    opened = build_template(tokenizer, "think-open").render(turns, add_generation_prompt=True)
    assert (opened.text, opened.prefill) == (think.text + " <think>\n", "<think>\n")
    chatml = build_template(tokenizer, "chatml").render(ASK, add_generation_prompt=True)
    assert chatml.text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(DataError, match="knows the roles system, user and assistant, not tool"):
        build_template(tokenizer, "think").render(
            [*ASK, {"role": "tool", "content": "x"}], add_generation_prompt=True
        )


def test_the_begin_token_is_written_once(make_tokenizer, chatml):
    tokenizer = make_tokenizer("<s>" + chatml, begin=True)
    begin = tokenizer.convert_tokens_to_ids("<s>")
    for name in ("auto", "think", "chatml"):
        template = build_template(tokenizer, name)
        ids = template.encode(template.render(ASK, add_generation_prompt=True).text)
        assert ids[0] == begin
        assert ids.count(begin) == 1
    plain = build_template(tokenizer, "none")
    assert plain.encode("hello")[0] == begin
    assert plain.encode("<s>hello") == plain.encode("hello")
    assert build_template(make_tokenizer(), "none").begin_ids == ()


def test_end_ids_hold_what_ends_a_turn(make_tokenizer, chatml):
    tokenizer = make_tokenizer(chatml, end="<|endoftext|>")
    names = tokenizer.convert_ids_to_tokens(list(build_template(tokenizer).end_ids))
    assert names == ["<|im_end|>", "<|endoftext|>"]
    assert build_template(tokenizer, "none").end_ids == (tokenizer.eos_token_id,)
    assert build_template(make_tokenizer(end=None), "none").end_ids == ()


def test_system_prompt_yields_to_a_row_that_has_one(make_tokenizer, chatml):
    template = build_template(make_tokenizer(chatml), "auto", "be brief")
    assert "system\nbe brief<|im_end|>" in template.render(ASK, add_generation_prompt=True).text
    own = [{"role": "system", "content": "be long"}, *ASK]
    text = template.render(own, add_generation_prompt=True).text
    assert "be long" in text
    assert "be brief" not in text
    assert "be brief" in template.render_text("hello").text
    think = build_template(make_tokenizer(), "think", "be brief").render_text("hello").text
    assert think.index("<answer>") < think.index("be brief\n\nUser: hello")


@pytest.mark.parametrize("name", ["none", "auto"])
def test_system_prompt_without_a_place(make_tokenizer, name):
    with pytest.raises(DataError, match=f'template = "{name}" has no place for it'):
        build_template(make_tokenizer(), name, "be brief")


def test_system_prompt_that_the_template_refuses_or_ignores(make_tokenizer, chatml):
    refusing = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    )
    with pytest.raises(DataError, match=r"cannot be used.*no system role"):
        build_template(make_tokenizer(refusing + chatml), "auto", "be brief")
    ignoring = chatml.replace("messages %}", "messages if m.role != 'system' %}")
    with pytest.raises(DataError, match="has no effect"):
        build_template(make_tokenizer(ignoring), "auto", "be brief")


def test_template_from_a_file(make_tokenizer, chatml, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(generation("<think>\n"), encoding="utf-8")
    template = build_template(make_tokenizer(chatml), str(path))
    assert template.render(ASK, add_generation_prompt=True).text == "[U]hello<|im_end|>[A]<think>\n"
    path.write_text("{% for m in messages %}\n{% if %}", encoding="utf-8")
    with pytest.raises(DataError, match=r"mine\.jinja:2: "):
        build_template(make_tokenizer(), str(path))


def test_unknown_template_names_the_known_ones(make_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        build_template(make_tokenizer(), "alpaca")
    assert str(tmp_path / "alpaca") in str(caught.value)
    assert all(name in str(caught.value) for name in NAMES)


def test_chatml_needs_its_tokens():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {letter: index for index, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    raw = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(DataError, match=r"lacks <\|im_start\|> and <\|im_end\|>"):
        build_template(PreTrainedTokenizerFast(tokenizer_object=raw), "chatml")


def test_no_template_and_a_template_that_raises(make_tokenizer):
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        build_template(make_tokenizer()).render(ASK, add_generation_prompt=True)
    strict = "{% if messages | length > 2 %}{{ raise_exception('too many') }}{% endif %}x"
    template = build_template(make_tokenizer(strict))
    with pytest.raises(DataError, match=r"roles: user, user, user\): too many"):
        template.render(ASK * 3, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("hello", "is a str"),
        ({"role": "user"}, "is a dict"),
        ([], "is empty"),
        (["hello"], "message 1 is a str"),
        ([{"from": "human", "value": "x"}], r"no 'role' \(its keys: from, value\)"),
        ([*ASK, {"role": "user", "content": 3}], r"message 2 \(user\) has 'content' of type int"),
        ([{"role": "user"}], "type NoneType"),
        ([{"role": "user", "content": [{"type": "image"}]}], "only text is read"),
    ],
)
def test_messages_that_are_none(value, what):
    with pytest.raises(DataError, match=what):
        parse_messages(value)


def test_messages_are_put_in_order():
    parts = [{"type": "text", "text": "a"}, "b"]
    calls = [{"function": {"name": "f", "arguments": {}}}]
    assert parse_messages(
        [
            {"role": "user", "content": parts, "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": calls},
        ]
    ) == (
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "", "tool_calls": calls},
    )


def test_more_is_tokenised_where_it_follows(make_tokenizer):
    template = build_template(make_tokenizer(), "none")
    ids = template.encode("What is")
    assert ids + template.encode_more("What is", ids, " 3 + 4?") == template.encode(
        "What is 3 + 4?"
    )
    # "app" + "les": the tokenizer joins over the seam, so the end is tokenised by itself
    ids = template.encode("Tom has 12 app")
    more = template.encode_more("Tom has 12 app", ids, "les")
    assert template.encode("Tom has 12 apples")[: len(ids)] != ids
    assert template.tokenizer.decode(ids + more) == "Tom has 12 apples"


SHARED = {
    "qwen2.5": ("<|im_start|>assistant\n", "", ["<|im_end|>"]),
    "qwen3": ("<|im_start|>assistant\n", "", ["<|im_end|>"]),
    "minimind": ("<|im_start|>assistant\n", "<think>\n\n</think>\n\n", ["<|im_end|>"]),
    "smollm": ("<|im_start|>assistant\n", "", ["<|im_end|>"]),
    "mistral-v3": (None, "", ["</s>"]),
    "gpt2": (None, "", ["<|endoftext|>"]),
}


@pytest.fixture(scope="module")
def real_tokenizers(shared_dir):
    from transformers import AutoTokenizer

    folder = shared_dir / "tokenizers"
    return {name: AutoTokenizer.from_pretrained(folder / name) for name in SHARED}


@pytest.mark.shared
@pytest.mark.parametrize("name", SHARED)
def test_real_tokenizers(real_tokenizers, name):
    header, prefill, ends = SHARED[name]
    tokenizer = real_tokenizers[name]
    template = build_template(tokenizer)
    rendered = template.render_text("What is 3 + 4?")
    assert template.header == header
    assert rendered.prefill == prefill
    assert tokenizer.convert_ids_to_tokens(list(template.end_ids)) == ends
    if header is None:
        assert rendered.text == "What is 3 + 4?"
        assert template.encode(rendered.text) == tokenizer(rendered.text)["input_ids"]
    else:
        whole = tokenizer.apply_chat_template(
            [{"role": "user", "content": "What is 3 + 4?"}], add_generation_prompt=True
        )["input_ids"]
        assert template.encode(rendered.text) == whole
    opened = build_template(tokenizer, "think-open")
    assert opened.render_text("x").prefill == "<think>\n"
    text = opened.render_text("三加四等于几？ \U0001f600").text
    begin = opened.begin_ids
    assert tokenizer.decode(opened.encode(text)[len(begin) :]) == text


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "options", "prefill"),
    [
        ("qwen3", {"enable_thinking": False}, "<think>\n\n</think>\n\n"),
        ("qwen3", {"enable_thinking": True}, ""),
        ("minimind", {"open_thinking": True}, "<think>\n"),
    ],
)
def test_real_templates_with_options(real_tokenizers, name, options, prefill):
    template = build_template(real_tokenizers[name], options=options)
    assert template.render_text("x").prefill == prefill
