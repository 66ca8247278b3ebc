"""The `export` stage: a run's model in the form it is deployed in, checked against the run before it counts as made.

    run's model, float32 ── what it does: tokens, prompts, answers, likelihood (`expected`)
            │ merge (checked in memory)
            ▼
    one model ── hf, quantised, gguf ── files ── read as a server reads them ── held against what is expected (`verify`)

A folder is written beside its place and renamed when all checks have passed. A failed check leaves nothing behind.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tunedock import __version__
from tunedock.data import prepare as preparing
from tunedock.errors import CheckError, DependencyError, DiskError, RecipeError, RunError
from tunedock.events import Emitter
from tunedock.export import hf
from tunedock.export.card import model_card
from tunedock.export.expected import Expected, HeldOut, expected_of, held_out_of
from tunedock.export.gguf import TOKENIZER
from tunedock.export.gguf import make as gguf_file
from tunedock.export.gguf.reader import LlamaReader
from tunedock.export.gguf.shape import shape_of
from tunedock.export.merge import (
    EXACT_TOLERANCE,
    FLOAT32,
    ROUNDED_TOLERANCE,
    Prompts,
    base_state,
    changes,
    merged,
    own_dtype,
    prompts_of,
)
from tunedock.export.ollama import make as ollama_model
from tunedock.export.push import push, require
from tunedock.export.readers import AdapterReader, Reader, TransformersReader, held_in_few_bits
from tunedock.export.verify import Report, verify
from tunedock.model import adapter as adapters
from tunedock.model import load
from tunedock.model.chat_facts import ChatFacts
from tunedock.model.session import Base, find_base, tuned_policy
from tunedock.recipe.exporting import Order
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run, read_json, write_atomic, write_json

RECORD = "export.json"


@dataclass(slots=True)
class Making:
    """An export at work."""

    run: Run
    base: Base
    facts: ChatFacts
    order: Order
    folder: Path
    """Where it is written, beside its place."""
    emit: Emitter
    checks: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    report: Report | None = None

    @property
    def weights(self) -> Path:
        """The GGUF file."""
        return self.folder / f"model-{self.order.kind}.gguf"


def export(run: Run, recipe: Recipe, emit: Emitter, *, order: Order) -> dict[str, Any]:
    """Writes the run's model to `order.to`.

    Raises CheckError when a check fails, RunError when the run has no result or the folder is in use, RecipeError and ModelError
    for a form this model has not, DependencyError, DiskError.
    """
    to = Path(order.to)
    if order.push is not None:
        require(order.push)
    run.require_model()
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RunError("the folder is in use", where=str(to), hint="give another folder by --to")
    aside = to.with_name(f".{to.name}.{os.getpid()}.part")
    began = time.monotonic()
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        made = _made(run, recipe, order, aside, emit)
        files = sorted(path for path in aside.iterdir() if path.is_file())
        told = {
            "checks": made.checks,
            "report": made.report.to_json() if made.report else None,
            "notes": made.notes,
            "files": [path.name for path in files],
            "bytes": sum(path.stat().st_size for path in files),
        }
        if to.exists():
            to.rmdir()
        aside.rename(to)
    except (OSError, SafetensorError) as error:
        raise DiskError(
            f"the export cannot be written: {getattr(error, 'strerror', None) or error}",
            where=str(to),
            hint="free disk space, or give a folder that can be written by --to",
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    pushed = None
    if order.push is not None:
        pushed = push(to, order.push, lambda done, total: emit.progress("push", done, total, "files"))
    timed = {"seconds": time.monotonic() - began, **({"pushed": pushed} if pushed else {})}
    return {"to": str(to), "format": order.format, "kind": order.kind, **timed, **told}


def _made(run: Run, recipe: Recipe, order: Order, folder: Path, emit: Emitter) -> Making:
    facts = ChatFacts.read(run.model)
    base = find_base(recipe, stop_ids=facts.stop_ids)
    making = Making(run, base, facts, order, folder, emit)
    _refuse(making)
    facts.write(folder)
    steps = 5
    emit.progress("export", 0, steps, "steps")
    # A base that is in few bits already has no float32 weights: an adapter alone is measured on it as it is.
    precision = None if order.format == "adapter" and held_in_few_bits(base) else FLOAT32
    policy = tuned_policy(base, run.model, precision=precision, device=load.roomy_device(base.located.folder))
    prompts = prompts_of(base, facts, policy, emit)
    expected = held = None
    if not prompts.scored:
        expected = expected_of(base, facts, policy.model, policy.device)
        held = held_out_of(base, facts, policy.model, policy.device, emit)
    emit.progress("export", 1, steps, "steps")
    if order.format == "adapter":
        del policy
        _adapter(making)
    else:
        model, making.checks["merged_difference"] = merged(policy, run.model, prompts)
        del policy
        emit.progress("export", 2, steps, "steps")
        _WRITE[order.format](making, model, prompts)
        del model
    emit.progress("export", 3, steps, "steps")
    if expected is not None and held is not None:
        _verified(making, expected, held)
    emit.progress("export", 4, steps, "steps")
    _described(making, expected)
    emit.progress("export", steps, steps, "steps")
    return making


def _refuse(making: Making) -> None:
    """Raises RecipeError for a form that this run has not."""
    order, recipe = making.order, making.base.recipe
    if order.format == "adapter":
        if not adapters.is_adapter(making.run.model):
            raise RecipeError(
                "this run trained whole weights and has no adapter", where="--format adapter", hint="use --format hf"
            )
        if recipe.model.adapters:
            raise RecipeError(
                "this adapter sits on weights with other adapters merged into them, which nobody else has",
                where="--format adapter",
                hint="use --format hf: the merged weights have all of them",
            )
    if making.base.head == "scores" and (order.format in ("gguf", "ollama") or order.quantize):
        raise RecipeError(
            "a reward model scores and does not answer: it is exported as it is",
            where=f"--quantize {order.quantize}" if order.quantize else f"--format {order.format}",
            hint="use --format hf or adapter",
        )
    if order.format == "ollama" and making.base.chat.documents:
        raise RecipeError(
            "this model was trained on documents and has no conversations",
            where="--format ollama",
            hint="use --format gguf",
        )
    if order.format in ("gguf", "ollama"):
        config = load.require_config(making.base.located.folder)
        if config.get("model_type") is not None:
            from transformers import AutoConfig

            shape_of(AutoConfig.from_pretrained(making.base.located.folder))  # before minutes are spent


def _adapter(making: Making) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(making.run.model / name, making.folder / name)
    base, config = making.base, making.folder / "adapter_config.json"
    if base.located.commit is not None:  # a path of this machine means nothing elsewhere
        value = read_json(config)
        value |= {"base_model_name_or_path": base.recipe.model.path, "revision": base.located.commit}
        write_json(config, value)
    base.tokenizer.save_pretrained(making.folder)


def _hf(making: Making, model: nn.Module, prompts: Prompts) -> None:
    """Merged weights; the files, read again, must give the run's logits, within what their own type allows."""
    base, order = making.base, making.order
    dtype = own_dtype(base) if order.dtype == "auto" else getattr(torch, order.dtype)
    whole = making.folder if order.quantize is None else making.folder / ".whole"
    whole.mkdir(exist_ok=True)
    found = changes(base, model.state_dict(), dtype)
    hf.write(model, whole, making.facts, dtype, order.max_shard_size)
    base.tokenizer.save_pretrained(whole)
    _files_again(making, whole, prompts, dtype)
    making.checks |= asdict(found)
    found.require()
    if order.quantize is not None:
        rows = _calibration(making) if order.quantize in ("gptq", "awq") else []
        making.notes += hf.quantise(whole, making.folder, order.quantize, base, rows, order.max_shard_size)
        hf.leave_beside(whole, making.folder)
        base.tokenizer.save_pretrained(making.folder)
        shutil.rmtree(whole)


def _files_again(making: Making, folder: Path, prompts: Prompts, dtype: torch.dtype) -> None:
    base = making.base
    own = base.recipe.model.model_copy(update={"init": "pretrained", "config_overrides": {}})
    device = load.roomy_device(folder)
    again = load.load_weights(folder, own, dtype=torch.float32, device=device, head=base.head)
    got = prompts.asked_of(again, device)
    figures = {
        "prompts": len(prompts.ids),
        "file_difference": prompts.difference(got),
        ("same_order" if prompts.scored else "same_top_token"): prompts.same_order(got)
        if prompts.scored
        else prompts.same_top(got),
    }
    making.checks |= figures
    if not figures["file_difference"] <= (EXACT_TOLERANCE if dtype == torch.float32 else ROUNDED_TOLERANCE):
        told = ", ".join(f"{name} {value:.3g}" for name, value in figures.items())
        raise CheckError(f"the written files do not give the run's logits: {told}", where="export")


def _calibration(making: Making) -> list[list[int]]:
    """Token ids of training rows. Raises RecipeError where there are none at hand."""
    base = making.base
    if base.recipe.data.streaming:
        raise RecipeError(
            "it is calibrated with training rows, and a stream's are gone",
            where=f"--quantize {making.order.quantize}",
            hint="--quantize int8, int4 and nf4 need none",
        )
    store = preparing.prepare(base.recipe, base.chat, making.emit).side("train")
    return [sample.path(sample.leaves()[0])[0].tolist() for sample in islice(store, hf.CALIBRATION_ROWS)]


def _gguf(making: Making, model: nn.Module, prompts: Prompts) -> None:
    kind = making.order.kind
    state: dict[str, Tensor] = dict(model.state_dict())
    making.notes += gguf_file.make(making.weights, model, making.base, making.facts, kind, making.run.name)
    making.base.tokenizer.save_pretrained(making.folder / TOKENIZER)
    shape = shape_of(model.config)
    found = gguf_file.tensors_of(making.weights, state, base_state(making.base), shape)
    making.checks |= found.to_json()
    found.judge(kind)


def _ollama(making: Making, model: nn.Module, prompts: Prompts) -> None:
    """The GGUF file, and a Modelfile beside it."""
    order, generation, config = making.order, getattr(model, "generation_config", None), model.config
    _gguf(making, model, prompts)
    comparison = ollama_model.make(
        making.folder,
        making.weights.name,
        making.base,
        making.facts,
        generation=generation.to_dict() if generation is not None else {},
        longest=int(getattr(config, "max_position_embeddings")),  # noqa: B009 - a config of any family
        system=order.system,
        given={str(name): value for name, value in order.parameters.items()},
    )
    making.notes += comparison.notes
    making.checks |= {"ollama_template": comparison.to_json(), "modelfile": ollama_model.fixed(making.folder)}


_WRITE: dict[str, Callable[[Making, nn.Module, Prompts], None]] = {"hf": _hf, "gguf": _gguf, "ollama": _ollama}


def _verified(making: Making, expected: Expected, held: HeldOut) -> None:
    """Asks the files what was asked of the run. Raises CheckError where they answer otherwise."""
    order = making.order
    try:
        reader = _reader(making)
    except DependencyError as error:
        making.report = Report(
            order.kind, order.exact, not_run=[f"tokens, prompts, answers, likelihood: {error.message}"]
        )
        making.emit.warning(
            f"the file was not tried with llama.cpp: {error.message}",
            hint="`tunedock export verify` does it wherever llama-cpp-python is installed",
        )
        return
    try:
        making.report = verify(
            reader, expected, held, kind=order.kind, exact=order.exact, limit=order.max_perplexity_change
        )
    finally:
        reader.close()
    making.report.bytes = sum(path.stat().st_size for path in making.folder.iterdir() if path.is_file())
    making.report.judge("export")


def _reader(making: Making) -> Reader:
    if making.order.format in ("gguf", "ollama"):
        return LlamaReader(making.weights)
    code = making.base.recipe.model.trust_remote_code
    if making.order.format == "adapter":
        return AdapterReader(making.folder, making.base)
    return TransformersReader(making.folder, trust_remote_code=code)


def _described(making: Making, expected: Expected | None) -> None:
    """The record, what is expected, and the card."""
    run, order = making.run, making.order
    if expected is not None:
        made = making.report.nll if making.report is not None and making.report.nll else None
        replace(expected, made_nll=made).write(making.folder)
    record = {
        "tunedock": __version__,
        "run": run.name,
        "recipe_hash": run.state().recipe_hash,
        "format": order.format,
        "kind": order.kind,
        "exact": order.exact,
        "checks": making.checks,
        "report": making.report.to_json() if making.report else None,
        "notes": making.notes,
    }
    write_json(making.folder / RECORD, record)
    write_atomic(
        making.folder / "README.md",
        model_card(run, making.base.recipe, order, making.checks, making.report, making.notes),
    )
