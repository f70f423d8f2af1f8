"""Tokenizers: the ids of tokenizer.json, end tokens from every place, ids beyond the embedding."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from sparring.errors import CheckpointError
from sparring.models.checkpoint import (
    build_model,
    check_vocabulary,
    end_token_ids,
    load_tokenizer,
    save_tokenizer,
)
from tests.models.tiny import CONFIGS

TEXTS = ("Once upon a time", " leading", "two  spaces\n\n\ttab", "数学 1+1=2 😀", "<end>a", "")


def write_tokenizer(folder: Path, **settings: Any) -> Tokenizer:
    """A byte-level tokenizer with one special token, as files."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    raw = Tokenizer(models.BPE(vocabulary, [], unk_token=None))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken("<end>", special=True)])
    folder.mkdir(parents=True, exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "<end>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return raw


def test_ids_are_those_of_tokenizer_json_whatever_class_is_named(tmp_path: Path):
    raw = write_tokenizer(tmp_path, chat_template="{{ messages[0].content }}")
    tokenizer = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert tokenizer(text).input_ids == raw.encode(text).ids
        assert tokenizer.decode(raw.encode(text).ids) == text
    assert tokenizer.eos_token == "<end>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"


def test_a_saved_tokenizer_is_read_alike_by_transformers(tmp_path: Path):
    from transformers import AutoTokenizer

    raw = write_tokenizer(tmp_path / "a", chat_template="{{ messages[0].content }}")
    save_tokenizer(load_tokenizer(tmp_path / "a"), tmp_path / "b")
    written = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    for again in (load_tokenizer(tmp_path / "b"), AutoTokenizer.from_pretrained(tmp_path / "b")):
        assert all(again(text).input_ids == raw.encode(text).ids for text in TEXTS)
        assert again.chat_template == "{{ messages[0].content }}"
        assert again.eos_token == "<end>"


@pytest.mark.parametrize("own", [True, False])
def test_an_adapter_folder_gives_its_own_tokenizer_or_its_bases(own: bool, tmp_path: Path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_tokenizer(base, model_max_length=111)
    (base / "config.json").write_text(json.dumps({**CONFIGS["llama2"], "eos_token_id": [7, 3]}))
    if own:
        write_tokenizer(adapter, model_max_length=222)
    adapter.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(adapter)
    assert tokenizer.model_max_length == (222 if own else 111)
    assert end_token_ids(adapter, tokenizer) == (3, 7, 256)


def test_end_tokens_are_gathered_from_every_place(tmp_path: Path):
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="not a model"):
        end_token_ids(tmp_path, tokenizer)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert end_token_ids(tmp_path, tokenizer) == (5, 256)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 5, 1]}))
    assert end_token_ids(tmp_path, tokenizer) == (1, 5, 9, 256)
    assert end_token_ids({"eos_token_id": None}, tokenizer) == (256,)
    assert end_token_ids({"eos_token_id": 4}, SimpleNamespace(eos_token_id=None)) == (4,)


def test_no_end_token_at_all_is_an_error(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match=r"no end token.*eos_token"):
        end_token_ids(tmp_path, SimpleNamespace(eos_token_id=None))


def test_ids_beyond_the_embedding_are_refused(tmp_path: Path):
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    fitting = build_model({**CONFIGS["llama2"], "vocab_size": 257}, dtype=torch.float32)
    check_vocabulary(tokenizer, fitting.config)
    small = build_model({**CONFIGS["llama2"], "vocab_size": 255}, dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"2 ids beyond.*255 rows.*'<end>' = 256"):
        check_vocabulary(tokenizer, small.config)


def test_a_missing_or_broken_tokenizer_is_an_error(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.shared
@pytest.mark.parametrize(
    "name",
    [
        "tokenizers/qwen2.5",
        "tokenizers/qwen3",
        "tokenizers/minimind",
        "tokenizers/mistral-v3",
        "tokenizers/smollm",
        "tokenizers/gpt2",
        "models/TinyStories-656K",
        "models/stories260K",
    ],
)
def test_real_tokenizers_give_the_ids_of_their_own_file(name: str, shared_dir: Path):
    from sparring.models.tokenizer import load_tokenizer as load_from_folder

    folder = shared_dir / name
    tokenizer, raw = load_from_folder(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        assert tokenizer(text).input_ids == raw.encode(text).ids
    assert end_token_ids({}, tokenizer)
