"""Optimizers by the names transformers uses, and `muon`: a recipe's `train` section -> a torch optimizer.

What the names mean is in `recipe/optimizers.json`. Classes and their arguments are those transformers' Trainer takes, so that a
name trains here as it does there, with one difference: no key of the recipe is dropped (the Trainer gives GaLore no betas and no
epsilon).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from tunedock.errors import DependencyError, RecipeError
from tunedock.plan.steps import warmup_steps
from tunedock.recipe.optimizers import table, why_not
from tunedock.recipe.schema import Train
from tunedock.train.groups import parameter_groups
from tunedock.train.muon import MuonWithAdamW
from tunedock.train.parameter_kinds import hidden_matrices, targeted_matrices

Named = Sequence[tuple[str, nn.Parameter]]
Groups = Callable[[Named], list[dict[str, Any]]]

_FUSED = ("cpu", "cuda")
"""Devices on which one kernel updates all of AdamW's parameters; elsewhere PyTorch chooses."""

_MUON_ARGS: Mapping[str, type] = {
    "momentum": float,
    "ns_steps": int,
    "nesterov": bool,
    "adjust_lr_fn": str,
    "eps": float,
}
_LOW_RANK_ARGS: Mapping[str, type] = {"rank": int, "update_proj_gap": int, "scale": float, "proj_type": str}
_APOLLO_ARGS: Mapping[str, type] = {**_LOW_RANK_ARGS, "proj": str, "scale_type": str}

_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_NOT_A: Mapping[type, str] = {bool: "neither true nor false", int: "no whole number", float: "no number"}


def require_optimizer(train: Train) -> None:
    """Raises RecipeError for a name that is not taken and DependencyError when its package is missing: before anything is read."""
    if (said := why_not(train.optim)) is not None:
        raise RecipeError(said[0], where="train.optim", hint=said[1])
    facts = table()[train.optim]
    if facts.module is not None and find_spec(facts.module) is None:
        raise DependencyError(
            f"`{train.optim}` needs the package {facts.package}, which is not installed",
            where="train.optim",
            hint=f"`{facts.install}`, or use adamw_torch",
        )


def make_optimizer(
    named: Named,
    train: Train,
    *,
    model: nn.Module | None = None,
    total_steps: int = 1,
    loraplus_lr_ratio: float | None = None,
) -> torch.optim.Optimizer:
    """The optimizer `train.optim` names, over the groups of `train.groups`.

    `model` tells embeddings and heads from hidden matrices; `total_steps` is what a warm-up given as a share is a share of. Raises
    RecipeError for an unknown name and unknown arguments, DependencyError when the optimizer's package is missing.
    """
    require_optimizer(train)
    if train.learning_rate is None:
        raise ValueError("train.learning_rate is filled in by recipe.resolve")
    groups = partial(
        parameter_groups,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        loraplus_lr_ratio=loraplus_lr_ratio,
    )
    if train.optim in ("adamw_torch", "adamw_torch_fused") and not train.optim_args:
        fused = train.optim == "adamw_torch_fused" or all(p.device.type in _FUSED for _, p in named) or None
        return torch.optim.AdamW(groups(named), lr=train.learning_rate, **_adam(train), fused=fused)
    if train.optim.startswith("paged_ademamix") and any(p.device.type == "cpu" for _, p in named):
        raise DependencyError(
            f"bitsandbytes has `{train.optim}` on CUDA only",
            where="train.optim",
            hint=f"use {train.optim.removeprefix('paged_').removesuffix('_32bit')}",
        )
    try:
        if train.optim == "muon":
            return _muon(named, train, model, groups)
        if table()[train.optim].low_rank is not None:
            return _low_rank(named, train, model, groups)
        return _by_transformers(named, train, total_steps, groups)
    except (ImportError, RuntimeError) as error:
        raise DependencyError(
            f"the optimizer needs a package or a device that is not here: {_first(error)}",
            where=f"train.optim: {train.optim}",
            hint="install it, or use adamw_torch",
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise RecipeError(f"the optimizer refuses: {_first(error)}", where=f"train.optim: {train.optim}") from None


def _split(named: Named, chosen: Sequence[str]) -> tuple[Named, Named]:
    names = set(chosen)
    return [pair for pair in named if pair[0] in names], [pair for pair in named if pair[0] not in names]


def _adam(train: Train) -> dict[str, Any]:
    return {"betas": (train.adam_beta1, train.adam_beta2), "eps": train.adam_epsilon}


def _muon(named: Named, train: Train, model: nn.Module | None, groups: Groups) -> torch.optim.Optimizer:
    matrices, rest = _split(named, hidden_matrices(named, model))
    made = [{**group, "muon": True} for group in groups(matrices)]
    made += [{**group, "muon": False} for group in groups(rest)]
    settings = {"adjust_lr_fn": "match_rms_adamw", **_arguments(train, _MUON_ARGS)}
    return MuonWithAdamW(made, lr=train.learning_rate or 0.0, muon=settings, adamw=_adam(train))


def _low_rank(named: Named, train: Train, model: nn.Module | None, groups: Groups) -> torch.optim.Optimizer:
    """GaLore (Zhao et al. 2024, arXiv 2403.03507) or APOLLO (Zhu et al. 2024, arXiv 2412.05270) for the targeted matrices."""
    chosen = targeted_matrices(named, model, train.optim_target_modules)
    if not chosen:
        raise RecipeError(
            "no trained matrix has such a name",
            where=f"train.optim_target_modules: {train.optim_target_modules}",
            hint="leave it out for the matrices of attention and feed-forward parts; `all-linear` takes all of hidden layers",
        )
    targeted, rest = _split(named, chosen)
    common: dict[str, Any] = {"lr": train.learning_rate}
    if train.optim.startswith("apollo"):
        from apollo_torch import APOLLOAdamW as Kind

        defaults: dict[str, Any] = {"rank": 128, "update_proj_gap": 200, "scale": 1.0, "proj_type": "std"}
        defaults |= {"proj": "random", "scale_type": "channel"}
        rank = {**defaults, **_arguments(train, _APOLLO_ARGS)}
    else:
        from galore_torch import GaLoreAdafactor, GaLoreAdamW

        Kind = GaLoreAdafactor if train.optim == "galore_adafactor" else GaLoreAdamW
        defaults = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
        rank = {**defaults, **_arguments(train, _LOW_RANK_ARGS)}
    if train.optim == "galore_adafactor":
        common |= {"scale_parameter": False, "relative_step": False}
    else:
        common |= {**_adam(train), "no_deprecation_warning": True}
    low = [{**group, **rank} for group in groups(targeted)]
    optimizer: torch.optim.Optimizer = Kind([*groups(rest), *low], **common)
    return optimizer


def _by_transformers(named: Named, train: Train, total_steps: int, groups: Groups) -> torch.optim.Optimizer:
    """The class and the arguments the Trainer takes."""
    from transformers import Trainer, TrainingArguments

    _pairs(train)
    shared = TrainingArguments(
        output_dir="unused",
        optim=train.optim,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_epsilon=train.adam_epsilon,
        warmup_steps=warmup_steps(train.warmup_steps, total_steps),
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    _, plain = Trainer.get_optimizer_cls_and_kwargs(shared)
    shared.optim_args = train.optim_args
    kind, keywords = Trainer.get_optimizer_cls_and_kwargs(shared)
    if train.optim_args and keywords == plain:
        raise RecipeError(
            f"`{train.optim}` does not use them", where=f"train.optim_args: {train.optim_args}", hint="drop them"
        )
    optimizer: torch.optim.Optimizer = kind(groups(named), **keywords)
    return optimizer


def _pairs(train: Train) -> dict[str, str]:
    parts = [part.strip() for part in (train.optim_args or "").split(",") if part.strip()]
    if not all("=" in part for part in parts):
        raise RecipeError(
            "the optimizer's arguments are `key=value,key=value`", where=f"train.optim_args: {train.optim_args}"
        )
    return {key.strip(): value.strip() for key, _, value in (part.partition("=") for part in parts)}


def _arguments(train: Train, kinds: Mapping[str, type]) -> dict[str, Any]:
    """`train.optim_args` as the values they are. Raises RecipeError for a key the optimizer does not know."""
    found: dict[str, Any] = {}
    for key, text in _pairs(train).items():
        if key not in kinds:
            raise RecipeError(
                f"`{train.optim}` has no argument `{key}`",
                where=f"train.optim_args: {train.optim_args}",
                hint=f"it knows {', '.join(sorted(kinds))}",
            )
        kind = kinds[key]
        try:
            found[key] = _BOOLEANS[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            raise RecipeError(
                f"`{key}={text}` is {_NOT_A[kind]}",
                where=f"train.optim_args: {train.optim_args}",
            ) from None
    return found


def _first(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
