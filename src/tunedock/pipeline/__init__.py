"""What the commands do: resolve the recipe, make the run directory, launch the stage, watch it to its end.

Every function returns the value of the stage's `result` event, or raises the TunedockError the stage failed with. Events go to
`on_event` as they come, the result and the failure among them.
"""

from tunedock.pipeline.jobs import Outcome
from tunedock.pipeline.notes import ignore
from tunedock.pipeline.questions import data_check, data_convert, data_show, doctor, plan
from tunedock.pipeline.stages import (
    check_same_recipe,
    create_run,
    eval_section,
    evaluate,
    export,
    export_verify,
    resolve_recipe,
    train,
    write_compose,
)

__all__ = [
    "Outcome",
    "check_same_recipe",
    "create_run",
    "data_check",
    "data_convert",
    "data_show",
    "doctor",
    "eval_section",
    "evaluate",
    "export",
    "export_verify",
    "ignore",
    "plan",
    "resolve_recipe",
    "train",
    "write_compose",
]
