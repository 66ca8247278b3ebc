"""The plan of a reward model: its parameters are those of the real one, and it makes no logits."""

from __future__ import annotations

import pytest

from families import tiny_model
from scored import tiny_scorer
from tunedock.model.adapter import attach
from tunedock.plan.decoder import decoder
from tunedock.plan.memory import plan_memory, trained_size
from tunedock.recipe.adapters import Adapter, Freeze, Full, Lora

FAMILIES = ["qwen3", "llama3", "gemma", "mistral", "phi3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_its_parameters_are_those_of_the_real_one(family: str) -> None:
    """The base's config, which is a causal model's, is what a plan is made from."""
    config = tiny_model(family).config.to_dict()
    real = {name: parameter.numel() for name, parameter in tiny_scorer(family).named_parameters()}
    assert decoder(config, scored=True).parameters == real
    assert "score.weight" not in decoder(config).parameters


@pytest.mark.parametrize("adapter", [Lora(r=4, alpha=8), Full(), Freeze(last_n_layers=1)], ids=lambda a: a.kind)
def test_what_is_trained_is_what_trains(adapter: Adapter) -> None:
    model = attach(tiny_scorer("qwen3"), adapter, seed=0)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained_size(decoder(tiny_model("qwen3").config.to_dict(), scored=True), adapter) == trained


def test_it_needs_no_room_for_logits() -> None:
    config = tiny_model("llama3").config.to_dict()
    causal, scored = (plan_memory(config, adapter=Full(), scored=scored) for scored in (False, True))
    assert scored.parts["head"] == 0 < causal.parts["head"]
    assert scored.parts["gradients"] < causal.parts["gradients"]
