"""Rendering: the token ids are those of `apply_chat_template`, for every family; what is refused says why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from families import FAMILIES, stop_ids, tokenizer
from tunedock.data.chat import Chat, Encoded
from tunedock.data.conversation import (
    Conversation,
    Document,
    Example,
    Labelled,
    Message,
    Preference,
    RowRefused,
    ToolCall,
    Verdicts,
)
from tunedock.errors import DataError, ModelError

TOOLS: tuple[dict[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer", "description": "A number."}}},
        },
    },
)
HI, ASK = Message("user", "Hi there"), Message("user", "你好，请问 24 hours?")
ONE, TWO = Message("assistant", "Hello, how can I help?"), Message("assistant", "今天天气晴朗 😀.")
CALL = Message("assistant", "", tool_calls=(ToolCall("add", {"a": 1}, "call00001"),))
RESULT = Message("tool", "2", tool_call_id="call00001", name="add")
CASES: dict[str, Conversation] = {
    "single": Conversation((HI, ONE)),
    "system": Conversation((Message("system", "Be kind."), HI, ONE)),
    "multi-turn": Conversation((HI, ONE, ASK, TWO)),
    "tools": Conversation((HI, CALL, RESULT, TWO), TOOLS),
}
REFUSING = {
    "system": {"gemma", "mistral"},
    "tools": {"gemma", "gemma3", "mistral", "cohere2", "llama3", "phi3", "chatml", "deepseek-r1", "always-thinks"},
}
"""Families whose template raises, or leaves out the tool call that is to be learned."""
FIELD = {"qwen3", "qwen3.5", "glm4-moe", "always-thinks"}
OPENED = {"deepseek-v3", "deepseek-r1"}
ALWAYS_THINKS = OPENED | {"always-thinks"}
"""No engine renders the prompt of an answer without reasoning: the template has no switch."""


def chat(family: str, **settings: Any) -> Chat:
    settings = {"max_length": 4096, "over_length": "drop", "train_on": "assistant"} | settings
    return Chat(tokenizer(family), stop_ids=stop_ids(family), **settings)


def encode(made: Chat, example: Example) -> list[Encoded]:
    (outcome,) = made.encode([("row", example)])
    assert not isinstance(outcome, RowRefused), str(outcome)
    return outcome


def refusal(made: Chat, example: Example) -> RowRefused:
    (outcome,) = made.encode([("row", example)])
    assert isinstance(outcome, RowRefused)
    return outcome


def paths(encoded: Encoded) -> list[tuple[list[int], list[float]]]:
    found = [encoded.sample.path(leaf) for leaf in encoded.sample.leaves()]
    return [(tokens.tolist(), weights.tolist()) for tokens, weights in found]


def plain(message: Message, family: str) -> dict[str, Any]:
    """A message as a user of transformers writes it for this family."""
    written: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        arguments = '{"a": 1}' if family in OPENED else {"a": 1}
        written["tool_calls"] = [
            {"type": "function", "id": "call00001", "function": {"name": "add", "arguments": arguments}}
        ]
    if message.role == "tool":
        written |= {"tool_call_id": "call00001", "name": "add"}
    return written


def reference(words: PreTrainedTokenizerFast, messages: list[dict[str, Any]], tools: Any, **settings: Any) -> list[int]:
    ids = words.apply_chat_template(messages, tools=tools or None, tokenize=True, return_dict=False, **settings)
    assert isinstance(ids, list)
    return ids


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_token_ids_are_those_of_apply_chat_template(family: str, case: str) -> None:
    conversation, words = CASES[case], tokenizer(family)
    if family in REFUSING.get(case, ()):
        assert refusal(chat(family), conversation).reason == "template_refused"
        return
    (encoded,) = encode(chat(family), conversation)
    written = [plain(message, family) for message in conversation.messages]
    wanted = []
    for turn in (i for i, message in enumerate(conversation.messages) if message.role == "assistant"):
        ids = reference(words, written[: turn + 1], conversation.tools, enable_thinking=False)
        wanted.append(ids if family != "glm4-moe" else [*ids, words.eos_token_id])
    found = [tokens for tokens, _ in paths(encoded)]
    assert wanted[-1] in found  # the whole conversation is one path; earlier turns are on it or are branches
    assert all(path in wanted for path in found)
    if family not in {"qwen3", "qwen3.5", "always-thinks"}:  # their history has no empty think block, their prompt does
        assert len(encoded.sample.segments) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_reasoning_is_rendered_as_the_family_thinks(family: str) -> None:
    thought = "First, the order; second, 退款."
    messages = (
        HI,
        Message("assistant", ONE.content, reasoning=thought),
        ASK,
        Message("assistant", TWO.content, reasoning=thought),
    )
    (encoded,) = encode(chat(family), Conversation(messages))
    words, wanted = tokenizer(family), []
    for turn in (1, 3):
        history = [plain(message, family) for message in messages[:turn]]
        if family in OPENED:
            text = words.apply_chat_template(history, add_generation_prompt=True, tokenize=False)
            text += f"{thought}\n</think>\n\n{messages[turn].content}{words.eos_token}"
            wanted.append(words(text, add_special_tokens=False)["input_ids"])
            continue
        if family in FIELD:
            answer = {"role": "assistant", "content": messages[turn].content, "reasoning_content": thought}
        else:
            answer = {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n{messages[turn].content}"}
        ids = reference(words, [*history, answer], (), enable_thinking=True)
        wanted.append(ids if family != "glm4-moe" else [*ids, words.eos_token_id])
    assert sorted(tokens for tokens, _ in paths(encoded)) == sorted(wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_is_what_an_engine_renders(family: str) -> None:
    made, words = chat(family), tokenizer(family)
    history = [plain(message, family) for message in (HI, ONE, ASK)]
    for thinking in (True, False):
        prompt = made.prompt((HI, ONE, ASK), thinking=thinking)
        served = reference(words, history, (), add_generation_prompt=True, enable_thinking=thinking)
        assert made.engine_renders(thinking=thinking) == (thinking or family not in ALWAYS_THINKS)
        assert (made.prompt_ids((HI, ONE, ASK), thinking=thinking) == served) == made.engine_renders(thinking=thinking)
        assert (
            made.prompt_ids((HI, ONE, ASK), thinking=thinking) == words(prompt, add_special_tokens=False)["input_ids"]
        )


def test_prompt_tells_a_user_what_the_template_refuses() -> None:
    with pytest.raises(DataError, match="System role not supported"):
        chat("gemma").prompt((Message("system", "Be kind."), HI), thinking=False)


def test_a_conversation_that_begins_with_the_answer_is_refused() -> None:
    assert refusal(chat("qwen3"), Conversation((ONE, HI))).reason == "template_refused"


def test_no_template_is_an_error_with_a_way_out() -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer("chatml").backend_tokenizer, eos_token="<|endoftext|>")
    with pytest.raises(ModelError) as raised:
        Chat(words, stop_ids=[600], max_length=64, over_length="drop", train_on="assistant")
    assert "model.chat_template" in (raised.value.hint or "")


def test_a_template_that_cannot_render_an_answer_is_an_error() -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer("chatml").backend_tokenizer, eos_token="<|endoftext|>")
    words.chat_template = "{{ raise_exception('only users') }}"
    with pytest.raises(ModelError, match="only users"):
        Chat(words, stop_ids=[600], max_length=64, over_length="drop", train_on="assistant")


TURN_ENDS = {
    **dict.fromkeys(["chatml", "qwen2.5", "qwen3", "qwen3.5", "always-thinks"], "<|im_end|>"),
    **dict.fromkeys(["llama3", "llama3.2"], "<|eot_id|>"),
    "gemma": "<end_of_turn>",
    "phi3": "<|end|>",
}


@pytest.mark.parametrize("family", TURN_ENDS)
def test_the_turn_end_of_a_base_model_joins_its_stop_set(family: str) -> None:
    """Before any row is encoded, so that a prompt served from a cached data set stops too."""
    words = tokenizer(family)
    eos = "<|end_of_text|>" if family.startswith("llama") else "<eos>" if family == "gemma" else "<|endoftext|>"
    other = words.convert_tokens_to_ids(eos)
    made = Chat(words, stop_ids=[other], max_length=64, over_length="drop", train_on="assistant")
    assert made.stop_ids == {other, words.convert_tokens_to_ids(TURN_ENDS[family])}


def test_messages_without_a_pair_of_surrogates_do_not_fail_the_batch() -> None:
    broken = Conversation((HI, Message("assistant", "half \ud800")))
    first, second = chat("qwen3").encode([("a", broken), ("b", CASES["single"])])
    assert isinstance(first, RowRefused)
    assert first.reason == "invalid_unicode"
    assert not isinstance(second, RowRefused)


def test_a_batch_gives_what_its_rows_give_alone() -> None:
    made = chat("qwen3")
    rows: list[tuple[str, Example]] = [
        ("a", CASES["tools"]),
        ("b", Document("Some text 好.")),
        ("c", Conversation((HI,))),
        ("d", Preference((HI,), (ONE,), (TWO,))),
        ("e", CASES["multi-turn"]),
    ]
    together = made.encode(rows)
    assert isinstance(together[2], RowRefused)
    for row, outcome in zip(rows, together, strict=True):
        (alone,) = made.encode([row])
        if isinstance(outcome, RowRefused):
            assert str(outcome) == str(alone)
            continue
        assert not isinstance(alone, RowRefused)
        assert [paths(one) for one in outcome] == [paths(one) for one in alone]
    assert made.encode([]) == []


def test_fingerprint_covers_template_tokenizer_and_arguments() -> None:
    base = chat("qwen3").fingerprint()
    assert chat("qwen3").fingerprint() == base
    others = [
        chat("qwen3", max_length=128),
        chat("qwen3", over_length="truncate"),
        chat("qwen3", train_on="last"),
        chat("qwen3-2507"),
        chat("chatml"),
        Chat(tokenizer("qwen3"), stop_ids=[5, 600], max_length=4096, over_length="drop", train_on="assistant"),
    ]
    assert len({base, *(other.fingerprint() for other in others)}) == len(others) + 1
    tokenizer("qwen3")(["a", "longer text"], padding=True)  # leaves state behind in the tokenizer
    assert chat("qwen3").fingerprint() == base
    # Stop tokens found in the template are as good as given: evaluation, which is given the run's, finds the run's data.
    found = Chat(tokenizer("chatml"), stop_ids=[600], max_length=4096, over_length="drop", train_on="assistant")
    given = Chat(
        tokenizer("chatml"), stop_ids=found.stop_ids, max_length=4096, over_length="drop", train_on="assistant"
    )
    assert given.fingerprint() == found.fingerprint()


@pytest.mark.parametrize("family", ["qwen3", "llama3", "gemma", "phi3"])
def test_documents_are_text_and_eos_in_windows(family: str) -> None:
    words, text = tokenizer(family), "The quick brown fox. 你好，天气怎么样？ " * 5
    (whole,) = encode(chat(family), Document(text))
    ((tokens, weights),) = paths(whole)
    assert tokens == [*words(text)["input_ids"], words.eos_token_id]
    assert weights[0] == 0.0 and set(weights[1:]) == {1.0}  # nothing predicts the first token
    for over_length in ("drop", "error", "truncate"):
        windows = encode(chat(family, max_length=16, over_length=over_length), Document(text))
        assert [one.sample.row_id for one in windows[:3]] == ["row", "row~2", "row~3"]
        assert [token for one in windows for token in paths(one)[0][0]] == tokens
        assert all(one.cut_tokens == 0 and one.sample.tokens <= 16 for one in windows)
    # A token left alone has nothing to be predicted from: it takes its neighbour along.
    windows = encode(chat(family, max_length=len(tokens) - 1), Document(text))
    assert [paths(one)[0] for one in windows][1:] == [(tokens[-2:], [0.0, 1.0])]


def test_an_empty_document_trains_nothing() -> None:
    assert refusal(chat("qwen3"), Document("")).reason == "nothing_trained"


@pytest.mark.parametrize("family", FAMILIES)
def test_preference_is_a_prompt_with_two_leaves(family: str) -> None:
    worse = Message("assistant", "Hello, how can I know?")
    (encoded,) = encode(chat(family), Preference((HI,), (ONE,), (worse,)))
    root, chosen, rejected = encoded.sample.segments
    assert (root.parent, chosen.parent, rejected.parent) == (-1, 0, 0)
    assert root.tokens_T.tolist() == chat(family).prompt_ids((HI,), thinking=False)
    assert not root.weights_T.any()
    for leaf, answer in ((1, ONE), (2, worse)):
        (alone,) = encode(chat(family), Conversation((HI, answer)))
        tokens, weights = encoded.sample.path(leaf)
        assert (tokens.tolist(), weights.tolist()) == paths(alone)[0]


def test_preference_shares_its_prompt_when_cut() -> None:
    long = Message("user", "Let me think about it. " * 30)
    made = chat("gemma", max_length=60, over_length="truncate")
    (encoded,) = encode(made, Preference((long,), (ONE,), (Message("assistant", "No. " * 8),)))
    root, *leaves = encoded.sample.segments
    assert root.tokens_T[0] == tokenizer("gemma").bos_token_id
    assert max(len(root.tokens_T) + len(leaf.tokens_T) for leaf in leaves) == 60
    header = made._spans.encode(["<start_of_turn>model\n"])[0].ids_T.tolist()
    assert root.tokens_T[-len(header) :].tolist() == header
    assert encoded.has_stop
    assert all(leaf.weights_T.all() for leaf in leaves)


def test_equal_completions_are_refused() -> None:
    assert refusal(chat("llama3"), Preference((HI,), (ONE,), (ONE,))).reason == "same_completions"


def test_labelled_completion_is_one_path() -> None:
    (encoded,) = encode(chat("llama3"), Labelled((HI, ONE, ASK), (TWO,), label=False))
    ((tokens, weights),) = paths(encoded)
    prompt = chat("llama3").prompt_ids((HI, ONE, ASK), thinking=False)
    assert tokens[: len(prompt)] == prompt
    assert np.flatnonzero(weights).tolist() == list(range(len(prompt), len(tokens)))
    root, leaf = encoded.sample.segments
    assert root.tokens_T.tolist() == prompt and leaf.parent == 0
    assert encoded.sample.wanted is False


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair_read_as_verdicts_is_two_labelled_completions(family: str) -> None:
    worse = Message("assistant", "Hello, how can I know?")
    made = encode(chat(family), Verdicts((HI,), (ONE,), (worse,)))
    assert [(one.sample.row_id, one.sample.wanted) for one in made] == [("row", True), ("row~2", False)]
    for encoded, completion in zip(made, (ONE, worse), strict=True):
        (alone,) = encode(chat(family), Labelled((HI,), (completion,), label=True))
        assert paths(encoded) == paths(alone)
    assert refusal(chat(family), Verdicts((HI,), (ONE,), (ONE,))).reason == "same_completions"


def test_a_labelled_completion_that_is_cut_keeps_its_header() -> None:
    long = Message("user", "Let me think about it. " * 30)
    made = chat("gemma", max_length=60, over_length="truncate")
    (encoded,) = encode(made, Labelled((long,), (ONE,), label=True))
    root, leaf = encoded.sample.segments
    header = made._spans.encode(["<start_of_turn>model\n"])[0].ids_T.tolist()
    assert root.tokens_T[-len(header) :].tolist() == header
    assert encoded.sample.tokens == 60 and encoded.cut_tokens > 0 and leaf.weights_T.all()
    assert refusal(chat("gemma", max_length=60), Labelled((long,), (ONE,), label=True)).reason == "over_length"
