"""SFT against transformers on the same rows: loss and gradients, packed, split and weighted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparring.algorithms.losses import sft as sft_loss
from sparring.data.conversations import load_conversations
from sparring.data.identity import build_identity, identity_rows
from sparring.data.packing import pack_conversations
from sparring.data.rows import build_rows
from sparring.models import checkpoint
from tests.train.tiny_run import write_checkpoint

ROWS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]},
    {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Who?"},
            {"role": "assistant", "content": "I am Ada."},
            {"role": "user", "content": "And you?"},
            {"role": "assistant", "content": "Still Ada, and glad of it."},
        ]
    },
    {"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "好"}]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("parity") / "model", seed=3)


@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.5]])
@pytest.mark.parametrize("max_tokens", [4096, 40])
def test_loss_and_gradients_are_those_of_transformers(folder, weights, max_tokens):
    rows = [row | {"w": weight} for row, weight in zip(ROWS, weights or [1.0] * 3, strict=True)]
    tokenizer = checkpoint.load_tokenizer(str(folder))
    found = load_conversations(build_rows(rows), tokenizer, max_tokens=128, weight_column="w")
    batches = pack_conversations(found.conversations, max_tokens=max_tokens)
    assert (len(batches) > 1) == (max_tokens == 40)
    model = checkpoint.load_model(str(folder), dtype="float32", device=torch.device("cpu"))
    model.requires_grad_(True)
    loss = 0.0
    for batch in batches:
        output = sft_loss(model.score(batch), batch)
        output.loss.backward()
        loss += output.loss.item()

    wanted, theirs = by_transformers(folder, found.conversations)
    assert loss == pytest.approx(wanted, rel=1e-5)
    gradients = {name: p.grad for name, p in model.trainable_parameters().items()}
    embedding = next(grad for name, grad in gradients.items() if "embed" in name)
    torch.testing.assert_close(embedding, theirs["embed_tokens"], rtol=1e-4, atol=1e-6)
    last = next(grad for name, grad in gradients.items() if "layers.1" in name and "down" in name)
    torch.testing.assert_close(last, theirs["layers.1.mlp.down_proj"], rtol=1e-4, atol=1e-6)


def by_transformers(folder: Path, conversations) -> tuple[float, dict[str, torch.Tensor]]:
    """The weighted token mean over all conversations, each by itself, and two gradients."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, count = torch.zeros(()), 0.0
    for conversation in conversations:
        ids, mask = conversation.token_ids, conversation.loss_mask
        logits = model(input_ids=ids[None]).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        total = total + conversation.weight * losses[mask[1:]].sum()
        count += conversation.weight * int(mask[1:].sum())
    (total / count).backward()
    parameters = dict(model.named_parameters())
    return total.item() / count, {
        "embed_tokens": parameters["model.embed_tokens.weight"].grad,
        "layers.1.mlp.down_proj": parameters["model.layers.1.mlp.down_proj.weight"].grad,
    }


@pytest.mark.shared
@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "minimind", "smollm"])
def test_identity_rows_are_learned_behind_what_generation_is_given(shared_dir, name):
    """Real templates, some with think blocks: the answer follows the generation prompt exactly."""
    tokenizer = checkpoint.load_tokenizer(str(shared_dir / "tokenizers" / name))
    rows = [
        row
        for row in identity_rows(build_identity(["小艾"], ["艾达小组"], ["zh", "en"]))
        if len(row["messages"]) == 2
    ][::10]
    found = load_conversations(build_rows(rows), tokenizer, max_tokens=1000)
    assert len(found) == len(rows)
    for row, sample in zip(rows, found, strict=True):
        first = int(sample.loss_mask.nonzero()[0])
        opened = found.template.render(row["messages"][:1], add_generation_prompt=True)
        assert sample.token_ids[:first].tolist() == found.template.encode(opened.text)
        learned = tokenizer.decode(sample.token_ids[first:].tolist())
        assert row["messages"][1]["content"] in learned
        assert sample.loss_mask[first:].all()
        if name in ("qwen3", "minimind"):
            whole = tokenizer.decode(sample.token_ids.tolist())
            assert "<think>\n\n</think>" in whole
