"""Runs while an image is made, in the virtual environment that will be its own: `python prepare.py CODE OUT SYSTEM`.

CODE is where the package will lie: an entry in the environment's path and the command `tunedock` lead there, so that a changed line
of it changes the last layer alone. Into OUT go `requirements.txt` (what is installed, as `pip freeze` says it) and `sbom.cdx.json`
(a CycloneDX bill of materials, with the distribution's packages listed in the file SYSTEM). At last the packages a run imports are
imported once: that compiles them, and compiling all that is installed would make the image a tenth larger.

The standard library only: whatever this needed, the image would have.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata as metadata
import json
import platform
import re
import site
import sys
from pathlib import Path
from typing import Any

IMPORTS = (
    "torch", "torch.utils.data", "torch.distributed", "transformers", "transformers.models.auto.modeling_auto", "peft",
    "accelerate", "safetensors.torch", "pyarrow", "pyarrow.parquet", "tokenizers", "huggingface_hub", "fsspec", "jinja2",
    "pydantic", "ruamel.yaml", "typer", "rich.progress", "rich.table", "matplotlib.pyplot", "tensorboard", "sacrebleu",
    "rouge_score", "psutil", "fastapi", "uvicorn", "llama_cpp",
)  # fmt: skip

COMMAND = """#!{python}
import sys
from tunedock.cli.app import main
sys.exit(main())
"""


def main(code: str, out: Path, system: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    packages = sorted(metadata.distributions(), key=lambda package: package.metadata["Name"].lower())
    frozen = [f"{package.metadata['Name']}=={package.version}\n" for package in packages]
    (out / "requirements.txt").write_text("".join(frozen), encoding="utf-8")
    bill = bill_of_materials([python(package) for package in packages] + distribution(system))
    (out / "sbom.cdx.json").write_text(json.dumps(bill, indent=1) + "\n", encoding="utf-8")
    Path(site.getsitepackages()[0], "tunedock.pth").write_text(f"{code}\n", encoding="utf-8")
    command = Path(sys.prefix, "bin", "tunedock")
    command.write_text(COMMAND.format(python=sys.executable), encoding="utf-8")
    command.chmod(0o755)
    for name in IMPORTS:
        with contextlib.suppress(ImportError):  # a light image has few of them
            importlib.import_module(name)


def bill_of_materials(components: list[dict[str, Any]]) -> dict[str, Any]:
    """https://cyclonedx.org/docs/1.6/json"""
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "application", "name": "tunedock", "bom-ref": "tunedock"}},
        "components": components,
        "dependencies": [{"ref": "tunedock", "dependsOn": [component["bom-ref"] for component in components]}],
    }


def python(package: metadata.Distribution) -> dict[str, Any]:
    about = package.metadata.json  # keys in lower case; one that may come several times is a list
    name, version = str(about["name"]), package.version
    purl = f"pkg:pypi/{re.sub(r'[-_.]+', '-', name).lower()}@{version.replace('+', '%2B')}"
    found: dict[str, Any] = {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
    stated = about.get("license_expression") or about.get("license") or ""
    words = [line.rsplit("::", 1)[1].strip() for line in about.get("classifier", ()) if line.startswith("License ::")]
    licence = stated if stated and "\n" not in stated else ", ".join(words)
    if licence:
        found["licenses"] = [{"license": {"name": licence}}]
    return found


def distribution(listed: Path) -> list[dict[str, Any]]:
    """`name version architecture`, a line a package, as dpkg-query wrote it."""
    with contextlib.suppress(OSError):
        kind = platform.freedesktop_os_release().get("ID", "debian")
        found = []
        for line in listed.read_text(encoding="utf-8").splitlines():
            name, version, architecture = line.split()
            purl = f"pkg:deb/{kind}/{name}@{version.replace('+', '%2B')}?arch={architecture}"
            found.append({"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl})
        return found
    return []


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
