"""Stop strings with real tokenizers: found at the same token as by decoding all of it each time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from sparring.rollout.stopping import StopRule

TEXT = "Sixteen eggs: 鸭子 🙃 een café.\n\tShe sells the rest, 每天 2 dollars each. \n"


@pytest.mark.shared
@pytest.mark.parametrize("name", ["qwen2.5", "mistral-v3", "smollm", "minimind"])
@pytest.mark.parametrize("stop", ["答案", "🙂", "\n\nQ", " stop", "</answer>", "龘"])
def test_a_stop_string_is_found_at_its_last_token(shared_dir: Path, name: str, stop: str) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_dir / "tokenizers" / name)

    def decode(token_ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))

    token_ids = tokenizer.encode(TEXT + "xxx" + stop + " tail 尾", add_special_tokens=False)
    stop_rule = StopRule(stop_ids=(), stop=(stop,), min_completion_tokens=0, decode=decode)
    lengths = range(1, len(token_ids) + 1)
    expected = next(n for n in lengths if stop in decode(token_ids[:n]))
    assert next(n for n in lengths if stop_rule.reason(token_ids[:n], 10_000)) == expected
    text = decode(token_ids)
    assert stop_rule.text(token_ids[:expected]) == text[: text.index(stop)]
