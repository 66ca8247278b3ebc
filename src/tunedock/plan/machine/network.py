"""The hub models come from: whether it answers, through which proxy, with which token; and the clock, by its answer."""

from __future__ import annotations

import email.utils
import http.client
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

from tunedock import __version__
from tunedock.plan.machine.bounds import measured
from tunedock.plan.machine.check import Check, absent, warning
from tunedock.plan.machine.room import home_folder
from tunedock.plan.machine.symptoms import known_way_out

GROUP = "network"

HUGGING_FACE = "https://huggingface.co"
OTHER_HUBS = {"https://hf-mirror.com": "hub: https://hf-mirror.com", "https://modelscope.cn": "hub: modelscope"}
"""Tried when Hugging Face does not answer -> how a recipe names it."""

ANSWER_S = 4.0
"""Seconds a hub may take for each step of its answer."""

WAIT_S = 5.5
"""Seconds for the whole of it. Looking a name up has no time limit of its own, so those who ask are threads that may be left."""

TRUE = {"1", "on", "yes", "true"}
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY")


@dataclass(frozen=True, slots=True)
class Answer:
    """`status` is None when there was none, and `trouble` says why. `time`: the hub's clock, seconds since the epoch."""

    status: int | None
    seconds: float
    trouble: str = ""
    time: float | None = None


Ask = Callable[[str], Answer]


def ask(url: str) -> Answer:
    """The answer to a HEAD request, redirects followed, through the environment's proxies."""
    began = time.monotonic()
    if not url.startswith(("http://", "https://")):
        return Answer(None, 0.0, "the address of a hub begins with https://")
    try:
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": f"tunedock/{__version__}"})  # noqa: S310
        with urllib.request.urlopen(request, timeout=ANSWER_S) as response:  # noqa: S310 - http and https only
            return Answer(response.status, time.monotonic() - began, time=_time(response.headers.get("Date")))
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, time.monotonic() - began, str(error.reason), _time(error.headers.get("Date")))
    except urllib.error.URLError as error:
        reason = re.sub(r"^\[Errno -?\d+\] ", "", str(error.reason))
        return Answer(None, time.monotonic() - began, reason or "no answer")
    except (OSError, ValueError, http.client.HTTPException) as error:
        return Answer(None, time.monotonic() - began, str(error) or type(error).__name__)


def checks(
    environment: Mapping[str, str] | None = None, asking: Ask = ask, now: Callable[[], float] = time.time
) -> list[Check]:
    """The hub, the clock, proxies and the token."""
    environment = os.environ if environment is None else environment
    off = next((name for name in OFFLINE if environment.get(name, "").lower() in TRUE), None)
    others = [proxies(environment), token(environment, home_folder() or Path("/"))]
    if off:
        way_out = f"`unset {off}` to fetch models"
        return [absent(GROUP, "hub", f"not asked: {off} is set, only what the cache holds is used", way_out), *others]
    endpoint = environment.get("HF_ENDPOINT", "").rstrip("/") or HUGGING_FACE
    (answer,) = _ask_all(asking, [endpoint])
    return [hub(endpoint, answer, asking), clock(answer, now()), *others]


def hub(endpoint: str, answer: Answer, asking: Ask) -> Check:
    """Any answer of the hub itself will do; when it gives none, the others are asked."""
    place = without_password(endpoint)
    if answer.status is not None and answer.status not in (403, 407, 451) and answer.status < 500:
        named = f"{place}" if endpoint == HUGGING_FACE else f"{place} (HF_ENDPOINT)"
        return Check(GROUP, "hub", f"{named} answers in {answer.seconds:.1f} s")
    trouble = answer.trouble or "no answer"
    if answer.status is not None:
        trouble = f"answers {answer.status} {trouble}"
    candidates = [url for url in (HUGGING_FACE, *OTHER_HUBS) if url != endpoint]
    answers = zip(candidates, _ask_all(asking, candidates), strict=True)
    reached = [url for url, other in answers if other.status is not None and other.status < 400]
    if reached and reached[0] == HUGGING_FACE:
        way_out = "`unset HF_ENDPOINT`: Hugging Face itself answers"
    elif reached:
        way_out = f"{without_password(reached[0])} answers: `{OTHER_HUBS[reached[0]]}` in the recipe"
    else:
        way_out = known_way_out(trouble) or "check the network; HTTPS_PROXY names a proxy"
        way_out += "; without a network, give models as local folders and set HF_HUB_OFFLINE=1"
    return warning(GROUP, "hub", f"{place}: {trouble}", way_out)


def clock(answer: Answer, now: float) -> Check:
    """Our clock against the hub's: certificates and tokens hold for a time, and logs of several machines are compared by it."""
    here = datetime.fromtimestamp(now, tz=UTC).strftime("%Y-%m-%d %H:%M UTC")
    if answer.time is None:
        return absent(GROUP, "clock", f"{here}; nothing to compare it with")
    off = abs(now - answer.time)
    return measured(
        GROUP,
        "clock",
        off,
        found=f"{here}, {off:.0f} s from the hub's",
        way_out="`sudo timedatectl set-ntp true`; in WSL2 after a sleep: `sudo hwclock -s`",
    )


def proxies(environment: Mapping[str, str]) -> Check:
    """Without user and password."""
    set_ = {name: environment.get(name) or environment.get(name.lower()) for name in PROXIES}
    words = ", ".join(f"{name}={without_password(value)}" for name, value in set_.items() if value)
    if not words:
        return Check(GROUP, "proxies", "none set")
    socks = any(value and value.startswith("socks") for value in set_.values())
    if socks and find_spec("socksio") is None:
        return warning(GROUP, "proxies", words, "a SOCKS proxy needs a package: `pip install socksio`")
    return Check(GROUP, "proxies", words)


def token(environment: Mapping[str, str], home: Path) -> Check:
    """Whether there is one, never which."""
    if environment.get("HF_TOKEN"):
        return Check(GROUP, "hub token", "HF_TOKEN is set")
    folder = Path(environment.get("HF_HOME") or home / ".cache" / "huggingface")
    file = Path(environment.get("HF_TOKEN_PATH") or folder / "token")
    if file.is_file():
        return Check(GROUP, "hub token", f"in {file}")
    return absent(GROUP, "hub token", "none", "private and gated models need one: `hf auth login`, or HF_TOKEN")


def without_password(address: str) -> str:
    """`http://user:secret@proxy:3128` -> `http://…@proxy:3128`."""
    return re.sub(r"(^|//)[^/@\s]*@", r"\1…@", address)


def _ask_all(asking: Ask, endpoints: Sequence[str], wait_s: float = WAIT_S) -> list[Answer]:
    """The answer of each, asked side by side."""
    answers: dict[str, Answer] = {}

    def keep(endpoint: str) -> None:
        answers[endpoint] = _asked(asking, endpoint)

    threads = [threading.Thread(target=keep, args=(endpoint,), daemon=True) for endpoint in endpoints]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + wait_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    silent = Answer(None, wait_s, f"no answer within {wait_s:.0f} s")
    return [answers.get(endpoint, silent) for endpoint in endpoints]


def _asked(asking: Ask, endpoint: str) -> Answer:
    """Of a small address of the hub's interface, not of its front page: some networks answer for that themselves."""
    path = "" if endpoint in OTHER_HUBS and "modelscope" in endpoint else "/api/models?limit=1"
    return asking(endpoint + path)


def _time(date: str | None) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(date).timestamp() if date else None
    except ValueError:
        return None
