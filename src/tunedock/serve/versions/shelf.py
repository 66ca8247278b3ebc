"""The versions in memory: loaded one at a time beside what serves, kept while they are wanted, closed after their last request.

Loading may take minutes, so a thread does it; whoever asks for what is to be served meanwhile is not held up, and a rollback to a
version that is here is done at once. A version that cannot be loaded is tried again after a while that doubles, not at every look.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass

from tunedock.errors import BugError, ModelError, OutOfMemoryError, TunedockError
from tunedock.serve.versions.loaded import Loaded
from tunedock.serve.versions.room import NoRoomError

Key = tuple[str, str]
"""(model, version)."""

Load = Callable[[Key], Loaded]

AGAIN_S, LONGEST_AGAIN_S = 5.0, 300.0


@dataclass(slots=True)
class Failure:
    error: TunedockError
    tries: int
    again_at: float
    told: bool = False


class Shelf:
    """Methods are called by one thread, except where they say otherwise."""

    def __init__(self, load: Load, *, changed: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        """`changed` is called by another thread when a version was loaded, or was not, or may be closed."""
        self._load = load
        self._changed = changed
        self._clock = clock
        self._lock = threading.Lock()
        self._here: dict[Key, Loaded] = {}
        self._leaving: list[Loaded] = []
        self._idle: list[Loaded] = []
        self._failures: dict[Key, Failure] = {}
        self._worker: threading.Thread | None = None
        self._kept: set[Key] = set()
        self._spare: Collection[Key] = ()

    def get(self, key: Key) -> Loaded | None:
        with self._lock:
            return self._here.get(key)

    def failure(self, key: Key) -> Failure | None:
        with self._lock:
            return self._failures.get(key)

    def forgive(self) -> None:
        """What could not be loaded is tried again at once."""
        with self._lock:
            self._failures.clear()

    def bring(self, key: Key) -> Loaded:
        """Loads it here and now. Raises what loading it raises."""
        found = self.get(key)
        if found is None:
            found = self._loaded(key)
            with self._lock:
                self._here[key] = found
        return found

    def attempt(self, key: Key) -> None:
        """Loads it here and now. What it fails by is noted, not raised."""
        if self.get(key) is None:
            self._work(key)

    def ask(self, key: Key) -> None:
        """Has it loaded, unless another is being loaded, or it failed a moment ago."""
        with self._lock:
            failure = self._failures.get(key)
            if key in self._here or self._worker is not None or (failure and self._clock() < failure.again_at):
                return
            self._worker = threading.Thread(target=self._work, args=(key,), name="version", daemon=True)
            self._worker.start()

    def keep(self, wanted: Collection[Key], spare: Collection[Key]) -> None:
        """These are kept, `spare` ones as long as there is memory; the others leave after their last request.

        What is to be served is kept before it is got: another thread may be about to drop what is spare.
        """
        with self._lock:
            self._kept, self._spare = set(wanted), tuple(spare)
            leaving = [key for key in self._here if key not in self._kept and key not in self._spare]
            self._failures = {key: one for key, one in self._failures.items() if key in self._kept}
        self._let_go(leaving)

    def sweep(self) -> None:
        """Closes those that nobody is with any more."""
        with self._lock:
            idle, self._idle = self._idle, []
        for loaded in idle:
            loaded.close()
            with self._lock:
                self._leaving.remove(loaded)
        if idle:
            _collect()

    def at_work(self) -> bool:
        """Whether any request is with any of them. By any thread."""
        with self._lock:
            return any(loaded.uses.count for loaded in [*self._here.values(), *self._leaving])

    def close(self) -> None:
        """All of them, whoever is with them."""
        with self._lock:
            all_, self._here, self._leaving, self._idle = [*self._here.values(), *self._leaving], {}, [], []
        for loaded in all_:
            loaded.close()

    def _let_go(self, keys: Collection[Key]) -> None:
        for key in keys:
            with self._lock:
                loaded = self._here.pop(key)
                self._leaving.append(loaded)
            loaded.uses.when_idle(lambda loaded=loaded: self._now_idle(loaded))  # type: ignore[misc]

    def _now_idle(self, loaded: Loaded) -> None:
        with self._lock:
            self._idle.append(loaded)
        self._changed()

    def _work(self, key: Key) -> None:
        try:
            made = self._loaded(key)
        except TunedockError as error:
            self._failed(key, error)
        except Exception as error:  # noqa: BLE001 - policy: whatever a version does, the one that serves goes on; its traceback is shown
            traceback.print_exception(error, file=sys.stderr)
            self._failed(key, BugError(f"{type(error).__name__}: {(str(error).splitlines() or ['?'])[0]}"))
        else:
            with self._lock:
                self._here[key] = made
                self._failures.pop(key, None)
        with self._lock:
            self._worker = None
        self._changed()

    def _failed(self, key: Key, error: TunedockError) -> None:
        with self._lock:
            before = self._failures.get(key)
            tries = before.tries + 1 if before else 1
            again = min(AGAIN_S * 2 ** (tries - 1), LONGEST_AGAIN_S)
            told = before is not None and before.told and before.error.message == error.message
            error.__cause__ = error.__context__ = error.__traceback__ = None  # whose frames hold what was half loaded
            self._failures[key] = Failure(error, tries, self._clock() + again, told)

    def _loaded(self, key: Key) -> Loaded:
        """Where memory does not do, spare ones that nobody is with give way, and once more."""
        try:
            return self._load(key)
        except NoRoomError as error:
            if not self._drop_spare():
                raise ModelError(error.message, where=error.where, hint=error.hint) from None
        except (MemoryError, RuntimeError, OutOfMemoryError) as error:
            if not (isinstance(error, OutOfMemoryError) or _ran_out(error)):
                raise
            if not self._drop_spare():
                raise _no_room(key) from error
        try:
            return self._load(key)
        except NoRoomError as error:
            raise ModelError(error.message, where=error.where, hint=error.hint) from None
        except (MemoryError, RuntimeError) as error:
            if not _ran_out(error):
                raise
            raise _no_room(key) from error

    def _drop_spare(self) -> bool:
        """Whether any gave way, and is gone."""
        with self._lock:
            going = [self._here.pop(key) for key in self._spare if key in self._here and self._here[key].uses.end()]
        for loaded in going:
            loaded.close()
        if going:
            _collect()
        return bool(going)


def _ran_out(error: BaseException) -> bool:
    """Where PyTorch is not here, it has not said so."""
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from tunedock.model.out_of_memory import is_out_of_memory

    return is_out_of_memory(error)


def _no_room(key: Key) -> ModelError:
    return ModelError(
        "memory ran out while it was loaded beside the one that serves",
        where=f"{key[0]} version {key[1]}",
        hint="--keep-warm 0, a shorter --max-length, or start the gateway again, which loads this version alone",
    )


def _collect() -> None:
    """Models hold themselves in circles, and what was loaded when the gateway began is not looked at otherwise (`stage`)."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
