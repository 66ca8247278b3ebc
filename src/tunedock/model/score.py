"""A reward model: transformers' sequence classifier with one label, and the score it gives at chosen places of a row.

It is the checkpoint the whole field loads: the decoder, and in place of the output layer a vector `score.weight` of the hidden
size, without a bias. transformers reads the score at a line's last token that is not padding, which in a row of many paths means
nothing; so for the call the layer's forward is replaced, as `model.head` replaces the output layer's, and gives the score at each
place asked for. It is computed in float32 whatever the products before it are computed in: what counts is the difference of two
scores.

Shapes: B lines, T tokens a line, N chosen places, D hidden size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig, PreTrainedTokenizerBase

from tunedock.errors import ModelError
from tunedock.model.head import beside

LAYER = "score"
"""What most of transformers' classifiers on decoders call the layer, and PEFT saves with an adapter of type SEQ_CLS."""


class ScoreHead:
    """The score layer of a reward model, asked for chosen places while a row is in the model."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._plain_forward = layer.forward
        layer.forward = self._forward
        self._flat_N: Tensor | None = None
        self._score_N: Tensor | None = None
        self._every_T: Tensor | None = None

    def choose(self, flat_N: Tensor) -> None:
        """Sets the places (line * T + position) of the next call."""
        self._flat_N, self._score_N = flat_N, None

    def take(self, output: Tensor) -> Tensor:
        """The scores [N], float32, of the call since `choose`. `output`: what the model then made of its "logits", which stays in
        the graph and is not read (`model.head.beside`)."""
        score_N, self._score_N, self._flat_N = self._score_N, None, None
        if score_N is None:
            raise RuntimeError("the model did not call its score layer")
        return beside(score_N, output)

    def take_every(self) -> Tensor:
        """The scores, float32, of all tokens of the last call, one line after the other, which was made without `choose`."""
        every_T, self._every_T = self._every_T, None
        if every_T is None:
            raise RuntimeError("the model did not call its score layer")
        return every_T

    def _forward(self, hidden_BTD: Tensor) -> Tensor:
        if self._flat_N is None:
            scores_BT1: Tensor = self._plain_forward(hidden_BTD)
            self._every_T = scores_BT1.detach().float().reshape(-1)
            return scores_BT1
        hidden_XD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        # A rank without any still takes part.
        asked_N = self._flat_N if len(self._flat_N) else self._flat_N.new_zeros(1)
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            score_N1: Tensor = self._plain_forward(hidden_XD.index_select(0, asked_N).to(self._type()))
            score_N = score_N1[:, 0].float()
        self._score_N = score_N[: len(self._flat_N)]
        return score_N.sum().expand(*hidden_BTD.shape[:2], 1)  # the model picks a place of each line, whatever is there

    def _type(self) -> torch.dtype:
        return next(self._layer.parameters()).dtype


def score_layer(model: nn.Module) -> nn.Module | None:
    """The layer that gives a reward model's one score; None where the model is no such model."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    layer = getattr(inner, LAYER, None)
    return layer if isinstance(layer, nn.Module) and getattr(inner, "num_labels", None) == 1 else None


def require_classifier(folder: Path, *, code: bool) -> bool:
    """Whether the model in a folder is a reward model already, and not a causal one that is to become one.

    `code`: the model's own may run. Raises ModelError where transformers has no sequence classifier of the architecture, or the
    folder's has another number of labels than one.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=code)
    named = "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and not (code and named):
        raise ModelError(
            f"transformers has no sequence classifier of the architecture `{config.model_type}`, and a reward model is one",
            where=str(folder),
            hint="take a base of another architecture: llama, qwen3, gemma3_text, mistral and many others have one",
        )
    classifies = any("ForSequenceClassification" in name for name in config.architectures or ())
    if classifies and config.num_labels != 1:
        raise ModelError(
            f"the model is a classifier with {config.num_labels} labels; a reward model has one",
            where=str(folder),
            hint="take a reward model (`num_labels: 1` in its config.json), or a causal language model to begin one from",
        )
    return classifies


def require_score_layer(model: nn.Module) -> nn.Module:
    """Raises ModelError where the classifier has no layer whose scores can be read from a row."""
    layer = score_layer(model)
    if layer is None:
        raise ModelError(
            f"{type(model).__name__} has no layer `{LAYER}` with one output, so its scores cannot be read from a row",
            hint="take a base of another architecture: llama, qwen3, gemma3_text, mistral and many others have one",
        )
    return layer


def begin_score(model: nn.Module, *, seed: int, made_up: bool) -> nn.Module:
    """Puts the score layer into float32 and, where it was `made_up`, draws it: as transformers would, but the same on every device.

    Raises ModelError where it was made up and the classifier has no layer of that name.
    """
    layer = require_score_layer(model) if made_up else score_layer(model)
    if layer is not None:
        layer.float()
    if made_up and layer is not None:
        spread = float(getattr(model.config.get_text_config(), "initializer_range", None) or 0.02)  # type: ignore[union-attr, operator]
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                values = torch.randn(parameter.shape, generator=draw) * spread if name == "weight" else torch.zeros(1)
                parameter.copy_(values)
    return model


def set_padding(tokenizer: PreTrainedTokenizerBase, end_id: int) -> None:
    """Gives the tokenizer a padding token that no rendered conversation ends with, where it has none such; none where none can be.

    transformers reads a score at the last token that is not padding: with the end of an answer for padding (a habit with tokenizers
    that have none) it would read the one before. `end_id`: the last token of a rendering.
    """
    tokens = (tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token)
    fitting = (token for token in tokens if token and tokenizer.convert_tokens_to_ids(token) != end_id)
    if (chosen := next(fitting, None)) != tokenizer.pad_token:
        tokenizer.pad_token = chosen


def share_padding(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives the model's config the tokenizer's padding; without any, transformers refuses batches of more than one line."""
    text_config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    text_config.pad_token_id = tokenizer.pad_token_id
