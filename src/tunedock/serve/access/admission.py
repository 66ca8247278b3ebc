"""Whether a request is admitted now: the arithmetic of limits, inside a transaction of the store.

A minute is counted in seconds, a row each: requests and tokens of this second and the 60 before it. So whatever 60 seconds one
looks at, no more than the limit went through (a limit by calendar minutes lets twice as many through around the full minute), and
at most 61 rows of a subject exist. Rows that are past are deleted as they are met.

Tokens are charged by an estimate when a request enters, and settled when it leaves: what was charged too much is given back to the
second it was charged to, what was charged too little is charged to the second it is known. A day's tokens are those of the requests
that entered on it (UTC).

A slot, which counts requests answered at once, belongs to a worker and counts while the worker is believed to be alive.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, NamedTuple

from sqlalchemy import BindParameter, Connection, Insert, Update, bindparam, delete, func, insert, select, update

from tunedock.access.policy import Policy
from tunedock.access.tables import days, slots, usage, workers

MINUTE_S = 60
SLOT_RETRY_S = 1.0
"""When to try again where requests at once are too many: nobody knows when one ends."""

Limit = Literal["requests_per_minute", "tokens_per_minute", "concurrent", "tokens_per_day"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A request that asks to enter."""

    ticket: str
    worker: str
    subject: str
    policy: Policy
    tokens: int
    """What it may use at most, or is thought to."""


@dataclass(frozen=True, slots=True)
class Grant:
    """A request that is in."""

    entry: Entry
    at: float
    """When it entered, by the clock the limits go by."""
    window: Window


@dataclass(frozen=True, slots=True)
class Refusal:
    limit: Limit
    message: str
    retry_s: float | None
    """None: waiting does not help."""
    window: Window


# The statements are made once: SQLAlchemy takes four times as long to make one as SQLite to do it.
_SUBJECT: BindParameter[str] = bindparam("of")
_SECONDS = (
    select(usage.c.second, usage.c.requests, usage.c.tokens).where(usage.c.subject == _SUBJECT).order_by(usage.c.second)
)
_FORGET = delete(usage).where(
    usage.c.subject == _SUBJECT, ~usage.c.second.between(bindparam("first"), bindparam("last"))
)
_DAY = select(days.c.tokens).where(days.c.subject == _SUBJECT, days.c.day == bindparam("on"))
_AT_ONCE = (
    select(func.count())
    .select_from(slots.join(workers, slots.c.worker == workers.c.id))
    .where(slots.c.subject == _SUBJECT, workers.c.alive_until > bindparam("now"))
)
_TAKE_SLOT, _GIVE_SLOT = insert(slots), delete(slots).where(slots.c.id == bindparam("ticket"))
_HAS_SLOT = select(slots.c.id).where(slots.c.id == bindparam("ticket"))
_ADD_TO_SECOND = (
    update(usage)
    .where(usage.c.subject == _SUBJECT, usage.c.second == bindparam("at"))
    .values(requests=usage.c.requests + bindparam("r"), tokens=usage.c.tokens + bindparam("t"))
)
_ADD_TO_DAY = (
    update(days)
    .where(days.c.subject == _SUBJECT, days.c.day == bindparam("at"))
    .values(requests=days.c.requests + bindparam("r"), tokens=days.c.tokens + bindparam("t"))
)
_NEW_SECOND = insert(usage).values(
    subject=_SUBJECT, second=bindparam("at"), requests=bindparam("r"), tokens=bindparam("t")
)
_NEW_DAY = insert(days).values(subject=_SUBJECT, day=bindparam("at"), requests=bindparam("r"), tokens=bindparam("t"))


class Gauge(NamedTuple):
    limit: int
    used: int
    reset_s: float
    """Until nothing of it is used any more, if nothing comes."""


class Window(NamedTuple):
    """What a minute's limits are at, where there are any."""

    requests: Gauge | None
    tokens: Gauge | None


class Second(NamedTuple):
    second: int
    requests: int
    tokens: int


def admit(connection: Connection, entry: Entry, now: float, *, again: bool = False) -> Grant | Refusal:
    """Lets a request in and charges it, or says which limit it met and charges nothing.

    `again`: it was tried before, and the answer to its commit may have been lost; its slot tells.
    """
    seconds = _minute(connection, entry, now)
    if again and connection.execute(_HAS_SLOT, {"ticket": entry.ticket}).first():
        return Grant(entry, now, _window(entry.policy, seconds, now))
    day = 0 if entry.policy.tokens_per_day is None else _day(connection, entry.subject, now)
    refusal = _refusal(connection, entry, seconds, day, now)
    if refusal is not None:
        return refusal
    if _by_minute(entry):
        _add_to_second(connection, entry.subject, int(now), 1, entry.tokens)
    _add_to_day(connection, entry.subject, now, 1, entry.tokens)
    connection.execute(_TAKE_SLOT, {"id": entry.ticket, "subject": entry.subject, "worker": entry.worker})
    charged = [*seconds, Second(int(now), 1, entry.tokens)]
    return Grant(entry, now, _window(entry.policy, charged, now))


def settle(connection: Connection, grant: Grant, used: int, now: float, *, again: bool = False) -> None:
    """Gives the slot back, and puts what was used in the place of what was charged. `again`: as for `admit`."""
    entry = grant.entry
    if not connection.execute(_GIVE_SLOT, {"ticket": entry.ticket}).rowcount and again:
        return
    difference = used - entry.tokens
    if difference:
        # What is late is charged to now: the second it belongs to may be over, and would not count.
        if _by_minute(entry):
            _add_to_second(connection, entry.subject, int(grant.at if difference < 0 else now), 0, difference)
        _add_to_day(connection, entry.subject, grant.at, 0, difference)


def day_of(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d")


def _by_minute(entry: Entry) -> bool:
    """Whether anything is limited by the minute: else seconds are neither read nor written."""
    return entry.policy.requests_per_minute is not None or entry.policy.tokens_per_minute is not None


def _minute(connection: Connection, entry: Entry, now: float) -> list[Second]:
    """The seconds that count, in their order. Those of a future further than a minute are of a clock that was put back."""
    if not _by_minute(entry):
        return []
    subject = entry.subject
    rows = [Second(*row) for row in connection.execute(_SECONDS, {"of": subject})]
    live = [row for row in rows if abs(int(now) - row.second) <= MINUTE_S]
    if len(live) < len(rows):
        connection.execute(_FORGET, {"of": subject, "first": int(now) - MINUTE_S, "last": int(now) + MINUTE_S})
    return live


def _day(connection: Connection, subject: str, now: float) -> int:
    return int(connection.execute(_DAY, {"of": subject, "on": day_of(now)}).scalar() or 0)


def _refusal(connection: Connection, entry: Entry, seconds: Sequence[Second], day: int, now: float) -> Refusal | None:
    policy, tokens, window = entry.policy, entry.tokens, _window(entry.policy, seconds, now)
    if policy.tokens_per_day is not None and day + tokens > policy.tokens_per_day:
        left = max(0, policy.tokens_per_day - day)
        message = (
            f"{left} of {policy.tokens_per_day} tokens are left today, and this request may take {tokens}. "
            "The budget is whole again at 00:00 UTC."
        )
        return Refusal("tokens_per_day", message, None, window)
    if policy.tokens_per_minute is not None and tokens > policy.tokens_per_minute:
        message = f"This request may take {tokens} tokens, and {policy.tokens_per_minute} are allowed in a minute."
        return Refusal("tokens_per_minute", f"{message} Ask for fewer by `max_tokens`.", None, window)
    minute: tuple[tuple[Limit, int | None, int, list[int]], ...] = (
        ("requests_per_minute", policy.requests_per_minute, 1, [row.requests for row in seconds]),
        ("tokens_per_minute", policy.tokens_per_minute, tokens, [row.tokens for row in seconds]),
    )
    for name, limit, asked, counts in minute:
        if limit is not None and sum(counts) + asked > limit:
            wait_s = _until_free(seconds, counts, sum(counts) + asked - limit, now)
            what = name.removesuffix("_per_minute")
            message = f"The limit of {what} in a minute is {limit}. Try again in {math.ceil(wait_s)}s."
            return Refusal(name, message, wait_s, window)
    if policy.concurrent is not None and _at_once(connection, entry.subject, now) >= policy.concurrent:
        message = f"The limit of requests at once is {policy.concurrent}. Try again when one is answered."
        return Refusal("concurrent", message, SLOT_RETRY_S, window)
    return None


def _until_free(seconds: Sequence[Second], counts: Sequence[int], wanted: int, now: float) -> float:
    """Seconds until as much as is wanted has left the minute."""
    for row, count in zip(seconds, counts, strict=True):
        wanted -= count
        if wanted <= 0:
            return row.second + MINUTE_S + 1 - now
    return MINUTE_S + 1.0


def _window(policy: Policy, seconds: Sequence[Second], now: float) -> Window:
    def gauge(limit: int | None, counts: Sequence[int]) -> Gauge | None:
        if limit is None:
            return None
        last = max((row.second for row, count in zip(seconds, counts, strict=True) if count), default=None)
        return Gauge(limit, sum(counts), 0.0 if last is None else last + MINUTE_S + 1 - now)

    return Window(
        gauge(policy.requests_per_minute, [row.requests for row in seconds]),
        gauge(policy.tokens_per_minute, [row.tokens for row in seconds]),
    )


def _at_once(connection: Connection, subject: str, now: float) -> int:
    return int(connection.execute(_AT_ONCE, {"of": subject, "now": now}).scalar_one())


def _add_to_second(connection: Connection, subject: str, second: int, requests: int, tokens: int) -> None:
    _add(connection, _ADD_TO_SECOND, _NEW_SECOND, {"of": subject, "at": second, "r": requests, "t": tokens})


def _add_to_day(connection: Connection, subject: str, at: float, requests: int, tokens: int) -> None:
    _add(connection, _ADD_TO_DAY, _NEW_DAY, {"of": subject, "at": day_of(at), "r": requests, "t": tokens})


def _add(connection: Connection, add: Update, new: Insert, values: Mapping[str, str | int]) -> None:
    """Adds to a row, or makes it. Nobody comes between: transactions on a subject take turns."""
    there = connection.execute(add, values).rowcount
    if not there and int(values["t"]) >= 0:  # what is given back to a second that is over is nobody's
        connection.execute(new, values)
