"""How a worker hears that it should stop.

SIGINT and SIGTERM end most work at once (KeyboardInterrupt); inside `deferred()` they only set a flag, and the work ends itself
where its state is whole. A second SIGINT ends it at once even there.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    def __init__(self) -> None:
        self._asked = threading.Event()
        self._deferred = False

    def listen(self) -> None:
        """Takes SIGINT and SIGTERM of this process. To be called on the main thread."""
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again = self._asked.is_set() and number == signal.SIGINT
        self._asked.set()
        if again or not self._deferred:
            raise KeyboardInterrupt

    def clear(self) -> None:
        """The request has been answered; the next one counts anew."""
        self._asked.clear()

    def asked(self) -> bool:
        return self._asked.is_set()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While inside, a first request waits until the work looks at `asked`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
