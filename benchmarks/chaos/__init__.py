"""Faults put into real trainings, and what becomes of them: `python -m benchmarks.chaos`, or `make chaos`.

project.py       the run: a LoRA on the demo's model, with dropout, validation and the best checkpoint kept
life.py          one worker process after another over the same run, each a fork of this process
injection.py     what every fault is made of, and what is told of it
processes.py     killed, stopped, started twice; terminals and readers that go away
storage.py       full disks, damaged checkpoints
memory.py        out of memory; memory_group.py: a control group to run out of it
rows.py          data that changes, numbers that are none; poison.py: a model that gives such
clock.py         the wall clock is set
faults.py        all of them, by name
__main__.py      runs them, prints the table, writes it beside the other results
"""
