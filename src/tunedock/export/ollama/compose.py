"""The texts around turns as a template in Ollama's words.

    .System, .Tools           all system texts in one, the tools
    range $i, $m := .Messages
      $last                   whether it is the last message
      $next, $prev            the roles beside it, where results in a row share a turn
      $lastUser               the last user message, where turns after it are shown otherwise
      $asked                  whether a user text was shown, where the head is part of the first user turn

Three shapes are Ollama's to ask for. It finds the think tags as the texts around `.Thinking`, inside a range over `.Messages` (not
`$.Messages`), so that block is a list of its own that begins and ends with them; and the tag of a call as the first text inside
the first `if .ToolCalls`, so nothing stands before it there. JSON is written by `json`: since 0.14 `{{ .Function }}` prints a Go
struct, and before it `{{ .Function.Arguments }}` could.
"""

from __future__ import annotations

from dataclasses import dataclass

from tunedock.export.ollama.calls import Calls, Results, ToolTurns
from tunedock.export.ollama.go_nodes import If, Node, Nodes, Range, Set, Text, Value, With, choose, join, quote, text
from tunedock.export.ollama.pieces import Cases, Head, Turns
from tunedock.export.ollama.reasoning import Thinking

OFF = "and $.IsThinkSet (not $.Think)"
"""Thinking is asked not to be done. Where a request says nothing of it, the model's own default stands."""


@dataclass(frozen=True, slots=True)
class Shape:
    """All that was found, with thinking on or off."""

    head: Head
    turns: Turns
    thinking: Thinking
    tool_turns: ToolTurns | None

    @property
    def takes_tools(self) -> bool:
        return self.head.tools_role == "told" and self.tool_turns is not None


def compose(on: Shape, off: Shape) -> Nodes:
    """The template; `off` is `on` where the model has no switch."""
    return _Composer(on, off).template()


class _Composer:
    def __init__(self, on: Shape, off: Shape) -> None:
        self._on, self._off = on, off
        self._tools = on.tool_turns if on.tool_turns is not None and off.tool_turns is not None else None
        self._takes_tools = on.takes_tools and off.takes_tools
        self._leads_last = any(case != on.head.last.plain for case in self._cases(on.head.last))
        self._last_differs = (
            on.thinking.last != on.thinking.earlier or on.thinking.last_plain != on.thinking.earlier_plain
        )
        results = on.tool_turns.results if on.tool_turns is not None else None
        self._rows = results is not None and (results.next_start != results.start or bool(results.last_end))
        self._start_differs = results is not None and results.assistant_start != on.turns.silent_start

    def template(self) -> Nodes:
        head, first_user = self._head()
        body = join(
            self._variables(),
            (If('eq .Role "user"', self._user(first_user), self._other_roles()),),
            (Set("$prev = .Role"),) if self._rows or self._start_differs else (),
        )
        return join(
            (Set("$asked := false"),) if first_user is not None else (),
            self._last_user(),
            (Set('$prev := ""'),) if self._rows or self._start_differs else (),
            head,
            (Range("$i, $m := .Messages", body),),
        )

    # -- before and between turns -------------------------------------------------------------------------------------

    def _cases(self, cases: Cases) -> tuple[Nodes, ...]:
        return (cases.plain, cases.system, *((cases.tools, cases.both) if self._takes_tools else ()))

    def _head(self) -> tuple[Nodes, Nodes | None]:
        """What stands before all turns, and before the first user text where that is not what stands before the others."""
        start = self._on.turns.user_start
        found = [*self._cases(self._on.head.first), *self._cases(self._off.head.first)]
        apart = self._off.turns.user_start == start and all(_ends_with(case, start) for case in found)
        on, off = (self._chosen(shape.head.first, start if apart else "") for shape in (self._on, self._off))
        head = choose(OFF, off, on)
        return (at_top(head), None) if apart else ((), head)

    def _chosen(
        self, cases: Cases, end: str = "", *, with_system: str = "$.System", with_tools: str = "$.Tools"
    ) -> Nodes:
        """What stands in each case, less an end that all have."""
        plain, system, tools, both = (
            _without_end(c, end) for c in (cases.plain, cases.system, cases.tools, cases.both)
        )
        without = choose(with_system, system, plain)
        return choose(with_tools, choose(with_system, both, tools), without) if self._takes_tools else without

    def _user_start(self, first: Nodes | None) -> Nodes:
        start = self._either("turns", "user_start")
        if self._leads_last:
            head = self._on.head
            last = self._chosen(
                head.last,
                with_system="and $.System $last" if head.system_with_last_message else "$.System",
                with_tools="and $.Tools $last" if head.tools_with_last_message else "$.Tools",
            )
            start = choose("eq $i $lastUser", last, start)
        return choose("$asked", start, join(first, (Set("$asked = true"),))) if first is not None else start

    def _last_user(self) -> Nodes:
        if not self._last_differs and not self._leads_last:
            return ()
        found = (If('eq $m.Role "user"', (Set("$lastUser = $i"),)),)
        return (Set("$lastUser := -1"), Range("$i, $m := .Messages", found))

    def _variables(self) -> Nodes:
        last = (Set("$last := eq (len (slice $.Messages $i)) 1"),)
        if not self._rows:
            return last
        following = Set("$next = (index (slice $.Messages $i) 1).Role")
        return (*last, Set('$next := ""'), If("not $last", (following,)))

    # -- turns --------------------------------------------------------------------------------------------------------

    def _user(self, first: Nodes | None) -> Nodes:
        generation = self._either("turns", "generation")
        return join(
            self._user_start(first), (Value(".Content"),), self._either("turns", "user_end"), _when("$last", generation)
        )

    def _other_roles(self) -> Nodes:
        results = (If('eq .Role "tool"', self._result(self._tools.results)),) if self._tools is not None else ()
        return (If('eq .Role "assistant"', self._assistant(), results),)

    def _assistant(self) -> Nodes:
        start = self._either("thinking", "start")
        if self._start_differs and self._tools is not None:
            after_result = self._either("tool_turns", "results", "assistant_start")
            start = choose('eq $prev "tool"', after_result, start)
        end = self._either("turns", "assistant_end")
        body = join(start, self._think(), self._content())
        if self._tools is not None:
            calls = self._tools.calls
            if calls.keeps_text:
                body = join(body, self._beside_calls(calls), (If(".ToolCalls", self._calls(calls)),))
            else:
                body = choose(".ToolCalls", join(self._either("tool_turns", "text_start"), self._calls(calls)), body)
            if not calls.ends_turn:
                end = _when("not .ToolCalls", end)
        return join(body, _when("not $last", end))

    def _content(self) -> Nodes:
        before = text(self._on.turns.before_text)
        return (If(".Content", join(before, (Value(".Content"),))),) if before else (Value(".Content"),)

    def _beside_calls(self, calls: Calls) -> Nodes:
        """Between a text and calls. `with` and not `if`: Ollama takes the first `if .ToolCalls` for the calls themselves."""
        beside = choose(".Content", text(calls.after_text), text(calls.without_text))
        return (With(".ToolCalls", _of_message(beside)),) if beside else ()

    def _think(self) -> Nodes:
        on = self._on.thinking
        plain = choose("gt $i $lastUser", text(on.last_plain), text(on.earlier_plain))
        shown = on.last if on.last is not None else on.earlier
        if shown is None:
            return join(plain, self._own_last_thinking())
        block = join(text(shown[0]), (Value(".Thinking"),), text(shown[1]))
        if on.earlier == on.last:
            return _thought(".Thinking", block, plain)
        if on.earlier is None:
            return _thought("and .Thinking (gt $i $lastUser)", block, plain)
        if on.last is None:
            return _thought("and .Thinking (not (gt $i $lastUser))", block, plain)
        earlier = join(text(on.earlier[0]), (Value(".Thinking"),), text(on.earlier[1]))
        return _thought(".Thinking", (If("gt $i $lastUser", block, earlier),), plain)

    def _own_last_thinking(self) -> Nodes:
        """A model that opens `<think>` in its prompt and drops what is thought: only an answer that is to be gone on with has any.

        Ollama tells reasoning from text by the tags around `.Thinking`; without them it would show both as one.
        """
        if not self._on.turns.generation.rstrip().endswith("<think>"):
            return ()
        return (If("and $last .Thinking", (Text("<think>\n"), Value(".Thinking"), Text("\n</think>\n\n"))),)

    def _calls(self, calls: Calls) -> Nodes:
        separated = (If("gt (len (slice $m.ToolCalls $j)) 1", text(calls.separator)),) if calls.separator else ()
        item = join(
            text(calls.before_name),
            (Value(".Function.Name"),),
            text(calls.between),
            calls.arguments,
            text(calls.after_arguments),
            separated,
        )
        over = "$j, $_ := .ToolCalls" if separated else ".ToolCalls"
        opening, item = _with_clean_tag(text(calls.opening), item)
        return join(opening, (Range(over, item),), text(calls.closing))

    def _result(self, results: Results) -> Nodes:
        start = self._either("tool_turns", "results", "start")
        end = text(results.end)
        if self._rows:
            start = choose('eq $prev "tool"', self._either("tool_turns", "results", "next_start"), start)
            end = join(end, _when('ne $next "tool"', self._either("tool_turns", "results", "last_end")))
        content = Value("json .Content" if results.as_json else ".Content")
        generation = self._either("tool_turns", "results", "generation")
        return join(start, (content,), end, _when("$last", generation))

    def _either(self, *path: str) -> Nodes:
        """The text at a place of both shapes."""
        found = []
        for shape in (self._off, self._on):
            place: object = shape
            for name in path:
                place = getattr(place, name)
            found.append(text(str(place)))
        return choose(OFF, found[0], found[1])


def at_top(nodes: Nodes) -> Nodes:
    """Outside every range, where the dot is the data: the idiom of Ollama's own templates."""
    moved: list[Node] = []
    for node in nodes:
        if isinstance(node, Value):
            moved.append(Value(node.pipeline.replace("$.", ".")))
        elif isinstance(node, If):
            moved.append(If(node.condition.replace("$.", "."), at_top(node.then), at_top(node.otherwise)))
        elif isinstance(node, Range):
            moved.append(Range(node.over.replace("$.", "."), node.body))
        else:
            moved.append(node)
    return tuple(moved)


def _ends_with(nodes: Nodes, end: str) -> bool:
    return not end or (bool(nodes) and isinstance(nodes[-1], Text) and nodes[-1].value.endswith(end))


def _without_end(nodes: Nodes, end: str) -> Nodes:
    if not end or not nodes or not isinstance(nodes[-1], Text):
        return nodes
    return join(nodes[:-1], text(nodes[-1].value.removesuffix(end)))


def _when(condition: str, nodes: Nodes) -> Nodes:
    return (If(condition, nodes),) if nodes else ()


def _thought(condition: str, block: Nodes, plain: Nodes) -> Nodes:
    return (If(condition, block, plain),)


def _of_message(nodes: Nodes) -> Nodes:
    """Conditions inside a `with`, whose dot is no message."""
    return tuple(
        If(node.condition.replace(".Content", "$m.Content"), node.then, node.otherwise)
        if isinstance(node, If)
        else node
        for node in nodes
    )


def _with_clean_tag(opening: Nodes, item: Nodes) -> tuple[Nodes, Nodes]:
    """Blanks between the tag of a call and its `{` as a Go string: Ollama would wait for them as part of the tag."""
    first = opening or item
    if not isinstance(first[0], Text):
        return opening, item
    tag, brace, rest = first[0].value.partition("{")
    bare = tag.rstrip()
    if not brace and len(first) > 1:
        bare = tag  # the name follows: blanks before it are its own
    if not bare or bare == tag:
        return opening, item
    parted: Nodes = (Text(bare), Value(quote(tag[len(bare) :])), *text(brace + rest), *first[1:])
    return (parted, item) if opening else (opening, parted)
