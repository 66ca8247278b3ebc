"""Rules about an engine that makes the answers of rollouts."""

from __future__ import annotations

from tunedock.recipe.adapters import Lora, leaves_the_base
from tunedock.recipe.objectives.rollout import OpenAIEngine, Rollout
from tunedock.recipe.rule import Rule
from tunedock.recipe.schema import Recipe


def _engine(recipe: Recipe) -> OpenAIEngine | None:
    engine = recipe.objective.engine if isinstance(recipe.objective, Rollout) else None
    return engine if isinstance(engine, OpenAIEngine) else None


def _lora(recipe: Recipe) -> Lora | None:
    """That an engine is to run."""
    return recipe.adapter if _engine(recipe) is not None and isinstance(recipe.adapter, Lora) else None


ENGINE_RULES: tuple[Rule, ...] = (
    Rule(
        name="engine-without-an-adapter",
        keys=("objective.engine.kind", "adapter.kind"),
        broken=lambda r: _engine(r) is not None and r.adapter.kind != "lora",
        message="an engine behind an endpoint is given the trained adapter, and this run trains the model's own weights",
        hint="use `adapter: lora`, or `objective.engine: local`",
    ),
    Rule(
        name="engine-without-an-address",
        keys=("objective.engine.base_url",),
        broken=lambda r: (engine := _engine(r)) is not None and not engine.base_url.startswith(("http://", "https://")),
        message="`objective.engine.base_url` is no URL",
        hint="write for example `base_url: http://localhost:8000/v1`",
    ),
    Rule(
        name="engine-password-in-the-recipe",
        keys=("objective.engine.kind",),  # an error shows the values of its keys, and this one is not shown
        broken=lambda r: (
            (engine := _engine(r)) is not None and "@" in engine.base_url.partition("://")[2].split("/", 1)[0]
        ),
        message="`objective.engine.base_url` holds a password, and a recipe is kept with its run",
        hint="put the key into an environment variable and name that in `objective.engine.api_key_env`",
    ),
    Rule(
        name="engine-path-without-a-folder",
        keys=("objective.engine.adapter_dir_on_server", "objective.engine.adapter_dir"),
        broken=lambda r: (
            (engine := _engine(r)) is not None
            and engine.adapter_dir_on_server is not None
            and engine.adapter_dir is None
        ),
        message="`objective.engine.adapter_dir_on_server` is how the engine sees a folder that is not given",
        hint="give the folder that both share as `objective.engine.adapter_dir`",
    ),
    Rule(
        name="engine-runs-no-dora",
        keys=("adapter.use_dora", "objective.engine.kind"),
        broken=lambda r: (lora := _lora(r)) is not None and lora.use_dora,
        message="vLLM, which makes the answers, loads no DoRA",
        hint="leave `adapter.use_dora` out, or let the answers be made here: `objective.engine: local`",
    ),
    Rule(
        name="engine-runs-no-whole-modules",
        keys=("adapter.modules_to_save", "objective.engine.kind"),
        broken=lambda r: (lora := _lora(r)) is not None and bool(lora.modules_to_save),
        message="vLLM, which makes the answers, loads no modules that are trained whole",
        hint="leave `adapter.modules_to_save` out, or let the answers be made here: `objective.engine: local`",
    ),
    Rule(
        name="engine-knows-one-rank",
        keys=("adapter.rank_pattern", "objective.engine.kind"),
        broken=lambda r: (lora := _lora(r)) is not None and bool(lora.rank_pattern),
        message="vLLM, which makes the answers, scales every module by the one rank of the adapter",
        hint="leave `adapter.rank_pattern` out, or let the answers be made here: `objective.engine: local`",
    ),
    Rule(
        name="engine-knows-one-alpha",
        keys=("adapter.alpha_pattern", "objective.engine.kind"),
        broken=lambda r: (lora := _lora(r)) is not None and bool(lora.alpha_pattern),
        message="vLLM, which makes the answers, scales every module by the one alpha of the adapter",
        hint="leave `adapter.alpha_pattern` out, or let the answers be made here: `objective.engine: local`",
    ),
    Rule(
        name="engine-has-the-whole-base",
        keys=("adapter.init_lora_weights", "objective.engine.kind"),
        broken=lambda r: (lora := _lora(r)) is not None and leaves_the_base(lora),
        message="this adapter begins as a part that the base is then without, and the engine's base has it still",
        hint="leave `adapter.init_lora_weights` out, or let the answers be made here: `objective.engine: local`",
    ),
)
