"""The table of cards, and how a card is named."""

from __future__ import annotations

import pytest

from sparring.errors import UserError
from sparring.train.cards import all_cards, find_card
from sparring.train.plan_recipe import own_card


def test_every_card_has_its_numbers_and_their_source() -> None:
    for card in all_cards().values():
        assert 6 * 2**30 < card.memory < 200 * 2**30
        assert 1e11 < card.bandwidth < 1e13
        assert 1e13 < card.flops < 3e15
        assert card.source
    assert [card.name for card in all_cards().values() if card.is_measured] == ["H200"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("H200", "H200"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("4090", "RTX 4090"),
        ("rtx-4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Tesla T4", "T4"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
    ],
)
def test_a_card_is_found_by_the_names_it_goes_by(name: str, found: str) -> None:
    assert find_card(name).name == found


def test_an_unknown_or_unclear_card_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no card of the table; known: H200, .*T4"):
        find_card("Voodoo 2")
    with pytest.raises(UserError, match="no card of the table"):
        find_card("A100")


def test_what_a_driver_gives_out_is_less_than_what_it_shows() -> None:
    given = {"T4": 14.74, "RTX 4090": 23.64, "A100-40GB": 39.56, "A100-80GB": 79.15, "H200": 139.8}
    for name, gib in given.items():
        assert 0.96 * gib < find_card(name).usable / 2**30 < gib


def test_a_machine_s_own_card_is_the_table_s_where_it_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert own_card() is None
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA GeForce RTX 4090")
    assert own_card() == find_card("4090")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "Voodoo 2")
    assert own_card() is None
