"""Nodes meet before each start: node 0 waits for all, tells them the same, and each learns when another is gone or has to stop."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tunedock.errors import InterruptedRun, LostPeerError, RecipeError, TunedockError
from tunedock.launch import meeting as meetings
from tunedock.launch.meeting import Hello, Line, Meeting, Start, ask_for_run, free_port, host_meeting, join_meeting

START = Start("one", 0, "/runs/r1", {"hash": "h"}, {"name": "r1"}, {"resume": False})


def hello(node: int, **changes: Any) -> Hello:
    return Hello(
        **{"node": node, "host": f"node-{node}", "processes": 2, "recipe_hash": "h", "version": "1", **changes}
    )


def started(port: int) -> Start:
    return Start(**{**{name: getattr(START, name) for name in START.__slots__}, "port": port})


class Aside:
    """A call in a thread: its value, or its error."""

    def __init__(self, call: Any, *arguments: Any, **keys: Any) -> None:
        self.value: Any = None
        self.error: TunedockError | None = None

        def run() -> None:
            try:
                self.value = call(*arguments, **keys)
            except TunedockError as error:
                self.error = error

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def end(self) -> Any:
        self._thread.join(20)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error
        return self.value


@pytest.fixture
def address() -> str:
    return f"127.0.0.1:{free_port('127.0.0.1')}"


@pytest.fixture
def met(address: str) -> Iterator[list[Meeting]]:
    calls = [Aside(join_meeting, address, hello(node), timeout_s=10) for node in (2, 1)]
    first = host_meeting(address, hello(0), 3, started, timeout_s=10)
    found = [first, *sorted((call.end() for call in calls), key=lambda one: one.lines[0]._socket.getsockname())]
    for each in found:
        each.listen()
    yield found
    for each in found:
        each.close(None)


def eventually(found: Any) -> Any:
    deadline = time.monotonic() + 10
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


def test_all_are_told_the_same_start_whoever_comes_first(met: list[Meeting]) -> None:
    assert met[0].start == met[1].start == met[2].start
    assert met[0].start.hosts == ["node-0", "node-1", "node-2"] and met[0].start.port > 0
    assert sorted(met[0].lines) == [1, 2] and met[0].host_of(2) == "node-2"


def test_a_machine_that_is_gone_is_known_and_one_that_ended_is_not_taken_for_gone(met: list[Meeting]) -> None:
    met[1].close({"kind": "DataError", "message": "a row is none"})
    assert eventually(lambda: met[0].ended)
    (error,) = met[0].ended.values()
    assert error is not None and error["message"] == "a row is none" and met[0].lost is None
    met[2].lines[0].close()  # as a machine that is switched off, its kernel last
    assert eventually(lambda: met[0].lost is not None)
    assert met[0].lost not in met[0].ended


def test_a_request_to_stop_is_passed_on_to_all(met: list[Meeting]) -> None:
    met[1].tell({"signal": 2})
    assert eventually(lambda: met[0].asked == 2 and met[2].asked == 2)
    assert met[1].asked is None, "who says it knows it"


def test_who_asks_learns_which_run_it_is_and_does_not_count(address: str) -> None:
    host = Aside(host_meeting, address, hello(0), 2, started, timeout_s=10)
    assert ask_for_run(address, timeout_s=10).run == "/runs/r1"
    joined = Aside(join_meeting, address, hello(1), timeout_s=10)
    assert host.end().start.run == joined.end().start.run == "/runs/r1"


def test_a_node_that_does_not_come_is_named(address: str) -> None:
    with pytest.raises(LostPeerError, match=f"nodes 1, 2 did not come to {address} within 0.3 s"):
        host_meeting(address, hello(0), 3, started, timeout_s=0.3)


def test_a_node_0_that_does_not_answer_is_told(address: str) -> None:
    waited: list[str] = []
    with pytest.raises(LostPeerError, match="started nothing"):
        join_meeting(address, hello(1), timeout_s=0.3, on_wait=waited.append)
    assert set(waited) == {f"waiting for node 0 at {address}"}


def test_a_name_that_does_not_resolve_yet_is_asked_again(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    calls = 0
    connect = socket.create_connection

    def late(*arguments: Any, **keys: Any) -> socket.socket:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise socket.gaierror(-2, "Name or service not known")
        return connect(*arguments, **keys)

    monkeypatch.setattr(socket, "create_connection", late)
    host = Aside(host_meeting, address, hello(0), 2, started, timeout_s=10)
    assert join_meeting(address, hello(1), timeout_s=10).start == host.end().start


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"recipe_hash": "x"}, "its recipe is another one"),
        ({"processes": 4}, "would start 4 processes, and node 0 2"),
        ({"version": "2"}, "it has tunedock 2, and node 0 has 1"),
        ({"node": 2}, "none of the 2 nodes"),
    ],
)
def test_a_node_that_would_train_something_else_is_refused_on_both_sides(
    address: str, changes: dict[str, Any], why: str
) -> None:
    other = Aside(join_meeting, address, hello(changes.pop("node", 1), **changes), timeout_s=10)
    with pytest.raises(RecipeError, match=why):
        host_meeting(address, hello(0), 2, started, timeout_s=10)
    with pytest.raises(RecipeError, match=f"node 0 refuses this node: .*{why}"):
        other.end()


def test_a_stranger_holds_nobody_up(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meetings, "ANSWER_S", 0.2)
    host = Aside(host_meeting, address, hello(0), 2, started, timeout_s=10)
    place = meetings.address_of(address)

    def call() -> socket.socket:
        while True:
            try:
                return socket.create_connection(place, timeout=5)
            except OSError:
                time.sleep(0.05)

    with call() as silent, call() as loud, call() as odd:
        loud.sendall(b"GET / HTTP/1.1\r\n\r\n")
        odd.sendall(b'{"joins": {"node": 1}}\n')
        joined = join_meeting(address, hello(1), timeout_s=10)
        assert host.end().start == joined.start
        assert silent.recv(1) == b""


def test_a_message_has_an_end() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        threading.Thread(target=lambda: _pour(theirs), daemon=True).start()
        assert Line(ours).receive(10) is None


def _pour(into: socket.socket) -> None:
    try:
        for _ in range(200):
            into.sendall(b"x" * (1 << 16))
    except OSError:
        pass


def test_an_address_of_another_machine_is_told_with_the_way_out() -> None:
    with pytest.raises(RecipeError, match=r"cannot listen at `192\.0\.2\.1:29500`") as caught:
        host_meeting("192.0.2.1:29500", hello(0), 2, started, timeout_s=1)
    assert "launch.node_rank" in str(caught.value.hint)


def test_waiting_can_be_given_up(address: str) -> None:
    def stop(message: str) -> None:
        raise InterruptedRun("stopped")

    with pytest.raises(InterruptedRun):
        host_meeting(address, hello(0), 2, started, timeout_s=10, on_wait=stop)
    with pytest.raises(InterruptedRun):
        join_meeting(address, hello(1), timeout_s=10, on_wait=stop)
