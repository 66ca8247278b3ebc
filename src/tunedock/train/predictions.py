"""`train.predict_with_generate`: an evaluation also answers validation rows, and says how near the answers come to the rows' own.

The policy answers as it is, whole or spread over processes: no second copy of it stands anywhere. What is drawn depends on the
recipe's seed alone, so losses and weights are those of a run without answers, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tunedock.data.sample import Sample
from tunedock.data.store import SampleStore
from tunedock.errors import DataError
from tunedock.eval.metrics import bleu_tokenizer
from tunedock.eval.questions import Questions, questions_of
from tunedock.events import Emitter
from tunedock.model.chat_facts import ChatFacts
from tunedock.model.policy import Policy
from tunedock.model.session import Base
from tunedock.objective.evaluate import Measured
from tunedock.recipe.schema import Recipe
from tunedock.run.pulse import Pulse
from tunedock.train.evaluation import Evaluation


def with_answers(
    evaluation: Evaluation,
    recipe: Recipe,
    base: Base,
    facts: ChatFacts,
    policy: Policy,
    validation: Sequence[Sample],
    emit: Emitter,
    pulse: Pulse,
    check: Callable[[], None],
) -> Evaluation:
    """The evaluation, and the figures of answers beside what it measures. `check` is called before each batch of them.

    Raises DataError where no validation row is a question.
    """
    options = recipe.eval
    rows = questions_of(validation, options.max_samples) if isinstance(validation, SampleStore) else []
    if not rows:
        raise DataError(
            "no validation row has a question and an answer that is wanted, so there is nothing to compare answers with",
            where="train.predict_with_generate",
            hint="leave it out, or give `data.validation` rows of conversations",
        )
    questions = Questions(base, facts, rows)
    tokenize = bleu_tokenizer([one.reference for one in rows])
    emit.note(
        f"each evaluation answers {len(rows):,} of {len(validation):,} validation rows, with {options.max_new_tokens:,} tokens at "
        f"most; BLEU by the tokenizer {tokenize}",
        questions=len(rows),
        bleu_tokenize=tokenize,
    )

    def tell(done: int) -> None:
        pulse.doing("answers")
        emit.progress("validation answers", done, len(rows), "answers")
        check()

    def measured() -> Measured:
        found = evaluation()
        answers = questions.answered(policy, options, seed=recipe.train.seed, on_progress=tell)
        figures = questions.scored(answers).to_json()
        numbers = {name: value for name, value in figures.items() if isinstance(value, float)}
        return replace(found, metrics={**found.metrics, **numbers})

    return measured
