"""Finding losses and advantages by name, and refusing knobs that they do not take."""

from __future__ import annotations

import math
import re

import pytest

from sparring.algorithms import advantages, losses, registry
from sparring.errors import RecipeError


@pytest.mark.parametrize("name", losses.__all__)
def test_every_registered_loss_is_found_and_bound(name: str) -> None:
    assert registry.find_loss(name) is getattr(losses, name)
    assert callable(registry.build_loss(name, {}, max_completion_tokens=64))


def test_dr_grpo_takes_the_completion_limit_unless_told_otherwise() -> None:
    assert registry.build_loss("dr_grpo", {}, max_completion_tokens=64).keywords == {
        "constant": 64.0
    }
    given = registry.build_loss("dr_grpo", {"constant": 8}, max_completion_tokens=64)
    assert given.keywords == {"constant": 8}


def test_defaults_are_those_of_the_papers() -> None:
    def clips(name: str) -> tuple[float, float]:
        knobs = registry.knob_defaults(registry.find_loss(name))
        assert knobs["kl_coef"] == 0
        return knobs.get("clip_low", math.nan), knobs["clip_high"]

    assert clips("grpo") == (0.2, 0.2)
    assert clips("dr_grpo") == (0.2, 0.2)
    assert clips("dapo") == (0.2, 0.28)
    assert clips("gspo") == (3e-4, 4e-4)
    assert clips("cispo")[1] == 5.0
    assert registry.knob_defaults(losses.sft) == {}


@pytest.mark.parametrize(
    ("name", "knobs", "message"),
    [
        ("ppo2", {}, "known: cispo, dapo, dr_grpo, grpo, gspo, sft"),
        ("bnpo", {}, "depend on how the step is split; take dapo with equal clips"),
        ("k3", {}, "'k3' is not known"),
        (
            "dapo",
            {"clip_lo": 0.2},
            "dapo takes no 'clip_lo'; it takes clip_high, clip_low, kl_coef",
        ),
        ("sft", {"clip_low": 0.2}, "sft takes no 'clip_low'; it takes no knobs"),
        ("grpo", {"clip_low": -0.1}, "clip_low must be finite and at least 0, got -0.1"),
        ("grpo", {"clip_high": 0.0}, "clip_high must be finite and above 0"),
        ("grpo", {"kl_coef": math.nan}, "kl_coef must be finite"),
        ("grpo", {"kl_coef": "a lot"}, "kl_coef must be a number, got 'a lot'"),
        ("grpo", {"kl_coef": True}, "kl_coef must be a number, got True"),
        ("dr_grpo", {"constant": 0}, "constant must be finite and above 0"),
    ],
)
def test_bad_losses_are_refused_with_what_is_allowed(
    name: str, knobs: dict[str, object], message: str
) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        registry.build_loss(name, knobs, max_completion_tokens=64)


def test_a_loss_that_needs_a_knob_says_so() -> None:
    with pytest.raises(RecipeError, match="dr_grpo needs 'constant'"):
        registry.check_knobs(losses.dr_grpo, {})


@pytest.mark.parametrize("name", advantages.__all__)
def test_every_registered_advantage_is_found(name: str) -> None:
    assert registry.find_advantage(name) is getattr(advantages, name)
    assert registry.build_advantage(name, {})([]) == []


def test_bad_advantages_are_refused() -> None:
    known = "known: batch, group, leave_one_out, mean, none"
    with pytest.raises(RecipeError, match=known):
        registry.build_advantage("gae", {})
    with pytest.raises(RecipeError, match="mean takes no 'epsilon'; it takes no knobs"):
        registry.build_advantage("mean", {"epsilon": 1e-4})
    with pytest.raises(RecipeError, match="epsilon must be finite and at least 0"):
        registry.build_advantage("group", {"epsilon": -1})
