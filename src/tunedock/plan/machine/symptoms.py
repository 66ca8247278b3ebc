"""Errors of loading and talking to drivers that are known: a piece of their text -> the way out. A table, most special first."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Symptom:
    """`{0}` in the way out stands for the first group of the pattern."""

    pattern: str
    way_out: str


SYMPTOMS = (
    Symptom(
        r"(\S*/\S+?\.so[\w.]*): cannot allocate memory in static TLS block",
        "load that library before all others: `export LD_PRELOAD={0}`; with glibc 2.33 or newer also "
        "`export GLIBC_TUNABLES=glibc.rtld.optional_static_tls=16384`",
    ),
    Symptom(
        r"static TLS",
        "`export GLIBC_TUNABLES=glibc.rtld.optional_static_tls=16384`, or name the library of the message in LD_PRELOAD",
    ),
    Symptom(
        r"No module named '?(torch)'?$",
        "install PyTorch into this Python: `pip install torch` (https://pytorch.org/get-started/locally names the index)",
    ),
    Symptom(
        r"No module named '?([\w.]+)'?", "install tunedock with all it needs into this Python: `pip install tunedock`"
    ),
    Symptom(
        r"(lib(?:cudart|cublas|cudnn|cusparse|cusolver|cufft|curand|nccl|nvrtc|nvJitLink|cupti)\w*\.so[\w.]*): cannot open",
        "{0} belongs to PyTorch's own packages: `pip install --force-reinstall torch`",
    ),
    Symptom(
        r"undefined symbol: \w*(?:nvJitLink|cublas|cudnn|nccl|cusparse)",
        "another CUDA's libraries are loaded in place of PyTorch's: `unset LD_LIBRARY_PATH`, then try again",
    ),
    Symptom(
        r"undefined symbol",
        "packages compiled for different versions of each other: `pip install --force-reinstall torch`, then whatever names torch",
    ),
    Symptom(
        r"version `(GLIBC(?:XX)?_[\d.]+)' not found",
        "the system's C library is older than {0}: use a newer system or a container",
    ),
    Symptom(
        r"SIGILL|[Ii]llegal instruction",
        "the processor lacks instructions the package was compiled for (AVX2, often): use a newer machine, or another build",
    ),
    Symptom(
        r"SIGBUS|[Bb]us error", "shared memory ran out: give the container a larger /dev/shm (`docker run --shm-size=8g`)"
    ),
    Symptom(
        r"numpy\.core\.multiarray|compiled using NumPy 1\.x|_ARRAY_API not found",
        "a package is compiled for another NumPy: `pip install --upgrade numpy` and the package that is named",
    ),
    Symptom(
        r"[Dd]river/library version mismatch",
        "the driver was updated under a running kernel module: restart the machine (or unload and load the nvidia modules)",
    ),
    Symptom(
        r"couldn't communicate with the NVIDIA driver",
        "the kernel module is not loaded: `sudo modprobe nvidia`; after a kernel update, install the driver again (DKMS); "
        "Secure Boot may refuse an unsigned module",
    ),
    Symptom(
        r"No devices were found",
        "the driver runs and sees no card: look for `NVRM` in `dmesg`; in a virtual machine, pass the card through",
    ),
    Symptom(
        r"CUDA driver version is insufficient|driver on your system is too old",
        "update the NVIDIA driver, or install a torch build of an older CUDA",
    ),
    Symptom(
        r"system not yet initialized|error 802",
        "cards joined by NVSwitch need their fabric manager: `sudo systemctl start nvidia-fabricmanager`",
    ),
    Symptom(
        r"CUDA unknown error|error 999",
        "the driver lost the card, after a suspend for example: `sudo rmmod nvidia_uvm && sudo modprobe nvidia_uvm`, or restart",
    ),
    Symptom(
        r"permission denied.*docker|docker.*permission denied|dial unix \S+: connect: permission denied",
        "let your user talk to the daemon: `sudo usermod -aG docker $USER`, then log in again",
    ),
    Symptom(
        r"Cannot connect to the Docker daemon at (\S+?)\.? Is|[Ff]ailed to connect to the docker API at (\S+)",
        "start it: `sudo systemctl start docker` (Docker Desktop: start the application); DOCKER_HOST or "
        "`docker context use` chooses another daemon",
    ),
    Symptom(
        r"CERTIFICATE_VERIFY_FAILED|certificate verify failed",
        "a certificate is not trusted: behind a proxy that reads traffic, `export SSL_CERT_FILE=` the bundle with its "
        "certificate; check the clock, too",
    ),
    Symptom(
        r"Name or service not known|name resolution|nodename nor servname|No address associated",
        "the name cannot be looked up: check the network and DNS, or set HTTPS_PROXY where the way out is a proxy",
    ),
    Symptom(r"[Pp]roxy", "the proxy refuses: check HTTPS_PROXY and NO_PROXY"),
)  # fmt: skip


def known_way_out(text: str) -> str | None:
    """The way out of the first known symptom in a text; None when it shows none."""
    for symptom in SYMPTOMS:
        found = re.search(symptom.pattern, text, re.MULTILINE)
        if found:
            return symptom.way_out.replace("{0}", found.group(1) or "" if found.groups() else "")
    return None
