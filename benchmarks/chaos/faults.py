"""The faults, by the name that `--only` takes, in the order of the table."""

from __future__ import annotations

import signal
from functools import partial

from benchmarks.chaos import clock, memory, processes, rows, storage
from benchmarks.chaos.injection import Fault

FAULTS = {
    "kill": Fault("SIGKILL", processes.killed),
    "term": Fault("SIGTERM", partial(processes.stopped, number=signal.SIGTERM, code=143)),
    "int": Fault("SIGINT", partial(processes.stopped, number=signal.SIGINT, code=130)),
    "full-checkpoint": Fault("disk full: checkpoint", storage.full_disk_checkpoint),
    "full-events": Fault("disk full: events", storage.full_disk_events),
    "cut": Fault("checkpoint cut off", partial(storage.damaged_checkpoint, harm=storage.cut)),
    "bit": Fault("checkpoint with a flipped bit", partial(storage.damaged_checkpoint, harm=storage.flip_a_bit)),
    "no-index": Fault("index.json lost", partial(storage.damaged_index, harm=storage.lose_the_index)),
    "bad-index": Fault("index.json garbled", partial(storage.damaged_index, harm=storage.garble_the_index)),
    "oom-kill": Fault("out of memory: killed by the kernel", memory.killed_by_the_kernel),
    "oom-again": Fault("out of memory: killed, started again with half the token budget", memory.supervised),
    "oom-step": Fault("out of memory: an allocation fails in a step", memory.failed_allocation),
    "data": Fault("data file changed", rows.changed_data),
    "skip": Fault("no numbers: skip", partial(rows.no_numbers, policy="skip")),
    "roll-back": Fault("no numbers: roll_back", partial(rows.no_numbers, policy="roll_back")),
    "clock": Fault("clock jumps by hours", clock.clock),
    "twice": Fault("started twice", processes.two_at_once),
    "hup": Fault("SIGHUP", processes.hang_up),
    "pipe": Fault("reader gone", processes.closed_pipe),
    "stall": Fault("reader stalls", processes.stalled_reader),
}
