"""One of two ranks: `python agree_rank.py RANK PORT` prints what `agree` and `least` answer there."""

from __future__ import annotations

import json
import sys

import torch

from tunedock.model.world import agree, least

rank, port = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
print(json.dumps([agree(rank == 1), agree(False), agree(True), least(10 + rank)]), flush=True)
torch.distributed.destroy_process_group()
