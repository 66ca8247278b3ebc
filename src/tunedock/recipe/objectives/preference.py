"""Objectives on preferences."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from tunedock.recipe.section import Section

PAIRS = ("dpo", "orpo", "simpo")
"""Objectives whose rows are pairs."""

PREFERENCES = (*PAIRS, "kto")
"""Objectives that weigh whole answers against each other."""

SMOOTHED = ("sigmoid", "robust", "exo_pair")
"""DPO's losses that a label's smoothing is defined for."""


class Dpo(Section):
    """Direct preference optimization: of two answers to a prompt, the chosen one is made likelier than the rejected one."""

    kind: Literal["dpo"] = "dpo"
    beta: PositiveFloat = 0.1
    """How close to stay to the model training began with; larger is closer."""
    loss_type: Literal[
        "sigmoid",
        "sigmoid_norm",
        "ipo",
        "hinge",
        "robust",
        "exo_pair",
        "nca_pair",
        "apo_zero",
        "apo_down",
        "sppo_hard",
        "discopop",
    ] = "sigmoid"
    """The loss of a pair, by TRL's name."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Share of pairs taken to be labelled the wrong way round; for `sigmoid`, `robust` and `exo_pair`."""
    sft_weight: NonNegativeFloat = 0.0
    """How much the chosen answers' own likelihood counts beside the preference: an SFT term, a mean over their tokens."""
    precompute_ref_log_probs: bool = False
    """Ask the reference about all rows before the first step, and keep no copy of it (whole weights, `freeze`)."""


class Orpo(Section):
    """Odds ratio preference optimization: SFT on the chosen answers, with the rejected ones made less likely. No reference."""

    kind: Literal["orpo"] = "orpo"
    beta: PositiveFloat = 0.1
    """How much the preference counts beside the likelihood of the chosen answers (the paper's lambda)."""


class Simpo(Section):
    """Simple preference optimization: a token of the chosen answer is to be likelier than one of the rejected, by a margin."""

    kind: Literal["simpo"] = "simpo"
    beta: PositiveFloat = 2.0
    """Scale of the mean log-probabilities that are compared."""
    simpo_gamma: NonNegativeFloat = 1.0
    """The margin the chosen answer is to win by, in units of `beta` times a mean log-probability."""
    sft_weight: NonNegativeFloat = 0.0
    """How much the chosen answers' own likelihood counts beside the preference (CPO-SimPO)."""


class Kto(Section):
    """Kahneman-Tversky optimization: answers labelled as wanted or not, which need no pairs; a pair is read as one of each."""

    kind: Literal["kto"] = "kto"
    beta: PositiveFloat = 0.1
    """How close to stay to the model training began with; larger is closer."""
    desirable_weight: PositiveFloat = 1.0
    """How much a wanted answer counts. With fewer of them than of the others, raise it to even them out."""
    undesirable_weight: PositiveFloat = 1.0
    """How much an unwanted answer counts."""
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """The loss of an answer, by TRL's name."""
