"""A Modelfile reads back as what was meant, whatever its texts hold."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunedock.errors import RecipeError
from tunedock.export.ollama.go_nodes import Text, Value, printable, write
from tunedock.export.ollama.modelfile import modelfile, parameters


class UnreadableError(Exception):
    pass


INSTRUCTIONS = (
    "from",
    "license",
    "template",
    "system",
    "adapter",
    "renderer",
    "parser",
    "parameter",
    "message",
    "requires",
)


def read(source: str) -> list[tuple[str, str]]:
    """(instruction, argument) of a Modelfile, by the grammar Ollama documents and the habits of its parser:

    an instruction is a word, a parameter has its name after it; an argument ends with its line, or, in one or three quotes, where a
    blank follows the closing ones; characters that cannot be printed are passed over.
    """
    found: list[tuple[str, str]] = []
    at = 0
    while at < len(source):
        if source[at] in " \t\r\n":
            at += 1
            continue
        if source[at] == "#":
            at = source.find("\n", at) % (len(source) + 1)
            continue
        word, at = _word(source, at)
        if word.lower() not in INSTRUCTIONS:
            raise UnreadableError(f"no instruction: {word!r}")
        if word.lower() == "parameter":
            name, at = _word(source, at)
            word = f"parameter {name}"
        argument, at = _argument(source, at)
        found.append((word.lower(), argument))
    return found


def _word(source: str, at: int) -> tuple[str, int]:
    end = at
    while end < len(source) and (source[end].isalnum() or source[end] == "_"):
        end += 1
    if end == at or source[end : end + 1] not in (" ", "\t"):
        raise UnreadableError(f"no word: {source[at : end + 1]!r}")
    return source[at:end], end + 1


def _argument(source: str, at: int) -> tuple[str, int]:
    held = ""
    while at < len(source):
        character = source[at]
        if character in "\r\n":
            closed = _unquoted(held.strip())
            if closed is not None:
                return closed, at
        if character in " \t\r\n" or printable(character):
            held += character
        at += 1
    closed = _unquoted(held.strip())
    if closed is None:
        raise UnreadableError("quotes without an end")
    return closed, at


def _unquoted(text: str) -> str | None:
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            return text[len(quotes) : -len(quotes)] if len(text) >= 2 * len(quotes) and text.endswith(quotes) else None
    return text


def test_everything_reads_back() -> None:
    made = modelfile(
        gguf="qwen3-tuned.Q4_K_M.gguf",
        template="{{- if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}{{ .Response }}",
        stops=["<|im_end|>", "<|endoftext|>", "<|im_end|>"],
        settings=parameters({"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05}, num_ctx=4096),
        system="You answer for a shop.\nNever guess.",
        license_text='Apache 2.0\n"as is"',
    )
    assert read(made) == [
        ("from", "./qwen3-tuned.Q4_K_M.gguf"),
        ("template", "{{- if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}{{ .Response }}"),
        ("system", "You answer for a shop.\nNever guess."),
        ("parameter stop", "<|im_end|>"),
        ("parameter stop", "<|endoftext|>"),
        ("parameter num_ctx", "4096"),
        ("parameter repeat_penalty", "1.05"),
        ("parameter temperature", "0.6"),
        ("parameter top_k", "20"),
        ("parameter top_p", "0.95"),
        ("license", 'Apache 2.0\n"as is"'),
    ]


HOSTILE = st.lists(
    st.one_of(
        st.sampled_from(
            ['"', '""', '"""', "\n", "\nSYSTEM x\n", "\nFROM ./other.gguf\n", "\nPARAMETER stop x",
             "#", " ", "\t", "{{ .X }}", "MESSAGE user x"]
        ),
        st.characters(exclude_categories=["Cs"]),
    ),
    min_size=1,
    max_size=10,
).map("".join)  # fmt: skip


@given(HOSTILE, HOSTILE, HOSTILE)
def test_no_text_becomes_an_instruction(system: str, license_text: str, stop: str) -> None:
    template = write((Text(system), Value(".System"), Text(stop)))
    try:
        made = modelfile(gguf="m.gguf", template=template, stops=[stop], system=system, license_text=license_text)
    except RecipeError:
        assert any('"""' in text or not all(map(printable, text)) for text in (system, license_text, stop))
        made = modelfile(gguf="m.gguf", template=template)
        assert read(made) == [("from", "./m.gguf"), ("template", template)]
        return
    assert read(made) == [
        ("from", "./m.gguf"),
        ("template", template),
        ("system", system),
        ("parameter stop", stop),
        ("license", license_text),
    ]


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        ({"system": 'a """ b'}, "three quotes"),
        ({"system": "全角\u3000空格"}, r"U\+3000"),
        ({"license_text": "a\r\nb"}, r"U\+000D"),
        ({"stops": [""]}, "empty"),
        ({"system": "", "stops": []}, "empty"),
        ({"gguf": "../m.gguf"}, "no name of a GGUF file"),
        ({"gguf": "m.gguf\nSYSTEM x"}, "no name of a GGUF file"),
        ({"gguf": "m x.gguf"}, "no name of a GGUF file"),
        ({"settings": {"top_k 3\nSYSTEM": 1}}, "no value"),
        ({"settings": {"top_p": math.nan}}, "no value"),
    ],
)
def test_what_a_modelfile_cannot_hold_is_refused(texts: dict[str, Any], why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        modelfile(**({"gguf": "m.gguf", "template": "{{ .Prompt }}"} | texts))


@pytest.mark.parametrize(
    ("generation", "found"),
    [
        ({}, {"repeat_penalty": 1.0}),
        ({"temperature": 0, "eos_token_id": [1]}, {"repeat_penalty": 1.0, "temperature": 0.0}),
        ({"top_k": 20.0, "min_p": 0.05}, {"min_p": 0.05, "repeat_penalty": 1.0, "top_k": 20}),
        ({"repetition_penalty": 1.2, "top_p": None}, {"repeat_penalty": 1.2}),
    ],
)
def test_parameters_of_a_generation_config(generation: dict[str, Any], found: dict[str, Any]) -> None:
    assert parameters(generation) == found


@pytest.mark.parametrize(
    "generation",
    [{"temperature": "hot"}, {"temperature": -1}, {"top_p": 1.5}, {"top_k": 2.5}, {"top_k": True}, {"min_p": math.inf}],
)
def test_parameters_that_are_none_are_refused(generation: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"generation_config.json"):
        parameters(generation)


def test_a_context_of_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match="holds nothing"):
        parameters({}, num_ctx=0)
