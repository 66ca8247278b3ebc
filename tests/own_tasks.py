"""A folder of lm-eval tasks over rows of our own, no network needed: a choice, a generation with filters, texts for perplexity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHOICE = """\
task: own_choice
dataset_path: json
dataset_kwargs: {data_files: {train: sums.jsonl, test: sums.jsonl}}
output_type: multiple_choice
training_split: train
fewshot_split: train
test_split: test
doc_to_text: "{{question}}\\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""

GENERATION = """\
task: own_sums
dataset_path: json
dataset_kwargs: {data_files: {train: sums.jsonl, test: sums.jsonl}}
output_type: generate_until
training_split: train
fewshot_split: train
test_split: test
doc_to_text: "{{question}}\\nA:"
doc_to_target: " {{answer}}"
generation_kwargs: {until: ["\\n", "Q:"], max_gen_toks: 16, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
filter_list:
  - name: number
    filter: [{function: regex, regex_pattern: "(\\\\d+)"}, {function: take_first}]
  - name: whole
    filter: [{function: take_first}]
metadata: {version: 2}
"""

TEXTS = """\
task: own_texts
dataset_path: json
dataset_kwargs: {data_files: {test: texts.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: byte_perplexity}
  - {metric: bits_per_byte}
metadata: {version: 2.0}
"""

TASKS = ("own_choice", "own_sums", "own_texts")


def rows() -> list[dict[str, Any]]:
    """Sums; the right answer stands at each of the first three places in turn."""
    made: list[dict[str, Any]] = []
    for i, (a, b) in enumerate((a, b) for a in range(4) for b in range(3)):
        choices = [f"It is {a + b + off}" for off in ((0, 1, 2), (2, 0, 1), (1, 2, 0))[i % 3]]
        question = f"Q: What is {a} + {b}?"
        answer = f"It is {a + b}"
        label = choices.index(answer)
        made.append(
            {"question": question, "answer": answer, "choices": [*choices, "I do not know that."], "label": label}
        )
    return made


def solved() -> list[str]:
    """What a model must have read to answer."""
    return [f"{row['question']}\nA: {row['answer']}\n\n" for row in rows()]


def write_tasks(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    texts = ["The order arrived.", *("".join(solved()[i : i + 7]) for i in range(3)), "你好，订单已经发货。" * 6]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name, task in (("choice", CHOICE), ("sums", GENERATION), ("texts", TEXTS)):
        (folder / f"{name}.yaml").write_text(task)
    return folder
