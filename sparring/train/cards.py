"""Graphics cards as numbers: memory, bandwidth and tensor peak, out of a committed table.

No GPU is asked. Each number is the maker's, or was measured; which is told.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

from sparring.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One kind of card.

    memory: bytes in all, by the driver. bandwidth: bytes a second. flops: dense 16-bit tensor
    products with float32 sums, floating-point operations a second. lanes: integer operations a
    second. arch: 10 x compute capability. measured: names of the numbers that were measured here;
    source says by what, or whose the others are.
    """

    name: str
    memory: int
    bandwidth: float
    flops: float
    lanes: float
    arch: int
    measured: tuple[str, ...]
    source: str

    @property
    def usable(self) -> int:
        """Bytes that a process is given at most, to a tenth of a GiB.

        Drivers keep 0.25 GiB (T4) to 0.9 GiB (A100 of 80 GiB) of what they show as total.
        """
        tenth = 2**30 // 10
        return int(0.99 * self.memory - 400 * 2**20) // tenth * tenth

    @property
    def is_measured(self) -> bool:
        """Whether bandwidth and tensor peak were measured here."""
        return {"bandwidth_gbs", "tflops"} <= set(self.measured)


@cache
def all_cards() -> Mapping[str, Card]:
    """Every card of the table, by name."""
    text = (resources.files("sparring") / "assets" / "cards.toml").read_text(encoding="utf-8")
    found = [
        Card(
            name=row["name"],
            memory=int(row["memory_mib"]) * 2**20,
            bandwidth=row["bandwidth_gbs"] * 1e9,
            flops=row["tflops"] * 1e12,
            lanes=row["lanes"] * 1e12,
            arch=row["arch"],
            measured=tuple(row.get("measured", ())),
            source=row["source"],
        )
        for row in tomllib.loads(text)["card"]
    ]
    return {card.name: card for card in found}


def find_card(name: str) -> Card:
    """The card that a name means, as "4090", "rtx-4090" or what a driver calls it does.

    Raises UserError that lists the known ones.
    """
    wanted = _letters(name)
    found = [card for card in all_cards().values() if _letters(card.name) == wanted]
    found = found or [card for card in all_cards().values() if _short(card.name) == _short(name)]
    found = found or [card for card in all_cards().values() if _short(card.name) in wanted]
    if len(found) > 1 or not found:
        known = ", ".join(all_cards())
        problem = "may be several cards" if found else "is no card of the table"
        raise UserError(f"'{name}' {problem}; known: {known}")
    return found[0]


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _short(name: str) -> str:
    """A name without its maker and line: nvidiageforcertx4090 -> 4090."""
    return re.sub(r"nvidia|geforce|rtx|tesla|pcie|sxm\d?|hbm3e?|laptopgpu", "", _letters(name))
