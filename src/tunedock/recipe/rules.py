"""What single keys cannot say: rules that span sections, a row of the table each, and a test each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from tunedock.recipe.data_images import SCHEME, images_of, is_revision
from tunedock.recipe.document import Key
from tunedock.recipe.optimizers import why_not
from tunedock.recipe.problems import Problem, error_of
from tunedock.recipe.rule import Rule
from tunedock.recipe.rules_adapters import ADAPTER_RULES
from tunedock.recipe.rules_containers import CONTAINER_RULES
from tunedock.recipe.rules_engine import ENGINE_RULES
from tunedock.recipe.rules_objectives import OBJECTIVE_RULES
from tunedock.recipe.rules_parallel import PARALLEL_RULES
from tunedock.recipe.rules_training import TRAINING_RULES
from tunedock.recipe.schema import Recipe, Source

_SERVER = ("http://", "https://")


def _nothing_to_evaluate(recipe: Recipe) -> bool:
    """Neither files for validation nor a share of the training data."""
    return not recipe.data.validation and recipe.data.split.validation == 0


def _watches(recipe: Recipe) -> bool:
    return recipe.train.load_best_model_at_end or recipe.train.early_stopping_patience is not None


def _batch_sizes_differ(recipe: Recipe) -> bool:
    """`launch.processes` is filled in where the rules are checked (`recipe.resolve`)."""
    train = recipe.train
    if train.batch_size is None or train.per_device_train_batch_size is None:
        return False
    step = train.per_device_train_batch_size * (train.gradient_accumulation_steps or 1)
    return train.batch_size != step * recipe.launch.devices(0)


def _sources(recipe: Recipe) -> Iterator[Source]:
    yield from (*recipe.data.train, *recipe.data.validation, *recipe.data.test)


def _remote(path: str) -> bool:
    return "://" in path and not path.startswith(("file://", "local://", "memory://", SCHEME))


def _revision_of_no_image(recipe: Recipe) -> bool:
    return any(source.revision and not is_revision(source.revision) for source in images_of(recipe))


RULES: tuple[Rule, ...] = (
    *ADAPTER_RULES,
    *OBJECTIVE_RULES,
    *ENGINE_RULES,
    *TRAINING_RULES,
    *PARALLEL_RULES,
    *CONTAINER_RULES,
    Rule(
        name="overrides-of-a-trained-config",
        keys=("model.config_overrides", "model.init"),
        broken=lambda r: bool(r.model.config_overrides) and r.model.init != "random",
        message="`model.config_overrides` would change the shape of a model that is already trained",
        hint="set `model.init: random`, or drop `model.config_overrides`",
    ),
    Rule(
        name="two-precisions",
        keys=("train.fp16", "train.bf16"),
        broken=lambda r: r.train.fp16 and r.train.bf16 is True,
        message="`train.bf16` and `train.fp16` are both true",
        hint="keep one; bf16 where the device has it",
    ),
    Rule(
        name="split-sum",
        keys=("data.split.train", "data.split.validation", "data.split.test"),
        broken=lambda r: abs(r.data.split.train + r.data.split.validation + r.data.split.test - 1.0) > 1e-9,
        message="the shares of `data.split` do not add up to 1",
        hint="give all three, or leave out `data.split.train`: it takes what the other two leave",
    ),
    Rule(
        name="split-without-training",
        keys=("data.split.train",),
        broken=lambda r: r.data.split.train == 0,
        message="`data.split.train: 0` leaves nothing to train on",
        hint="give the other shares less than 1 together",
    ),
    Rule(
        name="validation-twice",
        keys=("data.split.validation", "data.validation"),
        broken=lambda r: (
            bool(r.data.validation) and "validation" in r.data.split.model_fields_set and r.data.split.validation > 0
        ),
        message="`data.validation` gives files, and `data.split.validation` takes a share of the training data as well",
        hint="drop one of the two",
    ),
    Rule(
        name="test-twice",
        keys=("data.split.test", "data.test"),
        broken=lambda r: bool(r.data.test) and "test" in r.data.split.model_fields_set and r.data.split.test > 0,
        message="`data.test` gives files, and `data.split.test` takes a share of the training data as well",
        hint="drop one of the two",
    ),
    Rule(
        name="streaming-without-end",
        keys=("data.streaming", "train.max_steps"),
        broken=lambda r: r.data.streaming and r.train.max_steps <= 0,
        message="nobody knows how many rows a stream has, so its epochs have no length",
        hint="set `train.max_steps`",
    ),
    Rule(
        name="no-steps",
        keys=("train.max_steps",),
        broken=lambda r: r.train.max_steps == 0,
        message="`train.max_steps: 0` trains nothing",
        hint="leave it out to train by epochs",
    ),
    Rule(
        name="batch-sizes-differ",
        keys=(
            "train.batch_size",
            "train.per_device_train_batch_size",
            "train.gradient_accumulation_steps",
            "launch.nodes",
            "launch.processes",
        ),
        broken=_batch_sizes_differ,
        message="`train.batch_size` is not `per_device_train_batch_size` times `gradient_accumulation_steps` times the processes",
        hint="keep `train.batch_size` only: the micro-batches are planned",
    ),
    Rule(
        name="accumulation-alone",
        keys=("train.gradient_accumulation_steps",),
        broken=lambda r: (
            r.train.gradient_accumulation_steps is not None and r.train.per_device_train_batch_size is None
        ),
        message="`train.gradient_accumulation_steps` alone does not say how many examples a step takes",
        hint="set `train.batch_size` and drop it: the micro-batches are planned",
    ),
    Rule(
        name="warmup-not-whole",
        keys=("train.warmup_steps",),
        broken=lambda r: r.train.warmup_steps >= 1 and not r.train.warmup_steps.is_integer(),
        message="`train.warmup_steps` is a share of all steps below 1, and a whole number of steps from 1 on",
        hint="write for example 0.03 or 100",
    ),
    Rule(
        name="warmup-longer-than-training",
        keys=("train.warmup_steps", "train.max_steps"),
        broken=lambda r: 0 < r.train.max_steps < r.train.warmup_steps,
        message="the warm-up is longer than the training, so the learning rate is never reached",
        hint="lower `train.warmup_steps`, or give it as a share such as 0.03",
    ),
    Rule(
        name="evaluation-without-data",
        keys=("train.eval_strategy", "data.split.validation"),
        broken=lambda r: (
            "eval_strategy" in r.train.model_fields_set
            and r.train.eval_strategy != "no"
            and not _watches(r)
            and _nothing_to_evaluate(r)
        ),
        message="there is no validation data to evaluate on",
        hint="give `data.split.validation` a share, or files in `data.validation`, or set `train.eval_strategy: no`",
    ),
    Rule(
        name="eval-steps-unused",
        keys=("train.eval_steps", "train.eval_strategy"),
        broken=lambda r: r.train.eval_steps is not None and r.train.eval_strategy != "steps",
        message="`train.eval_steps` counts only with `train.eval_strategy: steps`",
        hint="set `train.eval_strategy: steps`, or drop `train.eval_steps`",
    ),
    Rule(
        name="best-without-evaluation",
        keys=("train.load_best_model_at_end", "train.eval_strategy"),
        broken=lambda r: r.train.load_best_model_at_end and r.train.eval_strategy == "no",
        message="`train.load_best_model_at_end` needs evaluations to tell the best",
        hint="set `train.eval_strategy: epoch`",
    ),
    Rule(
        name="best-without-data",
        keys=("train.load_best_model_at_end", "data.split.validation"),
        broken=lambda r: r.train.load_best_model_at_end and r.train.eval_strategy != "no" and _nothing_to_evaluate(r),
        message="`train.load_best_model_at_end` needs validation data to tell the best",
        hint="give `data.split.validation` a share, or files in `data.validation`",
    ),
    Rule(
        name="best-without-checkpoints",
        keys=("train.load_best_model_at_end", "train.save_strategy"),
        broken=lambda r: r.train.load_best_model_at_end and r.train.save_strategy == "no",
        message="`train.load_best_model_at_end` needs checkpoints to go back to",
        hint="set `train.save_strategy: epoch`",
    ),
    Rule(
        name="patience-without-evaluation",
        keys=("train.early_stopping_patience", "train.eval_strategy"),
        broken=lambda r: r.train.early_stopping_patience is not None and r.train.eval_strategy == "no",
        message="`train.early_stopping_patience` counts evaluations, and there are none",
        hint="set `train.eval_strategy: epoch`",
    ),
    Rule(
        name="patience-without-data",
        keys=("train.early_stopping_patience", "data.split.validation"),
        broken=lambda r: (
            r.train.early_stopping_patience is not None and r.train.eval_strategy != "no" and _nothing_to_evaluate(r)
        ),
        message="`train.early_stopping_patience` counts evaluations, and there is no validation data",
        hint="give `data.split.validation` a share, or files in `data.validation`",
    ),
    Rule(
        name="unknown-hub",
        keys=("hub",),
        broken=lambda r: r.hub not in ("hf", "modelscope") and not r.hub.startswith(_SERVER),
        message="`hub` is `hf`, `modelscope`, or the URL of a Hugging Face mirror",
        hint="a URL begins with https://",
    ),
    Rule(
        name="offline-with-a-mirror",
        keys=("offline", "hub"),
        broken=lambda r: r.offline and r.hub.startswith(_SERVER),
        message="`offline: true` touches no network, and `hub` names a server",
        hint="drop one of the two",
    ),
    Rule(
        name="offline-with-a-url",
        keys=("offline", "data.train"),
        broken=lambda r: r.offline and any(_remote(source.path) for source in _sources(r)),
        message="`offline: true` touches no network, and data are read from a URL",
        hint="copy the data to the disk, or drop `offline`",
    ),
    Rule(
        name="revision-of-a-data-image",
        keys=("data.train",),
        broken=_revision_of_no_image,
        message="the `revision` of data in an image is `sha256:` and 64 hex digits",
        hint="`tunedock data image` and `tunedock image inspect` tell it; a tag or a digest of the image stands in its name",
    ),
)


def check(recipe: Recipe, where: Callable[[Key], str | None] = lambda _: None) -> None:
    """Raises one RecipeError with every rule the recipe breaks.

    `where` tells the place a key was written, None for a default: the error points at the first key that was.
    """
    problems = []
    for rule in RULES:
        if rule.broken(recipe):
            places = [where(tuple(key.split("."))) for key in rule.keys]
            given = ", ".join(f"`{key}: {_value(recipe, key)}`" for key in rule.keys)
            place = next((place for place in places if place), rule.keys[0])
            problems.append(Problem(f"{rule.message} ({given})", place, rule.hint))
    if (said := why_not(recipe.train.optim)) is not None:
        problems.append(Problem(f"`train.optim`: {said[0]}", where(("train", "optim")), said[1]))
    if problems:
        raise error_of(problems)


def _value(recipe: Recipe, key: str) -> str:
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part)
    if isinstance(value, list):
        return ", ".join(item.path if isinstance(item, Source) else str(item) for item in value)
    return value if isinstance(value, str) else json.dumps(value)
