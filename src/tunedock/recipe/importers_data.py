"""The data sets of a LLaMA-Factory file -> sources of a recipe, their split, and what becomes of over-long rows.

What a data set's entry becomes is `dataset_info`'s. Local JSON is looked at, so that a number of rows to hold out becomes a share
of them.
"""

from __future__ import annotations

from tunedock.recipe.dataset_info import Entry, source_of
from tunedock.recipe.importers_info import DataSets
from tunedock.recipe.importers_words import Draft, Line


def put_data(draft: Draft, data: DataSets) -> None:
    """Sources, their split and what becomes of over-long rows."""
    for entries, side in ((data.train, "train"), (data.validation, "validation" if draft.training else "test")):
        sources = [source_of(entry, draft.kind) for entry in entries]
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
