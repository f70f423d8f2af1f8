"""Models of real shapes with random weights, made on the device itself in seconds.

    model = build("qwen2.5-7b", quantization="nf4", device="cuda")

Sizes are those of the checkpoints' own config.json, written down here: nothing is downloaded. With
NF4 each matrix is drawn and quantised by itself, so the largest one is all that exists beside the
packed weights. What such a model says is noise; bytes and seconds are those of the real one.
"""

from __future__ import annotations

from typing import Any

import torch

from sparring.models.checkpoint import build_model
from sparring.models.lora import LoraConfig
from sparring.models.quantised import Quantised
from sparring.models.transformer import Decoder

_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "hidden_act": "silu", "use_sliding_window": False,
    "max_position_embeddings": 131072,
}  # fmt: skip
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "hidden_act": "silu", "use_sliding_window": False, "head_dim": 128,
    "max_position_embeddings": 131072, "vocab_size": 151936,
}  # fmt: skip
_LLAMA3 = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5,
    "rope_theta": 5e5, "hidden_act": "silu", "max_position_embeddings": 131072,
    "vocab_size": 128256,
}  # fmt: skip


def _sizes(
    width: int, ffn: int, layers: int, heads: int, kv_heads: int, tied: bool, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied, **more,
    }  # fmt: skip


SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": _QWEN2 | _sizes(3584, 18944, 28, 28, 4, False, vocab_size=152064),
    "qwen2.5-3b": _QWEN2 | _sizes(2048, 11008, 36, 16, 2, True, vocab_size=151936),
    "qwen2.5-1.5b": _QWEN2 | _sizes(1536, 8960, 28, 12, 2, True, vocab_size=151936),
    "qwen2.5-0.5b": _QWEN2 | _sizes(896, 4864, 24, 14, 2, True, vocab_size=151936),
    "qwen3-8b": _QWEN3 | _sizes(4096, 12288, 36, 32, 8, False),
    "qwen3-4b": _QWEN3 | _sizes(2560, 9728, 36, 32, 8, True),
    "qwen3-1.7b": _QWEN3 | _sizes(2048, 6144, 28, 16, 8, True),
    "qwen3-0.6b": _QWEN3 | _sizes(1024, 3072, 28, 16, 8, True),
    "llama-3.1-8b": _LLAMA3 | _sizes(4096, 14336, 32, 32, 8, False),
    "tiny": _QWEN2 | _sizes(128, 256, 3, 4, 2, True, vocab_size=1000),
}
"""config.json by name. "tiny" is nobody's: it lets a benchmark be tried without a GPU."""

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def build(
    shape: str | dict[str, Any],
    *,
    quantization: str = "none",
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    lora_rank: int = 16,
    seed: int = 0,
) -> Decoder:
    """A model of that shape; matrices normal (0.02), norms 1, biases normal, adapters' B not zero.

    shape: a name of SHAPES, or such a config itself. quantization: "none" or "nf4". lora_rank: of
    an adapter on q, k, v and o; 0: none, and every weight of an unquantised model is trained.
    """
    assert quantization in ("none", "nf4"), f"quantization is {quantization!r}: none or nf4"
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    is_quantised = quantization == "nf4"
    config = SHAPES[shape] if isinstance(shape, str) else shape
    model = build_model(config, device=device, dtype=dtype, is_quantised=is_quantised)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("norm"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
        for linear in model.linears().values():
            base = linear.base
            if isinstance(base, Quantised):
                for index, rows in enumerate(base.part_rows):
                    weight = torch.empty(rows, base.num_inputs, device=device, dtype=dtype)
                    base.quantise(index, weight.normal_(0.0, 0.02, generator=generator))
        if lora_rank:
            model.add_adapter(LoraConfig(rank=lora_rank, target_modules=ATTENTION, seed=seed))
            for adapter in model.adapter_modules("policy").values():
                adapter.b.normal_(0.0, 0.01, generator=generator)
            model.refresh_shadows()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    return model
