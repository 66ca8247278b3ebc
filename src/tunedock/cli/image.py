"""`tunedock image`: images made, named, checked and carried."""

from __future__ import annotations

from tunedock.cli import image_versions
from tunedock.cli.options import group

app = group("Make, name, check and carry images.")
image_versions.commands(app)
