"""The gateway's tests' own server as a program of its own: `python child_server.py PORT`, an engine for `ChildEngine`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import uvicorn

from gateway_bed import token_engine
from tunedock.serve.access import Access, AccessSettings
from tunedock.serve.app import create_app
from tunedock.serve.metrics import Metrics
from tunedock.serve.models import Models, Served
from tunedock.serve.records import AccessLog
from tunedock.serve.turn import Gateway

engine, generator = token_engine()
generator.pause_s = 0.02
models = Models([Served("tiny", engine, "tiny")])
log = AccessLog(Path(tempfile.mkdtemp()) / "log.jsonl")
app = create_app(Gateway(models, Access.open(AccessSettings(off=True, bind="127.0.0.1")), log, Metrics(models)))
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", lifespan="off")
