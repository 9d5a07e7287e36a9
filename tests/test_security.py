"""What comes with the data stays data, and what is secret stays in the environment.

Paths, deserialisation and import paths are in test_security_paths.py, the compose file is in test_deployment_files.py.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pytest

from flows.feature_store import feature_store
from flows.image_augmentation import image_augmentation
from tasks.artifacts import read_artifacts
from tasks.features.config import FeatureStoreConfig
from tasks.features.standard import write_sample as write_shop
from tasks.images.config import Augmentation, ImageAugmentationConfig
from tasks.images.sample import write_sample as write_images
from tasks.io import storage
from tasks.store import layout
from tests.conftest import new_bucket
from tests.processes import own_home, shell_environment

ATTACK = "document.documentElement.dataset.pwned = 1"
PAYLOADS = (
    f"<script>{ATTACK}</script>",
    f'"><img src=x onerror="{ATTACK}">',
    f"</title></style></svg><svg onload='{ATTACK}'>",
    f"[link](javascript:{ATTACK}) `{{{{7*7}}}}` | a | b",
    "&lt;script&gt; already escaped",
)
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class _Page(HTMLParser):
    """What a browser would make of a page: its elements, what could run, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.dangers: list[str] = []
        self.text = ""
        self.feed_to_text = True

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.feed_to_text = tag not in ("style", "script")
        if tag in ("script", "iframe", "object", "embed", "base", "form", "link"):
            self.dangers.append(f"<{tag}>")
        for name, value in attrs:
            if name.startswith("on") or "javascript:" in (value or "").lower().replace("\n", ""):
                self.dangers.append(f"<{tag} {name}={value!r}>")

    def handle_data(self, data: str) -> None:
        self.text += data if self.feed_to_text else ""


def dangers(html: str) -> tuple[list[str], str]:
    page = _Page()
    page.feed(html)
    return page.dangers, page.text


def opened(page: Path) -> str:
    """The document as it stands in a browser once its scripts have run."""
    assert BROWSER is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent}/browser"]
    command = [BROWSER, *options, "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.fixture(scope="module")
def pages(stack: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Reports and artifacts of flows whose data attacks the reader: HTML and markdown by name."""
    folder = tmp_path_factory.mktemp("attack")
    root = str(folder / "root")
    pictures = write_images(str(folder / "pictures"), 30, 0)
    labels = Path(pictures["labels"])
    with labels.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = sorted({row["class_name"] for row in rows})
    for row in rows:
        row["class_name"] = PAYLOADS[names.index(row["class_name"]) % len(PAYLOADS)]
    with labels.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    small = {"augmentation": Augmentation(size=16, variants=1), "validation_share": 0.3}
    images = image_augmentation(ImageAugmentationConfig(root=root, **pictures, **small), return_state=True)

    shop = write_shop(str(folder / "shop"), 2_000, 0)
    [products] = storage.list_files(shop["products"])
    frame = pl.read_parquet(products.uri)
    payloads = pl.Series("category", [PAYLOADS[row % len(PAYLOADS)] for row in range(frame.height)])
    frame.with_columns(payloads, brand=payloads).write_parquet(products.uri)
    thresholds = {"thresholds": {"null_fail": 1.0, "orphan_fail": 1.0}}
    features = feature_store(FeatureStoreConfig(root=root, **shop, **thresholds), return_state=True)
    assert images.is_completed(), images.message
    assert features.is_completed(), features.message

    found = {}
    for dataset in (layout.image_dataset("images"), layout.feature_dataset("product-features")):
        uri = layout.join(layout.version_uri(root, dataset, 1), layout.REPORT_HTML)
        found[f"{dataset}.html"] = storage.read_bytes(uri).decode()
    for state in (images, features):
        for artifact in read_artifacts(state.state_details.flow_run_id):
            if artifact.type == "markdown":
                found[f"{artifact.key}.md"] = str(artifact.data)
    return found


def test_markup_in_the_data_is_text_in_every_report(pages: dict[str, str]) -> None:
    html = {name: text for name, text in pages.items() if name.endswith(".html")}
    assert len(html) == 2
    for name, text in html.items():
        found, shown = dangers(text)
        assert found == [], f"{name} has what could run"
        assert "<script>document" in shown, f"{name} doesn't show the data as it is"
    for name, text in pages.items():
        if name.endswith(".md"):
            assert "<script" not in text, name
            assert "<img src=x" not in text, name
            assert "](javascript:" not in text, name


def test_the_check_of_pages_can_fail() -> None:
    for payload in PAYLOADS[:3]:
        assert dangers(f"<html><body><p>{payload}</p></body></html>")[0]
    assert dangers('<a href="java\nscript:alert(1)">x</a>')[0]
    assert dangers("<p>&lt;script&gt;</p>") == ([], "<script>")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_no_script_of_the_data_runs_in_a_browser(pages: dict[str, str], tmp_path: Path) -> None:
    """Also without the page's own Content-Security-Policy, which would stop a script that got through."""
    bare = tmp_path / "bare.html"
    bare.write_text(f"<html><body><p>{PAYLOADS[0]}</p></body></html>")
    assert "data-pwned" in opened(bare).partition("<body")[0], "the attack itself doesn't work"
    for name, text in pages.items():
        if name.endswith(".html"):
            page = tmp_path / "page.html"
            without = text.replace('http-equiv="Content-Security-Policy"', 'name="was-a-policy"')
            assert without != text, "the page has no Content-Security-Policy"
            page.write_text(without)
            assert "data-pwned" not in opened(page).partition("<body")[0], name


SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIACANARY0123456789",
    "AWS_SECRET_ACCESS_KEY": "canary/secret+8d1f4c2a9b7e6f5031",
    "AWS_SESSION_TOKEN": "canary-session-token-5f2b8e1c",
    "RAY_AUTH_TOKEN": "canary0ray0token0a1b2c3d4e5f60718293a4b5c6d7e8f90",
    "PREFECT_API_AUTH_STRING": "canary-user:canary-password-7c6d",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "fails",
    [pytest.param(False, id="a good run"), pytest.param(True, id="a failed run", marks=pytest.mark.nightly)],
)
def test_credentials_are_nowhere_but_in_the_environment(s3_url: str, tmp_path: Path, fails: bool) -> None:
    """Neither in what the run prints and logs, nor on storage, in Prefect's database, or in Ray's session."""
    root = new_bucket(s3_url)
    home = own_home(tmp_path / "home")
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as ray_folder:  # paths of sockets must be short
        environment = {**shell_environment(home), **SECRETS, "RAY_TMPDIR": ray_folder, "AWS_ENDPOINT_URL": s3_url}
        options = ["--root", root, "--sample-transactions", "2000", "--debug"]
        options += ["--transactions", f"{root}/nothing-here"] if fails else []
        done = subprocess.run(
            [sys.executable, "-m", "flows.feature_store", *options],
            env=environment,
            capture_output=True,
            check=False,
            timeout=280,
        )
        places = {"stdout": done.stdout, "stderr": done.stderr, **_files(Path(ray_folder)), **_files(home)}
    assert (done.returncode != 0) == fails, done.stderr.decode()
    for info in storage.list_files(root, include_hidden=True):
        places[info.uri] = storage.read_bytes(info.uri)
    assert any("prefect.db" in name and b"feature-store" in data for name, data in places.items()), "no database"
    assert any("/logs/" in name for name in places), "Ray's logs aren't looked at"
    assert any(name.endswith("_manifest.json") for name in places) != fails
    for name, data in places.items():
        for variable, secret in SECRETS.items():
            for part in (secret, *secret.split(":")[1:]):
                assert part.encode() not in data, f"{name} has {variable}"


def _files(folder: Path) -> dict[str, bytes]:
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place) / name
            if path.is_file():  # Ray's sockets are none
                found[str(path)] = path.read_bytes()
    return found
