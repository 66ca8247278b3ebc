"""Read by pytest before any test; standing here, it puts `tests/` on the path, so that tests can `import families`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["engine_bed", "gguf_bed", "registry_bed", "ssh_bed", "stage_containers"]

# The quick tests try the same cases each time, so that they fail by a change and not by chance; `make test-all` tries new ones, and
# of properties that say no number twice as many.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    database=None,
    max_examples=50,
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-golden", action="store_true", help="write the golden loss curves anew (say why in the commit)"
    )


LIGHT = ("benchmarks", "recipe", "run", "cli", "data")
"""Folders whose files take seconds."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Light files last: processes take whole files, and one with a long file left at the end keeps the others waiting."""
    items.sort(key=lambda item: item.path.relative_to(Path(__file__).parent).parts[0] in LIGHT)


@pytest.fixture(autouse=True)
def few_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run ends with drawing its curves, a third of the time of one as small as these. Among the quick tests only those marked
    `drawn` do; `make test-all` always does."""
    stage = sys.modules.get("tunedock.train.stage")
    quick = request.config.option.markexpr == "not long"
    if stage is not None and quick and not request.node.get_closest_marker("drawn"):
        monkeypatch.setattr(stage, "draw", lambda run: None)


@pytest.fixture(autouse=True)
def signals_as_they_were() -> Iterator[None]:
    """A worker run in this process takes SIGINT and SIGTERM for itself; the next test's Ctrl-C is its own."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
