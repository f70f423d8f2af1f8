"""Parity with TRL 1.16.0, end to end: the same rows and arguments give the same losses.

Every step takes all rows, so that the order in which a trainer draws them does not matter. The
template writes nothing behind an end token: TRL learns such a rest of a completion, and we do not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparring import compat

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")

QUESTIONS = ["hi", "why not", "what is 1+1?", "who"]
SETTINGS: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 5e-3,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
}


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


SFT_ROWS = {
    "text": [{"text": f"{question} yes"} for question in QUESTIONS],
    "messages": [{"messages": asked(question) + said("yes")} for question in QUESTIONS],
    "completion": [{"prompt": question, "completion": f" {question}!"} for question in QUESTIONS],
    "completion messages": [
        {"prompt": asked(question), "completion": said("well, " + question)}
        for question in QUESTIONS
    ],
    "cut": [{"text": f"{question} and a long way to go on"} for question in QUESTIONS],
}
DPO_ROWS = {
    "text": [
        {"prompt": question, "chosen": " yes", "rejected": " no, no"} for question in QUESTIONS
    ],
    "messages": [
        {"prompt": asked(question), "chosen": said("yes"), "rejected": said("never")}
        for question in QUESTIONS
    ],
}


def losses(trainer: Any, key: str = "loss") -> list[float]:
    trainer.train()
    return [float(row[key]) for row in trainer.state.log_history if "loss" in row]


def both(kind: str, model_path: str, rows: list[Any], **changes: Any) -> tuple[Any, Any]:
    """TRL's trainer and ours on the same model, rows and arguments."""
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    trainers = []
    for module, folder in ((trl, "theirs"), (compat, "ours")):
        config = getattr(module, f"{kind}Config")
        args = config(output_dir=folder, **(SETTINGS | changes))
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        tokenizer.pad_token = "<|im_start|>"
        tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>\n", "<|im_end|>")
        trainers.append(
            getattr(module, f"{kind}Trainer")(
                model=model_path,
                args=args,
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
            )
        )
    return trainers[0], trainers[1]


@pytest.mark.parametrize("kind", SFT_ROWS)
def test_sft_has_trls_losses(kind: str, model_path: str, own_folder: Path):
    limit = {"max_length": 12} if kind == "cut" else {}
    theirs, ours = both("SFT", model_path, SFT_ROWS[kind], **limit)
    found, expected = losses(ours), losses(theirs)
    assert found == pytest.approx(expected, rel=2e-4)
    assert found[-1] < 0.99 * found[0]


@pytest.mark.parametrize("kind", DPO_ROWS)
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
def test_dpo_has_trls_losses(kind: str, loss: str, model_path: str, own_folder: Path):
    changes = {"loss_type": [loss], "learning_rate": 1e-3}
    theirs, ours = both("DPO", model_path, DPO_ROWS[kind], **changes)
    found, expected = losses(ours), losses(theirs)
    assert found == pytest.approx(expected, rel=5e-4)
    assert found[-1] < found[0]
