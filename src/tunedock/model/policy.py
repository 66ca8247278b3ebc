"""A model as the loop sees it: samples in rows, log-probabilities of their chosen tokens out, or a reward model's scores there.

When a policy is made it is probed on a short made-up step, against what the untouched model gives for each path alone: the
replaced head must give the same values, and the leanest layout under which rows do, is the one that is used (tree, then
packed, then padded). What had to be given up is said. A model that fails even on padded rows cannot be trained on batches and is
refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tunedock.data.batch import RowTensors, to_device
from tunedock.data.layout import Kind, Row, for_ranks, lay_out
from tunedock.data.sample import Sample, Segment, single
from tunedock.errors import ModelError
from tunedock.model import attention, world
from tunedock.model.blocks import width_of
from tunedock.model.fp8 import widened_products
from tunedock.model.fused import Parts, fuse, fuse_with_liger
from tunedock.model.head import ChosenHead, PlainHead
from tunedock.model.noise import EmbeddingNoise
from tunedock.model.rope import regime_of
from tunedock.model.score import ScoreHead, score_layer

EXACT = 1e-3
"""Largest difference in log-probability, computed in float32, for two ways of computing the same thing. Of scores, which have no
unit, in their standard deviation over the probe's tokens."""

VALUE_HEAD = "value_head"
"""Its name in the model."""

ROUNDED = 0.3
"""The same where products are computed in 16 bits. The mean must also be well below what a leak between samples would do."""


@dataclass(frozen=True, slots=True)
class Precision:
    weights: torch.dtype
    compute: torch.dtype

    @property
    def scaled(self) -> bool:
        """float16 gradients need scaling."""
        return self.compute == torch.float16


class Policy:
    """A causal language model, or a reward model, and the way it is called. N chosen tokens of a row."""

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        precision: Precision,
        *,
        to_compile: bool = False,
        parts: Parts | None = None,
    ) -> None:
        """`to_compile`: the layers will go through PyTorch's compiler, which on the CPU cannot look into our own parts.
        `parts`: what can be fused, for a model whose weights are yet to come (`model.fused`)."""
        self.model = model
        self.called: nn.Module = model
        """What is called for a row: the model, or what stands around it and gathers its weights (DeepSpeed's engine)."""
        self.device = device
        self.precision = precision
        self.fused: list[str] = []
        """Parts of the model that are computed in one operation each."""
        if device.type != "cpu" or not to_compile:
            self.fuse(parts)
        self._unit = 1.0
        self.layout: Kind = "padded"
        """How samples become rows; `probe` finds the leanest that is exact."""
        self.has_base = hasattr(model, "disable_adapter")
        """Whether the model as it was before the run can be had by switching an adapter off."""
        self.weighted_sum = False
        """Whether the loss to come is a sum of the log-probabilities by their weights, which spares a trained output layer work."""
        self.noise: EmbeddingNoise | None = None
        """NEFTune's, in training mode."""
        layer = score_layer(model)
        self._score = None if layer is None else ScoreHead(layer)
        self._head = ChosenHead(model, self.config) if self._score is None else None
        self._plain = PlainHead()
        self._regime = regime_of(self.config.get_text_config())

    def at_temperature(self, temperature: float) -> None:
        """Log-probabilities are those of sampling at `temperature`, from here on."""
        if self._head is not None:
            self._head.at_temperature(temperature)
        self._plain.temperature = temperature

    def add_value_head(self) -> None:
        """A linear head on the last hidden states, trained with the rest, that begins by expecting nothing (0) anywhere.

        It belongs to the training alone: `drop_value_head` before the model is saved. Raises ModelError where the output layer
        could not be replaced, for the hidden states are met there.
        """
        if self._head is None:
            raise ModelError(
                "this model's output layer cannot be replaced, and a value head stands beside it",
                where="objective.kind: ppo",
                hint="`objective: grpo` or `rloo` need no value head",
            )
        width = int(self.config.get_text_config().hidden_size)
        head = nn.Linear(width, 1, bias=True, device=self.device, dtype=torch.float32)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        setattr(self.model, VALUE_HEAD, head)  # a part of the model: the optimizer and the checkpoints find it there
        self._head.value = head

    def drop_value_head(self) -> None:
        if self._head is not None and self._head.value is not None:
            self._head.value = self._head.value_N = None
            delattr(self.model, VALUE_HEAD)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def head(self) -> str:
        return "score" if self._score else "chosen" if self._head else "plain"

    @property
    def gives_scores(self) -> bool:
        """Whether it is a reward model: it gives scores, and no log-probabilities."""
        return self._score is not None

    def fuse(self, parts: Parts | None = None) -> None:
        """Replaces parts of the model by what computes them in one operation each."""
        on_cpu = self.device.type == "cpu"
        self.fused = fuse(self.model, parts) if on_cpu else fuse_with_liger(self.model, self.device)

    def rows(self, samples: Sequence[Sample], budget_tokens: int) -> list[Row]:
        """The step's samples as rows of at most `budget_tokens` slots; a single path may be longer. All ranks' rows, the same on
        each."""

        def within(tokens: int) -> list[Row]:
            return lay_out(samples, self.layout, budget_tokens=tokens, regime=self._regime)

        return for_ranks(within, budget_tokens, world.size())

    def logprobs(self, row: Row) -> tuple[Tensor, RowTensors]:
        """Log-probabilities [N], float32, of the row's chosen tokens, with the row's tensors."""
        self._require(scores=False)
        logprobs_N, tensors, _ = self._values(row)
        return logprobs_N, tensors

    def scores(self, row: Row) -> tuple[Tensor, RowTensors]:
        """Scores [N], float32, read at the row's chosen tokens themselves, with the row's tensors."""
        self._require(scores=True)
        scores_N, tensors, _ = self._values(row)
        return scores_N, tensors

    def _require(self, *, scores: bool) -> None:
        if self.gives_scores is not scores:
            what = "scores, and this is a causal language model" if scores else "log-probabilities of a reward model"
            raise RuntimeError(f"asked for {what}")

    @property
    def values_N(self) -> Tensor | None:
        """What the value head said, float32 with gradient, of the tokens of the last row; None without one."""
        return None if self._head is None else self._head.value_N

    @torch.no_grad()
    def ranked_logprobs(self, row: Row) -> tuple[Tensor, Tensor]:
        """Log-probabilities [N], float32, of the row's chosen tokens, and whether greedy decoding would take each [N]."""
        self._require(scores=False)
        logprobs_N, _, _ = self._values(row, ranked=True)
        greedy_N = self._head.greedy_N if self._head is not None else self._plain.greedy_N
        if greedy_N is None:
            raise RuntimeError("the model did not call its output layer")
        return logprobs_N, greedy_N

    def _values(self, row: Row, *, ranked: bool = False) -> tuple[Tensor, RowTensors, int]:
        """Log-probabilities or scores, the row's tensors, and how many layers asked for the row's attention."""
        tensors = to_device(row, self.device, width=self._width(row))
        extra: dict[str, Any] = {}
        calls = 0
        if tensors.tree is not None:
            row_attention = attention.RowAttention(tensors.tree, tensors.position_ids_BT[0])
            extra[attention.KEYWORD] = row_attention
            if self.layout == "packed":
                extra |= _flash_keywords(row_attention)
        with self.autocast(), self.noise.over(row) if self.noise else nullcontext():
            value_N = self._call(tensors, extra, ranked)
        if tensors.tree is not None:
            calls = row_attention.calls
        return value_N, tensors, calls

    def _width(self, row: Row) -> int | None:
        """What a row is filled up to."""
        in_few_shapes = row.tree is not None and self.device.type == "cpu" and self.layout == "tree"
        return width_of(row.slots) if in_few_shapes else None

    def _call(self, row: RowTensors, extra: dict[str, Any], ranked: bool) -> Tensor:
        if self._score is not None:
            self._score.choose(row.own_N)
        elif self._head is not None:
            weight_N = row.weight_N if self.weighted_sum else None
            self._head.choose(row.flat_N, row.token_N, weight_N, ranked=ranked)
        output = self.called(
            input_ids=row.input_ids_BT,
            attention_mask=row.attention_mask_BT,
            position_ids=row.position_ids_BT,
            use_cache=False,
            **extra,
        )
        if self._score is not None:
            return self._score.take(output.logits)
        if self._head is not None:
            return self._head.take(output.logits)
        return self._plain(output.logits, row.flat_N, row.token_N, ranked=ranked)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.precision.compute == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.precision.compute)

    @contextmanager
    def base(self) -> Iterator[None]:
        """The model as it was before the adapter. Only for a model with an adapter."""
        with self.model.disable_adapter():  # type: ignore[operator]
            yield

    @contextmanager
    def plain(self) -> Iterator[None]:
        """The model with its own attention, for calls without rows (generation)."""
        with attention.plain(self.model):
            yield

    @property
    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    # -- the probe -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def probe(self, *, layouts: Sequence[Kind] = ("tree", "packed", "padded")) -> list[str]:
        """Chooses head and layout, the first of `layouts` that is exact. Returns what had to be given up, a sentence each.

        Raises ModelError when none is.
        """
        training = self.model.training
        self.model.eval()
        try:
            with widened_products():
                return self._probe(layouts)
        finally:
            self.model.train(training)

    def _probe(self, layouts: Sequence[Kind]) -> list[str]:
        samples = _made_up(int(self.config.get_text_config().vocab_size))
        with self.plain():
            alone = [self._alone(sample.path(leaf)[0]) for sample in samples for leaf in sample.leaves()]
            wanted_N, leaked_N = torch.cat(alone), self._leaked(samples)
            self._unit = self._unit_of(wanted_N)
            leak = float((wanted_N - leaked_N).abs().mean()) / self._unit
            said = self._probe_head(samples, wanted_N, leak)
        return said + self._probe_layout(samples, wanted_N, leak, layouts)

    def _unit_of(self, wanted_N: Tensor) -> float:
        """What differences are measured in. Raises ModelError for a reward model that scores everything alike, where none shows."""
        if self._score is None:
            return 1.0
        unit = float(wanted_N.std())
        if not unit > 0.0:
            raise ModelError(
                "the reward model gives every token the same score, so nothing can be learned from it or compared",
                where=type(self.model).__name__,
                hint="are its weights whole? a score layer of zeros, or of no numbers, does this",
            )
        return unit

    def _probe_head(self, samples: Sequence[Sample], wanted_N: Tensor, leak: float) -> list[str]:
        """The first path alone in a row, so that only the head can be at fault."""
        self.layout = "padded"
        got_N, _, _ = self._values(lay_out(samples[:1], "padded", budget_tokens=1)[0])
        if self._near(got_N, wanted_N[: len(got_N)], leak):
            return []
        if self._score is not None:
            raise ModelError(
                "the score layer does not give the same scores when it is asked for chosen places",
                where=type(self.model).__name__,
                hint="this architecture cannot be a reward model here; please report it",
            )
        self._head = None
        return ["the model's own output layer is used: the replaced one does not give the same log-probabilities"]

    def _probe_layout(
        self, samples: Sequence[Sample], wanted_N: Tensor, leak: float, layouts: Sequence[Kind]
    ) -> list[str]:
        said: list[str] = []
        for kind in layouts:
            self.layout = kind
            fault = self._fault(samples, wanted_N, leak, kind)
            if fault is None:
                return said
            said.append(f"no {kind} rows: {fault}")
        raise ModelError(
            f"two samples in one row do not give what each gives alone ({'; '.join(said)})",
            where=type(self.model).__name__,
            hint="this architecture cannot be trained on batches; please report it",
        )

    def _fault(self, samples: Sequence[Sample], wanted_N: Tensor, leak: float, kind: Kind) -> str | None:
        """Why this layout does not serve the model; None when it does."""
        if kind == "padded":
            attention.uninstall(self.model)
        elif not attention.install(self.model):
            return "the model does not let its attention be chosen"
        made = lay_out(samples, kind, budget_tokens=1 << 30, regime=self._regime)
        found: list[tuple[Tensor, Row]] = []
        for row in made:
            try:
                value_N, _, calls = self._values(row)
            except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
                # policy: whatever a strange model raises on a layout it was not made for only means: not this one
                first = (str(error).splitlines() or [""])[0][:200]
                return f"the model fails on them ({type(error).__name__}: {first})"
            needed = _attention_layers(self.config.get_text_config(), kind)
            if kind != "padded" and calls != needed:
                return f"{calls} of {needed} layers call the attention they are given"
            found.append((value_N, row))
        got_N = _in_order(samples, found)
        if not self._near(got_N, wanted_N, leak):
            worst = float((got_N - wanted_N).abs().max())
            what = "log-probabilities" if self._score is None else "scores"
            return f"{what} differ by {worst:.2g} from those of each sample alone"
        return None

    def _near(self, got_N: Tensor, wanted_N: Tensor, leak: float) -> bool:
        if got_N.shape != wanted_N.shape:
            return False
        difference_N = (got_N - wanted_N).abs() / self._unit
        if self.precision.compute == torch.float32:
            return bool(difference_N.max() <= EXACT)
        return bool(difference_N.max() <= ROUNDED and difference_N.mean() <= max(leak / 3, 0.02))

    def _alone(self, tokens_T: np.ndarray[Any, np.dtype[np.int32]]) -> Tensor:
        """The untouched model's log-probabilities of a path's tokens but the first, or its scores there."""
        ids = torch.as_tensor(tokens_T, dtype=torch.int64, device=self.device)[None]
        with self.autocast():
            logits = self.model(input_ids=ids, use_cache=False).logits
        if self._score is not None:
            return self._score.take_every()[1:]
        logits_TV = logits[0].float()
        return torch.log_softmax(logits_TV[:-1], -1).gather(-1, ids[0, 1:, None])[:, 0]

    def _leaked(self, samples: Sequence[Sample]) -> Tensor:
        """What comes out when every path sees the ones before it: the fault that the probe is there to find."""
        paths = [sample.path(leaf)[0] for sample in samples for leaf in sample.leaves()]
        logprobs_N = self._alone(np.concatenate(paths))
        starts = np.cumsum([0, *map(len, paths)])[:-1]
        keep = np.setdiff1d(np.arange(1, sum(map(len, paths))), starts) - 1
        return logprobs_N[torch.as_tensor(keep, device=self.device)]


def _made_up(vocabulary: int) -> list[Sample]:
    """Paths of several lengths, two with a long common beginning, and a tree with two leaves."""
    draw = np.random.Generator(np.random.Philox(key=[7, 7]))

    def tokens(length: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        return draw.integers(0, vocabulary, length).astype(np.int32)

    def segment(length: int, parent: int) -> Segment:
        return Segment(tokens(length), np.ones(length, np.float32), parent)

    # Few lengths in all: every new one costs a quarter of the time.
    shared = tokens(40)
    paths = [tokens(16), np.concatenate([shared, tokens(8)]), np.concatenate([shared, tokens(24)]), tokens(16)]
    tree = Sample("probe", (segment(11, -1), segment(5, 0), segment(37, 0)))
    return [*(single("probe", path, np.ones(len(path), np.float32)) for path in paths), tree]


def _in_order(samples: Sequence[Sample], found: Sequence[tuple[Tensor, Row]]) -> Tensor:
    """Values path by path, as `Policy.probe` computes them alone; a token that leaves share counts for each of them."""
    values: dict[
        tuple[int, int, int], Tensor
    ] = {}  # sample, segment-or-leaf's tokens by (first leaf, position on its path)
    for value_N, row in found:
        chosen = row.chosen
        place_N = row.position_ids_BT[chosen.line_N, chosen.position_N] + 1
        for at, key in enumerate(zip(chosen.sample_N, chosen.leaf_N, place_N, strict=True)):
            values[tuple(int(part) for part in key)] = value_N[at]  # type: ignore[index]
    ordered: list[Tensor] = []
    for number, sample in enumerate(samples):
        first: dict[int, int] = {}
        for leaf_number, leaf in enumerate(sample.leaves()):
            place = 0
            for index in sample.ancestry(leaf):
                owner = first.setdefault(index, leaf_number)
                for _ in sample.segments[index].tokens_T:
                    if place > 0:
                        ordered.append(values[number, owner, place])
                    place += 1
    return torch.stack(ordered)


def _attention_layers(text_config: Any, kind: Kind) -> int:
    """Layers that must call the attention: every one for a tree; the attending ones of a hybrid for packed rows."""
    kinds = getattr(text_config, "layer_types", None)
    if kind == "tree" or not kinds:
        return int(text_config.num_hidden_layers)
    return sum("attention" in name and "linear" not in name for name in kinds)


def _flash_keywords(row: attention.RowAttention) -> dict[str, Any]:
    """Where documents end, as transformers' FlashAttentionKwargs say it and linear layers read it."""
    cu_seqlens, longest = row.cu_seqlens()
    lengths = cu_seqlens.diff()
    return {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": torch.arange(len(lengths), dtype=torch.int32, device=cu_seqlens.device).repeat_interleave(lengths)[
            None
        ],
    }
