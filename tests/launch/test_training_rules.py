"""The rules for trainings, by promtool: each alert is raised by what it is for, says so in words, and is silent else."""

from __future__ import annotations

from pathlib import Path

from rule_cases import MONITORING, alerts, fires, silent, tried

RULES = MONITORING / "alerts.yml"

RUN = 'job="tunedock",instance="metrics:9400",run="r1"'
PLACE = {"job": "tunedock", "instance": "metrics:9400", "run": "r1", "severity": "warning"}
FAILED, LOST, RUNNING = (f'tunedock_run_status{{{RUN},status="{status}"}}' for status in ("failed", "lost", "running"))
TOLD = f"tunedock_run_last_event_timestamp_seconds{{{RUN}}}"
LOSS = f'tunedock_run_metric{{{RUN},name="loss"}}'

CASES = [
    fires("RunFailed", "r1 failed", 1, {FAILED: "1x9"}, status="failed", **PLACE),
    silent("RunFailed", 5, {FAILED: "0x9"}),
    fires(
        "RunLost",
        "r1 was at work, and no process holds it any more",
        4,
        {LOST: "0 1x9"},
        status="lost",
        **PLACE,
    ),
    silent("RunLost", 4, {LOST: "0 1 1 0x9"}),
    fires(
        "RunSilent",
        "r1 is at work and has told nothing for 15 minutes",
        20,
        {RUNNING: "1x30", TOLD: "60x30"},
        status="running",
        **PLACE,
    ),
    silent("RunSilent", 20, {RUNNING: "1x30", TOLD: "0+60x30"}),
    silent("RunSilent", 20, {RUNNING: "0x30", TOLD: "60x30"}),
    fires("LossIsNoNumber", "loss of r1 is no number", 2, {LOSS: "2 NaN NaN NaN"}, name="loss", **PLACE),
    silent("LossIsNoNumber", 2, {LOSS: "2 1 1 1"}),
]


def test_each_alert_is_raised_by_what_it_is_for_and_silent_else(tmp_path: Path) -> None:
    assert not tried(RULES, CASES, tmp_path)


def test_every_alert_has_a_case_of_both_kinds() -> None:
    assert (
        {one.alert for one in CASES if one.says} == {one.alert for one in CASES if not one.says} == set(alerts(RULES))
    )
