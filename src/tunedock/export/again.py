"""The `export-verify` stage: a folder that was exported, held against what was expected of it when it was made.

The folder has what the run's model does with the package's own probes (`expected.json`), so this needs neither the run nor its
data, and finds what became of the files since: other weights, another template, other tokens. Where the run is at hand, the
likelihood of its held-out rows is measured again as well, and what is expected is measured anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunedock.errors import CheckError, RunError
from tunedock.events import Emitter
from tunedock.export.expected import Expected, HeldOut, expected_of, held_out_of
from tunedock.export.gguf.reader import LlamaReader
from tunedock.export.merge import FLOAT32
from tunedock.export.ollama import make as ollama_model
from tunedock.export.readers import AdapterReader, Reader, TransformersReader, held_in_few_bits
from tunedock.export.stage import RECORD
from tunedock.export.verify import verify
from tunedock.model.chat_facts import ChatFacts
from tunedock.model.load import roomy_device
from tunedock.model.session import Base, find_base, tuned_policy
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run, read_json


def verify_again(
    folder: Path, emit: Emitter, *, run: Run | None = None, recipe: Recipe | None = None, limit: float | None = None
) -> dict[str, Any]:
    """Raises CheckError for a folder that is not what it was, RunError for one that is no export, DependencyError."""
    record = _record(folder)
    base = None
    if run is not None and recipe is not None:
        facts = ChatFacts.read(run.model)
        base = find_base(recipe, stop_ids=facts.stop_ids)
        precision = None if record["format"] == "adapter" and held_in_few_bits(base) else FLOAT32
        policy = tuned_policy(base, run.model, precision=precision, device=roomy_device(base.located.folder))
        made = Expected.read(folder).made_nll
        expected = replace(expected_of(base, facts, policy.model, policy.device), made_nll=made)
        held = held_out_of(base, facts, policy.model, policy.device, emit)
        del policy
    else:
        expected, held = Expected.read(folder), HeldOut()
    if record["format"] == "ollama" and ollama_model.fixed(folder) != (record.get("checks") or {}).get("modelfile"):
        raise CheckError(
            "its template or its stop words are not those that were made, and held against the model's own",
            where=str(folder / ollama_model.MODELFILE),
            hint="export again; a system text and parameters may be changed",
        )
    reader = _reader(folder, record, base)
    try:
        report = verify(reader, expected, held, kind=record["kind"], exact=bool(record["exact"]), limit=limit)
    finally:
        reader.close()
    report.bytes = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    value = {"folder": str(folder), "format": record["format"], "kind": record["kind"], "report": report.to_json()}
    emit.result(value)
    report.judge(str(folder))
    return value


def _record(folder: Path) -> Mapping[str, Any]:
    if not (folder / RECORD).is_file():
        raise RunError(
            "this folder is no export",
            where=str(folder),
            hint=f"`tunedock export RUN --to DIR` leaves {RECORD} in it",
        )
    record = read_json(folder / RECORD)
    if not isinstance(record, dict) or not {"format", "kind", "exact"} <= record.keys():
        raise CheckError("it is not what an export writes", where=str(folder / RECORD), hint="export again")
    if not (folder / "expected.json").is_file():
        raise RunError("a reward model's export has nothing to be asked", where=str(folder))
    return record


def _reader(folder: Path, record: Mapping[str, Any], base: Base | None) -> Reader:
    if record["format"] in ("gguf", "ollama"):
        files = sorted(folder.glob("*.gguf"))
        if len(files) != 1:
            raise CheckError(f"there are {len(files)} GGUF files, and one was written", where=str(folder))
        return LlamaReader(files[0])
    if record["format"] == "adapter":
        if base is None:
            raise RunError(
                "an adapter is tried on its base, which its run knows",
                where=str(folder),
                hint="name the run: --run RUN",
            )
        return AdapterReader(folder, base)
    return TransformersReader(folder, trust_remote_code=base.recipe.model.trust_remote_code if base else False)
