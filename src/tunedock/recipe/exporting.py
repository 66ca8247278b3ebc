"""What an export is told: the request of the stage `export`, made in one plane and read in the other."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from tunedock.errors import RecipeError
from tunedock.recipe.section import Section

Format = Literal["hf", "adapter", "gguf", "ollama"]
FORMATS: tuple[Format, ...] = ("hf", "adapter", "gguf", "ollama")

HF_KINDS = ("int8", "int4", "int8-dynamic", "nf4", "gptq", "awq")
GGUF_FLOATS = ("f32", "f16", "bf16")
GGUF_KINDS = (*GGUF_FLOATS, "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q4_0", "q3_k_m", "q2_k")
"""Those that are named in messages; llama.cpp's quantiser knows further ones of the same pattern."""

_GGUF = re.compile(r"q[2-8]_(?:k(?:_[sml])?|[01])")

ParameterName = Literal["temperature", "top_p", "top_k", "min_p", "repeat_penalty", "num_ctx", "num_predict", "seed"]


class Order(Section):
    """One export."""

    to: str
    """Absolute; a folder that is new or empty."""
    format: Format = "hf"
    quantize: str | None = None
    """None: the weights as they are (hf), `f16` (gguf, ollama)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the merged weights (hf); `auto` is that of the base's files."""
    max_shard_size: Annotated[str, Field(pattern=r"^\d+(?:\.\d+)?(?:KB|MB|GB|KIB|MIB|GIB)$")] = "5GB"
    max_perplexity_change: Annotated[float, Field(gt=0)] | None = None
    """Relative; None: by the kind of file."""
    system: str | None = None
    """System prompt of the Ollama model; None: the run's own, where its data had one for all."""
    parameters: dict[ParameterName, float | PositiveInt] = {}
    """Of the Ollama model, beside those of the model's generation config."""
    push: str | None = None
    """Where the folder is sent when it has passed: a hub's repository (`hf://owner/name`) or a store's URL."""

    @property
    def kind(self) -> str:
        """What the weights become, by name."""
        if self.quantize is not None:
            return self.quantize
        return "f16" if self.format in ("gguf", "ollama") else "as trained"

    @property
    def exact(self) -> bool:
        """Whether the weights keep their values but for the rounding of a float."""
        return self.kind in ("as trained", *GGUF_FLOATS)


def check(order: Order) -> None:
    """Raises RecipeError for what does not go together."""
    gguf = order.format in ("gguf", "ollama")
    if order.quantize is not None:
        if order.format == "adapter":
            raise RecipeError(
                "an adapter alone stays in the numbers it was trained in",
                where="--quantize",
                hint="use --format hf or gguf",
            )
        known = (
            order.quantize in GGUF_KINDS or bool(_GGUF.fullmatch(order.quantize))
            if gguf
            else order.quantize in HF_KINDS
        )
        if not known:
            other = order.quantize in (HF_KINDS if gguf else GGUF_KINDS)
            raise RecipeError(
                f"`{order.quantize}` is no kind of --format {order.format}",
                where="--quantize",
                hint=f"it is one of --format {'hf' if gguf else 'gguf'}; here: {', '.join(GGUF_KINDS if gguf else HF_KINDS)}"
                if other
                else f"one of {', '.join(GGUF_KINDS if gguf else HF_KINDS)}",
            )
    for option, given, formats in (
        ("--dtype", order.dtype != "auto", ("hf",)),
        ("--max-shard-size", order.max_shard_size != "5GB", ("hf",)),
        ("--system", order.system is not None, ("ollama",)),
        ("--parameter", bool(order.parameters), ("ollama",)),
    ):
        if given and order.format not in formats:
            raise RecipeError(
                f"it says nothing of --format {order.format}", where=option, hint=f"it is for --format {formats[0]}"
            )
