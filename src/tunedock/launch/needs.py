"""What a stage needs of the world outside its container: the network, for what, and variables of the environment by name.

Pure functions of a resolved recipe. Secrets are never looked at here: a name is asked for where the recipe needs what it opens.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from tunedock.errors import RecipeError
from tunedock.recipe.objectives.rewards import JudgeReward, ModelReward
from tunedock.recipe.objectives.rollout import OpenAIEngine, Rollout
from tunedock.recipe.schema import Recipe

HUB_SECRETS = {"hf": ("HF_TOKEN",), "modelscope": ("MODELSCOPE_API_TOKEN",)}
"""Of a mirror's address: those of Hugging Face."""

STORE_SECRETS = {
    "s3": (
        *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
        *("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"),
    ),
    "gs": ("GOOGLE_APPLICATION_CREDENTIALS",),
    "az": (
        *("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_CONNECTION_STRING"),
        *("AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_CLIENT_ID", "AZURE_STORAGE_CLIENT_SECRET", "AZURE_STORAGE_TENANT_ID"),
    ),
}  # fmt: skip
"""By the scheme of a source."""

SAME_STORE = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az", "adl": "az"}

TRACKER_SECRETS = {
    "mlflow": ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    "swanlab": ("SWANLAB_API_KEY", "SWANLAB_API_HOST"),
    "wandb": ("WANDB_API_KEY", "WANDB_BASE_URL"),
}

PROXIES = tuple(
    form for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy") for form in (name, name.upper())
)
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
FILES = (*CERTIFICATES, "GOOGLE_APPLICATION_CREDENTIALS")
"""Variables that name a file or folder, which is mounted."""

PLAIN = re.compile(
    "(OMP|GOMP|KMP|MKL|NCCL|GLOO|TORCH|PYTORCH|TORCHINDUCTOR|TRITON|CUBLAS|MALLOC|LC)_[A-Z0-9_]+"
    "|LANG|TZ|CUDA_LAUNCH_BLOCKING|CUDA_DEVICE_MAX_CONNECTIONS|TOKENIZERS_PARALLELISM"
    "|HF_ENDPOINT|HF_HUB_OFFLINE|HF_DATASETS_OFFLINE|TRANSFORMERS_OFFLINE"
)
"""Variables that hold no secret, and are to a worker in a container what they are to one outside."""

SOURCES = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


@dataclass(frozen=True, slots=True)
class Need:
    """One reason for the network."""

    why: str
    address: str | None = None
    """A URL, where it is known whom is talked to."""
    secrets: tuple[str, ...] = ()
    machines: bool = False
    """Whether other machines of the training are to reach this one."""


def needs(recipe: Recipe, stage: str) -> list[Need]:
    """Why a stage of this recipe needs the network; empty where it does not."""
    return [
        *_hub(recipe, stage),
        *_stores(recipe),
        *_trackers(recipe, stage),
        *_endpoints(recipe, stage),
        *_nodes(recipe, stage),
    ]


def network_of(recipe: Recipe, stage: str, environment: Mapping[str, str]) -> tuple[str, str | None]:
    """(the network's name, why it is this one; None where the recipe names it). Raises RecipeError where it needs another."""
    found, given = needs(recipe, stage), recipe.launch.container.network
    if given == "none" and found:
        raise RecipeError(
            f"`network: none`, and {found[0].why}",
            where="launch.container.network",
            hint="leave it at `auto`, or give models and data as local paths and set `offline: true`",
        )
    if given != "auto":
        return given, None
    here = [need for need in found if need.machines or (need.address is not None and _is_here(need.address))]
    if here:
        return "host", here[0].why
    proxies = [environment[name] for name in PROXIES if "no_proxy" not in name.lower() and environment.get(name)]
    if found and any(_is_here(proxy) for proxy in proxies):
        return "host", f"{found[0].why}, through a proxy of this machine"
    return ("bridge", found[0].why) if found else ("none", None)


def variables(recipe: Recipe, stage: str, network: str) -> tuple[str, ...]:
    """Names of variables that are passed on where they are set, besides those of `PLAIN`: what the recipe needs, and no others."""
    named = [text for text in recipe.launch.container.env if "=" not in text]
    found = [name for need in needs(recipe, stage) for name in need.secrets]
    connected = (*PROXIES, *CERTIFICATES) if network != "none" else ()
    return tuple(dict.fromkeys((*found, *connected, *named)))


def hub_ids(recipe: Recipe, stage: str) -> list[str]:
    """What comes from a hub, or its cache."""
    found = [] if _is_local(recipe.model.path) else [recipe.model.path]
    if isinstance(recipe.objective, Rollout):
        models = (reward.path for reward in recipe.objective.rewards if isinstance(reward, ModelReward))
        found += [path for path in models if not _is_local(path)]
    found += [path for path in _sources(recipe) if not _is_local(path) and not SOURCES.match(path)]
    if stage == "eval":
        found += recipe.eval.tasks
    return found


def _hub(recipe: Recipe, stage: str) -> Iterator[Need]:
    if not recipe.offline:
        for name in hub_ids(recipe, stage):
            yield Need(f"`{name}` comes from the hub", None, HUB_SECRETS.get(recipe.hub, HUB_SECRETS["hf"]))


def _stores(recipe: Recipe) -> Iterator[Need]:
    for path in _sources(recipe):
        found = SOURCES.match(path)
        if found and found.group(1) not in ("file", "local", "memory", "image"):
            scheme = SAME_STORE.get(found.group(1), found.group(1))
            yield Need(f"data are read from {scheme}://", path, STORE_SECRETS.get(scheme, ()))


def _trackers(recipe: Recipe, stage: str) -> Iterator[Need]:
    if stage not in ("train", "eval"):
        return
    for name in recipe.train.report_to:
        settings = getattr(recipe.track, name, None)
        if settings is None or getattr(settings, "mode", "online") == "offline":
            continue
        address = getattr(settings, "tracking_uri", None)
        if address is None or local_store(address) is None:
            yield Need(f"the run is told to {name}", address, TRACKER_SECRETS.get(name, ()))


def local_store(uri: str) -> str | None:
    """The path of a tracker's store on this machine's disk; None for one that is reached over the network."""
    for scheme in ("sqlite:///", "file://", "file:"):
        if uri.startswith(scheme):
            return uri.removeprefix(scheme).partition("?")[0]
    return None if "://" in uri or uri.startswith("databricks") else uri


def _endpoints(recipe: Recipe, stage: str) -> Iterator[Need]:
    if stage != "train" or not isinstance(recipe.objective, Rollout):
        return
    endpoints: list[JudgeReward | OpenAIEngine] = [
        each for each in recipe.objective.rewards if isinstance(each, JudgeReward)
    ]
    if isinstance(recipe.objective.engine, OpenAIEngine):
        endpoints.append(recipe.objective.engine)
    for endpoint in endpoints:
        key = (endpoint.api_key_env,) if endpoint.api_key_env else ()
        yield Need(f"`{endpoint.model}` is asked at {endpoint.base_url}", endpoint.base_url, key)


def _nodes(recipe: Recipe, stage: str) -> Iterator[Need]:
    if stage == "train" and recipe.launch.nodes > 1:
        yield Need("it trains over several machines", None, (), machines=True)


def _sources(recipe: Recipe) -> Sequence[str]:
    data = recipe.data
    return [source.path for source in (*data.train, *data.validation, *data.test)]


def _is_local(path: str) -> bool:
    """Of a resolved recipe, whose local paths are absolute."""
    return path.startswith("/")


def _is_here(address: str) -> bool:
    """Whether an address is this machine's own, as only this machine's own network has it."""
    host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
