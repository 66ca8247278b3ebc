"""The processes of one training, each a rank, and the files they leave in `RUN/ranks/`: both planes' names for them.

rank-00000.json           its pulse (`run.pulse`): where it is, written about once a second
rank-00000.stack          what each of its threads was doing, when it was asked by SIGUSR1
rank-00000.end.json       how it ended: exit code, and the error if there was one
rank-00001.events.jsonl   warnings and failures of the ranks beside rank 0, whose events are the run's
"""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Rank:
    """Which of a training's processes this one is."""

    number: int = 0
    world: int = 1
    """How many there are."""
    local: int = 0
    """Which of those on its machine."""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Rank:
        """As torchrun says it. A worker that is started otherwise is alone, whatever a shell or a scheduler left there."""
        if "TORCHELASTIC_RUN_ID" not in environment:
            return cls()
        return cls(int(environment["RANK"]), int(environment["WORLD_SIZE"]), int(environment["LOCAL_RANK"]))

    @property
    def leads(self) -> bool:
        """Rank 0 writes what the run is; the others compute along."""
        return self.number == 0


ALONE = Rank()


@dataclass(frozen=True, slots=True)
class RankFiles:
    """Of one rank, in `RUN/ranks`."""

    folder: Path
    number: int

    @property
    def name(self) -> str:
        return f"rank-{self.number:05d}"

    @property
    def pulse(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def stack(self) -> Path:
        return self.folder / f"{self.name}.stack"

    @property
    def end(self) -> Path:
        return self.folder / f"{self.name}.end.json"

    @property
    def events(self) -> Path:
        return self.folder / f"{self.name}.events.jsonl"

    def clear(self) -> None:
        """Takes an earlier start's files away."""
        for file in (self.pulse, self.stack, self.end, self.events):
            file.unlink(missing_ok=True)


def ranks_in(folder: Path) -> list[RankFiles]:
    """Those that have left a pulse or an end, in order."""
    names = {
        found for file in folder.glob("rank-*.json") if (found := re.match(r"rank-(\d+)\.(?:end\.)?json$", file.name))
    }
    return [RankFiles(folder, number) for number in sorted({int(found.group(1)) for found in names})]


def forget_beyond(folder: Path, world: int) -> None:
    """Takes away what ranks left that are none of these `world`: those of an earlier start that had more of them."""
    for files in ranks_in(folder):
        if files.number >= world:
            files.clear()


@dataclass(frozen=True, slots=True)
class End:
    """How a rank ended, by its own word."""

    rank: int
    exit_code: int
    error: dict[str, Any] | None = None
    """`TunedockError.to_json()`."""
    host: str = field(default_factory=socket.gethostname)
    time: float = field(default_factory=time.time)

    def write(self, folder: Path) -> None:
        put(RankFiles(folder, self.rank).end, asdict(self))


def put(file: Path, value: Mapping[str, Any]) -> None:
    """The file whole, or as it was. A disk that is full cannot take it, and that neither keeps a process from its work nor from its
    end; and it is not waited for: what a crash of the machine loses of these files, nobody misses."""
    aside = file.with_name(f".{file.name}.part")
    try:
        file.parent.mkdir(exist_ok=True)
        aside.write_text(json.dumps(value) + "\n", encoding="utf-8", errors="backslashreplace")
        aside.replace(file)
    except OSError:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def read_end(file: Path) -> End | None:
    """None where the rank left none: it is at work, or was killed."""
    try:
        return End(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
