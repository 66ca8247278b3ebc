"""`began.safetensors` in a run directory: what is trained, as the run began, where a recipe cannot make it again to the bit.

PiSSA's decomposition, rows drawn for new tokens and an adapter read from elsewhere may come out otherwise on another machine, with
another version, or of a file that has changed; a resumed run and its reference begin as exactly what the run began with.
"""

from __future__ import annotations

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tunedock.errors import DiskError, RunError
from tunedock.model.adapter import trainable_state
from tunedock.model.session import Base
from tunedock.recipe.adapters import Lora, leaves_the_base
from tunedock.run.record import Run

FILE = "began.safetensors"


def is_kept(base: Base) -> bool:
    """Whether a run of this recipe keeps what it began with."""
    adapter = base.recipe.adapter
    return isinstance(adapter, Lora) and (
        leaves_the_base(adapter) or bool(base.new_ids) or adapter.continue_from is not None
    )


def beginning(run: Run) -> dict[str, Tensor] | None:
    """What the run began with; None where nothing is kept, or it never came so far. Raises RunError for a damaged file."""
    path = run.path / FILE
    if not path.is_file():
        return None
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise RunError(
            f"what the run began with cannot be read: {error}",
            where=str(path),
            hint="put the file back from a copy of the run, or start a new run",
        ) from None


def keep_beginning(run: Run, base: Base, model: nn.Module, *, resume: bool) -> None:
    """Writes the file before the first step, where it is needed. Raises RunError when a run that has gone on has lost it."""
    path = run.path / FILE
    if not is_kept(base) or path.is_file():
        return
    if resume and any(run.checkpoints.glob("step-*")):
        raise RunError(
            "the run has checkpoints, and what it began with is gone",
            where=str(path),
            hint="put the file back from a copy of the run, or start a new run",
        )
    aside = path.with_name(f".{FILE}.part")
    try:
        save_file(trainable_state(model), aside)
        aside.replace(path)
    except (OSError, SafetensorError) as error:
        raise DiskError(
            f"what the run begins with cannot be written: {getattr(error, 'strerror', None) or error}",
            where=str(path),
            hint="free disk space",
        ) from error
    finally:
        aside.unlink(missing_ok=True)
