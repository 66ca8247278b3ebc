"""Base weights and tokenizer of a recipe, on a device, in a precision."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from tunedock.errors import DependencyError, ModelError
from tunedock.model.hub import Located, locate
from tunedock.model.policy import Precision
from tunedock.model.score import LAYER, begin_score, require_classifier
from tunedock.plan.cards import cpu_has_bf16
from tunedock.plan.memory import numbers
from tunedock.recipe.schema import Model, Recipe

TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
"""What a tokenizer can be made from, one of them at least."""

PICKLED_WEIGHTS = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")

CPU = torch.device("cpu")

Head = Literal["logprobs", "scores"]
"""What a model is asked for: a causal language model's log-probabilities, or a reward model's scores."""


def find_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def roomy_device(folder: Path, *, spare: float = 1.3) -> torch.device:
    """The device that a folder's weights fit on in float32, and `spare` times their bytes: the usual one, or the CPU."""
    device = find_device()
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    return device if 4 * parameters_of(folder) * spare <= free else CPU


def parameters_of(folder: Path) -> int:
    """Numbers in a folder's weights, by the headers of its safetensors files."""
    parameters = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            parameters += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118 - no mapping
    return parameters


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 products are native there; emulated ones are slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return cpu_has_bf16()
    return False


def precision(recipe: Recipe, device: torch.device) -> Precision:
    """What weights are held in and what products are computed in (`plan.memory.numbers`)."""
    weights, compute = numbers(recipe, bf16=has_bf16(device))
    return Precision(weights=getattr(torch, weights), compute=getattr(torch, compute))


def locate_base(recipe: Recipe, *, weights: bool = True) -> Located:
    model = recipe.model
    return locate(
        model.path,
        revision=model.revision,
        hub=recipe.hub,
        offline=recipe.offline,
        code=model.trust_remote_code,
        weights=weights,
    )


def load_tokenizer(folder: Path, model: Model) -> PreTrainedTokenizerBase:
    """The tokenizer, with `model.chat_template` in place of its own when the recipe gives one. It must be a fast one."""
    if not any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES):
        # transformers would make an empty one from config.json, which reads every text as nothing.
        raise ModelError(
            "the folder has no tokenizer",
            where=str(folder),
            hint="copy tokenizer.json and tokenizer_config.json of the model into it",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # policy: whatever the tokenizer's files make the library raise, they are at fault
        raise ModelError(
            f"the tokenizer cannot be read: {_first_line(error)}",
            where=str(folder),
            hint="is tokenizer.json whole? fetch it again, with tokenizer_config.json",
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError("only a slow tokenizer; character offsets need a fast one (tokenizer.json)", where=str(folder))
    if model.chat_template is not None:
        try:
            tokenizer.chat_template = Path(model.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(
                f"the chat template cannot be read: {error}", where=f"model.chat_template: {model.chat_template}"
            ) from None
    return tokenizer


def load_weights(
    folder: Path,
    model: Model,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    quantization: Any = None,
    head: Head = "logprobs",
    empty: bool = False,
) -> nn.Module:
    """The causal language model of a folder, in eval mode. Safetensors only: other weight files can run code.

    `empty`: only the model's shape, its parameters on the meta device and its buffers on the CPU.
    `head: scores` makes it a reward model: with a new score layer drawn by `seed` where the folder's is not one already.
    `quantization`: transformers' configuration of it, for weights that are to be held in fewer bits. A checkpoint that holds them
    so itself is read by the library its config names; DependencyError where that is not installed.
    """
    held = held_in(require_config(folder))
    auto: Any = AutoModelForCausalLM
    labels, made_up = {}, False
    if head == "scores":
        made_up = not _is_classifier(folder, model)
        auto, labels = AutoModelForSequenceClassification, {"num_labels": 1}
    if model.init != "random" and not empty:
        _require_whole_weights(folder)
    try:
        if model.init == "random" or empty:
            torch.manual_seed(seed)
            config = AutoConfig.from_pretrained(
                folder, trust_remote_code=model.trust_remote_code, **labels, **model.config_overrides
            )
            with init_empty_weights(include_buffers=False) if empty else nullcontext():
                made = auto.from_config(config, dtype=dtype, trust_remote_code=model.trust_remote_code)
            made.tie_weights()
        else:
            made, report = auto.from_pretrained(
                folder,
                **labels,
                dtype=dtype,
                trust_remote_code=model.trust_remote_code,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # told below, by name
                output_loading_info=True,
                **({} if quantization is None else {"quantization_config": quantization}),
                **({} if quantization is None and held is None else {"device_map": {"": device}}),
            )
            _require_all_loaded(folder, report, but=f"{LAYER}." if made_up else None)
        if head == "scores" and not empty:
            begin_score(made, seed=seed, made_up=made_up)
    except (torch.OutOfMemoryError, ModelError):
        raise
    except Exception as error:  # policy: whatever the model's files make the library raise, they are at fault
        if held is not None and isinstance(error, ImportError):
            raise DependencyError(
                f"the weights are held in {held}, and what reads them is not installed: {_first_line(error)}",
                where=str(folder),
                hint="install what it names, or take the model's own weights with `quantize: nf4`",
            ) from error
        raise ModelError(
            f"the weights cannot be loaded: {_first_line(error)}",
            where=str(folder),
            hint="the folder needs config.json and *.safetensors of a causal language model"
            if held is None
            else f"not every machine reads {held}; the model's own weights with `quantize: nf4` are read by all",
        ) from error
    moved: nn.Module = made if empty or quantization is not None or held is not None else made.to(device)
    return moved.eval()


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Padding is masked wherever it stands, so any id serves; the tokenizer's own where it has one."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)


def _require_whole_weights(folder: Path) -> None:
    """Raises ModelError when there are no safetensors, or one of them is cut off."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(path.name for pattern in PICKLED_WEIGHTS for path in folder.glob(pattern))
        raise ModelError(
            f"the weights are pickled ({', '.join(pickled[:3])}), and reading pickle can run code"
            if pickled
            else "the folder has no weights (*.safetensors)",
            where=str(folder),
            hint="take a revision of the model that has *.safetensors, or, if you trust the file, convert it: "
            "`AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)`"
            if pickled
            else "fetch the model's *.safetensors, or train from nothing with `model.init: random`",
        )
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass  # the header tells how long the file must be
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"the file is cut off or damaged: {_first_line(error)}",
                where=str(file),
                hint="fetch or copy it again, and compare its size with the original's",
            ) from None


def _is_classifier(folder: Path, model: Model) -> bool:
    """As `score.require_classifier`, for a config that may be of no known architecture."""
    try:
        return require_classifier(folder, code=model.trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"the config cannot be read: {_first_line(error)}", where=str(folder)) from error


def _require_all_loaded(folder: Path, report: Mapping[str, Any], *, but: str | None = None) -> None:
    """Raises ModelError when weights were made up: transformers fills in what the files lack at random, with a printed remark.

    `but`: those whose names begin so may be.
    """
    missing, misfits = sorted(report["missing_keys"]), sorted(report["mismatched_keys"])
    missing = [name for name in missing if but is None or not name.startswith(but)]
    if misfits:
        name, in_file, by_config = misfits[0]
        raise ModelError(
            f"{len(misfits)} tensor(s) of the files do not have the shape config.json gives them, the first being {name}: "
            f"{list(in_file)} in the files, {list(by_config)} by the config",
            where=str(folder),
            hint="config.json and the weights are of different models; take both from one",
        )
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ModelError(
            f"the files lack {len(missing)} of the model's tensors: {shown}",
            where=str(folder),
            hint="is a *.safetensors file missing? is config.json the config of these weights, of a causal language model?",
        )


def held_in(config: Mapping[str, Any]) -> str | None:
    """How a checkpoint holds its weights in few bits, as its config.json says (`gptq`, `awq`, `bitsandbytes`); None where it holds
    them whole."""
    found = config.get("quantization_config")
    return str(found.get("quant_method", "few bits")) if isinstance(found, Mapping) else None


def require_config(folder: Path) -> Mapping[str, Any]:
    """What config.json holds. Raises ModelError when it is missing or damaged."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            "config.json is missing", where=str(folder), hint="point `model` at a folder with a model"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"config.json is damaged: {error}", where=str(folder), hint="fetch or copy it again") from None
    if not isinstance(config, dict):
        raise ModelError("config.json holds no object", where=str(folder))
    return config


def _first_line(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error} is missing in it"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
