"""Whether a model's weights are spread over processes: by FSDP2 as DTensors, by DeepSpeed's ZeRO-3 as marked, empty parameters."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    return any(map(is_sharded_parameter, model.parameters()))


def is_sharded_parameter(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "placements") or hasattr(parameter, "ds_id")


def whole_size(parameter: nn.Parameter) -> int:
    """Numbers of the whole parameter, wherever its parts are."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def held(parameter: nn.Parameter) -> Tensor:
    """What this process has of a parameter: its values, or the part of them that is here."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    part = getattr(parameter, "ds_tensor", None)
    return parameter.data if part is None else part.data
