"""The weight-name table that the Llama-like families share: parameter of the Decoder -> Hugging
Face names.

Several Hugging Face names mean that those tensors are fused by rows, in this order. "{}" stands for
the layer's number. A family with more tensors extends the table.
"""

from __future__ import annotations

from collections.abc import Mapping

WeightNames = Mapping[str, tuple[str, ...]]

_ATTENTION = "model.layers.{}.self_attn."
_MLP = "model.layers.{}.mlp."

LLAMA_NAMES: WeightNames = {
    "embed.weight": ("model.embed_tokens.weight",),
    "layers.{}.attention_norm": ("model.layers.{}.input_layernorm.weight",),
    "layers.{}.qkv.base.weight": tuple(_ATTENTION + f"{name}_proj.weight" for name in "qkv"),
    "layers.{}.qkv.bias": tuple(_ATTENTION + f"{name}_proj.bias" for name in "qkv"),
    "layers.{}.output.base.weight": (_ATTENTION + "o_proj.weight",),
    "layers.{}.output.bias": (_ATTENTION + "o_proj.bias",),
    "layers.{}.mlp_norm": ("model.layers.{}.post_attention_layernorm.weight",),
    "layers.{}.gate_up.base.weight": (
        _MLP + "gate_proj.weight",
        _MLP + "up_proj.weight",
    ),
    "layers.{}.gate_up.bias": (_MLP + "gate_proj.bias", _MLP + "up_proj.bias"),
    "layers.{}.down.base.weight": (_MLP + "down_proj.weight",),
    "layers.{}.down.bias": (_MLP + "down_proj.bias",),
    "norm": ("model.norm.weight",),
    "head.weight": ("lm_head.weight",),
}
