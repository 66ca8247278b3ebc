"""A run's metrics as TensorBoard files, made from its events: `events.jsonl` is the truth, these files are a view of it.

Each event is written once, however often a run is stopped and resumed: how far the events were taken is kept beside the
files. Where a resumed run does steps again, TensorBoard is told to forget the first attempt, so its curves have no doubled
points.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from tunedock.errors import DiskError
from tunedock.events import Event, EventReader
from tunedock.run.record import read_json, write_json
from tunedock.train.metric_names import tag_of

INTERVAL_S = 5.0
"""Between two looks at the events while the run works."""


class TensorBoard:
    """Brings a folder of TensorBoard files up to date with a run's events.

    `catch_up` does it once. As a context manager it follows the events while the body runs, and catches up at the end:

        with TensorBoard(run.path / "tensorboard", run.events):
            loop.run()
    """

    def __init__(self, folder: Path, events: Path) -> None:
        self._folder = folder
        self._state = folder / "written.json"
        state: dict[str, Any] = read_json(self._state) if self._state.is_file() else {"events": 0, "last": {}}
        self._taken: int = state["events"]
        self._last: dict[str, int] = state["last"]
        """Tag -> step of its newest point."""
        self._new = EventReader(events)
        self._skip = self._taken
        self._writer: Any = None
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._follower = threading.Thread(target=self._follow, name="tensorboard", daemon=True)

    def catch_up(self) -> None:
        """Writes what the events say since the last time. Raises DiskError when the folder cannot be written."""
        with self._lock:
            try:
                self._take_new()
            except OSError as error:
                raise DiskError(
                    f"TensorBoard's files cannot be written: {error.strerror or error}",
                    where=str(self._folder),
                    hint="free disk space, or set `train.report_to: none`",
                ) from error

    def close(self) -> None:
        """Ends the file; a later `catch_up` begins another beside it."""
        with self._lock:
            self._close_writer()

    def __enter__(self) -> TensorBoard:
        self._follower.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._follower.join()
        try:
            self.catch_up()
            self.close()
        except DiskError:
            if error is None:  # the body's own error says more than ours
                raise

    def _follow(self) -> None:
        while not self._done.wait(INTERVAL_S):
            try:
                self.catch_up()
            except DiskError:
                return  # a view must not stop the training; the last `catch_up` raises it again if it lasts

    def _take_new(self) -> None:
        events = list(self._new.new())
        fresh = events[self._skip :]
        self._skip = max(self._skip - len(events), 0)
        if not fresh:
            return
        for event in fresh:
            if event["kind"] == "metrics":
                self._write(event)
        self._taken += len(fresh)
        if self._writer is not None:
            self._writer.flush()
            write_json(self._state, {"events": self._taken, "last": self._last})

    def _write(self, event: Event) -> None:
        step = event["step"]
        points = {tag_of(name): value for name, value in event["values"].items() if value is not None}
        if any(self._last.get(tag, -1) >= step for tag in points):
            self._begin(purge_step=step)
        elif self._writer is None:
            self._begin(purge_step=None)
        for tag, value in points.items():
            self._writer.add_scalar(tag, value, step, walltime=event["time"])
            self._last[tag] = step

    def _begin(self, *, purge_step: int | None) -> None:
        """A new file; with `purge_step`, points at that step and after it in earlier files no longer count."""
        self._close_writer()
        if purge_step is not None:
            self._last = {tag: last for tag, last in self._last.items() if last < purge_step}
            self._wait_for_a_later_name()
        self._writer = SummaryWriter(str(self._folder), purge_step=purge_step)

    def _wait_for_a_later_name(self) -> None:
        """Files are read in the order of their names, which begin with the second: what replaces points must come after them. No
        longer than two seconds, should the clock have been set back."""
        stamps = [int(file.name.split(".")[3]) for file in self._folder.glob("events.out.tfevents.*")]
        for _ in range(40):
            if int(time.time()) > max(stamps, default=0):
                return
            time.sleep(0.05)

    def _close_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
