from __future__ import annotations

import platform

import psutil
import pytest
import torch

from tunedock.train.machine import hardware, usage, versions


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA reports its own memory")
def test_usage_on_cpu_is_this_process() -> None:
    usage()
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    total = sum(i * i for i in range(2_000_000))
    seen = usage()
    assert total
    assert seen["memory_bytes"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
    assert seen["memory_bytes"] > block.numel()
    assert 0 < seen["device_utilisation"] <= 100


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_usage_on_cuda_is_the_peak_of_the_tensors() -> None:
    before = torch.cuda.max_memory_allocated()
    block = torch.ones(before + 64 * 2**20, dtype=torch.uint8, device="cuda")
    seen = usage()
    assert seen["memory_bytes"] >= block.numel()
    assert 0 <= seen.get("device_utilisation", 0) <= 100


def test_hardware() -> None:
    found = hardware()
    assert found["cpu"]
    assert 1 <= found["cores"] <= psutil.cpu_count()
    assert found["memory_bytes"] == psutil.virtual_memory().total
    assert len(found["gpus"]) == torch.cuda.device_count()


def test_versions() -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert {"tunedock", "transformers", "peft"} <= set(found)
