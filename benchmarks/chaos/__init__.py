"""Faults put into real trainings, and what becomes of them: `python -m benchmarks.chaos`, or `make chaos`.

life.py      one worker process after another over the same run, each a fork of this process
project.py   the run: a LoRA on the demo's model, with dropout, validation and the best checkpoint kept
faults.py    the faults
__main__.py  runs them, prints the table, writes it beside the other results
"""
