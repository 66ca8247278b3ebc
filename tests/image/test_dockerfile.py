"""The generated Dockerfiles: golden for all targets, clean by hadolint and by our own rules."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunedock.image.dockerfile import Options, all_dockerfiles, dockerfile
from tunedock.image.lint import check, hadolint, instructions
from tunedock.image.targets import ROLES, names, target

GOLDEN = Path(__file__).parents[1] / "golden" / "dockerfiles"
TEXTS = all_dockerfiles()


def test_they_are_as_they_were(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--rewrite-golden"):
        GOLDEN.mkdir(exist_ok=True)
        for path in GOLDEN.iterdir():
            path.unlink()
        for name, text in TEXTS.items():
            (GOLDEN / name).write_text(text, encoding="utf-8")
    assert {path.name: path.read_text(encoding="utf-8") for path in GOLDEN.iterdir()} == TEXTS


@pytest.mark.parametrize("name", TEXTS)
def test_they_are_clean(name: str) -> None:
    assert not check(TEXTS[name])
    assert not hadolint(TEXTS[name])


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", names())
def test_those_for_builders_without_mounts_are_clean_too(name: str, role: str) -> None:
    text = dockerfile(target(name, role), Options(mounts=False, ca=True))
    assert "--mount" not in text
    assert not check(text)
    assert not hadolint(text)


def test_nothing_but_the_code_comes_after_the_code() -> None:
    steps = [each for each in instructions(TEXTS["serve.cpu"]) if each.name in ("COPY", "RUN")]
    assert [each.text.split()[0] for each in steps[-4:-1]] == ["model/", "adapter/", "code/"]
    assert "compileall" in steps[-1].text


def test_a_light_image_has_no_pytorch() -> None:
    assert "TORCH_INDEX" not in TEXTS["serve.edge"]
    assert "TORCH_INDEX" in TEXTS["train.edge"]


def test_an_engine_has_an_environment_of_its_own() -> None:
    text = TEXTS["serve.cuda-vllm"]
    assert "COPY --from=engine /opt/engine /opt/engine" in text
    engine = text.split("AS engine")[1].split("FROM")[0]
    assert "vllm==" in engine
    assert "--constraint" not in engine  # it pins another PyTorch


def test_the_vendors_script_is_read_before_anything_starts() -> None:
    assert 'ENTRYPOINT ["tini", "--", "/bin/bash", "-c", "source /usr/local/Ascend/' in TEXTS["train.npu"]
    assert 'ENTRYPOINT ["tini", "--"]' in TEXTS["train.cuda"]
