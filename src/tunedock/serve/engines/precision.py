"""What a model's products are computed in where nobody says. It depends on the model and the machine, never on a moment's
load: a gateway that starts again answers as it did."""

from __future__ import annotations

import torch

from tunedock.model.load import has_bf16
from tunedock.plan.cards import cpu_has_bf16_unit
from tunedock.plan.control_group import groups, host_bytes

SHARE = 1 / 3
"""Of the machine's memory, the most that weights in float32 may take: the rest is for keys, values and other work."""

FLOAT32_BYTES = 4


def usual(device: torch.device, parameters: int) -> torch.dtype:
    """bfloat16 where products in it are native, else float32.

    CPUs that have bfloat16's instructions without a matrix unit for them compute a busy step 1.3 to 1.5 times as fast in float32
    (16 rows, a Xeon with AVX-512, a thread): there it is float32, where there is the memory.
    """
    if not has_bf16(device):
        return torch.float32
    if device.type == "cpu" and not cpu_has_bf16_unit() and FLOAT32_BYTES * parameters <= SHARE * host_bytes(groups()):
        return torch.float32
    return torch.bfloat16
