"""One of two ranks: `python sharded_rank.py RANK PORT fsdp2|zero3 lora|full` prints loss and gradient norms of a sharded model.

Each rank takes its own rows of one step (`data.layout.over_ranks`), one call of the wrapped model a row.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

import torch
from sharded_model import count_of, group, make
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tunedock.data.layout import over_ranks
from tunedock.model.policy import Policy
from tunedock.model.sharding import is_sharded

RANKS = 2


def fsdp2(policy: Policy) -> tuple[Callable[[Tensor], None], Callable[[nn.Parameter], Tensor | None]]:
    """Shards the policy's model; returns what computes gradients of a loss that is summed over ranks, and what reads them whole."""
    model, mesh = policy.model, init_device_mesh("cpu", (RANKS,))
    base = model.get_base_model() if policy.has_base else model
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    def whole(p: nn.Parameter) -> Tensor | None:
        return p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad

    return lambda loss: (loss * RANKS).backward(), whole  # it takes the mean over ranks


def zero3(policy: Policy) -> tuple[Callable[[Tensor], None], Callable[[nn.Parameter], Tensor | None]]:
    """The same by DeepSpeed, which divides by its accumulation steps and holds the gradients until the last of them."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    steps = 64
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    policy.called, *_ = deepspeed.initialize(
        model=policy.model,
        model_parameters=trained,
        optimizer=torch.optim.AdamW(trained, lr=1e-3),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": steps,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    return (
        lambda loss: policy.called.backward(loss * RANKS * steps),
        lambda p: safe_get_full_grad(p) if p.requires_grad else None,
    )


def main(rank: int, port: str, by: str, kind: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    policy = make(kind)
    policy.weighted_sum = True
    named = dict(policy.model.named_parameters())
    assert not is_sharded(policy.model)
    backward, whole = (fsdp2 if by == "fsdp2" else zero3)(policy)
    assert is_sharded(policy.model)
    if by == "fsdp2":
        named = dict(policy.model.named_parameters())  # they are others now
    total = torch.zeros(())
    for row in over_ranks(policy.rows(group(), 60), RANKS)[rank]:
        logprob_N, tensors = policy.logprobs(row)
        share = -(tensors.weight_N * logprob_N).sum() / count_of(group())
        backward(share)
        total += share.detach()
    torch.distributed.all_reduce(total)
    norms = {name: float(grad.norm()) for name, p in named.items() if (grad := whole(p)) is not None}
    print(json.dumps({"loss": float(total), "norms": norms}), flush=True)
    torch.distributed.destroy_process_group()
    os._exit(0)  # threads of DeepSpeed's may still run when the interpreter takes itself apart, which then aborts


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
