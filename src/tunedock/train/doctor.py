"""The checks of `tunedock doctor` that need torch: does it load, does it know the card, do products and kernels work.

Nothing is imported at the top: a package that does not load is a finding. Every check is told as soon as it is made, and before
it which comes next, so that one that kills the process (a crash while loading, a driver that hangs) takes no other with it.
"""

from __future__ import annotations

import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tunedock.events import Emitter
from tunedock.plan.machine import cards
from tunedock.plan.machine.bounds import below, driver_bounds, measured
from tunedock.plan.machine.check import Check, absent, failure, warning
from tunedock.plan.machine.symptoms import known_way_out

if TYPE_CHECKING:
    import torch

GROUP = "torch"

INDEX = "https://download.pytorch.org/whl"
BUILDS = (("580.65.06", "cu130"), ("525.60.13", "cu126"))
"""NVIDIA driver from which on -> the build of PyTorch to install."""

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
        ("build", lambda: [build(found), *driver(found)]),
        ("cuda", lambda: devices(found)),
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

    found = f"{torch.__version__}, {_build_words(torch.version.cuda, torch.version.hip)}"
    return measured(GROUP, "torch", torch.__version__, found=found, way_out="`pip install --upgrade torch`")


def build(found: cards.Cards) -> Check:
    """The build against the cards: a card does nothing under a build for CPUs."""
    import torch

    return judge_build(torch.version.cuda, torch.version.hip, found, answers=torch.cuda.is_available())


def judge_build(cuda: str | None, hip: str | None, found: cards.Cards, *, answers: bool) -> Check:
    """`cuda` and `hip`: the versions of the build, None for those it lacks. `answers`: whether torch sees a card, which it may do
    where a container hides it from everyone else."""
    words, nvidia, amd = _build_words(cuda, hip), found.of("NVIDIA"), found.of("AMD")
    if nvidia and cuda is None:
        held = f"{words}, and this machine has {_named(nvidia)}: training would not use it"
        return failure(GROUP, "build", held, install_for(found.driver))
    if amd and not nvidia and hip is None:
        held = f"{words}, and this machine has {_named(amd)}: training would not use it"
        return warning(GROUP, "build", held, f"see {INDEX} for a ROCm build; tunedock is not tested on it")
    if cuda is not None and not nvidia and not answers:
        return Check(GROUP, "build", f"{words}, and no NVIDIA card was found: training runs on the CPU")
    return Check(GROUP, "build", words)


def install_for(driver_version: str | None) -> str:
    """The way to a build that the driver can run."""
    fits = [name for minimum, name in BUILDS if driver_version is None or not below(driver_version, minimum)]
    if not fits:
        return f"update the NVIDIA driver to {BUILDS[0][0]} or newer, then `pip install torch --index-url {INDEX}/{BUILDS[0][1]}`"
    return f"`pip install --force-reinstall torch --index-url {INDEX}/{fits[0]}`"


def driver(found: cards.Cards) -> list[Check]:
    import torch

    cuda = torch.version.cuda
    bounds = driver_bounds(cuda) if cuda else None
    if cuda is None or bounds is None or found.driver is None:
        return []
    return [
        measured(
            GROUP,
            "driver for cuda",
            found.driver,
            found=f"{found.driver} under CUDA {cuda}",
            way_out=f"update the NVIDIA driver, or {install_for(found.driver)}",
            bounds=bounds,
        )
    ]


def devices(found: cards.Cards) -> list[Check]:
    """Each device torch sees: are there kernels for it, and does a product come out right?"""
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        return [_device(index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        return [Check(GROUP, "mps", "Apple's GPU answers; tunedock is not tested on it")]
    if torch.version.cuda is None or not found.of("NVIDIA"):
        return [absent(GROUP, "cuda", "no card that this build could use")]
    why = "; ".join(str(message.message).splitlines()[0] for message in said) or "torch.cuda.is_available() is false"
    return [failure(GROUP, "cuda", f"the card cannot be used: {why}", known_way_out(why) or install_for(found.driver))]


def _device(index: int) -> Check:
    import torch

    name = f"cuda:{index}"
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    built = torch.cuda.get_arch_list()
    found = f"{properties.name}, sm_{capability[0]}{capability[1]}"
    if not runs_on(capability, built):
        return failure(
            GROUP,
            name,
            f"{found}: this build has kernels for {', '.join(built)} only",
            f"install a build that has: {INDEX} (newer CUDA for newer cards, older for older ones)",
        )
    trouble = _wrong_product(torch.device("cuda", index))
    if trouble:
        return failure(GROUP, name, f"{found}: {trouble}", known_way_out(trouble) or "restart the machine; see `dmesg`")
    halves = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bfloat16"
    return Check(GROUP, name, f"{found}, {halves}; a product comes out right")


def runs_on(capability: tuple[int, int], built: Sequence[str]) -> bool:
    """Whether code for these levels (`sm_90`, `sm_90a`, `sm_120f`, `compute_80`) runs on a card of this compute capability.

    Machine code runs within its major version on the same or a higher minor one, with an `a` on its own level only; PTX
    (`compute_`) is compiled for any higher level when it is loaded. Source: NVIDIA, CUDA C++ Programming Guide, "Binary
    Compatibility" and "PTX Compatibility".
    """
    for level in built:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", level)
        if not found:
            continue
        kind, of = found[1], (int(found[2]), int(found[3]))
        if found[4] == "a":
            fits = capability == of
        elif kind == "sm" or found[4] == "f":
            fits = capability[0] == of[0] and capability[1] >= of[1]
        else:
            fits = capability >= of
        if fits:
            return True
    return False


def _wrong_product(device: torch.device) -> str | None:
    """What is wrong with a small product there; None when it comes out right."""
    import torch

    try:
        ones = torch.ones(64, 64, device=device)
        total = float((ones @ ones).sum())
    except (RuntimeError, torch.AcceleratorError) as error:
        return str(error).splitlines()[0]
    return None if total == 64.0**3 else f"64 x 64 ones give {total}, not {64.0**3}"


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


def _build_words(cuda: str | None, hip: str | None) -> str:
    return f"built for CUDA {cuda}" if cuda else f"built for ROCm {hip}" if hip else "a build for CPUs"


def _named(found: Sequence[cards.Card]) -> str:
    return ", ".join(dict.fromkeys(card.name for card in found))
