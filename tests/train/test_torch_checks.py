from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tunedock.events import Emitter
from tunedock.plan.machine.cards import Card, Cards
from tunedock.train import card_checks, doctor
from tunedock.train.card_checks import install_for, judge_build, runs_on
from tunedock.train.doctor import openmp

RECORDED = Path(__file__).parents[1] / "plan" / "machine" / "doctor"
H200 = Cards((Card("NVIDIA", "NVIDIA H200", 143771 << 20, "9.0"),), "580.159.03")
AMD = Cards((Card("AMD", "AMD card 0x74a1 at 0000:03:00.0"),))

BUILD_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((9, 0), BUILD_13, True),
        ((8, 9), BUILD_13, True),  # by sm_86: same major, lower minor
        ((7, 0), BUILD_13, False),  # below the lowest
        ((12, 1), BUILD_13, True),
        ((13, 0), BUILD_13, True),  # by PTX
        ((13, 0), ["sm_120"], False),
        ((10, 3), ["sm_100"], True),
        ((10, 3), ["sm_100a"], False),
        ((10, 3), ["sm_100f"], True),
        ((9, 0), ["sm_90a"], True),
        ((9, 0), ["nonsense", ""], False),
        ((9, 0), [], False),
    ],
)
def test_levels_a_build_has_and_cards_it_runs_on(capability, built, runs):
    assert runs_on(capability, built) is runs


def test_a_card_under_a_build_for_cpus_is_a_failure():
    check = judge_build(None, None, H200, answers=False)
    assert check.verdict == "failure"
    assert "NVIDIA H200" in check.found
    assert check.way_out.endswith("whl/cu130`")
    assert judge_build("13.0", None, H200, answers=True).verdict == "ok"
    assert judge_build(None, None, AMD, answers=False).verdict == "warning"
    assert judge_build(None, "7.0", AMD, answers=True).verdict == "ok"
    assert judge_build(None, None, Cards(), answers=False).verdict == "ok"
    assert "runs on the CPU" in judge_build("12.8", None, Cards(), answers=False).found
    assert "runs on the CPU" not in judge_build("12.8", None, Cards(), answers=True).found  # hidden from all but torch


@pytest.mark.parametrize(
    ("driver", "said"),
    [(None, "cu130"), ("590.1", "cu130"), ("570.86.15", "cu126"), ("470.182.03", "update the NVIDIA driver")],
)
def test_the_build_to_install_is_one_the_driver_runs(driver, said):
    assert said in install_for(driver)


def test_openmp_runtimes_of_a_process():
    one = (RECORDED / "maps_one_openmp").read_text()
    assert openmp(one).found == "/venv/lib/python3.11/site-packages/torch/lib/libgomp.so.1"
    other = "7f00-7f01 r-xp 00000000 fe:00 1    /opt/conda/lib/libiomp5.so\n"
    check = openmp(one + other)
    assert check.verdict == "warning"
    assert "LD_PRELOAD=/venv/lib/python3.11/site-packages/torch/lib/libgomp.so.1" in check.way_out
    assert openmp("7f00-7f01 r-xp 00000000 fe:00 1    /usr/lib/libcompress.so\n").found == "none loaded"
    assert openmp("").verdict == "not applicable"


def test_every_check_of_this_process_is_told_as_it_is_made():
    stream = io.StringIO()
    made = doctor.examine(Emitter(stream))
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["data"]["check"] for event in events if event["kind"] == "note"] == [
        check.to_json() for check in made
    ]
    names = {check.name: check for check in made}
    assert names["torch"].verdict == "ok"
    assert torch.__version__ in names["torch"].found
    assert names["training stack"].verdict == "ok"
    assert "GFLOP/s" in names["bfloat16 on the cpu"].found
    assert names["font for chinese"].found
    assert not [check for check in made if check.verdict == "failure"]
    if not torch.cuda.is_available():
        assert names["cuda"].verdict == "not applicable"


class FakeCuda:
    """A card stands in where there is none: what torch says of it, not what it computes."""

    def __init__(self, monkeypatch, *, available, warned=None, levels=(), capability=(9, 0)):
        def is_available():
            if warned:
                warnings.warn(warned, stacklevel=1)
            return available

        properties = SimpleNamespace(name="NVIDIA H200", major=capability[0], minor=capability[1])
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        for name, answer in (
            ("is_available", is_available),
            ("device_count", lambda: 1),
            ("get_device_properties", lambda _index: properties),
            ("get_arch_list", lambda: list(levels)),
            ("mem_get_info", lambda _index: (100 << 30, 140 << 30)),
            ("is_bf16_supported", lambda **_options: True),
        ):
            monkeypatch.setattr(torch.cuda, name, answer)


def test_a_card_torch_cannot_use_says_why(monkeypatch):
    FakeCuda(
        monkeypatch,
        available=False,
        warned="CUDA initialization: The NVIDIA driver on your system is too old (found 12040)",
    )
    (check,) = card_checks.devices(H200)
    assert check.verdict == "failure"
    assert "too old" in check.found
    assert "update the NVIDIA driver" in check.way_out
    (driver,) = card_checks.driver(H200)
    assert (driver.name, driver.verdict, driver.minimum) == ("driver for cuda", "ok", "580.65.06")
    old = Cards(H200.cards, "570.86.15")
    assert card_checks.driver(old)[0].verdict == "failure"
    assert "cu126" in card_checks.driver(old)[0].way_out


def test_a_card_the_build_has_no_kernels_for(monkeypatch):
    FakeCuda(monkeypatch, available=True, levels=["sm_100", "sm_120"])
    (check,) = card_checks.devices(H200)
    assert (check.name, check.verdict) == ("cuda:0", "failure")
    assert "sm_90: this build has kernels for sm_100, sm_120 only" in check.found


def test_a_card_whose_product_is_tried(monkeypatch):
    FakeCuda(monkeypatch, available=True, levels=BUILD_13)
    monkeypatch.setattr(card_checks, "_wrong_product", lambda _device: None)
    (check,) = card_checks.devices(H200)
    assert (check.verdict, check.found) == (
        "ok", "NVIDIA H200, sm_90, bfloat16, 100 GiB of 140 GiB free; a product comes out right",
    )  # fmt: skip
    monkeypatch.setattr(card_checks, "_wrong_product", lambda _device: "Error 802: system not yet initialized")
    (check,) = card_checks.devices(H200)
    assert check.verdict == "failure"
    assert "fabricmanager" in check.way_out


def test_a_product_of_ones_comes_out_right_here():
    assert card_checks._wrong_product(torch.device("cpu")) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_is_tried_by_a_product():
    assert card_checks.devices(Cards())[0].found.endswith("a product comes out right")


def test_a_check_that_raises_is_a_finding(monkeypatch):
    def raises():
        raise OSError("/lib/libgomp.so.1: cannot allocate memory in static TLS block")

    monkeypatch.setattr(doctor, "fonts", raises)
    (broken,) = [check for check in doctor.examine(Emitter(None)) if check.verdict == "failure"]
    assert broken.name == "fonts"
    assert "LD_PRELOAD=/lib/libgomp.so.1" in broken.way_out
