"""The checks of `tunedock doctor` that need torch: does it load, does it know the card, do products and kernels work.

Nothing is imported at the top: a package that does not load is a finding. Every check is told as soon as it is made, and before
it which comes next, so that one that kills the process (a crash while loading, a driver that hangs) takes no other with it.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tunedock.events import Emitter
from tunedock.plan.machine import cards
from tunedock.plan.machine.bounds import measured
from tunedock.plan.machine.check import Check, absent, failure, warning
from tunedock.plan.machine.symptoms import known_way_out
from tunedock.train import card_checks
from tunedock.train.card_checks import GROUP, build_words

if TYPE_CHECKING:
    import torch

SIDE, ROUNDS = 512, 4
"""Size of the products that are timed on the CPU, and how often; the fastest counts."""

REINSTALL = "install PyTorch again: `pip install --force-reinstall torch`"


def examine(emit: Emitter) -> list[Check]:
    """All checks. Each is told as a note with `check` in its data, after a progress event that names it."""
    made: list[Check] = []
    found = cards.find()
    for name, check in _checks(found):
        emit.progress(name, len(made), unit="checks")
        for one in _guarded(name, check):
            emit.note(f"{one.name}: {one.found}", check=one.to_json())
            made.append(one)
        if name == "torch" and made[-1].verdict == "failure" and "torch" not in sys.modules:
            break  # nothing below could say more than that
    return made


def _checks(found: cards.Cards) -> Sequence[tuple[str, Callable[[], Sequence[Check]]]]:
    return (
        ("torch", lambda: [version()]),
        ("build", lambda: [card_checks.build(found), *card_checks.driver(found)]),
        ("cuda", lambda: card_checks.devices(found)),
        ("compiled kernels", lambda: [kernels()]),
        ("training stack", lambda: [stack()]),
        ("bfloat16 on the cpu", lambda: [bfloat16()]),
        ("openmp runtimes", lambda: [openmp(_maps())]),
        ("fonts", lambda: [fonts()]),
    )


def _guarded(name: str, check: Callable[[], Sequence[Check]]) -> Sequence[Check]:
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - policy: what a broken installation raises is the finding
        said = f"{type(error).__name__}: {error}"
        return [failure(GROUP, name, said, known_way_out(str(error)) or REINSTALL)]


def version() -> Check:
    import torch

    found = f"{torch.__version__}, {build_words(torch.version.cuda, torch.version.hip)}"
    return measured(GROUP, "torch", torch.__version__, found=found, way_out="`pip install --upgrade torch`")


def kernels() -> Check:
    from tunedock.model.kernels import kernels as compiled
    from tunedock.model.kernels import status

    name = "compiled kernels"
    if compiled() is not None:
        return Check(GROUP, name, f"{status()}, and they load")
    if sys.platform != "linux":
        return absent(GROUP, name, status())
    return warning(
        GROUP, name, status(), known_way_out(status()) or "a C++ compiler with OpenMP: `apt-get install g++`"
    )


def stack() -> Check:
    """Loads what training loads: a torch and a transformers that do not fit together show here."""
    import transformers

    from tunedock.model.load import find_device

    return Check(
        GROUP, "training stack", f"transformers {transformers.__version__} loads; training would run on {find_device()}"
    )


def bfloat16() -> Check:
    """Speed of products on the CPU; without dot products of its own for bfloat16, training there computes in float32."""
    import torch

    from tunedock.model.load import has_bf16

    name = "bfloat16 on the cpu"
    native = has_bf16(torch.device("cpu"))
    speeds = {dtype: _gflops(dtype) for dtype in (torch.float32, torch.bfloat16)}
    found = f"float32 {speeds[torch.float32]:,.0f} GFLOP/s, bfloat16 {speeds[torch.bfloat16]:,.0f}, "
    found += f"{torch.get_num_threads()} threads"
    if native:
        return Check(GROUP, name, f"dot products in hardware: {found}")
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return absent(GROUP, name, f"no dot products in hardware: {found}")
    return warning(
        GROUP,
        name,
        f"no dot products in hardware: {found}",
        "none is needed: training computes in float32 here; a CPU with AVX-512 BF16 or AMX is about twice as fast",
    )


def _gflops(dtype: torch.dtype) -> float:
    import torch

    one = torch.ones(SIDE, SIDE, dtype=dtype)
    best = float("inf")
    with torch.inference_mode():
        for _ in range(ROUNDS):
            began = time.perf_counter()
            one @ one
            best = min(best, time.perf_counter() - began)
    return 2e-9 * SIDE**3 / best


def _maps() -> str:
    """What is loaded into this process, now that all that training needs is."""
    try:
        return Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def openmp(maps: str) -> Check:
    """OpenMP runtimes in a process, from `/proc/PID/maps`. Each starts its own threads, and two can deadlock after a fork."""
    name = "openmp runtimes"
    if not maps:
        return absent(GROUP, name, "not known on this system")
    paths = re.findall(r"^\S+ \S+ \S+ \S+ \S+ +(/.*)$", maps, re.MULTILINE)
    loaded = sorted({path for path in paths if re.match(r"lib(gomp|iomp5|omp)\b", Path(path).name)})
    if len(loaded) > 1:
        return warning(
            GROUP,
            name,
            f"{len(loaded)} are loaded: {', '.join(loaded)}",
            f"let all use one: `export LD_PRELOAD={_preferred(loaded)}`; or reinstall the package that brings the other",
        )
    return Check(GROUP, name, loaded[0] if loaded else "none loaded")


def _preferred(loaded: Sequence[str]) -> str:
    return next((path for path in loaded if "/torch" in path), loaded[0])


def fonts() -> Check:
    """Which font draws Chinese in plots: an installed one, else the one tunedock brings."""
    from tunedock.train.plot import SHIPPED_FONT, families

    names = families()
    installed = [family for family in names[1:] if family != SHIPPED_FONT]
    found = (
        installed[0]
        if installed
        else f"{SHIPPED_FONT}, which tunedock brings: it has 4,000 characters, an installed one all"
    )
    return Check("system", "font for chinese", found)
