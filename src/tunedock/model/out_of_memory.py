"""What running out of memory looks like, and how what a failed call held is given back."""

from __future__ import annotations

import gc

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out; torch's CPU allocator says it by a bare RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def give_back() -> None:
    """Frees what is kept for reuse. To be called after the `except`: an exception under way holds the tensors of its frames."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
