"""The `export` stage: merged weights or the adapter alone, checked against the run before it counts as made.

The merge is computed in float32 from the base's own weights and the adapter. Three checks, on real prompts of the held-out rows:

1. merged in memory gives the logits of base plus adapter (float32, to rounding);
2. the files, read again, give them too, within what their own type allows;
3. the files differ from the base: an export of untrained weights is caught (LLaMA-Factory #9051 shipped one).

Of a reward model the scores of both answers of held-out pairs are compared, as plain transformers reads them.

A folder is written beside its place and renamed when all checks have passed. A failed check leaves nothing behind.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig

from tunedock.data import prepare as preparing
from tunedock.data.conversation import Message
from tunedock.data.store import SampleStore
from tunedock.errors import CheckError, DiskError, RecipeError, RunError
from tunedock.eval.questions import questions_of
from tunedock.events import Emitter
from tunedock.export.card import model_card
from tunedock.model import adapter as adapters
from tunedock.model import load
from tunedock.model.policy import Precision
from tunedock.model.score import score_layer
from tunedock.model.session import Base, ChatFacts, base_weights, find_base, tuned_policy
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run, read_json, write_atomic, write_json

PROMPTS = 8
EXACT_TOLERANCE = 1e-3
"""Largest difference of a logit, relative to the largest logit, between merged and unmerged in float32."""
ROUNDED_TOLERANCE = 0.05
"""The same for files of bfloat16 or float16, whose weights are rounded."""
FLOAT32 = Precision(torch.float32, torch.float32)


@dataclass(frozen=True, slots=True)
class MergeChecks:
    """The figures of an export's checks."""

    prompts: int
    merged_difference: float
    """Largest difference of a logit between base plus adapter and merged, both in float32, relative to the largest logit; of
    scores, to the largest distance of one from their mean."""
    file_difference: float
    """The same between base plus adapter and the files read again."""
    same_top_token: float | None
    """Share of positions where the files' most likely token is that of base plus adapter."""
    same_order: float | None
    """Of a reward model: share of pairs that the files rank as base plus adapter does."""
    changed_tensors: int
    """Tensors of the files that differ from the base's."""
    tensors: int
    largest_change: float


def export(run: Run, recipe: Recipe, emit: Emitter, *, to: Path, form: str) -> dict[str, Any]:
    """Writes the run's model to `to`.

    Raises CheckError when a check fails, RunError when the run has no result or `to` is in use.
    """
    if not run.model.is_dir():
        raise RunError(
            "the run has no result yet", where=str(run.path), hint=f"`tunedock train --resume {run.path}` finishes it"
        )
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RunError("the folder is in use", where=str(to), hint="give another folder by --to")
    aside = to.with_name(f".{to.name}.{os.getpid()}.part")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        result = _write(run, recipe, emit, aside, form)
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
    return {"to": str(to), "format": form, **result}


def _write(run: Run, recipe: Recipe, emit: Emitter, folder: Path, form: str) -> dict[str, Any]:
    facts = ChatFacts.read(run.model)
    base = find_base(recipe, stop_ids=facts.stop_ids)
    if form == "adapter":
        if not adapters.is_adapter(run.model):
            raise RecipeError(
                "this run trained whole weights and has no adapter", where="--format adapter", hint="use --format hf"
            )
        if recipe.model.adapters:
            raise RecipeError(
                "this adapter sits on weights with other adapters merged into them, which nobody else has",
                where="--format adapter",
                hint="use --format hf: the merged weights have all of them",
            )
        checks: dict[str, Any] = {}
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(run.model / name, folder / name)
        _name_base(base, folder / "adapter_config.json")
    else:
        merged = asdict(_merge(base, run, emit, folder, facts))
        checks = {name: figure for name, figure in merged.items() if figure is not None}
        write_json(folder / "export.json", {"run": run.name, "checks": checks})
    base.tokenizer.save_pretrained(folder)
    facts.write(folder)
    write_atomic(folder / "README.md", model_card(run, recipe, form, checks))
    files = [path for path in folder.iterdir() if path.is_file()]
    return {"checks": checks, "files": sorted(p.name for p in files), "bytes": sum(p.stat().st_size for p in files)}


def _name_base(base: Base, config: Path) -> None:
    """The adapter's base by its hub id and commit where it has them: a path of this machine means nothing elsewhere."""
    if base.located.commit is not None:
        value = read_json(config)
        value |= {"base_model_name_or_path": base.recipe.model.path, "revision": base.located.commit}
        write_json(config, value)


def _merge(base: Base, run: Run, emit: Emitter, folder: Path, facts: ChatFacts) -> MergeChecks:
    scored = base.head == "scores"
    prompts = _pairs(base, emit) if scored else _prompts(base, emit, facts)
    outputs = _scores if scored else _logits
    emit.progress("export", 0, 4, "checks")
    policy = tuned_policy(base, run.model, precision=FLOAT32)
    expected = outputs(policy.model, prompts, policy.device)
    merged = policy.model.merge_and_unload() if adapters.is_adapter(run.model) else policy.model  # type: ignore[operator]
    in_memory = outputs(merged, prompts, policy.device)
    emit.progress("export", 1, 4, "checks")
    dtype = _own_dtype(base)
    _save(merged.to(dtype), folder, facts)
    del policy, merged
    emit.progress("export", 2, 4, "checks")
    own = base.recipe.model.model_copy(update={"init": "pretrained", "config_overrides": {}})
    device = load.find_device()
    again = load.load_weights(folder, own, dtype=torch.float32, device=device, head=base.head)
    from_files = outputs(again, prompts, device)
    emit.progress("export", 3, 4, "checks")
    changed, tensors, largest = _difference_from_base(base, again)
    checks = MergeChecks(
        prompts=len(prompts),
        merged_difference=_relative(expected, in_memory),
        file_difference=_relative(expected, from_files),
        same_top_token=None if scored else _same_top(expected, from_files),
        same_order=_same_order(expected[0], from_files[0]) if scored else None,
        changed_tensors=changed,
        tensors=tensors,
        largest_change=largest,
    )
    _judge(checks, EXACT_TOLERANCE if dtype == torch.float32 else ROUNDED_TOLERANCE)
    emit.progress("export", 4, 4, "checks")
    return checks


def _judge(checks: MergeChecks, file_tolerance: float) -> None:
    figures = ", ".join(f"{name} {value:.3g}" for name, value in asdict(checks).items() if value is not None)
    if not checks.merged_difference <= EXACT_TOLERANCE:
        raise CheckError(f"the merged weights do not give the logits of base plus adapter: {figures}", where="export")
    if not checks.file_difference <= file_tolerance:
        raise CheckError(f"the written files do not give the run's logits: {figures}", where="export")
    if not checks.changed_tensors:
        raise CheckError(
            f"the exported weights are the base's own: nothing was trained or merged: {figures}", where="export"
        )


def _prompts(base: Base, emit: Emitter, facts: ChatFacts) -> list[list[int]]:
    """Token ids of real prompts: held-out rows where there are any, else training rows; a stream has none, then its template's."""
    if not base.recipe.data.streaming:
        prepared = preparing.prepare(base.recipe, base.chat, emit)
        for side in ("test", "validation", "train"):
            store: SampleStore = prepared.side(side)
            questions = questions_of(store, PROMPTS)
            if questions:
                return [base.chat.prompt_ids(q.prompt, q.tools, thinking=facts.thinking) for q in questions]
            if len(store):
                return [sample.path(sample.leaves()[0])[0].tolist() for sample in islice(store, PROMPTS)]
    return [base.tokenizer(text)["input_ids"] for text in ("The model was exported.", "模型已导出。")]


def _pairs(base: Base, emit: Emitter) -> list[list[int]]:
    """Token ids of both answers, with their prompts, of held-out pairs where there are any, else of training pairs; a stream's
    pairs are gone, and a made-up one takes their place."""
    if not base.recipe.data.streaming:
        prepared = preparing.prepare(base.recipe, base.chat, emit)
        for side in ("test", "validation", "train"):
            store: SampleStore = prepared.side(side)
            if len(store):
                return [sample.path(leaf)[0].tolist() for sample in islice(store, PROMPTS) for leaf in sample.leaves()]
    asked = Message("user", "Was the model exported?")
    return [base.chat.whole_ids((asked, Message("assistant", text))) for text in ("The model was exported.", "No.")]


@torch.no_grad()
def _scores(model: nn.Module, paths: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """One tensor of the paths' scores, float32, on the CPU, their mean taken off: what counts is how they differ."""
    model.eval()
    found = [model(torch.as_tensor([list(ids)], device=device), use_cache=False).logits[0] for ids in paths]
    score_P = torch.cat(found).float().cpu()
    return [score_P - score_P.mean()]


def _same_order(expected_P: Tensor, got_P: Tensor) -> float:
    """Chosen and rejected stand side by side."""
    gaps = [score_P[0::2] - score_P[1::2] for score_P in (expected_P, got_P)]
    return float(((gaps[0] > 0) == (gaps[1] > 0)).float().mean())


@torch.no_grad()
def _logits(model: nn.Module, prompts: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """Logits [T, V] of each prompt, float32, on the CPU."""
    model.eval()
    return [
        model(torch.as_tensor([list(ids)], device=device), use_cache=False).logits[0].float().cpu() for ids in prompts
    ]


def _relative(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-6)) for a, b in zip(expected, got, strict=True))


def _same_top(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    same = [(a.argmax(-1) == b.argmax(-1)).float() for a, b in zip(expected, got, strict=True)]
    return float(torch.cat(same).mean())


def _own_dtype(base: Base) -> torch.dtype:
    """The type the base's config states, which its files are in; float32 where it states none."""
    config = AutoConfig.from_pretrained(base.located.folder, trust_remote_code=base.recipe.model.trust_remote_code)
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32


def _save(model: nn.Module, folder: Path, facts: ChatFacts) -> None:
    if score_layer(model) is not None:  # it generates nothing
        adapters.save(model, folder)
        return
    generation = GenerationConfig.from_model_config(model.config)
    current = getattr(model, "generation_config", None) or generation
    current.eos_token_id = facts.stop_ids
    if current.temperature or current.top_p or current.top_k:
        current.do_sample = True  # sampling settings without it are refused when written
    model.generation_config = current
    adapters.save(model, folder)


def _difference_from_base(base: Base, exported: nn.Module) -> tuple[int, int, float]:
    """(tensors that differ, tensors, largest change of a weight) against the base's weights, rounded as the export's are."""
    dtype = _own_dtype(base)
    original = base_weights(base, FLOAT32, torch.device("cpu"), quantise=False).state_dict()
    own: Mapping[str, Tensor] = exported.state_dict()
    changes = [
        float((tensor.cpu().float() - original[name].to(dtype).float()).abs().max())
        for name, tensor in own.items()
        if name in original and original[name].shape == tensor.shape
    ]
    return sum(change > 0 for change in changes), len(changes), max(changes, default=0.0)
