"""Sources that name an entry of a dataset_info.json are plain ones once the recipe is resolved."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunedock.errors import RecipeError
from tunedock.recipe.dataset_columns import NO_COLUMN
from tunedock.recipe.described import sources_of
from tunedock.recipe.importers import import_llamafactory
from tunedock.recipe.importers_words import tables
from tunedock.recipe.load import load
from tunedock.recipe.resolve import Resolved, resolve
from tunedock.recipe.schema import Source

DATA = Path(__file__).parent / "llamafactory" / "data"
INFO = DATA / "dataset_info.json"


def resolved(folder: Path, train: Any, *overrides: str) -> Resolved:
    file = folder / "recipe.yaml"
    file.write_text(json.dumps({"model": "a/b", "data": {"train": train}}), encoding="utf-8")
    return resolve(load([file], overrides), cwd=folder)


def described(folder: Path, entry: Any, *overrides: str) -> Resolved:
    (folder / "dataset_info.json").write_text(json.dumps({"mine": entry}), encoding="utf-8")
    if not (folder / "rows.json").exists():
        (folder / "rows.json").write_text('[{"instruction": "q", "input": "more", "output": "a"}]')
    return resolved(folder, "dataset_info.json#mine", *overrides)


def refused(folder: Path, train: Any, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        resolved(folder, train, *overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "objective", "source"),
    [
        ("identity", "sft", Source(path=str(DATA / "identity.json"), format="alpaca")),
        ("chats", "sft", Source(path=str(DATA / "chats.jsonl"), format="sharegpt")),
        ("pairs", "dpo", Source(path=str(DATA / "pairs.json"), format="preference")),
        ("books", "pretrain", Source(path=str(DATA / "books.jsonl"), format="text")),
        (
            "alpaca_pairs",
            "dpo",
            Source(
                path=str(DATA / "alpaca_pairs.json"),
                format="preference",
                columns={"instruction": "question", "input": NO_COLUMN, "chosen": "better", "rejected": "worse"},
            ),
        ),
    ],
)
def test_an_entry_becomes_a_plain_source(tmp_path: Path, name: str, objective: str, source: Source) -> None:
    found = resolved(tmp_path, f"{INFO}#{name}", f"objective={objective}")
    assert found.recipe.data.train == [source]
    assert found.origins["data.train.0.path"] == f"derived: {INFO}: {name}.file_name"
    assert found.recipe == Resolved.from_json(found.to_json()).recipe


def test_it_is_what_the_importer_makes_of_it(tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text("model_name_or_path: a/b\ndataset: identity, short, with_history, on_a_hub\n")
    imported = import_llamafactory(tmp_path / "theirs.yaml", dataset_info=INFO, cwd=tmp_path).values["data"]["train"]
    direct = resolved(tmp_path, [f"{INFO}#{name}" for name in ("identity", "short", "with_history", "on_a_hub")])
    for theirs, ours in zip(imported, direct.recipe.data.train, strict=True):
        path = theirs["path"] if theirs["path"] == ours.path else str((tmp_path / theirs["path"]).resolve())
        assert Source.model_validate({**theirs, "path": path}) == ours


def test_every_side_and_every_place_may_name_one(tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(DATA)
    short = "data/dataset_info.json#identity"
    assert resolved(tmp_path, short).recipe.data.train[0].format == "alpaca"
    assert resolved(tmp_path, [{"path": short}]).recipe.data.train[0].format == "alpaca"
    overridden = resolved(tmp_path, "data/identity.json", f"data.train={short}", f"data.test={short}").recipe.data
    assert overridden.train == overridden.test
    assert overridden.split.test == 0


def test_the_hash_follows_the_entry(tmp_path: Path) -> None:
    before = described(tmp_path, {"file_name": "rows.json"})
    assert described(tmp_path, {"file_name": "rows.json", "file_sha1": "x"}).hash == before.hash
    for change in ({"num_samples": 1}, {"columns": {"prompt": "instruction", "response": "output"}}):
        assert described(tmp_path, {"file_name": "rows.json", **change}).hash != before.hash
    plain = resolved(tmp_path, [{"path": "rows.json", "format": "alpaca"}])
    assert plain.hash == before.hash


def test_num_samples_beside_an_entry_is_the_most(tmp_path: Path) -> None:
    for entry, beside, left in ((5, 3, 3), (3, 5, 3), (None, 4, 4)):
        info: dict[str, Any] = {"file_name": "rows.json"} | ({"num_samples": entry} if entry else {})
        described(tmp_path, info)
        found = resolved(tmp_path, [{"path": "dataset_info.json#mine", "num_samples": beside}])
        assert found.recipe.data.train[0].num_samples == left
        assert ("derived" in found.origins["data.train.0.num_samples"]) == (left != beside)


def test_what_differs_from_llamafactory_is_noted(tmp_path: Path) -> None:
    found = described(tmp_path, {"file_name": "rows.json", "num_samples": 1})
    assert [note for note in found.notes if "draws them" in note]


def test_a_file_of_that_whole_name_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "rows.json#1").mkdir()
    (tmp_path / "odd.json#2.jsonl").write_text('{"text": "t"}\n')
    assert resolved(tmp_path, "odd.json#2.jsonl").recipe.data.train[0].path == str(tmp_path / "odd.json#2.jsonl")
    assert resolved(tmp_path, "rows.json#1").recipe.data.train[0].path == str(tmp_path / "rows.json#1")


@pytest.mark.parametrize(
    ("train", "said"),
    [
        (f"{INFO}#identty", "did you mean `identity`?"),
        (f"{INFO}#zzz", "it has identity, chats"),
        (str(INFO), f"`{INFO}#NAME`; it has identity"),
        (f"{DATA}/identity.json#x", "a mapping of names, and this is none"),
        ("nowhere/dataset_info.json#x", "there is no "),
        ([{"path": f"{INFO}#identity", "format": "alpaca"}], "the entry says what `format` is"),
        ([{"path": f"{INFO}#identity", "columns": {"prompt": "p"}}], "take `columns` out"),
        (f"{INFO}#pairs", "`objective: dpo`"),
        (f"{INFO}#alpaca_pairs", "alpaca_pairs.ranking`: `objective: sft` reads no pairs"),
        (f"{INFO}#pictures", "images, videos and sounds are not read"),
        ("https://a.b/dataset_info.json#x", "read from the disk alone"),
        ("s3://a/dataset_info.json", "read from the disk alone"),
        ([f"{INFO}#zzz", f"{INFO}#yyy"], "2 problems"),
    ],
)
def test_what_cannot_be(tmp_path: Path, train: Any, said: str) -> None:
    assert said in refused(tmp_path, train)


@pytest.mark.parametrize(
    "content", ["{", "[1]", '{"mine": 3}', '{"mine": {}}', '{"mine": {"file_name": "gone_dataset_info.json"}}']
)
def test_a_broken_dataset_info_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "dataset_info.json").write_text(content)
    assert "dataset_info.json" in refused(tmp_path, "dataset_info.json#mine")


def test_a_name_that_no_disk_takes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"`mine\.file_name`: this cannot be looked up: File name too long"):
        described(tmp_path, {"file_name": "x" * 300 + ".json"})


def test_a_line_ends_at_a_line_feed_and_nowhere_else(tmp_path: Path) -> None:
    """A mark that other readers end lines at (U+2028) may stand bare in JSON: the columns are still seen."""
    (tmp_path / "rows.jsonl").write_text('{"instruction": "q\u2028", "output": "a\x85b"}\n' * 2, encoding="utf-8")
    found = described(tmp_path, {"file_name": "rows.jsonl", "columns": {"prompt": "instruction", "response": "output"}})
    assert found.recipe.data.train[0].columns == {}


def test_the_hub_is_the_recipes(tmp_path: Path) -> None:
    assert resolved(tmp_path, f"{INFO}#on_a_hub").recipe.data.train[0].path == "some/instructions"
    assert resolved(tmp_path, f"{INFO}#on_a_hub", "hub=modelscope").recipe.data.train[0].path == "some/other"
    with pytest.raises(RecipeError, match="set `hub: modelscope`"):
        described(tmp_path, {"ms_hub_url": "a/b"})
    with pytest.raises(RecipeError, match="set `hub: hf`"):
        described(tmp_path, {"hf_hub_url": "a/b"}, "hub=modelscope")


def test_without_a_recipe_the_entry_tells_what_it_is_for(tmp_path: Path) -> None:
    names = {
        "identity": "alpaca", "chats": "sharegpt", "openai_chats": "messages", "pairs": "preference", "alpaca_pairs": "preference",
        "verdicts": "labelled", "books": "text",
    }  # fmt: skip
    made, notes = sources_of([f"{INFO}#{name}" for name in names], {}, hub="hf", cwd=tmp_path)
    assert [source.format for source in made] == list(names.values())
    assert notes == []
    made, _ = sources_of(["llamafactory/data/books.jsonl"], {"num_samples": 2}, hub="hf", cwd=DATA.parent.parent)
    assert made == [Source(path=str(DATA / "books.jsonl"), num_samples=2)]
    with pytest.raises(RecipeError, match="2 problems"):
        sources_of(["gone.jsonl", f"{INFO}#gone"], {}, hub="hf", cwd=tmp_path)


WORDS = st.sampled_from(
    ["rows.json", "../x.json", "a\0b", "a/b", "alpaca", "sharegpt", "s3://b/c.json", "\ud83d", "~nobody/x.json", ""]
)
VALUES = st.none() | st.booleans() | st.integers(-1, 3) | WORDS | st.text(max_size=4) | st.lists(WORDS, max_size=2)
NAMED = st.dictionaries(st.sampled_from([*tables()["dataset_info"]["columns"], "role_tag", "odd"]), VALUES, max_size=4)
ENTRIES = st.dictionaries(st.sampled_from([*tables()["dataset_info"]["keys"], "odd"]), VALUES, max_size=5) | st.builds(
    lambda file, columns: {"file_name": file, "columns": columns}, WORDS, NAMED
)


@settings(max_examples=80, deadline=None)
@given(entry=ENTRIES, objective=st.sampled_from(["sft", "dpo", "pretrain"]), hub=st.sampled_from(["hf", "modelscope"]))
def test_any_entry_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, entry: dict[str, Any], objective: str, hub: str
) -> None:
    folder = tmp_path_factory.mktemp("any")
    try:
        found = described(folder, entry, f"objective={objective}", f"hub={hub}")
    except RecipeError as refused:
        assert refused.message
    else:
        assert "#" not in found.recipe.data.train[0].path
    with contextlib.suppress(RecipeError):
        sources_of(["dataset_info.json#mine"], {}, hub="hf", cwd=folder)
