"""What metrics are called outside of the events, and what their names say."""

from __future__ import annotations


def tag_of(name: str) -> str:
    """A tracker's name of a metric: `eval_loss` -> `eval/loss`, `learning_rate` -> `train/learning_rate`."""
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


def greater_is_better(name: str) -> bool:
    """Of a metric by its name, as transformers has it: of all but losses."""
    return not name.endswith("loss")
