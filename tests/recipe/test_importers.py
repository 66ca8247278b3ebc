"""LLaMA-Factory files as recipes: each key is told of, and what comes out loads, or is refused by exactly the name it was given."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunedock.data.columns import OPTIONAL, check_columns
from tunedock.data.formats import CHOSEN, COMPLETION, LABEL, REJECTED, TEXT, TURNS, parse
from tunedock.data.sources import read_rows
from tunedock.data.turns import ROLES
from tunedock.errors import DiskError, NotBuiltError, RecipeError
from tunedock.recipe.dataset_columns import NO_COLUMN
from tunedock.recipe.document import parse as parse_yaml
from tunedock.recipe.importers import Imported, _words, import_llamafactory
from tunedock.recipe.importers_words import not_built, tables
from tunedock.recipe.load import load
from tunedock.recipe.resolve import resolve
from tunedock.recipe.schema import NOT_BUILT, Recipe, Source
from tunedock.recipe.words import sections

FOLDER = Path(__file__).parent / "llamafactory"
FILES = sorted(FOLDER.glob("*.yaml"))
TRAINING = [file for file in FILES if file.stem not in ("export", "inference")]
HEAD = "model_name_or_path: a/b\ndataset: identity\n"
INFO = FOLDER / "data" / "dataset_info.json"


def imported(name: str, to: Path | None = None) -> Imported:
    return import_llamafactory(FOLDER / f"{name}.yaml", cwd=FOLDER, to=to)


def made(tmp_path: Path, text: str, info: Path | None = INFO) -> Imported:
    file = tmp_path / "theirs.yaml"
    file.write_text(text, encoding="utf-8")
    return import_llamafactory(file, dataset_info=info, cwd=tmp_path)


def data_set(
    tmp_path: Path, entry: Any, text: str = "", rows: list[Any] | None = None, file: str = "rows.json"
) -> Imported:
    """One data set called `mine`, with these rows in its file when they are given."""
    info = tmp_path / "dataset_info.json"
    info.write_text(json.dumps({"mine": entry}), encoding="utf-8")
    if rows is not None:
        (tmp_path / file).write_text(json.dumps(rows), encoding="utf-8")
    return made(tmp_path, f"model_name_or_path: a/b\ndataset: mine\n{text}", info)


def said(found: Imported) -> str:
    with pytest.raises(RecipeError) as caught:
        found.check()
    return str(caught.value)


def line(found: Imported, key: str) -> Any:
    return next(entry for entry in found.lines if entry.key == key)


def keys_of(file: Path) -> set[str]:
    """The keys of a file; of v1's plugins those inside."""
    plugins = tables()["v1"]["plugins"]
    keys: set[str] = set()
    for key, value in parse_yaml(file.read_text(encoding="utf-8"), file.name).value.items():
        keys |= {f"{key}.{name}" for name in value} if key in plugins and isinstance(value, dict) else {key}
    return keys


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_key_of_a_file_is_in_its_report(file: Path) -> None:
    found = import_llamafactory(file, cwd=FOLDER)
    found.check()
    told = Counter(entry.key for entry in found.lines if entry.outcome != "default")
    assert keys_of(file) <= set(told)
    assert all(count == 1 for key, count in told.items() if key in keys_of(file))


@pytest.mark.parametrize("file", TRAINING, ids=lambda file: file.stem)
def test_what_is_written_loads_again_or_is_refused_by_its_names(file: Path, tmp_path: Path) -> None:
    to = tmp_path / "recipe.yaml"
    found = import_llamafactory(file, cwd=FOLDER, to=to)
    found.write(to)
    if not found.not_built:
        loaded = load([to])
        assert loaded.recipe == Recipe.model_validate(found.values)
        resolve(loaded)
        assert import_llamafactory(file, cwd=FOLDER, to=to) == found
        return
    with pytest.raises(NotBuiltError) as caught:
        load([to])
    named = set(re.findall(r"`([a-z_.]+)(?:: [^`]*)?` is not built yet", caught.value.message))
    assert named == set(found.not_built)
    assert "problems" not in caught.value.message or f"{len(named)} problems" in caught.value.message


@pytest.mark.parametrize("file", TRAINING, ids=lambda file: file.stem)
def test_the_yaml_is_the_values(file: Path) -> None:
    found = import_llamafactory(file, cwd=FOLDER)
    assert parse_yaml(found.text, "text").value == found.values


@pytest.mark.parametrize("file", TRAINING, ids=lambda file: file.stem)
def test_the_data_layer_reads_every_row_of_the_sources(file: Path) -> None:
    data = import_llamafactory(file, cwd=FOLDER).values["data"]
    for entry in [*data["train"], *data.get("validation", [])]:
        source = Source.model_validate({**entry, "path": str(FOLDER / entry["path"])})
        if not Path(source.path).exists():
            assert entry["path"].startswith("some/"), "a hub id"
            continue
        rows = [row.value for row in read_rows(source)]
        check_columns(source, rows)
        assert len(rows) == 4
        for row in rows:
            example = parse(row, source.format, source.columns)
            assert "never read" not in str(example)
            assert "not for training" not in str(example)


def test_the_words_of_sft() -> None:
    values = imported("sft_lora").values
    assert values["adapter"] == {"kind": "lora", "r": 16, "target_modules": "all-linear"}
    assert values["data"]["train"] == [
        {"path": "data/identity.json", "format": "alpaca", "num_samples": 1000},
        {"path": "data/chats.jsonl", "format": "sharegpt", "num_samples": 1000},
    ]
    assert values["data"]["split"] == {"validation": 0.1, "test": 0.0}
    assert values["data"]["max_length"] == 4096
    assert values["train"]["warmup_steps"] == 0.1
    assert values["train"]["eval_steps"] == 500
    assert "not built" not in {entry.outcome for entry in imported("sft_lora").lines}


def test_defaults_that_differ_are_written_out(tmp_path: Path) -> None:
    found = made(tmp_path, HEAD)
    defaults = {entry.to: entry.to_value for entry in found.lines if entry.outcome == "default"}
    assert {
        "adapter.kind": "lora", "adapter.r": 8, "train.learning_rate": 5e-5, "train.lr_scheduler_type": "linear",
        "train.per_device_train_batch_size": 8, "train.gradient_accumulation_steps": 1, "train.save_total_limit": None,
        "train.eval_strategy": "no", "data.split.validation": 0.0, "data.split.test": 0.0, "data.over_length": "truncate",
    }.items() <= defaults.items()  # fmt: skip
    assert all(entry.value is None and entry.note for entry in found.lines if entry.outcome == "default")


def test_defaults_are_those_of_transformers_and_the_others_are_the_same_here() -> None:
    """LLaMA-Factory takes its training arguments from transformers: what it does not write out must be one default in both."""
    from transformers import Seq2SeqTrainingArguments

    theirs = {
        item.name: item.default if item.default is not dataclasses.MISSING else None
        for item in dataclasses.fields(Seq2SeqTrainingArguments)
    }
    ours = Recipe.model_validate({"model": "m", "data": {"train": "d"}}).train.model_dump()
    written = dict(entry.split(": ") for entry in tables()["v0"]["defaults"])
    for word, value in written.items():
        assert str(theirs[word]) in (value, str(float(value)) if value[0].isdigit() else "None"), word
    only_watching = {"logging_steps", "report_to"}
    by_hardware = {"bf16", "torch_compile", "gradient_checkpointing", "optim"}  # fused AdamW is AdamW
    by_code = {"eval_strategy", "eval_steps", "metric_for_best_model", "output_dir", "lr_scheduler_kwargs"}
    for name, value in ours.items():
        if name in theirs and name not in {*written, *only_watching, *by_hardware, *by_code}:
            assert theirs[name] == value, name


def test_every_argument_of_transformers_is_known() -> None:
    from transformers import Seq2SeqTrainingArguments

    assert not {item.name for item in dataclasses.fields(Seq2SeqTrainingArguments)} - set(_words("v0"))


def test_every_target_of_the_table_is_a_key_or_refused_by_name() -> None:
    known = {f"{section}.{key}".lstrip(".") for section, keys in sections().items() for key in keys}
    for version in ("v0", "v1"):
        table = tables()[version]
        entries = [*table["becomes"].values(), *(e for names in table["adapter"].values() for e in names.values())]
        built = [*entries, *table["objective"]["dpo"].values()]
        for entry in built:
            foreign = entry["to"] in ("adapter.oft_block_size", "adapter.module_dropout")
            assert entry["to"] in known or entry["to"] in NOT_BUILT or foreign, entry


def test_no_word_has_two_meanings() -> None:
    table = tables()["v0"]
    groups = [list(table["becomes"]), table["by_code"], [key for g in table["left_out"] for key in g["keys"]]]
    groups += [[key for g in table["refused"] for key in g["keys"]]]
    counts = Counter(word for group in groups for word in set(group))
    allowed = {"custom_chat_template"}
    assert not {word for word, count in counts.items() if count > 1} - allowed


def test_the_tables_of_data_are_the_data_layers() -> None:
    info = tables()["dataset_info"]
    for tag, names in info["roles"].items():
        role = {
            "user_tag": "user",
            "assistant_tag": "assistant",
            "observation_tag": "tool",
            "system_tag": "system",
        }.get(tag)
        wanted = [name for name, found in ROLES.items() if found == role and name != "function_call"]
        assert sorted(names) == sorted(wanted if role else ["function_call"])
    for ours, spelled in {
        "completion": COMPLETION, "conversations": TURNS, "chosen": CHOSEN, "rejected": REJECTED, "label": LABEL, "text": TEXT,
    }.items():  # fmt: skip
        assert tuple(info["spellings"][ours]) == spelled
    assert {"input", "history", "system", "tools"} <= set(OPTIONAL), (
        "a column that is shut out need not be in the first rows"
    )


STAGES = {
    "pt": ("stage: pt\ndataset: books\n", {"kind": "pretrain"}),
    "sft": ("stage: sft\ndataset: identity\n", {"kind": "sft"}),
    "rm": ("stage: rm\ndataset: pairs\n", {"kind": "reward"}),
    "ppo": (
        "stage: ppo\ndataset: identity\nreward_model: r/m\n",
        {"kind": "ppo", "rewards": [{"kind": "model", "path": "r/m"}], "target_kl": 6.0},
    ),
    "dpo": ("stage: dpo\ndataset: pairs\n", {"kind": "dpo"}),
    "hinge": ("stage: dpo\npref_loss: hinge\ndataset: pairs\n", {"kind": "dpo", "loss_type": "hinge"}),
    "ipo": (
        "stage: dpo\npref_loss: ipo\npref_beta: 0.3\ndataset: pairs\n",
        {"kind": "dpo", "loss_type": "ipo", "beta": 0.3},
    ),
    "orpo": ("stage: dpo\npref_loss: orpo\ndataset: pairs\n", {"kind": "orpo", "beta": 0.1}),
    "simpo": (
        "stage: dpo\npref_loss: simpo\nsimpo_gamma: 0.7\ndataset: pairs\n",
        {"kind": "simpo", "simpo_gamma": 0.7},
    ),
    "kto": ("stage: kto\ndataset: verdicts\n", {"kind": "kto", "beta": 0.1}),
    "kto on pairs": ("stage: kto\ndataset: pairs\n", {"kind": "kto", "beta": 0.1}),
    "kto_pair": (
        "stage: dpo\npref_loss: kto_pair\npref_beta: 0.2\ndataset: pairs\n",
        {"kind": "kto", "beta": 0.2},
    ),
    "mixed losses": ("stage: dpo\npref_ftx: 0.5\ndataset: pairs\n", {"kind": "dpo", "sft_weight": 0.5}),
    "CPO-SimPO": (
        "stage: dpo\npref_loss: simpo\npref_ftx: 1\ndataset: pairs\n",
        {"kind": "simpo", "sft_weight": 1},
    ),
    "ld": ("stage: dpo\nld_alpha: 0.5\ndataset: pairs\n", {"kind": "dpo", "ld_alpha": 0.5}),
}


@pytest.mark.parametrize(("text", "objective"), STAGES.values(), ids=STAGES.keys())
def test_every_stage_and_loss(tmp_path: Path, text: str, objective: dict[str, Any]) -> None:
    found = made(tmp_path, f"model_name_or_path: a/b\n{text}")
    found.check()
    assert objective.items() <= found.values["objective"].items()
    expected = {f"objective.{key}" for key, value in objective.items() if not_built(f"objective.{key}", value)}
    assert set(found.not_built) == expected


@pytest.mark.parametrize(
    ("text", "size"),
    [("per_device_train_batch_size: 2\n", 4), ("", 16), ("pref_loss: sigmoid\nper_device_train_batch_size: 2\n", 2)],
)
def test_a_batch_of_kto_pair_counts_pairs(tmp_path: Path, text: str, size: int) -> None:
    head = "model_name_or_path: a/b\nstage: dpo\ndataset: pairs\ngradient_accumulation_steps: 3\n"
    loss = "" if "pref_loss" in text else "pref_loss: kto_pair\n"
    found = made(tmp_path, head + loss + text)
    found.check()
    assert found.values["train"]["per_device_train_batch_size"] == size
    assert found.values["train"]["gradient_accumulation_steps"] == 3
    assert sum(each.to == "train.per_device_train_batch_size" for each in found.lines) == 1
    assert found.values["data"]["train"][0]["format"] == "preference"
    judged = made(tmp_path, "model_name_or_path: a/b\nstage: kto\ndataset: verdicts\npref_loss: kto_pair\n")
    assert judged.values["train"]["per_device_train_batch_size"] == 8, "`stage: kto` reads no `pref_loss`"


def test_a_batch_of_kto_pair_in_v1(tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "data.yaml").write_text("x: {path: a/b, converter: pair}\n")
    for text, key, size in (
        ("", "per_device_train_batch_size", 2),
        ("micro_batch_size: 3\n", "per_device_train_batch_size", 6),
        ("micro_batch_size: 3\nglobal_batch_size: 12\n", "batch_size", 24),
    ):
        found = made(tmp_path, "model: a/b\ntrain_dataset: some/data.yaml\npref_loss: kto_pair\n" + text, None)
        found.check()
        assert found.values["objective"] == {"kind": "kto", "beta": 0.1}
        assert found.values["train"][key] == size


TUNERS = {
    "lora": ("finetuning_type: lora\nlora_target: q_proj, v_proj\n", {"r": 8, "target_modules": ["q_proj", "v_proj"]}),
    "alpha": ("lora_rank: 4\nlora_alpha: 4\nlora_dropout: 0.1\n", {"r": 4, "alpha": 4, "dropout": 0.1}),
    "full": ("finetuning_type: full\nlora_rank: 4\n", {"kind": "full"}),
    "freeze": ("finetuning_type: freeze\n", {"kind": "freeze", "last_n_layers": 2}),
    "oft": ("finetuning_type: oft\n", {"kind": "oft", "oft_block_size": 32}),
    "dora": ("use_dora: true\n", {"kind": "lora", "use_dora": True}),
    "rslora": ("use_rslora: true\n", {"kind": "lora", "use_rslora": True}),
    "pissa": ("pissa_init: true\npissa_convert: true\n", {"init_lora_weights": "pissa_niter_16"}),
    "pissa-whole": ("pissa_init: true\npissa_iter: -1\n", {"init_lora_weights": "pissa"}),
    "loraplus": ("loraplus_lr_ratio: 16\n", {"kind": "lora", "loraplus_lr_ratio": 16}),
    "whole-modules": ("additional_target: norm,lm_head\n", {"modules_to_save": ["norm", "lm_head"]}),
    "off": ("use_dora: false\npissa_init: no\npissa_iter: 4\nneftune_noise_alpha: null\n", {"kind": "lora", "r": 8}),
    "first-layers": ("finetuning_type: freeze\nfreeze_trainable_layers: -3\n", {"kind": "freeze", "first_n_layers": 3}),
    "parts-of-layers": (
        "finetuning_type: freeze\nfreeze_trainable_modules: mlp,self_attn\nfreeze_extra_modules: norm\n",
        {"last_n_layers": 2, "layer_modules": ["mlp", "self_attn"], "trainable_modules": ["norm"]},
    ),
    "on": ("adapter_name_or_path: saves/x\n", {"kind": "lora", "continue_from": "saves/x"}),
}


@pytest.mark.parametrize(("text", "adapter"), TUNERS.values(), ids=TUNERS.keys())
def test_every_tuner(tmp_path: Path, text: str, adapter: dict[str, Any]) -> None:
    found = made(tmp_path, HEAD + text)
    found.check()
    assert adapter.items() <= found.values["adapter"].items()
    assert set(found.not_built) == {
        f"adapter.{key}" for key, value in adapter.items() if not_built(f"adapter.{key}", value)
    }


OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "galore": (
        "finetuning_type: full\nuse_galore: true\ngalore_rank: 8\ngalore_target: all\n",
        {"optim": "galore_adamw", "optim_args": "rank=8,update_proj_gap=200,scale=2.0,proj_type=std"},
    ),
    "galore over adafactor": (
        "finetuning_type: freeze\nuse_galore: true\noptim: adafactor\ngalore_target: q_proj, v_proj\n",
        {"optim": "galore_adafactor", "optim_target_modules": ["q_proj", "v_proj"]},
    ),
    "apollo": (
        "finetuning_type: full\nuse_apollo: true\napollo_scale_type: tensor\napollo_layerwise: false\n",
        {
            "optim": "apollo_adamw",
            "optim_args": "rank=16,update_proj_gap=200,scale=32.0,proj=random,proj_type=std,scale_type=tensor",
        },
    ),
    "muon": ("use_muon: true\nadam_beta1: 0.8\n", {"optim": "muon", "adam_beta1": 0.8}),
    "off": ("use_galore: false\nuse_muon: no\ngalore_rank: 8\noptim: sgd\n", {"optim": "sgd"}),
    "by name": (
        "finetuning_type: full\noptim: galore_adamw\noptim_target_modules: attn, mlp\n",
        {"optim": "galore_adamw", "optim_target_modules": ["attn", "mlp"]},
    ),
    "noise": ("neftune_noise_alpha: 5\n", {"neftune_noise_alpha": 5}),
}


@pytest.mark.parametrize(("text", "train"), OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_every_optimizer(tmp_path: Path, text: str, train: dict[str, Any]) -> None:
    found = made(tmp_path, HEAD + text)
    found.check()
    assert train.items() <= found.values["train"].items()
    assert not found.not_built


def test_muon_of_v1(tmp_path: Path) -> None:
    file = tmp_path / "sets.yaml"
    file.write_text("{x: {path: a/b, converter: alpaca}}")
    config = "optim_config: {name: muon, wd: 0.1, momentum: 0.9, nesterov: true, adamw_betas: [0.8, 0.95], adamw_eps: 0.001}\n"
    found = made(tmp_path, V1 + config, file)
    found.check()
    train = found.values["train"]
    assert train["optim"] == "muon" and train["optim_args"] == "momentum=0.9,nesterov=true"
    assert (train["weight_decay"], train["adam_beta1"], train["adam_beta2"], train["adam_epsilon"]) == (
        0.1,
        0.8,
        0.95,
        1e-3,
    )


@pytest.mark.parametrize(
    ("text", "merged", "on"),
    [
        ("adapter_name_or_path: a/one,two\n", ["a/one"], "two"),
        ("adapter_name_or_path: one,two\ncreate_new_adapter: true\n", ["one", "two"], None),
        ("adapter_name_or_path: one\ncreate_new_adapter: false\n", None, "one"),
        ("adapter_name_or_path: one\nfinetuning_type: full\n", ["one"], None),
    ],
)
def test_adapters_gone_on_with_and_merged(tmp_path: Path, text: str, merged: list[str] | None, on: str | None) -> None:
    found = made(tmp_path, HEAD + text)
    found.check()
    assert found.values["model"].get("adapters") == merged
    assert found.values["adapter"].get("continue_from") == on


def test_new_tokens(tmp_path: Path) -> None:
    found = made(tmp_path, HEAD + "add_tokens: <a>, <b>\nadd_special_tokens: <|c|>\nresize_vocab: true\n")
    found.check()
    assert (found.values["model"]["add_tokens"], found.values["model"]["add_special_tokens"]) == (
        ["<a>", "<b>"],
        ["<|c|>"],
    )
    assert line(found, "resize_vocab").outcome == "left out"


@pytest.mark.parametrize(("bits", "name"), [(4, "nf4"), (8, "int8")])
def test_quantised_bases(tmp_path: Path, bits: int, name: str) -> None:
    found = made(tmp_path, HEAD + f"quantization_bit: {bits}\nquantization_method: bitsandbytes\n")
    found.check()
    assert found.values["quantize"] == name
    assert ("quantize" in found.not_built) == not_built("quantize", name)


ONE_PROBLEM = {
    "unknown key": ("lora_rnak: 4", "`lora_rnak: 4`: LLaMA-Factory has no such key", "`lora_rank`"),
    "far from any": ("xyzzy: 4", "`xyzzy: 4`: LLaMA-Factory has no such key", "take it out"),
    "the other generation's": ("micro_batch_size: 4", "`micro_batch_size: 4`", "a word of LLaMA-Factory's v1"),
    "unknown stage": ("stage: dpoo", "`stage: dpoo`: LLaMA-Factory has pt, sft", "`dpo`"),
    "unknown tuner": ("finetuning_type: qlora", "`finetuning_type: qlora`", "`quantization_bit: 4`"),
    "unknown loss": ("stage: dpo\npref_loss: sigmoidd\ndataset: pairs", "`pref_loss: sigmoidd`", "`sigmoid`"),
    "wrong type": ("lora_rank: many", "`lora_rank: many`: it should be a whole number", None),
    "wrong boolean": ("bf16: 3", "`bf16: 3`: it should be true or false", None),
    "out of range": ("lora_rank: 0", "`lora_rank`: `adapter.r: 0` should be a number above 0", None),
    "no schedule": ("save_strategy: best", "`save_strategy`: `train.save_strategy: best` should be", None),
    "not a model": ("model_revision: [a]", "`model_revision: [\"a\"]`: it should be text", None),
    "no such data set": ("dataset: identty", "`identty` is not in", "`identity`"),
    "no data": ("dataset: null\ndo_train: true", "there is no `dataset` to train on", "name the data sets"),
    "two lengths": ("val_size: 0.1\neval_dataset: chats", "`val_size: 0.1`: one takes rows of the training data", "keep one"),
    "two masks": ("train_on_prompt: true\nmask_history: true", "`train_on_prompt: true`", "keep one of the two"),
    "two precisions": ("bf16: true\nfp16: true", "`fp16: true`: there is one precision", "keep one of the two"),
    "quantised and full": ("finetuning_type: full\nquantization_bit: 4", "`quantization_bit: 4`: quantised weights", "use LoRA"),
    "three bits": ("quantization_bit: 3", "`quantization_bit: 3`: a base is held in 4 or 8 bits", "4 or 8"),
    "another method": ("quantization_bit: 4\nquantization_method: hqq", "`quantization_method: hqq`", "take it out"),
    "dora and full": ("finetuning_type: full\nuse_dora: true", "`use_dora: true`: it belongs to", "use LoRA"),
    "PPO alone": ("stage: ppo", "`stage: ppo`: PPO needs a `reward_model`", "name one"),
    "a stream without end": ("streaming: true", "`streaming: true`: nobody knows", "set `max_steps`"),
    "evaluates nothing": ("eval_strategy: steps", "`eval_strategy: steps`: there is nothing to evaluate on", "`val_size`"),
    "the best of nothing": ("load_best_model_at_end: true", "`load_best_model_at_end: true`", "`eval_strategy`"),
    "answers for dpo": ("stage: dpo\ndataset: pairs\npredict_with_generate: on", "`predict_with_generate: on`: it", "take it out"),
    "the best of no answers": ("metric_for_best_model: rouge-l", "`metric_for_best_model: rouge-l`: it", "predict_with_generate"),
    "too much warm-up": ("warmup_ratio: 1.5", "`warmup_ratio: 1.5`: it is a share", "below 1"),
    "galore under lora": ("use_galore: true\ngalore_rank: 8", "`use_galore: true`: it holds the moments", "finetuning_type: full"),
    "galore by layer": ("finetuning_type: full\nuse_galore: on\ngalore_layerwise: on", "`galore_layerwise: on`", "take it out"),
    "two optimizers": ("use_muon: true\nuse_apollo: true", "there is one optimizer", "keep one"),
    "badam": ("finetuning_type: full\nuse_badam: true", "`use_badam: true`: this optimizer", "leave it out"),
    "another reference": ("stage: dpo\ndataset: pairs\nref_model: c/d", "`ref_model: c/d`", "take it out"),
    "SFT twice": ("stage: dpo\ndataset: pairs\npref_loss: orpo\npref_ftx: 1.0", "`objective: orpo`: its loss has", "take it out"),
    "no such tokens": ("new_special_tokens_config: t.yaml", "`new_special_tokens_config: t.yaml`: it changes", "prepare"),
    "interleaved": ("mix_strategy: interleave_under", "`mix_strategy: interleave_under`", "repeat a source"),
    "no share": ("val_size: 4", "`val_size: 4`: there are 4 rows in all", "write fewer"),
    "pictures": ("dataset: pictures", "`pictures.columns.images`: images, videos and sounds are not read", "text alone"),
    "pairs for sft": ("dataset: pairs", "`pairs.ranking`: `objective: sft` reads no pairs", "`stage: dpo`"),
    "no pairs for dpo": ("stage: dpo", "`identity.ranking`: `objective: dpo` compares two answers", "`ranking: true`"),
    "nothing judged for kto": ("stage: kto", "`identity.columns.kto_tag`: `objective: kto` needs", "`ranking: true`"),
    "verdicts for sft": ("dataset: verdicts", "`verdicts.columns.kto_tag`: `objective: sft` reads no verdicts", "`stage: kto`"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message", "hint"), ONE_PROBLEM.values(), ids=ONE_PROBLEM.keys())
def test_one_problem(tmp_path: Path, text: str, message: str, hint: str | None) -> None:
    head = "model_name_or_path: a/b\n" if "dataset:" in text else HEAD
    found = made(tmp_path, head + text + "\n")
    with pytest.raises(RecipeError) as caught:
        found.check()
    assert message in str(caught.value)
    assert hint is None or hint in str(caught.value)
    assert len(found.problems) == 1
    assert caught.value.where
    with pytest.raises(RecipeError):
        found.write(tmp_path / "out.yaml")
    assert not (tmp_path / "out.yaml").exists()


def test_a_problem_points_at_the_line(tmp_path: Path) -> None:
    found = made(tmp_path, HEAD + "stage: sft\nlora_rnak: 4\n")
    assert str(found.problems[0].where).endswith("theirs.yaml:4")


def test_all_problems_at_once(tmp_path: Path) -> None:
    message = said(made(tmp_path, HEAD + "use_galore: true\nlora_rank: x\nxyzzy: 1\n"))
    assert "3 problems" in message
    for word in ("use_galore", "lora_rank", "xyzzy"):
        assert f"`{word}" in message


@pytest.mark.parametrize(
    "text", ["- a\n- b\n", "just text\n", "", "a: !!python/object:os.system {}\n", "a: &x [*x]\n", "a: 1\na: 2\n"]
)
def test_what_is_no_mapping_of_plain_values_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        made(tmp_path, text)
    assert "theirs.yaml" in str(caught.value.where)


def test_a_recipe_is_not_imported_again(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="a recipe of tunedock already") as caught:
        made(tmp_path, "model: a/b\nobjective: sft\ndata: {train: rows.jsonl}\n")
    assert "tunedock recipe show" in str(caught.value.hint)


def test_a_file_without_a_model(tmp_path: Path) -> None:
    assert "`model_name_or_path`: it is missing" in said(made(tmp_path, "dataset: identity\n"))
    (tmp_path / "data.yaml").write_text("x: {path: a/b, converter: alpaca}\n")
    found = made(tmp_path, "train_dataset: data.yaml\n", None)
    assert found.values["model"]["path"].startswith("Qwen/"), "v1 has a default"


def test_an_alias_bomb_is_refused(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
    )
    with pytest.raises(RecipeError, match="aliases"):
        made(tmp_path, bomb)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no"),
        ("[1]", "mapping of names"),
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ('{"identity": 3}', "mapping"),
    ],
)
def test_a_broken_dataset_info(tmp_path: Path, content: str | None, message: str) -> None:
    info = tmp_path / "dataset_info.json"
    if content is not None:
        info.write_text(content)
    assert message in said(made(tmp_path, HEAD, info))


def test_dataset_info_is_looked_for_below_the_working_directory_and_above_the_file(tmp_path: Path) -> None:
    deep = tmp_path / "examples" / "train"
    deep.mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text('{"identity": {"file_name": "x.json"}}')
    file = deep / "theirs.yaml"
    file.write_text(HEAD)
    for cwd in (tmp_path, deep):
        found = import_llamafactory(file, cwd=cwd, to=tmp_path / "recipes" / "ours.yaml")
        assert found.values["data"]["train"][0]["path"] == "../data/x.json"
    assert line(found, "dataset_info.json: identity.file_name").note == "it is not there now"


def test_folder_of_dataset_info(tmp_path: Path) -> None:
    assert made(tmp_path, HEAD, FOLDER / "data").values == made(tmp_path, HEAD, INFO).values


def test_paths_start_from_where_the_recipe_stands(tmp_path: Path) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    text = "model_name_or_path: models/mine\ndataset: identity\noutput_dir: saves/x\ntokenized_path: /abs/cache\n"
    (tmp_path / "theirs.yaml").write_text(text)
    found = import_llamafactory(
        tmp_path / "theirs.yaml", dataset_info=INFO, cwd=tmp_path, to=tmp_path / "r" / "ours.yaml"
    )
    assert found.values["model"]["path"] == "../models/mine"
    assert found.values["train"]["output_dir"] == "../saves/x"
    assert found.values["data"]["cache_dir"] == "/abs/cache"
    (tmp_path / "r").mkdir()
    found.write(tmp_path / "r" / "ours.yaml")
    resolved = resolve(load([tmp_path / "r" / "ours.yaml"])).recipe
    assert resolved.model.path == str(tmp_path / "models" / "mine")
    assert Path(resolved.data.train[0].path) == INFO.parent / "identity.json"
    with pytest.raises(RecipeError, match="a file already"):
        found.write(tmp_path / "r" / "ours.yaml")
    with pytest.raises(DiskError):
        found.write(tmp_path / "nowhere" / "ours.yaml")


def test_sources_in_their_order(tmp_path: Path) -> None:
    everything = {
        "hf_hub_url": "a/hf", "ms_hub_url": "a/ms", "om_hub_url": "a/om", "script_url": "s", "cloud_file_name": "s3://b/c.json",
        "file_name": "rows.json",
    }  # fmt: skip
    expected = {
        "hf_hub_url": "a/hf", "ms_hub_url": "a/ms", "om_hub_url": "not known", "script_url": "would run",
        "cloud_file_name": "s3://b/c.json", "file_name": "rows.json",
    }  # fmt: skip
    for key, value in expected.items():
        found = data_set(tmp_path, everything)
        if " " in value:
            assert value in said(found)
        else:
            found.check()
            assert found.values["data"]["train"][0]["path"] == value
            others = [entry.key for entry in found.lines if entry.note == f"`{key}` goes before it"]
            assert len(others) == len(everything) - 1
            assert found.values.get("hub") == ("modelscope" if key == "ms_hub_url" else None)
        del everything[key]
    assert "it names no data" in said(data_set(tmp_path, {}))


def test_parts_of_a_hub_data_set(tmp_path: Path) -> None:
    entry = {"hf_hub_url": "a/b", "subset": "en", "split": "train_sft", "num_samples": 50, "revision": "v1"}
    source = data_set(tmp_path, entry, "max_samples: 20\n").values["data"]["train"][0]
    assert source["subset"] == "en"
    assert source["split"] == "train_sft"
    assert source["revision"] == "v1"
    assert source["num_samples"] == 20
    assert source["columns"] == dict.fromkeys(("history", "system", "tools"), NO_COLUMN), "its rows are not known"
    assert data_set(tmp_path, {"hf_hub_url": "a/b", "folder": "fr"}).values["data"]["train"][0]["subset"] == "fr"
    assert "`mine.folder`" in said(data_set(tmp_path, {"hf_hub_url": "a/b", "folder": "x/y"}))
    assert "`mine.split`" in said(data_set(tmp_path, {"hf_hub_url": "a/b", "split": "train[:10]"}))
    assert "`mine.num_samples`" in said(data_set(tmp_path, {"hf_hub_url": "a/b", "num_samples": "all"}))
    assert "two hubs" in said(made(tmp_path, "model_name_or_path: a/b\ndataset: x,y\n", two_hubs(tmp_path)))


def two_hubs(tmp_path: Path) -> Path:
    info = tmp_path / "hubs.json"
    info.write_text('{"x": {"hf_hub_url": "a/b"}, "y": {"ms_hub_url": "a/b"}}')
    return info


def test_online_data_sets_are_hub_ids(tmp_path: Path) -> None:
    found = made(tmp_path, "model_name_or_path: a/b\ndataset: a/b, c/d\ndataset_dir: ONLINE\n", None)
    assert [source["path"] for source in found.values["data"]["train"]] == ["a/b", "c/d"]
    assert "`dataset_dir: REMOTE:a/b`" in said(made(tmp_path, HEAD + "dataset_dir: REMOTE:a/b\n", None))
    assert "there is no file" in said(made(tmp_path, HEAD + f"dataset_dir: {'x' * 300}\n", None))


ROW = {"instruction": "Q", "input": "more", "output": "A", "history": [["q", "a"]], "system": "S", "tools": "[]"}


def read_row(found: Imported, row: dict[str, Any]) -> Any:
    source = Source.model_validate(found.values["data"]["train"][0])
    return parse(row, source.format, source.columns)


def test_a_column_left_out_of_columns_is_none(tmp_path: Path) -> None:
    """The trap: without `columns` the query is `input`; with them, and no `query`, there is none."""
    usual = data_set(tmp_path, {"file_name": "rows.json"}, rows=[ROW])
    assert [m.content for m in read_row(usual, ROW).messages] == ["Q\nmore", "A"]
    bare = data_set(
        tmp_path, {"file_name": "rows.json", "columns": {"prompt": "instruction", "response": "output"}}, rows=[ROW]
    )
    assert [m.content for m in read_row(bare, ROW).messages] == ["Q", "A"]
    assert bare.values["data"]["train"][0]["columns"]["input"] == NO_COLUMN
    columns = {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "history": "history",
        "system": "system",
    }
    full = data_set(tmp_path, {"file_name": "rows.json", "columns": columns}, rows=[ROW])
    assert [m.content for m in read_row(full, ROW).messages] == ["S", "q", "a", "Q\nmore", "A"]
    assert full.values["data"]["train"][0]["columns"] == {"tools": NO_COLUMN}
    assert "there is no prompt" in said(
        data_set(tmp_path, {"file_name": "rows.json", "columns": {"response": "output"}})
    )
    assert "no answer to train on" in said(data_set(tmp_path, {"file_name": "rows.json", "columns": {"prompt": "q"}}))
    assert "there are no turns" in said(
        data_set(tmp_path, {"file_name": "rows.json", "formatting": "sharegpt", "columns": {"system": "s"}})
    )


def test_what_no_row_has_needs_no_shutting_out(tmp_path: Path) -> None:
    found = data_set(tmp_path, {"file_name": "rows.json"}, rows=[{"instruction": "Q", "input": "", "output": "A"}])
    assert found.values["data"]["train"] == [{"path": "rows.json", "format": "alpaca"}]


def test_other_spellings_beside_a_column_do_not_go_before_it(tmp_path: Path) -> None:
    row = {
        "messages": [{"role": "user", "content": "no"}, {"role": "assistant", "content": "no"}],
        "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}],
    }
    found = data_set(tmp_path, {"file_name": "rows.json", "formatting": "sharegpt"}, rows=[row])
    assert [m.content for m in read_row(found, row).messages] == ["Q", "A"]


def test_a_tag_left_out_of_tags_is_none(tmp_path: Path) -> None:
    def of(tags: dict[str, str]) -> Imported:
        return data_set(tmp_path, {"file_name": "rows.json", "formatting": "sharegpt", "tags": tags})

    named = {"role_tag": "speaker", "content_tag": "text", "user_tag": "human", "assistant_tag": "gpt"}
    found = of(named)
    found.check()
    assert found.values["data"]["train"][0]["columns"]["role"] == "speaker"
    assert found.values["data"]["train"][0]["columns"]["content"] == "text"
    assert "drops rows" in str(line(found, "dataset_info.json: mine.tags.function_tag").note)
    for tag in named:
        assert f"`mine.tags.{tag}`" in said(of({key: value for key, value in named.items() if key != tag}))
    assert "read under the names user, human alone" in said(of({**named, "user_tag": "person"}))


@pytest.mark.parametrize(
    ("entry", "key", "hint"),
    [
        ({"file_name": "x.json", "colums": {}}, "`mine.colums`", "`columns`"),
        ({"file_name": "x.json", "columns": {"promt": "a"}}, "`mine.columns.promt`", "`prompt`"),
        ({"file_name": "x.json", "columns": {"prompt": 3}}, "`mine.columns.prompt`", "a name"),
        ({"file_name": "x.json", "columns": "prompt"}, "`mine.columns`", "a mapping"),
        ({"file_name": "x.json", "formatting": "sharegptt"}, "`mine.formatting`", "`sharegpt`"),
        ({"file_name": "x.json", "ranking": "yes"}, "`mine.ranking`", "true or false"),
        ({"file_name": 3}, "`mine.file_name`", "text"),
        (
            {"file_name": "x.json", "columns": {"prompt": "p", "response": "r", "videos": "v"}},
            "`mine.columns.videos`",
            "text alone",
        ),
    ],
)
def test_mistakes_in_an_entry(tmp_path: Path, entry: Any, key: str, hint: str) -> None:
    message = said(data_set(tmp_path, entry))
    assert key in message
    assert hint in message


def test_every_key_of_an_entry_is_in_the_report(tmp_path: Path) -> None:
    entry = {
        "file_name": "x.json", "formatting": "sharegpt", "num_samples": 3, "split": "train", "file_sha1": "abc",
        "columns": {"messages": "talk", "prompt": "unused", "odd": "x"}, "tags": {"role_tag": "role", "content_tag": "content",
        "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"},
    }  # fmt: skip
    found = data_set(tmp_path, entry)
    found.check()
    told = {each.key.removeprefix("dataset_info.json: mine.") for each in found.lines}
    wanted = {name for name in entry if name not in ("columns", "tags")}
    wanted |= {f"columns.{name}" for name in entry["columns"]} | {f"tags.{name}" for name in entry["tags"]}
    assert wanted <= told


def test_pretraining_reads_one_column(tmp_path: Path) -> None:
    text = "stage: pt\n"
    found = data_set(tmp_path, {"file_name": "rows.json", "columns": {"prompt": "body"}}, text, rows=[{"body": "x"}])
    assert found.values["data"]["train"][0] == {"path": "rows.json", "format": "text", "columns": {"text": "body"}}
    assert "over_length" not in found.values["data"]
    assert "joins `instruction` and `input`" in said(data_set(tmp_path, {"file_name": "rows.json"}, text, rows=[ROW]))
    assert "a column of text" in said(data_set(tmp_path, {"file_name": "rows.json", "formatting": "sharegpt"}, text))


def test_a_number_of_rows_to_hold_out_becomes_their_share(tmp_path: Path) -> None:
    rows = [{"instruction": str(n), "output": "A"} for n in range(30)]
    found = data_set(tmp_path, {"file_name": "rows.json"}, "val_size: 6\n", rows=rows)
    assert found.values["data"]["split"] == {"validation": 6 / 30, "test": 0.0}
    assert line(found, "val_size").note == "6 of 30 rows"
    found = data_set(tmp_path, {"file_name": "rows.json", "num_samples": 12}, "val_size: 6\n", rows=rows)
    assert found.values["data"]["split"]["validation"] == 0.5
    assert "cannot be counted" in said(data_set(tmp_path, {"hf_hub_url": "a/b"}, "val_size: 6\n"))


def test_evaluation_steps_follow_logging_steps(tmp_path: Path) -> None:
    found = made(tmp_path, HEAD + "val_size: 0.5\neval_strategy: steps\nlogging_steps: 7\n")
    assert found.values["train"]["eval_steps"] == 7
    found = made(tmp_path, HEAD + "val_size: 0.5\neval_strategy: epoch\neval_steps: 5\n")
    assert "eval_steps" not in found.values["train"]
    resolve(load_text(tmp_path, found))


def test_answers_at_evaluations(tmp_path: Path) -> None:
    """LLaMA-Factory wants the word for answers after training too, which are a command's here."""
    text = "eval_strategy: epoch\npredict_with_generate: true\nmetric_for_best_model: eval_rouge-l\nload_best_model_at_end: true\n"
    found = made(tmp_path, HEAD + "val_size: 0.5\nmax_new_tokens: 64\n" + text)
    wanted = {"predict_with_generate": True, "metric_for_best_model": "eval_rougeL", "load_best_model_at_end": True}
    assert wanted.items() <= found.values["train"].items() and found.values["eval"]["max_new_tokens"] == 64
    resolve(load_text(tmp_path, found))
    for text in (
        HEAD + "predict_with_generate: true\n",
        "model_name_or_path: a/b\neval_dataset: identity\ndo_predict: true\npredict_with_generate: true\n",
        HEAD + "predict_with_generate: false\n",
    ):
        found = made(tmp_path, text)
        found.check()
        assert line(found, "predict_with_generate").outcome == "left out"


def load_text(tmp_path: Path, found: Imported) -> Any:
    path = tmp_path / "again.yaml"
    path.write_text(found.text, encoding="utf-8")
    return load([path])


def test_packed_rows_are_not_samples(tmp_path: Path) -> None:
    for text, counts in {
        "packing: true": True,
        "neat_packing: true": True,
        "packing: false": False,
        "stage: pt\ndataset: books": True,
        "stage: pt\npacking: false\ndataset: books": False,
        "": False,
    }.items():
        head = "model_name_or_path: a/b\n" if "dataset" in text else HEAD
        found = made(tmp_path, f"{head}{text}\n")
        found.check()
        notes = [str(entry.note) for entry in found.lines if entry.key in ("packing", "neat_packing")]
        assert any("raise `train.batch_size`" in note for note in notes) == counts, text


def test_a_precision_that_is_not_named_is_told(tmp_path: Path) -> None:
    assert "the type it was saved in" in str(line(made(tmp_path, HEAD), "bf16").note)
    assert line(made(tmp_path, HEAD + "fp16: true\n"), "fp16").to_value is True


def test_words_of_yaml_1_1(tmp_path: Path) -> None:
    """LLaMA-Factory reads `yes` and `1e-4` as its YAML 1.1 does."""
    found = made(tmp_path, HEAD + "bf16: yes\nlearning_rate: '1e-4'\nsave_strategy: false\nuse_dora: off\n")
    found.check()
    assert found.values["train"]["save_strategy"] == "no"
    assert found.values["train"]["bf16"] is True
    assert found.values["train"]["learning_rate"] == 1e-4


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    found = made(tmp_path, HEAD + "hf_hub_token: hf_abc\nswanlab_api_key: abc123\n")
    assert "hf_abc" not in json.dumps(found.to_json())
    assert "abc123" not in json.dumps(found.to_json())


def test_an_export_and_an_inference_file_are_parts_of_a_recipe(tmp_path: Path) -> None:
    for name, purpose in (("export", "export"), ("inference", "inference")):
        found = imported(name)
        assert found.purpose == purpose
        assert "part of a recipe" in found.text
        assert "default" not in {entry.outcome for entry in found.lines}
        path = tmp_path / f"{name}.yaml"
        path.write_text(found.text)
        rows = tmp_path / "rows.jsonl"
        rows.write_text("{}\n")
        assert load([path], [f"data.train={rows}"]).recipe.model.path == "meta-models/chat-8b"
    found = made(tmp_path, "model_name_or_path: a/b\neval_dataset: identity\ndo_predict: true\n")
    assert found.purpose == "evaluate"
    assert [source["format"] for source in found.values["data"]["test"]] == ["alpaca"]
    found = made(
        tmp_path, "model_name_or_path: a/b\neval_dataset: identity\noutput_dir: saves/predict\nmax_samples: 2\n"
    )
    assert "train" not in found.values
    assert found.values["data"]["test"][0]["num_samples"] == 2


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "wiki.txt").write_text("one\ntwo\n")
    found = data_set(tmp_path, {"file_name": "wiki.txt", "columns": {"prompt": "text"}}, "stage: pt\n")
    found.check()
    assert "each line for one" in str(line(found, "dataset_info.json: mine.file_name").note)


def test_v1() -> None:
    found = imported("v1_sft_lora")
    assert found.version == "v1"
    assert found.values["adapter"] == {
        "kind": "lora",
        "r": 16,
        "alpha": 32,
        "dropout": 0.05,
        "target_modules": "all-linear",
    }
    assert found.values["train"]["batch_size"] == 16
    assert found.values["train"]["lr_scheduler_type"] == "constant"
    assert found.values["data"]["train"][1]["columns"] == {"system": NO_COLUMN}
    found = imported("v1_dpo_full")
    assert found.values["adapter"] == {"kind": "full"}
    assert found.values["objective"] == {"kind": "dpo", "beta": 0.3}
    assert found.values["parallel"] == "fsdp" and not found.not_built


HAND_MADE = '{"zero_optimization": {"stage": 2}}'
PARALLEL: dict[str, tuple[str, dict[str, Any]]] = {
    "stage 0": ("deepspeed: examples/deepspeed/ds_z0_config.json", {"parallel": "ddp"}),
    "stage 2, offloaded": ("deepspeed: ds_z2_offload_config.json", {"parallel": "zero2", "offload": "optimizer"}),
    "stage 3": ("deepspeed: examples/deepspeed/ds_z3_config.json", {"parallel": "zero3"}),
    "stage 3, offloaded": ("deepspeed: ds_z3_offload_config.json", {"parallel": "zero3", "offload": "all"}),
    "as it lies there": ("deepspeed: there/ds_z3_config.json", {"parallel": "zero2"}),
    "inline": ("deepspeed: {zero_optimization: {stage: 3, offload_optimizer: {device: cpu}}}",
               {"parallel": "zero3", "offload": "optimizer"}),
    "of their own": ("deepspeed: there/mine.json", {"train.deepspeed": "there/mine.json"}),
    "fsdp": ("fsdp: full_shard auto_wrap", {"parallel": "fsdp"}),
    "fsdp as a list": ("fsdp: [full_shard, offload]\nfsdp_config: {version: 2}", {"parallel": "fsdp", "offload": "all"}),
    "fsdp of gradients": ("fsdp: shard_grad_op", {"parallel": "zero2"}),
    "fsdp off": ("fsdp: ''\nfsdp_config: {}", {}),
}  # fmt: skip
V1_PARALLEL: dict[str, tuple[str, dict[str, Any]]] = {
    "fsdp2": ("{name: fsdp2, offload_params: true}", {"parallel": "fsdp", "offload": "all"}),
    "fsdp2 without offloading": ("{name: fsdp2, offload_params: false}", {"parallel": "fsdp"}),
    "deepspeed": ("{name: deepspeed, config_file: ds_z3_config.json}", {"parallel": "zero3"}),
    "ddp": ("{name: ddp, config_file: x.json}", {"parallel": "ddp"}),
}


def parallel_of(found: Imported) -> dict[str, Any]:
    found.check()
    told = {key: found.values[key] for key in ("parallel", "offload") if key in found.values}
    file = found.values["train"].get("deepspeed")
    return told if file is None else {**told, "train.deepspeed": file}


@pytest.mark.parametrize(("text", "expected"), PARALLEL.values(), ids=PARALLEL)
def test_how_a_model_lies_on_many_devices(tmp_path: Path, text: str, expected: dict[str, Any]) -> None:
    (tmp_path / "there").mkdir()
    for name in ("mine.json", "ds_z3_config.json"):
        (tmp_path / "there" / name).write_text(HAND_MADE)
    found = made(tmp_path, f"{HEAD}{text}\n")
    assert parallel_of(found) == expected and not found.not_built
    assert keys_of(tmp_path / "theirs.yaml") <= {entry.key for entry in found.lines}


@pytest.mark.parametrize(("text", "expected"), V1_PARALLEL.values(), ids=V1_PARALLEL)
def test_v1_says_it_in_dist_config(tmp_path: Path, text: str, expected: dict[str, Any]) -> None:
    (tmp_path / "data.yaml").write_text("x: {path: a/b, converter: alpaca}\n")
    found = made(tmp_path, f"model: a/b\ntrain_dataset: data.yaml\ndist_config: {text}\n", None)
    assert parallel_of(found) == expected


@pytest.mark.parametrize(
    ("text", "why"),
    {
        "fsdp: hybrid_shard": "one of full_shard",
        "fsdp: 3": "one or more of transformers' words",
        "deepspeed: [a]": "the path of a JSON file",
        "deepspeed: {zero_optimization: {stage: 7}}": "0, 1, 2 or 3",
        "deepspeed: {optimizer: {type: AdamW}}": "`optimizer` is the recipe's to say",
        "deepspeed: ds_z3_fp8_config.json": "its `fp8` is not built",
    }.items(),
)
def test_what_cannot_be_said_of_many_devices(tmp_path: Path, text: str, why: str) -> None:
    assert why in said(made(tmp_path, f"{HEAD}{text}\n"))


V1 = "model: a/b\ntrain_dataset: some/data.yaml\n"
V1_PROBLEMS = {
    "no converter": ("{x: {path: a/b}}", "", "`x.converter`: without one"),
    "another converter": ("{x: {path: a/b, converter: pairs}}", "", "`pair`"),
    "weights": ("{x: {path: a/b, converter: alpaca, weight: 2.0}}", "", "`x.weight`"),
    "another source": ("{x: {path: a/b, converter: alpaca, source: s3}}", "", "`x.source`"),
    "no mapping": ("{x: 3}", "", "should be a mapping"),
    "an optimizer": (
        "{x: {path: a/b, converter: alpaca}}",
        "optim_config: {name: lion, wd: 0.1}\n",
        "`optim_config.name: lion`",
    ),
    "unknown part": (
        "{x: {path: a/b, converter: alpaca}}",
        "peft_config: {name: lora, rank: 3}\n",
        "`peft_config.r`",
    ),
    "batches of tokens": (
        "{x: {path: a/b, converter: alpaca}}",
        "batching_strategy: dynamic_batching\n",
        "`batching_strategy: dynamic_batching`",
    ),
    "epochs": ("{x: {path: a/b, converter: alpaca}}", "save_epochs: 0.5\n", "`save_epochs: 0.5`"),
    "v0's word": ("{x: {path: a/b, converter: alpaca}}", "lora_rank: 3\n", "a word of LLaMA-Factory's v0"),
    "a class": ("{x: {path: a/b, converter: alpaca}}", "model_class: other\n", "`model_class: other`"),
}


@pytest.mark.parametrize(("info", "text", "message"), V1_PROBLEMS.values(), ids=V1_PROBLEMS.keys())
def test_v1_problems(tmp_path: Path, info: str, text: str, message: str) -> None:
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "data.yaml").write_text(info + "\n")
    assert message in said(made(tmp_path, V1 + text, None))


def test_v1_data_named_by_themselves(tmp_path: Path) -> None:
    assert "`train_dataset: some/rows`: data named by themselves" in said(
        made(tmp_path, "model: a/b\ntrain_dataset: some/rows\n", None)
    )
    assert "there is no" in said(made(tmp_path, V1, None))


def test_v1_rewards_and_quantised_bases(tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "data.yaml").write_text("x: {path: a/b, converter: pair}\n")
    found = made(
        tmp_path,
        V1 + "model_class: cls\npeft_config: {name: lora}\nquant_config: {name: bnb, quantization_bit: 4}\n",
        None,
    )
    found.check()
    assert found.values["objective"] == {"kind": "reward"}
    assert found.values["quantize"] == "nf4"
    assert made(tmp_path, V1, None).values["objective"]["kind"] == "dpo", "its data are pairs"


@pytest.mark.parametrize("names", ["[]", "null", "''", "','"])
def test_a_list_of_no_data_sets_is_said(tmp_path: Path, names: str) -> None:
    found = made(tmp_path, f"model_name_or_path: a/b\ndataset: {names}\n")
    outcome = next(line.outcome for line in found.lines if line.key == "dataset")
    assert outcome == ("left out" if names == "null" else "refused")
    assert bool(found.problems) == (names != "null")


PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5000),
    st.sampled_from([10**400, 2**70, float("inf"), 0.5, 1.5]),
    st.sampled_from(["all", "no", "steps", "x", "lora", "sft", "a,b", "", ",", "1e-4", "../x", "\0", "[", "é"]),
)
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
)


@settings(deadline=None)
@given(
    version=st.sampled_from(["v0", "v1"]),
    words=st.data(),
)
def test_no_key_vanishes(tmp_path_factory: pytest.TempPathFactory, version: str, words: st.DataObject) -> None:
    """Whatever a file says, each of its keys becomes something, is left out with a reason, or is refused with a problem."""
    plugins = tables()["v1"]["plugins"]
    known = [word for word in _words(version) if "." not in word and word not in plugins]
    names = st.one_of(st.sampled_from(known), st.from_regex(r"[a-z]{3,9}_[a-z]{3,9}", fullmatch=True))
    values = words.draw(st.dictionaries(names, VALUES, max_size=12))
    values["model_name_or_path" if version == "v0" else "model"] = "a/b"
    tmp_path = tmp_path_factory.mktemp("import")
    try:
        found = made(tmp_path, json.dumps(values).replace("Infinity", ".inf"))
    except RecipeError as error:
        assert "theirs.yaml" in str(error.where), "the file as a whole"
        return
    told = {entry.key: entry for entry in found.lines if entry.outcome != "default"}
    assert set(values) <= set(told)
    for word in values:
        entry = told[word]
        assert entry.to or entry.note
        if entry.outcome == "refused":
            assert any(f"`{word}" in problem.message for problem in found.problems)
        if entry.outcome == "left out":
            assert entry.note
    if not found.problems:
        assert parse_yaml(found.text, "text").value in (found.values, None)


ENTRY_KEYS = st.sampled_from([*tables()["dataset_info"]["keys"], "odd"])
NAMED = st.dictionaries(
    st.sampled_from([*tables()["dataset_info"]["columns"], *tables()["dataset_info"]["tags"], "odd"]),
    VALUES,
    max_size=5,
)


@settings(deadline=None)
@given(
    entry=st.dictionaries(ENTRY_KEYS, VALUES, max_size=6),
    named=st.dictionaries(st.sampled_from(["columns", "tags"]), NAMED),
    stage=st.sampled_from(["pt", "sft", "rm", "dpo", "kto"]),
)
def test_no_key_of_a_data_set_vanishes(
    tmp_path_factory: pytest.TempPathFactory, entry: dict[str, Any], named: dict[str, Any], stage: str
) -> None:
    entry |= named
    found = data_set(tmp_path_factory.mktemp("entry"), entry, f"stage: {stage}\n")
    told = {line.key.removeprefix("dataset_info.json: mine.") for line in found.lines}
    for key, value in entry.items():
        if value is None:
            continue
        inside = (
            {f"{key}.{name}" for name, inner in value.items() if inner is not None}
            if isinstance(value, dict)
            else set()
        )
        if not found.problems:
            assert (
                inside <= told if key in ("columns", "tags") and inside else key in told or key in ("columns", "tags")
            )
        else:
            found.error()


@pytest.mark.parametrize("name", ["from-llamafactory", "from-trl-and-axolotl"])
def test_keys_in_the_guides_exist(name: str) -> None:
    known = {f"{section}.{key}".lstrip(".") for section, keys in sections().items() for key in keys} | set(NOT_BUILT)
    guides = Path(__file__).parents[2] / "docs" / "guides"
    english, chinese = (
        re.findall(
            r"`((?:model|objective|adapter|data|train|eval)\.[a-z_0-9.]*[a-z_0-9])", (guides / file).read_text("utf-8")
        )
        for file in (f"{name}.md", f"{name}.zh.md")
    )
    assert set(english) == set(chinese)
    assert set(english) <= known
