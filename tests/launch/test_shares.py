"""What several runs on one machine get of it, and when one more is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tunedock.errors import RecipeError
from tunedock.launch.shares import Share, choose_gpus, refuse_too_much, shares
from tunedock.recipe.container import Container

CARDS = ("0", "1", "2", "3")
GIB = 1 << 30


def listed(identity: str, state: str = "running", created: float = 100.0, **told: Any) -> dict[str, Any]:
    labels = {"tunedock.version": "1", **{f"tunedock.{name}": str(value) for name, value in told.items()}}
    return {"Id": identity, "Names": [f"/{identity}"], "State": state, "Created": created, "Labels": labels}


def given(**settings: Any) -> Container:
    return Container.model_validate(settings)


def gpus(
    others: list[Share], visible: str | None = None, processes: int | None = None, **settings: Any
) -> tuple[str, ...]:
    return choose_gpus(given(**settings), CARDS, others, visible=visible, processes=processes)


def test_shares_are_read_from_the_labels_of_containers_at_work() -> None:
    found = shares(
        [
            listed("a", cpus=2, memory=GIB, gpus="0,1"),
            listed("b", state="exited", cpus=8),
            listed("c", gpus="2", mps=50),
            {"Id": "d", "Names": ["/other"], "State": "running", "Labels": {}},
        ]
    )
    assert found == [Share("a", 2.0, GIB, ("0", "1")), Share("c", gpus=("2",), mps=50)]


@pytest.mark.parametrize("text", ["lots", "nan", "inf", "-1", "", "1e999"])
def test_a_label_that_is_no_amount_promises_nothing(text: str) -> None:
    """Anybody may put our labels on a container of theirs."""
    assert shares([listed("a", cpus=text, memory=text, mps=text, gpus=",,")]) == [Share("a")]


def test_of_two_that_are_made_at_once_the_earlier_one_counts() -> None:
    both = [listed("a", "created", 100.0, cpus=1), listed("b", "created", 100.0, cpus=1)]
    assert [share.name for share in shares(both, before="b", now=101.0)] == ["a"]
    assert shares(both, before="a", now=101.0) == []
    assert shares(both, now=1000.0) == []  # never started: who made them has died


def test_what_does_not_fit_is_refused_with_who_has_it() -> None:
    others = [Share("tunedock-train-a-1", cpus=6.0, memory_bytes=20 * GIB)]
    refuse_too_much(given(cpus=2, memory="4g"), (), others, cpus=8, memory_bytes=24 * GIB)
    with pytest.raises(RecipeError, match=r"8 processors, of which 6 are taken by tunedock-train-a-1"):
        refuse_too_much(given(cpus=2.5), (), others, cpus=8, memory_bytes=24 * GIB)
    with pytest.raises(RecipeError, match=r"24 GiB of memory, of which 20 GiB is taken") as raised:
        refuse_too_much(given(memory="5g"), (), others, cpus=8, memory_bytes=24 * GIB)
    assert raised.value.where == "launch.container.memory"
    with pytest.raises(RecipeError, match="16 processors"):
        refuse_too_much(given(cpus=64), (), [], cpus=16, memory_bytes=GIB)


def test_gpus_by_default_are_those_of_a_local_run() -> None:
    assert gpus([]) == CARDS
    assert gpus([], visible="2,3") == ("2", "3")
    assert gpus([], visible="") == gpus([], visible="-1") == gpus([], gpus="none") == ()
    assert gpus([], processes=2) == ("0", "1")
    assert choose_gpus(given(), (), [], visible=None, processes=2) == ()


def test_so_many_gpus_are_such_as_no_other_run_has() -> None:
    others = [Share("a", gpus=("0", "2"))]
    assert gpus(others, gpus=2) == ("1", "3")
    with pytest.raises(RecipeError, match="2 of 4 on this machine are free; the others are taken by a"):
        gpus(others, gpus=3)


def test_all_gpus_where_none_are_seen_is_for_the_engine_to_answer() -> None:
    assert choose_gpus(given(gpus="all"), (), [], visible=None, processes=None) == ("all",)


def test_a_gpu_that_is_named_must_be_there_and_free() -> None:
    assert gpus([], gpus=[0, "GPU-5ab"]) == ("0", "GPU-5ab")
    with pytest.raises(RecipeError, match="there is no GPU 4"):
        gpus([], gpus=[4])
    with pytest.raises(RecipeError, match="GPU 1 is taken by a"):
        refuse_too_much(given(gpus=[1]), ("1",), [Share("a", gpus=("1",))], cpus=8, memory_bytes=GIB)
    with pytest.raises(RecipeError, match="is taken by a"):
        refuse_too_much(given(gpus=[1]), ("1",), [Share("a", gpus=("all",))], cpus=8, memory_bytes=GIB)


def test_runs_that_share_by_mps_have_a_gpu_together_up_to_the_whole_of_it() -> None:
    others = [Share("a", gpus=("0",), mps=60)]
    refuse_too_much(given(gpus=[0], mps=40), ("0",), others, cpus=8, memory_bytes=GIB)
    with pytest.raises(RecipeError, match=r"a \(60%\), and 50% more"):
        refuse_too_much(given(gpus=[0], mps=50), ("0",), others, cpus=8, memory_bytes=GIB)
    with pytest.raises(RecipeError, match="taken by b"):
        refuse_too_much(given(gpus=[0], mps=10), ("0",), [Share("b", gpus=("0",))], cpus=8, memory_bytes=GIB)
    assert gpus(others, gpus=1, mps=30) == ("1",)
