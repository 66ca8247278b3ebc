from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tunedock.plan.machine import network
from tunedock.plan.machine.network import HUGGING_FACE, Answer, ask, checks

NOW = 1_790_000_000.0
REACHED = Answer(200, 0.2, time=NOW)
SILENT = Answer(None, 4.0, "timed out")


def by_name(made):
    return {check.name: check for check in made}


def run(answers, environment=None):
    asked = []

    def asking(url):
        asked.append(url)
        return next((answer for start, answer in answers.items() if url.startswith(start)), SILENT)

    return by_name(checks(environment or {}, asking, lambda: NOW + 2)), asked


@pytest.fixture
def server(monkeypatch):
    """A hub on this machine; answers as its `status` says, slowly as its `delay_s` says."""

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            time.sleep(self.server.delay_s)
            self.send_response(self.server.status)
            self.end_headers()

        def log_message(self, *_):
            pass

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    made = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    made.status, made.delay_s = 200, 0.0
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def test_a_hub_that_answers():
    made, asked = run({HUGGING_FACE: REACHED})
    assert made["hub"].verdict == "ok"
    assert made["clock"].found.endswith("2 s from the hub's")
    assert (made["clock"].verdict, made["clock"].recommended) == ("ok", "≤ 60 s")
    assert made["proxies"].found == "none set"
    assert asked == [f"{HUGGING_FACE}/api/models?limit=1"]


def test_a_mirror_is_named_when_only_it_answers():
    made, _ = run({"https://hf-mirror.com": REACHED})
    assert made["hub"].verdict == "warning"
    assert "`hub: https://hf-mirror.com`" in made["hub"].way_out
    assert made["clock"].verdict == "not applicable"


def test_a_dead_mirror_in_the_environment():
    made, asked = run({HUGGING_FACE: REACHED}, {"HF_ENDPOINT": "https://mirror.test/"})
    assert asked[0] == "https://mirror.test/api/models?limit=1"
    assert "unset HF_ENDPOINT" in made["hub"].way_out


def test_nothing_answers():
    made, _ = run({HUGGING_FACE: Answer(None, 0.1, "Name or service not known")})
    assert made["hub"].verdict == "warning"
    assert "DNS" in made["hub"].way_out
    assert "HF_HUB_OFFLINE=1" in made["hub"].way_out


@pytest.mark.parametrize(
    ("status", "verdict"), [(200, "ok"), (401, "ok"), (404, "ok"), (403, "warning"), (407, "warning"), (502, "warning")]
)
def test_answers_of_a_hub_and_of_something_between(status, verdict):
    made, _ = run({HUGGING_FACE: Answer(status, 0.1, "reason", NOW)})
    assert made["hub"].verdict == verdict


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_asks_nobody(name):
    made, asked = run({HUGGING_FACE: REACHED}, {name: "1"})
    assert asked == []
    assert made["hub"].verdict == "not applicable"
    assert name in made["hub"].found
    assert run({HUGGING_FACE: REACHED}, {name: "0"})[1]


@pytest.mark.parametrize(("off_s", "verdict"), [(10, "ok"), (120, "warning"), (-4000, "failure")])
def test_a_clock_that_is_wrong(off_s, verdict):
    assert network.clock(Answer(200, 0.1, time=NOW), NOW + off_s).verdict == verdict


def test_passwords_and_tokens_are_never_told(tmp_path):
    check = network.proxies({"https_proxy": "http://me:secret@proxy.test:3128", "NO_PROXY": "localhost"})
    assert check.found == "HTTPS_PROXY=http://…@proxy.test:3128, NO_PROXY=localhost"
    assert "hf_secret" not in network.token({"HF_TOKEN": "hf_secret"}, tmp_path).found
    assert network.token({}, tmp_path).verdict == "not applicable"
    (tmp_path / "token").write_text("hf_secret")
    assert network.token({"HF_HOME": str(tmp_path)}, tmp_path).found == f"in {tmp_path / 'token'}"
    hub = network.hub("https://me:secret@mirror.test", REACHED, ask)
    assert "secret" not in hub.found


def test_a_real_answer_has_a_time(server):
    answer = ask(f"http://127.0.0.1:{server.server_port}/api/models")
    assert answer.status == 200
    assert abs(answer.time - time.time()) < 5
    server.status = 404
    assert ask(f"http://127.0.0.1:{server.server_port}/").status == 404


def test_a_real_server_that_does_not_answer(server, monkeypatch):
    monkeypatch.setattr(network, "ANSWER_S", 0.3)
    server.delay_s = 1.5
    answer = ask(f"http://127.0.0.1:{server.server_port}/")
    assert answer.status is None
    assert answer.seconds < 1.4
    assert "timed out" in answer.trouble


def test_what_is_no_address():
    assert ask("file:///etc/passwd").status is None
    assert "https://" in ask("hub.test/api").trouble
    assert ask("http://[nonsense/").status is None
    assert ask("http://a b/").status is None
    assert ask("http://127.0.0.1:1/").status is None
    made, _ = run({}, {"HF_ENDPOINT": "nonsense"})
    assert made["hub"].verdict == "warning"


def test_asking_ends_though_a_name_is_looked_up_for_ever():
    began = time.monotonic()
    (answer,) = network._ask_all(lambda _url: time.sleep(30), ["https://slow.test"], wait_s=0.2)
    assert answer.status is None
    assert time.monotonic() - began < 3
