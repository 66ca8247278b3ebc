"""Conversations -> token ids and which of them are trained, with the model's own chat template as the only truth.

The prompt rendered in training is the prompt rendered in serving: both are `Chat.prompt`, and `encode` refuses a row whose
answer does not continue it token for token. The template runs twice a trained turn, the tokenizer once over a batch.

A trained turn weighs its answer and the stop token, and nothing after it: generation has ended there. One rendering serves
all turns that stand in it as they were answered; a turn that history shows otherwise (its thinking dropped) is a branch of
the sample's tree.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, ParamSpec, TypeVar

import numpy as np
import transformers
from transformers import PreTrainedTokenizerBase

from tunedock.data.conversation import (
    Conversation,
    Document,
    Example,
    Labelled,
    Message,
    Preference,
    Prompt,
    RowRefused,
    Verdicts,
)
from tunedock.data.pieces import Tokenised
from tunedock.data.sample import Sample, Segment, Tokens, merge_paths, single
from tunedock.data.spans import Path, Span, Spans, fit
from tunedock.data.template import Template, Tools, Turn
from tunedock.errors import DataError, ModelError

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Encoded:
    sample: Sample
    cut_tokens: int
    """Tokens `over_length: truncate` removed, over all paths of the sample."""
    has_stop: bool
    """Whether every trained answer ends with its stop token; False only where truncation cut one from the right."""


@dataclass(frozen=True, slots=True)
class _Rendering:
    """One path as text. `turns` stand in order; the last is the one the text was rendered for."""

    text: str
    turns: tuple[tuple[Turn, float], ...]
    messages: tuple[Message, ...]
    tools: Tools
    every_token: bool
    """Tokens outside the turns weigh 1, not 0."""


@dataclass(frozen=True, slots=True)
class _Question:
    """A prompt as text, up to where its answer begins."""

    text: str
    example: Prompt


class Chat:
    """Prompts and trained tokens of one tokenizer.

    `stop_ids`: tokens that end generation (generation_config.json's, the tokenizer's eos); the template's turn end joins them.
    `over_length`: what becomes of a path longer than `max_length`; `drop` and `error` both refuse the row, and the caller
    makes an error of it. Documents are cut into windows whatever it says: none is dropped for its length.
    `train_on`: the assistant turns that weigh 1 where `Message.weight` is None. With `all`, every token of the rendering up to
    the last answer weighs 1. Preferences and labelled completions train the assistant turns of the completion.

    Prompts are rendered to be answered, with reasoning where `thinking`.

    `documents`: only documents are to be encoded, so the template is looked at when a prompt is first asked for.
    `scored`: completions are judged as wholes (a reward model's data), so a leaf weighs 1 at its last token and nowhere else,
    whatever its turns weigh.

    Raises ModelError when the tokenizer has no usable chat template, or no stop token is known.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_ids: Collection[int],
        max_length: int,
        over_length: Literal["drop", "truncate", "error"],
        train_on: Literal["assistant", "last", "all"],
        documents: bool = False,
        scored: bool = False,
        thinking: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._given_stop_ids = frozenset(stop_ids)
        self.documents = documents
        self._scored = scored
        self._max_length = max_length
        self._over_length = over_length
        self._train_on = train_on
        self._thinking = thinking
        self._spans = Spans(tokenizer)
        if not (self._given_stop_ids if documents else self._template.stop_ids):
            raise ModelError(
                "no token is known to end an answer",
                where="tokenizer",
                hint="set `eos_token_id` in the model's generation_config.json, or the tokenizer's eos token",
            )
        self._first_stop_ids = self.stop_ids

    @cached_property
    def _template(self) -> Template:
        return Template(self._tokenizer, self._given_stop_ids)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end generation. Rows encoded may add to them: the turn end a template writes after a tool call."""
        looked_at = "_template" in self.__dict__
        return frozenset(self._template.stop_ids) if looked_at else self._given_stop_ids

    @property
    def portable(self) -> bool:
        """Whether another process can have it: a tokenizer of code that came with the model is known to this one only."""
        return not type(self._tokenizer).__module__.startswith("transformers_modules")

    def know(self, stop_ids: Collection[int]) -> None:
        """Sets `stop_ids` to what they were after other rows: the next ones are encoded as if they had followed those."""
        if "_template" in self.__dict__:
            self._template.stop_ids = set(stop_ids)

    def __reduce__(self) -> tuple[Callable[..., Chat], tuple[Any, ...]]:
        """For another process, which looks at the template again. What rows have taught goes by `know`."""
        arguments = {
            "stop_ids": self._given_stop_ids,
            "max_length": self._max_length,
            "over_length": self._over_length,
            "train_on": self._train_on,
            "documents": self.documents,
            "scored": self._scored,
            "thinking": self._thinking,
        }
        return _again, (self._tokenizer, arguments)

    def prompt(self, messages: Sequence[Message], tools: Tools = (), *, thinking: bool) -> str:
        """What the model is served with to answer `messages`; the very text training puts before that answer.

        `thinking`: whether the answer is to begin with reasoning. Raises DataError when the template refuses the messages.
        """
        try:
            return self._template.prompt(messages, tools, thinking=thinking)
        except RowRefused as refused:
            raise DataError(
                f"the chat template refuses these messages: {refused.detail}",
                where="messages",
                hint="most templates want user and assistant to alternate, some know no system message and no tools",
            ) from None

    def prompt_ids(self, messages: Sequence[Message], tools: Tools = (), *, thinking: bool) -> list[int]:
        """Token ids of `prompt`. The template writes BOS where the model wants one, so the tokenizer adds none."""
        (found,) = self._spans.encode([self.prompt(messages, tools, thinking=thinking)])
        ids: list[int] = found.ids_T.tolist()
        return ids

    def whole_ids(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """Token ids of a conversation that ends with an answer, as a reward model is trained to read it; of any length.

        Raises DataError when the template refuses it, or it ends with no answer.
        """
        try:
            if not messages or messages[-1].role != "assistant":
                raise RowRefused("no_assistant_turn", "the last message is not the assistant's")
            turn = self._template.turn(messages, tools)
            _require_unicode(turn.text)
        except RowRefused as refused:
            raise DataError(f"the conversation cannot be rendered: {refused.detail}", where="messages") from None
        (found,) = self._spans.encode([turn.text])
        rendering = _Rendering(turn.text, ((turn, 1.0),), tuple(messages), tools, False)
        ids: list[int] = self._ids(rendering, found).tolist()
        return ids

    def engine_renders(self, *, thinking: bool) -> bool:
        """Whether an engine that applies the template with `add_generation_prompt` and `enable_thinking=thinking` gets `prompt`."""
        return self._template.engine_renders(thinking=thinking)

    def fingerprint(self) -> str:
        """A hash of all that decides tokens and weights: template, tokenizer, arguments, the version of transformers."""
        backend = json.loads(self._tokenizer.backend_tokenizer.to_str())
        decided = {
            "template": self._tokenizer.chat_template,
            "tokenizer": {key: value for key, value in backend.items() if key not in ("truncation", "padding")},
            "special": {key: str(value) for key, value in self._tokenizer.special_tokens_map.items()},
            "stop_ids": sorted(self._first_stop_ids),
            "arguments": [
                self._max_length,
                self._over_length,
                self._train_on,
                *(["scored"] if self._scored else []),
                *(["thinking"] if self._thinking else []),
            ],
            "transformers": transformers.__version__,
        }
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()

    def encode(self, rows: Sequence[tuple[str, Example]]) -> list[list[Encoded] | RowRefused]:
        """Samples of each row, or why there are none. `rows` are (row id, example); the tokenizer runs over them at once.

        Several samples come of a long document (windows of `max_length` tokens) and two of a pair read as verdicts. They are named
        `id`, `id~2`, `id~3`.
        """
        planned = [_or_refused(self._plan, example) for _, example in rows]
        renderings = [rendering for plan in planned if isinstance(plan, list) for rendering in plan]
        questions = iter(self._spans.encode([plan.text for plan in planned if isinstance(plan, _Question)]))
        chats = iter(self._spans.encode([rendering.text for rendering in renderings]))
        texts = [plan.text for plan in planned if isinstance(plan, Document)]
        documents = iter(self._spans.document_ids(texts))
        made: list[list[Encoded] | RowRefused] = []
        for (row_id, example), plan in zip(rows, planned, strict=True):
            if isinstance(plan, RowRefused):
                made.append(plan)
            elif isinstance(plan, _Question):
                made.append(_or_refused(self._asked, row_id, plan, next(questions)))
            elif isinstance(plan, Document):
                made.append(_or_refused(self._windows, row_id, next(documents)))
            else:
                found = [next(chats) for _ in plan]
                if isinstance(example, Labelled | Verdicts):
                    labels = (example.label,) if isinstance(example, Labelled) else (True, False)
                    made.append(_or_refused(self._judged, row_id, plan, found, labels))
                    continue
                pair = example if isinstance(example, Preference) else None
                made.append(_or_refused(self._sample, row_id, plan, found, pair))
        return made

    # -- text ---------------------------------------------------------------------------------------------------------

    def _plan(self, example: Example) -> list[_Rendering] | Document | _Question:
        """The texts a row needs tokens of."""
        match example:
            case Document():
                _require_unicode(example.text)
                return example
            case Prompt():
                text = self._template.prompt(example.prompt, example.tools, thinking=self._thinking)
                _require_unicode(text)
                return _Question(text, example)
            case Conversation():
                weights = self._turn_weights(example.messages)
                every = self._train_on == "all"
                renderings = self._renderings(example.messages, example.tools, weights, every_token=every)
                if every and len(renderings) > 1:
                    raise RowRefused(
                        "turn_not_found", "a turn with a weight of its own is rendered differently in the whole"
                    )
                return renderings
            case Labelled():
                return self._completion(example.prompt, example.completion, example.tools)
            case Preference():
                both = [self._completion(example.prompt, c, example.tools) for c in (example.chosen, example.rejected)]
                return [rendering for renderings in both for rendering in renderings]

    def _turn_weights(self, messages: Sequence[Message]) -> dict[int, float]:
        """Index of a message -> loss weight of its answer. With `all` also weights of 0, which are taken out of the whole."""
        answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
        weights: dict[int, float] = {}
        for index in answers:
            own, last = messages[index].weight, index == answers[-1]
            if own is not None:
                weights[index] = own
            elif last or self._train_on == "assistant":
                weights[index] = 1.0
        if self._train_on == "all":
            return weights
        return {index: weight for index, weight in weights.items() if weight != 0.0}

    def _completion(
        self, prompt: tuple[Message, ...], completion: tuple[Message, ...], tools: Tools
    ) -> list[_Rendering]:
        messages = (*prompt, *completion)
        if self._scored:
            return self._renderings(messages, tools, {len(messages) - 1: 1.0})
        weights = {
            index: 1.0 if message.weight is None else message.weight
            for index, message in enumerate(messages)
            if index >= len(prompt) and message.role == "assistant" and message.weight != 0.0
        }
        renderings = self._renderings(messages, tools, weights)
        if len(renderings) > 1:  # its log-probability is a sum along one path
            raise RowRefused(
                "turn_not_found", "the template renders an earlier turn of the completion differently later on"
            )
        return renderings

    def _renderings(
        self,
        messages: tuple[Message, ...],
        tools: Tools,
        weights: Mapping[int, float],
        *,
        every_token: bool = False,
    ) -> list[_Rendering]:
        """As few renderings as hold every trained turn the way it is answered; the first is that of the last turn."""
        if not weights:
            raise RowRefused("nothing_trained", "no assistant turn carries weight")
        made: list[_Rendering] = []
        for index in sorted(weights, reverse=True):
            turn = self._template.turn(messages[: index + 1], tools)
            if not turn.text[turn.start : turn.end if turn.stop_at is None else turn.stop_at].strip():
                raise RowRefused("nothing_trained", f"turn {index}: the answer is empty")
            _require_unicode(turn.text)
            for number, rendering in enumerate(made):
                if (placed := self._place(turn, rendering.text)) is not None:
                    made[number] = replace(rendering, turns=((placed, weights[index]), *rendering.turns))
                    break
            else:
                made.append(_Rendering(turn.text, ((turn, weights[index]),), messages, tools, every_token))
        return made

    def _place(self, turn: Turn, text: str) -> Turn | None:
        """The turn in a longer rendering, when prompt, answer and stop stand there unchanged."""
        if not text.startswith(turn.text[: turn.end]):
            return None
        if turn.stop_at is not None:
            return turn
        stop = self._template.stop_text_at(text, turn.end)  # GLM-4: the next turn's header is this one's stop
        return None if stop is None else replace(turn, stop_at=turn.end, end=turn.end + len(stop))

    # -- tokens -------------------------------------------------------------------------------------------------------

    def _sample(
        self, row_id: str, plan: list[_Rendering], found: list[Tokenised], pair: Preference | None
    ) -> list[Encoded]:
        whole = self._whole(plan, found)
        paths = fit(whole, self._max_length) if pair else [fit([path], self._max_length)[0] for path in whole]
        sample = _pair(row_id, paths) if pair else merge_paths(row_id, [(p.tokens_T, p.weights_T) for p in paths])
        if self._scored:
            sample = replace(sample.weighed_at_ends(), margin=(pair.margin if pair else None) or 0.0)
        if not any(segment.weights_T.any() for segment in sample.segments):
            raise RowRefused("nothing_trained", "no token carries weight")
        cut = sum(map(len, whole)) - sum(map(len, paths))
        return [Encoded(sample, cut, all(path.has_stop for path in paths))]

    def _judged(
        self, row_id: str, plan: list[_Rendering], found: list[Tokenised], labels: Sequence[bool]
    ) -> list[Encoded]:
        """A sample for each completion: its prompt, and the completion as the leaf."""
        made: list[Encoded] = []
        for number, (path, wanted) in enumerate(zip(self._whole(plan, found), labels, strict=True), start=1):
            (fitted,) = fit([path], self._max_length)
            first = fitted.spans[0].first
            prompt = Segment(fitted.tokens_T[:first], np.zeros(first, np.float32))
            leaf = Segment(fitted.tokens_T[first:], fitted.weights_T[first:], 0)
            if not leaf.weights_T.any():
                raise RowRefused("nothing_trained", "no token carries weight")
            name = row_id if number == 1 else f"{row_id}~{number}"
            sample = Sample(name, (prompt, leaf), wanted=wanted)
            made.append(Encoded(sample, len(path) - len(fitted), fitted.has_stop))
        if len(made) > 1 and _same_tokens(*(one.sample for one in made)):
            raise RowRefused("same_completions", "chosen and rejected are the same tokens")
        return made

    def _whole(self, plan: list[_Rendering], found: list[Tokenised]) -> list[Path]:
        """The paths as they are before any is cut. Raises RowRefused where one is too long and none may be."""
        longest = max(len(self._ids(r, tokens)) for r, tokens in zip(plan, found, strict=True))
        long = longest > self._max_length
        if long and self._over_length != "truncate":
            raise RowRefused("over_length", f"{longest} tokens > max_length {self._max_length}")
        return [self._path(r, tokens, headers=long) for r, tokens in zip(plan, found, strict=True)]

    def _ids(self, rendering: _Rendering, found: Tokenised) -> Tokens:
        """Token ids of a path. Where the template writes no stop after the last answer, one is put there."""
        written = rendering.turns[-1][0].stop_at is not None
        return found.ids_T if written else np.append(found.ids_T, np.int32(self._stop))

    @property
    def _stop(self) -> int:
        eos = self._tokenizer.eos_token_id
        return int(eos) if eos in self.stop_ids else min(self.stop_ids)

    def _path(self, rendering: _Rendering, found: Tokenised, *, headers: bool) -> Path:
        """`headers`: whether to find where generation headers begin; it takes one more rendering a turn, and only cutting asks."""
        ids_T = self._ids(rendering, found)
        weights_T = np.full(len(ids_T), float(rendering.every_token), np.float32)
        spans: list[Span] = []
        for turn, weight in rendering.turns:
            first = self._spans.answer(found, rendering.text, turn.start)
            end = len(ids_T) if turn.stop_at is None else found.at(turn.stop_at) + 1
            if int(ids_T[end - 1]) not in self.stop_ids:
                raise RowRefused(
                    "no_stop", f"turn {turn.index}: the tokenizer does not read the stop token as one token"
                )
            header = min(found.at(self._header_at(rendering, turn)), first) if headers else first
            spans.append(Span(first, end, header, weight))
            weights_T[first:end] = weight
        bos = self._tokenizer.bos_token_id
        return Path(ids_T, weights_T, tuple(spans), int(bos is not None and ids_T[0] == bos))

    def _header_at(self, rendering: _Rendering, turn: Turn) -> int:
        before, answer = rendering.messages[: turn.index], rendering.messages[turn.index]
        prompt, thinking = turn.text[: turn.start], answer.reasoning is not None
        return self._template.header_at(before, rendering.tools, prompt, thinking=thinking)

    def _asked(self, row_id: str, question: _Question, found: Tokenised) -> list[Encoded]:
        """A prompt alone, of which nothing is trained. Cut, it keeps BOS and the header that the answer follows."""
        length = len(found.ids_T)
        if length > self._max_length and self._over_length != "truncate":
            raise RowRefused(
                "over_length", f"a prompt of {length} tokens > {self._max_length}, which leaves room to answer"
            )
        ids_T = found.ids_T
        if length > self._max_length:
            example = question.example
            at = self._template.header_at(example.prompt, example.tools, question.text, thinking=self._thinking)
            # `fit` keeps an answer's first token: here the last of the header stands for it.
            span = Span(length - 1, length, min(found.at(at), length - 1), 0.0)
            bos = self._tokenizer.bos_token_id
            whole = Path(ids_T, np.zeros(length, np.float32), (span,), int(bos is not None and ids_T[0] == bos))
            (path,) = fit([whole], self._max_length)
            ids_T = path.tokens_T
        sample = Sample(row_id, (Segment(ids_T, np.zeros(len(ids_T), np.float32)),))
        return [Encoded(sample, length - len(ids_T), has_stop=True)]

    def _windows(self, row_id: str, ids: list[int]) -> list[Encoded]:
        """A document's tokens and eos, cut into windows. A token left over takes the one before it along, which weighs nothing."""
        ids = ids if ids and ids[-1] in self.stop_ids else [*ids, self._stop]
        if len(ids) < 2:
            raise RowRefused("nothing_trained", "the document is empty")
        made: list[Encoded] = []
        for number, start in enumerate(range(0, len(ids), self._max_length), start=1):
            tokens_T = np.asarray(ids[start : start + self._max_length], np.int32)
            weights_T = np.ones(len(tokens_T), np.float32)
            if len(tokens_T) == 1:
                tokens_T, weights_T = np.asarray(ids[start - 1 :], np.int32), np.asarray([0.0, 1.0], np.float32)
            name = row_id if number == 1 else f"{row_id}~{number}"
            made.append(Encoded(single(name, tokens_T, weights_T), 0, has_stop=True))
        return made


def _again(tokenizer: PreTrainedTokenizerBase, arguments: dict[str, Any]) -> Chat:
    return Chat(tokenizer, **arguments)


def _pair(row_id: str, paths: Sequence[Path]) -> Sample:
    """Prompt, chosen, rejected. Tokens both completions begin with stay in both: a completion is its whole leaf."""
    chosen, rejected = paths
    if np.array_equal(chosen.tokens_T, rejected.tokens_T):
        raise RowRefused("same_completions", "chosen and rejected are the same tokens")
    limit = min(chosen.spans[0].first, rejected.spans[0].first)
    differ = np.flatnonzero(chosen.tokens_T[:limit] != rejected.tokens_T[:limit])
    shared = int(differ[0]) if len(differ) else limit
    root = Segment(chosen.tokens_T[:shared], np.zeros(shared, np.float32))
    leaves = (Segment(path.tokens_T[shared:], path.weights_T[shared:], 0) for path in paths)
    return Sample(row_id, (root, *leaves))


def _same_tokens(one: Sample, other: Sample) -> bool:
    return all(np.array_equal(a.tokens_T, b.tokens_T) for a, b in zip(one.segments, other.segments, strict=True))


def _require_unicode(text: str) -> None:
    """Half a surrogate pair can stand in a JSON string and is no text: the tokenizer would fail on the whole batch."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowRefused("invalid_unicode", f"half a surrogate pair at character {error.start}") from None


def _or_refused(make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | RowRefused:
    try:
        return make(*args, **kwargs)
    except RowRefused as refused:
        return refused
