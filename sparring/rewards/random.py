"""A reward that knows nothing: the control beside which every other reward has to look better.

With some base models training on it alone moves benchmarks (arXiv 2506.10947), so a gain counts
only beyond what this one gives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from sparring.errors import RewardError


def random_reward(
    completions: Sequence[Any],
    trainer_state: dict[str, Any] | None = None,
    log_extra: Callable[..., None] | None = None,
    *,
    seed: int = 0,
    share: float = 0.5,
) -> list[float]:
    """1.0 for about `share` of the completions, else 0.0, by a hash of seed, step and place.

    The text of a completion plays no part. The same seed, step and place in the batch always give
    the same value. Raises RewardError for a share outside 0 to 1.
    """
    if not 0.0 <= share <= 1.0:
        raise RewardError(
            f"reward 'random': share = {share} is not allowed; it lies between 0 and 1"
        )
    step = (trainer_state or {}).get("step", 0)
    values = []
    for index in range(len(completions)):
        digest = hashlib.sha256(f"{seed}/{step}/{index}".encode()).digest()
        values.append(1.0 if int.from_bytes(digest[:8]) < share * 2**64 else 0.0)
    if log_extra is not None:
        log_extra(
            "reason", [f"drawn by seed {seed}, step {step}, place {i}" for i in range(len(values))]
        )
    return values
