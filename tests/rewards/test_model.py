"""The reward `model`: scores that depend on the text alone, the model's own template, limits."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from sparring.errors import RewardError
from sparring.rewards.model import ModelReward, correlation
from sparring.rewards.verdicts import load_reward

WORDS = ["<unk>", "<end>", "user:", "assistant:", "system:", *[f"w{n}" for n in range(40)]]
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }} <end> {% endfor %}"
)


def write_tokenizer(folder, *, template=TEMPLATE, pad="<end>"):
    inner = Tokenizer(WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="<end>", pad_token=pad
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def write_decoder(folder, *, num_labels=1, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        num_labels=num_labels,
        pad_token_id=1,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = LlamaForSequenceClassification(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A model whose padding token is its end token, as in many released ones."""
    folder = tmp_path_factory.mktemp("decoder")
    write_decoder(folder)
    write_tokenizer(folder)
    return str(folder)


def texts(*lengths):
    return [" ".join(f"w{(n * 7 + length) % 40}" for n in range(length)) for length in lengths]


LENGTHS = (1, 9, 3, 20, 2, 14, 5, 5)


def test_scores_depend_on_the_text_alone(decoder):
    prompts, answers = texts(*LENGTHS[::-1]), texts(*LENGTHS)
    expected = None
    for tokens in (1, 40, 100, 10_000):
        reward = ModelReward(path=decoder, micro_batch_tokens=tokens, standardise="none")
        scores = reward(prompts=prompts, completions=answers)
        expected = expected or scores
        assert scores == pytest.approx(expected, abs=1e-5)
    turned = reward(prompts=prompts[::-1], completions=answers[::-1])
    assert turned[::-1] == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 4) for score in expected}) == len(expected)


def test_scores_are_those_of_the_rendered_conversation(decoder):
    reward = ModelReward(path=decoder, standardise="none")
    model = LlamaForSequenceClassification.from_pretrained(decoder).eval()
    model.config.pad_token_id = None
    text = "system: w1 <end> user: w2 <end> assistant: w3 w4 <end>"
    ids = torch.tensor([[WORDS.index(word) for word in text.split()]])
    with torch.no_grad():
        expected = float(model(input_ids=ids).logits)
    prompt = [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2"}]
    chat = [{"role": "assistant", "content": "<think> w9 w9 </think> w3 w4"}]
    other = "w5 w6 w7 w8 w9 w10 w11 w12"
    scores = reward(prompts=[prompt, other], completions=[chat, other])
    assert scores[0] == pytest.approx(expected, abs=1e-5)


def test_thinking_is_dropped_unless_kept(decoder):
    dropping = ModelReward(path=decoder, standardise="none")
    keeping = ModelReward(path=decoder, standardise="none", thinking="keep")
    thoughts = ["<think> w1 </think> w9", "<think> w2 w3 </think> w9"]
    first, second = dropping(prompts=["w0"] * 2, completions=thoughts)
    assert first == pytest.approx(second)
    first, second = keeping(prompts=["w0"] * 2, completions=thoughts)
    assert first != pytest.approx(second)
    opened = dropping(prompts=["w0"] * 2, completions=["w1", "w2"], prefills=["<think>"] * 2)
    assert opened[0] == pytest.approx(opened[1]), "thinking that never ends leaves an empty answer"


def test_long_prompts_lose_their_start_and_answers_nothing(decoder):
    reward = ModelReward(path=decoder, standardise="none")
    long = " ".join(["w1"] * 200)
    notes = {}
    scores = reward(
        prompts=[long, long + " w1", "w2 " + long, "w3"],
        completions=["w5 w6"] * 4,
        log_metric=lambda name, value: notes.update({name: value}),
    )
    assert notes["share_cut"] == 0.75
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert scores[0] == pytest.approx(scores[2], abs=1e-6), "what was cut is the start"
    ids, is_cut = reward._encode([{"role": "user", "content": long}], "w5 w6")
    assert is_cut
    assert len(ids) == 64
    assert [WORDS[one] for one in ids[-4:]] == ["assistant:", "w5", "w6", "<end>"]


def test_scores_are_standardised_and_clipped(decoder):
    answers = texts(*LENGTHS)
    raw = ModelReward(path=decoder, standardise="none")(prompts=["w0"] * 8, completions=answers)
    values = ModelReward(path=decoder)(prompts=["w0"] * 8, completions=answers)
    assert sum(values) == pytest.approx(0, abs=1e-5)
    assert sum(value**2 for value in values) / 8 == pytest.approx(1, abs=1e-5)
    assert sorted(range(8), key=raw.__getitem__) == sorted(range(8), key=values.__getitem__)
    clipped = ModelReward(path=decoder, clip=0.5)(prompts=["w0"] * 8, completions=answers)
    assert max(map(abs, clipped)) == 0.5
    alike = ModelReward(path=decoder)(prompts=["w0"] * 3, completions=["w1"] * 3)
    assert alike == pytest.approx([0.0] * 3, abs=1e-5)
    assert ModelReward(path=decoder)(prompts=[], completions=[]) == []


def test_16_bit_models_have_a_float32_head(decoder):
    reward = ModelReward(path=decoder, dtype="bfloat16", standardise="none")
    exact = ModelReward(path=decoder, standardise="none")
    prompts, answers = texts(*LENGTHS), texts(*LENGTHS[::-1])
    assert reward._model.score.linear.weight.dtype == torch.float32
    assert reward.num_bytes < exact.num_bytes
    rounded, full = (one(prompts=prompts, completions=answers) for one in (reward, exact))
    assert correlation(rounded, full) > 0.98
    assert any(torch.tensor(score).bfloat16().item() != score for score in rounded)


def test_encoders_without_a_template_take_pairs(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels=1,
        pad_token_id=1,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    write_tokenizer(tmp_path, template=None)
    wide = ModelReward(path=str(tmp_path), standardise="none")
    narrow = ModelReward(path=str(tmp_path), standardise="none", micro_batch_tokens=1)
    prompts, answers = texts(*LENGTHS), texts(*LENGTHS[::-1])
    scores = wide(prompts=prompts, completions=answers)
    assert scores == pytest.approx(narrow(prompts=prompts, completions=answers), abs=1e-5)
    assert len({round(score, 5) for score in scores}) == len(scores)


def test_a_vocabulary_without_a_free_id_is_scored_one_by_one(decoder):
    reward = ModelReward(path=decoder, standardise="none")
    whole = [list(range(len(WORDS))), list(range(len(WORDS)))[::-1], [3, 1]]
    together = reward.score(whole)
    assert together == pytest.approx([reward.score([one])[0] for one in whole], abs=1e-5)


def test_what_cannot_be_loaded_is_said(tmp_path, decoder):
    with pytest.raises(RewardError, match="cannot be loaded"):
        ModelReward(path=str(tmp_path / "nothing"))
    write_decoder(tmp_path, num_labels=2)
    write_tokenizer(tmp_path)
    with pytest.raises(RewardError, match="2 outputs"):
        ModelReward(path=str(tmp_path))
    for knobs in (
        {"device": "abacus"},
        {"dtype": "int8"},
        {"clip": 0},
        {"micro_batch_tokens": 0},
        {"batch": 3},
    ):
        with pytest.raises(RewardError, match=next(iter(knobs))):
            load_reward("model", knobs={"path": decoder, **knobs})
    reward = load_reward("model", knobs={"path": decoder})
    assert reward.function(["w1", "w2"], ["w3", "w4"])[0] != 0


def test_correlation():
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert correlation([1, 1, 1], [1, 2, 3]) == 0
