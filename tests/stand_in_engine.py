"""Stands in for vLLM, which wants a GPU: its OpenAI-compatible interface over HTTP in vLLM's shapes, with adapters loaded while it
runs. The answers are real: transformers generates them with the base model and the PEFT adapter that the server was told to load.

What it does not show: vLLM's own kernels, its batching, and the last digits both change.
"""

from __future__ import annotations

import copy
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

KEY = "engine-key"


class StandInEngine:
    """Set what it should do otherwise than well: `misbehave` holds what the next completions get (a status, `slow`, `html`,
    `abort`, `fewer`, `dies`), one each, and an empty word nothing."""

    def __init__(self, base: Path, name: str = "tiny", *, max_lora_rank: int = 16, max_model_len: int = 2048) -> None:
        self.url = ""
        self.name = name
        self.max_lora_rank = max_lora_rank
        self.max_model_len = max_model_len
        self.runtime_loading = True
        self.says_ids: str | None = "token_ids"
        """`token_ids`, `tokens` (an older vLLM), or None."""
        self.says_logprobs: str | None = "raw"
        """`raw`, `processed` or None, as --logprobs-mode."""
        self.applies_adapters = True
        self.key: str | None = None
        self.misbehave: list[str] = []
        self.slow_s = 1.5
        self.requests: list[dict[str, Any]] = []
        self.loads: list[str] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self._model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        self._eos = set(GenerationConfig.from_pretrained(base).eos_token_id)
        self.adapters: dict[str, Any] = {}
        self.server: uvicorn.Server | None = None
        self.app = FastAPI()
        self.app.get("/v1/models", response_model=None)(self._models)
        self.app.post("/v1/completions", response_model=None)(self._complete)
        self.app.post("/v1/load_lora_adapter", response_model=None)(self._load)
        self.app.post("/v1/unload_lora_adapter", response_model=None)(self._unload)

    def forget_adapters(self) -> None:
        """As after a new start."""
        self.adapters.clear()

    def _refused(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": "Unauthorized"}, 401)

    def _models(self, request: Request) -> Response | dict[str, Any]:
        if (refused := self._refused(request)) is not None:
            return refused
        cards = [{"id": self.name, "root": self.name, "parent": None, "max_model_len": self.max_model_len}]
        cards += [{"id": name, "root": "x", "parent": self.name} for name in self.adapters]
        return {"object": "list", "data": [{"object": "model", "created": 0, "owned_by": "vllm", **c} for c in cards]}

    def _load(self, body: dict[str, Any]) -> Response:
        if not self.runtime_loading:
            return JSONResponse({"detail": "Not Found"}, 404)
        name, path = body["lora_name"], Path(body["lora_path"])
        self.loads.append(name)
        if name in self.adapters:
            return failure(400, f"The lora adapter '{name}' has already been loaded.", "InvalidUserInput")
        if not (path / "adapter_config.json").is_file():
            return failure(404, f"Loading lora {name} failed: No adapter found for {path}", "NotFoundError")
        config = PeftConfig.from_pretrained(path)
        if config.r > self.max_lora_rank:
            return failure(400, f"LoRA rank {config.r} is greater than max_lora_rank {self.max_lora_rank}.")
        if config.use_dora:
            return failure(400, "vLLM does not yet support DoRA.")
        with self._lock:
            model = copy.deepcopy(self._model)
            self.adapters[name] = PeftModel.from_pretrained(model, path).eval() if self.applies_adapters else model
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    def _unload(self, body: dict[str, Any]) -> Response:
        name = body["lora_name"]
        if self.adapters.pop(name, None) is None:
            return failure(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    def _complete(self, body: dict[str, Any], request: Request) -> Response | dict[str, Any]:
        if (refused := self._refused(request)) is not None:
            return refused
        with self._lock:
            self.requests.append(body)
            wrong = self.misbehave.pop(0) if self.misbehave else ""
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            return self._answer(body, wrong)
        finally:
            with self._lock:
                self._at_once -= 1

    def _answer(self, body: dict[str, Any], wrong: str) -> Response | dict[str, Any]:
        if wrong.isdecimal():
            response = failure(int(wrong), "no")
            response.headers["retry-after-ms"] = "10"
            return response
        if wrong == "html":
            return PlainTextResponse("<html>gateway</html>", media_type="text/html")
        if wrong == "slow":
            time.sleep(self.slow_s)
        if wrong == "dies" and self.server is not None:
            self.server.should_exit = self.server.force_exit = True
            time.sleep(0.3)
        if body["model"] != self.name and body["model"] not in self.adapters:
            return failure(404, f"The model `{body['model']}` does not exist.", "NotFoundError")
        if body["temperature"] == 0 and body["n"] > 1:
            return failure(400, "n must be 1 when using greedy sampling, got 2.", "BadRequestError")
        with self._lock:
            choices = self._choices(body)
        if wrong == "abort":
            choices[0]["finish_reason"] = "abort"
        return {
            "id": "cmpl-x",
            "object": "text_completion",
            "created": 0,
            "model": body["model"],
            "choices": choices[1:] if wrong == "fewer" else choices,
            "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": 0, "total_tokens": 0},
        }

    @torch.no_grad()
    def _choices(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        model = self.adapters.get(body["model"], self._model)
        stops = self._eos | set(body["stop_token_ids"])
        drawn = body["temperature"] > 0
        settings: dict[str, Any] = {"do_sample": drawn, "max_new_tokens": body["max_tokens"]}
        if drawn:
            settings |= {"temperature": body["temperature"], "top_p": body["top_p"], "top_k": max(body["top_k"], 0)}
        ids = torch.as_tensor([body["prompt"]])
        with torch.random.fork_rng():
            torch.manual_seed(body["seed"])
            made = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=GenerationConfig(
                    eos_token_id=sorted(stops),
                    pad_token_id=self._tokenizer.pad_token_id,
                    num_return_sequences=body["n"],
                    **settings,
                ),
                return_dict_in_generate=True,
                output_logits=True,
                output_scores=True,
            )
        return [self._choice(body, made, line, stops) for line in range(body["n"])]

    def _choice(self, body: dict[str, Any], made: Any, line: int, stops: set[int]) -> dict[str, Any]:
        tokens: list[int] = made.sequences[line, len(body["prompt"]) :].tolist()
        end = next((place for place, token in enumerate(tokens) if token in stops), None)
        tokens = tokens if end is None else tokens[: end + 1]
        spoken = tokens if end is None else tokens[:-1]
        choice: dict[str, Any] = {
            "index": line,
            "text": self._tokenizer.decode(spoken, skip_special_tokens=body["skip_special_tokens"]),
            "logprobs": None,
            "finish_reason": "length" if end is None else "stop",
            "stop_reason": None if end is None or tokens[-1] in self._eos else tokens[-1],
        }
        if self.says_logprobs is not None and body.get("logprobs") is not None:
            steps = made.logits if self.says_logprobs == "raw" else made.scores
            choice["logprobs"] = {
                "tokens": [f"token_id:{t}" if self.says_ids == "tokens" else "x" for t in tokens],
                "token_logprobs": [
                    float(torch.log_softmax(step[line].float(), -1)[token])
                    for step, token in zip(steps, tokens, strict=False)
                ],
            }
        if self.says_ids == "token_ids" and body.get("return_token_ids"):
            choice |= {"token_ids": tokens, "prompt_token_ids": body["prompt"]}
        return choice


def failure(status: int, message: str, kind: str = "BadRequestError") -> Response:
    """As vLLM says it."""
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


@contextmanager
def serving(base: Path, *, port: int = 0, **settings: Any) -> Iterator[StandInEngine]:
    """The server on this machine, for as long as the block lasts; on a free port, unless it is to be found again."""
    engine = StandInEngine(base, **settings)
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", port))
    engine.url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    server = uvicorn.Server(uvicorn.Config(engine.app, log_level="critical", lifespan="off"))
    engine.server = server
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield engine
    finally:
        server.should_exit = True
        thread.join(5)
        listening.close()
