"""The files under deployments/ and the compose file: whole, without a default secret, and of one mind."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import Flow

ROOT = Path(__file__).parents[1]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())["deployments"]
EXAMPLE = dict(re.findall(r"^([A-Z_]+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda one: one["entrypoint"])
def test_a_deployment_names_a_flow_and_settings_that_there_are(
    deployment: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _, name = deployment["entrypoint"].rpartition(".")
    flow = getattr(importlib.import_module(module), name)
    assert isinstance(flow, Flow)
    assert deployment["concurrency_limit"]["collision_strategy"] == "ENQUEUE"
    flow.validate_parameters(deployment["parameters"])
    for trigger in deployment.get("triggers", ()):
        flow.validate_parameters(trigger["parameters"])
    for schedule in deployment.get("schedules", ()):
        assert schedule["timezone"], "a schedule without a time zone moves with the server's"


def test_images_are_pinned() -> None:
    for name, service in SERVICES.items():
        assert re.fullmatch(r"[\w./-]+:v?\d[\w.-]*", service["image"]), f"{name}: {service['image']}"


def test_what_others_wait_for_has_a_health_check() -> None:
    for name, service in SERVICES.items():
        for other, wait in service.get("depends_on", {}).items():
            if wait["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[other], f"{name} waits for {other}, which says nothing of its health"


def test_ports_are_open_on_this_machine_only() -> None:
    assert all(port.startswith("127.0.0.1:") for service in SERVICES.values() for port in service.get("ports", ()))


def test_no_secret_has_a_default() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    for name in ("POSTGRES_PASSWORD", "AWS_SECRET_ACCESS_KEY", "PREFECT_SERVER_API_AUTH_STRING", "RAY_AUTH_TOKEN"):
        assert f"${{{name}:?" in text, f"compose starts without {name}"
        assert EXAMPLE[name] == "", f"the example gives {name} a value"
    assert {name for name in re.findall(r"\$\{([A-Z_]+)", text) if ":?" in text.split("${" + name, 1)[1][:3]} <= {
        *EXAMPLE
    }


def test_the_environment_is_not_in_the_repository() -> None:
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()
    assert not (ROOT / ".env").exists() or os.environ.get("CI") is None


def test_the_scripts_parse() -> None:
    subprocess.run(["sh", "-n", ROOT / "deployments" / "setup.sh"], check=True)
    assert "USER pipelines" in (ROOT / "deployments" / "Dockerfile").read_text()
