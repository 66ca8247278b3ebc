"""What every export is tried with: texts of many languages, and conversations. Nobody's data: they travel with the export.

The texts are in NFC, for llama.cpp does not normalise; otherwise they are as odd as users are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tunedock.data.conversation import Message, ToolCall

TEXTS: Mapping[str, str] = {
    "english": "Hello, world! How are you? I'm fine; we've won 12,345.67 € (50%).",
    "chinese": "你好，请问今天的天气怎么样？我们一起去公园吧。",
    "japanese": "日本語のテキストとカタカナ、ひらがな。",
    "korean": "안녕하세요, 만나서 반갑습니다.",
    "russian": "Привет, мир! Как дела?",
    "arabic": "مرحبا بالعالم، كيف حالك؟",
    "hebrew": "שלום עולם",
    "hindi": "नमस्ते दुनिया, आप कैसे हैं?",
    "thai": "สวัสดีชาวโลก",
    "german": "Größe, Übermut und Straße: schön!",
    "vietnamese": "Xin chào thế giới, bạn có khỏe không?",
    "emoji": "😀 👩‍👩‍👧 🇫🇷 ✈️",
    "code": "def f(x):\n\treturn [x ** 2 for _ in range(10)]  # ok\n",
    "json": '{"name": "a", "list": [1, 2.5, null], "text": "q\\"uote"}',
    "markup": "<b>&amp;</b> {{ braces }} {% tag %} `code` $x^2$",
    "blanks": "  two  blanks   three \t tabs \n\n\n lines \r\n ends  ",
    "numbers": "1 12 123 1234 12345 3.14159 1e-5 ١٢٣",
    "words": "don't we'll I'VE they'd CamelCase snake_case kebab-case",
    "one blank": " ",
    "line end": "\n",
    "long word": "pneumonoultramicroscopicsilicovolcanoconiosis" * 2,
    "like specials": "<|im_start|user|> </s <s > [INST <start_of_turn",
}

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Its name"}},
            "required": ["city"],
        },
    },
}


@dataclass(frozen=True, slots=True)
class Talk:
    """A conversation that is to be answered."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()

    def plain(self, arguments: Callable[[Mapping[str, Any]], Any] = dict) -> list[dict[str, Any]]:
        """As OpenAI's messages; `arguments` says how those of calls are spelled."""
        return [_plain(message, arguments) for message in self.messages]


def _plain(message: Message, arguments: Callable[[Mapping[str, Any]], Any]) -> dict[str, Any]:
    made: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        made["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": arguments(call.arguments)}}
            for call in message.tool_calls
        ]
    return made | ({"name": message.name} if message.name is not None else {})


def as_text(arguments: Mapping[str, Any]) -> str:
    return json.dumps(arguments, ensure_ascii=False)


_ASKED = Message("user", "What is the capital of France?")
_ANSWERED = Message("assistant", "Paris.")
_SYSTEM = Message("system", "You are a helpful assistant.")
_CALL = ToolCall("get_weather", {"city": "Paris"})

TALKS: Mapping[str, Talk] = {
    "question": Talk((_ASKED,)),
    "system": Talk((_SYSTEM, _ASKED)),
    "turns": Talk((_ASKED, _ANSWERED, Message("user", "And of Italy?"))),
    "system and turns": Talk((_SYSTEM, _ASKED, _ANSWERED, Message("user", "And of Italy?\nOne word, please."))),
    "chinese": Talk((Message("user", "你好，请用一句话介绍一下你自己。"),)),
    "tools": Talk((Message("user", "How is the weather in Paris?"),), (WEATHER,)),
    "tool result": Talk(
        (
            Message("user", "How is the weather in Paris?"),
            Message("assistant", "", tool_calls=(_CALL,)),
            Message("tool", "Sunny, 24 degrees.", name="get_weather"),
        ),
        (WEATHER,),
    ),
}
"""By name. What a model's template refuses (a system message, tools) is left out for it."""

DOCUMENTS = ("english", "chinese", "code")
"""Texts that a model without conversations goes on with."""
