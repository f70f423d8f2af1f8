"""The control: blind to the text, the same for the same seed."""

from __future__ import annotations

import pytest

from sparring.errors import RewardError
from sparring.rewards.random import random_reward


def test_values_depend_on_seed_step_and_place_alone():
    one = random_reward(["a"] * 64)
    assert one == random_reward(["b"] * 64)
    assert one != random_reward(["a"] * 64, seed=1)
    assert one != random_reward(["a"] * 64, trainer_state={"step": 1})


def test_the_share_is_what_was_asked():
    for share in (0.0, 0.2, 0.5, 1.0):
        values = random_reward([""] * 4000, share=share)
        assert sum(values) / 4000 == pytest.approx(share, abs=0.03)
    with pytest.raises(RewardError, match="between 0 and 1"):
        random_reward([""], share=1.5)
