"""Model families in miniature: real tokenizers, trained on the spot, with the families' own chat templates and special tokens.

Nothing is downloaded. The templates are those the installed TRL package ships, or a few lines of our own where it has none; the
tokenizers have each family's kind of pre-tokenizer, its added tokens and their flags (special, stripping), only few merges.

    FAMILIES            names with a chat template
    MODEL_FAMILIES      names that also have a tiny model
    tokenizer(family)   the tokenizer, cached: do not change it
    stop_ids(family)    what the family's generation_config.json lists as `eos_token_id`
    small_config, tiny_model, save_tiny
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

TEXT = (
    "The quick brown fox jumps over the lazy dog. You are a helpful assistant; the user asks and the assistant answers.\n"
    "What is the capital of France? The capital of France is Paris. How many hours are in a day? There are 24 hours.\n"
    "To fine-tune a model, render the conversation with its template, find the answers, and train on their tokens only.\n"
    "system user assistant model tool think tools function name arguments parameters description type string object\n"
    "Let me think about it step by step: first, the order arrived late; second, the customer wants a refund.\n"
    "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(i, add(i, 1))\n"
    "你好，请问今天的天气怎么样？今天天气晴朗，适合出门散步。我们可以一起去公园，也可以在家里读书。\n"
    "训练模型之前，先检查数据：问题、回答和工具调用都要完整。订单已经发货，预计三天内送达。谢谢您的耐心等待。\n"
)

GPT_SPLIT = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

THINKING = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.role == 'assistant' and loop.last -%}"
    "{{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' -}}"
    "{%- endif -%}"
    "{{- message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}"
)
"""A model that always thinks: the generation prompt opens the block, and nothing switches it off."""

INST = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{- raise_exception('After the optional system message, roles must alternate user/assistant') -}}"
    "{%- endif -%}"
    "{%- if message.role == 'user' -%}{{- '[INST] ' + message.content + ' [/INST]' -}}"
    "{%- else -%}{{- ' ' + message.content + eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
)


@dataclass(frozen=True)
class Family:
    template: str
    """The name of a template file of TRL, or the template itself."""
    kind: Literal["byte-level", "gemma", "llama", "unigram"]
    special: tuple[str, ...]
    eos: str
    stops: tuple[str, ...]
    plain: tuple[str, ...] = ()
    """Added tokens that are not special: they survive `skip_special_tokens`."""
    bos: str | None = None
    adds_bos: bool = False
    """The tokenizer puts BOS before a text by itself."""
    trims_offsets: bool = False
    strips_right: tuple[str, ...] = ()
    """Special tokens that swallow the whitespace after them."""


_QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TOOL_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_THINK_TAGS = ("<think>", "</think>")
_LLAMA3_SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
)  # fmt: skip
_PHI_SPECIAL = ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
_GEMMA_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
_GLM_SPECIAL = ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_DEEPSEEK_SPECIAL = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
_DEEPSEEK_PLAIN = (
    "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>", "<｜tool▁sep｜>", *_THINK_TAGS,
)  # fmt: skip
_COHERE_SPECIAL = (
    "<PAD>", "<UNK>", "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>",
)  # fmt: skip


def _qwen(template: str, *plain: str) -> Family:
    return Family(template, "byte-level", _QWEN_SPECIAL, "<|im_end|>", ("<|im_end|>", "<|endoftext|>"), plain)


def _llama3(template: str) -> Family:
    stops = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    return Family(
        template,
        "byte-level",
        _LLAMA3_SPECIAL,
        "<|eot_id|>",
        stops,
        (),
        "<|begin_of_text|>",
        adds_bos=True,
        trims_offsets=True,
    )


def _gemma(template: str) -> Family:
    return Family(template, "gemma", _GEMMA_SPECIAL, "<eos>", ("<eos>", "<end_of_turn>"), (), "<bos>", adds_bos=True)


def _deepseek(template: str) -> Family:
    bos, eos, _ = _DEEPSEEK_SPECIAL
    return Family(template, "byte-level", _DEEPSEEK_SPECIAL, eos, (eos,), _DEEPSEEK_PLAIN, bos, adds_bos=True)


_FAMILIES: dict[str, Family] = {
    "qwen2.5": _qwen("qwen2_5", *_TOOL_TAGS),
    "qwen3": _qwen("qwen3", *_TOOL_TAGS, *_THINK_TAGS),
    "qwen3-2507": _qwen("qwen3_instruct_2507", *_TOOL_TAGS, *_THINK_TAGS),
    "qwen3.5": _qwen("qwen3_5_think", *_TOOL_TAGS, *_THINK_TAGS),
    "always-thinks": _qwen(THINKING, *_THINK_TAGS),
    "llama3": _llama3("llama3"),
    "llama3.2": _llama3("llama3_2"),
    "gemma": _gemma("gemma"),
    "gemma3": _gemma("gemma3"),
    "phi3": Family(
        "phi3", "llama", _PHI_SPECIAL, "<|endoftext|>", ("<|endoftext|>", "<|assistant|>", "<|end|>"), (), "<s>",
        strips_right=("<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
    ),
    "glm4-moe": Family(
        "glm4moe", "byte-level", _GLM_SPECIAL, "<|endoftext|>", ("<|endoftext|>", "<|user|>", "<|observation|>"),
        (*_TOOL_TAGS, *_THINK_TAGS, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
    "deepseek-v3": _deepseek("deepseekv3"),
    "deepseek-r1": _deepseek("deepseek_r1_distill"),
    "cohere2": Family(
        "cohere2", "byte-level", _COHERE_SPECIAL, "<|END_OF_TURN_TOKEN|>", ("<|END_OF_TURN_TOKEN|>",), (), "<BOS_TOKEN>",
        adds_bos=True,
    ),
    "mistral": Family(INST, "unigram", ("<unk>", "<s>", "</s>"), "</s>", ("</s>",), (), "<s>", adds_bos=True),
    "chatml": Family(CHATML, "byte-level", _QWEN_SPECIAL, "<|endoftext|>", ("<|endoftext|>",)),
}  # fmt: skip
"""`chatml` is a base model: its generation config knows `<|endoftext|>` only, the turn end must be found in the template."""

FAMILIES = list(_FAMILIES)
MODEL_FAMILIES = ["qwen3", "qwen2.5", "llama3", "gemma", "mistral", "phi3", "chatml"]

_VOCABULARY = 600
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _corpus() -> list[str]:
    """The text with one, two and three line ends between its lines, so that runs of them are tokens, as in the real ones."""
    return [TEXT.replace("\n", ends) for ends in ("\n", "\n\n", "\n\n\n")]


def _byte_level(family: Family) -> Tokenizer:
    """As Qwen, Llama 3, GLM and DeepSeek have it: bytes are the alphabet, one character may be several tokens."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC() if "<|im_start|>" in family.special else None
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(GPT_SPLIT, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=family.trims_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=_VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(_corpus(), trainer)
    return made


def _sentencepiece_bpe(*, gemma: bool) -> Tokenizer:
    """As Gemma and Llama 2 / Phi-3 have it: spaces are `▁`, unknown characters fall back to byte tokens."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=_VOCABULARY, show_progress=False, special_tokens=["<unk>"])
    trained.train_from_iterator(TEXT.splitlines(), trainer)
    pieces, merges = _parts(trained)
    vocabulary = {piece: index for index, piece in enumerate([*_BYTES, *pieces, *(["\n", "\n\n"] if gemma else [])])}
    made = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[*merges, ("\n", "\n")] if gemma else merges,
            byte_fallback=True,
            fuse_unk=True,
            unk_token="<unk>",
        )
    )
    if gemma:
        made.normalizer = normalizers.Replace(" ", "▁")
        made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = _spaces_decoder(strips_first=not gemma)
    return made


def _spaces_decoder(*, strips_first: bool) -> decoders.Decoder:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strips_first else steps)


def _parts(trained: Tokenizer) -> tuple[list[str], list[tuple[str, str]]]:

    model = json.loads(trained.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].__getitem__), [tuple(merge) for merge in model["merges"]]


def _unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    trainer = trainers.UnigramTrainer(vocab_size=300, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"])
    made.train_from_iterator(_corpus(), trainer)

    pieces = [tuple(entry) for entry in json.loads(made.to_str())["model"]["vocab"]]
    lowest = min(score for _, score in pieces)
    filled = [*pieces, *((byte, lowest - 10.0) for byte in _BYTES)]
    made.model = models.Unigram(filled, unk_id=0, byte_fallback=True)
    made.decoder = _spaces_decoder(strips_first=True)
    return made


@cache
def template(family: str) -> str:
    named = _FAMILIES[family].template
    if "{" in named:
        return named
    return (files("trl") / "chat_templates" / f"{named}.jinja").read_text(encoding="utf-8")


@cache
def tokenizer(family: str) -> PreTrainedTokenizerFast:
    spec = _FAMILIES[family]
    if spec.kind == "byte-level":
        made = _byte_level(spec)
    elif spec.kind == "unigram":
        made = _unigram()
    else:
        made = _sentencepiece_bpe(gemma=spec.kind == "gemma")
    made.add_special_tokens(
        [AddedToken(t, special=True, normalized=False, rstrip=t in spec.strips_right) for t in spec.special]
    )
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in spec.plain])
    if spec.adds_bos and spec.bos:
        bos = processors.TemplateProcessing(
            single=f"{spec.bos} $A",
            pair=f"{spec.bos} $A {spec.bos} $B",
            special_tokens=[(spec.bos, made.token_to_id(spec.bos))],
        )
        made.post_processor = processors.Sequence([made.post_processor, bos]) if made.post_processor else bos
    pad = next((token for token in spec.special if "pad" in token.lower()), "<|endoftext|>")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=spec.bos,
        eos_token=spec.eos,
        pad_token=pad if pad in spec.special else spec.eos,
        unk_token="<unk>" if "<unk>" in spec.special else None,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = template(family)
    return wrapped


def stop_ids(family: str) -> frozenset[int]:
    return frozenset(tokenizer(family).convert_tokens_to_ids(list(_FAMILIES[family].stops)))


def small_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """A config of the family's architecture: hidden size 64, 2 layers, 4 heads."""
    words = tokenizer(family)
    shape: dict[str, Any] = {
        "vocab_size": -(-len(words) // 64) * 64,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": sorted(stop_ids(family)),
        "pad_token_id": words.pad_token_id,
    }
    kinds: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
        "qwen3": (Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
        "qwen2.5": (Qwen2Config, {"tie_word_embeddings": True}),
        "chatml": (Qwen2Config, {"tie_word_embeddings": True}),
        "llama3": (LlamaConfig, {"head_dim": 16}),
        "gemma": (Gemma2Config, {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64}),
        "mistral": (MistralConfig, {"head_dim": 16, "sliding_window": None}),
        "phi3": (Phi3Config, {}),
    }
    kind, own = kinds[family]
    return kind(**{**shape, **own, **overrides})


def tiny_model(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Fresh weights in float32, the same for the same seed, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(small_config(family, **overrides), dtype=torch.float32)
    return model.eval()


def save_tiny(family: str, folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """A model folder as the hub has it: weights, config, generation config, tokenizer, chat template."""
    model = tiny_model(family, seed=seed, **overrides)
    model.generation_config = GenerationConfig(
        eos_token_id=sorted(stop_ids(family)), pad_token_id=tokenizer(family).pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer(family).save_pretrained(folder)
    return folder


def quantised_model(folder: Path, family: str, kind: str) -> Any:
    """A tiny model in bfloat16 whose linear layers are held as a recipe's `quantize: kind` has them, read from a folder."""
    from tunedock.model import load
    from tunedock.model.quantize import bits_and_bytes, keep_gradients, to_fp8
    from tunedock.recipe.schema import Model

    tiny_model(family).save_pretrained(folder)
    quantization = None if kind == "fp8" else bits_and_bytes(kind, torch.bfloat16)
    model = load.load_weights(
        folder, Model(path=str(folder)), dtype=torch.bfloat16, device=torch.device("cpu"), quantization=quantization
    )
    if kind == "fp8":
        to_fp8(model)
    keep_gradients(model)
    return model
