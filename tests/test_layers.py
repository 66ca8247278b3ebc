"""The arrows point down: a layer imports itself and earlier ones, and the control plane never touches the work plane."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tunedock

LAYERS = (
    "errors", "events", "recipe", "run", "access", "registry", "plan", "data", "model", "objective", "eval", "train", "export",
    "serve", "worker", "image", "bundle", "launch", "pipeline", "search", "cli", "web", "__main__",
)  # fmt: skip
CONTROL = {
    "errors",
    "events",
    "recipe",
    "run",
    "access",
    "registry",
    "plan",
    "image",
    "bundle",
    "launch",
    "pipeline",
    "search",
    "cli",
    "web",
    "__main__",
}
WORK = set(LAYERS) - CONTROL
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "bitsandbytes"}

ROOT = Path(tunedock.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in a file, those inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative imports hide the layer"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def layers_imported(path: Path) -> Iterator[tuple[int, str]]:
    for line, module in imports(path):
        parts = module.split(".")
        if parts[0] == "tunedock" and len(parts) > 1 and parts[1] != "__version__":
            yield line, parts[1]


def test_every_module_has_a_layer() -> None:
    assert {layer_of(path) for path in FILES} <= set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    own = LAYERS.index(layer_of(path))
    wrong = [
        f"{path.name}:{line} imports {layer}" for line, layer in layers_imported(path) if LAYERS.index(layer) > own
    ]
    assert not wrong


@pytest.mark.parametrize(
    "path", [p for p in FILES if layer_of(p) in CONTROL], ids=lambda path: str(path.relative_to(ROOT))
)
def test_the_control_plane_imports_nothing_of_the_work_plane(path: Path) -> None:
    wrong = [f"{path.name}:{line} imports {layer}" for line, layer in layers_imported(path) if layer in WORK]
    wrong += [f"{path.name}:{line} imports {name}" for line, name in imports(path) if name.split(".")[0] in HEAVY]
    assert not wrong


def test_the_test_would_see_a_wrong_import(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "def f():\n    from tunedock.train import loop\n    import torch.nn as nn\n    from tunedock import data\n"
    )
    assert list(imports(file)) == [(2, "tunedock.train.loop"), (3, "torch.nn"), (4, "tunedock.data")]
    assert list(layers_imported(file)) == [(2, "train"), (4, "data")]


BLOCKED = f"""
import importlib, importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Block())
for name in sys.argv[1:]:
    importlib.import_module(name)
print(len(sys.argv) - 1)
"""


def test_the_control_plane_imports_with_the_heavy_packages_blocked() -> None:
    paths = [path.relative_to(ROOT.parent).with_suffix("") for path in FILES if layer_of(path) in CONTROL]
    names = [".".join(path.parts).removesuffix(".__init__") for path in paths if path.name != "__main__"]
    done = subprocess.run([sys.executable, "-c", BLOCKED, *names], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(names) > 10


HELP = [
    ["--help"], ["--version"], ["train", "--help"], ["eval", "--help"], ["chat", "--help"], ["export", "--help"],
    ["pipeline", "--help"],
    ["image", "--help"], ["image", "build", "--help"],
    ["data", "--help"], ["data", "check", "--help"], ["recipe", "show", "--help"], ["runs", "list", "--help"],
    ["image", "promote", "--help"], ["token", "--help"], ["token", "issue", "--help"],
    ["models", "--help"], ["models", "promote", "--help"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_help_loads_neither_pydantic_nor_the_work_plane(arguments: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "tunedock", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert ("tunedock" if "--version" in arguments else "Usage") in done.stdout
    loaded = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "tunedock" in loaded
    assert not loaded & (HEAVY | {"pydantic", "numpy", "ruamel", "rich"})
