"""A cold start in its parts."""

from __future__ import annotations

import time

import psutil
import pytest

from tunedock.serve.cold import ColdStart


def test_the_parts_are_the_whole_from_the_process_on() -> None:
    cold = ColdStart()
    with cold.of("weights"):
        time.sleep(0.02)
    with cold.of("imports"), pytest.raises(ZeroDivisionError), cold.of("weights"):  # what fails has taken its time too
        raise ZeroDivisionError
    whole = cold.up()
    assert whole == pytest.approx(sum(cold.seconds.values()))
    assert whole == pytest.approx(time.time() - psutil.Process().create_time(), abs=0.5)
    assert cold.seconds["weights"] >= 0.02
    assert list(cold.seconds) == ["imports", "weights", "ready"] and cold.text().startswith("imports ")
