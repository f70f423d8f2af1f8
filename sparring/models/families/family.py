"""What a family file consists of, and how it reads the keys that all families share.

Both dialects of config.json are read: `rope_theta` + `rope_scaling` (transformers 4) and
`rope_parameters` (transformers 5). No weight is touched here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sparring.errors import CheckpointError
from sparring.models.families.names import WeightNames
from sparring.models.rope import RopeConfig
from sparring.models.transformer import TransformerConfig

HfConfig = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Data about one family: which architectures it reads, how, and under which names weights are
    stored.
    """

    name: str
    architecture: str
    config: Callable[[HfConfig], TransformerConfig]
    weights: WeightNames


def shared_config(hf: HfConfig, *, family: str, **flags: Any) -> TransformerConfig:
    """A TransformerConfig from the keys that all families write alike; `flags` are the family's
    own.

    Raises CheckpointError for a key that is missing or a value that is not supported.
    """
    activation = hf.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(
            f"config.json: hidden_act is {activation!r}; the {family} family is read with 'silu' "
            "only"
        )
    width, num_heads = _count(hf, "hidden_size"), _count(hf, "num_attention_heads")
    num_kv_heads = int(hf.get("num_key_value_heads") or num_heads)
    head_size = int(hf.get("head_dim") or width // num_heads)
    num_layers = _count(hf, "num_hidden_layers")
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"config.json: {num_heads} attention heads cannot share {num_kv_heads} key/value heads "
            "evenly"
        )
    if head_size % 2:
        raise CheckpointError(
            f"config.json: the head size is {head_size}; rotary positions need an even one"
        )
    max_tokens = int(hf.get("max_position_embeddings") or 2048)
    flags.setdefault("windows", (0,) * num_layers)
    return TransformerConfig(
        family=family,
        vocab_size=_count(hf, "vocab_size"),
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        ffn_width=_count(hf, "intermediate_size"),
        norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        rope=rope_config(hf, max_tokens),
        max_tokens=max_tokens,
        tied_head=bool(hf.get("tie_word_embeddings", False)),
        initializer_range=float(hf.get("initializer_range", 0.02)),
        source=dict(hf),
        **flags,
    )


def rope_config(hf: HfConfig, max_tokens: int) -> RopeConfig:
    """Rotary settings in either dialect; raises CheckpointError for a scaling that is not known."""
    settings: dict[str, Any] = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    theta = float(settings.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    kind = settings.get("rope_type") or settings.get("type") or "default"
    partial = settings.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise CheckpointError(
            f"config.json: partial_rotary_factor is {partial}; only whole heads are rotated here"
        )
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind not in ("linear", "llama3"):
        raise CheckpointError(
            f"config.json: rope scaling {kind!r} is not supported; known: default, linear, llama3"
        )
    needed = ("factor",) if kind == "linear" else ("factor", "low_freq_factor", "high_freq_factor")
    missing = [key for key in needed if not isinstance(settings.get(key), int | float)]
    if missing:
        raise CheckpointError(
            f"config.json: rope scaling {kind!r} needs a number for {', '.join(missing)}"
        )
    if kind == "linear":
        return RopeConfig(theta=theta, scaling="linear", factor=float(settings["factor"]))
    return RopeConfig(
        theta=theta,
        scaling="llama3",
        factor=float(settings["factor"]),
        low_freq_factor=float(settings["low_freq_factor"]),
        high_freq_factor=float(settings["high_freq_factor"]),
        original_max_tokens=int(settings.get("original_max_position_embeddings") or max_tokens),
    )


def qwen_windows(hf: HfConfig) -> tuple[int, ...]:
    """Sliding windows of the Qwen families: `layer_types` where given, else the layers from
    max_window_layers on.
    """
    num_layers = _count(hf, "num_hidden_layers")
    window = int(hf.get("sliding_window", 4096) or 0) if hf.get("use_sliding_window", False) else 0
    kinds = hf.get("layer_types")
    if kinds is None:
        first = int(hf.get("max_window_layers", 28))
        return tuple(window if layer >= first else 0 for layer in range(num_layers))
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown or len(kinds) != num_layers:
        raise CheckpointError(
            f"config.json: layer_types has {len(kinds)} entries for {num_layers} layers, unknown "
            f"kinds: {unknown}; known: full_attention, sliding_attention"
        )
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _count(hf: HfConfig, key: str) -> int:
    value = hf.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {key} is {value!r}; it must be a positive integer")
    return value
