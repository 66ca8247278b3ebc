"""`make lock`: writes `locked.txt`, the versions of all packages in images, from those installed here.

What PyTorch's wheels for GPUs need besides (`nvidia-*`, `triton`) they pin themselves, each version its own.
"""

from __future__ import annotations

import importlib.metadata as metadata
import re
from collections.abc import Iterable

from tunedock.image.package import package
from tunedock.image.targets import LOCKED, ROLES, names, target

HEADING = (
    "# Every package that comes into an image, at one version: written by `make lock`, read by pip as constraints.\n"
)


def closure(lines: Iterable[str]) -> dict[str, str]:
    """Package -> version of everything these packages need, as far as it is installed here."""
    from packaging.requirements import Requirement

    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    left = [Requirement(line) for line in lines]
    while left:
        requirement = left.pop()
        name, wanted = normal(requirement.name), frozenset(requirement.extras)
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        try:
            package = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            continue
        found[name] = package.version.split("+")[0]  # `2.13.0+cpu` is one target's
        for line in package.requires or []:
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in (*wanted, "")):
                left.append(needed)
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def all_packages() -> dict[str, str]:
    """Those of every target and role, tunedock itself left out."""
    own = package()
    rows = [target(name, role) for name in names() for role in ROLES]
    lines = own.needed({extra for row in rows for extra in row.extras})
    found = closure([*lines, *(line for row in rows for line in row.packages)])
    pinned = (line.partition("==") for row in rows for line in row.packages)
    found |= {normal(name): version for name, _, version in pinned if version}
    return {name: found[name] for name in sorted(found) if name != "tunedock"}


def main() -> None:
    lines = [f"{name}=={version}\n" for name, version in all_packages().items()]
    LOCKED.write_text(HEADING + "".join(lines), encoding="utf-8")
    print(LOCKED)


if __name__ == "__main__":
    main()
