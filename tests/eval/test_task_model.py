"""The engine's answers to lm-evaluation-harness are those of its own `HFLM` on the same model, in float32 on the CPU.

The model is a tiny one that has read the right answers for a second, so that some completions are right and some answers greedy.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, GPT2Config

from families import save_tiny, tokenizer
from own_tasks import TASKS, solved, write_tasks
from tunedock.errors import DataError
from tunedock.eval import task_model
from tunedock.eval.task_library import load_tasks
from tunedock.eval.task_model import PolicyLM
from tunedock.eval.tasks import BOOTSTRAPS, TaskRun
from tunedock.events import Emitter
from tunedock.model.chat_facts import ChatFacts
from tunedock.model.session import Base, base_policy, find_base
from tunedock.recipe.schema import Eval, Recipe
from tunedock.run.record import Run

LOGLIKELIHOOD = 1e-4


@pytest.fixture(autouse=True)
def bootstrap_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")


def learn(folder: Path, texts: list[str], steps: int) -> None:
    """Some steps on the texts: enough that greedy decoding gives several of them."""
    words = tokenizer("qwen3")
    model = AutoModelForCausalLM.from_pretrained(folder)
    batch = words(texts, return_tensors="pt", padding=True, padding_side="right")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tasks` and the models `long` (of 2048 positions) and `short` (of 40, so that prompts lose their left end)."""
    folder = tmp_path_factory.mktemp("models")
    write_tasks(folder / "tasks")
    save_tiny("qwen3", folder / "long")
    learn(folder / "long", solved(), steps=60)
    config = json.loads((folder / "long" / "config.json").read_text())
    (folder / "short").mkdir()
    for file in (folder / "long").iterdir():
        (folder / "short" / file.name).write_bytes(file.read_bytes())
    (folder / "short" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 40}))
    return folder


def base_of(folder: Path) -> tuple[Recipe, Base, ChatFacts]:
    recipe = Recipe.model_validate(
        {"model": str(folder), "data": {"train": ["x.jsonl"]}, "offline": True, "train": {"bf16": False}}
    )
    base = find_base(recipe)
    return recipe, base, ChatFacts(sorted(base.chat.stop_ids), thinking=False)


def model_of(folder: Path, emit: Emitter | None = None) -> PolicyLM:
    _, base, facts = base_of(folder)
    policy = base_policy(base)
    policy.probe()
    return PolicyLM(base, policy, facts, emit or Emitter(None), name="tiny", batch_size=5, seed=0)


def theirs_of(folder: Path) -> HFLM:
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4, enable_thinking=False)


def ask(model: Any, kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    return list(getattr(model, kind)([Instance(kind, {}, given, 0) for given in arguments]))


def plain(theirs: HFLM) -> HFLM:
    """lm-eval refuses log-likelihoods for a model that is told to think or not to."""
    theirs.enable_thinking = None
    return theirs


@pytest.mark.parametrize(
    ("name", "chat", "shots"),
    [
        ("long", False, 0),
        ("long", True, 2),
        ("short", False, 2),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (("long", False, 2), ("long", True, 0), ("short", True, 0))
        ),
    ],
)
def test_tasks_give_what_hflm_gives(
    place: Path, monkeypatch: pytest.MonkeyPatch, name: str, chat: bool, shots: int
) -> None:
    options = Eval(
        tasks=list(TASKS), tasks_path=str(place / "tasks"), num_fewshot=shots, apply_chat_template=chat, batch_size=5
    )
    recipe, base, facts = base_of(place / name)
    policy = base_policy(base)
    policy.probe()
    run = TaskRun(load_tasks(recipe, options, Emitter(None)), base, facts, recipe, options)
    run.measure(policy, "tuned", Emitter(None))
    monkeypatch.chdir(place / "tasks")
    wanted = simple_evaluate(
        plain(theirs_of(place / name)),
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(place / "tasks"), include_defaults=False),
        num_fewshot=shots,
        apply_chat_template=chat,
        bootstrap_iters=BOOTSTRAPS,
    )
    found = {task["task"]: task for task in run.result(Run(place / "run"))["tasks"]}
    assert list(found) == list(TASKS)
    for name_, task in found.items():
        assert task["version"] == wanted["versions"][name_]
        assert task["num_fewshot"] == wanted["n-shot"][name_]
        assert task["samples"] == wanted["n-samples"][name_]["effective"]
        for line in task["metrics"]:
            theirs = wanted["results"][name_]
            assert line["tuned"] == pytest.approx(theirs[f"{line['metric']},{line['filter']}"], rel=1e-5)
            error = theirs[f"{line['metric']}_stderr,{line['filter']}"]
            assert line["tuned_stderr"] == (None if error == "N/A" else pytest.approx(error, rel=1e-5))
            assert line["higher_is_better"] == wanted["higher_is_better"][name_][line["metric"]]
    greedy, texts = 0, set()
    ours = {(s["task"], s["doc_id"], s["filter"]): s for s in run.samples}
    for name_, samples in wanted["samples"].items():
        for sample in samples:
            got = ours.pop((name_, sample["doc_id"], sample["filter"]))
            assert len(got["resps"]) == len(sample["resps"])
            for (mine,), (their,) in zip(got["resps"], sample["resps"], strict=True):
                if isinstance(their, str):
                    assert mine == their
                    texts.add(mine)
                elif isinstance(their, float):
                    assert mine == pytest.approx(their, rel=1e-6, abs=LOGLIKELIHOOD)
                else:
                    assert mine[0] == pytest.approx(their[0], abs=LOGLIKELIHOOD) and mine[1] == their[1]
                    greedy += mine[1]
    assert not ours
    if (name, chat, shots) == ("long", False, 0):  # what the model has read: the test sees what it is to see
        assert greedy >= 3 and any(text.startswith(" It is ") for text in texts)


@pytest.mark.parametrize("family", ["llama3", "gemma", "mistral"])
def test_tokenizers_that_add_bos(tmp_path: Path, family: str) -> None:
    ours, theirs = model_of(save_tiny(family, tmp_path)), plain(theirs_of(tmp_path))
    bos = tokenizer(family).bos_token
    pairs = [
        ("What is the capital of France?", " The capital of France is Paris."),
        ("What is the capital of France? ", "Paris"),
        (f"{bos}What is it?", " A day."),
        ("", "There are 24 hours."),
    ]
    for one, other in zip(ask(ours, "loglikelihood", *pairs), ask(theirs, "loglikelihood", *pairs), strict=True):
        assert one == (pytest.approx(other[0], abs=LOGLIKELIHOOD), other[1])
    texts = [("The order arrived late.",), (f"{bos}The order",), ("",)]
    assert ask(ours, "loglikelihood_rolling", *texts) == pytest.approx(
        ask(theirs, "loglikelihood_rolling", *texts), abs=LOGLIKELIHOOD
    )


def test_settings_of_generation(place: Path) -> None:
    ours, theirs = model_of(place / "long"), theirs_of(place / "long")
    asked = [
        ("Q: What is 1 + 2?\nA:", {"until": ["\n"], "max_gen_toks": 12}),
        ("Q: What is 1 + 2?\nA:", {"until": "\n", "max_new_tokens": 3}),
        ("Q: What is 1 + 1?\nA:", {"until": ["\n"], "max_gen_toks": 12, "temperature": 0.0}),
        ("Q: What is 3 + 1?\nA:", {"until": ["is", "It"], "max_gen_toks": 12, "do_sample": False, "num_beams": 1}),
        ("Q:", {"max_gen_toks": 30}),
    ]
    got = ask(ours, "generate_until", *asked)
    assert got == ask(theirs, "generate_until", *asked)
    assert got[3] in ("", " ")  # the stop text comes first
    sampled = {"until": ["\n"], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5, "top_p": 0.9}
    again = [ask(ours, "generate_until", ("The", sampled)) for _ in range(2)]
    assert again[0] == again[1]  # seeded


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_beams": 4}, "several beams"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"max_gen_toks": 2048}, "no room for a prompt"),
    ],
)
def test_what_cannot_be_generated_is_said(place: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        ask(model_of(place / "long"), "generate_until", ("Q:", settings))


def test_a_continuation_the_model_cannot_take(place: Path) -> None:
    with pytest.raises(DataError, match="the model takes 40"):
        ask(model_of(place / "short"), "loglikelihood", ("Q:", " It is 1." * 40))
    with pytest.raises(DataError, match="no token of its own"):
        ask(model_of(place / "short"), "loglikelihood", ("Q:", ""))


def test_a_context_of_white_space_alone_is_an_empty_one(place: Path) -> None:
    """Its space is the continuation's. HFLM fails there; what is wrong would be to leave the first token out of the sum."""
    blank, empty = ask(model_of(place / "long"), "loglikelihood", (" ", " wants"), ("", "  wants"))
    assert blank == empty


def test_learned_positions_are_never_left(tmp_path: Path) -> None:
    """GPT-2 has no place for a token more; an over-long text loses it at the left, and what fits is as HFLM has it."""
    words = tokenizer("qwen3")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=640, n_embd=32, n_layer=2, n_head=2, n_positions=320, eos_token_id=words.eos_token_id
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    ours, theirs = model_of(tmp_path), plain(theirs_of(tmp_path))
    pairs = [("the customer " * n, " wants a refund.") for n in (1, 20, 300)]
    found, wanted = ask(ours, "loglikelihood", *pairs), ask(theirs, "loglikelihood", *pairs)
    ask(ours, "loglikelihood_rolling", ("the customer wants " * 300,))
    for one, other, near in zip(found, wanted, (LOGLIKELIHOOD, LOGLIKELIHOOD, 0.5), strict=True):
        assert one[0] == pytest.approx(other[0], abs=near)


def test_shared_beginnings_are_computed_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question of 200 tokens with eight answers: rows of little more than one question."""
    ours = model_of(place / "long")
    question = "".join(solved())[:900]
    slots: list[int] = []
    asked = ours._policy.ranked_logprobs
    monkeypatch.setattr(ours._policy, "ranked_logprobs", lambda row: slots.append(row.tokens) or asked(row))
    ask(ours, "loglikelihood", *((question, f" It is {n}") for n in range(8)))
    assert sum(slots) < 1.3 * len(ours.tok_encode(question))


def test_budgets_and_batches_change_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [(text, f" It is {n}") for n in range(4) for text in solved()]
    wanted = ask(model_of(place / "long"), "loglikelihood", *pairs)
    for requests, tokens in ((7, 8192), (256, 64), (1, 1)):
        monkeypatch.setattr(task_model, "REQUESTS", requests)
        told = io.StringIO()
        ours = model_of(place / "long", Emitter(told))
        ours._budget.tokens = tokens
        found = ask(ours, "loglikelihood", *pairs)
        assert [one[1] for one in found] == [one[1] for one in wanted]
        assert [one[0] for one in found] == pytest.approx([one[0] for one in wanted], abs=LOGLIKELIHOOD)
        progress = list(_progress(told))
        assert progress[0] == (0, 48) and progress[-1] == (48, 48)


def _progress(told: io.StringIO) -> Iterator[tuple[int, int]]:
    for line in told.getvalue().splitlines():
        event = json.loads(line)
        if event["kind"] == "progress":
            assert event["task"] == "tiny: answers"
            yield event["done"], event["total"]
