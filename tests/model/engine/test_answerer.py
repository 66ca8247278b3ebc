"""The engine's answers, over real HTTP by the real `openai` client, from tests/stand_in_engine.py with the adapter it loads."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from families import save_tiny, stop_ids, tiny_model, tokenizer
from stand_in_engine import KEY, StandInEngine, serving
from tunedock.errors import DependencyError, DiskError, EngineError, InterruptedRun, ModelError, RecipeError
from tunedock.model.adapter import attach
from tunedock.model.answers import Sampled, Sampler, Sampling
from tunedock.model.engine.answerer import Engine
from tunedock.model.engine.folders import AdapterFolders, require_loadable
from tunedock.model.policy import Policy, Precision
from tunedock.recipe.adapters import Lora
from tunedock.recipe.objectives.rollout import OpenAIEngine

GREEDY = Sampling(8, 0.0)
DRAWN = Sampling(6, 1.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen3", tmp_path_factory.mktemp("engine") / "base")


@pytest.fixture
def server(base: Path) -> Iterator[StandInEngine]:
    with serving(base) as found:
        yield found


def trained() -> Policy:
    policy = Policy(
        attach(tiny_model("qwen3"), Lora(r=4, alpha=8), seed=3),
        torch.device("cpu"),
        Precision(torch.float32, torch.float32),
    )
    move(policy, 0)
    return policy


def move(policy: Policy, seed: int) -> None:
    """Other weights, far enough to say other things."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in policy.trainable:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))


def engine(server: StandInEngine, folder: Path, policy: Policy | None = None, **settings: Any) -> Engine:
    warnings = settings.pop("warnings", [])
    longest = settings.pop("longest", 64)
    where = settings.pop("root", folder / "run" / "engine")
    section = OpenAIEngine(**{"base_url": server.url, "model": "tiny", "max_retries": 1, **settings})
    (folder / "run").mkdir(exist_ok=True)
    return Engine(
        section,
        policy or trained(),
        AdapterFolders(where, folder / "run", on_server=section.adapter_dir_on_server),
        tokenizer("qwen3"),
        rank=4,
        stop_ids=stop_ids("qwen3"),
        longest=longest,
        on_warning=warnings.append,
    )


def prompts() -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [draw.integers(5, 90, length).tolist() for length in (3, 11, 7)]


def ids(made: list[list[Sampled]]) -> list[list[tuple[tuple[int, ...], bool]]]:
    return [[(one.ids, one.stopped) for one in group] for group in made]


def test_greedy_answers_are_the_policys_own_after_each_reload(server: StandInEngine, tmp_path: Path) -> None:
    policy, warnings = trained(), []
    asked = engine(server, tmp_path, policy, warnings=warnings)
    asked.begin()
    local = Sampler(policy, stop_ids=stop_ids("qwen3"), pad_id=0)
    said = []
    for seed in range(3):
        move(policy, seed)
        made = asked(prompts(), 1, GREEDY, seed=1)
        assert ids(made) == ids(local(prompts(), 1, GREEDY, seed=1))
        assert all(one.logprobs is not None and len(one.logprobs) == len(one.ids) for group in made for one in group)
        assert list(server.adapters) == server.loads[-1:]  # the one before is taken back
        kept = sorted(folder.name for folder in (tmp_path / "run" / "engine").iterdir())
        assert kept == sorted(server.loads[-2:])  # the last two, nothing half-written beside them
        said.append(ids(made))
    assert said[0] != said[1] != said[2] and len(set(server.loads)) == 3 and warnings == []
    asked.close()
    assert server.adapters == {} and not (tmp_path / "run" / "engine").exists()


def test_several_answers_are_drawn_by_seed_and_place(server: StandInEngine, tmp_path: Path) -> None:
    asked = engine(server, tmp_path, concurrency=2)
    done: list[int] = []
    twice = [*prompts(), prompts()[0]]
    first = asked(twice, 4, DRAWN, seed=5, between=done.append)
    assert [len(group) for group in first] == [4] * 4 and (done[0], done[-1]) == (0, 16)
    assert all(len({one.ids for one in group}) > 1 for group in first)
    assert ids(first)[0] != ids(first)[-1]  # the same prompt in another place
    assert ids(asked(twice, 4, DRAWN, seed=5)) == ids(first)
    assert ids(asked(twice, 4, DRAWN, seed=6)) != ids(first)
    assert server.most_at_once <= 2
    assert len(set(server.loads)) == len(server.loads) == 3
    asked.close()


def test_a_request_says_every_setting(server: StandInEngine, tmp_path: Path) -> None:
    asked = engine(server, tmp_path)
    asked(prompts()[:1], 2, Sampling(5, 0.7, 20, 0.9), seed=1)
    sent = server.requests[-1]
    assert sent["prompt"] == prompts()[0] and sent["model"] == server.loads[-1]
    wanted = {"n": 2, "max_tokens": 5, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.0}
    wanted |= {"repetition_penalty": 1.0, "stop_token_ids": sorted(stop_ids("qwen3")), "return_token_ids": True}
    assert {name: sent[name] for name in wanted} == wanted
    asked(prompts()[:1], 1, DRAWN, seed=1)
    assert server.requests[-1]["top_k"] == -1
    asked.close()


def test_an_answer_that_stops_holds_its_stop_token(server: StandInEngine, tmp_path: Path) -> None:
    policy = trained()
    greedy = engine(server, tmp_path, policy)(prompts(), 1, GREEDY, seed=0)
    assert not greedy[1][0].stopped and len(greedy[1][0].ids) == 8
    stop = greedy[1][0].ids[3]
    asked = engine(server, tmp_path, policy)
    asked._stop_ids, asked._stop_id = [stop], stop
    for says in ("token_ids", "tokens"):
        server.says_ids = says
        made = asked(prompts(), 1, GREEDY, seed=0)[1][0]
        assert made.stopped and made.ids == greedy[1][0].ids[: greedy[1][0].ids.index(stop) + 1]
    asked.close()


def test_without_token_ids_they_are_guessed_and_said_to_be(server: StandInEngine, tmp_path: Path) -> None:
    policy, warnings = trained(), []
    asked = engine(server, tmp_path, policy, warnings=warnings)
    server.says_ids = None
    words = [tokenizer("qwen3")("The capital of France")["input_ids"]]
    made = asked(words, 2, DRAWN, seed=3)
    asked(words, 2, DRAWN, seed=4)
    assert [text for text in warnings if "guessed" in text] == [warnings[-1]]
    assert "those of 2 of 2 answers are guessed from their text" in warnings[-1]
    server.says_ids = "token_ids"
    real = asked(words, 2, DRAWN, seed=3)
    for guess, one in zip(made[0], real[0], strict=True):
        assert guess.logprobs is None and guess.stopped == one.stopped
        texts = [tokenizer("qwen3").decode(list(found.ids)) for found in (guess, one)]
        assert "\ufffd" in texts[1] or texts[0] == texts[1]
    asked.close()


@pytest.mark.parametrize("wrong", ["500", "429", "slow"])
def test_what_passes_is_tried_again(server: StandInEngine, tmp_path: Path, wrong: str) -> None:
    asked = engine(server, tmp_path, timeout_s=server.slow_s * 0.7 if wrong == "slow" else 60.0)
    server.misbehave = [wrong]
    assert len(asked(prompts()[:1], 2, Sampling(2), seed=1)[0]) == 2
    assert len(server.requests) == 2
    asked.close()


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (["500", "500"], "refuses a prompt of 3 tokens: HTTP 500"),
        (["slow", "slow"], r"no reply within 0.5 s, tried 2 times"),
        (["html"], "not what was asked for: it has no `choices`"),
        (["abort"], "an answer ended by `abort`"),
        (["fewer"], "it has 1 answers and not 2"),
        (["422"], "HTTP 422"),
    ],
)
def test_what_does_not_pass_ends_the_rollout(
    server: StandInEngine, tmp_path: Path, wrong: list[str], reason: str
) -> None:
    asked = engine(server, tmp_path, timeout_s=0.5 if "slow" in wrong else 60.0)
    server.misbehave = wrong
    with pytest.raises(EngineError, match=reason) as raised:
        asked(prompts()[:1], 2, Sampling(2), seed=1)
    assert raised.value.where == server.url and raised.value.hint
    asked.close()


def test_an_engine_that_lost_the_adapter_is_given_it_again(server: StandInEngine, tmp_path: Path) -> None:
    warnings: list[str] = []
    asked = engine(server, tmp_path, warnings=warnings)

    def between(done: int) -> None:
        if server.adapters and not server.requests:
            server.forget_adapters()

    wanted = engine(server, tmp_path / ".." / tmp_path.name)(prompts(), 2, DRAWN, seed=1)
    server.requests.clear()
    assert ids(asked(prompts(), 2, DRAWN, seed=1, between=between)) == ids(wanted)
    assert warnings == ["the engine had lost the adapter, and was given it again: was it started anew?"]
    assert server.loads[-1] == server.loads[-2]
    asked.close()


def test_a_wrong_model_and_too_little_room_are_told_before_training(server: StandInEngine, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no model `huge`") as raised:
        engine(server, tmp_path, model="huge").begin()
    assert "it serves tiny" in str(raised.value.hint)
    with pytest.raises(EngineError, match="takes 2048 tokens, and prompt and answer may have 4096"):
        engine(server, tmp_path, longest=4096).begin()


def test_what_the_engine_must_be_started_with_is_told(server: StandInEngine, tmp_path: Path) -> None:
    server.runtime_loading = False
    with pytest.raises(EngineError, match="does not load the adapter: HTTP 404") as raised:
        engine(server, tmp_path)(prompts()[:1], 1, GREEDY, seed=1)
    wanted = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve tiny --enable-lora --max-lora-rank 8"
    assert wanted in str(raised.value.hint)
    server.runtime_loading, server.max_lora_rank = True, 2
    with pytest.raises(EngineError, match="LoRA rank 4 is greater than max_lora_rank 2") as raised:
        engine(server, tmp_path)(prompts()[:1], 1, GREEDY, seed=1)
    assert wanted in str(raised.value.hint)


def test_a_folder_the_engine_does_not_see_is_told(server: StandInEngine, tmp_path: Path) -> None:
    asked = engine(server, tmp_path, root=tmp_path / "here", adapter_dir_on_server="/nowhere/")
    with pytest.raises(EngineError, match="No adapter found for /nowhere/run-") as raised:
        asked(prompts()[:1], 1, GREEDY, seed=1)
    assert "adapter_dir_on_server" in str(raised.value.hint)
    (tmp_path / "there").symlink_to(tmp_path / "here")
    seen = engine(server, tmp_path, root=tmp_path / "here", adapter_dir_on_server=str(tmp_path / "there"))
    assert len(seen(prompts()[:1], 1, GREEDY, seed=1)) == 1
    seen.close()


def test_nobody_listening_is_told_with_the_address(tmp_path: Path, server: StandInEngine) -> None:
    asked = engine(server, tmp_path, base_url="http://127.0.0.1:9/v1", max_retries=0)
    with pytest.raises(EngineError, match="tried once") as raised:
        asked.begin()
    assert raised.value.where == "http://127.0.0.1:9/v1" and "vllm serve tiny" in str(raised.value.hint)
    with pytest.raises(EngineError, match="HTTP 404") as raised:
        engine(server, tmp_path, base_url=server.url.removesuffix("/v1"), max_retries=0).begin()
    assert "ends with `/v1`" in str(raised.value.hint)


def test_the_key_comes_from_its_variable_and_no_other_goes_out(
    server: StandInEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = KEY
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("ENGINE_KEY", raising=False)
    with pytest.raises(EngineError, match="HTTP 401") as raised:
        engine(server, tmp_path).begin()
    assert "api_key_env" in str(raised.value.hint)
    with pytest.raises(RecipeError, match="ENGINE_KEY is not set"):
        engine(server, tmp_path, api_key_env="ENGINE_KEY")
    monkeypatch.setenv("ENGINE_KEY", KEY)
    engine(server, tmp_path, api_key_env="ENGINE_KEY").begin()


def test_without_the_package_it_is_named(
    server: StandInEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DependencyError, match="need the package openai") as raised:
        engine(server, tmp_path)
    assert raised.value.hint == "pip install 'tunedock[engine]'"


def test_waiting_can_be_stopped(server: StandInEngine, tmp_path: Path) -> None:
    def stop(done: int) -> None:
        if server.requests:
            raise InterruptedRun("stopped")

    server.misbehave = ["slow"]
    asked = engine(server, tmp_path)
    began = time.monotonic()
    with pytest.raises(InterruptedRun):
        asked(prompts()[:1], 1, DRAWN, seed=1, between=stop)
    assert time.monotonic() - began < server.slow_s
    asked.close()


def test_what_a_killed_process_left_is_taken_back(server: StandInEngine, tmp_path: Path) -> None:
    engine(server, tmp_path)(prompts()[:1], 1, GREEDY, seed=1)
    other = tmp_path / "other"
    other.mkdir()
    engine(server, other, root=tmp_path / "run" / "engine")(prompts()[:1], 1, GREEDY, seed=1)
    killed, others = server.loads
    root = tmp_path / "run" / "engine"
    (root / f".{killed}9.part").mkdir()
    asked = engine(server, tmp_path)
    asked.begin()
    assert list(server.adapters) == [others] and [folder.name for folder in root.iterdir()] == [others]
    asked(prompts()[:1], 1, GREEDY, seed=1)
    assert server.loads[-1] not in (killed, others)
    asked.close()
    assert [folder.name for folder in root.iterdir()] == [others]


def test_a_folder_is_written_whole_or_not_at_all(
    tmp_path: Path, server: StandInEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot be written for the engine"):
        engine(server, tmp_path, root=tmp_path / "file")(prompts()[:1], 1, GREEDY, seed=1)

    def full(model: object, folder: Path) -> None:
        (folder / "adapter_config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tunedock.model.adapter.save", full)
    with pytest.raises(DiskError, match="No space left"):
        engine(server, tmp_path)(prompts()[:1], 1, GREEDY, seed=1)
    assert list((tmp_path / "run" / "engine").iterdir()) == [] and server.loads == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_dora", True), ("modules_to_save", ["lm_head"]), ("rank_pattern", {"q_proj": 2}), ("lora_bias", True)],
)
def test_adapters_that_vllm_cannot_run_are_refused(key: str, value: object) -> None:
    model = trained().model
    setattr(model.peft_config["default"], key, value)
    with pytest.raises(ModelError, match="cannot run this adapter: vLLM") as raised:
        require_loadable(model)
    assert raised.value.where == f"adapter.{key}"


def test_they_are_refused_before_anything_is_asked(server: StandInEngine, tmp_path: Path) -> None:
    policy = trained()
    policy.model.peft_config["default"].use_dora = True
    with pytest.raises(ModelError, match="loads no DoRA"):
        engine(server, tmp_path, policy, base_url="http://127.0.0.1:9/v1").begin()


def test_the_folder_is_a_peft_adapter_for_everyone(server: StandInEngine, tmp_path: Path) -> None:
    folders = AdapterFolders(tmp_path / "a", tmp_path / "my run: 1")
    name = folders.write(trained().model)
    config = json.loads((tmp_path / "a" / name / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 4)
    assert name.startswith("my-run-1-") and folders.seen_by_server(name) == str(tmp_path / "a" / name)
    folders.prune()
