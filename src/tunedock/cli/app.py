"""The `tunedock` command: thin commands over `pipeline` and `run.store`.

Modules of this package import only typer and the standard library at their top, and what a command needs inside its function:
`--help` and shell completion must come at once, and rich, pydantic and the recipe's schema take several times as long to load as
the interpreter itself. typer's coloured help is off for the same reason.

Errors are printed once, here: `error: where: message` and `hint: ...` on standard error, or `{"error": ...}` on standard output
with `--json`; the exit code is the error's (`docs/reference/exit-codes.md`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, NoReturn

import typer

from tunedock import __version__
from tunedock.cli import (
    bundle,
    chat,
    completion,
    data,
    doctor,
    export,
    image,
    init,
    models,
    monitoring,
    pipeline,
    plan,
    recipe,
    runs,
    search,
    serve,
    stages,
    token,
)
from tunedock.cli.options import Help
from tunedock.cli.streams import prepare_streams
from tunedock.cli.text import print_json, printable
from tunedock.errors import BugError, DiskError, InterruptedRun, TunedockError

app = typer.Typer(
    help="Fine-tune large language models from one recipe.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    add_help_option=False,
)

DISK = (
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE),
)
"""Reasons that lie in the path a user gave, or in the disk it is on."""


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tunedock {__version__}")
        raise typer.Exit


@app.callback()
def root(
    _show: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, expose_value=False, callback=_version, help="Show the version and exit."
        ),
    ] = False,
    _help: Help = False,
) -> None:
    """Fine-tune large language models from one recipe."""


# The list of commands cuts a line at a terminal's 80 columns: where the first sentence is longer, a shorter one stands there.
app.command("init", short_help="Start a project: a recipe that trains, and sample data.")(init.init)
app.command("doctor", short_help="Check this machine, and say what is missing.")(doctor.doctor)
app.command("plan", short_help="Tell steps, memory and time before a run starts.")(plan.plan)
app.command("train")(stages.train)
app.command("search", short_help="Search for the best values of a recipe's keys.")(search.search)
app.command("eval", short_help="Measure a run's model beside its base.")(stages.evaluate)
app.command("chat")(chat.chat)
app.command("export", short_help="Write a run's model to a folder, checked.")(export.export)
app.command("serve", short_help="Serve models behind a gateway.")(serve.serve)
app.command("monitoring", short_help="Write files for Prometheus and Grafana.")(monitoring.monitoring)
app.command("pipeline", short_help="Run stages that build on each other.")(pipeline.pipeline)
app.add_typer(data.app, name="data", short_help="Look at the data as training sees it, or convert it.")
app.add_typer(recipe.app, name="recipe", short_help="Show a recipe in full, or make one.")
app.add_typer(runs.app, name="runs")
app.add_typer(image.app, name="image")
app.add_typer(bundle.app, name="bundle", short_help="Carry all a run needs to a machine without a network.")
app.add_typer(token.app, name="token", short_help="Say who may call the gateway, and how much.")
app.add_typer(models.app, name="models", short_help="Keep versions of models, and say which is served.")
app.command("completion", short_help="Print a script for Tab in your shell.")(completion.completion)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command and ends the process with its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in given
    prepare_streams()
    interrupts = _Interrupts()
    try:
        if given[:1] == [completion.ASK]:
            completion.answer(typer.main.get_command(app), given[1:])
        else:
            app(args=given, prog_name="tunedock")
        code = 0
    except TunedockError as error:
        code = _last_words(error, as_json)
    except BrokenPipeError:
        code = _quiet_end()
    except OSError as error:
        code = _last_words(_of_the_disk(error), as_json)
    except Exception:  # noqa: BLE001 - the policy: whatever no one foresaw is our mistake, and is shown in full
        if interrupts.came:
            sys.exit(InterruptedRun.exit_code)
        sys.stderr.write(traceback.format_exc())
        code = _last_words(_bug(), as_json)
    finally:
        interrupts.close()
    sys.exit(code)


class _Interrupts:
    """Whether Ctrl-C came. Not every library lets it through: pydantic, while it makes a schema, makes an error of it."""

    def __init__(self) -> None:
        self.came = False
        main_thread = threading.current_thread() is threading.main_thread()  # no other may hear of signals
        self._ours = main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._ours:
            signal.signal(signal.SIGINT, self._hear)

    def _hear(self, _number: int, _frame: FrameType | None) -> NoReturn:
        self.came = True
        raise KeyboardInterrupt

    def close(self) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def print_error(error: TunedockError, as_json: bool) -> None:
    if as_json:
        print_json({"error": error.to_json()})
        return
    red, cyan, bold, plain = ("\x1b[31m", "\x1b[36m", "\x1b[1m", "\x1b[0m") if _coloured() else ("",) * 4
    place = f"{bold}{printable(error.where)}{plain}: " if error.where else ""
    lines = [f"{red}error:{plain} {place}{printable(error.message)}"]
    if error.hint:
        lines.append(f"{cyan}hint:{plain} {printable(error.hint)}")
    sys.stdout.flush()
    print("\n".join(lines), file=sys.stderr, flush=True)


def _of_the_disk(error: OSError) -> TunedockError:
    """What a file system says of a path wherever we look at it is no mistake of ours; anything else is, and is shown in full."""
    if error.errno not in DISK:
        sys.stderr.write(traceback.format_exc())
        return _bug()
    where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None
    return DiskError(
        str(error.strerror), where=where, hint="give another path, or free space, or ask for the right to it"
    )


def _bug() -> BugError:
    return BugError("this is a bug in tunedock", hint="please report it with the traceback")


def _last_words(error: TunedockError, as_json: bool) -> int:
    try:
        print_error(error, as_json)
    except BrokenPipeError:
        _quiet_end()
    return error.exit_code


def _coloured() -> bool:
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _quiet_end() -> int:
    """The reader of our output is gone (`| head`). Nothing more is written, not even at the interpreter's end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
