"""Who we are to a registry: what `docker login` has stored, never a store of our own.

Docker's SDK reads `config.json` (`auths`, `credsStore`, `credHelpers`; `DOCKER_CONFIG` names another folder) and asks the helper
programs. Secrets stay in memory and stand in no message.
"""

from __future__ import annotations

import base64
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

from tunedock.errors import DependencyError, EngineError
from tunedock.image.reference import HUB


@dataclass(frozen=True, slots=True)
class Credentials:
    user: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    """A refresh token, which some registries give in place of a password."""

    @property
    def basic(self) -> str:
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


def of(host: str) -> Credentials | None:
    """What is stored for a registry; None for nobody. Raises EngineError where the store cannot be asked."""
    try:
        from docker import auth
        from docker.errors import DockerException
    except ImportError as error:
        raise DependencyError(
            f"the package `{error.name or 'docker'}` is missing", where=host, hint="pip install 'tunedock[containers]'"
        ) from error
    try:
        with warnings.catch_warnings(
            action="ignore", category=UserWarning
        ):  # of a missing helper; the error names it too
            found: Mapping[str, str] = auth.load_config().resolve_authconfig(None if host == HUB else host) or {}
    except (DockerException, ValueError, LookupError) as error:
        raise EngineError(
            f"Docker's store of credentials cannot be read: {error}",
            where=host,
            hint=f"`docker logout {host}` and `docker login {host}` write it anew",
        ) from error
    entry = {key.lower(): value for key, value in found.items()}  # files spell the keys small, helpers with capitals
    made = Credentials(entry.get("username") or "", entry.get("password") or "", entry.get("identitytoken") or "")
    return made if made != Credentials() else None
