"""The tokenizer's chat template, rendered as `apply_chat_template` renders it, in half its time.

transformers copies every message and asks the sandbox anew for every attribute. Here the template is compiled once in an
environment of the same filters, globals and extensions, whose sandbox remembers what it has allowed: its verdict depends on an
object's type and the attribute's name alone. Whether both render the same is looked at when
a renderer is made; where they differ (another version of transformers, a template that reads what is not given here),
transformers renders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import BuiltinMethodType
from typing import Any

from jinja2 import Environment, Template
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from transformers import PreTrainedTokenizerBase

Render = Callable[..., str]

_DICT_ATTRIBUTES = frozenset(dir(dict))
_FORMATTERS = frozenset(("format", "format_map"))
"""Methods of text the sandbox replaces by its own."""

_PROBES: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "Which probe is asked?"}],
    [{"role": "system", "content": "Probe."}, {"role": "user", "content": " Asked? "}],
    [
        {"role": "user", "content": "Asked?"},
        {"role": "assistant", "content": "Answered.", "reasoning_content": "Reasoned."},
        {"role": "user", "content": "Asked again?"},
        {
            "role": "assistant",
            "content": "<think>\nReasoned.\n</think>\n\nAnswered again.",
            "reasoning_content": "Yes.",
        },
    ],
    [
        {"role": "user", "content": "Asked?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "id": "call_0", "function": {"name": "probe", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "1", "tool_call_id": "call_0", "name": "probe"},
        {"role": "assistant", "content": "Answered."},
    ],
)
_PROBE_TOOLS = [{"type": "function", "function": {"name": "probe", "description": "Probes.", "parameters": {}}}]


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, less the questions it has answered before."""

    def __init__(self, like: Environment) -> None:
        super().__init__(
            trim_blocks=like.trim_blocks,
            lstrip_blocks=like.lstrip_blocks,
            extensions=[type(extension) for extension in like.extensions.values()],
        )
        self.filters.update(like.filters)
        self.tests.update(like.tests)
        self.globals.update(like.globals)
        self._allowed: dict[tuple[type, str], bool] = {}
        self._text_methods = frozenset(
            name for name in dir(str) if name not in _FORMATTERS and self.is_safe_attribute("", name, None)
        )

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is dict and attribute not in _DICT_ATTRIBUTES:
            try:
                return obj[attribute]
            except KeyError:
                return self.undefined(obj=obj, name=attribute)
        if kind is str and attribute in self._text_methods:
            return getattr(obj, attribute)
        if kind is LoopContext or issubclass(kind, Namespace):
            return self._own(kind, obj, attribute)
        return super().getattr(obj, attribute)

    def _own(self, kind: type, obj: Any, attribute: str) -> Any:
        """Of Jinja's own objects, whose attributes are values: `loop.first`, `ns.found`."""
        allowed = self._allowed.get((kind, attribute))
        if allowed is None:
            allowed = self._allowed[kind, attribute] = self.is_safe_attribute(obj, attribute, None)
        if allowed:
            try:
                value = getattr(obj, attribute)
            except AttributeError:
                return self.undefined(obj=obj, name=attribute)
            return self.wrap_str_format(value) or value if callable(value) else value
        return super().getattr(obj, attribute)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as Jinja has it
        if type(__obj) is BuiltinMethodType and type(__obj.__self__) is str and __obj.__name__ in __self._text_methods:
            kwargs.pop("_loop_vars", None)
            kwargs.pop("_block_vars", None)
            return __obj(*args, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)


def renderer(tokenizer: PreTrainedTokenizerBase) -> Render:
    """A function `(messages, tools, generation=, **switches) -> text` that is `apply_chat_template(tokenize=False)`.

    Messages are dictionaries of JSON's types without null values. It raises what the template raises.
    """

    def theirs(
        messages: Sequence[dict[str, Any]], tools: Sequence[Any] = (), *, generation: bool, **switches: Any
    ) -> str:
        text: str = tokenizer.apply_chat_template(
            messages, tools=list(tools) or None, add_generation_prompt=generation, tokenize=False, **switches
        )
        return text

    compiled = _compiler(tokenizer)
    if compiled is None:
        return theirs
    special = dict(tokenizer.special_tokens_map)

    def ours(
        messages: Sequence[dict[str, Any]], tools: Sequence[Any] = (), *, generation: bool, **switches: Any
    ) -> str:
        if not messages:  # refused by transformers, not by the template
            return theirs(messages, tools, generation=generation, **switches)
        return compiled(bool(tools)).render(
            {
                **special,
                **switches,
                "messages": [_aliased(message) for message in messages],
                "tools": list(tools) or None,
                "documents": None,
                "add_generation_prompt": generation,
            }
        )

    return ours if _agree(ours, theirs) else theirs


def _compiler(tokenizer: PreTrainedTokenizerBase) -> Callable[[bool], Template] | None:
    """Compiles the template for prompts with tools or without; None where transformers shows no environment to do it in."""
    try:
        from transformers.utils.chat_template_utils import _compile_jinja_template
    except ImportError:  # not public: another version may have moved it
        return None

    @cache
    def compiled(with_tools: bool) -> Template:
        source: str = tokenizer.get_chat_template(None, [{}] if with_tools else None)
        made: Template = _Sandbox(_compile_jinja_template(source).environment).from_string(source)
        return made

    return compiled


def _aliased(message: dict[str, Any]) -> dict[str, Any]:
    """transformers gives reasoning under both names templates read."""
    reasoning = message.get("reasoning_content")
    return message if reasoning is None else {"thinking": reasoning, **message}


def _agree(ours: Render, theirs: Render) -> bool:
    """Whether both give the same text, or both refuse, on every probe."""
    switches: tuple[Mapping[str, Any], ...] = ({"enable_thinking": flag, "thinking": flag} for flag in (False, True))  # type: ignore[assignment]
    return all(
        _outcome(ours, probe, tools, generation, switch) == _outcome(theirs, probe, tools, generation, switch)
        for switch in switches
        for probe in _PROBES
        for tools in ((), _PROBE_TOOLS)
        for generation in (False, True)
    )


def _outcome(
    render: Render,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[Any],
    generation: bool,
    switches: Mapping[str, Any],
) -> tuple[str, str]:
    try:
        return "text", render(messages, tools, generation=generation, **switches)
    except Exception as error:  # noqa: BLE001 - policy: a template is code that came with the model; what it raises is its verdict
        return type(error).__name__, str(error)
