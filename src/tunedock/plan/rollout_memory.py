"""Bytes that making answers takes while training (ppo, grpo, rloo, evaluations), and a frozen reference, by arithmetic on the
model's shape.

Answers are made between steps, when there are no gradients and no activations: what they need comes in the place of those, not on
top. Caches are exact; logits are those of sampling, counted operation by operation (a test holds both to the real
tensors).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunedock.plan.decoder import Decoder
from tunedock.recipe.adapters import Adapter, Lora, leaves_the_base
from tunedock.recipe.objectives.preference import Dpo, Kto
from tunedock.recipe.objectives.rollout import Local, Rollout
from tunedock.recipe.schema import Recipe

CACHE, LOGITS, WORKING = "generation cache", "generation logits", "generation working"

DRAWN_BYTES = 20
"""Of each logit, beside itself: a float32 copy, its probability, the float64 sum up to it, and what is left of it once the token is
drawn (`model.answers`)."""
SCALED_BYTES, TOP_K_BYTES, TOP_P_BYTES = 4, 4, 10
"""More where a temperature divides them; where the rest is masked; where they are sorted, with their places and sums."""

READ_WIDTHS = 5
"""Numbers of the hidden size that a layer holds at once of a token that is read, beside its feed-forward part's three."""


@dataclass(frozen=True, slots=True)
class Answering:
    """How answers are made."""

    at_once: int
    """Answers."""
    prompts: int
    """That are read at once."""
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    key: str = "objective.engine.max_num_seqs"
    """What the recipe says `at_once` by."""
    beyond: int = 0
    """Tokens that prompt and answer may be longer than the longest path of the run's own samples."""


def answering(recipe: Recipe) -> Answering | None:
    """How the recipe's run makes answers in its own process; None where it makes none there."""
    section, options = recipe.objective, recipe.eval
    if recipe.train.predict_with_generate:
        at_once, new = min(options.batch_size, options.max_samples or options.batch_size), options.max_new_tokens
        return Answering(at_once, at_once, new, options.temperature, key="eval.batch_size", beyond=new)
    if not isinstance(section, Rollout) or not isinstance(section.engine, Local):
        return None
    at_once, group = section.engine.max_num_seqs, section.num_generations
    validates = recipe.train.eval_strategy != "no"  # one answer to each of its prompts
    if not validates:
        at_once = min(at_once, (recipe.train.batch_size or group) * section.steps_per_generation)
    prompts = at_once if validates else -(-at_once // group)
    return Answering(at_once, prompts, section.max_new_tokens, section.temperature, section.top_k, section.top_p)


def answering_parts(
    shape: Decoder, config: Mapping[str, Any], how: Answering, *, w: int, c: int, longest_path: int
) -> dict[str, int]:
    """Name -> bytes. `w`, `c`: of a number in the weights' and in the compute type; `longest_path`: of prompt and answer together.

    Keys and values have the weights' type, whatever products are computed in. The last token of an answer is never read.
    """
    longest_path += how.beyond
    layer = 2 * shape.kv_width * w
    longest_prompt = max(longest_path - how.max_new_tokens, 1)
    cache = how.at_once * layer * sum(_cached(config, shape.layers, longest_path - 1))
    of_prompts = how.prompts * layer * sum(_cached(config, shape.layers, longest_prompt))
    each = c + DRAWN_BYTES + (SCALED_BYTES if how.temperature != 1.0 else 0)
    each += TOP_P_BYTES if how.top_p < 1.0 else TOP_K_BYTES if how.top_k else 0
    logits = how.at_once * shape.vocabulary * each
    reading = how.prompts * longest_prompt * c * (3 * max(shape.mlp_widths) + READ_WIDTHS * shape.hidden)
    grown = how.at_once * layer * longest_path  # a layer's cache is made anew with each token
    # Prompts are read before there are answers: beside their own part of the cache, in the place of the rest.
    return {CACHE: cache, LOGITS: logits, WORKING: max(grown, reading + of_prompts - cache - logits)}


def _cached(config: Mapping[str, Any], layers: int, tokens: int) -> list[int]:
    """Tokens that each layer's cache holds. A window counts where the config says which layers have one; else all tokens do."""
    window, kinds = config.get("sliding_window"), config.get("layer_types") or ()
    if not window or len(kinds) != layers:
        return [tokens] * layers
    return [min(tokens, int(window) - 1) if kind == "sliding_attention" else tokens for kind in kinds]


def reference_bytes(recipe: Recipe, config: Mapping[str, Any]) -> int:
    """Bytes of each trained number in the copy that is kept of the policy as it began; 0 where none is (`model.reference`): an
    adapter that starts at zero is switched off, and a reference asked before the first step is let go.

    Weights that were published in 16 bits are kept so.
    """
    section, adapter = recipe.objective, recipe.adapter
    if isinstance(section, Dpo):
        needed = not section.precompute_ref_log_probs
    else:
        needed = isinstance(section, Kto) or (isinstance(section, Rollout) and section.needs_reference)
    if not needed or _starts_at_zero(adapter, recipe.model.new_tokens):
        return 0
    published = str(config.get("dtype", config.get("torch_dtype")))
    as_published = not (isinstance(adapter, Lora) or recipe.model.adapters or recipe.model.new_tokens)
    return 2 if as_published and published in ("bfloat16", "float16") else 4


def _starts_at_zero(adapter: Adapter, new_tokens: int) -> bool:
    """As `model.reference.starts_at_zero` finds it of the loaded policy."""
    if not isinstance(adapter, Lora) or adapter.continue_from is not None or leaves_the_base(adapter):
        return False
    return not (adapter.use_dora or adapter.modules_to_save or new_tokens)
