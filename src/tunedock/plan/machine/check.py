"""A finding about the machine, and what many of them say together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

Verdict = Literal["ok", "warning", "failure", "not applicable"]

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


@dataclass(frozen=True, slots=True)
class Check:
    """One line of `tunedock doctor`. `group` and `name` together are stable: programs may look a check up by them."""

    group: str
    name: str
    found: str
    verdict: Verdict = "ok"
    minimum: str | None = None
    recommended: str | None = None
    way_out: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Check:
        """Raises ValueError for what is no check."""
        verdict = value.get("verdict")
        if verdict not in VERDICTS or not all(isinstance(value.get(key), str) for key in ("group", "name", "found")):
            raise ValueError(f"not a check: {value!r}")
        texts = {key: None if value.get(key) is None else str(value[key]) for key in _OPTIONAL}
        return Check(value["group"], value["name"], value["found"], cast("Verdict", verdict), **texts)


_OPTIONAL = ("minimum", "recommended", "way_out")


def absent(group: str, name: str, found: str, way_out: str | None = None) -> Check:
    """A check that does not apply here."""
    return Check(group, name, found, "not applicable", way_out=way_out)


def warning(group: str, name: str, found: str, way_out: str) -> Check:
    return Check(group, name, found, "warning", way_out=way_out)


def failure(group: str, name: str, found: str, way_out: str) -> Check:
    return Check(group, name, found, "failure", way_out=way_out)


def overall(checks: Sequence[Check]) -> Verdict:
    """The worst verdict; what does not apply counts as ok."""
    found = {check.verdict for check in checks}
    return next((verdict for verdict in ("failure", "warning") if verdict in found), "ok")


def count(checks: Sequence[Check]) -> dict[Verdict, int]:
    """How many checks have each verdict, those with none included."""
    return {verdict: sum(check.verdict == verdict for check in checks) for verdict in VERDICTS}
