"""What processes that train together (ranks) tell each other. Alone, every call here is a no-op.

Ranks agree on everything that decides what is computed: each has the whole step's samples and lays them out alike (`share`), and
what only one of them knows is told to all. What is told is numbers and JSON, never pickle. Tensors on the CPU go over gloo, those
on a GPU over NCCL: a group has both, so that to agree on something never waits for a device.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from tunedock.data.layout import Row, over_ranks
from tunedock.errors import TunedockError
from tunedock.run.pulse import Pulse
from tunedock.run.ranks import Rank

POLL_S = 0.2
"""How often a rank looks whether another one is done."""

AS_LONG_AS_IT_TAKES = timedelta(days=30)

_pulse = Pulse()
"""Hears when this rank waits for the others, so that who hangs is told from those that wait for it."""

_patient: dist.ProcessGroup | None = None
"""All ranks over gloo, with that time-out, for what may be waited for longer than a collective call: a large checkpoint is read or
written, data prepared. A rank that has died ends such a call at once, as any other."""


@contextmanager
def joined(*, timeout_s: float, pulse: Pulse | None = None) -> Iterator[Rank]:
    """Joins the other ranks for as long as it lasts, on this rank's device. `timeout_s`: how long one waits for another."""
    global _pulse, _patient
    _pulse = pulse or Pulse()
    own = Rank.of(os.environ)
    if own.world == 1:
        yield own
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(own.local)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        timeout=timedelta(seconds=timeout_s),
        device_id=torch.device("cuda", own.local) if cuda else None,
    )
    _patient = dist.new_group(backend="gloo", timeout=AS_LONG_AS_IT_TAKES)
    yield own
    _patient = None
    dist.destroy_process_group()  # not after an error: it may wait for others that are gone


def together() -> bool:
    """Whether there are other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if together() else 0


def size() -> int:
    return dist.get_world_size() if together() else 1


def size_here() -> int:
    """Ranks on this machine, which share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if together() else 1


# -- numbers: collective calls, which every rank makes in the same order -------------------------------------------------


def agree(flag: bool) -> bool:
    """Whether the flag is raised on any rank."""
    return not least(int(not flag))


def least(value: int) -> int:
    """The smallest of the ranks' values."""
    if not together():
        return value
    values = torch.tensor(value, dtype=torch.int64)
    with _pulse.waiting():
        dist.all_reduce(values, dist.ReduceOp.MIN)
    return int(values.item())


def add_up(tensor: Tensor) -> Tensor:
    """The sum over ranks, in place; the same to the last bit on each."""
    if together():
        with _pulse.waiting():
            dist.all_reduce(tensor)
    return tensor


def joined_up(tensor_NC: Tensor) -> Tensor:
    """The ranks' tensors [N, C] one behind the other, on all; N may differ between them."""
    if not together():
        return tensor_NC
    lengths = told_by_all(len(tensor_NC))
    filled = tensor_NC.new_zeros(max(lengths), *tensor_NC.shape[1:])
    filled[: len(tensor_NC)] = tensor_NC
    found = [torch.empty_like(filled) for _ in lengths]
    with _pulse.waiting():
        dist.all_gather(found, filled)
    return torch.cat([one[:n] for one, n in zip(found, lengths, strict=True)])


def told_by_all(value: Any) -> list[Any]:
    """Each rank's JSON value, in the order of ranks."""
    if not together():
        return [value]
    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros((), dtype=torch.int64) for _ in range(size())]
    with _pulse.waiting():
        dist.all_gather(lengths, torch.tensor(len(own)))
    longest = max(int(length) for length in lengths)
    filled = torch.zeros(longest, dtype=torch.uint8)
    filled[: len(own)] = own
    found = [torch.zeros_like(filled) for _ in lengths]
    with _pulse.waiting():
        dist.all_gather(found, filled)
    return [json.loads(bytes(one[: int(n)].tolist())) for one, n in zip(found, lengths, strict=True)]


def told_by_first(value: Any) -> Any:
    """The first rank's JSON value, on all, however long it takes it to come here; what the others give is not looked at."""
    if not together():
        return value
    content = json.dumps(value).encode() if rank() == 0 else b""
    length = torch.tensor(len(content))
    with _pulse.waiting():
        dist.broadcast(length, 0, _patient)
    tensor = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.zeros(0, dtype=torch.uint8)
    if rank():
        tensor = torch.zeros(int(length), dtype=torch.uint8)
    with _pulse.waiting():
        dist.broadcast(tensor, 0)
    return json.loads(bytes(tensor.tolist()))


def tensors_of_first(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The first rank's tensors on all, one after the other, on the CPU: no more than one is under way."""
    if not together():
        yield from tensors.items()
        return
    own = {name: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")] for name, tensor in tensors.items()}
    for name, (shape, dtype) in told_by_first(own).items():
        tensor = tensors[name].cpu().contiguous() if rank() == 0 else torch.empty(shape, dtype=getattr(torch, dtype))
        flat = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor.new_zeros(0, dtype=torch.uint8)
        with _pulse.waiting():
            dist.broadcast(flat, 0)
        yield name, tensor


def raise_together(error: TunedockError | None) -> None:
    """Raises the first of the ranks' errors on all of them, so that none goes its own way while the others wait for it."""
    for told in told_by_all(None if error is None else error.to_json()):
        if told is not None:
            raise TunedockError.from_json(told) from error


# -- work: who does what -------------------------------------------------------------------------------------------------


def share(rows: Sequence[Row]) -> Sequence[Row]:
    """This rank's rows of a step's, as many as every other rank has: some may ask for nothing."""
    return over_ranks(rows, size())[rank()] if together() else rows


def own_of(count: int) -> range:
    """Which of `count` things this rank does, so that each is done once."""
    return range(rank(), count, size())


def in_order(count: int, own: Sequence[int], made: Sequence[Any]) -> list[Any]:
    """JSON values of `count` things in their order, on all ranks; each gives what it has `made` of its `own`. A collective call."""
    whole: list[Any] = [None] * count
    for places, told in told_by_all([list(own), list(made)]):
        for place, value in zip(places, told, strict=True):
            whole[place] = value
    return whole


def wait_for_all() -> None:
    """Returns when every rank has come here; unlike in other collective calls it may take them as long as it takes."""
    if not together():
        return
    with _pulse.waiting(patient=True):
        dist.all_reduce(torch.zeros(()), group=_patient)


def after_the_first_here(work: Callable[[], Any], *, name: str, leads: bool) -> Any:
    """What `work` gives, done first where it `leads` (the first process of each machine), and elsewhere once it is done there.
    Returns when it is done everywhere.

    For work that leaves files the others then read, and may take longer than a collective call may be waited for: on one machine
    too, where another has the files already.
    """
    if not together():
        return work()
    store = dist.distributed_c10d._get_default_store()
    key = f"tunedock/{name}/{os.environ.get('GROUP_RANK', '0')}"
    if leads:
        value = work()
        store.set(key, "done")
    else:
        with _pulse.waiting(patient=True):
            while not store.check([key]):
                time.sleep(POLL_S)
        value = work()
    wait_for_all()
    return value
