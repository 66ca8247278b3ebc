"""A step's works -> logits of the rows that draw, by a model of transformers.

`Paged` computes all rows in one call of the model (`engines.paged`). It is proven when it is made, on prompts made up, cut into
parts and answered side by side, against what the untouched model gives for each alone. A model that fails that (its attention is
not to be chosen, some of its layers are none, its windows are only masks) is computed by `Alone`: a call a row, with transformers'
own cache. The answers are the same, and the engine says what was given up.

Shapes: R rows that draw, V tokens of the vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tunedock.errors import ModelError
from tunedock.model.fused import fuse
from tunedock.model.out_of_memory import give_back, is_out_of_memory
from tunedock.model.policy import EXACT, ROUNDED
from tunedock.model.rope import regime_of
from tunedock.serve.engines.drawing import draw
from tunedock.serve.engines.few_rows import speed_up
from tunedock.serve.engines.loras import LoadedLora, LoraModules, Stretch
from tunedock.serve.engines.paged import KEYWORD, Pool, Step, install
from tunedock.serve.engines.schedule import Row, Work
from tunedock.serve.engines.steps import PAGE, Drawer, Drawn


class _OnTransformers:
    """What both ways have in common."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.notes: list[str] = []
        self.turn: int | None = None
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._linears: dict[str, nn.Module] = {}
        self.loras = LoraModules(model, self._linears)

    def computing(self) -> AbstractContextManager[object]:
        return torch.inference_mode()

    def draw(self, logits_RV: Tensor, drawers: Sequence[Drawer], told: Sequence[int | None]) -> list[Drawn | None]:
        return draw(logits_RV, drawers, told)

    def ran_out(self, error: BaseException) -> bool:
        return is_out_of_memory(error)

    def give_back(self) -> None:
        give_back()

    def read_adapter(self, name: str, folder: Path) -> LoadedLora:
        return self.loras.read(name, folder)

    @contextmanager
    def _finding_linears(self, tokens: int) -> Iterator[None]:
        """Notes the linear layers that are called once, with `tokens` tokens: those that adapters can be added to."""
        seen: dict[nn.Module, list[int]] = {}

        def note(module: nn.Module, given: tuple[Any, ...], out: Any) -> None:
            seen.setdefault(module, []).append(given[0].numel() // given[0].shape[-1])

        named = [(name, m) for name, m in self.model.named_modules() if _is_linear(m)]
        hooks = [module.register_forward_hook(note) for _, module in named]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self._linears.update((name, module) for name, module in named if seen.get(module) == [tokens])


class Paged(_OnTransformers):
    whole_prompts = False

    def __init__(self, model: Any, device: torch.device) -> None:
        super().__init__(model, device)
        self._pool = Pool(8, PAGE)
        self.bytes_per_token = 0

    def reserve(self, pages: int, page: int) -> None:
        self._pool = Pool(pages + 1, page)  # the last is nobody's

    def close(self) -> None:
        self._pool = Pool(0, PAGE)

    def step(self, works: Sequence[Work], loras: Sequence[LoadedLora | None]) -> Tensor:
        if self.turn is None:
            return self._alike(works, loras)
        sides: dict[bool, list[int]] = {False: [], True: []}
        for number, work in enumerate(works):
            sides[len(work.row.tokens) > self.turn].append(number)
        drawn: dict[int, Tensor] = {}
        for beyond, numbers in sides.items():
            if numbers:
                some = [works[number] for number in numbers]
                logits_RV = self._alike(some, [loras[number] for number in numbers], self.turn if beyond else None)
                drawn |= zip((n for n in numbers if works[n].draws), logits_RV, strict=False)
        return torch.stack([drawn[number] for number in sorted(drawn)]) if drawn else torch.empty(0, self.vocabulary)

    def _alike(self, works: Sequence[Work], loras: Sequence[LoadedLora | None], reach: int | None = None) -> Tensor:
        """A step of rows that may share a call."""
        self.loras.stretches = _stretches(works, loras)
        for stretch in self.loras.stretches:
            self.loras.make_ready(stretch.lora)
        return self._call(Step(works, self._pool, self.device, reach=reach))

    def leave(self, slots: Sequence[int]) -> None:
        """Their pages are the schedule's to give out again."""

    def _call(self, step: Step) -> Tensor:
        keep = {"logits_to_keep": step.last_R} if self._keeps and len(step.last_R) else {}
        logits: Tensor = self.model(
            input_ids=step.ids_1N, position_ids=step.positions_1N, use_cache=False, **keep, **{KEYWORD: step}
        ).logits[0]
        return logits if keep else logits[step.last_R]

    def prove(self) -> str | None:
        """Why this way does not give what the model gives; None when it does. The model has its own attention before."""
        rows = _made_up(int(self.model.config.get_text_config().vocab_size))
        wanted = [_alone(self.model, row, self.device) for row in rows]
        if not install(self.model):
            return "the model does not let its attention be chosen"
        try:
            got = self._answers(rows)
        except (TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError, IndexError) as error:
            # policy: whatever a strange model raises on a way it was not made for only means: not this one
            return f"the model fails on it ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]})"
        self.bytes_per_token = self._pool.bytes_per_token
        return _difference(wanted, got, self.model.dtype)

    def _answers(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Log-probabilities [4, V] of what follows a row's last four prefixes: the first by its prompt, then token by token."""
        made = [Row(tokens=list(tokens[:-3]), longest=len(tokens)) for tokens in rows]
        given = iter(range(self._pool.pages))
        for row, tokens in zip(made, rows, strict=True):
            row.pages = [next(given) for _ in range(-(-len(tokens) // PAGE))]
        first = Step([Work(made[0], 0, 5), Work(made[1], 0, len(made[1].tokens))], self._pool, self.device)
        with self._finding_linears(first.tokens):
            out = {1: [self._call(first)[0]], 0: []}
        fault = _strange_layers(self.model.config.get_text_config(), first.windows)
        if fault is not None:
            raise ValueError(fault)
        out[0].append(self._call(Step([Work(made[0], 5, len(made[0].tokens))], self._pool, self.device))[0])
        for further in range(3):
            for row, tokens in zip(made, rows, strict=True):
                row.tokens.append(tokens[len(tokens) - 3 + further])
            step = Step([Work(row, len(row.tokens) - 1, len(row.tokens)) for row in made], self._pool, self.device)
            for line, logits_V in enumerate(self._call(step)):
                out[line].append(logits_V)
        return [torch.log_softmax(torch.stack(out[line]).float(), -1) for line in range(len(rows))]


class Alone(_OnTransformers):
    """Row by row, as `generate` would."""

    whole_prompts = True

    def __init__(self, model: Any, device: torch.device) -> None:
        super().__init__(model, device)
        self._caches: dict[int, Any] = {}
        keep = {"logits_to_keep": 1} if self._keeps else {}
        with self._finding_linears(5):
            model(input_ids=torch.tensor([[1, 2, 3, 4, 5]], device=device), use_cache=False, **keep)
        cache = DynamicCache(config=model.config)
        model(input_ids=torch.tensor([[1, 2, 3, 4]], device=device), past_key_values=cache, use_cache=True)
        # A layer that keeps a state instead has neither; it takes the same memory for any row.
        kept = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
        self.bytes_per_token = max(1, sum(t.numel() * t.element_size() for t in kept if isinstance(t, Tensor)) // 4)

    def prove(self) -> str | None:
        """As `Paged.prove`: models whose keyword for what they keep is another one take ours and forget everything."""
        tokens = _made_up(int(self.model.config.get_text_config().vocab_size))[0]
        row = Row(tokens=list(tokens[:-3]), longest=len(tokens), slot=0)
        logits = [self._call(Work(row, 0, len(row.tokens)))[0]]
        for token in tokens[-3:]:
            row.tokens.append(token)
            logits.append(self._call(Work(row, len(row.tokens) - 1, len(row.tokens)))[0])
        self.leave([0])
        got = torch.log_softmax(torch.stack(logits).float(), -1)
        return _difference([_alone(self.model, tokens, self.device)], [got], self.model.dtype)

    def reserve(self, pages: int, page: int) -> None:
        """Caches grow by themselves; the pages are what the schedule counts by."""

    def step(self, works: Sequence[Work], loras: Sequence[LoadedLora | None]) -> Tensor:
        drawn: list[Tensor] = []
        for work, lora in zip(works, loras, strict=True):
            self.loras.stretches = [] if lora is None else [Stretch(lora, 0, work.stop - work.start)]
            if lora is not None:
                self.loras.make_ready(lora)
            logits_1V = self._call(work)
            if work.draws:
                drawn.append(logits_1V)
        if not drawn:
            return torch.empty(0, 0)
        return torch.cat(drawn)

    def leave(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._caches.pop(slot, None)

    def close(self) -> None:
        self._caches.clear()

    def _call(self, work: Work) -> Tensor:
        slot = work.row.slot
        assert slot is not None  # noqa: S101 - the schedule plans only rows that run
        if work.start == 0:
            self._caches[slot] = DynamicCache(config=self.model.config)
        ids = torch.tensor([work.row.tokens[work.start : work.stop]], device=self.device)
        keep = {"logits_to_keep": 1} if self._keeps else {}
        out = self.model(
            input_ids=ids,
            attention_mask=torch.ones(1, work.stop, dtype=torch.int64, device=self.device),
            past_key_values=self._caches[slot],
            use_cache=True,
            **keep,
        )
        logits: Tensor = out.logits[:, -1]
        return logits


def choose(model: nn.Module, device: torch.device) -> Paged | Alone:
    """The faster way, where it is exact. The model is in eval mode and is the engine's own from here on.

    Raises ModelError for one that neither way is right for.
    """
    if device.type == "cpu":
        fuse(model)
        speed_up(model)
    before = model.config._attn_implementation  # type: ignore[union-attr]
    paged = Paged(model, device)
    fault = paged.prove()
    if fault is None:
        return paged
    model.set_attn_implementation(before)  # type: ignore[operator]
    alone, wrong = _alone_or_why(model, device)
    if alone is None:
        raise ModelError(
            f"this model cannot be served here: it does not go on from what it keeps of a prompt as it answers the whole ({wrong})",
            where=type(model).__name__,
            hint="serve it with another engine (`--engine vllm`), which may know its kind",
        )
    alone.notes.append(f"requests are computed one by one, for {fault}")
    return alone


def _alone_or_why(model: nn.Module, device: torch.device) -> tuple[Alone | None, str | None]:
    try:
        alone = Alone(model, device)
        wrong = alone.prove()
    except (TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError, IndexError) as error:
        # policy: as in `Paged.prove`
        return None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    return (alone, None) if wrong is None else (None, wrong)


def positions_of(config: Any) -> tuple[int, bool] | None:
    """Tokens up to which what a position is does not depend on how long its row is, and whether there is one other way beyond
    (`longrope`) or one for each length (`dynamic`). None where it never does."""
    regime = regime_of(config)
    if regime is None:
        return None
    most = int(config.max_position_embeddings)
    low, high = 1, 2 * most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if regime(middle) == 0 else (low, middle - 1)
    return low, regime(low + 1) == regime(low + 2)


def _stretches(works: Sequence[Work], loras: Sequence[LoadedLora | None]) -> list[Stretch]:
    found: list[Stretch] = []
    at = 0
    for work, lora in zip(works, loras, strict=True):
        stop = at + work.stop - work.start
        if lora is not None:
            if found and found[-1].lora is lora and found[-1].stop == at:
                found[-1] = Stretch(lora, found[-1].start, stop)
            else:
                found.append(Stretch(lora, at, stop))
        at = stop
    return found


def _is_linear(module: nn.Module) -> bool:
    return type(module).__name__ in ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt") or isinstance(module, nn.Linear)


def _made_up(vocabulary: int) -> list[list[int]]:
    """Two rows, one of more than a page."""
    draw = torch.Generator().manual_seed(11)
    return [torch.randint(0, vocabulary, (length,), generator=draw).tolist() for length in (PAGE + 9, 14)]


def _alone(model: Any, tokens: Sequence[int], device: torch.device) -> Tensor:
    """The model's own log-probabilities [4, V] after the row's last four prefixes."""
    ids = torch.tensor([list(tokens)], device=device)
    return torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, -4:].float(), -1)


def _difference(wanted: Sequence[Tensor], got: Sequence[Tensor], dtype: torch.dtype) -> str | None:
    """Of the likelihoods of the tokens that are likeliest; None where it is rounding."""
    tops = [want.argmax(-1, keepdim=True) for want in wanted]
    pairs = zip(tops, wanted, got, strict=True)
    worst = max(float((want.gather(-1, top) - have.gather(-1, top)).abs().max()) for top, want, have in pairs)
    if worst <= (EXACT if dtype == torch.float32 else ROUNDED):
        return None
    return f"log-probabilities differ by {worst:.2g} from those of a row alone"


def _strange_layers(config: Any, windows: dict[int, int | None]) -> str | None:
    """What is wrong with the layers that have called for attention, as far as the config tells."""
    layers = int(config.num_hidden_layers)
    if sorted(windows) != list(range(layers)):
        return f"{len(windows)} of {layers} layers call the attention they are given"
    kinds = getattr(config, "layer_types", None) or [None] * layers
    for number, kind in enumerate(kinds):
        sliding = getattr(config, "sliding_window", None) if kind in ("sliding_attention", None) else None
        if kind not in ("full_attention", "sliding_attention", None):
            return f"layers of the kind {kind} are not known"
        if windows[number] != sliding:
            return f"layer {number} has a window of {sliding} and does not say so"
    return None
