"""Where weights are loaded to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tunedock.model import load


def test_a_card_too_small_for_float32_gives_way_to_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.zeros(100, 10, dtype=torch.bfloat16), "b": torch.zeros(24)}, tmp_path / "1.safetensors")
    save_file({"c": torch.zeros(3, 4, 5)}, tmp_path / "2.safetensors")
    card = torch.device("cuda", 0)
    monkeypatch.setattr(load, "find_device", lambda: card)
    needed = 4 * (1000 + 24 + 60) * 1.3
    for free, chosen in ((needed + 1, card), (needed - 1, load.CPU)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 1 << 40))
        assert load.roomy_device(tmp_path) == chosen
