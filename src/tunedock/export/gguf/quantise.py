"""llama.cpp's own quantiser, through llama-cpp-python: a GGUF file of floats -> one of four bits and the like."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tunedock.errors import DependencyError, ModelError, RecipeError

PACKAGE = "pip install 'tunedock[llama-cpp]'"


def llama_cpp() -> Any:
    """The package. Raises DependencyError where it is not installed."""
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:  # its shared library may not load on this machine
        raise DependencyError(f"llama-cpp-python is not here: {error}", hint=PACKAGE) from error
    return llama_cpp


def kinds() -> dict[str, int]:
    """Name (`q4_k_m`) -> llama.cpp's number, of all that its quantiser makes without an importance matrix."""
    package = llama_cpp()
    found = {
        name.removeprefix("LLAMA_FTYPE_MOSTLY_").lower(): int(getattr(package, name))
        for name in dir(package)
        if name.startswith("LLAMA_FTYPE_MOSTLY_Q")
    }
    return {name: number for name, number in found.items() if name not in ("q8_0", "q1_0", "q2_0")}


def require(kind: str) -> int:
    """llama.cpp's number of a kind. Raises RecipeError for one there is not, DependencyError without the package."""
    numbers = kinds()
    if kind not in numbers:
        raise RecipeError(
            f"llama.cpp makes no `{kind}`", where="--quantize", hint=f"f32, f16, bf16, q8_0, {', '.join(numbers)}"
        )
    return numbers[kind]


def quantise(source: Path, target: Path, kind: str, threads: int | None = None) -> None:
    """Raises RecipeError for a kind there is not, ModelError where llama.cpp fails, DependencyError without it."""
    package, number = llama_cpp(), require(kind)
    parameters = package.llama_model_quantize_default_params()
    parameters.ftype = number
    parameters.nthread = threads or os.cpu_count() or 1
    code = package.llama_model_quantize(os.fsencode(source), os.fsencode(target), parameters)
    if code != 0:
        raise ModelError(f"llama.cpp's quantiser ended with {code}; the log says more", where=f"--quantize {kind}")
