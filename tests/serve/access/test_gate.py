"""A caller's way in: keys, models, limits, and what each refusal tells a client."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from access_bed import administration, issued, opened, refused, run, who
from tunedock.access import api_key
from tunedock.access.acts import list_keys
from tunedock.access.policy import Policy, PolicyRow
from tunedock.access.store import Store
from tunedock.errors import RecipeError
from tunedock.serve.access import Access, AccessSettings, Refused, Subject, check_loopback, lookup


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "access.db"


@pytest.fixture
def asked_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that the store said is believed for a second."""
    monkeypatch.setattr(lookup, "FRESH_S", 0.0)


def settings(place: Path, **more: Any) -> AccessSettings:
    return AccessSettings(store=str(place), **more)


def refusal(work: Coroutine[Any, Any, Any]) -> Refused:
    with pytest.raises(Refused) as found:
        run(work)
    return found.value


async def once(
    access: Access, subject: Subject, tokens: int = 0, used: int | None = None, model: str = "m"
) -> dict[str, str]:
    async with access.admitted(subject, model, tokens) as ticket:
        if used is not None:
            ticket.used(used, 0)
    return ticket.headers


def test_a_key_enters(place: Path) -> None:
    key = issued(place)
    with opened(settings(place)) as access:
        subject = who(access, key)
        assert (subject.name, subject.by, subject.policy) == ("alice", "key", Policy())
        assert subject.credential == key[:15] and key.startswith(subject.credential or "-")
        assert run(access.subject([f"bearer   {key}"])).name == "alice"


def test_what_is_not_quite_the_key_does_not_enter(place: Path) -> None:
    key = issued(place)
    other = issued(place, "bob")
    wrong = [key[:-1], key + "a", key.upper(), key[:-1] + ("a" if key[-1] != "a" else "b"), key[:16] + other[16:], "td-", "td--",
             f"td-{'0' * 12}-{'a' * 43}", key.replace("td-", "TD-"), key[3:], f"td-' OR 1=1 --{key[16:]}"]  # fmt: skip
    with opened(settings(place)) as access:
        for text in wrong:
            answer = refused(access, f"Bearer {text}")
            assert (answer.status, answer.code) == (401, "invalid_api_key"), text
            assert answer.headers == {"WWW-Authenticate": "Bearer"}


@given(st.text(alphabet="td-abcAZ09_*%'\"", max_size=80))
def test_no_text_is_a_key(text: str) -> None:
    assert api_key.parse(f"td-{text}") is None or len(text) == 56


def test_a_key_expires(place: Path) -> None:
    key = issued(place, valid_s=100)
    now = [time.time()]
    with opened(settings(place), clock=lambda: now[0]) as access:
        assert who(access, key).name == "alice"
        now[0] += 101
        assert "expired" in refused(access, f"Bearer {key}").message


def test_a_key_is_revoked_while_the_gateway_runs(place: Path) -> None:
    key = issued(place)
    with opened(settings(place)) as access:
        assert who(access, key).name == "alice"
        with administration(place) as admin:
            admin.revoke(key[3:15])
        time.sleep(1.05)
        assert "revoked" in refused(access, f"Bearer {key}").message


@pytest.mark.usefixtures("asked_each_time")
def test_a_policy_changes_while_the_gateway_runs(place: Path) -> None:
    key = issued(place)
    with opened(settings(place, default=Policy(concurrent=7))) as access:
        assert who(access, key).policy == Policy(concurrent=7)
        with administration(place) as admin:
            admin.change_policy("*", lambda _: PolicyRow(models=("a*",), requests_per_minute=9))
            admin.change_policy("alice", lambda _: PolicyRow(requests_per_minute=-1))
        assert who(access, key).policy == Policy(models=("a*",), concurrent=7)


def test_when_a_key_was_used_is_kept_to_the_minute(place: Path) -> None:
    key = issued(place)
    now = [1_000_000.0]
    with opened(settings(place), clock=lambda: now[0]) as access:
        for later in (0, 30, 59):
            now[0] = 1_000_000.0 + later
            who(access, key)
        access.close()
        with closing(Store.open(str(place))) as store:
            assert [row.last_used for row in list_keys(store)] == [1_000_000.0]


@pytest.mark.parametrize(
    ("patterns", "allowed", "others"),
    [
        (("*",), ["base", "base:adapter", "a/b"], []),
        (("support-*", "base"), ["support-1", "base"], ["base2", "Support-1", "xsupport-1", "support"]),
        (("v[12]",), ["v1", "v2"], ["v3", "v[12]"]),
        ((), [], ["base", ""]),
    ],
)
def test_models_are_allowed_by_pattern(
    place: Path, patterns: tuple[str, ...], allowed: list[str], others: list[str]
) -> None:
    with opened(settings(place)) as access:
        subject = Subject("alice", Policy(models=patterns), "key")
        assert access.allowed(subject, allowed + others) == allowed
        for model in allowed:
            access.require_model(subject, model)
        for model in [*others, "m" * 257]:
            with pytest.raises(Refused) as found:
                access.require_model(subject, model)
            assert (found.value.status, found.value.code, found.value.param) == (403, "model_not_allowed", "model")
            with pytest.raises(Refused):
                access.admitted(subject, model, 1)


def test_a_minute_that_is_full_says_when_to_come_again(place: Path) -> None:
    now = [1_796_256_000.0]
    with opened(settings(place), clock=lambda: now[0]) as access:
        alice = Subject("alice", Policy(requests_per_minute=2, tokens_per_minute=100), "key")
        first = run(once(access, alice, 40, 30))
        assert first["x-ratelimit-limit-requests"], first["x-ratelimit-remaining-requests"] == ("2", "1")
        now[0] += 10
        assert run(once(access, alice, 20, 20))["x-ratelimit-remaining-tokens"] == "50"
        now[0] += 0.5
        answer = refusal(once(access, alice, 1))
        assert (answer.status, answer.type, answer.code) == (429, "requests", "rate_limit_exceeded")
        assert answer.headers == {
            "x-ratelimit-limit-requests": "2", "x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "61s",
            "x-ratelimit-limit-tokens": "100", "x-ratelimit-remaining-tokens": "50", "x-ratelimit-reset-tokens": "61s",
            "Retry-After": "51",
        }  # fmt: skip
        now[0] += 51
        assert run(once(access, alice))["x-ratelimit-remaining-requests"] == "0"


def test_tokens_of_a_minute_and_a_day(place: Path) -> None:
    with opened(settings(place)) as access:
        alice = Subject("alice", Policy(tokens_per_minute=100, tokens_per_day=150), "key")
        run(once(access, alice, 100))  # nothing is said of what was used: the estimate stays
        answer = refusal(once(access, alice, 10))
        assert (answer.type, answer.code) == ("tokens", "rate_limit_exceeded") and 50 < int(
            answer.headers["Retry-After"]
        ) <= 61
        answer = refusal(once(access, alice, 60))
        assert (answer.status, answer.type, answer.code) == (429, "insufficient_quota", "insufficient_quota")
        assert answer.headers["x-should-retry"] == "false" and "Retry-After" not in answer.headers
        assert "50 of 150 tokens are left today" in answer.message


def test_requests_at_once(place: Path) -> None:
    async def main(access: Access) -> None:
        alice = Subject("alice", Policy(concurrent=2), "key")
        async with AsyncExitStack() as stack:
            for _ in range(2):
                await stack.enter_async_context(access.admitted(alice, "m", 0))
            with pytest.raises(Refused) as found:
                await once(access, alice)
            assert (found.value.code, found.value.headers) == ("rate_limit_exceeded", {"Retry-After": "1"})
            await once(access, Subject("bob", alice.policy, "key"))
        for _ in range(20):  # one after the other: never refused
            await once(access, alice)

    with opened(settings(place)) as access:
        run(main(access))


def test_a_request_that_fails_or_is_cancelled_gives_its_slot_back(place: Path) -> None:
    alice = Subject("alice", Policy(concurrent=1), "key")

    async def hang(access: Access, inside: asyncio.Event) -> None:
        async with access.admitted(alice, "m", 0):
            inside.set()
            await asyncio.sleep(60)

    async def main(access: Access) -> None:
        with pytest.raises(ZeroDivisionError):
            async with access.admitted(alice, "m", 0):
                raise ZeroDivisionError
        inside = asyncio.Event()
        task = asyncio.create_task(hang(access, inside))
        await inside.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await once(access, alice)

    with opened(settings(place)) as access:
        run(main(access))


def test_whoever_goes_away_while_waiting_leaves_no_slot(place: Path) -> None:
    """Cancelled at any moment of entering, a request holds nothing afterwards."""
    alice = Subject("alice", Policy(concurrent=1), "key")

    async def main(access: Access) -> None:
        for moment in range(60):
            task = asyncio.create_task(once(access, alice))
            await asyncio.sleep(moment * 0.00005)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            for _ in range(100):
                try:
                    await once(access, alice)
                    break
                except Refused:
                    await asyncio.sleep(0.005)
            else:
                pytest.fail(f"a slot is lost, cancelled after {moment * 0.05} ms")

    with opened(settings(place)) as access:
        run(main(access))


class Locked:
    """Another program that holds the write lock of the store."""

    def __init__(self, place: Path) -> None:
        self._connection = sqlite3.connect(place, isolation_level=None, check_same_thread=False)
        self._connection.execute("BEGIN IMMEDIATE")

    def release(self) -> None:
        self._connection.execute("ROLLBACK")
        self._connection.close()


def test_a_locked_store_lets_nobody_in_and_says_so(place: Path) -> None:
    key = issued(place)
    with opened(settings(place, wait_s=0.3)) as access:
        alice = who(access, key)
        lock = Locked(place)
        began = time.monotonic()
        answer = refusal(once(access, alice))
        assert 0.2 < time.monotonic() - began < 1
        assert (answer.status, answer.type, answer.code) == (503, "server_error", "access_store_unavailable")
        assert answer.headers == {"Retry-After": "1"}
        assert "nobody is let in" in answer.body()["error"]["message"]
        lock.release()
        run(once(access, alice))


def test_a_short_lock_is_waited_for(place: Path) -> None:
    with opened(settings(place)) as access:
        lock = Locked(place)
        threading.Timer(0.3, lock.release).start()
        run(once(access, Subject("alice", Policy(), "key")))


def test_a_grant_that_comes_too_late_is_given_back(place: Path) -> None:
    alice = Subject("alice", Policy(concurrent=1), "key")
    with opened(settings(place, wait_s=0.3)) as access:
        lock = Locked(place)
        threading.Timer(0.29, lock.release).start()
        for _ in range(4):
            try:
                run(once(access, alice))
            except Refused as answer:
                assert answer.status in (503, 429)  # one that was let in just then still counts for a moment
        time.sleep(0.2)
        run(once(access, alice))


def test_what_was_used_while_the_store_was_locked_is_not_forgotten(place: Path) -> None:
    alice = Subject("alice", Policy(concurrent=1, tokens_per_day=100), "key")

    async def main(access: Access) -> None:
        admitted = access.admitted(alice, "m", 10)
        ticket = await admitted.__aenter__()
        lock = Locked(place)
        ticket.used(60, 40)
        await admitted.__aexit__(None, None, None)  # the answer is out; nothing fails by this
        lock.release()
        for _ in range(100):
            with pytest.raises(Refused) as found:
                await once(access, alice, 1)
            if found.value.code == "insufficient_quota":
                return
            await asyncio.sleep(0.02)
        pytest.fail(f"{found.value.code}: {found.value}")

    with opened(settings(place, wait_s=0.2)) as access:
        run(main(access))


@pytest.mark.usefixtures("asked_each_time")
def test_a_store_that_is_gone_lets_nobody_in(place: Path) -> None:
    key = issued(place)
    aside = place.with_suffix(".aside")
    with opened(settings(place, wait_s=0.2)) as access:
        alice = who(access, key)
        place.rename(aside)
        assert refusal(once(access, alice)).status == 503
        assert refused(access, f"Bearer {key}").status == 503
        assert not place.exists()  # an empty one would know of no revocation
        aside.rename(place)
        assert who(access, key).name == "alice"
        run(once(access, alice))


def test_counts_outlive_a_restart(place: Path) -> None:
    alice = Subject("alice", Policy(requests_per_minute=3, tokens_per_day=100), "key")
    for tokens in (10, 20, 30):
        with opened(settings(place)) as access:
            run(once(access, alice, tokens))
    with opened(settings(place)) as access:
        assert refusal(once(access, alice, 1)).type == "requests"
        assert "40 of 100" in refusal(once(access, alice, 41)).message


def test_a_process_that_ends_gives_its_slots_back(place: Path) -> None:
    alice = Subject("alice", Policy(concurrent=1), "key")
    with opened(settings(place)) as first:
        run(first.admitted(alice, "m", 0).__aenter__())
        with opened(settings(place)) as second:
            assert refusal(once(second, alice)).code == "rate_limit_exceeded"
            first.close()
            run(once(second, alice))


def test_many_at_once_never_exceed(place: Path) -> None:
    """Two hundred requests in one process, at most five inside."""
    alice = Subject("alice", Policy(concurrent=5, requests_per_minute=60), "key")
    inside = most = let_in = 0

    async def one(access: Access) -> None:
        nonlocal inside, most, let_in
        try:
            async with access.admitted(alice, "m", 1):
                inside += 1
                let_in += 1
                most = max(most, inside)
                await asyncio.sleep(0.001)
                inside -= 1
        except Refused as answer:
            assert answer.code == "rate_limit_exceeded"

    async def main(access: Access) -> None:
        for _ in range(10):
            await asyncio.gather(*(one(access) for _ in range(20)))

    with opened(settings(place)) as access:
        run(main(access))
    assert most == 5 and 5 <= let_in <= 60


def test_openai_understands_the_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client: what it raises, whether it tries again, and how long it waits before."""
    from tunedock.serve.access.admission import Refusal, Window
    from tunedock.serve.access.refusal import limited, model_not_allowed, store_unavailable, unauthorized

    nothing = Window(None, None)
    table: list[tuple[Refused, type[Exception], int]] = [
        (unauthorized("No"), openai.AuthenticationError, 1),
        (model_not_allowed("m"), openai.PermissionDeniedError, 1),
        (limited(Refusal("tokens_per_day", "spent", None, nothing), nothing), openai.RateLimitError, 1),
        (limited(Refusal("tokens_per_minute", "too large", None, nothing), nothing), openai.RateLimitError, 1),
        (limited(Refusal("requests_per_minute", "wait", 0.2, nothing), nothing), openai.RateLimitError, 2),
        (store_unavailable(), openai.InternalServerError, 2),
    ]
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for answer, kind, calls in table:
        asked: list[httpx.Request] = []

        def respond(
            request: httpx.Request, answer: Refused = answer, asked: list[httpx.Request] = asked
        ) -> httpx.Response:
            asked.append(request)
            return httpx.Response(answer.status, json=answer.body(), headers=answer.headers)

        client = _client(respond)
        with pytest.raises(kind) as found:
            client.models.list()
        assert len(asked) == calls, answer
        assert getattr(found.value, "code", None) == answer.code
    assert waited == [1.0, 1.0]


def _client(respond: Callable[[httpx.Request], httpx.Response]) -> openai.OpenAI:
    return openai.OpenAI(
        api_key="k",
        base_url="http://127.0.0.1:1/v1",
        max_retries=1,
        http_client=httpx.Client(transport=httpx.MockTransport(respond)),
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "::ffff:127.0.0.1", "localhost"])
def test_access_may_be_off_at_loopback(host: str) -> None:
    check_loopback(host)
    with opened(AccessSettings(off=True, bind=host)) as access:
        subject = run(access.subject(None))
        assert (subject.name, subject.by) == ("anonymous", "nothing")
        assert run(once(access, subject, 10)) == {}


@pytest.mark.parametrize(
    "host",
    ["", "0.0.0.0", "::", "[::]", "192.0.2.1", "10.0.0.1", "fe80::1", "::ffff:0.0.0.0", "::ffff:192.0.2.1",
     "127.0.0.1.example.invalid", "0", "*", "127.0.0.1 ", "\x00", "a" * 300],
)  # fmt: skip
def test_access_is_never_off_where_others_reach_it(host: str) -> None:
    with pytest.raises(RecipeError, match="anyone could call"):
        check_loopback(host)
    with pytest.raises(RecipeError):
        AccessSettings(off=True, bind=host)


def test_access_is_on_unless_it_is_said_otherwise(place: Path) -> None:
    with opened(settings(place)) as access:
        assert refused(access, None).status == 401


def test_a_request_that_nobody_waits_for_any_more_is_not_charged(place: Path) -> None:
    alice = Subject("alice", Policy(requests_per_minute=1), "key")

    async def main(access: Access) -> None:
        lock = Locked(place)
        answers = await asyncio.gather(*(once(access, alice) for _ in range(5)), return_exceptions=True)
        assert [isinstance(answer, Refused) and answer.status for answer in answers] == [503] * 5
        lock.release()
        await asyncio.sleep(0.5)
        await once(access, alice)

    with opened(settings(place, wait_s=0.3)) as access:
        run(main(access))


def test_access_needs_no_heavy_package() -> None:
    """It stands in gateways whose engines are other programs."""
    code = "import sys, tunedock.serve.access; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not {"torch", "transformers", "numpy", "fastapi", "datasets"} & set(done.stdout.split())
