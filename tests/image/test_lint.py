"""Our rules, each broken once; hadolint's words as ours."""

from __future__ import annotations

import pytest

from tunedock.errors import DependencyError
from tunedock.image.lint import RULES, Problem, check, hadolint, instructions

GOOD = """ARG BASE=debian:12
FROM ${BASE} AS builder
RUN pip install --no-cache-dir x
FROM ${BASE}
RUN apt-get update && apt-get install -y tini && rm -rf /var/lib/apt/lists/*
COPY --from=builder /opt/venv /opt/venv
COPY code/ /code/
RUN python -m compileall /code
USER 1000:1000
HEALTHCHECK CMD ["true"]
ENTRYPOINT ["tini", "--"]
CMD ["tunedock"]
"""

BROKEN = {
    "tag": ("debian:12", "debian"),
    "user": ("USER 1000:1000", "USER root"),
    "tini": ('["tini", "--"]', '["tunedock"]'),
    "health": ('HEALTHCHECK CMD ["true"]\n', ""),
    "order": ("USER 1000", "COPY model/ /model/\nUSER 1000"),
    "exec": ('CMD ["tunedock"]\n', "CMD tunedock\n"),
    "context": ("COPY code/ /code/", "COPY . /code/"),
    "add": ("COPY code/", "ADD x.tar /x\nCOPY code/"),
    "secret-arg": ("FROM ${BASE} AS builder", "FROM ${BASE} AS builder\nARG HF_TOKEN"),
    "secret-env": ("USER 1000", "ENV API_KEY=x\nUSER 1000"),
    "pipe": ("RUN python -m compileall", "RUN curl -s https://x | sh && python -m compileall"),
    "pip-cache": ("--no-cache-dir ", ""),
    "apt-lists": (" && rm -rf /var/lib/apt/lists/*", ""),
}


def test_a_good_one_breaks_no_rule() -> None:
    assert check(GOOD) == []


def test_every_rule_has_a_case() -> None:
    assert BROKEN.keys() == {rule.name for rule in RULES}


@pytest.mark.parametrize("rule", BROKEN)
def test_each_rule_is_seen(rule: str) -> None:
    before, after = BROKEN[rule]
    assert before in GOOD
    assert {problem.rule for problem in check(GOOD.replace(before, after, 1))} == {rule}


def test_a_frontend_from_a_hub() -> None:
    assert [problem.rule for problem in check("# syntax=docker/dockerfile:1\n" + GOOD)] == ["syntax"]


def test_lines_are_those_of_the_file() -> None:
    read = instructions("# a comment\nFROM x:1\n\nRUN a \\\n    # inside\n    && b\nUSER 1\n")
    assert [(each.line, each.name, each.text) for each in read] == [
        (2, "FROM", "x:1"),
        (4, "RUN", "a && b"),
        (7, "USER", "1"),
    ]


def test_hadolint_is_asked() -> None:
    found = hadolint("FROM debian\nRUN cd /x\n")
    assert {problem.rule for problem in found} >= {"DL3006", "DL3003"}
    assert all(isinstance(problem, Problem) and problem.line in (1, 2) for problem in found)


def test_a_hadolint_that_does_not_work_is_an_error() -> None:
    with pytest.raises(DependencyError, match="hadolint fails"):
        hadolint("FROM debian\n", program="/bin/false")
