"""`tunedock plan` as people call it: figures, the exit code that says whether it fits, and what it refuses."""

from __future__ import annotations

import json

import pytest

from inline_worker import InlineLauncher


@pytest.fixture
def real(recipe):
    rows = [{"instruction": f"What is {i}?", "output": f"It is {i}."} for i in range(2876)]
    (recipe.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe.write_text("""\
model: Qwen/Qwen3-8B
data: {train: ./rows.jsonl, split: {validation: 0.15, test: 0}}
train: {per_device_train_batch_size: 1, gradient_accumulation_steps: 8, num_train_epochs: 3}
""")
    return recipe


def test_rows_are_counted_and_steps_are_those_people_quote(tunedock, real):
    code, out, _ = tunedock("plan", str(real), "--gpu", "l20", "--devices", "2", "--json")
    found = json.loads(out)
    assert code == 0 and found["fits"]
    assert (found["rows"]["read"], found["rows"]["train"], found["batch_size"]) == (2876, 2444, 16)
    assert (found["steps"]["steps_per_epoch"], found["steps"]["total_steps"]) == (153, 459)
    assert (found["floor"]["steps_per_epoch"], found["floor"]["total_steps"]) == (152, 456)
    code, out, _ = tunedock("plan", str(real), "--gpu", "l20", "--devices", "2")
    assert code == 0
    assert "2,444 to train on" in out and "153 (152 where" in out and "459 (456)" in out
    assert "It fits" in out and "each of 2 x NVIDIA L20" in out


def test_rows_can_be_told_instead_of_counted(tunedock, real):
    _, out, err = tunedock("plan", str(real), "--gpu", "h200", "--rows", "2876", "--json")
    found = json.loads(out)
    assert found["rows"]["train"] == 2444 and found["rows"]["mean_tokens"] is None and found["batch_size"] == 8
    assert "counting" not in err


@pytest.mark.parametrize("name", ["RTX 4090", "NVIDIA GeForce RTX 4090", "rtx4090", "4090"])
def test_a_card_is_known_as_people_write_it(tunedock, real, name):
    code, out, _ = tunedock(
        "plan", str(real), "quantize=nf4", "train.gradient_checkpointing=true", "--gpu", name, "--rows", "10", "--json"
    )
    assert code == 0 and json.loads(out)["target"]["name"] == "NVIDIA GeForce RTX 4090"


def test_what_does_not_fit_ends_with_seven_and_says_what_would(tunedock, real):
    code, out, _ = tunedock("plan", str(real), "adapter=full", "--gpu", "3090", "--rows", "100")
    assert code == 7
    assert "does not fit" in out and "adapter=lora" in out and "a third more time" in out
    assert "adapter=lora quantize=nf4" in " ".join(out.split()) and "time " not in out.split("memory on")[0]


def test_this_machine_is_measured_once(tunedock, real, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("tunedock.launch.places.LocalLauncher", InlineLauncher)
    file = tmp_path / "tunedock" / "speeds.json"
    here = ("plan", str(real), "model=Qwen/Qwen3-0.6B", "--json")
    target = json.loads(tunedock(*here)[1])["target"]
    assert target["here"] and target["measured"] and target["teraflops"] > 0
    kept = json.loads(file.read_text())
    (key,) = kept
    assert list(kept.values()) == [target["teraflops"]]
    file.write_text(json.dumps({key: 1e-3}))
    out = tunedock(*here[:-1])[1]
    assert "by this machine's own speed" in out and " days, by" in out, "the figure kept, of a very slow machine"
    assert json.loads(tunedock(*here, "--calibrate")[1])["target"]["teraflops"] != 1e-3
    assert tunedock("plan", str(real), "--gpu", "l20", "--calibrate")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "309"], "did you mean `3090`"),
        (["--gpu", "4090", "--zero", "2"], "add `--devices 2`"),
        (["--zero", "4"], "4 is no stage of ZeRO"),
        (["--devices", "0"], "0 is less than 1"),
        (["--rows", "-5"], "-5 is less than 1"),
        (["model=nobody/knows-this", "--rows", "10"], "is not known here"),
    ],
)
def test_bad_input_is_named(tunedock, real, monkeypatch, tmp_path, arguments, said):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    code, out, err = tunedock("plan", str(real), *arguments)
    assert code in (2, 4) and said in err and "Traceback" not in err and not out


def test_an_empty_name_of_a_card_is_no_card(tunedock, real):
    code, _, err = tunedock("plan", str(real), "--gpu", "")
    assert code == 2 and "no card in the table" in err and "4090" in err
