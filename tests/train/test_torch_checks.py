from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from tunedock.events import Emitter
from tunedock.plan.machine.cards import Card, Cards
from tunedock.train import doctor
from tunedock.train.doctor import install_for, judge_build, openmp, runs_on

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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_is_tried_by_a_product():
    assert doctor.devices(Cards())[0].found.endswith("a product comes out right")


def test_a_check_that_raises_is_a_finding(monkeypatch):
    def raises():
        raise OSError("/lib/libgomp.so.1: cannot allocate memory in static TLS block")

    monkeypatch.setattr(doctor, "fonts", raises)
    (broken,) = [check for check in doctor.examine(Emitter(None)) if check.verdict == "failure"]
    assert broken.name == "fonts"
    assert "LD_PRELOAD=/lib/libgomp.so.1" in broken.way_out
