"""PyTorch's build against the cards and the driver: is it for them, has it kernels for them, does a product come out right?

torch is imported inside the functions: that it may not load is what `tunedock doctor` is asked about.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunedock.plan.machine import cards
from tunedock.plan.machine.bounds import below, bytes_text, driver_bounds, measured
from tunedock.plan.machine.check import Check, absent, failure, warning
from tunedock.plan.machine.symptoms import known_way_out

if TYPE_CHECKING:
    import torch

GROUP = "torch"

INDEX = "https://download.pytorch.org/whl"
BUILDS = (("580.65.06", "cu130"), ("525.60.13", "cu126"))
"""NVIDIA driver from which on -> the build of PyTorch to install."""


def build(found: cards.Cards) -> Check:
    """The build against the cards: a card does nothing under a build for CPUs."""
    import torch

    return judge_build(torch.version.cuda, torch.version.hip, found, answers=torch.cuda.is_available())


def judge_build(cuda: str | None, hip: str | None, found: cards.Cards, *, answers: bool) -> Check:
    """`cuda` and `hip`: the versions of the build, None for those it lacks. `answers`: whether torch sees a card, which it may do
    where a container hides it from everyone else."""
    words, nvidia, amd = build_words(cuda, hip), found.of("NVIDIA"), found.of("AMD")
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
    free, total = torch.cuda.mem_get_info(index)
    halves = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bfloat16"
    room = f"{bytes_text(free)} of {bytes_text(total)} free"
    return Check(GROUP, name, f"{found}, {halves}, {room}; a product comes out right")


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


def build_words(cuda: str | None, hip: str | None) -> str:
    return f"built for CUDA {cuda}" if cuda else f"built for ROCm {hip}" if hip else "a build for CPUs"


def _named(found: Sequence[cards.Card]) -> str:
    return ", ".join(dict.fromkeys(card.name for card in found))
