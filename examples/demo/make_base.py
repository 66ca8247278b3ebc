"""Makes the demo's base model from nothing: corpus, tokenizer, pretraining by tunedock itself, export in bfloat16.

    make demo-base

The result goes to runs/demo-base-model; copy it over examples/demo/base to use it. Numbers differ in the last digits
between machines and library versions, so it is not byte for byte the base that is shipped.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KEPT = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def run(*command: str) -> None:
    print(f"$ {' '.join(command)}", flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def main() -> None:
    runs = ROOT / "runs"
    target, pretraining, exported = (
        runs / name for name in ("demo-base-model", "demo-pretrain", "demo-pretrain-export")
    )
    for folder in (target, pretraining, exported):
        if folder.exists():
            sys.exit(f"{folder.relative_to(ROOT)} is there already: move it away, and run this again")
    tunedock = str(Path(sys.executable).parent / "tunedock")
    run(sys.executable, "examples/demo/make_data.py", "--corpus", "examples/demo/corpus.jsonl")
    run(sys.executable, "examples/demo/make_tokenizer.py", "examples/demo/corpus.jsonl", "examples/demo/base-config")
    run(tunedock, "train", "examples/demo/pretrain.yaml", f"train.output_dir={pretraining}")
    run(tunedock, "export", str(pretraining), "--to", str(exported))
    target.mkdir()
    for name in KEPT:
        shutil.copyfile(exported / name, target / name)
    print(f"{target.relative_to(ROOT)}: copy it to examples/demo/base to use it")


if __name__ == "__main__":
    main()
