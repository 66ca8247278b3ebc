"""Masks: every way a mask is known to go wrong, one test each, over every family.

What a test holds is computed from the family's own text (decoded tokens, rendered prompts), not from the code under test.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from families import FAMILIES, stop_ids, tokenizer
from tunedock.data.chat import Chat, Encoded
from tunedock.data.conversation import Conversation, Example, Message, Preference, RowRefused

SYSTEM_FREE = (
    Message("user", "你好，请问今天的天气怎么样？"),
    Message("assistant", "今天天气晴朗，𝒳 24 hours 😀."),
    Message("user", "What is the capital of France?"),
    Message("assistant", "The capital of France is Paris.\n\nReally."),
)
REASONED = (
    Message("user", "Where is my order?"),
    Message("assistant", "It arrives today.", reasoning="The order is late."),
    Message("user", "Can I have a refund?"),
    Message("assistant", "Yes.", reasoning="The customer wants a refund."),
)
STOPS = {
    **dict.fromkeys(["qwen2.5", "qwen3", "qwen3-2507", "qwen3.5", "always-thinks", "chatml"], "<|im_end|>"),
    **dict.fromkeys(["llama3", "llama3.2"], "<|eot_id|>"),
    **dict.fromkeys(["gemma", "gemma3"], "<end_of_turn>"),
    **dict.fromkeys(["deepseek-v3", "deepseek-r1"], "<｜end▁of▁sentence｜>"),
    "phi3": "<|end|>",
    "mistral": "</s>",
    "cohere2": "<|END_OF_TURN_TOKEN|>",
}
EMPTY_THINK = {
    "qwen3": "<think>\n\n</think>\n\n",
    "qwen3.5": "<think>\n\n</think>\n\n",
    "always-thinks": "<think>\n\n</think>\n\n",
    "glm4-moe": "<think></think>",
}
HEADERS = {
    "qwen3": "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "always-thinks": "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "qwen2.5": "<|im_start|>assistant\n",
    "chatml": "<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma": "<start_of_turn>model\n",
    "phi3": "<|assistant|>",  # the token swallows the line end
    "glm4-moe": "<|assistant|>\n<think></think>",
    "deepseek-v3": "<｜Assistant｜>",
}
BOTH_TURNS = ("qwen3", "llama3", "phi3")
"""Cut at every length among the quick tests too: paths part at a think block, there is a BOS, a header swallows whitespace."""
BOS = ["llama3", "llama3.2", "gemma", "gemma3", "deepseek-v3", "deepseek-r1", "cohere2", "mistral"]


def chat(family: str, **options: Any) -> Chat:
    options = {"max_length": 4096, "over_length": "drop", "train_on": "assistant"} | options
    return Chat(tokenizer(family), stop_ids=stop_ids(family), **options)


def encode(made: Chat, example: Example) -> Encoded:
    (outcome,) = made.encode([("row", example)])
    assert not isinstance(outcome, RowRefused), str(outcome)
    (encoded,) = outcome
    return encoded


def refusal(made: Chat, example: Example) -> RowRefused:
    (outcome,) = made.encode([("row", example)])
    assert isinstance(outcome, RowRefused)
    return outcome


def paths(encoded: Encoded) -> list[tuple[list[int], list[float]]]:
    found = [encoded.sample.path(leaf) for leaf in encoded.sample.leaves()]
    return [(tokens.tolist(), weights.tolist()) for tokens, weights in found]


def learned(encoded: Encoded) -> dict[tuple[int, ...], list[int]]:
    """What stands before a run of trained tokens -> the run, the longest where paths part within it."""
    runs: dict[tuple[int, ...], list[int]] = {}
    for tokens, weights in paths(encoded):
        marks = np.diff(np.concatenate([[0], np.asarray(weights) > 0, [0]]).astype(int))
        for first, end in zip(np.flatnonzero(marks == 1), np.flatnonzero(marks == -1), strict=True):
            before = tuple(tokens[:first])
            runs[before] = max(runs.get(before, []), tokens[first:end], key=len)
    return runs


def trained(encoded: Encoded) -> list[list[int]]:
    return list(learned(encoded).values())


def written(words: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """Text of tokens in the middle of a text, where a leading space is a space."""
    if words.decode(words("a a", add_special_tokens=False)["input_ids"][-1:]) == " a":
        return words.decode(ids)
    return words.decode([*words("a", add_special_tokens=False)["input_ids"], *ids]).removeprefix("a")


def stop_of(family: str) -> list[str]:
    return [STOPS[family]] if family in STOPS else ["<|user|>", "<|endoftext|>"]


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_tokens_are_the_answers_and_their_stops(family: str) -> None:
    encoded, words = encode(chat(family), Conversation(SYSTEM_FREE)), tokenizer(family)
    texts = sorted(written(words, run) for run in trained(encoded))
    before = {"glm4-moe": "\n", "mistral": " ", "phi3": " "}.get(family, "")
    after = "<|END_RESPONSE|>" if family == "cohere2" else ""
    stops = stop_of(family) * 2
    wanted = [f"{before}{SYSTEM_FREE[i].content}{after}{stops[i // 2]}" for i in (1, 3)]
    assert texts == sorted(wanted)
    share = sum(map(len, trained(encoded))) / encoded.sample.tokens
    assert 0.0 < share < 1.0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("messages", [SYSTEM_FREE, REASONED], ids=["plain", "reasoned"])
def test_last_trained_token_ends_generation(family: str, messages: tuple[Message, ...]) -> None:
    made = chat(family)
    encoded = encode(made, Conversation(messages))
    assert encoded.has_stop
    assert len(trained(encoded)) == 2
    for run in trained(encoded):
        assert run[-1] in made.stop_ids
        assert not made.stop_ids & set(run[:-1]) - set(tokenizer(family).convert_tokens_to_ids(["<|END_RESPONSE|>"]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("messages", [SYSTEM_FREE, REASONED], ids=["plain", "reasoned"])
def test_what_stands_before_an_answer_is_the_prompt_that_is_served(family: str, messages: tuple[Message, ...]) -> None:
    made = chat(family)
    encoded = encode(made, Conversation(messages))
    served = [made.prompt_ids(messages[:i], thinking=messages[i].reasoning is not None) for i in (1, 3)]
    assert sorted(map(list, learned(encoded))) == sorted(served)


@pytest.mark.parametrize("family", EMPTY_THINK)
def test_an_empty_think_block_is_context_and_not_learned(family: str) -> None:
    made, words = chat(family), tokenizer(family)
    encoded = encode(made, Conversation(SYSTEM_FREE))
    think = set(words.convert_tokens_to_ids(["<think>", "</think>"]))
    assert not any(think & set(run) for run in trained(encoded))
    assert words.decode(made.prompt_ids(SYSTEM_FREE[:1], thinking=False)).endswith(EMPTY_THINK[family])
    assert not words.decode(made.prompt_ids(SYSTEM_FREE[:1], thinking=True)).endswith(EMPTY_THINK[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_reasoning_is_learned_before_the_answer(family: str) -> None:
    runs, words = learned(encode(chat(family), Conversation(REASONED))), tokenizer(family)
    opened = family in (
        "always-thinks",
        "qwen3.5",
        "deepseek-v3",
        "deepseek-r1",
    )  # there the prompt has written `<think>`
    tag = "" if opened else "<think>" if family == "glm4-moe" else "<think>\n"
    for prompt, answer in zip(sorted(runs, key=len), (REASONED[1], REASONED[3]), strict=True):
        before, _, after = written(words, runs[prompt]).partition("</think>")
        assert before.strip() == tag + (answer.reasoning or "")
        assert after.strip().startswith(answer.content)


def test_thinking_leaves_the_history() -> None:
    words, encoded = tokenizer("qwen3"), encode(chat("qwen3"), Conversation(REASONED))
    last, first = (words.decode(tokens) for tokens, _ in paths(encoded))
    assert "The order is late." not in last
    assert "The order is late." in first
    assert len(encoded.sample.segments) == 3  # what both turns share stands once


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_one_bos(family: str) -> None:
    words = tokenizer(family)
    ((tokens, _), *_) = paths(encode(chat(family), Conversation(SYSTEM_FREE)))
    assert tokens.count(words.bos_token_id) == (1 if family in BOS else 0)
    assert tokens[0] == words.bos_token_id or family not in BOS
    assert words("x")["input_ids"].count(words.bos_token_id) <= 1


@pytest.mark.parametrize(
    ("family", "messages"),
    [pytest.param(family, SYSTEM_FREE[2:], id=f"one turn-{family}") for family in HEADERS]
    + [
        pytest.param(
            family, SYSTEM_FREE, id=f"two turns-{family}", marks=() if family in BOTH_TURNS else pytest.mark.long
        )
        for family in HEADERS
    ],
)
def test_truncation_keeps_header_and_stop_or_says_that_the_answer_is_cut(
    family: str, messages: tuple[Message, ...]
) -> None:
    words, whole = tokenizer(family), encode(chat(family), Conversation(messages))
    header, bos = HEADERS[family], words.bos_token_id if family in BOS else None
    longest = max(len(tokens) for tokens, _ in paths(whole))
    refused = []
    for max_length in range(1, longest + 1):
        made = chat(family, max_length=max_length, over_length="truncate")
        (outcome,) = made.encode([("row", Conversation(messages))])
        if isinstance(outcome, RowRefused):
            assert outcome.reason == "over_length"
            refused.append(max_length)
            continue
        (encoded,) = outcome
        answered = [True]
        for tokens, weights in paths(encoded):
            assert len(tokens) <= max_length
            assert bos is None or tokens[0] == bos
            starts = [i for i, weight in enumerate(weights) if weight and not weights[i - 1]]
            assert starts
            for start in starts:
                end = next((i for i in range(start, len(weights)) if not weights[i]), len(weights))
                assert words.decode(tokens[:start]).endswith(header)
                complete = any(tokens[start:end] == run for run in trained(whole))
                assert (tokens[end - 1] in made.stop_ids) == complete
                answered.append(complete)
        assert encoded.has_stop == all(answered)
        assert encoded.cut_tokens == sum(len(t) for t, _ in paths(whole)) - sum(len(t) for t, _ in paths(encoded)) or (
            len(encoded.sample.leaves()) != len(whole.sample.leaves())
        )
    assert refused == list(range(1, len(refused) + 1))  # what fits at one length fits at every longer one
    assert 0 < len(refused) < longest


@pytest.mark.parametrize("over_length", ["drop", "error"])
def test_over_length_says_both_numbers(over_length: str) -> None:
    ((tokens, _),) = paths(encode(chat("llama3"), Conversation(SYSTEM_FREE)))
    refused = refusal(chat("llama3", max_length=len(tokens) - 1, over_length=over_length), Conversation(SYSTEM_FREE))
    assert refused.reason == "over_length"
    assert refused.detail == f"{len(tokens)} tokens > max_length {len(tokens) - 1}"
    encode(chat("llama3", max_length=len(tokens), over_length=over_length), Conversation(SYSTEM_FREE))


def test_train_on_and_weights_choose_the_turns() -> None:
    (u1, a1, u2, a2), family = SYSTEM_FREE, "llama3"
    words = tokenizer(family)

    def answers(train_on: str, *messages: Message) -> list[str]:
        encoded = encode(chat(family, train_on=train_on), Conversation(messages))
        return [words.decode(run).removesuffix("<|eot_id|>") for run in trained(encoded)]

    off, half = Message("assistant", a1.content, weight=0.0), Message("assistant", a1.content, weight=0.5)
    assert answers("assistant", *SYSTEM_FREE) == [a1.content, a2.content]
    assert answers("last", *SYSTEM_FREE) == [a2.content]
    assert answers("assistant", u1, off, u2, a2) == [a2.content]
    assert answers("last", u1, half, u2, a2) == [a1.content, a2.content]
    ((_, weights),) = paths(encode(chat(family), Conversation((u1, half, u2, a2))))
    assert set(weights) == {0.0, 0.5, 1.0}
    ((tokens, weights),) = paths(encode(chat(family, train_on="all"), Conversation(SYSTEM_FREE)))
    assert weights[0] == 0.0 and set(weights[1:]) == {1.0}  # nothing predicts the first token
    ((_, weights),) = paths(encode(chat(family, train_on="all"), Conversation((u1, off, u2, a2))))
    silent = [token for token, weight in zip(tokens[1:], weights[1:], strict=True) if not weight]
    assert words.decode(silent) == f"{a1.content}<|eot_id|>"


def test_nothing_to_train_is_said() -> None:
    u1, a1, *_ = SYSTEM_FREE
    off = Message("assistant", a1.content, weight=0.0)
    for messages in ((u1,), (u1, off), (u1, Message("assistant", "")), (u1, Message("assistant", " \n"))):
        assert refusal(chat("qwen2.5"), Conversation(messages)).reason in ("nothing_trained", "prompt_not_prefix")


@pytest.mark.parametrize("family", ["qwen2.5", "chatml", "phi3"])
def test_an_answer_that_begins_with_whitespace_names_the_token(family: str) -> None:
    refused = refusal(chat(family), Conversation((SYSTEM_FREE[0], Message("assistant", "\n\nParis."))))
    assert refused.reason == "prompt_not_prefix"
    assert "begins with whitespace" in refused.detail
    if family == "phi3":  # its header's token swallows all whitespace after it
        assert repr("<|assistant|>\n\n\n") in refused.detail
    else:
        assert repr("\n\n\n") in refused.detail


def test_a_template_whose_answer_does_not_continue_its_prompt_is_refused_with_the_place() -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer("chatml").backend_tokenizer, eos_token="<|endoftext|>")
    words.chat_template = (
        "{%- for message in messages -%}{{- message.role + ':' + message.content + '<|im_end|>' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- 'bot:' -}}{%- endif -%}"
    )
    made = Chat(words, stop_ids=[600], max_length=64, over_length="drop", train_on="assistant")
    refused = refusal(made, Conversation(SYSTEM_FREE[:2]))
    assert refused.reason == "prompt_not_prefix"
    assert "'bot:'" in refused.detail
    assert "turn 1" in refused.detail


def test_a_tokenizer_that_reads_the_prompt_otherwise_before_an_answer_is_found_out() -> None:
    """A prompt that ends in spaces: before a digit they are two tokens, alone they are one, and no token straddles."""
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer("chatml").backend_tokenizer, eos_token="<|endoftext|>")
    words.chat_template = (
        "{%- for message in messages -%}{%- if message.role == 'assistant' -%}{{- 'A:    ' -}}{%- endif -%}"
        "{{- message.content + '<|im_end|>' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- 'A:    ' -}}{%- endif -%}"
    )
    made = Chat(words, stop_ids=[600], max_length=64, over_length="drop", train_on="assistant")
    for answer in ("7 days", "Paris"):
        refused = refusal(made, Conversation((SYSTEM_FREE[0], Message("assistant", answer))))
        assert refused.reason == "prompt_not_prefix"


def test_characters_of_several_tokens_are_not_cut_apart() -> None:
    """Byte tokens of one character share their offsets; both of its sides are boundaries here."""
    messages = (Message("user", "𝒳"), Message("assistant", "𝒴"))
    for family in ("qwen2.5", "llama3", "gemma", "deepseek-v3"):
        words, encoded = tokenizer(family), encode(chat(family), Conversation(messages))
        ((tokens, weights),) = paths(encoded)
        assert len(tokens) > len(words.tokenize("𝒳")) + len(words.tokenize("𝒴"))
        assert len(words.tokenize("𝒴")) >= 3
        (run,) = trained(encoded)
        assert words.decode(run) == f"𝒴{STOPS[family]}"
        assert "𝒳" in words.decode([t for t, weight in zip(tokens, weights, strict=True) if not weight])


TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)


@pytest.mark.parametrize(
    "family",
    [
        "qwen3",
        "llama3",
        "phi3",
        "mistral",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("chatml", "gemma")),
    ],
)
@settings(max_examples=60, deadline=None)
@given(question=TEXTS, answer=TEXTS, again=TEXTS)
def test_any_text_is_learned_after_the_served_prompt_or_refused(
    family: str, question: str, answer: str, again: str
) -> None:
    made, words = chat(family), tokenizer(family)
    messages = (
        Message("user", question),
        Message("assistant", answer),
        Message("user", again),
        Message("assistant", "Ok."),
    )
    (outcome,) = made.encode([("row", Conversation(messages))])
    if isinstance(outcome, RowRefused):
        # Only an answer that is empty or begins with whitespace, as some tokenizer sees whitespace (control characters too).
        assert outcome.reason in ("nothing_trained", "prompt_not_prefix")
        assert outcome.detail
        assert (
            not answer.strip()
            or answer[0].isspace()
            or family == "mistral"
            or not words.decode(words.encode(answer)[-1:]).isalnum()
        )
        return
    (encoded,) = outcome
    plain = [{"role": message.role, "content": message.content} for message in messages]
    ids = words.apply_chat_template(plain, tokenize=True, return_dict=False)
    assert ids in [tokens for tokens, _ in paths(encoded)]
    served = [made.prompt_ids(messages[:i], thinking=False) for i in (1, 3)]
    assert sorted(map(list, learned(encoded))) == sorted(
        served
    )  # tokens of the prompt alone are a prefix of the whole's
    for run in trained(encoded):
        assert run[-1] in made.stop_ids


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 120), TEXTS.filter(str.strip), TEXTS.filter(str.strip))
def test_a_preference_cut_to_any_length_keeps_one_prompt(max_length: int, chosen: str, rejected: str) -> None:
    made = chat("llama3", max_length=max_length, over_length="truncate")
    pair = Preference(SYSTEM_FREE[:1], (Message("assistant", chosen),), (Message("assistant", rejected),))
    (outcome,) = made.encode([("row", pair)])
    if isinstance(outcome, RowRefused):
        assert outcome.reason in ("over_length", "same_completions")
        return
    root, *leaves = outcome[0].sample.segments
    assert [leaf.parent for leaf in leaves] == [0, 0]
    assert tokenizer("llama3").decode(root.tokens_T).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    for leaf in leaves:
        assert leaf.weights_T.all()
        assert len(root.tokens_T) + len(leaf.tokens_T) <= max_length
    assert outcome[0].has_stop == all(leaf.tokens_T[-1] in made.stop_ids for leaf in leaves)
