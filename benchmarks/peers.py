"""An environment for each peer, from the package registry, under `benchmarks/.env`.

    python -m benchmarks.peers            all of them
    python -m benchmarks.peers trl        one

torch comes first, and on Linux without an NVIDIA driver from the CPU wheels, so that every side computes with the same build.
LLaMA-Factory's requirements include torchvision and torchaudio, which would replace that build by a CUDA one, and a web interface;
training text needs none of them. So it is installed without its requirements, then with those of its own metadata that are left.
Its `import torchaudio` at the top of a module is met by an empty module of that name.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / "benchmarks" / ".env"
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
TORCH = "torch==2.13.0"


@dataclass(frozen=True, slots=True)
class Peer:
    """What is installed. `bare` comes without its requirements, save those its metadata names and `left_out` does not."""

    name: str
    packages: tuple[str, ...]
    bare: str | None = None
    left_out: tuple[str, ...] = ()
    empty_modules: tuple[str, ...] = ()
    computes: bool = True
    """Whether it needs torch."""

    @property
    def folder(self) -> Path:
        return ENVIRONMENTS / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"


TRL = Peer(
    "trl",
    ("trl==1.16.0", "transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0", "datasets", "psutil"),
)
LLAMA_FACTORY = Peer(
    "llamafactory",
    ("psutil",),
    bare="llamafactory==0.9.5",
    left_out=("torch", "torchvision", "torchaudio", "gradio", "modelscope"),
    empty_modules=("torchaudio",),
)
LITELLM = Peer("litellm", ("litellm[proxy]==1.108.7",), computes=False)
PEERS = {peer.name: peer for peer in (TRL, LLAMA_FACTORY, LITELLM)}


def ensure(peer: Peer) -> Path:
    """The peer's Python, its environment made first where it is missing or was made by another definition.

    Raises subprocess.CalledProcessError when pip fails; the half-made environment is made anew by the next call.
    """
    mark = peer.folder / "made-from.json"
    definition = json.dumps({"torch": TORCH, **asdict(peer)}, sort_keys=True)
    if mark.is_file() and mark.read_text(encoding="utf-8") == definition:
        return peer.python
    if peer.folder.exists():
        shutil.rmtree(peer.folder)
    print(
        f"installing {peer.bare or peer.packages[0]} into {peer.folder.relative_to(ROOT)}", file=sys.stderr, flush=True
    )
    subprocess.run([sys.executable, "-m", "venv", str(peer.folder)], check=True)
    if peer.computes:
        _install_torch(peer)
    if peer.bare is not None:
        _pip(peer, "--no-deps", peer.bare)
        _pip(peer, *requirements_left(_declared(peer), peer.left_out), *peer.packages)
    else:
        _pip(peer, *peer.packages)
    for module in peer.empty_modules:
        (_site_packages(peer) / f"{module}.py").write_text('"""Stands in for a package that text does not need."""\n')
    mark.write_text(definition, encoding="utf-8")
    return peer.python


def requirements_left(declared: list[str], left_out: tuple[str, ...]) -> list[str]:
    """The requirements of a package's metadata without its extras' and without those named."""
    kept = []
    for requirement in declared:
        specifier, _, marker = requirement.partition(";")
        name = re.match(r"[A-Za-z0-9._-]+", specifier.strip())
        if name and name.group() not in left_out and "extra" not in marker:
            kept.append(specifier.strip())
    return kept


def _install_torch(peer: Peer) -> None:
    if platform.system() != "Linux" or shutil.which("nvidia-smi"):
        _pip(peer, "--no-deps", TORCH)
        return
    try:
        _pip(peer, "--retries", "1", "--timeout", "20", "--no-deps", "--extra-index-url", CPU_WHEELS, TORCH)
    except subprocess.CalledProcessError:
        _pip(peer, "--no-deps", TORCH)  # where the CPU wheels cannot be reached, pip's configured index decides


def _pip(peer: Peer, *arguments: str) -> None:
    pip = [str(peer.python), "-m", "pip", "--disable-pip-version-check", "-qq", "install"]
    subprocess.run([*pip, *arguments], check=True)


def _declared(peer: Peer) -> list[str]:
    name = (peer.bare or "").partition("==")[0]
    code = f"import importlib.metadata as m, json; print(json.dumps(m.requires({name!r}) or []))"
    found = subprocess.run([str(peer.python), "-c", code], check=True, capture_output=True, text=True).stdout
    return [str(requirement) for requirement in json.loads(found)]


def _site_packages(peer: Peer) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(
        subprocess.run([str(peer.python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    )


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        print(f"no peer is called {unknown[0]}; there are {', '.join(PEERS)}", file=sys.stderr)
        return 2
    for name in names or PEERS:
        ensure(PEERS[name])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
