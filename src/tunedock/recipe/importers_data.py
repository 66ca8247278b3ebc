"""The data sets of a LLaMA-Factory file -> sources of a recipe, their split, and what becomes of over-long rows.

An entry of dataset_info.json names its data by the first it has of `hf_hub_url`, `ms_hub_url`, `om_hub_url`, `script_url`,
`cloud_file_name` and `file_name`. Local JSON is looked at: a column that is in no row need not be shut out (`importers_formats`),
and a number of rows to hold out becomes a share of them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tunedock.recipe.importers_formats import Columns, of_converter, of_entry
from tunedock.recipe.importers_info import DataSets, Entry, scan
from tunedock.recipe.importers_words import Draft, Line, nearest, tables


def put_data(draft: Draft, data: DataSets) -> None:
    """Sources, their split and what becomes of over-long rows."""
    for entries, side in ((data.train, "train"), (data.validation, "validation" if draft.training else "test")):
        sources = [_source(entry) for entry in entries]
        if entries and all(sources):
            note = (
                None if draft.training or side == "train" else "give it to the recipe of the run: `tunedock eval RUN`"
            )
            draft.put(f"data.{side}", sources, entries[0].word, note)
    _max_samples(draft, [*data.train, *data.validation])
    _hub(draft, [*data.train, *data.validation])
    _validation(draft, data)
    if draft.training:
        draft.put("data.split.test", 0.0, "val_size", "LLaMA-Factory keeps no rows for a test", default=True)
        if draft.kind != "pretrain":
            note = (
                "LLaMA-Factory cuts rows; tunedock cuts prompts from the left, and an answer keeps its header and stop"
            )
            draft.put("data.over_length", "truncate", "cutoff_len", note, default=True)
        if draft.words.get("streaming") and not draft.has("buffer_size"):
            draft.put("data.shuffle_buffer", 16384, "buffer_size", "LLaMA-Factory's default", default=True)


def _source(entry: Entry) -> dict[str, Any] | None:
    """The source of an entry; None after a problem."""
    before = len(entry.draft.problems)
    if entry.draft.version == "v0":
        _known_keys(entry, tables()["dataset_info"]["keys"])
        _place(entry)
        entry.scan = scan(entry)
        columns = of_entry(entry.info, entry.draft.kind, entry.scan.columns if entry.scan else None)
        _samples(entry)
    else:
        _known_keys(entry, tables()["dataset_info"]["v1_keys"])
        _place_of_v1(entry)
        entry.scan = scan(entry)
        columns = of_converter(entry.info, entry.scan.columns if entry.scan else None)
        _weights_of_v1(entry)
    _put_columns(entry, columns)
    order = ("path", "format", "columns", "subset", "split", "revision", "num_samples")
    source = {key: entry.source[key] for key in order if key in entry.source}
    return source if len(entry.draft.problems) == before else None


def _known_keys(entry: Entry, known: list[str]) -> None:
    for key in entry.info:
        if key not in known:
            hint = nearest(str(key), known)
            if hint:
                entry.refuse(str(key), "there is no such key", hint)
            else:
                entry.say(str(key), "left out", note="LLaMA-Factory reads no such key")


def _place(entry: Entry) -> None:
    """Where the rows are: the first of the keys, in LLaMA-Factory's order."""
    keys = [key for key in tables()["dataset_info"]["sources"] if entry.info.get(key) is not None]
    if not keys:
        entry.refuse("file_name", "it names no data", "give `file_name` or `hf_hub_url`")
        return
    for other in keys[1:]:
        entry.say(other, "left out", note=f"`{keys[0]}` goes before it")
    key = keys[0]
    value = entry.text(key)
    if value is None:
        return
    if key in ("om_hub_url", "script_url"):
        why = "this hub is not known" if key == "om_hub_url" else "a script is code that would run"
        entry.refuse(key, why, "download the data and name the file by `file_name`", built=False)
    elif key == "file_name":
        _local(entry, key, value)
    else:
        entry.put(key, "path", value)
        if key != "cloud_file_name":
            entry.hub = "hf" if key == "hf_hub_url" else "modelscope"
    _parts(entry, on_hub=key.endswith("_hub_url"))


def _local(entry: Entry, key: str, value: str) -> None:
    if "://" in value:
        entry.put(key, "path", value)
        return
    there = Path(os.path.normpath(entry.base / value))
    path = str(there) if Path(value).is_absolute() else os.path.relpath(there, entry.draft.folder)
    lines = "the file is one document; LLaMA-Factory takes each line for one" if there.suffix == ".txt" else None
    entry.put(key, "path", path, lines if there.exists() else "it is not there now")


def _parts(entry: Entry, *, on_hub: bool) -> None:
    """Subset, split, folder and revision."""
    for key in ("subset", "revision", "split", "folder"):
        value = entry.text(key)
        if value is None:
            continue
        if not on_hub:
            entry.say(key, "left out", note="a file has none")
        elif key == "folder" and ("/" in value or entry.info.get("subset") is not None):
            entry.refuse(
                key, "`subset` names one folder of a data set", "download the data and name the folder", built=False
            )
        elif key == "split" and not value.replace("_", "").replace("-", "").isalnum():
            entry.refuse(key, "a split is taken whole", "name a split, and `num_samples`", built=False)
        elif key == "folder":
            entry.put(key, "subset", value, "a folder's name tells a subset")
        else:
            entry.put(key, key, value)


def _samples(entry: Entry) -> None:
    value = entry.info.get("num_samples")
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        entry.refuse("num_samples", f"{value!r:.40} is no number of rows", "write a whole number above 0")
    else:
        entry.put(
            "num_samples",
            "num_samples",
            value,
            "the first rows; LLaMA-Factory draws them, and repeats rows where it has too few",
        )


def _place_of_v1(entry: Entry) -> None:
    key = "path" if entry.info.get("path") is not None else "file_name"
    value = entry.text(key)
    if value is None:
        entry.refuse(key, "it names no data", "give `path`")
        return
    source = entry.info.get("source", "local" if key == "file_name" else "hf_hub")
    if source == "local":
        folder = entry.text("dataset_dir") or ""
        _local(entry, key, str(Path(folder) / value))
        if folder:
            entry.say("dataset_dir", "becomes", "path", entry.source.get("path"), f"with `{key}`")
    elif source == "hf_hub":
        entry.put(key, "path", value)
        entry.hub = "hf"
    else:
        entry.refuse("source", "the data are local or on Hugging Face's hub", "write `local` or `hf_hub`", built=False)
    if "source" in entry.info:
        entry.say("source", "left out", note="the path tells it")
    _parts(entry, on_hub=source == "hf_hub")
    _samples(entry)


def _weights_of_v1(entry: Entry) -> None:
    for key, off in (("size", None), ("weight", 1), ("streaming", False)):
        value = entry.info.get(key, off)
        if value != off:
            entry.refuse(
                key, "rows are taken as they are, each once an epoch", "take it out, or use `num_samples`", built=False
            )
        elif key in entry.info:
            entry.say(key, "left out", note="off, as it is here")


def _put_columns(entry: Entry, found: Columns) -> None:
    for key, why, hint, built in found.refusals:
        entry.refuse(key, why, hint, built=built)
    if found.format is None:
        return
    entry.source["format"] = found.format
    given = found.format_key in entry.info
    note = found.format_note if given else "LLaMA-Factory's default"
    entry.say(found.format_key, "becomes" if given else "default", "format", found.format, note)
    if found.columns:
        entry.source["columns"] = found.columns
    for key, ours in found.became.items():
        if entry.given(key) is not None:
            theirs = found.columns.get(ours)
            to, note = (f"columns.{ours}", None) if theirs else ("format", "read by its usual name")
            entry.say(key, "becomes", to, theirs or found.format, note)
    for key, note in {
        **{key: why for key, why in found.left.items() if entry.given(key) is not None},
        **found.notes,
    }.items():
        entry.say(key, "left out", note=note)
    for ours in found.shut:
        note = "a column LLaMA-Factory does not read here"
        line = Line(
            f"{entry.label}: {entry.name}.columns",
            None,
            "default",
            f"{entry.to}.columns.{ours}",
            found.columns[ours],
            note,
        )
        entry.draft.lines.append(line)


def _max_samples(draft: Draft, entries: list[Entry]) -> None:
    most = draft.get("max_samples", "int")
    if most is None:
        return
    for entry in entries:
        entry.source["num_samples"] = min(most, entry.source.get("num_samples", most))
    for side in ("train", "validation", "test"):
        for source in draft.values.get("data", {}).get(side, []):
            source["num_samples"] = min(most, source.get("num_samples", most))
    for index, entry in enumerate(entries):
        if index == 0:
            draft.lines.append(
                Line(
                    "max_samples",
                    most,
                    "becomes",
                    f"{entry.to}.num_samples",
                    entry.source["num_samples"],
                    "of each data set",
                )
            )
    if not entries:
        draft.leave("max_samples", "it counts only with a data set")


def _hub(draft: Draft, entries: list[Entry]) -> None:
    hubs = {entry.hub for entry in entries if entry.hub}
    if len(hubs) > 1:
        draft.problem("dataset", "its data are on two hubs", "download those of ModelScope and name the files")
    elif hubs == {"modelscope"}:
        draft.put("hub", "modelscope", "dataset", "the model is taken from ModelScope too")


def _validation(draft: Draft, data: DataSets) -> None:
    """`val_size`: a share of the rows, or their number."""
    size = draft.get("val_size", "number")
    if not size:
        if size is not None:
            draft.put("data.split.validation", 0.0, "val_size")
        elif draft.training and not draft.has("eval_dataset"):
            draft.put("data.split.validation", 0.0, "val_size", "LLaMA-Factory's default", default=True)
        return
    if size < 0:
        draft.refuse("val_size", "it is a share of the rows, or their number", "write for example 0.1")
    elif size < 1:
        draft.put("data.split.validation", float(size), "val_size")
    elif not draft.training:
        draft.leave("val_size", "it counts only with a data set to train on")
    else:
        _validation_rows(draft, data, int(size))


def _validation_rows(draft: Draft, data: DataSets, size: int) -> None:
    counts = [
        min(entry.scan.rows, entry.source.get("num_samples", entry.scan.rows)) if entry.scan else None
        for entry in data.train
    ]
    rows = sum(count for count in counts if count is not None)
    if None in counts or not counts:
        draft.refuse(
            "val_size",
            "here it is a share of the rows, and these cannot be counted (only local JSON up to 64 MiB is)",
            "write a share, for example 0.1",
        )
    elif size >= rows:
        draft.refuse("val_size", f"there are {rows} rows in all", "write fewer, or a share")
    else:
        draft.put("data.split.validation", size / rows, "val_size", f"{size} of {rows} rows")
