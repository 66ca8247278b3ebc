from __future__ import annotations

import re
from html.parser import HTMLParser

from tunedock.cli.token_page import page
from tunedock.cli.tokens import coloured, marked, messages, show_row

ROW = {
    "row_id": "a.jsonl:3",
    "index": 2,
    "split": "train",
    "example": {
        "messages": [
            {"role": "user", "content": "hi <b>\x1b[2J"},
            {"role": "assistant", "content": "yo", "weight": 0.5},
        ]
    },
    "refused": None,
    "leaves": [
        {
            "tokens": [
                {"id": 1, "text": "<|user|>", "weight": 0.0},
                {"id": 2, "text": "hi\n", "weight": 0.0},
                {"id": 3, "text": "yo", "weight": 1.0},
                {"id": 4, "text": "</script>\x1b]0;x\x07", "weight": 1.0},
                {"id": 5, "text": " you", "weight": 0.5},
                {"id": 6, "text": "<end>", "weight": 0.0},
            ],
            "text": "",
        }
    ],
    "cut_tokens": 7,
    "has_stop": False,
    "max_length": 64,
}


def test_without_colours_brackets_stand_around_what_is_trained():
    text = str(marked(ROW["leaves"][0]["tokens"]))
    assert text == "<|user|>hi⏎\n⟦yo</script>⟧⟦ you⟧×0.5<end>"


def test_colours_tell_trained_from_context_and_neighbours_apart():
    text = coloured(ROW["leaves"][0]["tokens"])
    styles = [str(span.style) for span in text.spans]
    assert styles[:4] == ["default", "dim", "black on green", "black on cyan"]
    assert "×0.5" in str(text)
    assert "\x1b" not in str(text)


def test_the_row_on_a_pipe(capsys):
    show_row(ROW)
    shown = capsys.readouterr().out
    assert "row a.jsonl:3  number 2  split train" in shown
    assert "6 tokens, 3 trained" in shown
    assert "7 tokens were cut to fit data.max_length 64" in shown
    assert "no stop token" in shown
    assert "\x1b" not in shown


def test_a_refused_row_says_why(capsys):
    show_row({**ROW, "leaves": [], "refused": {"reason": "empty_answer", "detail": "turn 2 [b]"}})
    assert "refused as empty_answer: turn 2 [b]" in capsys.readouterr().out
    assert "refused as empty_answer" in page({**ROW, "refused": {"reason": "empty_answer", "detail": ""}})


def test_every_kind_of_example_has_its_messages():
    turn = {"role": "user", "content": "q"}
    call = {"role": "assistant", "content": "", "reasoning": "hm", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
    assert list(messages({"prompt": [turn], "chosen": [call], "rejected": [turn]})) == [
        ("prompt: user", "q"),
        ("chosen: assistant, reasoning", "hm"),
        ("chosen: assistant", ""),
        ("chosen: assistant, tool call", "f {'x': 1}"),
        ("rejected: user", "q"),
    ]
    assert list(messages({"kind": "document", "text": "t"})) == [("text", "t")]


def test_several_paths_are_numbered(capsys):
    show_row({**ROW, "leaves": ROW["leaves"] * 2})
    assert "path 2 of 2" in capsys.readouterr().out


class Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []
        self.text = ""

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_the_page_is_escaped_self_contained_and_allows_nothing_else():
    html = page(ROW)
    elements = Elements()
    elements.feed(html)
    tags = {tag for tag, _ in elements.found}
    assert tags == {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "pre", "span"}
    assert not re.search(r"https?:|\bsrc=|href=|url\(", html)
    policy = next(a["content"] for _, a in elements.found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "\x1b" not in html
    spans = [attributes for tag, attributes in elements.found if tag == "span"]
    assert [span.get("class") for span in spans] == [None, None, "trained", "trained", "part", None]
    assert spans[4]["title"] == "id 5, weight 0.5"
    assert "</script>" in elements.text
