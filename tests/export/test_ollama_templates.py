"""Templates as nodes and as text: whatever a node holds is printed, and what is no template of ours is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunedock.export.ollama.go_nodes import (
    If,
    Nodes,
    Range,
    Set,
    Text,
    Value,
    With,
    choose,
    join,
    printable,
    quote,
    write,
)
from tunedock.export.ollama.go_parse import GoTemplateError
from tunedock.export.ollama.go_template import render
from tunedock.export.ollama.probes import DEEP, WEATHER, assistant, result, system, user
from tunedock.export.ollama.values import go_json, values

HARD = st.lists(
    st.one_of(
        st.sampled_from(
            ["{{", "}}", "{", "}", "{{- ", " -}}", "{{/*", '"', '"""', "`", "\\", "\n", " ", "\t", "\r", "<x>", "$x"]
        ),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=12,
).map("".join)


@given(HARD, HARD)
def test_a_text_is_printed_as_it_is(before: str, after: str) -> None:
    template = write(join((Text(before),), (Value(".System"),), (Text(after),), (If(".System", (Text(before),)),)))
    assert render(template, values([system("S")])) == f"{before}S{after}{before}"
    assert all(map(printable, template))
    assert '"""' not in template


PIECES = st.one_of(
    HARD.filter(bool).map(Text), st.sampled_from([Value("$.System"), If("$.System", (Text("<s>"),)), Text("<a>\n<b>")])
)
NODES = st.lists(PIECES, max_size=5).map(lambda nodes: join(nodes))


@given(NODES, NODES, st.sampled_from(["$.System", "not $.Think", 'eq $.System "S"', "and $.Think (not $.IsThinkSet)"]))
def test_what_two_branches_share_changes_nothing_said_once(then: Nodes, otherwise: Nodes, condition: str) -> None:
    data: tuple[dict[str, Any], ...] = (values([system("S")]), values([user("x")], think=True))
    apart = write((Set("$x := 1"), If(condition, then, otherwise), Text(".")))
    shared = write((Set("$x := 1"), *join(choose(condition, then, otherwise), (Text("."),))))
    for given_ in data:
        assert render(shared, given_) == render(apart, given_)


@given(HARD)
def test_a_quoted_string_is_one_line_that_reads_back(text: str) -> None:
    assert "\n" not in quote(text)
    assert render("{{ " + quote(text) + " }}", values([])) == text


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("a {{- .System -}} b", "aSb"),
        ("a {{ .System }} b", "a S b"),
        ("{{ if .Tools }}t{{ else if .System }}s{{ else }}n{{ end }}", "s"),
        ("{{ $x := 1 }}{{ if .System }}{{ $x = 2 }}{{ end }}{{ $x }}", "2"),
        ("{{ $x := 1 }}{{ if .System }}{{ $x := 2 }}{{ end }}{{ $x }}", "1"),
        ("{{ range $i, $m := .Messages }}{{ $i }}{{ $m.Role }}{{ .Content }} {{ end }}", "0systemS 1userU "),
        ('{{ if eq (len (slice .Messages 1)) 1 }}{{ (index (slice .Messages 1) 0).Role }}{{ end }}', "user"),
        ("{{ with .Messages }}{{ len . }}{{ end }}{{ with .Tools }}x{{ end }}", "2"),
        ("{{ range .Tools }}x{{ else }}none{{ end }}", "none"),
        ("{{ and .System (not .Tools) }}{{ or .Tools .System }}", "trueS"),
        ('{{ printf "%T" .System }}', "string"),
    ],
)  # fmt: skip
def test_the_grammar(template: str, said: str) -> None:
    assert render(template, values([system("S"), user("U")])) == said


@pytest.mark.parametrize(
    "template",
    [
        "{{ .System", "{{ if .System }}x", "{{ end }}", "{{ else }}", "{{ $x }}", "{{ $x = 1 }}", "{{ upper .System }}",
        "{{ .System | len }}", "{{ .Messages }}", "{{ template \"x\" }}", "{{ /* c */ }}", "{{ range .System }}{{ end }}",
        "{{ range .Messages }}{{ .Nothing }}{{ end }}", "{{ `raw` }}", "{{ 'c' }}", "{{ \"open }}", "{{ eq .System 1 }}",
        "{{ index .Messages 7 }}", "{{ slice .Messages 7 }}", "{{ lt .System 1 }}", "{{ printf \"%d\" 1 }}", "{{ .Nothing }}",
        "{{ if .A }}{{ else if }}{{ end }}", "{{ break }}", "{{ (.System }}", "{{ range $a, $b, $c := .Tools }}{{ end }}",
    ],
)  # fmt: skip
def test_what_is_not_of_the_subset_is_refused(template: str) -> None:
    with pytest.raises(GoTemplateError):
        render(template, values([system("S"), user("U")]))


def test_a_layout_like_ollamas_own() -> None:
    body: Nodes = (If('eq .Role "user"', (Text("<u>\n"), Value(".Content")), (Value(".Role"),)),)
    nodes: Nodes = (
        Set("$x := 1"),
        If(".System", (Text("<s> "), Value(".System"), Text("</s>")), ()),
        Range(".Messages", body),
    )
    assert write(nodes) == (
        "{{- $x := 1 }}\n{{- if .System }}<s> {{ .System }}</s>\n{{- end }}\n{{- range .Messages }}\n"
        '{{- if eq .Role "user" }}<u>\n{{ .Content }}\n{{- else }}{{ .Role }}\n{{- end }}\n{{- end }}'
    )


def test_a_conversation_as_ollama_hands_it_on() -> None:
    talk = [system("a"), user("b"), user("c"), assistant("d"), result("1", "f"), result("2", "f"), system("e")]
    data = values(talk, think=False)
    assert data["System"] == "a\n\ne"
    assert [(m["Role"], m["Content"]) for m in data["Messages"]] == [
        ("system", "a"), ("user", "b\n\nc"), ("assistant", "d"), ("tool", "1"), ("tool", "2"), ("system", "e"),
    ]  # fmt: skip
    assert (data["Think"], data["IsThinkSet"]) == (False, True)
    assert values(talk)["IsThinkSet"] is False


def test_what_ollama_keeps_of_a_tool() -> None:
    weather, deep = values([], [WEATHER, DEEP])["Tools"]
    assert go_json(weather).startswith(
        '{"type":"function","function":{"name":"get_weather","description":"The weather of a city'
    )
    assert "additionalProperties" not in go_json(deep)
    assert "date-time" not in go_json(deep)
    assert "\\u003c 9 people \\u0026" in go_json(deep)
    assert go_json(deep).index('"required"') < go_json(deep).index('"properties"')


@pytest.mark.parametrize(
    ("value", "written"),
    [(1, "1"), (1.0, "1"), (1e21, "1e+21"), (1e-7, "1e-7"), (0.00001, "0.00001"), (2.5e-9, "2.5e-9"), (10**20, "1" + "0" * 20),
     (True, "true"), (None, "null"), ("<é\u2028\n\x01>", '"\\u003cé\\u2028\\n\\u0001\\u003e"'),
     ({"b": 1, "a": [{}]}, '{"a":[{}],"b":1}')],
)  # fmt: skip
def test_json_as_go_writes_it(value: Any, written: str) -> None:
    assert go_json(value) == written


def test_no_infinite_number_is_json() -> None:
    with pytest.raises(ValueError, match="JSON has no inf"):
        go_json(float("inf"))


def test_with_prints_nothing_for_nothing() -> None:
    assert render(write((With(".Tools", (Text("x"),)),)), values([])) == ""
