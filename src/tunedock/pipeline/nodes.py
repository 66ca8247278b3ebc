"""The machines beside the first of a training over several: each joins the run that node 0 makes, by the same recipe.

Node 0 decides which run, whether it is resumed, and when it starts again; this one comes back to each start. Where both see the
same disk the run's directory is shared. Elsewhere this machine keeps one of its own: its logs and ranks are there, and no
checkpoint, for rank 0 writes those and tells the others what is in them.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunedock.errors import BugError, InterruptedRun, RunError, TunedockError
from tunedock.launch.follow import follow
from tunedock.launch.job import JobSpec, Launcher
from tunedock.launch.local import LocalLauncher
from tunedock.launch.many import shared_run
from tunedock.launch.meeting import Start, ask_for_run
from tunedock.launch.places import launcher_for
from tunedock.launch.watch import OnEvent, watch
from tunedock.pipeline.data_images import bring_for
from tunedock.pipeline.jobs import Outcome
from tunedock.pipeline.notes import note_event
from tunedock.recipe.launch import Launch
from tunedock.recipe.resolve import Resolved
from tunedock.run.record import Run, RunState


def beside_the_first(launch: Launch) -> bool:
    return launch.nodes > 1 and bool(launch.node_rank)


def commands_elsewhere(launch: Launch, files: Sequence[Path], overrides: Sequence[str]) -> list[str]:
    """What is to be called on the other machines, by their numbers."""
    if launch.on == "compose":
        return []
    given = [text for text in overrides if not text.startswith("launch.node_rank=")]
    return [
        shlex.join(["tunedock", "train", *map(str, files), *given, f"launch.node_rank={node}"])
        for node in range(1, launch.nodes)
    ]


def join_run(resolved: Resolved, *, on_event: OnEvent, launcher: Launcher | None = None) -> Outcome:
    """Takes this machine's part in the run of node 0, to its end.

    Raises LostPeerError when node 0 does not answer within `launch.timeout_s`, and what ended this machine's part otherwise.
    """
    launch = resolved.recipe.launch
    said: set[str] = set()

    def wait(message: str) -> None:
        if message not in said:
            said.add(message)
            on_event(note_event(message))

    try:
        start = ask_for_run(str(launch.rendezvous), timeout_s=launch.timeout_s, on_wait=wait)
    except KeyboardInterrupt:
        raise InterruptedRun("stopped before node 0 had answered") from None
    _same_recipe(start, resolved)
    shared = shared_run(start)
    run = Run(shared) if shared is not None else _own_copy(start, resolved)
    where = "shared with node 0" if shared is not None else "of this machine alone"
    on_event(note_event(f"run directory: {run.path}, {where}", run=str(run.path)))
    spec = JobSpec("train", run.path, launch=launch)
    try:
        bring_for(run, on_event)
        value = _part(spec, on_event, launcher or launcher_for(launch))
    except TunedockError as error:
        if shared is None:
            status = "interrupted" if isinstance(error, InterruptedRun) else "failed"
            run.update(status=status, finished=time.time(), exit_code=error.exit_code, error=error.to_json())
        raise
    if shared is None:
        run.update(status="finished", finished=time.time(), exit_code=0)
    return Outcome(run.path, value)


def _part(spec: JobSpec, on_event: OnEvent, launcher: Launcher) -> dict[str, Any]:
    """This machine's part. In a container the one who follows stands there."""
    if isinstance(launcher, LocalLauncher):
        return follow(spec, on_event, launcher)
    job = launcher.start(spec)
    try:
        value = watch(job, on_event)
    finally:
        job.close()
    return value if isinstance(value, dict) else {"value": value}


def _same_recipe(start: Start, resolved: Resolved) -> None:
    theirs = start.resolved.get("hash")
    if theirs != resolved.hash:
        raise RunError(
            f"node 0 trains by another recipe (hash {theirs}; here {resolved.hash})",
            where=str(resolved.recipe.launch.rendezvous),
            hint="give every node the same files and keys; models and data are to lie at the same paths on each",
        )


def _own_copy(start: Start, resolved: Resolved) -> Run:
    """A run directory for this machine's logs and ranks; that of an earlier call by the same recipe is taken again."""
    given = resolved.recipe.train.output_dir
    if given is None:
        raise BugError("the resolved recipe has no train.output_dir")
    derived = resolved.origins.get("train.output_dir", "").startswith("derived")
    path = (Path(given).with_name(Path(start.run).name) if derived else Path(given)).absolute()
    if (path / "run.json").is_file() and Run(path).resolved().get("hash") == resolved.hash:
        return Run(path)
    state = RunState(**{**start.state, "name": path.name, "created": time.time(), "status": "created"})
    mine = replace(state, stage=None, started=None, finished=None, pid=None, exit_code=None, error=None)
    return Run.create(path, recipe_yaml=resolved.to_yaml(), resolved=resolved.to_json(), state=mine)
