"""An OCI registry (Harbor, docker-registry, a cloud's): the few requests that name, list and move images.

Layers of programs go through the engine (`image.transfer`); this is about manifests, a few kilobytes each, and data, which need no
engine to be read. What is fetched is believed by its digest alone. requests comes with Docker's SDK, so this needs nothing more
(decision 14 says why it is not oras-py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urljoin, urlsplit

from tunedock.errors import EngineError
from tunedock.image import credentials as stored
from tunedock.image.access import TIMES_S, Access, is_loopback, refusal
from tunedock.image.credentials import Credentials
from tunedock.image.reference import HUB, is_digest

try:
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry
except ImportError as error:  # only `tunedock image` and `tunedock bundle` come here
    from tunedock.errors import DependencyError

    raise DependencyError(
        f"the package `{error.name or 'requests'}` is missing", hint="pip install 'tunedock[containers]'"
    ) from error

MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
LARGEST_MANIFEST = 4 << 20
"""What the specification lets registries refuse above."""
MOST_TAGS = 200_000
PAGES = 2_000
CERTIFICATES = (Path("/etc/docker/certs.d"), Path.home() / ".docker/certs.d")
"""Where engines look for the certificate of a registry (`HOST/ca.crt`)."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a tag stands for: an image, or one image for each platform."""

    media_type: str
    data: bytes

    @property
    def digest(self) -> str:
        return f"sha256:{hashlib.sha256(self.data).hexdigest()}"


class Registry:
    """One registry. Every method raises EngineError where it does not answer, refuses or answers what cannot be."""

    def __init__(self, host: str, *, plain_http: bool = False, credentials: Credentials | None = None) -> None:
        """`credentials` are looked up in Docker's store unless given. `plain_http` is for a registry without TLS elsewhere than on
        this machine, which engines call insecure."""
        self.host = host
        self._plain_http = plain_http
        self._session = _Session()
        self._session.auth = _nothing  # else requests would add what ~/.netrc says
        self._session.headers["Accept-Encoding"] = "identity"  # digests are of what is stored
        again = Retry(total=2, other=0, backoff_factor=0.3, status_forcelist=(502, 503, 504), allowed_methods=None,
                      respect_retry_after_header=False, raise_on_status=False)  # fmt: skip
        for scheme in ("https://", "http://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=again))
        if bundle := next(
            (path for path in (folder / host / "ca.crt" for folder in CERTIFICATES) if path.is_file()), None
        ):
            self._session.verify = str(bundle)
        self._credentials = credentials or stored.of(host)
        self._access = Access(self._session, host, self._credentials)
        self._root = ""

    def __enter__(self) -> Registry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.close()

    def digest(self, repository: str, name: str) -> str | None:
        """The digest that the registry says a tag has; None where there is no such tag."""
        answer = self._ask("HEAD", repository, f"manifests/{name}", accept=MANIFESTS)
        if answer.status_code == 404:
            return None
        self._expect(answer, 200, f"{repository}:{name}")
        said = answer.headers.get("Docker-Content-Digest", "")
        return said if is_digest(said) else self.manifest(repository, name).digest

    def manifest(self, repository: str, name: str) -> Manifest:
        """The manifest of a tag or a digest, which must hash to the digest asked for or told."""
        with self._ask("GET", repository, f"manifests/{name}", accept=MANIFESTS, stream=True) as answer:
            self._expect(answer, 200, f"{repository}:{name}")
            data = b"".join(_bounded(answer, self.host, LARGEST_MANIFEST))
        found = Manifest(answer.headers.get("Content-Type", "").partition(";")[0], data)
        wanted = name if is_digest(name) else answer.headers.get("Docker-Content-Digest", found.digest)
        if found.digest != wanted:
            raise EngineError(
                f"what it gave for `{repository}:{name}` has the digest {found.digest}, not {wanted}",
                where=self.host,
                hint="something between here and the registry changes what is sent, or the registry's disk is damaged",
            )
        return found

    def document(self, repository: str, digest: str) -> dict[str, Any]:
        """A small blob that is a JSON object: an image's configuration."""
        data = b"".join(self.blob(repository, digest, LARGEST_MANIFEST))
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise EngineError(f"`{repository}@{digest}` is no configuration", where=self.host)
        return found

    def blob(self, repository: str, digest: str, most: int) -> Iterator[bytes]:
        """The bytes of a blob in pieces; at its end it is known whether they are those asked for."""
        if not is_digest(digest):
            raise EngineError(f"`{repository}` names a blob `{digest[:100]}`, which is no digest", where=self.host)
        made = hashlib.sha256()
        with self._ask("GET", repository, f"blobs/{digest}", stream=True) as answer:
            self._expect(answer, 200, f"{repository}@{digest}")
            try:
                for piece in _bounded(answer, self.host, most):
                    made.update(piece)
                    yield piece
            except requests.RequestException as error:
                raise self._unreachable(error) from error
        if f"sha256:{made.hexdigest()}" != digest:
            raise EngineError(
                f"what it gave for `{repository}@{digest}` has the SHA-256 {made.hexdigest()}",
                where=self.host,
                hint="something between here and the registry changes what is sent, or the registry's disk is damaged",
            )

    def put(self, repository: str, tag: str, manifest: Manifest) -> None:
        """Points a tag at a manifest whose layers the repository has already."""
        answer = self._ask("PUT", repository, f"manifests/{tag}", manifest=manifest)
        self._expect(answer, 201, f"{repository}:{tag}")
        said = answer.headers.get("Docker-Content-Digest", manifest.digest)
        if said != manifest.digest:
            raise EngineError(f"it stored {said} for {manifest.digest}", where=self.host)

    def tags(self, repository: str) -> list[str]:
        """All tags of a repository; none where there is no such repository."""
        found: list[str] = []
        path = "tags/list"
        for _ in range(PAGES):
            answer = self._ask("GET", repository, path)
            if answer.status_code == 404:
                return []
            self._expect(answer, 200, repository)
            found += self._names(answer)
            further = answer.links.get("next", {}).get("url")
            if not further or len(found) > MOST_TAGS:
                break
            place = urlsplit(urljoin(answer.url, further))
            if place.netloc != urlsplit(answer.url).netloc or not place.path.endswith("/tags/list"):
                raise EngineError(f"its list of tags goes on at another place: {further[:200]}", where=self.host)
            path = f"tags/list?{place.query}"
        return sorted(set(found))

    def _names(self, answer: requests.Response) -> list[str]:
        try:
            names = answer.json().get("tags") or []
            if isinstance(names, list) and all(isinstance(name, str) for name in names):
                return names
        except (ValueError, AttributeError):
            pass
        raise EngineError("its list of tags is none", where=self.host)

    def _ask(
        self,
        method: str,
        repository: str,
        path: str,
        *,
        accept: tuple[str, ...] = (),
        manifest: Manifest | None = None,
        stream: bool = False,
    ) -> requests.Response:
        scope = f"repository:{repository}:{'pull,push' if manifest else 'pull'}"
        url = f"{self._found_root()}/v2/{repository}/{path}"
        headers = {"Accept": ", ".join(accept)} if accept else {}
        data = None if manifest is None else manifest.data
        if manifest is not None:
            headers["Content-Type"] = manifest.media_type
        for _ in range(3):  # a first refusal says what to show; a second, that a token has run out
            answer = self._send(method, url, {**headers, **self._access.header(scope)}, data, stream)
            if answer.status_code != 401:
                return answer
            try:
                learned = self._access.learn(answer, scope)
            except requests.RequestException as error:
                raise self._unreachable(error) from error
            if not learned:
                break
        raise refusal(self.host, self._credentials)

    def _send(
        self, method: str, url: str, headers: dict[str, str], data: bytes | None, stream: bool
    ) -> requests.Response:
        try:
            return self._session.request(method, url, headers=headers, data=data, stream=stream, timeout=TIMES_S)
        except requests.RequestException as error:
            raise self._unreachable(error) from error

    def _found_root(self) -> str:
        """Where it answers. Like an engine, we take a registry on this machine without TLS too."""
        if not self._root:
            name = "registry-1.docker.io" if self.host == HUB else self.host
            self._root = f"http://{name}" if self._plain_http else f"https://{name}"
            if not self._plain_http and is_loopback(name):
                try:
                    self._session.get(f"{self._root}/v2/", timeout=TIMES_S)
                except requests.ConnectionError as error:  # TLS errors are of this kind too
                    if "CERTIFICATE_VERIFY_FAILED" not in str(error):
                        self._root = f"http://{name}"
        return self._root

    def _expect(self, answer: requests.Response, status: int, what: str) -> None:
        if answer.status_code == status:
            return
        if answer.status_code == 403:
            raise refusal(self.host, self._credentials)
        if answer.status_code == 404:
            raise EngineError(
                f"it has no `{what}`", where=self.host, hint="`tunedock image tags REPOSITORY` lists what it has"
            )
        if answer.status_code == 429:
            raise EngineError("it takes no more requests for now", where=self.host, hint="log in, or try again later")
        raise EngineError(f"HTTP {answer.status_code} for `{what}`: {_said(answer)}", where=self.host)

    def _unreachable(self, error: requests.RequestException) -> EngineError:
        from tunedock.image.engine import said

        hint = "check the name and the network; `curl -i https://HOST/v2/` shows what answers there"
        if isinstance(error, requests.exceptions.SSLError):
            hint = (
                f"put the certificate of its authority into {CERTIFICATES[0] / self.host / 'ca.crt'}; a registry without TLS needs "
                "--plain-http"
            )
        return EngineError(f"it cannot be reached: {said(error)}", where=self.host, hint=hint)


class _Session(requests.Session):
    """One that believes the certificate it is told, where requests would take REQUESTS_CA_BUNDLE's all the same."""

    def merge_environment_settings(self, url: Any, proxies: Any, stream: Any, verify: Any, cert: Any) -> Any:
        told = self.verify if isinstance(self.verify, str) else verify
        return super().merge_environment_settings(url, proxies, stream, told, cert)


def _nothing(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def _bounded(answer: requests.Response, host: str, most: int) -> Iterator[bytes]:
    size = 0
    for piece in answer.iter_content(64 << 10):
        size += len(piece)
        if size > most:
            raise EngineError(f"what it gave is larger than {most >> 20} MiB", where=host)
        yield piece


def _said(answer: requests.Response) -> str:
    try:
        errors = answer.json()["errors"]
        return "; ".join(" ".join(f"{error['code']}: {error.get('message', '')}".split()) for error in errors)[:500]
    except (ValueError, LookupError, TypeError):
        return answer.reason or "no reason given"
