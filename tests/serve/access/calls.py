"""A worker process of tests: enters as often as it can for a while, and prints what came of it as JSON.

    python calls.py STORE POLICY SPEED SECONDS HOLD_S TOKENS [hang]

The clock runs SPEED times as fast as the machine's. With `hang`, it enters, says so, and never leaves.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from tunedock.access.policy import Policy
from tunedock.serve.access import Access, AccessSettings, Refused, Subject


async def calls(access: Access, subject: Subject, seconds: float, hold_s: float, tokens: int) -> dict[str, object]:
    entered: list[float] = []
    inside: list[tuple[float, float]] = []
    refusals: dict[str, int] = {}
    until = time.time() + seconds

    async def one() -> None:
        while time.time() < until:
            try:
                async with access.admitted(subject, "m", tokens) as ticket:
                    began = time.monotonic()
                    await asyncio.sleep(hold_s)
                    inside.append((began, time.monotonic()))
                    entered.append(ticket.at)
                    ticket.used(tokens, 0)
            except Refused as answer:
                refusals[answer.code] = refusals.get(answer.code, 0) + 1
                await asyncio.sleep(0.003)

    await asyncio.gather(*(one() for _ in range(6)))
    return {"entered": entered, "inside": inside, "refusals": refusals}


async def hang(access: Access, subject: Subject) -> None:
    async with access.admitted(subject, "m", 0):
        print("in", flush=True)
        await asyncio.sleep(600)


def main() -> None:
    store, policy, speed, seconds, hold_s, tokens = sys.argv[1:7]
    zero = 1_796_256_000.0
    fast = float(speed)
    access = Access.open(
        AccessSettings(store=store, lease_s=1),
        clock=lambda: zero + time.time() % 86_400 * fast if fast != 1 else time.time(),
    )
    subject = Subject("alice", Policy(**json.loads(policy)), "key")
    try:
        if "hang" in sys.argv:
            asyncio.run(hang(access, subject))
        else:
            print(json.dumps(asyncio.run(calls(access, subject, float(seconds), float(hold_s), int(tokens)))))
    finally:
        access.close()


if __name__ == "__main__":
    main()
