"""The model card of an export: what it is made from, how it was checked, how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunedock import __version__
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run, read_json


def model_card(run: Run, recipe: Recipe, form: str, checks: Mapping[str, Any]) -> str:
    """Markdown with the front matter model hubs read."""
    state = run.state()
    base = recipe.model.path
    is_hub_id = "/" in base and not base.startswith(("/", "."))
    lines = ["---", "library_name: " + ("peft" if form == "adapter" else "transformers")]
    if is_hub_id:
        lines.append(f"base_model: {base}")
    lines += [f"tags: [tunedock, {recipe.objective.kind}, {recipe.adapter.kind}]", "---", "", f"# {run.name}", ""]
    lines += [
        f"Made by tunedock {__version__}: `{recipe.objective.kind}` with `{recipe.adapter.kind}` on "
        f"`{base if is_hub_id else 'a local base model'}`"
        + (f" at commit `{state.lineage['commit']}`" if state.lineage.get("commit") else "")
        + f"; recipe `{state.recipe_hash}`, data `{state.lineage.get('data', 'unknown')}`.",
        "",
    ]
    lines += _evaluation(run)
    if checks:
        lines += ["## Checks of this export", "", "| check | figure |", "|---|---|"]
        lines += [f"| {name.replace('_', ' ')} | {value:.4g} |" for name, value in checks.items()]
        lines.append("")
    scored = recipe.objective.kind == "reward"
    lines += ["## Use", "", *([_SCORES, ""] if scored else [])]
    lines += ["```python", *(_scorer_usage(form) if scored else _usage(form)), "```", ""]
    return "\n".join(lines)


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
