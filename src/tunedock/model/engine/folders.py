"""The adapter as it is, written as a PEFT folder that an engine reads: whole or not at all, the last two kept.

A name is never used twice, not even by a run that is resumed: an engine remembers prompts by the adapter's name, and would answer
with what it remembers of other weights.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from tunedock.errors import DiskError, ModelError
from tunedock.model import adapter as adapters

KEPT = 2
"""The one in use, and the one before it, which the engine may still read."""


class AdapterFolders:
    def __init__(self, root: Path, run: Path, *, on_server: str | None = None) -> None:
        """`run` tells the folders of one run from another's in a shared `root`; `on_server`: the server's path of `root`."""
        self._root = root
        self._on_server = on_server or str(root)
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", run.name).strip("-.")[:60] or "run"
        self.prefix = f"{name}-{hashlib.sha256(os.fsencode(run.absolute())).hexdigest()[:8]}-"
        """What the names of a run's adapters begin with."""
        self._process = os.urandom(4).hex()
        self._number = 0

    def write(self, model: nn.Module) -> str:
        """The name of a new folder with the adapter as it is. Raises DiskError; ModelError for an adapter no engine can load."""
        require_loadable(model)
        self._number += 1
        name = f"{self.prefix}{self._process}-{self._number}"
        aside = self._root / f".{name}.part"
        try:
            aside.mkdir(parents=True)
            adapters.save(model, aside)
            aside.replace(self._root / name)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise DiskError(
                f"the adapter cannot be written for the engine: {getattr(error, 'strerror', None) or error}",
                where=str(self._root),
                hint="free disk space, or give an `objective.engine.adapter_dir` that can be written",
            ) from error
        return name

    def seen_by_server(self, name: str) -> str:
        return f"{self._on_server.rstrip('/')}/{name}"

    def prune(self, keep: int = KEPT) -> None:
        """Removes all but the last `keep` of this process, and what a process before it left."""
        mine = [f"{self.prefix}{self._process}-{number}" for number in range(self._number, 0, -1)][:keep]
        for folder in self._root.glob("*") if self._root.is_dir() else ():
            if folder.name.removeprefix(".").startswith(self.prefix) and folder.name not in mine:
                shutil.rmtree(folder, ignore_errors=True)
        if not keep and self._root.is_dir() and not any(self._root.iterdir()):
            self._root.rmdir()


def require_loadable(model: nn.Module) -> None:
    """Raises ModelError for an adapter that vLLM refuses, or would apply otherwise than it was trained."""
    found = getattr(model, "peft_config", None)
    if not found:
        raise ModelError("the model has no adapter that an engine could load", where="objective.engine")
    for config in found.values():
        reasons = {
            "use_dora": "vLLM loads no DoRA",
            "modules_to_save": "vLLM loads no modules that are trained whole",
            "trainable_token_indices": "vLLM loads no new tokens",
            "lora_bias": "vLLM loads no bias of an adapter",
            "rank_pattern": "vLLM scales every module by the one rank of the adapter",
            "alpha_pattern": "vLLM scales every module by the one alpha of the adapter",
        }
        for key, reason in reasons.items():
            if getattr(config, key, None):
                raise ModelError(
                    f"the engine cannot run this adapter: {reason}",
                    where=f"adapter.{key}",
                    hint=f"drop `adapter.{key}`, or let the answers be made here: `objective.engine: local`",
                )
