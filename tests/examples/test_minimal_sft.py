"""The one-page example runs on the shipped model and learns."""

from __future__ import annotations

import importlib.util
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_example_learns_and_leaves_an_adapter(tmp_path: Path) -> None:
    found = importlib.util.spec_from_file_location("minimal_sft", EXAMPLES / "minimal_sft.py")
    assert found is not None and found.loader is not None
    example = importlib.util.module_from_spec(found)
    found.loader.exec_module(example)
    example.STEPS = 8
    losses = example.main(EXAMPLES / "demo" / "base", EXAMPLES / "demo" / "triage.jsonl", tmp_path / "adapter")
    assert losses[-1] < losses[0] - 0.3
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
