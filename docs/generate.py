"""Writes the reference pages: `python docs/generate.py`. A test fails while a committed page differs from what this writes."""

from __future__ import annotations

from pathlib import Path

from tunedock.cli.reference import pages

FOLDER = Path(__file__).parent / "reference"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(FOLDER / name)


if __name__ == "__main__":
    main()
