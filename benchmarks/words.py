"""Made-up text: words of syllables, drawn by Zipf's law as words of a language are. Seeded, so that it is the same everywhere."""

from __future__ import annotations

import numpy as np

LEXICON = 12_000
ONSETS = ("b", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "st", "tr", "br", "kl", "pl")
VOWELS = ("a", "e", "i", "o", "u", "ai", "ou", "ea")
CODAS = ("", "", "", "n", "r", "s", "l", "t", "m")


class Words:
    """Draws words."""

    def __init__(self, seed: int) -> None:
        self._draw = np.random.Generator(np.random.Philox(key=[seed, 1]))
        language = np.random.Generator(np.random.Philox(key=[2, 2]))  # one language, whatever is drawn from it
        found: dict[str, None] = {}
        while len(found) < LEXICON:
            syllables = int(language.integers(1, 5))
            found["".join(_syllable(language) for _ in range(syllables))] = None
        self.lexicon = np.asarray(sorted(found, key=len))
        weights = 1.0 / (np.arange(LEXICON) + 20.0)  # short words are the frequent ones
        self._chances = np.cumsum(weights / weights.sum())

    def draw(self, count: int) -> list[str]:
        places = np.searchsorted(self._chances, self._draw.random(count))
        return [str(word) for word in self.lexicon[np.minimum(places, LEXICON - 1)]]

    def text(self, count: int) -> str:
        return " ".join(self.draw(count))


def _syllable(draw: np.random.Generator) -> str:
    return "".join(str(part[int(draw.integers(len(part)))]) for part in (ONSETS, VOWELS, CODAS))
