"""An engine's history as layers."""

from __future__ import annotations

import pytest

from tunedock.image.sizes import Layer, layers, step


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ("/bin/sh -c #(nop) COPY dir:5fa1 in /code ", "COPY /code"),
        ("/bin/sh -c #(nop)  USER 1000", "USER 1000"),
        ("RUN |2 A=b C=d /bin/sh -c set -eu;   x # buildkit", "RUN set -eu; x"),
        ("|1 A=b /bin/sh -c x", "RUN x"),
        ("RUN /bin/sh -c mkdir /x # buildkit", "RUN mkdir /x"),
        ("COPY /opt/venv /opt/venv # buildkit", "COPY /opt/venv /opt/venv"),
        ("", "the base image"),
    ],
)
def test_steps_are_instructions(told: str, shown: str) -> None:
    assert step(told) == shown


def test_layers_that_hold_something_oldest_first() -> None:
    history = [{"Size": 5, "CreatedBy": "COPY a b"}, {"Size": 0, "CreatedBy": "USER 1"}, {"Size": 7, "CreatedBy": None}]
    assert layers(history) == [Layer(7, "the base image"), Layer(5, "COPY a b")]
