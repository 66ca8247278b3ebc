"""Exports held against their run: in every form, and broken on purpose in every way that users have met."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export import export, trained

from tunedock.errors import CheckError, DependencyError, RecipeError, RunError
from tunedock.events import Emitter, decode
from tunedock.export import stage
from tunedock.export.again import verify_again
from tunedock.export.gguf import make, quantise
from tunedock.export.gguf.vocabulary import Vocabulary, vocabulary_of
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run

QUIET = Emitter(None)
Exported = tuple[Run, Recipe, Path]


def llama_cpp() -> None:
    pytest.importorskip("llama_cpp", reason="not installed: llama-cpp-python")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Recipe]:
    return trained(tmp_path_factory.mktemp("verify"), "adapter.r=4")


@pytest.fixture(scope="module")
def whole(run: tuple[Run, Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Merged weights, exported."""
    to = tmp_path_factory.mktemp("exports") / "hf"
    export(*run, to, format="hf")
    return to


def all_same(report: dict[str, Any]) -> bool:
    pairs = [
        ("same_texts", "texts"),
        ("same_prompts", "prompts"),
        ("same_answers", "answers"),
        ("same_tokens", "tokens"),
    ]
    return all(report[same] == report[of] > 0 for same, of in pairs)


def test_merged_files_answer_as_the_run_does(whole: Path) -> None:
    record = json.loads((whole / "export.json").read_text())
    assert all_same(record["report"])
    assert record["report"]["texts"] == 22 and record["report"]["prompts"] == 7
    assert abs(record["report"]["perplexity_change"]) < 0.02
    card = (whole / "README.md").read_text()
    assert "| texts with the tokens of training | 22 of 22 |" in card
    assert "perplexity of held-out rows" in card


@pytest.mark.parametrize("kind", ["int8", "int4", "int8-dynamic", "nf4"])
def test_fewer_bits(run: tuple[Run, Recipe], whole: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("bitsandbytes" if kind == "nf4" else "torchao")
    told = export(*run, tmp_path / "out", format="hf", quantize=kind)
    report = told["report"]
    assert (report["same_texts"], report["same_prompts"]) == (22, 7)
    assert report["answers"] >= 9
    assert report["perplexity_change"] - 3 * report["perplexity_error"] < 0.15
    size = (tmp_path / "out/model.safetensors").stat().st_size
    assert size < (whole / "model.safetensors").stat().st_size
    assert not (tmp_path / "out/.whole").exists()
    assert "quantization_config" in json.loads((tmp_path / "out/config.json").read_text())
    assert f", {kind}]" in (tmp_path / "out/README.md").read_text()
    assert (
        all_same(verify_again(tmp_path / "out", QUIET)["report"]) or told["report"]["same_answers"] < report["answers"]
    )


def test_too_few_bits_for_the_limit(run: tuple[Run, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunedock.export import verify

    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(verify, "CERTAIN", -1e6)
    with pytest.raises(CheckError, match="the perplexity of held-out rows is") as caught:
        export(*run, tmp_path / "out", format="hf", quantize="nf4", max_perplexity_change=0.01)
    assert "--max-perplexity-change" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_another_type_and_small_files(run: tuple[Run, Recipe], tmp_path: Path) -> None:
    told = export(*run, tmp_path / "out", format="hf", dtype="float16", max_shard_size="100KB")
    files = [name for name in told["files"] if name.endswith(".safetensors")]
    assert len(files) > 1 and "model.safetensors.index.json" in told["files"]
    weights = load_file(tmp_path / "out" / files[0])
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert all_same(told["report"])


def test_the_adapter_alone_answers_as_the_run_does(run: tuple[Run, Recipe], tmp_path: Path) -> None:
    told = export(*run, tmp_path / "out", format="adapter")
    assert all_same(told["report"])
    with pytest.raises(RunError, match="an adapter is tried on its base"):
        verify_again(tmp_path / "out", QUIET)
    assert all_same(verify_again(tmp_path / "out", QUIET, run=run[0], recipe=run[1])["report"])


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_k_m"])
def test_gguf_answers_as_the_run_does(run: tuple[Run, Recipe], tmp_path: Path, kind: str) -> None:
    llama_cpp()
    told = export(*run, tmp_path / "out", format="gguf", quantize=kind)
    report = told["report"]
    assert sorted(told["files"]) == ["README.md", "chat.json", "expected.json", "export.json", f"model-{kind}.gguf"]
    assert (report["same_texts"], report["same_prompts"]) == (22, 7)
    if kind in ("f32", "f16"):
        assert all_same(report)
        assert abs(report["perplexity_change"]) < 0.005
    assert told["checks"]["changed_tensors"] > 0
    again = verify_again(tmp_path / "out", QUIET)
    assert again["report"]["not_run"] == ["perplexity: no rows of the run are at hand"]
    assert (again["report"]["same_texts"], again["report"]["same_prompts"]) == (22, 7)


def test_an_ollama_model(run: tuple[Run, Recipe], tmp_path: Path) -> None:
    told = export(
        *run, tmp_path / "out", format="ollama", quantize="q8_0", system="Be brief.", parameters={"num_ctx": 512}
    )
    text = (tmp_path / "out/Modelfile").read_text()
    assert text.startswith('FROM ./model-q8_0.gguf\nTEMPLATE """')
    for line in ('SYSTEM """Be brief."""', "PARAMETER num_ctx 512", 'PARAMETER stop """<|im_end|>"""'):
        assert line in text.splitlines()
    template = told["checks"]["ollama_template"]
    assert template["counts"]["plain"].keys() == {"identical"}
    llama_cpp()
    assert verify_again(tmp_path / "out", QUIET)["report"]["same_texts"] == 22
    (tmp_path / "out/Modelfile").write_text(text.replace("PARAMETER num_ctx 512", "PARAMETER num_ctx 1024"))
    verify_again(tmp_path / "out", QUIET)
    (tmp_path / "out/Modelfile").write_text(text.replace("<|im_start|>user", "<|im_start|>human"))
    with pytest.raises(CheckError, match="its template or its stop words are not those"):
        verify_again(tmp_path / "out", QUIET)


def test_tokens_that_the_recipe_adds_are_in_every_form(tmp_path: Path) -> None:
    run, recipe = trained(tmp_path, "adapter.r=4", "model.add_special_tokens=['<|order|>','<|refund|>']")
    for form in ("hf", "gguf"):
        if form == "gguf":
            llama_cpp()
        report = export(run, recipe, tmp_path / form, format=form)["report"]
        assert all_same(report)
    field = gguf.GGUFReader(tmp_path / "gguf/model-f16.gguf").fields["tokenizer.ggml.tokens"]
    words = {bytes(part).decode() for part in field.parts if part.dtype == "uint8"}
    assert {"<|order|>", "<|refund|>"} <= words


def test_without_llama_cpp_it_says_what_was_not_tried(
    run: tuple[Run, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise DependencyError("llama-cpp-python is not here: nothing by that name", hint=quantise.PACKAGE)

    monkeypatch.setattr("tunedock.export.gguf.reader.llama_cpp", missing)
    told = export(*run, tmp_path / "out", format="gguf")
    assert told["report"]["texts"] == 0
    assert "llama-cpp-python is not here" in told["report"]["not_run"][0]
    assert told["checks"]["largest_error"] < 1e-3  # its tensors were looked at all the same
    assert "not tried" in (tmp_path / "out/README.md").read_text()
    with pytest.raises(DependencyError):
        verify_again(tmp_path / "out", QUIET)


# -- broken on purpose -------------------------------------------------------------------------------------------------


def base_weights(folder: Path, recipe: Recipe) -> None:
    shutil.copyfile(Path(recipe.model.path) / "model.safetensors", folder / "model.safetensors")


def another_template(folder: Path, recipe: Recipe) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|im_start|>", "<|im_start|> ", 1))


def no_template(folder: Path, recipe: Recipe) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")


def swapped_tokens(folder: Path, recipe: Recipe) -> None:
    file = folder / "tokenizer.json"
    told = json.loads(file.read_text())
    words = told["model"]["vocab"]
    one, other = [word for word in words if len(word) == 1][40:42]
    words[one], words[other] = words[other], words[one]
    file.write_text(json.dumps(told))


def swapped_specials(folder: Path, recipe: Recipe) -> None:
    file = folder / "tokenizer.json"
    told = json.loads(file.read_text())
    one, other = [added for added in told["added_tokens"] if added["special"]][:2]
    one["content"], other["content"] = other["content"], one["content"]
    file.write_text(json.dumps(told))


def swapped_layers(folder: Path, recipe: Recipe) -> None:
    weights = load_file(folder / "model.safetensors")
    for part in ("up_proj", "down_proj"):
        a, b = (f"model.layers.{layer}.mlp.{part}.weight" for layer in (0, 1))
        weights[a], weights[b] = weights[b], weights[a]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def never_ends(folder: Path, recipe: Recipe) -> None:
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": 7}))


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (base_weights, "these are other weights"),
        (another_template, "conversations are rendered to other tokens"),
        (no_template, "7 of 7 conversations are rendered to other tokens"),
        (swapped_tokens, "texts have other tokens than in training"),
        (swapped_specials, "conversations are rendered to other tokens"),
        (swapped_layers, "these are other weights"),
        (never_ends, "answers would not end at the tokens"),
    ],
)
def test_what_has_become_of_the_files_is_caught(
    run: tuple[Run, Recipe], whole: Path, tmp_path: Path, break_it: Callable[[Path, Recipe], None], says: str
) -> None:
    folder = shutil.copytree(whole, tmp_path / "copy")
    assert all_same(verify_again(folder, QUIET)["report"])
    break_it(folder, run[1])
    told = []
    emit = Emitter(None)
    emit.result = told.append  # type: ignore[method-assign]
    with pytest.raises(CheckError) as caught:
        verify_again(folder, emit)
    assert says in str(caught.value)
    assert told[0]["report"]["problems"]


def test_base_weights_in_a_gguf_are_caught(
    run: tuple[Run, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the tensors alone, also where there is no llama.cpp to ask."""
    write = make.write

    def forgets(path: Path, state: Any, *rest: Any) -> int:
        return write(path, load_file(Path(run[1].model.path) / "model.safetensors"), *rest)

    monkeypatch.setattr(make, "write", forgets)
    with pytest.raises(CheckError, match="is not the model's"):
        export(*run, tmp_path / "out", format="gguf")
    monkeypatch.setattr(make, "ERRORS", dict.fromkeys(make.ERRORS, 10.0))  # so coarse that no tensor alone is off
    with pytest.raises(CheckError, match="nearer to the base's"):
        export(*run, tmp_path / "out", format="gguf")
    assert not list(tmp_path.iterdir())


def other_tokens(words: Vocabulary) -> Vocabulary:
    tokens = list(words.tokens)
    tokens[40], tokens[41] = tokens[41], tokens[40]
    return replace(words, tokens=tokens)


def other_template(words: Vocabulary) -> Vocabulary:
    return replace(words, chat_template=str(words.chat_template).replace("<|im_start|>", "<|im_end|>", 1))


def other_cut(words: Vocabulary) -> Vocabulary:
    return replace(words, pre="gpt-2")


def plain_specials(words: Vocabulary) -> Vocabulary:
    plain = int(gguf.TokenType.NORMAL)
    return replace(words, types=[plain if kind == gguf.TokenType.CONTROL else kind for kind in words.types])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (other_tokens, "texts have other tokens than in training"),
        (other_template, "conversations are rendered to other tokens"),
        (other_cut, "texts have other tokens than in training"),
        (plain_specials, "conversations are rendered to other tokens"),
    ],
)
def test_a_wrong_vocabulary_in_a_gguf_is_caught(
    run: tuple[Run, Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Vocabulary], Vocabulary],
    says: str,
) -> None:
    llama_cpp()
    monkeypatch.setattr(make, "vocabulary_of", lambda *told: change(vocabulary_of(*told)))
    with pytest.raises(CheckError) as caught:
        export(*run, tmp_path / "out", format="gguf")
    assert says in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_swapped_tensors_in_a_gguf_are_caught(
    run: tuple[Run, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = make.write

    def swaps(path: Path, state: Any, *rest: Any) -> int:
        changed = dict(state)
        a, b = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
        changed[a], changed[b] = state[b], state[a]
        return write(path, changed, *rest)

    monkeypatch.setattr(make, "write", swaps)
    with pytest.raises(CheckError, match=r"`blk\.[01]\.attn_q\.weight` is not the model's"):
        export(*run, tmp_path / "out", format="gguf")


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_folders_that_are_no_exports(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="this folder is no export"):
        verify_again(tmp_path / "empty", QUIET)
    folder = shutil.copytree(whole, tmp_path / "copy")
    (folder / "export.json").write_text("[]")
    with pytest.raises(CheckError, match="is not what an export writes"):
        verify_again(folder, QUIET)
    shutil.copyfile(whole / "export.json", folder / "export.json")
    for text in ('{"texts": 3}', "[]"):
        (folder / "expected.json").write_text(text)
        with pytest.raises(CheckError, match="is not what an export writes"):
            verify_again(folder, QUIET)
    (folder / "expected.json").write_text("{")
    with pytest.raises(RunError, match="file is damaged"):
        verify_again(folder, QUIET)


def test_what_is_expected_says_nothing_of_the_runs_data(run: tuple[Run, Recipe], whole: Path) -> None:
    rows = [json.loads(line) for line in Path(run[1].data.train[0].path).read_text().splitlines()]
    tokenizer = stage.find_base(run[1]).tokenizer
    told = json.loads((whole / "expected.json").read_text())
    ids = [list(map(str, answer["prompt"])) for answer in told["answers"].values()]
    for row in rows:
        asked = " ".join(map(str, tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]))
        assert not [one for one in ids if asked in " ".join(one)]


def test_a_reward_model_is_exported_as_it_is(run: tuple[Run, Recipe], tmp_path: Path) -> None:
    recipe = copy.deepcopy(run[1])
    scored = recipe.model_copy(update={"objective": Recipe.model_validate(
        {**recipe.model_dump(), "objective": {"kind": "reward"}}).objective})  # fmt: skip
    for order in ({"format": "gguf"}, {"quantize": "int8"}):
        with pytest.raises(RecipeError, match="a reward model scores"):
            export(run[0], scored, tmp_path / "out", **order)


def test_the_result_is_told_before_the_error(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "copy")
    never_ends(folder, None)  # type: ignore[arg-type]
    with (tmp_path / "events").open("w") as file, pytest.raises(CheckError):
        verify_again(folder, Emitter(file))
    events = [decode(line) for line in (tmp_path / "events").read_text().splitlines()]
    assert [event["kind"] for event in events if event is not None] == ["result"]
