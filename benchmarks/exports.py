"""What every form of an export keeps of a run: the table of docs/exports.md.

    python -m benchmarks.exports                    five families, every form: about fifteen minutes on two cores
    python -m benchmarks.exports --only qwen3       this family anew; the others' rows stay as they were measured
    python -m benchmarks.exports --table            the table anew from what was measured

A family is a model of four layers and a tokenizer of its kind, trained from nothing on the demo's messages by `tunedock train`. A
row is `tunedock export RUN --format F --quantize K`, as anyone can type it, and its figures are those of the export's own report.
Forms of llama.cpp need llama-cpp-python.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peers import ROOT
from benchmarks.report import into_page
from benchmarks.results import RESULTS, Machine, this_machine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAGE = ROOT / "docs" / "exports.md"
MESSAGES = ROOT / "examples" / "demo" / "triage.jsonl"
TIMEOUT_S = 900.0
STEPS = 120
VOCABULARY = 4096
FAMILIES = ("qwen3", "qwen2", "llama", "mistral", "gemma2")
FORMS = (
    *(("hf", kind) for kind in (None, "int8", "int8-dynamic", "int4", "nf4")),
    *(("gguf", kind) for kind in ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0")),
    ("ollama", "q8_0"),
)
TURN, END, PAD, BOS = "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>"
TEMPLATE = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
SPLITS = {
    "qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A form of a family's run."""

    family: str
    form: str
    kind: str
    bytes: int
    """Of the weights alone."""
    seconds: float
    """Of the whole export, its checks among them."""
    report: dict[str, Any]
    template: dict[str, Any] | None = None
    """Ollama's: what came of comparing."""


@dataclass(slots=True)
class Report:
    machine: Machine
    date: str
    rows: list[Row] = field(default_factory=list)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Report:
        value = json.loads(path.read_text(encoding="utf-8"))
        return cls(Machine(**value["machine"]), value["date"], [Row(**row) for row in value["rows"]])


def texts() -> Iterator[str]:
    with MESSAGES.open(encoding="utf-8") as lines:
        for line in lines:
            yield from (message["content"] for message in json.loads(line)["messages"])


def byte_level(split: str) -> PreTrainedTokenizerFast:
    """As Qwen and Llama 3 have it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False, special_tokens=[PAD, TURN, END]
    )
    made.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, pad_token=PAD)


def by_pieces(*, prefixed: bool) -> PreTrainedTokenizerFast:
    """As Gemma (`prefixed` false) and the first Mistral have it: spaces are `▁`, what no piece has becomes bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 300, show_progress=False, special_tokens=["<unk>"])
    trained.train_from_iterator((line for text in texts() for line in text.splitlines()), trainer)
    told = json.loads(trained.to_str())["model"]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + sorted(told["vocab"], key=told["vocab"].__getitem__)
    made = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[tuple(merge) for merge in told["merges"]],
            byte_fallback=True,
            fuse_unk=True,
            unk_token="<unk>",  # noqa: S106 - no password
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefixed else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, TURN, END, BOS)])
    made.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, made.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=BOS, eos_token=END, pad_token=PAD, unk_token="<unk>"  # noqa: S106
    )  # fmt: skip


def make(family: str, folder: Path) -> None:
    """A model of the family with fresh weights, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    tokenizer = {
        "qwen3": lambda: byte_level(SPLITS["qwen"]),
        "qwen2": lambda: byte_level(SPLITS["qwen"]),
        "llama": lambda: byte_level(SPLITS["llama"]),
        "mistral": lambda: by_pieces(prefixed=True),
        "gemma2": lambda: by_pieces(prefixed=False),
    }[family]()
    tokenizer.chat_template = TEMPLATE if tokenizer.bos_token is None else f"{{{{- bos_token -}}}}{TEMPLATE}"
    shape: dict[str, Any] = {
        "vocab_size": -(-len(tokenizer) // 64) * 64, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048, "head_dim": 32,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": family in ("qwen3", "qwen2", "gemma2"),
    }  # fmt: skip
    kinds: dict[str, Any] = {
        "qwen3": Qwen3Config, "qwen2": Qwen2Config, "llama": LlamaConfig, "mistral": MistralConfig, "gemma2": Gemma2Config,
    }  # fmt: skip
    more: dict[str, dict[str, Any]] = {
        "mistral": {"sliding_window": None},
        "gemma2": {"query_pre_attn_scalar": 32, "sliding_window": 1024},
    }
    if family == "qwen2":
        del shape["head_dim"]
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(kinds[family](**shape, **more.get(family, {})))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(family: str, folder: Path) -> Iterator[Row]:
    """Trains the family's model and exports it in every form."""
    base = folder / "base"
    make(family, base)
    run = folder / "run"
    recipe = {
        "model": str(base),
        "adapter": "full",
        "data": {"train": str(MESSAGES), "max_length": 512, "cache_dir": str(folder / "cache")},
        "train": {
            "max_steps": STEPS,
            "learning_rate": 2e-3,
            "batch_size": 16,
            "report_to": "none",
            "output_dir": str(run),
        },
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    call("train", str(folder / "recipe.yaml"))
    for form, kind in FORMS:
        to = folder / f"{form}-{kind}"
        told = call(
            "export", str(run), "--to", str(to), "--format", form, "--max-perplexity-change", "9", "--json",
            *(["--quantize", kind] if kind else []),
        )  # fmt: skip
        value = json.loads(told)
        size = sum(path.stat().st_size for path in to.iterdir() if path.suffix in (".safetensors", ".gguf"))
        template = value["checks"].get("ollama_template")
        yield Row(family, form, value["kind"], size, value["seconds"], value["report"], template)


def call(*arguments: str) -> str:
    """A command of tunedock's; what it prints. Raises CalledProcessError."""
    line = [sys.executable, "-m", "tunedock", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        done.check_returncode()
    return done.stdout


HEAD = (
    "family",
    "form",
    "weights",
    "of float32",
    "perplexity",
    "answers",
    "tokens",
    "texts",
    "prompts",
    "loads in",
    "speed",
)


def markdown(report: Report) -> str:
    lines: list[tuple[str, ...]] = [HEAD, ("---", "---", *["---:"] * (len(HEAD) - 2))]
    whole = {row.family: row.bytes for row in report.rows if row.kind == "f32"}
    lines += [_row(row, whole[row.family]) for family in FAMILIES for row in report.rows if row.family == family]
    about = report.machine
    measured = (
        f"Measured on {report.date}: {about.cpu}, {about.cores} cores that other work was loading too, torch {about.torch}. "
        "`hf` of nothing is the base's own bfloat16. Perplexity: its change on held-out rows. Answers: word for word those of the "
        "run's model in float32, 8 of them to held-out rows; `+ n` parted where it was undecided. Tokens: of those answers, before "
        "they part. Texts and prompts: with the tokens of training. Speed: tokens a second of one answer at a time."
    )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + f"\n\n{measured}\n"


def _row(row: Row, whole: int) -> tuple[str, ...]:
    found = row.report
    ties = f" + {found['ties']}" if found["ties"] else ""
    prompts = f"{found['same_prompts']} of {found['prompts']}"
    if row.template is not None:
        plain = row.template["counts"]["plain"]
        prompts = f"{prompts}; Modelfile {plain.get('identical', 0)} of {sum(plain.values()) - plain.get('refused', 0)}"
    return (
        row.family,
        row.form if row.kind == "as trained" else f"{row.form} {row.kind}",
        f"{row.bytes / 1e6:.2f} MB",
        f"{row.bytes / whole:.0%}",
        f"{found['perplexity_change']:+.2%}",
        f"{found['same_answers']}{ties} of {found['answers']}",
        f"{found['same_tokens'] / found['tokens']:.0%}",
        f"{found['same_texts']} of {found['texts']}",
        prompts,
        f"{found['load_s']:.2f} s",
        f"{found['tokens_per_s']:.0f}/s",
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exports")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=list(FAMILIES), help=f"of {', '.join(FAMILIES)}"
    )
    parser.add_argument("--table", action="store_true", help="write the table of what was measured before")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.only) - set(FAMILIES)):
        parser.error(f"no such family: {', '.join(unknown)}")
    machine = this_machine()
    path = RESULTS / f"{machine.slug}-exports.json"
    report = Report.read(path) if path.exists() else Report(machine, "")
    if not arguments.table:
        report.date = datetime.date.today().isoformat()
        for family in arguments.only:
            with tempfile.TemporaryDirectory() as folder:
                rows = list(measure(family, Path(folder)))
            report.rows = [row for row in report.rows if row.family != family] + rows
            report.write(path)
            print(f"{family}: {len(rows)} forms")
    PAGE.write_text(into_page(PAGE.read_text(encoding="utf-8"), markdown(report)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
