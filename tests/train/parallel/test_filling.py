"""Only the first rank reads the weights; after they are sharded all ranks' parts together are the model that was read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import LIMIT_S, workplace
from safetensors.torch import load_file

from tunedock import pipeline
from tunedock.model.load import CPU
from tunedock.model.policy import Precision
from tunedock.model.session import find_base, trainable_model


@pytest.mark.parametrize("adapter", ["full", pytest.param("lora", marks=pytest.mark.long)])
def test_one_rank_reads_and_both_hold_their_half(tmp_path: Path, adapter: str) -> None:
    folder = workplace(tmp_path, "sft", adapter)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(Path(__file__).with_name("filling_rank.py")), str(folder)]
    ended = subprocess.run(
        [*torchrun, *script],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    base = find_base(pipeline.resolve_recipe([folder / "recipe.yaml"]).recipe)
    whole = trainable_model(base, Precision(torch.float32, torch.float32), CPU)
    size = sum(p.numel() for p in whole.parameters())
    said = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    assert [one["loaded"] for one in said] == [size, 0]
    assert all(0.4 * size < one["kept"] < 0.6 * size for one in said)
    assert [one["whole"] for one in said] == [size, size]
    trained = sum(p.numel() for p in whole.parameters() if p.requires_grad)
    assert all(0.4 * 8 * trained < one["states_to_come"] < 0.6 * 8 * trained for one in said), (
        "AdamW's, of its own half"
    )
    assert said[0]["trained"] == said[1]["trained"] and said[0]["fused"] == said[1]["fused"] != []
    assert said[0]["tied"] == said[1]["tied"]
    parts = [load_file(folder / f"{rank}.safetensors") for rank in range(2)]
    for name, parameter in whole.named_parameters():
        assert torch.equal(torch.cat([part[name] for part in parts]), parameter), name
