"""One of two ranks: `python sharded_rank.py RANK PORT lora|full` prints loss and gradient norms of a model sharded by FSDP2.

Each rank takes its own rows of one step (`data.layout.over_ranks`), one call of the wrapped model a row.
"""

from __future__ import annotations

import json
import sys

import torch
from sharded_model import count_of, group, make
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tunedock.data.layout import over_ranks


def main(rank: int, port: str, kind: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    policy = make(kind)
    model = policy.model
    policy.weighted_sum = True
    mesh = init_device_mesh("cpu", (2,))
    base = model.get_base_model() if kind == "lora" else model
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    total = torch.zeros(())
    for row in over_ranks(policy.rows(group(), 60), 2)[rank]:
        logprob_N, tensors = policy.logprobs(row)
        share = -(tensors.weight_N * logprob_N).sum() / count_of(group())
        (share * 2).backward()  # FSDP2 takes the mean over ranks
        total += share.detach()
    torch.distributed.all_reduce(total)
    norms = {
        name: float(p.grad.full_tensor().norm() if isinstance(p.grad, DTensor) else p.grad.norm())
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    print(json.dumps({"loss": float(total), "norms": norms}), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
