from __future__ import annotations

import pytest
from machine_recordings import RecordedRunner, recorded

from tunedock.plan.machine.cards import Card, Cards, checks, find
from tunedock.plan.machine.command import Ran


@pytest.fixture
def bare(tmp_path):
    """A machine's /proc and /sys without anything in them."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "sys").mkdir()
    return {"proc": tmp_path / "proc", "sys": tmp_path / "sys", "system": "Linux", "machine": "x86_64"}


def on_the_bus(bare, address, vendor, device, kind):
    folder = bare["sys"] / "bus" / "pci" / "devices" / address
    folder.mkdir(parents=True)
    for name, value in (("vendor", vendor), ("device", device), ("class", kind)):
        (folder / name).write_text(f"{value}\n")


def by_name(made):
    return {check.name: check for check in made}


def smi(name, code=0):
    return RecordedRunner({"nvidia-smi": Ran(code, recorded(name))})


def test_no_card(bare):
    found = find(RecordedRunner({}), **bare)
    assert found == Cards()
    (check,) = checks(found, {}, bare["proc"])
    assert (check.name, check.verdict) == ("cards", "not applicable")


def test_a_large_card_with_a_new_driver(bare):
    found = find(smi("nvidia_smi_h200.csv"), **bare)
    assert found == Cards((Card("NVIDIA", "NVIDIA H200", 143771 << 20, "9.0"),), "580.159.03")
    made = by_name(checks(found, {}, bare["proc"]))
    assert {check.verdict for check in made.values()} == {"ok"}
    assert made["gpu 0"].found == "NVIDIA H200, 140.4 GiB"
    assert made["gpu 0 compute capability"].found == "9.0"
    assert (made["nvidia driver"].found, made["nvidia driver"].minimum) == ("580.159.03", "525.60.13")


def test_two_cards_one_of_them_without_bfloat16(bare):
    made = by_name(checks(find(smi("nvidia_smi_two.csv"), **bare), {}, bare["proc"]))
    assert made["gpu 0"].verdict == "warning"  # 12 GiB
    assert made["gpu 0 compute capability"].verdict == "warning"
    assert "fp16" in made["gpu 0 compute capability"].way_out
    assert made["gpu 1"].verdict == made["gpu 1 compute capability"].verdict == "ok"
    assert made["nvidia driver"].verdict == "warning"  # good for CUDA 12, not for 13


def test_a_driver_that_does_not_know_the_compute_capability_is_asked_again(bare):
    class Old(RecordedRunner):
        def __call__(self, arguments):
            super().__call__(arguments)
            if "compute_cap" in " ".join(arguments):
                return Ran(2, recorded("nvidia_smi_470.out"))
            return Ran(0, recorded("nvidia_smi_470.csv"))

    runner = Old({})
    found = find(runner, **bare)
    assert len(runner.asked) == 2
    assert found == Cards((Card("NVIDIA", "Tesla V100-SXM2-16GB", 16160 << 20),), "470.182.03")
    made = by_name(checks(found, {}, bare["proc"]))
    assert made["nvidia driver"].verdict == "failure"
    assert "CUDA 12 or 13" in made["nvidia driver"].way_out


def test_memory_shared_with_the_processor_is_not_known_and_no_failure(bare):
    made = by_name(checks(find(smi("nvidia_smi_shared_memory.csv"), **bare), {}, bare["proc"]))
    assert (made["gpu 0"].found, made["gpu 0"].verdict) == ("NVIDIA GB10", "ok")


def test_in_wsl2_nvidia_smi_is_found_in_its_own_folder(bare):
    (bare["proc"] / "version").write_text(recorded("proc_version_wsl2"))
    runner = RecordedRunner({"/usr/lib/wsl/lib/nvidia-smi": Ran(0, recorded("nvidia_smi_wsl2.csv"))})
    found = find(runner, **bare)
    assert found.driver == "555.99"
    made = by_name(checks(found, {}, bare["proc"]))
    assert "Windows" in made["nvidia driver"].way_out


@pytest.mark.parametrize(
    ("file", "said", "way_out"),
    [
        ("nvidia_smi_no_module.out", "couldn't communicate with the NVIDIA driver", "modprobe"),
        ("nvidia_smi_mismatch.out", "Driver/library version mismatch", "restart"),
        ("nvidia_smi_no_devices.out", "No devices were found", "dmesg"),
    ],
)
def test_what_nvidia_smi_complains_of_is_a_failure_with_a_way_out(bare, file, said, way_out):
    (check,) = checks(find(smi(file, code=9), **bare), {}, bare["proc"])
    assert (check.name, check.verdict) == ("nvidia driver", "failure")
    assert said in check.found
    assert way_out in check.way_out


def test_an_nvidia_smi_that_hangs_is_a_failure(bare):
    (check,) = checks(find(RecordedRunner({"nvidia-smi": Ran(None)}), **bare), {}, bare["proc"])
    assert check.verdict == "failure"
    assert "no answer within" in check.found


def test_a_card_without_a_driver_is_found_on_the_bus(bare):
    on_the_bus(bare, "0000:01:00.0", "0x10de", "0x2684", "0x030000")
    on_the_bus(bare, "0000:01:00.1", "0x10de", "0x22ba", "0x040300")  # the card's sound is no card
    on_the_bus(bare, "0000:00:1f.0", "0x8086", "0x7a04", "0x060100")
    found = find(RecordedRunner({}), **bare)
    assert [card.name for card in found.cards] == ["NVIDIA card 0x2684 at 0000:01:00.0"]
    made = by_name(checks(found, {}, bare["proc"]))
    assert made["nvidia driver"].verdict == "failure"
    assert "--gpus all" in made["nvidia driver"].way_out


def test_the_drivers_own_files_name_the_card_where_nvidia_smi_is_missing(bare):
    driver = bare["proc"] / "driver" / "nvidia"
    (driver / "gpus" / "0000:01:00.0").mkdir(parents=True)
    (driver / "gpus" / "0000:01:00.0" / "information").write_text("Model: \t\t NVIDIA H200\nIRQ:   \t\t 120\n")
    (driver / "version").write_text(recorded("nvidia_version_open"))
    found = find(RecordedRunner({}), **bare)
    assert found == Cards((Card("NVIDIA", "NVIDIA H200"),), "565.57.01")


def test_other_makers_are_said_plainly(bare):
    on_the_bus(bare, "0000:03:00.0", "0x1002", "0x74a1", "0x120000")
    on_the_bus(bare, "0000:00:02.0", "0x8086", "0x4680", "0x030000")
    made = by_name(checks(find(RecordedRunner({}), **bare), {}, bare["proc"]))
    assert made["amd"].verdict == "warning"
    assert "not tested" in made["amd"].found
    assert made["intel"].verdict == "not applicable"
    apple = find(RecordedRunner({}), **{**bare, "system": "Darwin", "machine": "arm64"})
    assert "MPS" in by_name(checks(apple, {}, bare["proc"]))["apple"].found


@pytest.mark.parametrize(("value", "verdict"), [("", "warning"), ("-1", "warning"), ("0,1", "ok")])
def test_hidden_cards(bare, value, verdict):
    found = find(smi("nvidia_smi_h200.csv"), **bare)
    made = by_name(checks(found, {"CUDA_VISIBLE_DEVICES": value}, bare["proc"]))
    assert made["CUDA_VISIBLE_DEVICES"].verdict == verdict
