"""Held-out rows as questions: asked of a policy, and what its answers have of the rows' own.

Where several processes train together each answers its part, and all know every answer: the figures are those of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tunedock.data.conversation import Conversation, Labelled, Message, Preference, Prompt
from tunedock.data.store import SampleStore
from tunedock.eval.metrics import GenerationScores, score
from tunedock.model import world
from tunedock.model.answers import Sampled, Sampler, Sampling
from tunedock.model.chat_facts import ChatFacts
from tunedock.model.policy import Policy
from tunedock.model.session import Base
from tunedock.recipe.schema import Eval


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out row as a question: what stands before its last answer, and that answer."""

    row_id: str
    prompt: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    reference: str


class Questions:
    """Questions as prompts of a model's chat."""

    def __init__(self, base: Base, facts: ChatFacts, asked: Sequence[Question]) -> None:
        self.asked = asked
        self._base = base
        self._stop_ids = facts.stop_ids
        self._prompts = [base.chat.prompt_ids(one.prompt, one.tools, thinking=facts.thinking) for one in asked]

    def __len__(self) -> int:
        return len(self.asked)

    def answered(
        self, policy: Policy, options: Eval, *, seed: int, on_progress: Callable[[int], None] = lambda done: None
    ) -> list[str]:
        """The policy's answers in the questions' order, without their reasoning; all of them on each rank. A collective call.

        What is drawn depends on `seed` alone, and nothing is drawn from the generators that training draws from.
        """
        sampler = Sampler(policy, stop_ids=self._stop_ids, pad_id=self._base.pad_id, batch_size=options.batch_size)
        own = world.own_of(len(self))
        made = sampler(
            [self._prompts[i] for i in own],
            1,
            Sampling(options.max_new_tokens, options.temperature),
            seed=seed,
            between=lambda done: on_progress(min(done * world.size(), len(self))),
            numbers=own,
        )
        texts = self._base.tokenizer.batch_decode([_said(one) for (one,) in made], skip_special_tokens=True)
        world.wait_for_all()
        return world.in_order(len(self), own, [answer_text(text) for text in texts])

    def scored(self, answers: Sequence[str]) -> GenerationScores:
        """What the answers, one to each question, have of the rows' own."""
        return score(answers, [one.reference for one in self.asked])


def questions_of(store: SampleStore, limit: int | None) -> list[Question]:
    """The conversations of a side as questions, in the side's order; of a pair, the chosen answer is the one wanted. Documents give
    none, and completions that are not wanted neither."""
    questions: list[Question] = []
    for i in range(len(store)):
        if limit is not None and len(questions) == limit:
            break
        stored = store.stored(i)
        example = stored.example
        if stored.sample.wanted is False:
            continue
        if isinstance(example, Prompt):
            questions.append(Question(stored.sample.row_id, example.prompt, example.tools, example.answer or ""))
            continue
        if isinstance(example, Preference):
            messages = (*example.prompt, *example.chosen)
        elif isinstance(example, Labelled):
            messages = (*example.prompt, *example.completion)
        elif isinstance(example, Conversation):
            messages = example.messages
        else:
            continue
        last = max(n for n, message in enumerate(messages) if message.role == "assistant")
        questions.append(Question(stored.sample.row_id, messages[:last], example.tools, messages[last].content))
    return questions


def answer_text(text: str) -> str:
    """A completion without its reasoning."""
    return text.rpartition("</think>")[2].strip()


def _said(answer: Sampled) -> list[int]:
    """Without the stop token, which need not be one that decoding leaves out."""
    return list(answer.ids[:-1] if answer.stopped else answer.ids)
