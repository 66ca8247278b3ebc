"""`tunedock runs list`, `show`, `stop`, `compare`, `metrics`, `delete`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from tunedock.cli.options import RUNS_DIR, Json, RunName, RunsDir, group
from tunedock.errors import RecipeError

app = group("List, inspect, stop, compare and delete runs.")


@app.command("list")
def list_(runs_dir: RunsDir = RUNS_DIR, as_json: Json = False) -> None:
    """List the runs, newest first."""
    from tunedock.cli.results import add_row, number, table
    from tunedock.cli.show import console, duration
    from tunedock.cli.text import print_json, printable
    from tunedock.run.store import list_runs

    runs = list_runs(Path(runs_dir))
    if as_json:
        print_json([run.to_json() for run in runs])
        return
    out = console()
    if not runs:
        print(f"no runs in {printable(runs_dir)}; `--runs-dir` looks elsewhere", file=sys.stderr)
        return
    made = table(
        "name",
        "status",
        "objective",
        "model",
        "started",
        "duration",
        "steps",
        "train loss",
        "eval loss",
        numbers_from=5,
    )
    for run in runs:
        figures = [number(figure) for figure in (run.steps, run.loss, run.eval_loss)]
        add_row(
            made, run.name, run.status, run.objective, run.model, _when(run.started), duration(run.duration_s), *figures
        )
    out.print(made)


@app.command("show")
def show(run: RunName, runs_dir: RunsDir = RUNS_DIR, as_json: Json = False) -> None:
    """Show one run: state, newest metrics, error, processes at work."""
    from tunedock.cli.results import add_row, number, table
    from tunedock.cli.show import console
    from tunedock.cli.text import print_json
    from tunedock.run.store import find, flatten, last_metrics

    found = find(run, Path(runs_dir))
    state = found.state()
    metrics = last_metrics(found.events)
    from dataclasses import asdict, replace

    from tunedock.launch.at_work import container_at_work
    from tunedock.run.pulse import beats_of

    placed = container_at_work(found)
    if placed is not None and state.status == "lost":  # a sandbox that keeps the run's lock to itself
        state = replace(state, status="running")
    ranks = beats_of(found.ranks) if state.status == "running" else []
    if as_json:
        told = {**asdict(state), "path": str(found.path), "metrics": metrics}
        if placed is not None:
            told["container"] = {"name": placed.name, "image": placed.image, "engine": placed.engine}
        print_json({**told, "ranks": [asdict(beat) for beat in ranks]} if ranks else told)
        return
    made = table("", "")
    made.show_header = False
    times = {"created", "started", "finished"}
    add_row(made, "path", found.path)
    if placed is not None:
        add_row(made, "container", f"{placed.name} ({placed.stage}), of {placed.image}, at {placed.engine}")
    for key, value in flatten(asdict(state)).items():
        if value is not None and value != {}:
            add_row(made, key, _when(value) if key in times else value)
    for key, value in metrics.items():
        add_row(made, key, number(value))
    for beat in ranks:
        waits = ", waits for the others" if beat.waits else ""
        place = f"{beat.host}, step {beat.step + 1}, {beat.what}{waits}"
        add_row(made, f"rank {beat.rank}", f"{place}, {max(0.0, time.time() - beat.time):.0f} s ago")
    console().print(made)


@app.command("stop", short_help="Stop what is at work in a run.")
def stop(
    run: RunName,
    now: Annotated[bool, typer.Option("--now", help="End it at once, without a checkpoint.")] = False,
    runs_dir: RunsDir = RUNS_DIR,
    as_json: Json = False,
) -> None:
    """Stop what is at work in a run, here or in a container, and wait for its end: a training saves a checkpoint, as by Ctrl-C."""
    from tunedock.cli.text import print_json, printable
    from tunedock.launch import at_work
    from tunedock.run.store import find

    found = find(run, Path(runs_dir))
    stopped = at_work.stop(found, now=now)
    if as_json:
        print_json({"run": str(found.path), "stopped": stopped})
    else:
        print(f"stopped {stopped}; go on with `tunedock train --resume {printable(found.name)}`")


@app.command("compare", short_help="Show what differs between runs.")
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Two runs or more.", show_default=False)],
    runs_dir: RunsDir = RUNS_DIR,
    as_json: Json = False,
) -> None:
    """Show what differs between runs: recipe keys, and their newest metrics."""
    from dataclasses import asdict

    from tunedock.cli.results import add_row, number, table
    from tunedock.cli.show import console
    from tunedock.cli.text import print_json
    from tunedock.run import store

    comparison = store.compare([store.find(run, Path(runs_dir)) for run in runs])
    if as_json:
        print_json(asdict(comparison))
        return
    out = console()
    made = table("recipe", *comparison.names)
    for key, values in comparison.recipe.items():
        add_row(made, key, *values)
    if not comparison.recipe:
        add_row(made, "no key differs")
    out.print(made)
    if comparison.metrics:
        out.print()
        made = table("metric", *comparison.names, numbers_from=1)
        for key, figures in comparison.metrics.items():
            add_row(made, key, *(number(figure) for figure in figures))
        out.print(made)


@app.command("metrics", short_help="Answer Prometheus with what runs tell.")
def metrics(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Which runs; all of the folder by default.", show_default=False),
    ] = None,
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="Where to answer; nobody is asked who they are.")
    ] = "127.0.0.1:9400",
    runs_dir: RunsDir = RUNS_DIR,
) -> None:
    """Answer Prometheus at `/metrics` with what runs tell, until Ctrl-C.

    Status, steps, the newest of every figure, warnings and failures, read from the run directories: a run is never waited for.
    """
    from tunedock.run import exporter, store

    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise RecipeError(f"`{listen}` is no address", where="--listen", hint="write for example 127.0.0.1:9400")
    folder = Path(runs_dir)
    named = [store.find(name, folder) for name in runs or []]
    server, thread = exporter.serve(lambda: named or store.runs_in(folder), host=host.strip("[]"), port=int(port))
    print(f"http://{host}:{server.server_port}/metrics", flush=True)
    try:
        thread.join()
    except KeyboardInterrupt:
        server.shutdown()


@app.command("delete")
def delete(
    run: RunName,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    runs_dir: RunsDir = RUNS_DIR,
    as_json: Json = False,
) -> None:
    """Delete a run and all it made."""
    from tunedock.cli.text import print_json, printable
    from tunedock.launch.at_work import refuse_at_work
    from tunedock.run import store

    found = store.find(run, Path(runs_dir))
    refuse_at_work(found)
    if not yes:
        if not sys.stdin.isatty():
            raise RecipeError(
                "deleting asks first, and there is no terminal to ask on", where="runs delete", hint="give --yes"
            )
        if not typer.confirm(f"Delete {printable(found.path)} and all in it?", err=True):
            raise typer.Exit(1)
    store.delete(found, Path(runs_dir))
    if as_json:
        print_json({"deleted": str(found.path)})
    else:
        print(f"deleted {printable(found.path)}")


def _when(seconds: float | None) -> str:
    """Local time, to the minute."""
    import time

    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
