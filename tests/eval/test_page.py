from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tunedock.eval.metrics import exact_match, score
from tunedock.eval.page import page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
HOSTILE = "</div></script><script>document.title='owned'</script><img src=//evil.example/x onerror=alert(1)>{{7*7}}"


def answer(
    row: int, *, reference: str = "巴黎是法国的首都。", base: str | None = "伦敦", tuned: str = "巴黎"
) -> dict[str, Any]:
    return {
        "row_id": f"data/test.jsonl:{row}",
        "prompt": [{"role": "system", "content": "回答问题"}, {"role": "user", "content": f"question {row}?"}],
        "reference": reference,
        "base": base,
        "tuned": tuned,
        "exact_base": None if base is None else exact_match(base, reference),
        "exact_tuned": exact_match(tuned, reference),
    }


def result(*answers: dict[str, Any], compared: bool = True) -> dict[str, Any]:
    figures = {"loss": 2.0, "perplexity": 7.389, "rouge1": 0.5, "rouge2": 0.25, "rougeL": 0.5, "bleu": 12.0}
    base = {**figures, "exact_match": 0.5, "bleu_tokenize": "zh"}
    tuned = {**base, "loss": 1.5, "perplexity": 4.482, "bleu": 10.0, "rouge2": None}
    return {
        "split": "test",
        "run": "run-1",
        "base": base if compared else None,
        "tuned": tuned,
        "answers": list(answers),
    }


class Outline(HTMLParser):
    """Tags, attributes and texts of a page, as a browser would take them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open:
            self.inside.setdefault(self._open[-1], []).append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def test_metrics_with_differences() -> None:
    text = re.sub(r"\s+", " ", page(result(answer(1))))
    assert '<th scope="row">Loss</th><td>2.0000</td><td>1.5000</td><td class="better">-0.5000 better</td>' in text
    assert '<th scope="row">BLEU</th><td>12.00</td><td>10.00</td><td class="worse">-2.00 worse</td>' in text
    assert '<th scope="row">Exact match</th><td>0.500</td><td>0.500</td><td class="">+0.000</td>' in text
    assert '<th scope="row">ROUGE-2</th><td>0.250</td><td>–</td><td class="">–</td>' in text
    assert "tokenize=zh" in text


def test_without_base_there_is_one_column_and_one_answer() -> None:
    outline = Outline(page(result(answer(1, base=None), compared=False)))
    assert outline.inside["h4"] == ["Tuned · "]
    assert [cell.strip() for cell in outline.inside["th"]][:2] == ["Metric", "Tuned"]
    assert [a.get("value") for tag, a in outline.tags if tag == "input" and a.get("type") == "radio"] == [
        "all",
        "wrong",
    ]


def test_figures_of_a_run_without_generated_answers() -> None:
    value = result(compared=False)
    value["tuned"] = {"loss": 1.0, "perplexity": 2.718}
    outline = Outline(page(value))
    assert outline.count("article") == outline.count("script") == 0
    assert "No answers were generated." in outline.inside["p"]


def test_roles_reference_and_answers_are_shown() -> None:
    outline = Outline(page(result(answer(3, tuned="巴黎是德国的首都。"))))
    assert outline.inside["b"] == ["system", "user", "reference"]
    assert outline.inside["h3"] == ["data/test.jsonl:3"]
    assert "question 3?" in outline.inside["div"]
    assert outline.inside["h4"] == ["Base · ", "Tuned · "]
    assert outline.inside["span"].count("✗ not exact") == 2
    assert outline.inside["mark"][1:] == ["伦敦", "德"]  # the first is the legend
    assert outline.inside["del"][1:] == ["法"]


def test_classes_for_the_filter() -> None:
    right = "巴黎是法国的首都。"
    made = page(
        result(answer(1), answer(2, tuned=right), answer(3, base=right, tuned=right), answer(4, base="x", tuned="x"))
    )
    classes = [attributes["class"] for tag, attributes in Outline(made).tags if tag == "article"]
    assert classes == ["is-wrong is-changed", "is-changed", "", "is-wrong"]


def test_an_answer_with_nothing_in_common_does_not_repeat_the_reference() -> None:
    outline = Outline(page(result(answer(1, reference="The capital of France is Paris.", tuned="Nobody knows."))))
    assert len(outline.inside["del"]) == 1  # the legend


def test_notes_on_what_was_not_highlighted() -> None:
    looping = answer(1, reference="了的的" * 1000, tuned="的了" * 1500)
    spaced = answer(2, reference="a b", tuned="a  b")
    made = page(result(looping, spaced, answer(3, tuned=" \n")))
    assert "too long or too repetitive" in made
    assert "differs in white space only" in made
    assert '<span class="empty">empty</span>' in made


def test_hostile_text_stays_text() -> None:
    value = result(
        {
            **answer(1, reference=HOSTILE, base=HOSTILE + "!", tuned=HOSTILE + " more"),
            "row_id": HOSTILE,
            "prompt": [{"role": HOSTILE, "content": HOSTILE}],
        }
    )
    value["run"] = value["split"] = HOSTILE
    harmless = Outline(page(result(answer(1, reference="a b", base="a b!", tuned="a b more"))))
    made = page(value)
    outline = Outline(made)
    for tag in ("script", "img", "style", "article", "meta", "iframe", "link"):
        assert outline.count(tag) == harmless.count(tag), tag
    assert not [a for _, a in outline.tags if any(name.startswith("on") for name in a)]
    assert not [a for _, a in outline.tags if {"src", "href", "style", "action"} & set(a)]
    assert "49" not in made
    assert outline.inside["title"] == [f"{HOSTILE} · {HOSTILE} answers"]


def test_misleading_characters_are_spelled_out() -> None:
    made = page(result(answer(1, tuned="safe\u202egnp.exe\x00\x1b[31m\ud800\r\nnext")))
    assert "safe⟨U+202E⟩gnp.exe⟨U+0000⟩⟨U+001B⟩[31m⟨U+D800⟩" in re.sub("</?mark>", "", made)
    assert not re.search("[\u202e\x00\x1b\r]", made)
    made.encode("utf-8")


def test_the_policy_lets_only_the_page_s_own_style_and_script_run() -> None:
    made = page(result(answer(1)))
    outline = Outline(made)
    (policy,) = (a["content"] for tag, a in outline.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    for tag in ("script", "style"):
        (inline,) = re.findall(rf"<{tag}>(.*?)</{tag}>", made, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    assert not re.search(r"(https?:)?//[a-z]", made)


def test_two_hundred_long_rows_in_reasonable_time() -> None:
    text = "模型在训练中学习如何回答用户的问题，并且保持礼貌。" * 20
    started = time.perf_counter()
    made = page(
        result(
            *(answer(i, reference=text, base=text[7:], tuned=text[: 200 + i] + "完" + text[230:]) for i in range(200))
        )
    )
    assert time.perf_counter() - started < 30
    assert Outline(made).count("article") == 200


def test_scores_fit_the_page() -> None:
    value = result(answer(1))
    value["base"] = score(["伦敦"], ["巴黎是法国的首都。"]).to_json()
    value["tuned"] = score([], []).to_json()
    assert '<th scope="row">ROUGE-1</th><td>0.000</td><td>–</td>' in page(value)


def in_browser(html: str, folder: Path) -> str:
    """The page's DOM after its script ran."""
    (folder / "page.html").write_text(html, "utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run(
        [*command, "--dump-dom", (folder / "page.html").as_uri()], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_filter_and_search_in_a_browser(tmp_path: Path) -> None:
    right = "巴黎是法国的首都。"
    made = page(result(answer(1), answer(2, tuned=right), answer(3, base=HOSTILE, tuned=right), answer(14)))
    unruly = made.replace("</body>", "<script>document.title='owned'</script></body>")
    dom = in_browser(unruly, tmp_path)
    assert '<span id="shown" role="status">4 of 4</span>' in dom  # the policy lets the page's script run, and no other
    assert "<title>run-1 · test answers</title>" in dom

    acting = """<script>
    document.querySelector("input[value=wrong]").click();
    search.value = "QUESTION 1?";
    search.dispatchEvent(new Event("input"));
    </script></body>"""
    free = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", made).replace("</body>", acting)
    dom = in_browser(free, tmp_path)
    assert "1 of 4</span>" in dom
    shown = [a for tag, a in Outline(dom).tags if tag == "article" and "hidden" not in a]
    assert shown == [{"class": "is-wrong is-changed"}]
