"""`tunedock chat`: a conversation with a run's model, on a terminal or from a pipe (one user turn a line)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunedock.cli.options import RUNS_DIR, RunName, RunsDir
from tunedock.cli.text import printable
from tunedock.errors import DataError, TunedockError

if TYPE_CHECKING:
    from tunedock.events import Event
    from tunedock.launch.chat import ChatSession, Which

HELP = "/system TEXT sets the system prompt, /base and /tuned choose the model, /reset starts anew, /exit leaves"


def chat(
    run: RunName,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System prompt.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Talk to the base model first.")] = False,
    runs_dir: RunsDir = RUNS_DIR,
) -> None:
    """Talk to a run's model.

    Commands: /system TEXT, /base, /tuned, /reset, /exit. Ctrl-C stops an answer, or leaves at the prompt; Ctrl-D leaves.
    """
    from tunedock.cli.show import console, say
    from tunedock.launch.chat import ChatSession
    from tunedock.launch.places import launcher_of
    from tunedock.run.store import find

    found = find(run, Path(runs_dir))
    errors = console(stderr=True)

    def tell(event: Event) -> None:
        say(errors, event)

    which: Which = "base" if base else "tuned"
    with ChatSession(found.path.absolute(), launcher_of(found), which=which, on_event=tell) as session:
        Conversation(session, which, system).talk()


class Conversation:
    """The turns so far, and the commands between them."""

    def __init__(self, session: ChatSession, which: Which, system: str | None) -> None:
        self._session = session
        self._which: Which = which
        self._system = system
        self._turns: list[dict[str, str]] = []
        self._interactive = sys.stdin.isatty()

    def talk(self) -> None:
        self._say(HELP)
        while True:
            try:
                line = input(f"{self._which}> ") if self._interactive else sys.stdin.readline()
            except (EOFError, KeyboardInterrupt):
                self._say("")
                return
            except UnicodeDecodeError as error:
                wrong = DataError(
                    f"a line is not {error.encoding}: {error.reason} (byte 0x{error.object[error.start]:02x})",
                    where="standard input",
                    hint="convert it with `iconv`, or name its encoding in PYTHONIOENCODING",
                )
                if not self._interactive:
                    raise wrong from None
                print(f"error: {wrong}", file=sys.stderr)
                continue
            if not line and not self._interactive:
                return
            line = line.strip()
            if line.startswith("/"):
                if not self._command(line):
                    return
            elif line:
                self._turn(line)

    def _command(self, line: str) -> bool:
        """Obeys a command; False to leave."""
        name, _, rest = line.partition(" ")
        match name:
            case "/exit":
                return False
            case "/system":
                self._system = rest.strip() or None
                self._turns.clear()
                self._say(
                    "system prompt set; the conversation starts anew" if self._system else "system prompt taken away"
                )
            case "/base":
                self._which = "base"
            case "/tuned":
                self._which = "tuned"
            case "/reset":
                self._turns.clear()
            case _:
                print(f"no such command: {name}. {HELP}", file=sys.stderr)
        return True

    def _turn(self, text: str) -> None:
        system = [{"role": "system", "content": self._system}] if self._system else []
        question = {"role": "user", "content": text}
        pieces: list[str] = []
        try:
            answer = self._session.turn(
                [*system, *self._turns, question], lambda piece: self._write(piece, pieces), which=self._which
            )
        except KeyboardInterrupt:
            print(flush=True)
            self._say("stopped; this turn is forgotten")
            return
        except TunedockError as error:
            if not self._interactive or not self._session.ready:
                raise
            print(f"error: {printable(error)}", file=sys.stderr)  # of this turn only; a person may try another
            return
        if not pieces:
            self._write(answer, pieces)
        print(flush=True)
        self._turns += [question, {"role": "assistant", "content": answer}]

    def _write(self, piece: str, pieces: list[str]) -> None:
        pieces.append(piece)
        sys.stdout.write(printable(piece))
        sys.stdout.flush()

    def _say(self, text: str) -> None:
        """For people only: a script that pipes its turns in reads the answers alone."""
        if self._interactive:
            print(text, file=sys.stderr)
