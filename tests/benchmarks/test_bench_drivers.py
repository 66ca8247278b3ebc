"""What the harness reads and counts: events of a run, operations, requirements, memory, variants."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.memory import PeakMemory
from benchmarks.models import SHAPES, Shape
from benchmarks.operations import training_operations
from benchmarks.peers import requirements_left
from benchmarks.protocol import Job, Measured, Step
from benchmarks.run import entries, options_of
from benchmarks.run_tunedock import per_step, read_events
from benchmarks.sides import OURS, SIDES, variant_of


def test_a_job_and_its_answer_survive_json():
    step = Step(0.5, 100, 30, 9.0)
    given = Measured("trl", "best", "dpo", "tiny", (step, step), 5.0, 0.1, 8, 1.0, 900, 400, False, {"loss": 0.69})
    assert Measured.from_json(json.loads(json.dumps(given.to_json()))) == given


def test_events_become_steps_with_the_tokens_of_the_data():
    events = [
        {"kind": "progress", "time": 10.0, "task": "tokenising", "done": 0},
        {"kind": "note", "time": 12.5, "message": "data: 8 rows read, 8 kept, 0 dropped"},
        {"kind": "progress", "time": 13.0, "task": "training", "done": 0},
        {"kind": "metrics", "time": 14.0, "step": 1, "values": {"loss": 9.0, "tokens": 80.0, "grad_norm": None}},
        {"kind": "progress", "time": 14.0, "task": "training", "done": 1},
        {"kind": "metrics", "time": 14.5, "step": 2, "values": {"loss": 8.9, "tokens": 140.0}},
    ]
    told = read_events([json.dumps(event) for event in events], [100, 60], [30, 20])
    assert told.steps == (Step(1.0, 100, 30, 9.0), Step(0.5, 60, 20, 8.9))
    assert told.computed_tokens == (80, 60)
    assert (told.first_step_at, told.preprocessing_s) == (14.0, 2.5)
    assert told.first_figures == {"loss": 9.0, "tokens": 80.0}
    with pytest.raises(ValueError, match="2 steps in the events, 3 expected"):
        read_events([json.dumps(event) for event in events], [1, 2, 3], [1, 2, 3])


def test_rows_are_summed_by_step():
    assert per_step([1, 2, 3, 4, 5], 2) == [3, 7, 5]


def test_shapes_are_the_sizes_they_are_called():
    assert SHAPES["tiny"].parameters == pytest.approx(15.1e6, rel=0.01)
    assert SHAPES["small"].parameters == pytest.approx(115.6e6, rel=0.001)


def test_operations_by_hand():
    shape = Shape(10, 4, 6, 1, 2, 1, head_dim=2)
    layer = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 6  # q, k and v, o, mlp
    attention = 3 * (
        2 * 2 * 2 * 2 * (3 + 1)
    )  # q.k and weights.v over 2 heads of 2; 2 tokens have 3 pairs, 1 token has 1
    assert shape.layer_parameters == layer
    assert training_operations(shape, [2, 1], 2, lora_r=None) == 6 * (layer * 3 + 40 * 2) + attention
    adapters = 1 * ((4 + 4) + 2 * (4 + 2) + (4 + 4) + 3 * (4 + 6))
    assert training_operations(shape, [2, 1], 2, lora_r=1) == 4 * (layer * 3 + 40 * 2) + 6 * adapters * 3 + attention


def test_requirements_keep_their_versions_and_lose_what_is_left_out():
    declared = ["torch>=2.4.0", "torchaudio>=2.4", "peft<=0.18.1,>=0.18.0", "pytest; extra == 'dev'", "numpy"]
    assert requirements_left(declared, ("torch", "torchaudio")) == ["peft<=0.18.1,>=0.18.0", "numpy"]


def test_memory_of_a_child_is_seen():
    code = "b = bytearray(200_000_000); import time; time.sleep(0.6)"
    child = subprocess.Popen([sys.executable, "-c", code])
    with PeakMemory(child.pid) as memory:
        child.wait()
    assert 200e6 < memory.peak_bytes < 400e6
    with PeakMemory(os.getpid()) as own:
        pass
    assert own.peak_bytes > 0


def test_every_side_has_a_default_and_every_peer_a_best():
    for side in SIDES.values():
        for objective, variants in side.variants.items():
            names = [variant.name for variant in variants]
            assert len(set(names)) == len(names)
            if variants and side.name != OURS:
                assert names[:2] == ["default", "best"], (side.name, objective)


def test_an_unknown_variant_is_refused():
    job = Job("trl", "fastest", "sft", "tiny", "", "", "", 4)
    with pytest.raises(ValueError, match="trl has no variant 'fastest'"):
        variant_of(job)


def test_a_round_has_every_variant_once_and_candidates_only_when_asked():
    plain = list(entries(options_of([])))
    assert [entry[2:] for entry in plain if entry[:2] == ("small", "dpo")] == [
        ("tunedock", "default"),
        ("llamafactory", "default"),
        ("llamafactory", "best"),
        ("trl", "default"),
        ("trl", "best"),
    ]
    assert len(set(plain)) == len(plain)
    searched = list(entries(options_of(["--search"])))
    assert set(plain) < set(searched)
    assert {entry[0] for entry in entries(options_of(["--quick"]))} == {"tiny"}


def test_a_name_nobody_knows_is_refused(capsys):
    with pytest.raises(SystemExit):
        options_of(["--sides", "tunedock,nobody"])
    assert "'nobody' is none of tunedock, llamafactory, trl, trainer" in capsys.readouterr().err
