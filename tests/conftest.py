"""Read by pytest before any test; standing here, it puts `tests/` on the path, so that tests can `import families`."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# The quick tests try the same cases each time, so that they fail by a change and not by chance; `make test-all` tries new ones.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-golden", action="store_true", help="write the golden loss curves anew (say why in the commit)"
    )


@pytest.fixture(autouse=True)
def signals_as_they_were() -> Iterator[None]:
    """A worker run in this process takes SIGINT and SIGTERM for itself; the next test's Ctrl-C is its own."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
