"""The model card of an export: what it is made from, how it was checked, how to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tunedock import __version__
from tunedock.export.verify import Report
from tunedock.recipe.exporting import Order
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run, read_json


def model_card(
    run: Run, recipe: Recipe, order: Order, checks: Mapping[str, Any], report: Report | None, notes: Sequence[str]
) -> str:
    """Markdown with the front matter model hubs read."""
    state = run.state()
    base = recipe.model.path
    is_hub_id = "/" in base and not base.startswith(("/", "."))
    lines = ["---", f"library_name: {_LIBRARIES[order.format]}"]
    if is_hub_id:
        lines.append(f"base_model: {base}")
    tags = ["tunedock", recipe.objective.kind, recipe.adapter.kind, *([order.kind] if order.quantize else [])]
    lines += [f"tags: [{', '.join(tags)}]", "---", "", f"# {run.name}", ""]
    lines += [
        f"Made by tunedock {__version__}: `{recipe.objective.kind}` with `{recipe.adapter.kind}` on "
        f"`{base if is_hub_id else 'a local base model'}`"
        + (f" at commit `{state.lineage['commit']}`" if state.lineage.get("commit") else "")
        + f"; recipe `{state.recipe_hash}`, data `{state.lineage.get('data', 'unknown')}`. Weights: {order.kind}.",
        "",
    ]
    lines += _evaluation(run)
    lines += _checked(checks, report, notes)
    scored = recipe.objective.kind == "reward"
    lines += ["## Use", "", *([_SCORES, ""] if scored else [])]
    if order.format in ("gguf", "ollama"):
        lines += ["```console", *_llama_usage(order), "```", ""]
    else:
        lines += ["```python", *(_scorer_usage(order.format) if scored else _usage(order.format)), "```", ""]
    return "\n".join(lines)


_LIBRARIES = {"hf": "transformers", "adapter": "peft", "gguf": "gguf", "ollama": "gguf"}


def _checked(checks: Mapping[str, Any], report: Report | None, notes: Sequence[str]) -> list[str]:
    rows = [
        (name.replace("_", " "), f"{value:.4g}") for name, value in checks.items() if isinstance(value, int | float)
    ]
    if report is not None and report.texts:
        rows += [
            ("texts with the tokens of training", f"{report.same_texts} of {report.texts}"),
            ("conversations rendered as in training", f"{report.same_prompts} of {report.prompts}"),
            ("answers that are the run's, word for word", f"{report.same_answers} of {report.answers}"),
            ("of the others, parted at a tie", f"{report.ties}"),
            ("tokens of answers before they part", f"{report.same_tokens} of {report.tokens}"),
        ]
        if report.perplexity is not None:
            rows.append(
                (
                    "perplexity of held-out rows",
                    f"{report.perplexity:.4g} (the run: {report.perplexity_run:.4g}, {report.perplexity_change:+.2%})",
                )
            )
    if not rows:
        return []
    lines = ["## Checks of this export", "", "| check | figure |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    not_run = [f"not tried: {what}" for what in report.not_run] if report is not None else []
    return [*lines, "", *(f"- {note}" for note in [*notes, *not_run]), *([""] if notes or not_run else [])]


def _llama_usage(order: Order) -> list[str]:
    file = f"model-{order.kind}.gguf"
    if order.format == "ollama":
        return ["ollama create my-model -f Modelfile", "ollama run my-model"]
    return [f"llama-server -m {file} --jinja", f"llama-cli -m {file} --jinja"]


_SCORES = (
    "A reward model: a higher score is a better answer, and only differences of scores mean something. The conversation is "
    "rendered whole, its answer included, and the score read at its last token."
)


def _scorer_usage(form: str) -> list[str]:
    """Whose padding counts must be said for an adapter: its base's config may have another than the tokenizer here."""
    if form == "adapter":
        auto, one_label = "AutoPeftModelForSequenceClassification", ", num_labels=1"
        imports = ["from peft import " + auto, "from transformers import AutoTokenizer"]
        padding = ["model.config.pad_token_id = tokenizer.pad_token_id"]
    else:
        auto, one_label, padding = "AutoModelForSequenceClassification", "", []
        imports = [f"from transformers import {auto}, AutoTokenizer"]
    return [
        *imports,
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
        f'model = {auto}.from_pretrained("THIS_FOLDER"{one_label}).eval()',
        *padding,
        'messages = [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]',
        'inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)',
        "score = model(**inputs).logits[0, 0].item()",
    ]


def _evaluation(run: Run) -> list[str]:
    path = run.path / "eval" / "metrics.json"
    if not path.is_file():
        return []
    metrics = read_json(path)
    names = [
        n
        for n in ("loss", "perplexity", "accuracy", "margin", "exact_match", "rougeL", "bleu")
        if n in metrics["tuned"]
    ]
    base = metrics.get("base") or {}
    rows = [
        f"| {name} | {f'{base[name]:.4g}' if name in base else ''} | {metrics['tuned'][name]:.4g} |" for name in names
    ]
    return [f"## Held-out `{metrics['split']}` rows", "", "| | base | tuned |", "|---|---|---|", *rows, ""]


def _usage(form: str) -> list[str]:
    if form == "adapter":
        return [
            "from peft import AutoPeftModelForCausalLM",
            'model = AutoPeftModelForCausalLM.from_pretrained("THIS_FOLDER")',
        ]
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
    ]
