"""The gateway's beginning and end in the audit: what was served where, with which access, by whom, and why it ended."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunedock.access.audit import Audit
from tunedock.errors import DiskError
from tunedock.recipe.serving import ServeOrder
from tunedock.serve.access import Access


def audit_of(order: ServeOrder, access: Access) -> Audit | None:
    """The file that the order names, else the one beside the access store; None where that is none, or on a server."""
    if order.audit is not None:
        return Audit(Path(order.audit))
    store = access.store
    return Audit.beside(store, None) if store is not None and store.is_sqlite else None


@contextmanager
def noted(audit: Audit | None, order: ServeOrder, url: str) -> Iterator[None]:
    """A line before anybody is answered, one after. Raises DiskError where the first cannot be written: then nobody is.

    A gateway that is killed leaves none at its end.
    """
    if audit is None:
        yield
        return
    gateway = {"url": url, "pid": os.getpid()}
    models = [{"name": one.name, "kind": one.kind, "place": one.place} for one in order.backends]
    ways = "open" if order.open else "keys" if order.jwt is None else "keys and tokens"
    audit.write("serve", time.time(), **gateway, access=ways, models=models)
    why = "it was asked to"
    try:
        yield
    except BaseException as error:
        why = f"{type(error).__name__}: {error}"
        raise
    finally:
        try:
            audit.write("serve-end", time.time(), **gateway, why=why)
        except DiskError as error:  # policy: it ends all the same, and what went on before it is told, not this
            print(f"warning: the gateway's end cannot be noted: {error.message}", file=sys.stderr)
