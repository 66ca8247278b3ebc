from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tunedock.plan.machine.bounds import BOUNDS, DRIVERS, Bounds, below, bytes_text, driver_bounds, judge, measured
from tunedock.plan.machine.check import Check, count, overall
from tunedock.plan.machine.symptoms import SYMPTOMS, known_way_out

PROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize(
    ("one", "other", "lower"),
    [
        ("2.9", "2.10", True), ("2.13.0+cpu", "2.9", False), ("2.9", "2.9.0", False), ("570.86.15", "570.26", False),
        ("v2.1", "2.0", False), ("535.161", "580.65.06", True), (3, 4, True), ("", "1.0", True),
    ],
)  # fmt: skip
def test_versions_compare_by_their_numbers(one, other, lower):
    assert below(one, other) is lower


def test_the_verdict_is_that_of_the_worst_bound_missed():
    bounds = Bounds("count", 4, 16)
    assert [judge(value, bounds) for value in (3, 4, 15, 16)] == ["failure", "warning", "warning", "ok"]
    most = Bounds("seconds", 600, 60, at_most=True)
    assert [judge(value, most) for value in (601, 61, 60)] == ["failure", "warning", "ok"]
    assert judge(0, Bounds("count")) == "ok"


def test_a_way_out_is_named_only_where_one_is_needed():
    small = measured("memory", "memory", 2 << 30, way_out="more")
    assert (small.verdict, small.found, small.minimum, small.recommended, small.way_out) == (
        "failure", "2 GiB", "4 GiB", "16 GiB", "more",
    )  # fmt: skip
    assert measured("memory", "memory", 64 << 30, way_out="more").way_out is None
    assert measured("network", "clock", 5.0, way_out="x").minimum == "≤ 600 s"


def test_every_bound_has_a_recommended_value_no_worse_than_its_minimum():
    for name, bounds in BOUNDS.items():
        if bounds.minimum is not None and bounds.recommended is not None:
            worse = (
                below(bounds.minimum, bounds.recommended)
                if bounds.at_most
                else below(bounds.recommended, bounds.minimum)
            )
            assert not worse, name
    for minimum, recommended in DRIVERS.values():
        assert not below(recommended, minimum)


def test_minimum_versions_are_those_of_the_project():
    wanted = dict(
        re.fullmatch(r"([\w.-]+)>=([\d.]+)", line).groups() for line in PROJECT["dependencies"] if ">=" in line
    )
    for name in ("torch", "transformers", "peft", "accelerate", "safetensors", "huggingface-hub"):
        assert BOUNDS[name].minimum == wanted[name]
    extras = PROJECT["optional-dependencies"]
    optional = dict(
        re.fullmatch(r"([\w.-]+)>=([\d.]+)", line).groups()
        for name in ("quantize", "modelscope")
        for line in extras[name]
    )
    assert {name: BOUNDS[name].recommended for name in optional} == optional
    assert f">={BOUNDS['python'].minimum}" == PROJECT["requires-python"]


def test_drivers_are_found_by_minor_then_by_major_version():
    assert driver_bounds("12.8") == Bounds("version", "525.60.13", "570.26")
    assert driver_bounds("12.1") == Bounds("version", *DRIVERS["12"])
    assert driver_bounds("13.4") == Bounds("version", *DRIVERS["13"])
    assert driver_bounds("99.0") is None


def test_sizes_read_as_people_say_them():
    assert [bytes_text(size) for size in (100, 4 << 10, 64 << 20, int(23.5 * (1 << 30)))] == [
        "100 bytes", "4 KiB", "64 MiB", "23.5 GiB",
    ]  # fmt: skip


def test_a_check_crosses_between_processes_as_json():
    check = Check("torch", "torch", "2.13", "warning", "2.9", "2.14", "update")
    assert Check.from_json(check.to_json()) == check
    for broken in ({}, {**check.to_json(), "verdict": "fine"}, {**check.to_json(), "found": 3}):
        with pytest.raises(ValueError, match="not a check"):
            Check.from_json(broken)


def test_the_worst_check_decides():
    checks = [Check("a", "b", "c"), Check("a", "c", "d", "not applicable")]
    assert overall(checks) == "ok"
    assert overall([*checks, Check("a", "w", "x", "warning")]) == "warning"
    assert overall([Check("a", "f", "x", "failure"), Check("a", "w", "x", "warning")]) == "failure"
    assert count(checks) == {"ok": 1, "warning": 0, "failure": 0, "not applicable": 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "ImportError: /venv/torch/lib/libgomp-d22c30c5.so.1: cannot allocate memory in static TLS block",
            "LD_PRELOAD=/venv/torch/lib/libgomp-d22c30c5.so.1",
        ),
        ("ModuleNotFoundError: No module named 'torch'", "pip install torch"),
        ("ModuleNotFoundError: No module named 'pydantic'", "pip install tunedock"),
        (
            "ImportError: libcudnn.so.9: cannot open shared object file: No such file or directory",
            "libcudnn.so.9 belongs",
        ),
        ("libcusparse.so.12: undefined symbol: __nvJitLinkComplete_12_4", "unset LD_LIBRARY_PATH"),
        ("version `GLIBC_2.34' not found (required by /x.so)", "older than GLIBC_2.34"),
        ("the worker died by SIGILL, at `torch`", "AVX2"),
        ("Failed to initialize NVML: Driver/library version mismatch", "restart the machine"),
        ("RuntimeError: Unexpected error: Error 802: system not yet initialized", "fabricmanager"),
        ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: unable to get local issuer", "SSL_CERT_FILE"),
        ("Temporary failure in name resolution", "DNS"),
    ],
)
def test_known_errors_have_a_way_out(text, said):
    assert said in known_way_out(text)


def test_what_is_not_known_has_none():
    assert known_way_out("something new") is None
    for symptom in SYMPTOMS:
        groups = re.compile(symptom.pattern).groups
        assert groups or "{0}" not in symptom.way_out
