"""Whether a model's weights are spread over processes: by FSDP2 as DTensors, by DeepSpeed's ZeRO-3 as marked, empty parameters."""

from __future__ import annotations

from torch import nn


def is_sharded(model: nn.Module) -> bool:
    return any(hasattr(p, "placements") or hasattr(p, "ds_id") for p in model.parameters())
