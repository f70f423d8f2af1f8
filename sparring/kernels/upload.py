"""Small tensors of integers on their way to a device, which goes on computing meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def upload(
    values: Sequence[int] | Sequence[Sequence[int]] | np.ndarray | Tensor,
    device: torch.device,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """The values as a tensor on the device.

    From ordinary memory a copy to a GPU begins once everything queued there is done, and the host
    waits for it; from pinned memory it takes its turn.
    """
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
