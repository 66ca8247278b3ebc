"""What a run will take: the steps people quote, memory divided as ZeRO divides it, and changes that make a run fit."""

from __future__ import annotations

from typing import Any

import pytest

from tunedock.errors import RecipeError
from tunedock.plan.cards import Target, card, card_names, this_machine
from tunedock.plan.memory import numbers, plan_memory
from tunedock.plan.outlook import Outlook, Rows, outlook
from tunedock.plan.rungs import LADDER
from tunedock.plan.shapes import find_shape
from tunedock.plan.spread import Spread
from tunedock.plan.steps import floor_steps, plan_steps, split_sizes
from tunedock.recipe.schema import Model, Recipe, Split

GIB = 1 << 30
QWEN = find_shape(Model(path="Qwen/Qwen3-8B"))


def recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {"model": "Qwen/Qwen3-8B", "data": {"train": "rows.jsonl"}, "train": {"batch_size": 16}}
    return Recipe.model_validate({**values, **changes})


def look(target: Target | None = None, **more: Any) -> Outlook:
    changes = more.pop("changes", {})
    return outlook(recipe(**changes), QWEN, target or card("a100-80g", 1), **more)


@pytest.mark.parametrize("examples", [split_sizes(2876, Split(train=0.85, validation=0.15, test=0.0))[0], 2446])
def test_the_arithmetic_people_quote(examples: int) -> None:
    """One row a device, two devices, eight accumulated: 16 an update; three epochs."""
    assert examples in (2444, 2446)
    batch = 1 * 2 * 8
    exact, floor = plan_steps(examples, batch, 3.0), floor_steps(examples, batch, 3.0)
    assert (floor.steps_per_epoch, exact.steps_per_epoch) == (152, 153)
    assert (floor.total_steps, exact.total_steps) == (456, 459)


def test_sides_are_rounded_up_but_for_floating_point() -> None:
    assert split_sizes(2876, Split(train=0.85, validation=0.15, test=0.0)) == (2444, 432, 0)
    assert split_sizes(2880, Split(train=0.85, validation=0.15, test=0.0))[1] == 432


def test_steps_follow_rows_batch_and_the_recipes_end() -> None:
    found = look(rows=Rows(2876, 2444, 432, 0), batch_size=16)
    assert found.steps is not None and found.floor is not None
    assert (found.steps.total_steps, found.floor.total_steps) == (459, 456)
    ended = look(rows=Rows(2876, 2444, 432, 0), changes={"train": {"batch_size": 16, "max_steps": 20}})
    assert ended.steps is not None and ended.floor is not None
    assert ended.steps.total_steps == ended.floor.total_steps == 20
    assert look().steps is None


def test_one_device_holds_what_the_memory_plan_says() -> None:
    found = look()
    weights, compute = numbers(recipe(), bf16=True)
    plan = plan_memory(
        QWEN.config, adapter=recipe().adapter, weights=weights, compute=compute, longest_path=2048, device="cuda"
    )
    assert found.need.parts == plan.parts
    assert found.need.at(1000) == plan.needed(1000)
    assert found.weights["bf16"] == plan.parts["base weights"] == 2 * found.parameters
    assert found.trained == 43_646_976


@pytest.mark.parametrize("devices", [2, 8])
def test_zero_divides_stage_by_stage(devices: int) -> None:
    target = card("h100", devices)
    full = {"adapter": "full"}
    parts = [look(target, spread=Spread(stage), changes=full).need.parts for stage in range(4)]
    for part, stage in (("optimizer", 1), ("gradients", 2), ("base weights", 3)):
        for at in range(4):
            wanted = parts[0][part] if at < stage else -(-parts[0][part] // devices)
            assert parts[at][part] == wanted, (part, at)
    assert parts[3]["gathered layers"] > 0 and "gathered layers" not in parts[2]
    offloaded = look(target, spread=Spread(2, offload=True), changes=full).need
    assert "optimizer" not in offloaded.parts
    assert offloaded.host_bytes == pytest.approx(parts[0]["optimizer"], abs=devices)


def test_a_run_fits_with_the_largest_row_there_is_room_for() -> None:
    found = look()
    assert found.fits and found.row_tokens in LADDER
    assert found.row_tokens >= found.longest == 2048
    larger = LADDER[LADDER.index(found.row_tokens) + 1]
    assert found.need.at(found.row_tokens) <= found.room_bytes < found.need.at(larger)
    assert found.ways == ()
    pinned = look(changes={"train": {"batch_size": 16, "token_budget": 1024}})
    assert (pinned.row_tokens, pinned.longest) == (1024, 1024)


def test_what_makes_a_run_fit_is_told_with_its_cost() -> None:
    found = look(card("4090", 1))
    assert not found.fits
    ways = {way.change: way for way in found.ways}
    assert ways["train.gradient_checkpointing=true"].fits
    assert ways["quantize=fp8"].needed_bytes < found.need.at(found.longest)
    assert all(way.cost for way in found.ways)
    changed = look(card("4090", 1), changes={"train": {"batch_size": 16, "gradient_checkpointing": True}})
    assert changed.fits
    assert changed.need.at(2048) == ways["train.gradient_checkpointing=true"].needed_bytes


def test_whole_weights_are_told_of_the_adapter_of_zero_and_of_small_states() -> None:
    ways = {way.change for way in look(card("a100-80g", 2), spread=Spread(), changes={"adapter": "full"}).ways}
    spreads = {"parallel=zero1", "parallel=zero2", "parallel=fsdp", "parallel=zero1 offload=optimizer"}
    assert {"adapter=lora", "train.optim=adamw_8bit", *spreads} <= ways
    long = {"train": "rows.jsonl", "max_length": 200_000}
    ways = {way.change for way in look(card("4090", 2), changes={"quantize": "nf4", "data": long}).ways}
    assert ways and not any("parallel" in way for way in ways), "four bits are not divided"


def test_how_a_recipe_spreads_a_model_is_planned() -> None:
    full = {"adapter": "full"}
    for parallel, offload, spread in (
        ("ddp", "none", Spread()),
        ("zero2", "optimizer", Spread(2, True)),
        ("fsdp", "none", Spread(3)),
        ("zero3", "all", Spread(3, True, True)),
    ):
        said = look(card("h100", 8), spread=None, changes={**full, "parallel": parallel, "offload": offload})
        assert said.spread == spread and said.need == look(card("h100", 8), spread=spread, changes=full).need
    everything = look(card("h100", 8), spread=Spread(3, True, True), changes=full).need
    assert {"optimizer", "gradients", "base weights"}.isdisjoint(everything.parts) and everything.host_bytes > 80 * GIB


def test_auto_divides_a_model_where_it_does_not_fit_whole() -> None:
    assert look(card("h200", 8), spread=None).spread == Spread()
    assert look(card("h100", 8), spread=None, changes={"adapter": "full"}).spread == Spread(3)
    assert look(card("h100", 1), spread=None, changes={"adapter": "full"}).spread == Spread(), "nothing to divide over"


def test_time_is_told_only_where_speed_and_tokens_are_known() -> None:
    rows = Rows(1000, 1000, 0, 0, mean_tokens=300.0, mean_trained=100.0)
    one, two = (look(card("h100", devices), rows=rows).seconds for devices in (1, 2))
    assert one is not None and two == pytest.approx(one / 2)
    unmeasured = Target("a card nobody knows", "cuda", 80 * GIB, bf16=True)
    assert look(unmeasured, rows=rows).seconds is None
    assert look(card("h100", 1), rows=Rows(10, 10, 0, 0)).seconds is None


def test_cards_without_bfloat16_hold_float32() -> None:
    assert numbers(recipe(), bf16=False) == ("float32", "float32")
    assert numbers(recipe(adapter="full"), bf16=True) == ("float32", "bfloat16")
    assert numbers(recipe(train={"fp16": True}), bf16=False) == ("float16", "float16")
    assert look(card("t4", 1)).need.parts["base weights"] == 4 * look().parameters


def test_cards_by_name() -> None:
    assert {"3060", "3090", "4090", "a100-40g", "a100-80g", "l20", "h100", "h200"} <= set(card_names())
    assert card("H200", 4).devices == 4 and 139 * GIB < card("h200", 1).memory_bytes < 141 * GIB
    with pytest.raises(RecipeError, match="no card") as raised:
        card("h1000", 1)
    assert "h100" in str(raised.value.hint)


def test_this_machine_has_memory() -> None:
    found = this_machine()
    assert found.memory_bytes > 1 << 28 and found.devices >= 1
