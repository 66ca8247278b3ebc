"""LangChain's clients, told nothing but the address, the key and the model, over the real server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from client_bed import Called, called

pytest.importorskip("langchain_openai", reason="not installed: langchain-openai")

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Called]:
    with called(tmp_path_factory.mktemp("clients")) as made:
        yield made


def chat(bed: Called, model: str = "tiny", **more: Any) -> Any:
    return ChatOpenAI(**{"model": model, "base_url": f"{bed.url}/v1", "api_key": bed.key, "max_retries": 0} | more)


def test_an_answer_and_its_usage(bed: Called) -> None:
    asked = [("system", "You are brief."), ("human", "What is the capital of France?")]
    plain = openai.OpenAI(base_url=f"{bed.url}/v1", api_key=bed.key).chat.completions.create(
        model="tiny",
        messages=[
            {"role": "system", "content": "You are brief."},
            {"role": "user", "content": "What is the capital of France?"},
        ],
        max_tokens=8,
        temperature=0,
    )
    answer = chat(bed, max_tokens=8, temperature=0).invoke(asked)
    assert answer.content == plain.choices[0].message.content
    assert plain.usage is not None
    assert answer.usage_metadata["input_tokens"] == plain.usage.prompt_tokens
    assert answer.usage_metadata["output_tokens"] == 8
    assert answer.response_metadata["finish_reason"] == "length"


def test_streamed_it_is_the_same(bed: Called) -> None:
    model = chat(bed, max_tokens=8, temperature=0, stream_usage=True)
    pieces = list(model.stream("Where is my order?"))
    whole = model.invoke("Where is my order?")
    assert "".join(piece.content for piece in pieces) == whole.content
    (usage,) = [piece.usage_metadata for piece in pieces if piece.usage_metadata]
    assert usage["output_tokens"] == 8


def test_many_at_once(bed: Called) -> None:
    model = chat(bed, max_tokens=4, temperature=0)
    asked = [f"Question {number}?" for number in range(4)]
    assert [one.content for one in model.batch(asked)] == [model.invoke(one).content for one in asked]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_is_called_and_its_result_read(bed: Called, streamed: bool) -> None:
    @tool
    def weather(city: str) -> str:
        """The weather of a city."""
        return f"sunny in {city}"

    model = chat(bed, "caller").bind_tools([weather])
    asked: list[Any] = [HumanMessage("What is the weather in Paris?")]
    if streamed:
        first, *rest = model.stream(asked)
        called = sum(rest, first)
    else:
        called = model.invoke(asked)
    (call,) = called.tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Paris"}) and call["id"]
    result = weather.invoke(call)
    assert isinstance(result, ToolMessage) and result.content == "sunny in Paris"
    answer = model.invoke([*asked, called, result])
    assert answer.content == "It is sunny in Paris." and not answer.tool_calls


def test_the_newer_interface(bed: Called) -> None:
    model = chat(bed, "caller", use_responses_api=True)
    assert model.invoke("What is the weather?").text == "It is sunny in Paris."
    assert "".join(piece.text for piece in model.stream("What is the weather?")) == "It is sunny in Paris."


def test_a_form_that_the_engine_cannot_hold_is_an_error_not_a_wish(bed: Called) -> None:
    schema = {"title": "Answer", "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    for method in ("json_schema", "json_mode", "function_calling"):
        with pytest.raises(openai.BadRequestError) as found:
            chat(bed).with_structured_output(schema, method=method).invoke("Which city, in JSON?")
        assert found.value.param in ("response_format", "tool_choice", "tools")


def test_vectors(bed: Called) -> None:
    vectors = OpenAIEmbeddings(
        model="vectors",
        base_url=f"{bed.url}/v1",
        api_key=bed.key,  # type: ignore[arg-type]
        check_embedding_ctx_length=False,  # else it fetches OpenAI's own vocabulary
        max_retries=0,
    )
    assert vectors.embed_documents(["a", "bcd"]) == [[1.0, 1.0], [3.0, 1.0]]
    assert vectors.embed_query("ab") == [2.0, 1.0]


def test_errors_are_those_of_openai(bed: Called) -> None:
    with pytest.raises(openai.AuthenticationError):
        chat(bed, api_key="td-none").invoke("a")
    with pytest.raises(openai.NotFoundError, match="missing"):
        chat(bed, "missing").invoke("a")
    with pytest.raises(openai.BadRequestError, match="tokens"):
        chat(bed).invoke("word " * 2000)
