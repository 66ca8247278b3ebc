"""Machines of one training meet before each start: node 0 listens at `launch.rendezvous`, the others call it.

torchrun's own rendezvous would take what an earlier start left for its own, and number machines by the order they come in. Here
node 0 waits until every node has called, and tells them all the same: which run, which request, and a fresh port and name for
torchrun's store. The connections stay open until the training ends: one that breaks is a machine that is lost, and a request to
stop on one machine is passed on to all.

A message is one JSON object a line, of at most `MOST_BYTES`. Like torchrun's store the port trusts its network: who reaches it can
stop a training, and reads its recipe. It runs nothing that is sent.
"""

from __future__ import annotations

import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from tunedock.errors import LostPeerError, RecipeError

MOST_BYTES = 1 << 22

CALL_EVERY_S = 0.5
"""How often a node calls node 0 while that does not listen yet, or its name does not resolve yet."""

ANSWER_S = 10.0
"""How long one message may take to come: a caller that says nothing does not hold the others up."""

KEEPALIVE_S = 15
"""After how many silent seconds the kernel asks whether the other machine is still there; it gives up after three times more."""


@dataclass(frozen=True, slots=True)
class Hello:
    """What a node says of itself."""

    node: int
    host: str
    processes: int
    recipe_hash: str
    version: str


@dataclass(frozen=True, slots=True)
class Start:
    """What node 0 tells all."""

    name: str
    """Of this start, never used before."""
    port: int
    """Of torchrun's store on node 0."""
    run: str
    """Node 0's run directory, by its path there."""
    resolved: Mapping[str, Any]
    state: Mapping[str, Any]
    request: Mapping[str, Any]
    hosts: list[str] = field(default_factory=list)
    """By node."""


class Line:
    """A connection that carries messages."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._read = b""
        self._writing = threading.RLock()  # a signal's handler may write while the thread it interrupts does
        with suppress(OSError):  # no TCP
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in (("TCP_KEEPIDLE", KEEPALIVE_S), ("TCP_KEEPINTVL", KEEPALIVE_S), ("TCP_KEEPCNT", 3)):
                if hasattr(socket, name):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, message: Mapping[str, Any]) -> None:
        """Raises OSError when the other end is gone."""
        with self._writing:
            self._socket.sendall(json.dumps(message, separators=(",", ":")).encode("ascii") + b"\n")

    def receive(self, timeout_s: float | None) -> dict[str, Any] | None:
        """The next message; None when the other end is gone, or says what is none. Raises TimeoutError."""
        while b"\n" not in self._read:
            try:
                self._socket.settimeout(timeout_s)
                part = self._socket.recv(1 << 16)
            except TimeoutError:
                raise
            except OSError:
                return None
            if not part or len(self._read) > MOST_BYTES:
                return None
            self._read += part
        line, _, self._read = self._read.partition(b"\n")
        try:
            value = json.loads(line)
        except ValueError:
            return None
        return value if isinstance(value, dict) else None

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@dataclass
class Meeting:
    """The lines between the nodes of a start: on node 0 one to each of the others, elsewhere the one to node 0."""

    start: Start
    lines: dict[int, Line]
    """By node at the other end."""
    lost: int | None = None
    """The first node whose line broke before it said that it ended."""
    ended: dict[int, Mapping[str, Any] | None] = field(default_factory=dict)
    """Node -> its error, None where it ended well; of those that said so."""
    asked: int | None = None
    """The signal another node was asked to stop by."""
    over: bool = False

    def listen(self) -> None:
        """From now on `lost`, `ended` and `asked` are kept."""
        for node, line in self.lines.items():
            threading.Thread(target=self._hear, args=(node, line), name=f"node {node}", daemon=True).start()

    def _hear(self, node: int, line: Line) -> None:
        while (message := line.receive(None)) is not None:
            if "ended" in message:
                self.ended[node] = message["ended"]
                return
            if "signal" in message:
                self.asked = self.asked or int(message["signal"])
                self.tell({"signal": int(message["signal"])}, but=node)
        if not self.over and self.lost is None:
            self.lost = node

    def tell(self, message: Mapping[str, Any], *, but: int | None = None) -> None:
        for node, line in self.lines.items():
            if node != but:
                with suppress(OSError):
                    line.send(message)

    def close(self, error: Mapping[str, Any] | None) -> None:
        """Says how this node ended, and hangs up."""
        self.over = True
        self.tell({"ended": error})
        for line in self.lines.values():
            line.close()

    def host_of(self, node: int) -> str:
        return self.start.hosts[node] if node < len(self.start.hosts) else "?"


def address_of(rendezvous: str) -> tuple[str, int]:
    """`host:port`, as the recipe's rules have it."""
    host, _, port = rendezvous.rpartition(":")
    return host.strip("[]"), int(port)


def host_meeting(
    rendezvous: str,
    own: Hello,
    nodes: int,
    start: Callable[[int], Start],
    *,
    timeout_s: float,
    on_wait: Callable[[str], None] = lambda _: None,
) -> Meeting:
    """On node 0: waits for the other nodes, and tells them the start that `start` makes for a free port.

    `on_wait` is told now and then, and may raise. Raises LostPeerError when one does not come in time, RecipeError when the address
    cannot be listened at or a node has another recipe or another version of tunedock.
    """
    host, port = address_of(rendezvous)
    deadline = time.monotonic() + timeout_s
    calls: dict[int, tuple[Hello, Line]] = {}
    with _listening(host, port) as server:
        told = start(free_port(host))
        while len(calls) < nodes - 1:
            missing = [node for node in range(1, nodes) if node not in calls]
            on_wait(f"waiting for node{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} at {rendezvous}")
            server.settimeout(max(0.0, min(1.0, deadline - time.monotonic())))
            try:
                connection, _ = server.accept()
            except (TimeoutError, BlockingIOError):
                if time.monotonic() >= deadline:
                    _hang_up(calls)
                    raise LostPeerError(
                        f"node{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} did not come to {rendezvous} "
                        f"within {timeout_s:g} s",
                        where="launch.rendezvous",
                        hint="run `tunedock train` there with the same recipe and `launch.node_rank`, and see that it reaches "
                        "this address",
                    ) from None
                continue
            _answer(Line(connection), own, nodes, told, calls)
    hosts = [own.host, *(calls[node][0].host for node in range(1, nodes))]
    told = Start(**{**asdict(told), "hosts": hosts})
    for node in sorted(calls):
        with suppress(OSError):  # gone again: its line says so as soon as it is listened to
            calls[node][1].send({"start": asdict(told)})
    return Meeting(told, {node: line for node, (_, line) in calls.items()})


def _answer(line: Line, own: Hello, nodes: int, told: Start, calls: dict[int, tuple[Hello, Line]]) -> None:
    """One caller: it asks which run this is, or comes to stay."""
    try:
        message = line.receive(ANSWER_S)
    except TimeoutError:
        message = None
    if message is not None and message.get("asks") == "run":
        with suppress(OSError):
            line.send({"start": asdict(told)})
        line.close()
        return
    hello = _hello(message)
    if hello is None:
        line.close()
        return
    why = _why_not(hello, own, nodes)
    if why is not None:
        with suppress(OSError):
            line.send({"refused": why})
        line.close()
        _hang_up(calls)
        raise RecipeError(
            f"node {hello.node} ({hello.host}): {why}", where="launch", hint="give every node the same recipe"
        )
    if hello.node in calls:  # it called before, and was started anew since
        calls[hello.node][1].close()
    calls[hello.node] = (hello, line)


def _hello(message: Mapping[str, Any] | None) -> Hello | None:
    try:
        return Hello(**(message or {})["joins"])
    except (KeyError, TypeError):
        return None


def _why_not(hello: Hello, own: Hello, nodes: int) -> str | None:
    if not 1 <= hello.node < nodes:
        return f"`launch.node_rank: {hello.node}` is none of the {nodes} nodes beside node 0"
    if hello.version != own.version:
        return f"it has tunedock {hello.version}, and node 0 has {own.version}"
    if hello.recipe_hash != own.recipe_hash:
        return f"its recipe is another one (hash {hello.recipe_hash}, node 0's {own.recipe_hash})"
    if hello.processes != own.processes:
        return f"it would start {hello.processes} processes, and node 0 {own.processes}: set `launch.processes`"
    return None


def ask_for_run(rendezvous: str, *, timeout_s: float, on_wait: Callable[[str], None] = lambda _: None) -> Start:
    """On another node: what node 0 is about to start. Raises LostPeerError when it does not answer in time."""
    line, start = _ask(rendezvous, {"asks": "run"}, timeout_s, on_wait)
    line.close()
    return start


def join_meeting(
    rendezvous: str, own: Hello, *, timeout_s: float, on_wait: Callable[[str], None] = lambda _: None
) -> Meeting:
    """On another node: calls node 0 and waits for the start. Raises LostPeerError when there is none in time, RecipeError when node
    0 refuses this node."""
    line, start = _ask(rendezvous, {"joins": asdict(own)}, timeout_s, on_wait)
    return Meeting(start, {0: line})


def _ask(
    rendezvous: str, message: Mapping[str, Any], timeout_s: float, on_wait: Callable[[str], None]
) -> tuple[Line, Start]:
    """Calls again where node 0 hangs up: it is between two starts."""
    deadline = time.monotonic() + timeout_s
    while True:
        line = _call(rendezvous, message, max(0.0, deadline - time.monotonic()), on_wait)
        try:
            start = _started(line, rendezvous, max(1.0, deadline - time.monotonic()), on_wait)
        except BaseException:
            line.close()
            raise
        if start is not None:
            return line, start
        line.close()
        time.sleep(CALL_EVERY_S)


def _call(rendezvous: str, message: Mapping[str, Any], timeout_s: float, on_wait: Callable[[str], None]) -> Line:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            line = Line(socket.create_connection(address_of(rendezvous), timeout=min(5.0, max(0.1, timeout_s))))
            line.send(message)
            return line
        except OSError as error:  # a name that does not resolve yet among them
            if time.monotonic() >= deadline:
                raise _silent(rendezvous, timeout_s, str(error)) from None
            on_wait(f"waiting for node 0 at {rendezvous}")
            time.sleep(CALL_EVERY_S)


def _started(line: Line, rendezvous: str, timeout_s: float, on_wait: Callable[[str], None]) -> Start | None:
    """None where node 0 hung up."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            message = line.receive(1.0)
            break
        except TimeoutError:
            if time.monotonic() >= deadline:
                raise _silent(rendezvous, timeout_s, "it waits for another node") from None
            on_wait(f"node 0 at {rendezvous} waits for another node")
    if message is None:
        return None
    if "refused" in message:
        raise RecipeError(f"node 0 refuses this node: {message['refused']}", where="launch")
    return Start(**message["start"])


def _silent(rendezvous: str, timeout_s: float, why: str) -> LostPeerError:
    return LostPeerError(
        f"node 0 started nothing at {rendezvous} within {timeout_s:g} s: {why}",
        where="launch.rendezvous",
        hint="start `tunedock train` on node 0, and see that its address is reached from here",
    )


def _listening(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        server = socket.socket(family, socket.SOCK_STREAM)
        try:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(place)
            server.listen()
        except OSError:
            server.close()
            raise
    except OSError as error:
        raise RecipeError(
            f"node 0 cannot listen at `{host}:{port}`: {error}",
            where="launch.rendezvous",
            hint="give an address of this machine, and a port nothing else has; where this is not node 0, give `launch.node_rank`",
        ) from None
    return server


def free_port(host: str) -> int:
    """One that is free now, at the address the others reach; between now and torchrun's listening it may be taken, seldom."""
    with _listening(host, 0) as found:
        return int(found.getsockname()[1])


def _hang_up(calls: Mapping[int, tuple[Hello, Line]]) -> None:
    for _, line in calls.values():
        line.close()


def start_name() -> str:
    return secrets.token_hex(8)
