"""Go itself renders what `go_template` renders, and finds in the templates what Ollama looks for in them."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from families import FAMILIES, stop_ids, tokenizer
from tunedock.export.gguf.vocabulary import adds_bos
from tunedock.export.ollama import go_template
from tunedock.export.ollama.derive import Derived, derive
from tunedock.export.ollama.go_nodes import If, Node, Nodes, Range, Set, Text, Value, With, choose, join, write
from tunedock.export.ollama.own import own_render
from tunedock.export.ollama.probes import PROBES, Probe, assistant, system, user
from tunedock.export.ollama.values import go_json, values

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("go") is None, reason="go is missing: `apt-get install golang-go`"),
]

Ask = Callable[[Sequence[Mapping[str, Any]]], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Ask:
    folder = tmp_path_factory.mktemp("go")
    program = folder / "render"
    source = Path(__file__).parent / "ollama_go" / "main.go"
    settings = os.environ | {
        "GOCACHE": str(folder / "cache"),
        "GOFLAGS": "",
        "GO111MODULE": "off",
        "GOTOOLCHAIN": "local",
    }
    subprocess.run(["go", "build", "-o", program, source], check=True, env=settings, timeout=280)

    def asked(questions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        told = subprocess.run(
            [program], input=json.dumps(questions), capture_output=True, text=True, check=True, timeout=120
        )
        return json.loads(told.stdout)

    return asked


def engine_bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the engine puts before every prompt by itself."""
    return str(tokenizer.bos_token) if adds_bos(tokenizer) else ""


@cache
def derived(family: str) -> Derived:
    return derive(own_render(tokenizer(family), stop_ids(family)), bos=engine_bos(tokenizer(family)))


def question(template: str, probe: Probe) -> dict[str, Any]:
    """As a request spells it: Ollama says `thinking` and `tool_name`."""
    messages = []
    for message in probe.messages:
        renamed = {"reasoning_content": "thinking", "name": "tool_name"}
        messages.append({renamed.get(key, key): value for key, value in message.items()})
    return {"template": template, "messages": messages, "tools": probe.tools, "think": probe.think}


def test_go_says_of_every_family_what_go_template_says(ask: Ask) -> None:
    asked = [(family, probe) for family in FAMILIES for probe in PROBES]
    answers = ask([question(derived(family).template, probe) for family, probe in asked])
    for (family, probe), answer in zip(asked, answers, strict=True):
        assert not answer["Error"], (family, probe.name)
        data = values(probe.messages, probe.tools, think=probe.think)
        assert answer["Text"] == go_template.render(derived(family).template, data), (family, probe.name)


def test_ollama_finds_the_tags_of_reasoning_and_calls(ask: Ask) -> None:
    answers = dict(
        zip(FAMILIES, ask([question(derived(family).template, PROBES[0]) for family in FAMILIES]), strict=True)
    )
    think = ["<think>", "</think>"]
    for family in ("qwen3", "qwen3.5", "always-thinks", "glm4-moe", "deepseek-v3", "deepseek-r1"):
        assert derived(family).thinking
        assert answers[family]["Thinking"] == think, family
    for family in ("qwen2.5", "qwen3-2507", "llama3", "gemma", "mistral"):
        assert not derived(family).thinking
        assert answers[family]["Thinking"] is None, family
    for family in ("qwen2.5", "qwen3", "qwen3-2507"):
        assert answers[family]["Calls"] == "<tool_call>", family
    assert answers["llama3.2"]["Calls"] == '{"name": "'  # up to its `{`: nothing, so Ollama waits for a `{`


def test_why_json_writes_tools_and_not_their_own_way_of_printing(ask: Ask) -> None:
    tools = next(probe for probe in PROBES if probe.name == "one tool")
    ways = ("{{ range .Tools }}{{ .Function }}{{ end }}", "{{ range .Tools }}{{ json .Function }}{{ end }}")
    said = [answer["Text"] for answer in ask([question(way, tools) for way in ways])]
    assert said[0].startswith("{get_weather The weather")
    assert json.loads(said[1]) == tools.tools[0]["function"]


ODD = ["{{", "}}", "{", "}", "{{-", "-}}", "{{/*", '"', '"""', "`", "\\", "\n", " ", "\t", "\r", "a", "b", "<x>", "</x>",
       "\u00a0", "\u3000", "\u200b", "\ufeff", "\u2028", "\x00", "\x1b", "é", "中", "🙂", "%", "$x", ".Content", "- "]  # fmt: skip


def any_text(random_: random.Random) -> str:
    return "".join(random_.choices(ODD, k=random_.randrange(8)))


def any_nodes(random_: random.Random, depth: int = 3) -> Nodes:
    """Any nodes that print what stands at the top of the data."""
    made: list[Node] = []
    for _ in range(random_.randrange(4)):
        kind = random_.randrange(7) if depth else random_.randrange(2)
        if kind in (0, 5):
            made.append(Text(any_text(random_) or "."))
        elif kind == 1:
            made.append(Value(random_.choice(["$.System", "json $.Tools", "json $.System", "len $.Messages"])))
        elif kind == 2:
            condition = random_.choice(
                ["$.System", "$.Tools", "and $.Think (not $.IsThinkSet)", 'eq $.System "x"', "not $.Think"]
            )
            made.append(If(condition, any_nodes(random_, depth - 1), any_nodes(random_, depth - 1)))
        elif kind == 3:
            made.append(
                Range("$i, $m := $.Messages", join(any_nodes(random_, depth - 1), (Value("$i"), Value("$m.Content"))))
            )
        elif kind == 4:
            made.append(With("$.Messages", any_nodes(random_, depth - 1)))
        else:
            both = any_nodes(random_, depth - 1), any_nodes(random_, depth - 1)
            made += [Set("$x := 1"), *choose("gt $x 0", *both)]
    return join(made)


def test_go_reads_any_nodes_as_they_were_meant(ask: Ask) -> None:
    random_ = random.Random(7)
    talks = [
        Probe("", "plain", (user("a"),)),
        Probe("", "plain", (system("x"), user("b {{ . }}"), assistant("c"), user("d")), PROBES[7].tools, True),
    ]
    asked = [(write(any_nodes(random_)), talk) for _ in range(1500) for talk in talks]
    for (template, talk), answer in zip(asked, ask([question(*pair) for pair in asked]), strict=True):
        data = values(talk.messages, talk.tools, think=talk.think)
        assert (answer["Text"], answer["Error"]) == (go_template.render(template, data), ""), template


def test_go_prints_texts_as_they_are(ask: Ask) -> None:
    random_ = random.Random(11)
    texts = [any_text(random_) for _ in range(1500)]
    templates = [write((*join((Text(text),) if text else ()), Value(".System"), Text("{"))) for text in texts]
    for text, answer in zip(
        texts, ask([question(made, Probe("", "plain", (system("s"),))) for made in templates]), strict=True
    ):
        assert answer["Text"] == text + "s{"


def test_go_writes_json_as_go_json_does(ask: Ask) -> None:
    random_ = random.Random(3)
    numbers = [
        0,
        -1,
        3,
        10**6,
        10**20,
        10**21,
        1.5,
        -0.25,
        1e-6,
        1e-7,
        2.5e-9,
        1e21,
        1.25e30,
        123456789.125,
        5e-324,
        1e300,
    ]
    numbers += [random_.uniform(-1, 1) * 10 ** random_.randrange(-12, 25) for _ in range(300)]
    shapes: list[Any] = [
        *numbers,
        True,
        None,
        "",
        {},
        [],
        *(any_text(random_) for _ in range(200)),
        {"b": [1, {"z": "<&>", "a": 2}], "a": None},
    ]
    calls = assistant("", *((f"f{at}", {"v": shape}) for at, shape in enumerate(shapes)))
    probe = Probe("", "plain", (user("?"), calls))
    (answer,) = ask(
        [
            question(
                "{{ range .Messages }}{{ range .ToolCalls }}{{ json .Function.Arguments }}\n{{ end }}{{ end }}", probe
            )
        ]
    )
    assert answer["Text"].splitlines() == [go_json({"v": shape}) for shape in shapes]
