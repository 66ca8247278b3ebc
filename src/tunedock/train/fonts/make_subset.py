"""Makes the font shipped here: `python make_subset.py DroidSansFallbackFull.ttf TunedockCJK-Regular.ttf`. README.md says why."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from fontTools.subset import Options, Subsetter  # type: ignore[import-untyped]
from fontTools.ttLib import TTFont  # type: ignore[import-untyped]

FAMILY = "Tunedock CJK"
"""Not the original's name: a subset must never be mistaken for the whole font where both are installed."""

LEVEL_1 = range(0xB0, 0xD8)
"""Lead bytes of GB 2312 level 1: the 3,755 characters in common use."""
PUNCTUATION_AND_KANA = (0xA1, 0xA3, 0xA4, 0xA5)


def characters() -> Iterator[int]:
    """Code points of the subset: GB 2312 level 1, CJK punctuation, full-width forms, kana."""
    for lead in (*PUNCTUATION_AND_KANA, *LEVEL_1):
        for trail in range(0xA1, 0xFF):
            text = bytes([lead, trail]).decode("gb2312", errors="ignore")
            if text:
                yield ord(text)


def main(source: Path, target: Path) -> None:
    options = Options()
    options.hinting = False
    options.layout_features = []
    options.drop_tables += ["vhea", "vmtx", "GDEF", "GPOS", "GSUB"]  # vertical text and shaping: titles need neither
    options.notdef_outline = True
    options.name_IDs = ["*"]  # copyright, trademark and licence stay in the file
    font = TTFont(source, recalcTimestamp=False)
    subsetter = Subsetter(options)
    subsetter.populate(unicodes=set(characters()))
    subsetter.subset(font)
    for name_id, text in {
        1: FAMILY,
        3: f"{FAMILY} - subset of Droid Sans Fallback",
        4: FAMILY,
        6: "TunedockCJK",
    }.items():
        font["name"].setName(text, name_id, 3, 1, 0x409)
    font["name"].names = [name for name in font["name"].names if (name.platformID, name.platEncID) == (3, 1)]
    font.save(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
