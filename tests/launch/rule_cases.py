"""Cases of Prometheus' rules, tried by promtool: samples a minute, and what is to be said of them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

MONITORING = Path(__file__).parents[2] / "src/tunedock/launch/monitoring"


@dataclass(frozen=True)
class Case:
    """`series`: selector -> a sample a minute, in promtool's words (`0+2x30`: 0, 2, 4, ..., 60)."""

    alert: str
    series: Mapping[str, str]
    minutes: int
    says: str | None
    """The summary; None where it is to be silent."""
    labels: Mapping[str, str]


def fires(alert: str, says: str, minutes: int, series: Mapping[str, str], **labels: str) -> Case:
    return Case(alert, series, minutes, says, labels)


def silent(alert: str, minutes: int, series: Mapping[str, str]) -> Case:
    return Case(alert, series, minutes, None, {})


def alerts(rules: Path) -> dict[str, Any]:
    """Alert -> its rule."""
    [group] = YAML(typ="safe").load(rules)["groups"]
    return {rule["alert"]: rule for rule in group["rules"] if "alert" in rule}


def tried(rules: Path, cases: Sequence[Case], folder: Path) -> str:
    """What promtool says is wrong; empty where all is as it is to be."""
    known = alerts(rules)
    asked = {
        "rule_files": [str(rules)],
        "evaluation_interval": "1m",
        "tests": [_as_promtool(case, known[case.alert]["annotations"]) for case in cases],
    }
    file = folder / "cases.yml"
    file.write_text(json.dumps(asked))  # which is YAML
    done = promtool("test", "rules", str(file))
    return "" if done.returncode == 0 else done.stdout + done.stderr


def _as_promtool(case: Case, annotations: Mapping[str, str]) -> dict[str, Any]:
    wanted = []
    if case.says is not None:
        told = {**annotations, "summary": case.says, "description": _filled(annotations["description"], case.labels)}
        wanted.append({"exp_labels": dict(case.labels), "exp_annotations": told})
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
        "alert_rule_test": [{"eval_time": f"{case.minutes}m", "alertname": case.alert, "exp_alerts": wanted}],
    }


def _filled(text: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda found: labels[found[1]], text)


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool, of Debian's prometheus, is not installed here")
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)
