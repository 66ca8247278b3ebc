"""Stands in for `tunedock.worker` where a real one cannot fail on command: speaks its protocol and does as its script says.

    python fake_worker.py SCRIPT STAGE RUN_DIR|-

The script is a JSON list of steps: `["event", kind, fields]`, `["print", text]`, `["sleep", seconds]`, `["signal", number]`,
`["exit", code]`, `["torn", text]` (an event line without its end), `["request"]` (tells the request as a note),
`["checkpoint"]` (ready; waits for SIGINT or SIGTERM, saves, ends with 130), `["stubborn"]` (ready; ignores SIGINT and SIGTERM),
`["hungry"]` (takes memory until it is killed), `["export"]` (writes a folder as asked), `["probe", code]` (tells what Python code
leaves in `told`), `["leave_child"]` (starts a process in the same group and tells its id), `["chat"]` (answers turns; SIGINT ends
one).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tunedock.errors import InterruptedRun, RecipeError
from tunedock.events import Emitter


class Asked(BaseException):
    pass


def ask(number: int, _frame: object) -> None:
    raise Asked(number)


def checkpoint(emit: Emitter) -> None:
    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)
    try:
        emit.note("at work")
        time.sleep(60)
    except Asked as asked:
        emit.note("saved", signal=int(asked.args[0]))
        emit.emit("failure", error=InterruptedRun("stopped at step 7").to_json())
        sys.exit(130)


def chat(emit: Emitter) -> None:
    signal.signal(signal.SIGINT, ask)
    emit.note("ready")
    for line in sys.stdin:
        turn = json.loads(line)
        said = turn["messages"][-1]["content"]
        if said == "refuse":
            emit.emit("failure", error=RecipeError("this turn makes no sense").to_json())
        elif said == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif said == "long":
            try:
                emit.emit("delta", text="so")
                time.sleep(60)
            except Asked:
                emit.result({"text": "so", "stopped": True})
        else:
            roles = "".join(message["role"][0] for message in turn["messages"])
            text = f"{turn['which']} {roles} {os.getpid()}: {said}\x1b[2J"
            for piece in text.split(" "):
                emit.emit("delta", text=f"{piece} ")
            emit.result({"text": f"{text} ", "stopped": False})


def obey(step: list[Any], emit: Emitter, request: dict[str, Any]) -> None:
    match step:
        case ["event", kind, fields]:
            emit.emit(kind, **fields)
        case ["print", text]:
            print(text, flush=True)
        case ["sleep", seconds]:
            time.sleep(seconds)
        case ["signal", number]:
            if (
                signal.getsignal(number) is signal.SIG_IGN
            ):  # a shell starts what it puts in the background with SIGINT ignored
                signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        case ["exit", code]:
            sys.exit(code)
        case ["torn", text]:
            emit._stream.write(text)
            emit._stream.flush()
        case ["request"]:
            emit.note("request", request=request, session=os.getsid(0), path=sys.path)
        case ["checkpoint"]:
            checkpoint(emit)
        case ["stubborn"]:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            emit.note("at work")
            time.sleep(60)
        case ["leave_child"]:
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            emit.note("child", pid=child.pid)
        case ["hungry"]:
            held = []
            while True:
                held.append(bytearray(b"x" * (8 << 20)))
        case ["export"]:
            Path(request["to"]).mkdir()
            (Path(request["to"]) / "config.json").write_text("{}")
            emit.result({"to": request["to"]})
        case ["probe", code]:
            told: dict[str, Any] = {}
            exec(code, {"told": told})
            emit.result(told)
        case ["chat"]:
            chat(emit)
        case _:
            raise ValueError(step)


def main() -> None:
    script, stage, run = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
    request = json.loads(sys.stdin.readline())
    told = sys.stdout if run == "-" or stage == "chat" else (Path(run) / "events.jsonl").open("a", buffering=1)
    emit = Emitter(told)
    emit.stage(stage, "started")
    for step in script:
        obey(step, emit, request)


main()
