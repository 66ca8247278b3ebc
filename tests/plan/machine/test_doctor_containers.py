from __future__ import annotations

import json

from machine_recordings import RecordedRunner, recorded

from tunedock.plan.machine.command import Ran
from tunedock.plan.machine.containers import checks

VERSION, INFO = Ran(0, recorded("docker_version_20.json")), Ran(0, recorded("docker_info_20.json"))


def by_name(made):
    return {check.name: check for check in made}


def asked(has_card, *folders, **answers):
    return by_name(
        checks(has_card, RecordedRunner({name.replace("_", " "): ran for name, ran in answers.items()}), folders)
    )


def with_info(**changes):
    return Ran(0, json.dumps({**json.loads(INFO.out), **changes}))


def test_no_docker_is_no_failure():
    made = asked(False)
    assert [check.verdict for check in made.values()] == ["not applicable"]


def test_a_daemon_of_the_minimum_version():
    made = asked(False, docker_version=VERSION, docker_info=INFO)
    assert (made["docker daemon"].verdict, made["docker daemon"].minimum) == ("warning", "20.10")
    assert made["docker daemon"].found == "20.10.24+dfsg1, Debian GNU/Linux 12 (bookworm), vfs"
    assert made["compose"].verdict == "not applicable"
    assert made["container toolkit"].verdict == "not applicable"
    assert "images" not in made  # the daemon's folder is not on this machine


def test_a_client_without_a_daemon():
    dead = Ran(1, recorded("docker_version_no_daemon.json"), recorded("docker_version_no_daemon.err"))
    made = asked(True, docker_version=dead)
    assert (made["docker client"].found, made["docker client"].verdict) == ("28.2.2, context default", "ok")
    assert made["docker daemon"].verdict == "warning"
    assert "systemctl start docker" in made["docker daemon"].way_out


def test_a_daemon_that_may_not_be_asked():
    denied = Ran(1, recorded("docker_version_no_daemon.json"), recorded("docker_denied.err"))
    assert "usermod -aG docker" in asked(False, docker_version=denied)["docker daemon"].way_out


def test_a_daemon_that_hangs_is_asked_no_more():
    runner = RecordedRunner({"docker version": Ran(None)})
    (check,) = checks(False, runner, ())
    assert check.verdict == "warning"
    assert len(runner.asked) == 1


def test_a_client_that_speaks_no_json():
    made = asked(False, docker_version=Ran(64, "", "template parsing error"))
    assert made["docker client"].verdict == "warning"
    assert made["docker daemon"].verdict == "warning"


def test_podman_in_the_place_of_docker():
    podman = Ran(
        0, json.dumps({"Client": {"APIVersion": "4.9.3", "Version": "4.9.3"}}), "Emulate Docker CLI using podman."
    )
    assert "podman" in asked(False, docker_version=podman)["docker daemon"].found


def test_compose_plugin_and_the_old_program():
    plugin = asked(False, docker_version=VERSION, docker_info=INFO, docker_compose_version=Ran(0, "v2.29.1\n"))
    assert (plugin["compose"].found, plugin["compose"].verdict) == ("v2.29.1", "ok")
    runner = RecordedRunner({"docker version": VERSION, "docker info": INFO, "docker-compose": Ran(0, "1.29.2\n")})
    old = by_name(checks(False, runner, ()))
    assert old["compose"].verdict == "warning"


def test_a_card_no_container_can_have():
    made = asked(True, docker_version=VERSION, docker_info=INFO)
    assert made["container toolkit"].verdict == "warning"
    assert "nvidia-ctk runtime configure" in made["container toolkit"].way_out
    toolkit = {"nvidia-ctk": Ran(0, recorded("nvidia_ctk_version.out"))}
    made = by_name(checks(True, RecordedRunner({"docker version": VERSION, "docker info": INFO, **toolkit}), ()))
    assert "1.17.4 installed, but the daemon does not know it" in made["container toolkit"].found


def test_a_card_containers_can_have(tmp_path):
    runtime = with_info(Runtimes={"runc": {}, "nvidia": {}}, DefaultRuntime="nvidia")
    made = asked(True, docker_version=VERSION, docker_info=runtime)
    assert made["container toolkit"].found.startswith("runtime nvidia (default)")
    (tmp_path / "nvidia.yaml").write_text("kind: nvidia.com/gpu\n")
    runner = RecordedRunner(
        {"docker version": VERSION, "docker info": INFO, "nvidia-ctk": Ran(0, recorded("nvidia_ctk_version.out"))}
    )
    made = by_name(checks(True, runner, (tmp_path,)))
    assert (made["container toolkit"].verdict, made["container toolkit"].minimum) == ("ok", "1.12")
    assert "CDI nvidia.com/gpu" in made["container toolkit"].found
    discovered = with_info(DiscoveredDevices=[{"Source": "cdi", "ID": "nvidia.com/gpu=0"}])
    assert asked(True, docker_version=VERSION, docker_info=discovered)["container toolkit"].verdict == "ok"
    desktop = with_info(OperatingSystem="Docker Desktop", KernelVersion="5.15.146.1-microsoft-standard-WSL2")
    assert "Docker Desktop" in asked(True, docker_version=VERSION, docker_info=desktop)["container toolkit"].found


def test_room_for_images_is_that_of_the_daemons_disk(tmp_path):
    made = asked(False, docker_version=VERSION, docker_info=with_info(DockerRootDir=str(tmp_path)))
    assert str(tmp_path) in made["images"].found
