"""The C++ kernels of `cpu.cpp`, compiled where a compiler is: once a machine, in about a second, kept in the user's cache.

Plain C functions called through ctypes: no PyTorch headers, whose compilation takes a minute, and no build tool. Where there is no
compiler, or the result does not load, `library()` is None and PyTorch's own operations do the work; `status()` says which.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fassociative-math",
    "-fno-signed-zeros",
    "-shared",
    "-fPIC",
)
COMPILE_S = 120
"""Seconds after which a compiler is given up on."""

_SIGNATURES: dict[str, tuple[type, ...]] = {
    "chosen": (c_void_p, c_int64, c_int64, c_void_p, c_float, c_float, c_void_p, c_int),
    "norm": (c_void_p, c_void_p, c_int64, c_int64, c_float, c_float, c_void_p, c_void_p),
    "norm_backward": (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_float, c_void_p),
    "silu": (c_void_p, c_void_p, c_int64, c_void_p),
    "silu_backward": (c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p),
    "gelu_tanh": (c_void_p, c_void_p, c_int64, c_void_p),
    "gelu_tanh_backward": (c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p),
    "weigh": (c_void_p, *[c_int64] * 8, c_float),
    "weigh_backward": (c_void_p, c_void_p, *[c_int64] * 8, c_float),
    "few": (c_void_p, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_void_p),
    "recall": (
        *(c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p),
        *[c_int64] * 6,
        *(c_float, c_float, c_void_p, c_void_p, c_int64, c_void_p),
    ),
    "rotate": (c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int, c_void_p),
}
_SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "f32"}


class Kernels:
    """The compiled functions. Tensors are given by address: the caller answers for shapes, types and contiguity."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions = {
            (name, dtype): getattr(library, f"tunedock_{name}_{suffix}")
            for name in _SIGNATURES
            for dtype, suffix in _SUFFIXES.items()
        }
        for (name, _), function in self._functions.items():
            function.argtypes, function.restype = _SIGNATURES[name], None

    def __call__(self, name: str, dtype: torch.dtype, *arguments: torch.Tensor | float | None) -> None:
        self._functions[name, dtype](*(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments))


def takes(*tensors: torch.Tensor) -> bool:
    """Whether the kernels can work on these: on the CPU, of one type that they know, dense."""
    first = tensors[0].dtype
    return first in _SUFFIXES and all(
        t.device.type == "cpu" and t.dtype == first and t.is_contiguous() and type(t.data) is torch.Tensor
        for t in tensors
    )


def kernels() -> Kernels | None:
    return _loaded()[0]


def status() -> str:
    """One line: in use, or why not."""
    return _loaded()[1]


@cache
def _loaded() -> tuple[Kernels | None, str]:
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if platform.system() != "Linux":
        return None, f"compiled kernels are built on Linux only, not on {platform.system()}"
    if compiler is None:
        return None, "no C++ compiler (c++, g++ or clang++): PyTorch's own operations are used, which are slower"
    try:
        return Kernels(ctypes.CDLL(str(_compiled(compiler)))), f"compiled with {Path(compiler).name}"
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        told = getattr(error, "stderr", None) or str(error)
        return None, f"the kernels do not compile or load: {(told.strip().splitlines() or ['?'])[0]}"


def _compiled(compiler: str) -> Path:
    """The shared library of this source, compiler and processor, compiled when it is not there yet."""
    flags = [*FLAGS, "-mprefer-vector-width=512"] if platform.machine() == "x86_64" else list(FLAGS)
    version = subprocess.run(  # noqa: S603 - the compiler found on the path
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=COMPILE_S
    ).stdout
    key = hashlib.sha256("\0".join([version, _processor(), *flags]).encode() + SOURCE.read_bytes()).hexdigest()[:24]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunedock" / "kernels"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    library = folder / f"cpu-{key}.so"
    if library.is_file() and library.stat().st_uid == os.getuid():
        return library
    with tempfile.TemporaryDirectory(
        dir=folder
    ) as scratch:  # moved into place whole: two processes may compile at once
        made = Path(scratch) / "cpu.so"
        subprocess.run(  # noqa: S603
            [compiler, *flags, "-o", str(made), str(SOURCE)],
            capture_output=True,
            text=True,
            check=True,
            timeout=COMPILE_S,
        )
        made.replace(library)
    return library


def _processor() -> str:
    """What -march=native looks at: a home shared by unlike machines must not share the code."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )
