"""A policy as lm-evaluation-harness asks a model: log-likelihoods of texts, and completions.

lm-eval's own `HFLM` pads a batch of requests to the longest and makes logits of every place over the whole vocabulary. Here
requests are samples like any other: in a row, what several of them begin with (the question before its answers, the examples
before all questions) stands once, and logits exist for the continuation's places alone, in chunks. The text that comes to the model
and the tokens that are asked for are those of `HFLM`, and so, to rounding, are the figures; a test holds that.

Imported where it is used: lm-eval is an extra.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tunedock.data.conversation import Message
from tunedock.data.layout import Row
from tunedock.data.sample import Sample, single
from tunedock.errors import DataError
from tunedock.eval.budget import EvalBudget
from tunedock.events import Emitter
from tunedock.model.chat_facts import ChatFacts
from tunedock.model.generate import StopTexts, complete
from tunedock.model.policy import Policy
from tunedock.model.session import Base

Request = tuple[Any, list[int], list[int]]
"""What it is for, the context's tokens, the continuation's."""

Answer = tuple[float, bool]
"""Log-likelihood of the continuation, and whether greedy decoding would give it."""

REQUESTS = 256
"""Laid out together. Those that begin alike stand side by side, so few beginnings are computed twice."""

GENERATION = {"until", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "max_gen_toks", "num_beams"}
"""Keys of a task's `generation_kwargs` that mean something here."""

MAX_GEN_TOKS = 256
"""Of a task that names no number; lm-eval's."""


class PolicyLM(TemplateLM):  # type: ignore[misc]
    """lm-eval's model, for one policy. Raises DataError for requests no model of its kind could answer."""

    backend = "causal"

    def __init__(
        self, base: Base, policy: Policy, facts: ChatFacts, emit: Emitter, *, name: str, batch_size: int, seed: int
    ) -> None:
        """`name`: how progress calls the model. `batch_size`: prompts generated at once."""
        super().__init__()
        self.tokenizer = base.tokenizer
        self._base = base
        self._policy = policy
        self._facts = facts
        self._emit = emit
        self._name = name
        self._batch_size = batch_size
        self._seed = seed
        self._budget = EvalBudget(policy, emit)
        self._encoded: dict[tuple[str, bool | None], list[int]] = {}
        self._prefix = str(self.tokenizer.decode(self.prefix_token_id))
        # A path's last token stands in its row, too, one position beyond what is asked for. Where positions are learned, not
        # computed, there is none beyond the model's length, so it is taken to be shorter by one.
        text_config = policy.config.get_text_config()
        computed = any(getattr(text_config, key, None) for key in ("rope_parameters", "rope_theta", "rope_scaling"))
        self.max_length = resolve_max_length(policy.config, self.tokenizer) - int(not computed)

    # -- text --------------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        found = self.tokenizer.eos_token_id
        return int(found if found is not None else min(self._facts.stop_ids, default=0))

    @property
    def prefix_token_id(self) -> int:
        found = self.tokenizer.bos_token_id
        return int(found) if found is not None else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; with BOS where the tokenizer adds it by itself and the text does not begin with it."""
        key = string, add_special_tokens
        if key not in self._encoded:
            if len(self._encoded) >= 64:  # a context comes again with its next answer, or not at all
                self._encoded.clear()
            special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            if add_special_tokens is None and has_bos_prefix(string, self._prefix):
                special = {"add_special_tokens": False}
            self._encoded[key] = self.tokenizer.encode(string, **special)
        return self._encoded[key]

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt as the run's training rendered it. An answer that is begun already is left open."""
        if add_generation_prompt:
            messages = [Message(turn["role"], turn["content"]) for turn in chat_history]  # type: ignore[arg-type]
            return self._base.chat.prompt(messages, (), thinking=self._facts.thinking)
        text: str = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=False, continue_final_message=True
        )
        return text

    # -- log-likelihoods ---------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Answer]:
        answers: list[Answer] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Of whole texts, in windows of the model's length that hold as much context as there is."""
        windows: list[Request] = []
        counts: list[int] = []
        for request in requests:
            (text,) = request.args
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            found = [(text, *make_disjoint_window(window)) for window in rolling]
            windows += found
            counts.append(len(found))
        answers = iter(self._loglikelihood_tokens(windows, what="texts"))
        return [sum(next(answers)[0] for _ in range(count)) for count in counts]

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = True, what: str = "answers", **kwargs: Any
    ) -> list[Answer]:
        order = sorted(range(len(requests)), key=lambda i: self._sample(requests[i]).segments[0].tokens_T.tobytes())
        answers: list[Answer] = [(0.0, False)] * len(requests)
        self._policy.model.eval()
        self._tell(what, 0, len(requests))
        for start in range(0, len(order), REQUESTS):
            part = order[start : start + REQUESTS]
            found = self._answers([self._sample(requests[i]) for i in part])
            for index, answer in zip(part, found, strict=True):
                answers[index] = answer
            self._tell(what, start + len(part), len(requests))
        return answers

    def _sample(self, request: Request) -> Sample:
        """Context and continuation as one path, whose continuation is asked for; what is too long loses its left end."""
        what, context, continuation = request
        name = _shown(what[1] if isinstance(what, tuple) else what)
        if not continuation:
            raise DataError(f"the continuation {name} has no token of its own", where="eval.tasks")
        if len(continuation) > self.max_length:
            raise DataError(
                f"the continuation {name} has {len(continuation)} tokens, and the model takes {self.max_length}",
                where="eval.tasks",
            )
        # A context of white space alone goes to the continuation and leaves nothing: as with an empty one, the first token is asked
        # for after the token that texts begin with.
        tokens = ((context or [self.prefix_token_id]) + continuation)[-self.max_length - 1 :]
        weights = np.zeros(len(tokens), np.float32)
        weights[len(tokens) - len(continuation) :] = 1.0
        return single(name, tokens, weights)

    def _answers(self, samples: Sequence[Sample]) -> list[Answer]:
        def read(rows: Sequence[Row]) -> tuple[Any, Any]:
            sums, greedy = np.zeros(len(samples)), np.ones(len(samples), np.bool_)
            for row in rows:
                logprob_N, greedy_N = self._policy.ranked_logprobs(row)
                sums += np.bincount(row.chosen.sample_N, logprob_N.double().cpu().numpy(), minlength=len(samples))
                greedy[row.chosen.sample_N[~greedy_N.cpu().numpy()]] = False
            return sums, greedy

        sums, greedy = self._budget.fit(samples, read)
        return [(float(total), bool(is_greedy)) for total, is_greedy in zip(sums, greedy, strict=True)]

    # -- completions -------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Completions up to a stop text, without it; requests with the same settings share batches."""
        texts = [""] * len(requests)
        done = 0
        self._tell("completions", 0, len(requests))
        for settings, members in _grouped(requests):
            prompts = [requests[i].args[0] for i in members]

            def tell(count: int, before: int = done) -> None:
                self._tell("completions", before + count, len(requests))

            for index, text in zip(members, self._generated(prompts, settings, tell), strict=True):
                texts[index] = text
            done += len(members)
        return texts

    def _generated(
        self, prompts: Sequence[str], given: dict[str, Any], on_progress: Callable[[int], None]
    ) -> Iterator[str]:
        settings = dict(normalize_gen_kwargs(given, MAX_GEN_TOKS))
        unknown = sorted(settings.keys() - GENERATION)
        if unknown or settings.get("num_beams", 1) != 1:
            raise DataError(
                f"`generation_kwargs` asks for {', '.join(unknown) or 'several beams'}, which tunedock does not do",
                where="eval.tasks",
                hint=f"what it knows: {', '.join(sorted(GENERATION))}",
            )
        most = int(settings["max_gen_toks"])
        room = self.max_length - most
        if room <= 0:
            raise DataError(
                f"`max_gen_toks: {most}` leaves no room for a prompt: the model takes {self.max_length} tokens",
                where="eval.tasks",
                hint="lower it in the task's `generation_kwargs`",
            )
        eos = str(self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False))
        stops = [text for text in handle_stop_sequences(settings["until"], eos=eos) if text]
        made = complete(
            self._policy,
            [ids[-room:] for ids in self._prompt_ids(prompts)],
            stop_ids=self._base.chat.stop_ids,
            pad_id=self._base.pad_id,
            max_new_tokens=most,
            temperature=float(settings.get("temperature", 0.0)) if settings["do_sample"] else 0.0,
            top_k=int(settings.get("top_k", 0)),
            top_p=float(settings.get("top_p", 1.0)),
            repetition_penalty=float(settings.get("repetition_penalty", 1.0)),
            batch_size=self._batch_size,
            seed=self._seed,
            stop_texts=StopTexts(stops, self.tokenizer),
            on_progress=on_progress,
        )
        for text in self.tokenizer.batch_decode(made, skip_special_tokens=True):
            yield postprocess_generated_text(text, stops, None)

    def _prompt_ids(self, prompts: Sequence[str]) -> Iterator[list[int]]:
        bos = self.tokenizer.bos_token
        for prompt in prompts:
            yield self.tokenizer.encode(
                prompt, **({"add_special_tokens": False} if has_bos_prefix(prompt, bos) else {})
            )

    def _tell(self, what: str, done: int, total: int) -> None:
        self._emit.progress(f"{self._name}: {what}", done, total, "requests")


def _grouped(requests: Sequence[Any]) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Settings, and the requests that have them."""
    groups: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(repr(sorted(request.args[1].items(), key=lambda item: item[0])), []).append(index)
    for members in groups.values():
        yield requests[members[0]].args[1], members


def _shown(text: Any) -> str:
    shown = repr(text)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
