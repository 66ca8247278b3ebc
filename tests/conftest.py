"""Read by pytest before any test; standing here, it puts `tests/` on the path, so that tests can `import families`."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-golden", action="store_true", help="write the golden loss curves anew (say why in the commit)"
    )
