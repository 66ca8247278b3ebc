"""How many GPUs a training here would use, and what a processor computes in."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from tunedock.plan import cards
from tunedock.plan.cards import cpu_has_bf16, cpu_has_bf16_unit, gpus_here
from tunedock.plan.machine.cards import Card, Cards

FOUR = Cards((*[Card("NVIDIA", "L20", 48 << 30)] * 4, Card("AMD", "another")))


@pytest.fixture
def cuda_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "version", lambda package: "2.13.0+cu130")


@pytest.mark.usefixtures("cuda_wheels")
@pytest.mark.parametrize(
    ("shown", "gpus"), [(None, 4), ("0,1", 2), ("3", 1), ("0,1,2,3,4,5", 4), ("", 0), ("-1", 0), ("GPU-ab12", 1)]
)
def test_those_that_are_there_and_not_hidden(shown: str | None, gpus: int) -> None:
    environment = {} if shown is None else {"CUDA_VISIBLE_DEVICES": shown}
    assert gpus_here(environment, look=lambda: FOUR) == gpus


@pytest.mark.usefixtures("cuda_wheels")
def test_none_on_a_machine_without_any() -> None:
    assert gpus_here({}, look=Cards) == 0


def test_none_where_pytorch_is_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "version", lambda package: "2.13.0+cpu")
    assert gpus_here({}, look=lambda: FOUR) == 0


def test_a_machine_without_pytorch_is_asked_for_its_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(cards, "version", missing)
    assert gpus_here({}, look=lambda: FOUR) == 4


@pytest.mark.parametrize(
    ("flags", "bf16", "unit"),
    [
        ("flags : fpu avx512f avx512_bf16 avx512_fp16", True, False),
        ("flags : avx512_bf16 amx_bf16 amx_tile", True, True),
        ("Features : asimd bf16 i8mm", True, True),
        ("flags : fpu avx2", False, False),
    ],
)
def test_bfloat16_of_a_processor(tmp_path: Path, flags: str, bf16: bool, unit: bool) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(flags + "\n")
    assert (cpu_has_bf16(cpuinfo), cpu_has_bf16_unit(cpuinfo)) == (bf16, unit)
    assert not cpu_has_bf16_unit(tmp_path / "missing")
