"""One of two ranks: `torchrun ... judged_rank.py FOLDER` writes what answers and their scores come to there. The first answers even
prompts, the second odd ones; what makes answers and texts is a stand-in, what scores and tells is not."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tunedock.data.conversation import Message, Prompt
from tunedock.data.sample import single
from tunedock.errors import TunedockError
from tunedock.eval.judged import Asked, Judged
from tunedock.eval.rewards.completion import Completion, Log, Moment, Values
from tunedock.eval.rewards.scoring import Scorer, Weighted
from tunedock.model import world
from tunedock.model.answers import Sampled, Sampling

PROMPTS = 5


class StandInAnswers:
    """Each prompt is answered by itself."""

    shared_out = True

    def __call__(self, prompts: Sequence[Sequence[int]], answers: int, *_: Any, **__: Any) -> list[list[Sampled]]:
        return [[Sampled(tuple(prompt), True)] * answers for prompt in prompts]


class StandInTokenizer:
    def batch_decode(self, ids: Sequence[Sequence[int]], **_: Any) -> list[str]:
        return [" ".join(map(str, one)) for one in ids]


class FirstToken:
    """A source that has a say about some answers only."""

    def __init__(self, say: Callable[[int], float | None]) -> None:
        self._say = say

    def values(self, completions: Sequence[Completion], moment: Moment, log: Log) -> Values:
        return [self._say(one.token_ids[0]) for one in completions]

    def lineage(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def judged(say: Callable[[int], float | None]) -> Any:
    sources = {"some": Weighted(FirstToken(say), 1.0), "all": Weighted(FirstToken(float), 1.0)}
    ask = Judged(StandInAnswers(), Scorer(sources), StandInTokenizer(), 0.0)  # type: ignore[arg-type]
    asked = [Asked(single(f"d:{n}", [n], [0.0]), Prompt((Message("user", "?"),), answer=None)) for n in range(PROMPTS)]
    return ask(asked, 2, Sampling(4), seed=0, between=lambda done: None, moment=Moment())


def main(folder: Path) -> None:
    with world.joined(timeout_s=30) as own:
        made, rewards, told = judged(lambda n: 1.0 + n if n in (0, 1, 3) else None)
        said: dict[str, Any] = {
            "ids": [[list(one.ids) for one in group] for group in made],
            "rewards": rewards.tolist(),
        }
        said["told"] = told
        try:
            judged(lambda n: float("nan") if n == 3 else 1.0)
        except TunedockError as error:
            said["error"] = [type(error).__name__, error.where]
        said["in step"] = world.told_by_all(own.number)
    (folder / f"{own.number}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
