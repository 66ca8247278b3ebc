"""The table of exports: models of every family, a row for every form, the page."""

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from benchmarks.exports import FAMILIES, FORMS, PAGE, Report, Row, make, markdown
from benchmarks.report import into_page
from benchmarks.results import RESULTS, Machine
from tunedock.export.gguf.shape import shape_of
from tunedock.export.gguf.vocabulary import vocabulary_of
from tunedock.recipe.exporting import Order, check

MACHINE = Machine("Some CPU (R) 9000", 2, 16, "2.13.0", 2, True)
REPORT = {
    "texts": 22, "same_texts": 22, "prompts": 4, "same_prompts": 4, "answers": 12, "same_answers": 11, "ties": 1, "tokens": 200,
    "same_tokens": 190, "perplexity_change": 0.0123, "load_s": 0.25, "tokens_per_s": 321.4,
}  # fmt: skip


def test_every_form_is_one_there_is():
    for form, kind in FORMS:
        check(Order(to="/", format=form, quantize=kind))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_written_as_gguf(family: str, tmp_path: Path):
    make(family, tmp_path)
    config, tokenizer = AutoConfig.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    shape = shape_of(config)
    found = vocabulary_of(tokenizer, config.vocab_size, [tokenizer.eos_token_id])
    assert (shape.layers, len(found.tokens)) == (4, config.vocab_size)


def test_a_row_has_the_figures_of_the_report():
    rows = [
        Row("qwen3", "gguf", "f32", 10_000_000, 3.0, REPORT),
        Row("qwen3", "ollama", "q8_0", 2_660_000, 3.0, REPORT, {"counts": {"plain": {"identical": 9, "refused": 1}}}),
    ]
    said = [line for line in markdown(Report(MACHINE, "2026-01-31", rows)).splitlines() if line.startswith("|")]
    assert len(said) == 4 and len({row.count("|") for row in said}) == 1
    for part in (
        "ollama q8_0",
        "2.66 MB",
        "27%",
        "+1.23%",
        "11 + 1 of 12",
        "95%",
        "4 of 4; Modelfile 9 of 9",
        "0.25 s",
        "321/s",
    ):
        assert part in said[3]


def test_the_page_shows_what_was_measured():
    (path,) = RESULTS.glob("*-exports.json")
    report = Report.read(path)
    assert {(row.family, row.form, row.kind) for row in report.rows} >= {
        (family, "gguf", "q4_k_m") for family in FAMILIES
    }
    page = PAGE.read_text(encoding="utf-8")
    assert into_page(page, markdown(report)) == page
