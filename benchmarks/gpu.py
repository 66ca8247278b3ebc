"""SFT of a model of 8B shape on one GPU: tunedock beside TRL with the best kernels installed, LoRA and full; tunedock's LoRA also
with compiled layers and on a base in float8.

    python -m benchmarks.gpu [--steps 10] [--batch 16] [--sides tunedock-lora,trl-lora,...] [--repeats 3]

Weights are random and made on the device (Qwen3-8B's shape; `--model tiny` tries the program out, on a CPU too). Both sides train
on the same rows in bfloat16: lognormal lengths up to 4,096 tokens, 29.5 % of them with loss. TRL packs rows and uses
FlashAttention and Liger where they are installed. It runs in this environment, which needs `trl`; each side in a process of its
own, interleaved. Model FLOP utilisation counts the operations that are needed (`benchmarks.operations`) against the best
bfloat16 product of the same run and against `--nominal`, what the maker says of the card.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import data, models, operations, peak
from benchmarks.models import Shape
from benchmarks.peers import ROOT
from benchmarks.results import RESULTS

SHAPES = {
    "8b": Shape(
        vocab_size=151_936, hidden_size=4096, intermediate_size=12_288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128,
    ),
    **models.SHAPES,
}  # fmt: skip
SIDES = ("tunedock-lora", "tunedock-lora-compiled", "tunedock-lora-fp8", "trl-lora", "tunedock-full", "trl-full")
MAX_LENGTH = 4096
LORA_R = 16
NOMINAL = 989e12
"""Dense bfloat16 operations a second of an H100 or H200, by its data sheet."""
TIMEOUT_S = 1800
SEED = 42


@dataclass(frozen=True, slots=True)
class Measured:
    side: str
    seconds: list[float]
    """Of each steady step."""
    tokens: list[int]
    trained: list[int]
    lengths: list[list[int]]
    losses: list[float]
    peak_bytes: int
    best_product: float
    about: dict[str, str]


@dataclass(frozen=True, slots=True)
class Job:
    side: str
    model: str
    steps: int
    batch: int
    rows: str
    """Folder with the data."""

    @property
    def full(self) -> bool:
        return _is_full(self.side)


def _is_full(side: str) -> bool:
    return side.endswith("full")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--model", choices=tuple(SHAPES), default="8b")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--nominal", type=float, default=NOMINAL)
    parser.add_argument("--job", help="one run, as JSON, in this process")
    options = parser.parse_args(arguments)
    if options.job:
        print(json.dumps(asdict(_measure(Job(**json.loads(options.job))))))
        return 0
    tokenizer = models.ensure("tiny")
    folder = data.ensure("sft", options.batch * options.steps, data.tokenizer_of(tokenizer), seed=SEED)
    jobs = [Job(side, options.model, options.steps, options.batch, str(folder)) for side in options.sides.split(",")]
    found = [one for _ in range(options.repeats) for job in jobs if (one := _in_a_process(job)) is not None]
    written = table(found, SHAPES[options.model], options.nominal)
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = f"gpu-{_device_name()}-{options.model}"
    (RESULTS / f"{name}.json").write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(written, encoding="utf-8")
    print(written)
    return int(len(found) < len(jobs) * options.repeats)


def _in_a_process(job: Job) -> Measured | None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--job", json.dumps(asdict(job))]
    try:
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        print(f"{job.side}: no answer after {TIMEOUT_S} s", file=sys.stderr, flush=True)
        return None
    if ended.returncode:
        print(f"{job.side} failed:\n{ended.stderr[-2000:]}", file=sys.stderr, flush=True)
        return None
    one = Measured(**json.loads(ended.stdout.splitlines()[-1]))
    print(f"{one.side}: {sum(one.tokens) / sum(one.seconds):,.0f} tokens/s", file=sys.stderr, flush=True)
    return one


def table(found: Sequence[Measured], shape: Shape, nominal: float) -> str:
    """A line a side: medians of its runs."""
    lines = [
        "| side | tokens/s | of the best product | of the nominal peak | peak memory, GB | first loss | with |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for side in dict.fromkeys(one.side for one in found):
        runs = [one for one in found if one.side == side]
        speed = statistics.median(sum(one.tokens) / sum(one.seconds) for one in runs)
        rate = statistics.median(_needed(one, shape) / sum(one.seconds) for one in runs)
        best = max(one.best_product for one in runs)
        memory = max(one.peak_bytes for one in runs) / 1e9
        about = ", ".join(f"{name} {value}" for name, value in runs[0].about.items())
        lines.append(
            f"| {side} | {speed:,.0f} | {rate / best:.0%} | {rate / nominal:.0%} | {memory:.1f} | {runs[0].losses[0]:.4f} "
            f"| {about} |"
        )
    return "\n".join(lines) + "\n"


def _needed(one: Measured, shape: Shape) -> float:
    lora_r = None if _is_full(one.side) else LORA_R
    return sum(
        operations.training_operations(shape, lengths, trained, lora_r=lora_r)
        for lengths, trained in zip(one.lengths, one.trained, strict=True)
    )


# -- in the process of a side --------------------------------------------------------------------------------------------


def _measure(job: Job) -> Measured:
    return _ours(job) if job.side.startswith("tunedock") else _trl(job)


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _device_name() -> str:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return name.lower().replace(" ", "-")


def _fresh_model(job: Job) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    shape = asdict(SHAPES[job.model])
    config = Qwen3Config(**shape, max_position_embeddings=MAX_LENGTH, tie_word_embeddings=job.model != "8b")
    torch.manual_seed(SEED)
    with _device():
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _peak_bytes() -> int:
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    import os

    from benchmarks.memory import high_water_bytes

    return high_water_bytes(os.getpid())


def _best_product() -> float:
    """Operations a second of the best bfloat16 product here."""
    import torch

    if not torch.cuda.is_available():
        return peak.best_product()[0]
    best = 0.0
    for m, k, n in ((8192, 4096, 12_288), (16_384, 4096, 4096), (8192, 8192, 8192)):
        a, b = (torch.randn(*size, device="cuda", dtype=torch.bfloat16) for size in ((m, k), (k, n)))
        for _ in range(5):
            a @ b
        event: Any = torch.cuda.Event
        begin, end = event(enable_timing=True), event(enable_timing=True)
        begin.record()
        for _ in range(30):
            a @ b
        end.record()
        torch.cuda.synchronize()
        best = max(best, 30 * 2.0 * m * k * n / (begin.elapsed_time(end) / 1e3))
    return best


def _ours(job: Job) -> Measured:
    """The parts of tunedock's loop, one step after the other: `tunedock train` would read the weights from a disk first."""
    import torch
    from transformers import AutoTokenizer

    from tunedock.data.chat import Chat
    from tunedock.data.formats import detect, parse
    from tunedock.model.adapter import attach
    from tunedock.model.compiling import compile_layers
    from tunedock.model.policy import Policy, Precision
    from tunedock.model.quantize import quantised, to_fp8
    from tunedock.recipe.adapters import Full, Lora
    from tunedock.recipe.schema import Source, Train
    from tunedock.train.optimizer import make_updater

    tokenizer = AutoTokenizer.from_pretrained(models.ensure("tiny"))
    chat = Chat(
        tokenizer, stop_ids={tokenizer.eos_token_id}, max_length=MAX_LENGTH, over_length="drop", train_on="assistant"
    )
    rows = [json.loads(line) for line in (Path(job.rows) / "ordered.jsonl").read_text(encoding="utf-8").splitlines()]
    source = Source(path="rows")
    kind = detect(rows, source)
    examples = [(str(i), parse(row, kind, source.columns, system=None)) for i, row in enumerate(rows)]
    samples = [made.sample for outcome in chat.encode(examples) for made in outcome]  # type: ignore[union-attr]
    bf16 = torch.bfloat16
    adapter = Full() if job.full else Lora(r=LORA_R, alpha=2 * LORA_R)
    base = _fresh_model(job)
    if job.side.endswith("fp8"):
        to_fp8(base)
    compiled = job.side.endswith("compiled")
    precision = Precision(torch.float32 if job.full else bf16, bf16)
    policy = Policy(attach(base, adapter, seed=SEED), _device(), precision, to_compile=compiled)
    policy.probe()
    policy.weighted_sum = True
    if compiled:
        compile_layers(policy.model)
    optim = "adamw_8bit" if job.full and importlib.util.find_spec("bitsandbytes") else "adamw_torch_fused"
    train = Train(learning_rate=1e-4, lr_scheduler_type="constant", optim=optim, bf16=True)
    updater = make_updater(policy.trainable, train, total_steps=job.steps, device=policy.device)
    policy.model.train()
    seconds, losses = [], []
    for step in range(job.steps):
        batch = samples[step * job.batch : (step + 1) * job.batch]
        started = _now()
        count = sum(sample.weight for sample in batch)
        loss = torch.zeros((), device=policy.device)
        for row in policy.rows(batch, 4 * MAX_LENGTH):
            logprob_N, tensors = policy.logprobs(row)
            share = -(tensors.weight_N * logprob_N).sum() / count
            updater.backward(share)
            loss += share.detach()
        updater.clip()
        updater.update()
        losses.append(float(loss))
        seconds.append(_now() - started)
    about = {"layout": policy.layout, "optimizer": optim, "fused": " ".join(policy.fused) or "nothing"}
    if (narrow := quantised(base)) is not None:
        about["products"] = "float8" if narrow.products else "widened"
    return _answer(job, seconds, losses, about)


def _trl(job: Job) -> Measured:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    ends: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            ends.append(-_now())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends[-1] += _now()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    flash = importlib.util.find_spec("flash_attn") is not None
    liger = torch.cuda.is_available() and importlib.util.find_spec("liger_kernel") is not None
    model = _fresh_model(job)
    if torch.cuda.is_available():
        model.set_attn_implementation("flash_attention_2" if flash else "sdpa")
    lines = (Path(job.rows) / "completions.jsonl").read_text(encoding="utf-8").splitlines()
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=job.batch,
            max_steps=job.steps,
            max_length=MAX_LENGTH,
            padding_free=flash,  # its flattened rows need FlashAttention to be kept apart
            use_liger_kernel=liger,
            gradient_checkpointing=False,
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            optim="adamw_8bit" if job.full and importlib.util.find_spec("bitsandbytes") else "adamw_torch_fused",
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=SEED,
        )
        adapter = LoraConfig(r=LORA_R, lora_alpha=2 * LORA_R, target_modules="all-linear", task_type="CAUSAL_LM")
        SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
            processing_class=AutoTokenizer.from_pretrained(models.ensure("tiny")),
            peft_config=None if job.full else adapter,
            callbacks=[Clock()],
        ).train()
    about = {"attention": "flash_attention_2" if flash else "sdpa", "liger": str(liger), "optimizer": config.optim}
    return _answer(job, ends, losses, about)


def _answer(job: Job, seconds: list[float], losses: list[float], about: dict[str, str]) -> Measured:
    """The first fifth of the steps, two at least, is left out: kernels are compiled and chosen in it."""
    facts = data.read_facts(Path(job.rows))
    first = max(2, job.steps // 5)
    lengths = [
        [length for row in facts.lengths[step * job.batch : (step + 1) * job.batch] for length in row]
        for step in range(first, job.steps)
    ]
    trained = [sum(facts.trained[step * job.batch : (step + 1) * job.batch]) for step in range(first, job.steps)]
    peak_bytes = _peak_bytes()
    tokens = [sum(step) for step in lengths]
    return Measured(job.side, seconds[first:], tokens, trained, lengths, losses, peak_bytes, _best_product(), about)


def _now() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
