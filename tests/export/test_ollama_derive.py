"""Templates derived for Ollama say what the families' own templates say, and what they cannot say is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from families import FAMILIES, stop_ids, tokenizer
from tunedock.data.conversation import RowRefused
from tunedock.errors import CheckError
from tunedock.export.gguf.vocabulary import adds_bos
from tunedock.export.ollama import go_template
from tunedock.export.ollama.compare import Comparison, compare, require
from tunedock.export.ollama.derive import Derived, derive
from tunedock.export.ollama.own import Render, own_render
from tunedock.export.ollama.probes import PROBES, assistant, user
from tunedock.export.ollama.values import values


def engine_bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the engine puts before every prompt by itself."""
    return str(tokenizer.bos_token) if adds_bos(tokenizer) else ""


@cache
def own(family: str) -> Render:
    return own_render(tokenizer(family), stop_ids(family))


@cache
def compared(family: str) -> tuple[Derived, Comparison]:
    derived = derive(own(family), bos=engine_bos(tokenizer(family)))
    return derived, compare(derived, own(family))


def counted(family: str, kind: str) -> dict[str, int]:
    return dict(Counter(v.status for v in compared(family)[1].verdicts if v.kind == kind))


JSON_ONLY = {"json": 9}, {"identical": 4, "json": 3}
NO_TOOLS = {"identical": 3, "not offered": 6}, {"identical": 4, "not offered": 3}
REFUSES_TOOLS = {"identical": 3, "refused": 6}, {"identical": 4, "refused": 3}
SAID: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "qwen2.5": JSON_ONLY,
    "qwen3": JSON_ONLY,
    "qwen3-2507": JSON_ONLY,
    "glm4-moe": JSON_ONLY,
    "qwen3.5": ({"json": 8, "different": 1}, JSON_ONLY[1]),  # it writes a truth as Python does
    "llama3.2": ({"json": 8, "refused": 1}, JSON_ONLY[1]),  # it refuses two calls in a turn
    # A list within arguments has blanks; a second call opens no list of its own.
    "deepseek-v3": ({"identical": 7, "json": 1, "not offered": 1}, {"identical": 7}),
    "phi3": ({"identical": 4, "not offered": 5}, NO_TOOLS[1]),
    "cohere2": ({"identical": 3, "not offered": 4, "refused": 2}, NO_TOOLS[1]),
    "llama3": NO_TOOLS,
    "deepseek-r1": NO_TOOLS,
    "always-thinks": NO_TOOLS,
    "chatml": NO_TOOLS,
    "gemma": REFUSES_TOOLS,
    "gemma3": REFUSES_TOOLS,
    "mistral": REFUSES_TOOLS,
}
"""Family -> how its probes with tools and those with thinking come out."""


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_said_to_the_letter_and_what_is_not(family: str) -> None:
    require(compared(family)[1])
    assert counted(family, "plain") == {"identical": 7}
    assert (counted(family, "tools"), counted(family, "thinking")) == SAID[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_trained_without_reasoning_is_served_without(family: str) -> None:
    derived = derive(own(family), bos=engine_bos(tokenizer(family)), thinking=False)
    assert ".Thinking" not in derived.template
    assert "Think" not in derived.template.replace("IsThinkSet", "")
    comparison = compare(derived, own(family))
    require(comparison)
    assert all(v.status != "different" or v.kind == "edge" or family == "qwen3.5" for v in comparison.verdicts)


@pytest.mark.parametrize(
    ("family", "tools", "thinking"),
    [("qwen2.5", True, False), ("qwen3", True, True), ("deepseek-r1", False, True), ("gemma", False, False)],
)
def test_what_ollama_will_offer(family: str, tools: bool, thinking: bool) -> None:
    derived, _ = compared(family)
    assert (derived.tools, derived.thinking) == (tools, thinking)
    assert (".Tools" in derived.template) == tools


@pytest.mark.parametrize(
    ("family", "note"),
    [
        ("gemma", "refuses a system message; its text is put before the first user text"),
        ("mistral", "refuses a system message"),
        ("llama3", "takes no tools"),
        ("llama3", "takes blanks off the ends of texts"),
        ("llama3.2", "refuses several calls in one turn"),
        ("llama3.2", "today's date"),
        ("qwen3.5", "which Ollama does not read"),
    ],
)
def test_what_cannot_be_said_is_a_note(family: str, note: str) -> None:
    derived, comparison = compared(family)
    assert any(note in told for told in derived.notes)
    assert comparison.to_json()["notes"] == list(derived.notes)


@pytest.mark.parametrize(
    ("family", "could"), [("qwen3", True), ("deepseek-r1", True), ("qwen2.5", False), ("llama3", False)]
)
def test_only_a_model_that_could_think_is_said_not_to(family: str, could: bool) -> None:
    notes = derive(own(family), bos=engine_bos(tokenizer(family)), thinking=False).notes
    assert any("thinking cannot be asked for" in note for note in notes) == could


def test_plain_families_have_no_notes() -> None:
    assert all(not compared(family)[0].notes for family in ("qwen2.5", "qwen3", "qwen3-2507"))


def test_the_token_the_engine_adds_is_left_out_once() -> None:
    derived, _ = compared("llama3")
    assert derived.bos == "<|begin_of_text|>"
    assert derived.bos not in derived.template
    kept = derive(own("llama3"))
    assert kept.template.count(derived.bos) == 1
    require(compare(kept, own("llama3")))


def test_a_token_the_engine_adds_and_the_template_does_not_have_is_a_note() -> None:
    assert any("add_bos_token" in note for note in derive(own("phi3"), bos="<s>").notes)


def test_the_last_turn_is_gone_on_with_when_it_is_the_assistants() -> None:
    talk = [user("Name three primes."), assistant("2, 3 and")]
    said = go_template.render(compared("qwen3")[0].template, values(talk, think=False))
    assert said.endswith("<|im_start|>assistant\n2, 3 and")


def test_reasoning_is_told_from_text_where_the_prompt_opens_the_block() -> None:
    talk = [user("Why?"), assistant("So", reasoning="Because.")]
    for family in ("qwen3", "deepseek-r1"):
        said = go_template.render(compared(family)[0].template, values(talk, think=True))
        assert said.endswith("<think>\nBecause.\n</think>\n\nSo")


@pytest.mark.parametrize(
    ("family", "old", "new"),
    [
        ("qwen3", "<|im_start|>user", "<|im_start|>usr"),
        ("qwen3", "{{ .Content }}<|im_end|>\n", "{{ .Content }}<|im_end|>"),
        ("qwen3", "{{ if $last }}", "{{ if not $last }}"),
        ("qwen2.5", "You are Qwen", "You were Qwen"),
        ("llama3.2", "<|eot_id|>", "<|eom_id|>"),
        ("gemma", "model\n", "model "),
        ("gemma", "{{ .Content }}", "{{ .Content }} "),
        ("gemma", "$asked = true", "$asked = false"),
        ("mistral", ".Content", ".Role"),
    ],
)
def test_any_change_of_a_template_is_found(family: str, old: str, new: str) -> None:
    derived, _ = compared(family)
    assert old in derived.template
    with pytest.raises(CheckError, match="part in a plain conversation"):
        require(compare(replace(derived, template=derived.template.replace(old, new)), own(family)))


def test_a_difference_names_the_probe_and_shows_the_place() -> None:
    derived, _ = compared("qwen2.5")
    changed = replace(derived, template=derived.template.replace("assistant\n", "assistant:\n"))
    with pytest.raises(CheckError, match=r"one turn.*assistant\\n.*assistant:\\n"):
        require(compare(changed, own("qwen2.5")))


def test_json_is_the_same_however_it_is_spelled_and_nothing_else_is() -> None:
    from tunedock.export.ollama.compare import _status

    assert _status('x {"a": 1, "b": ["<"]} y', 'x {"a":1,"b":["\\u003c"]} y') == ("json", "")
    assert _status('x {"a": 1, "b": 2}', 'x {"b":2,"a":1}') == ("keys", "")
    assert _status('x {"a": 1}', 'x {"a":2}')[0] == "different"
    assert _status("x  y", "x y")[0] == "different"
    assert _status('{"a": 1} ', '{"a":1}')[0] == "different"


START = (
    "{%- set rest = messages -%}{%- if messages[0].role == 'system' -%}"
    "{%- set told = messages[0].content -%}{%- set rest = messages[1:] -%}{%- endif -%}"
)
OTHERS = {
    # Before the last user text, while that is the last message: Mistral 7B v0.3.
    "system last": START + "{{- bos_token -}}{%- for m in rest -%}"
    "{%- if m.role == 'user' -%}{{- '[INST] ' + (told + '\n\n' if told and loop.last else '') + m.content + '[/INST]' -}}"
    "{%- elif m.role == 'assistant' -%}{{- ' ' + m.content + eos_token -}}"
    "{%- else -%}{{- raise_exception('no ' + m.role) -}}{%- endif -%}{%- endfor -%}",
    # Tools there too, and calls as a list of JSON objects.
    "tools last": START + "{%- set ns = namespace(last=-1) -%}"
    "{%- for m in rest -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}{{- bos_token -}}"
    "{%- for m in rest -%}"
    "{%- if m.role == 'user' -%}"
    "{%- if tools and loop.index0 == ns.last -%}{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' -}}{%- endif -%}"
    "{{- '[INST] ' + (told + '\n\n' if told and loop.last else '') + m.content + '[/INST]' -}}"
    "{%- elif m.role == 'tool' -%}{{- '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' -}}"
    "{%- elif m.tool_calls -%}{{- '[TOOL_CALLS] [' -}}{%- for c in m.tool_calls -%}"
    "{{- '{\"name\": \"' + c.function.name + '\", \"arguments\": ' + (c.function.arguments | tojson) + '}' -}}"
    "{{- '' if loop.last else ', ' -}}"
    "{%- endfor -%}{{- ']' + eos_token -}}"
    "{%- else -%}{{- ' ' + m.content + eos_token -}}{%- endif -%}{%- endfor -%}",
    # In the first user turn, and a beginning for every turn: Llama 2.
    "system in the turn": START + "{%- for m in rest -%}"
    "{%- if m.role == 'user' -%}"
    "{{- bos_token + '[INST] ' + ('<<SYS>>\n' + told + '\n<</SYS>>\n\n' if told and loop.first else '') -}}"
    "{{- m.content + ' [/INST]' -}}"
    "{%- elif m.role == 'assistant' -%}{{- ' ' + m.content + ' ' + eos_token -}}"
    "{%- else -%}{{- raise_exception('no ' + m.role) -}}{%- endif -%}{%- endfor -%}",
}
"""Templates in the manner of families whose own are not at hand, a few lines each."""


def in_the_manner_of(name: str) -> tuple[Derived, Comparison]:
    made = deepcopy(tokenizer("mistral"))
    made.chat_template = OTHERS[name]
    render = own_render(made, stop_ids("mistral"))
    derived = derive(render, bos=engine_bos(made))
    return derived, compare(derived, render)


@pytest.mark.parametrize("name", OTHERS)
def test_a_system_text_stands_where_the_template_puts_it(name: str) -> None:
    derived, comparison = in_the_manner_of(name)
    require(comparison)
    assert Counter(v.status for v in comparison.verdicts if v.kind == "plain") == {"identical": 7}
    assert not derived.system_before_user


def test_tools_stand_before_the_last_user_text() -> None:
    derived, comparison = in_the_manner_of("tools last")
    assert derived.tools
    assert Counter(v.status for v in comparison.verdicts if v.kind == "tools") == {"json": 9}


PICTURES = ("idefics3", "llava_next", "smolvlm")
"""Their templates show texts beside pictures only."""


@pytest.mark.long
def test_every_template_at_hand_is_said_to_the_letter() -> None:
    told = 0
    for path in (files("trl") / "chat_templates").iterdir():
        name, _, suffix = path.name.partition(".")
        if suffix == "jinja" and name.removesuffix("_training") not in PICTURES:
            made = deepcopy(tokenizer("qwen3"))
            made.bos_token = "<s>"
            made.chat_template = path.read_text(encoding="utf-8")
            render = own_render(made, stop_ids("qwen3"))
            require(compare(derive(render), render))
            told += 1
    assert told > 20


def hand_made(
    messages: Sequence[Any], tools: Sequence[Any], *, add_generation_prompt: bool, enable_thinking: bool
) -> str:
    """A template with all that is hard at once: a text before the first user only, no line ends, braces beside texts."""
    if any(message["role"] in ("tool", "system") for message in messages) or tools:
        raise RowRefused("template_refused", "only users and assistants")
    text = ""
    for at, message in enumerate(messages):
        text += {"user": "{{U{", "assistant": '"""A{'}[message["role"]] + message["content"] + "}}\u00a0{"
        text += "first" if at == 0 else ""
    return text + ("{GO{" if add_generation_prompt else "")


def test_a_template_that_looks_like_go_is_said_to_the_letter() -> None:
    def plain(messages: Sequence[Any], tools: Sequence[Any], **switches: bool) -> str:
        return hand_made(messages, tools, **switches).replace("first", "")  # type: ignore[arg-type]

    derived = derive(plain)
    require(compare(derived, plain))
    assert '"""' not in derived.template
    assert "\u00a0" not in derived.template


def test_a_template_that_treats_the_first_turn_otherwise_is_refused_by_name() -> None:
    with pytest.raises(CheckError, match=r"probe `three turns`|probe `one turn`"):
        require(compare(derive(hand_made), hand_made))


def test_a_template_that_hides_texts_is_refused() -> None:
    def silent(messages: Sequence[Any], tools: Sequence[Any], **switches: bool) -> str:
        return "".join(message["content"][::-1] for message in messages)

    with pytest.raises(CheckError, match="does not show the texts of a plain conversation"):
        derive(silent)


def test_a_template_that_refuses_everything_is_refused() -> None:
    def refusing(messages: Sequence[Any], tools: Sequence[Any], **switches: bool) -> str:
        raise RowRefused("template_refused", "not today")

    with pytest.raises(CheckError, match="refuses a plain conversation: not today"):
        derive(refusing)


def test_probes_are_told_apart_by_name() -> None:
    assert len({probe.name for probe in PROBES}) == len(PROBES)
