"""The rules for gateways, by promtool: each alert is raised by what it is for, says so in words, and is silent else.

What the rules ask for is held against a real gateway in `tests/serve/test_watched.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from rule_cases import MONITORING, Case, alerts, fires, silent, tried

RULES = MONITORING / "serving-rules.yml"
GUIDES = [Path(__file__).parents[2] / "docs/guides" / name for name in ("watching.md", "watching.zh.md")]

PLACE = 'job="tunedock-serve",instance="gw:8000"'
MODEL = f'{PLACE},model="support"'


def raised(alert: str, says: str, minutes: int, series: Mapping[str, str], **labels: str) -> Case:
    return fires(alert, says, minutes, series, job="tunedock-serve", instance="gw:8000", **labels)


def requests(well: str, badly: str | None = None, status: str = "503") -> dict[str, str]:
    found = {f'tunedock_requests_total{{{MODEL},path="/v1/chat/completions",status="200"}}': well}
    if badly is not None:
        found[f'tunedock_requests_total{{{MODEL},path="/v1/chat/completions",status="{status}"}}'] = badly
    return found


def versions(*counted: tuple[str, str]) -> dict[str, str]:
    """Of version 1, 2, ...: (answered, failed)."""
    path = 'path="/v1/chat/completions"'
    return {
        f'tunedock_requests_total{{{MODEL},version="{number}",{path},status="{status}"}}': each
        for number, both in enumerate(counted, 1)
        for status, each in zip(("200", "500"), both, strict=True)
    }


def first_tokens(within: Mapping[str, str]) -> dict[str, str]:
    """Upper bound in seconds -> how many were told within it."""
    return {
        f'tunedock_time_to_first_token_seconds_bucket{{{MODEL},le="{bound}"}}': told for bound, told in within.items()
    }


def refused(code: str, counted: str) -> dict[str, str]:
    return {f'tunedock_refused_total{{{PLACE},code="{code}"}}': counted}


def memory(free: str) -> dict[str, str]:
    return {f"tunedock_memory_free_bytes{{{PLACE}}}": free, f"tunedock_memory_limit_bytes{{{PLACE}}}": "1000x30"}


def gpu(used: str) -> dict[str, str]:
    card = f'{PLACE},gpu="0"'
    return {f"tunedock_gpu_memory_used_bytes{{{card}}}": used, f"tunedock_gpu_memory_total_bytes{{{card}}}": "1000x30"}


UP, ENGINE, STORE = f"up{{{PLACE}}}", f"tunedock_engine_up{{{MODEL}}}", f"tunedock_access_store_up{{{PLACE}}}"
RESTARTS, WAITING = f"tunedock_engine_restarts_total{{{MODEL}}}", f"tunedock_num_requests_waiting{{{MODEL}}}"
TOKEN_KEYS, LOST = f"tunedock_token_keys_up{{{PLACE}}}", f"tunedock_access_log_lost_lines_total{{{PLACE}}}"
CERTIFICATE = f"tunedock_tls_certificate_expires_timestamp_seconds{{{PLACE}}}"
STORE_SAYS = "The store of keys and limits behind gw:8000 does not answer"
LATE = {"1": "0+1x30", "5": "0+2x30", "10": "0+10x30", "+Inf": "0+10x30"}
"""A fifth within five seconds."""

CASES = [
    raised("GatewayDown", "The gateway gw:8000 cannot be scraped", 3, {UP: "1 0x9"}, severity="critical"),
    silent("GatewayDown", 4, {UP: "1 0 1 0 1"}),
    silent("GatewayDown", 9, {'up{job="node",instance="gw:9100"}': "0x9"}),
    raised(
        "EngineDown",
        "The engine of support behind gw:8000 does not answer",
        4,
        {ENGINE: "1 0x9"},
        model="support",
        severity="critical",
    ),
    silent("EngineDown", 4, {ENGINE: "1 0 1x9"}),
    raised(
        "EngineRestarts",
        "The engine of support behind gw:8000 was started again 3 times in half an hour",
        10,
        {RESTARTS: "0 0 1 2 3x30"},
        model="support",
        severity="warning",
    ),
    silent("EngineRestarts", 10, {RESTARTS: "0 0 1 2x30"}),
    silent("EngineRestarts", 20, {RESTARTS: "40x30"}),
    raised(
        "ManyServerErrors",
        "25% of the requests to support at gw:8000 fail",
        15,
        requests("0+3x30", "0+1x30"),
        model="support",
        severity="critical",
    ),
    silent("ManyServerErrors", 15, requests("0+99x30", "0+1x30")),
    silent("ManyServerErrors", 15, requests("0x10 1x20", "0x12 1x20")),  # the only two of the night
    silent("ManyServerErrors", 15, requests("700x30", "300x30")),  # long ago, and nothing since
    silent("ManyServerErrors", 15, requests("0+3x30", "0+3x30", status="429")),
    silent("ManyServerErrors", 15, requests("0+3x30", "0+3x30", status="499")),
    raised(
        "VersionFailsMore",
        "Version 2 of support at gw:8000 fails more often than another: 50%",
        15,
        versions(("0+9x30", "0+1x30"), ("0+3x30", "0+3x30")),
        model="support",
        version="2",
        severity="critical",
    ),
    silent("VersionFailsMore", 15, versions(("0+9x30", "0+1x30"), ("0+9x30", "0+1x30"))),  # alike
    silent("VersionFailsMore", 15, versions(("0+9x30", "0x30"), ("0x30", "0+1x30"))),  # ten requests tell nothing
    silent("VersionFailsMore", 15, versions(("0+3x30", "0+3x30"), ("0x30", "0x30"))),  # nobody to compare with
    raised(
        "VersionNotLoaded",
        "Version 2 of support is to be served at gw:8000 and cannot be loaded",
        4,
        {f'tunedock_version_failed{{{MODEL},version="2"}}': "_ 1x9"},
        model="support",
        version="2",
        severity="warning",
    ),
    silent("VersionNotLoaded", 4, {f'tunedock_version_failed{{{MODEL},version="2"}}': "1 1 stale"}),
    raised(
        "RegistryUnavailable",
        "The registry mlflow.db does not answer gw:8000",
        8,
        {f'tunedock_registry_up{{{PLACE},registry="mlflow.db"}}': "1 0x20"},
        registry="mlflow.db",
        severity="warning",
    ),
    silent("RegistryUnavailable", 8, {f'tunedock_registry_up{{{PLACE},registry="mlflow.db"}}': "1 0 0 1x20"}),
    raised(
        "InternalErrors",
        "The gateway gw:8000 made a mistake of its own",
        8,
        refused("internal_error", "0x4 1x20"),
        code="internal_error",
        severity="warning",
    ),
    silent("InternalErrors", 20, refused("internal_error", "3x30")),
    silent("InternalErrors", 20, refused("engine_unavailable", "0+3x30")),
    raised(
        "FirstTokenLate",
        "One in twenty answers of support at gw:8000 begins after 9.688s or more",
        20,
        requests("0+10x30") | first_tokens(LATE),
        model="support",
        severity="warning",
    ),
    silent("FirstTokenLate", 20, requests("0+10x30") | first_tokens({**LATE, "5": "0+10x30"})),
    silent("FirstTokenLate", 20, requests("0+1x30") | first_tokens({"5": "0x30", "10": "0+1x30", "+Inf": "0+1x30"})),
    silent("FirstTokenLate", 20, requests("900x30") | first_tokens({"5": "0x30", "10": "900x30", "+Inf": "900x30"})),
    raised(
        "QueueGrows",
        "More and more requests wait for support at gw:8000",
        25,
        {WAITING: "1+2x30"},
        model="support",
        severity="warning",
    ),
    silent("QueueGrows", 25, {WAITING: "20x30"}),
    silent("QueueGrows", 25, {WAITING: "0 30 0 0 40 0 0 50 0 0 60 0 0 70 0 0 80 0 0 90 0 0 99 0 0 110"}),
    raised("AccessStoreUnavailable", STORE_SAYS, 4, {STORE: "1 0x9"}, severity="critical"),
    raised("AccessStoreUnavailable", STORE_SAYS, 4, refused("access_store_unavailable", "0+5x9"), severity="critical"),
    silent("AccessStoreUnavailable", 9, {STORE: "1x9", **refused("access_store_unavailable", "5x9")}),
    raised(
        "TokenKeysUnavailable",
        "gw:8000 cannot fetch the keys that JSON Web Tokens are checked by",
        12,
        {TOKEN_KEYS: "0x30"},
        severity="warning",
    ),
    silent("TokenKeysUnavailable", 12, {TOKEN_KEYS: "0x5 1x30"}),
    raised(
        "CertificateExpires",
        "The certificate of gw:8000 expires in 9d 23h 45m 0s",
        15,
        {CERTIFICATE: "864000x30"},
        severity="warning",
    ),
    silent("CertificateExpires", 15, {CERTIFICATE: "2592000x30"}),
    raised(
        "AccessLogLosesLines",
        "The gateway gw:8000 cannot write its access log",
        5,
        {LOST: "0 0 0 7x20"},
        severity="warning",
    ),
    silent("AccessLogLosesLines", 20, {LOST: "7x30"}),
    raised(
        "ManyKeysRefused",
        "210 requests without a valid key at gw:8000 in ten minutes",
        20,
        refused("invalid_api_key", "0+21x30"),
        code="invalid_api_key",
        severity="warning",
    ),
    silent("ManyKeysRefused", 20, refused("invalid_api_key", "0+5x30")),
    raised("MemoryNearLimit", "4% of the memory is left where gw:8000 runs", 7, memory("40x30"), severity="warning"),
    silent("MemoryNearLimit", 7, memory("40 40 400 40x20")),
    raised(
        "GpuMemoryNearLimit",
        "The memory of GPU 0 of gw:8000 is 99% full",
        12,
        gpu("990x30"),
        gpu="0",
        severity="warning",
    ),
    silent("GpuMemoryNearLimit", 12, gpu("950x30")),
]


def test_each_alert_is_raised_by_what_it_is_for_and_silent_else(tmp_path: Path) -> None:
    assert not tried(RULES, CASES, tmp_path)


def test_every_alert_has_a_case_of_both_kinds() -> None:
    assert (
        {one.alert for one in CASES if one.says} == {one.alert for one in CASES if not one.says} == set(alerts(RULES))
    )


def test_a_case_that_is_wrong_is_noticed(tmp_path: Path) -> None:
    """That promtool was asked at all."""
    assert "Another" in tried(
        RULES, [raised("GatewayDown", "Another", 3, {UP: "1 0x9"}, severity="critical")], tmp_path
    )


def test_every_alert_says_how_bad_it_is_and_where_its_way_out_is_written() -> None:
    for name, rule in alerts(RULES).items():
        assert rule["labels"]["severity"] in ("critical", "warning"), name
        assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}, name
        page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert page.endswith("/docs/guides/watching.md") and anchor == name.lower(), name
    for guide in GUIDES:
        headings = re.findall(r"^### (\w+)$", guide.read_text(encoding="utf-8"), re.MULTILINE)
        assert headings == list(alerts(RULES)), guide
