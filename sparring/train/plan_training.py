"""The memory of a training pass as a tape: what the model's forward and backward ask for, in order.

It mirrors models/transformer.py, models/checkpointing.py, models/lora.py and kernels/head.py as
they run on a GPU in 16 bits; tests hold it to a trace of the real code. One change there is one
change here. Shape letters as in types.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sparring.train.plan_job import (
    DECODED,
    GRADIENTS,
    INPUTS,
    LOGITS,
    STREAMS,
    WORKING,
    Settings,
    Trained,
)
from sparring.train.tape import Tape

STREAM_BYTES = 8 + 8 + 8 + 1 + 8 + 4 + 4
"""Of a token of a batch: ids, labels, positions, mask, sequence, advantage, sampler's logprob."""
VALUE_STREAM_BYTES = 5 * 4
"""More of a token with a critic: old and reference logprobs, old values, returns, GAE's rewards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """A packed batch: its rows, those that bear loss, and its shared prompts as (tokens, samples).

    has_gradients: gradients are there already, of an earlier micro-batch of the step.
    """

    rows: int
    loss_rows: int
    groups: tuple[tuple[int, int], ...] = ()
    has_gradients: bool = False


@dataclass(slots=True)
class _Kept:
    """What a layer's forward left for its backward pass, by name."""

    numbers: dict[str, int] = field(default_factory=dict)

    def pop(self, *names: str) -> list[int | None]:
        return [self.numbers.pop(name, None) for name in names]


class TrainingTape:
    """Writes micro-batches of one model onto a tape."""

    def __init__(self, tape: Tape, model: Trained, settings: Settings) -> None:
        self.tape, self.model, self.settings = tape, model, settings
        self.config, self.item = model.config, model.item
        self.linears = model.linears()
        self.rows = 0
        self.batch = MicroBatch(rows=0, loss_rows=0)
        self.gradients: list[int] = []

    def micro_batch(self, batch: MicroBatch, *, with_head: bool = True) -> None:
        """Forward and backward pass; gradients stay until `forget_gradients`."""
        tape, config = self.tape, self.config
        self.batch, self.rows = batch, batch.rows
        width = batch.rows * config.width * self.item
        angles = batch.rows * (config.head_size // 2) * 4
        with tape.during(WORKING, angles):
            cos, sin = tape.take(WORKING, angles), tape.take(WORKING, angles)
        x = tape.take(INPUTS, width)
        inputs, kept = [x], []
        leaving: list[tuple[_Kept, int]] = []
        for layer in range(config.num_layers):
            found, x = self._forward(is_last=layer == config.num_layers - 1)
            kept.append(found)
            if self._offloads and layer < config.num_layers - 1:
                leaving.append((found, inputs[-1]))
                if len(leaving) > 2:  # two are on their way to the host
                    self._left(*leaving.pop(0))
            inputs.append(x)
        normed = tape.take(WORKING, width)
        head_gradient, g = self._head(normed, with_head)
        dx = self._norm_backward()
        tape.give(g, inputs.pop())
        while leaving:
            self._left(*leaving.pop(0))
        for layer in reversed(range(config.num_layers)):
            if self._offloads and layer:
                inputs[layer - 1] = self._arriving(kept[layer - 1])
            dx = self._backward(inputs[layer], kept[layer], dx, layer)
        if self.model.is_full:
            self._embedding_backward(head_gradient)
        tape.give(dx, cos, sin)

    def forget_gradients(self) -> None:
        """After the update."""
        self.tape.give(*self.gradients)
        self.gradients = []

    # --- forward -------------------------------------------------------------------------------

    def _forward(self, *, is_last: bool) -> tuple[_Kept, int]:
        """A layer; what it keeps, and its output."""
        mode, tape = self.settings.checkpointing, self.tape
        keeps, last = mode == "none", None
        kept = _Kept()
        self._heads(kept, keeps=keeps)
        self._attend(kept)
        if mode == "layers":
            tape.give(*kept.pop("lse"))
        self._after_attention(kept, keeps=keeps)
        part = INPUTS if not keeps or is_last else WORKING
        if keeps or not self._is_tiled:
            down = self._mlp(kept, self.rows, keeps=keeps)
            out = tape.take(part, self._bytes(self.config.width))
            tape.give(down)
        else:
            out = tape.take(part, self._bytes(self.config.width))
            for rows in self._tiles():
                added = self._mlp(kept, rows, keeps=False)
                tape.give(last)
                last = added
        if not self._saves_input("gate_up"):
            tape.give(*kept.pop("normed2"))
        if not keeps:
            tape.give(*kept.pop("summed", "normed2"), last)
            tape.give(*kept.pop("qkv", "rotated", "q_normed", "k_normed"))
        if mode == "layers":
            tape.give(*kept.pop("attended"))
        return kept, out

    def _heads(self, kept: _Kept, *, keeps: bool) -> None:
        """Norm, queries, keys and values, rotation."""
        tape, config = self.tape, self.config
        normed = tape.take(WORKING, self._bytes(config.width))
        kept.numbers["qkv"] = self._linear("qkv", kept, self.rows, keeps=keeps)
        queries = self._bytes(config.num_heads * config.head_size)
        keys = self._bytes(config.num_kv_heads * config.head_size)
        if config.qk_norm:
            for name, size in (("q", queries), ("k", keys)):
                with tape.during(WORKING, size):
                    kept.numbers[f"{name}_normed"] = tape.take(WORKING, size)
        else:
            kept.numbers["rotated"] = tape.take(WORKING, queries + keys)
        if keeps and self._saves_input("qkv"):
            kept.numbers["normed"] = normed
        else:
            tape.give(normed)

    def _attend(self, kept: _Kept) -> None:
        config = self.config
        kept.numbers["attended"] = self.tape.take(
            INPUTS if self.settings.checkpointing == "selective" else WORKING,
            self._bytes(config.num_heads * config.head_size),
        )
        kept.numbers["lse"] = self.tape.take(WORKING, self.rows * config.num_heads * 4)

    def _after_attention(self, kept: _Kept, *, keeps: bool) -> None:
        tape, width = self.tape, self._bytes(self.config.width)
        added = self._linear("output", kept, self.rows, keeps=keeps)
        kept.numbers["normed2"] = tape.take(WORKING, width)
        kept.numbers["summed"] = tape.take(WORKING, width)
        tape.give(added)

    def _mlp(self, kept: _Kept, rows: int, *, keeps: bool, is_read: bool = True) -> int | None:
        """Feed-forward of so many rows; its output's number, None where it is not computed."""
        tape, hidden_bytes = self.tape, rows * self.config.ffn_width * self.item
        gate_up = self._linear("gate_up", kept, rows, keeps=keeps)
        if keeps:
            kept.numbers["gate_up"] = gate_up
        if not is_read and not self.model.is_full:
            if self.linears["down"].adapted:
                with tape.during(WORKING, hidden_bytes):
                    kept.numbers["down_xa"] = self._taken_xa("down", rows)
            return None
        hidden = tape.take(WORKING, hidden_bytes)
        if not keeps:
            tape.give(gate_up)
        down = self._linear("down", kept, rows, keeps=keeps)
        if keeps and self.model.is_full:
            kept.numbers["hidden"] = hidden
        else:
            tape.give(hidden)
        return down

    def _linear(self, name: str, kept: _Kept, rows: int, *, keeps: bool) -> int:
        """A product; with an adapter its part comes first and the base's is added to it."""
        tape, size = self.tape, self.linears[name]
        if not size.adapted:
            y = tape.take(WORKING, rows * size.outputs * self.item)
            with tape.during(DECODED, size.decoded_rows(self.item)):
                return y
        xa = self._taken_xa(name, rows)
        y = tape.take(WORKING, rows * size.outputs * self.item)
        if size.is_quantised:
            tape.brief(DECODED, size.decoded_rows(self.item))
        if keeps:
            kept.numbers[f"{name}_xa"] = xa
        else:
            tape.give(xa)
        return y

    def _taken_xa(self, name: str, rows: int) -> int:
        size = self.linears[name]
        return self.tape.take(WORKING, rows * len(size.adapted) * self.model.rank * self.item)

    # --- head ----------------------------------------------------------------------------------

    def _head(self, normed: int, with_head: bool) -> tuple[int | None, int]:
        """Forward and backward of head and loss: the head's gradient if trained, and d normed."""
        tape, config, item = self.tape, self.config, self.item
        rows, loss_rows, width = self.rows, self.batch.loss_rows, config.width
        chosen = tape.take(LOGITS, loss_rows * width * item)
        if not with_head:
            return self._value_head(normed, chosen)
        scalars = tape.take(STREAMS, loss_rows * 28 + rows * 16)
        chunk = min(self.settings.head_chunk_rows, loss_rows) * config.vocab_size
        if self.model.is_full:
            tape.brief(LOGITS, chunk * 4)
        else:
            gradient = tape.take(LOGITS, loss_rows * width * item)
            logits = tape.take(LOGITS, chunk * 4)
            tape.give(logits, chosen)
        tape.give(normed)
        loss = tape.take(STREAMS, rows * 4 * 12)
        tape.give(loss)
        head = None
        if self.model.is_full:
            d_rows = tape.take(LOGITS, loss_rows * width * item)
            head = self._trained_head(chunk)
            tape.give(chosen)
        else:
            d_rows = tape.take(LOGITS, loss_rows * width * item)
            tape.give(gradient)
        with tape.during(LOGITS, rows * width * item):
            g = tape.take(WORKING, rows * width * item)
        tape.give(d_rows, scalars)
        return head, g

    def _trained_head(self, chunk: int) -> int:
        """The head's weight gradient, added up in float32 chunk by chunk."""
        tape, config = self.tape, self.config
        size = config.vocab_size * config.width
        total = tape.take(LOGITS, size * 4)
        logits = tape.take(LOGITS, chunk * 4)
        rounded = tape.take(LOGITS, size * self.item)
        tape.give(total, logits)
        if config.tied_head:
            return rounded  # waits for the embedding's part
        self._weight_gradient(rounded, size)
        return -1

    def _value_head(self, normed: int, chosen: int) -> tuple[None, int]:
        tape, width = self.tape, self.config.width
        wide = tape.take(LOGITS, self.batch.loss_rows * width * 4)
        tape.give(chosen, normed)
        with tape.during(LOGITS, self.batch.loss_rows * width * 4):
            d_rows = tape.take(LOGITS, self.batch.loss_rows * width * self.item)
        tape.give(wide)
        with tape.during(LOGITS, self._bytes(width)):
            g = tape.take(WORKING, self._bytes(width))
        tape.give(d_rows)
        return None, g

    # --- backward ------------------------------------------------------------------------------

    def _backward(self, x: int | None, kept: _Kept, g: int, layer: int) -> int:
        """A layer's backward pass: takes d output, gives back what was kept, returns d input."""
        tape, config = self.tape, self.config
        mode, width = self.settings.checkpointing, self._bytes(self.config.width)
        needs_x = layer > 0 or self.model.is_full
        if mode == "layers":
            self._heads(kept, keeps=True)
            self._attend(kept)
        residual = self._finish_backward(kept, g, needs_x)
        if mode == "selective":
            self._heads(kept, keeps=True)
        d_attended, d_summed = residual
        delta = tape.take(WORKING, self.rows * config.num_heads * 4)
        sizes = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        dq, dk, dv = (tape.take(WORKING, self._bytes(n * config.head_size)) for n in sizes)
        slots = sum(-(-tokens // 128) * (1 + samples) for tokens, samples in self.batch.groups)
        tile = 128 * max(16, 1 << (config.head_size - 1).bit_length())
        parts = tape.take(WORKING, slots * config.num_kv_heads * 2 * tile * 4)
        tape.give(delta, parts)
        is_early = mode == "none"
        early = kept.pop("rotated", "q_normed", "k_normed", "qkv", "attended", "lse")
        if is_early:
            tape.give(d_attended, *early)
        d_heads = self._rotation_backward(dq, dk, dv, is_early=is_early)
        (normed,) = kept.pop("normed")
        d_normed = self._linear_backward(
            "qkv", kept, normed, d_heads, self.rows, needs_input=needs_x
        )
        if not needs_x:
            tape.give(d_normed)
        else:
            with tape.during(WORKING, width):  # d x of the norm
                tape.give(d_normed)
                if mode == "none":
                    tape.give(x)
                    total = tape.take(WORKING, width)
                    tape.give(d_summed)
                    d_summed, x = total, None
        if mode != "none":
            tape.give(d_attended, *early[4:], *early[:4], dv, dk, dq, g)
        tape.give(x)
        if d_summed is None:
            d_summed = tape.take(WORKING, width)
        return d_summed

    def _finish_backward(self, kept: _Kept, g: int, needs_x: bool) -> tuple[int | None, int | None]:
        """From the layer's end back to attention's output: d attended, and d x of the residual."""
        tape, width = self.tape, self._bytes(self.config.width)
        checkpointed = self.settings.checkpointing != "none"
        tile: int | None = None
        d_normed: int | None
        if checkpointed:
            self._after_attention(kept, keeps=True)
        if checkpointed and self._is_tiled:
            d_normed = tape.take(WORKING, width)
            for rows in self._tiles():
                added = self._mlp(kept, rows, keeps=True, is_read=False)
                tape.give(tile)  # the tile before lives until this one is in its place
                tile = self._mlp_backward(kept, rows, None)
                tape.give(added)
        else:
            if checkpointed:
                tape.give(self._mlp(kept, self.rows, keeps=True, is_read=False))
            normed2 = None if checkpointed else kept.pop("normed2")[0]
            d_normed = self._mlp_backward(kept, self.rows, normed2)
        d_sum = tape.take(WORKING, width)
        if tile is None:
            tape.give(d_normed)
            d_normed = None
        if not checkpointed:
            tape.give(g, *kept.pop("summed"))
        d_x = None
        if checkpointed and needs_x:
            d_x = tape.take(WORKING, width)  # the residual's share has a copy of its own
        read = d_sum if checkpointed else None
        d_attended = self._linear_backward("output", kept, None, read, self.rows)
        if checkpointed:
            tape.give(*kept.pop("summed", "normed2"), tile, d_normed)
            return d_attended, d_x
        return d_attended, d_sum

    def _mlp_backward(self, kept: _Kept, rows: int, normed: int | None) -> int | None:
        """d normed; the gradient of gate and up lies where they lay."""
        tape = self.tape
        gate_up, hidden = kept.pop("gate_up", "hidden")
        if self.model.is_full:
            d_hidden = self._linear_backward("down", kept, hidden, None, rows)
            tape.give(d_hidden)
            return self._linear_backward("gate_up", kept, normed, gate_up, rows)
        d_hidden, t = self._frozen_backward("down", rows)
        self._a_gradient("down")
        tape.give(d_hidden)
        d_normed, t_inner = self._frozen_backward("gate_up", rows)
        tape.give(t)
        self._a_gradient("gate_up")
        tape.give(t_inner, normed, gate_up, *kept.pop("gate_up_xa", "down_xa"))
        return d_normed

    def _linear_backward(
        self, name: str, kept: _Kept, x: int | None, dy: int | None, rows: int,
        *, needs_input: bool = True,
    ) -> int | None:  # fmt: skip
        """d input; x, dy: numbers to give back once they are read."""
        tape, size = self.tape, self.linears[name]
        if self.model.is_full:
            d_weight = tape.take(WORKING, size.inputs * size.outputs * self.item)
            dx: int | None = tape.take(WORKING, rows * size.inputs * self.item)
            tape.give(x, dy)
            self._weight_gradient(d_weight, size.inputs * size.outputs)
            return dx
        dx, t = self._frozen_backward(name, rows, needs_input=needs_input)
        self._a_gradient(name)
        tape.give(t, x, *kept.pop(f"{name}_xa"), dy)
        return dx

    def _frozen_backward(
        self, name: str, rows: int, *, needs_input: bool = True
    ) -> tuple[int | None, int | None]:
        """d input and the gradient by x A^T of a frozen layer; the gradient of B stays."""
        tape, size, rank = self.tape, self.linears[name], self.model.rank
        dx_bytes = rows * size.inputs * self.item
        if not size.adapted:
            if not needs_input:
                return None, None
            plain = tape.take(WORKING, dx_bytes)
            if size.is_quantised:
                tape.brief(DECODED, size.decoded_columns(self.item))
            return plain, None
        t = self._taken_xa(name, rows)
        db = tape.take(GRADIENTS, sum(size.adapted) * rank * 4)
        for outputs in size.adapted:
            tape.brief(WORKING, outputs * rank * 4)
        self._arrives(db)
        dx = None
        if needs_input:
            dx = tape.take(WORKING, dx_bytes)
            if size.is_quantised:
                tape.brief(DECODED, size.decoded_columns(self.item))
        return dx, t

    def _a_gradient(self, name: str) -> None:
        size = self.linears[name]
        if size.adapted:
            numbers = len(size.adapted) * self.model.rank * size.inputs
            self._arrives(self.tape.take(GRADIENTS, numbers * 4))

    def _arrives(self, gradient: int) -> None:
        """A float32 gradient becomes the sum, or is added to the one that is there."""
        if self.batch.has_gradients:
            self.tape.give(gradient)
        else:
            self.gradients.append(gradient)

    def _rotation_backward(self, dq: int, dk: int, dv: int, *, is_early: bool) -> int:
        """d of the fused projection."""
        tape, config = self.tape, self.config
        both = self._bytes((config.num_heads + config.num_kv_heads) * config.head_size)
        whole = self._bytes((config.num_heads + 2 * config.num_kv_heads) * config.head_size)
        joined = tape.take(WORKING, both)
        if is_early:
            tape.give(dq, dk)
        turned = tape.take(WORKING, both)
        tape.give(joined)
        d_heads = tape.take(WORKING, whole)
        tape.give(turned)
        if is_early:
            tape.give(dv)
        return d_heads

    def _embedding_backward(self, head_gradient: int | None) -> None:
        size = self.config.vocab_size * self.config.width
        d_embed = self.tape.take(WORKING, size * self.item)
        if self.config.tied_head and head_gradient is not None:
            total = self.tape.take(WORKING, size * self.item)
            self.tape.give(d_embed, head_gradient)
            d_embed = total
        self._weight_gradient(d_embed, size)

    def _weight_gradient(self, arrived: int, numbers: int) -> None:
        """A gradient in the compute dtype moves into its float32 sum."""
        tape = self.tape
        if self.item == 4:
            self._arrives(arrived)
            return
        wide = tape.take(GRADIENTS, numbers * 4)
        tape.give(arrived)
        self._arrives(wide)

    def _norm_backward(self) -> int:
        return self.tape.take(WORKING, self._bytes(self.config.width))

    # --- host memory ---------------------------------------------------------------------------

    @property
    def _offloads(self) -> bool:
        return self.settings.offload and self.settings.checkpointing != "none"

    def _left(self, kept: _Kept, x: int) -> None:
        """A layer's tensors have reached the host."""
        self.tape.give(x, *kept.pop("attended"))

    def _arriving(self, kept: _Kept) -> int:
        """A layer's tensors are on their way back while the layer after it is computed."""
        x = self.tape.take(INPUTS, self._bytes(self.config.width))
        if self.settings.checkpointing == "selective":
            heads = self.config.num_heads * self.config.head_size
            kept.numbers["attended"] = self.tape.take(INPUTS, self._bytes(heads))
        return x

    # --- sizes ---------------------------------------------------------------------------------

    def _bytes(self, numbers: int) -> int:
        return self.rows * numbers * self.item

    def _tiles(self) -> list[int]:
        tile = self.settings.mlp_tile_tokens
        rest = self.rows % tile
        return [tile] * (self.rows // tile) + ([rest] if rest else [])

    @property
    def _is_tiled(self) -> bool:
        """Whether the feed-forward of a checkpointed layer goes through in tiles."""
        return 0 < self.settings.mlp_tile_tokens < self.rows

    def _saves_input(self, name: str) -> bool:
        """Whether a layer's backward pass reads its input."""
        return self.model.is_full or bool(self.linears[name].adapted)
