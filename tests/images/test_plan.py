"""What a plan takes from the version before, and how the flow goes on when another run was faster."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flows import image_augmentation as module
from tasks.cli.commands import run as run_command
from tasks.images import plan as plan_module
from tasks.images.config import ImageAugmentationConfig
from tasks.images.plan import plan_images, read_unit, read_units
from tasks.io.errors import CorruptVersion, VersionConflict
from tasks.store import versions
from tests.store.publishing import manifest_of, write

DATASET = "training-datasets/images"


def publish(root: str, run_id: str, classes: dict[str, int]) -> None:
    reservation = versions.reserve(root, DATASET, run_id)
    manifest = manifest_of(reservation, write(reservation))
    versions.commit(reservation, manifest.model_copy(update={"definition": {"classes": classes}}))


def configured(tmp_path: Path, *classes: str) -> ImageAugmentationConfig:
    for name in classes:
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "images" / name / "1.png")
    return ImageAugmentationConfig(root=str(tmp_path / "root"), images=str(tmp_path / "images"))


def test_a_version_that_gives_one_id_to_two_classes_has_the_cure_that_its_error_names(tmp_path: Path) -> None:
    config = configured(tmp_path, "cat", "emu")
    publish(config.root, "good", {"cat": 0, "dog": 1})
    publish(config.root, "clash", {"cat": 0, "dog": 1, "bee": 2, "cow": 2})

    def plan() -> Any:
        return plan_images(config, versions.reserve(config.root, DATASET, "run"), versions.latest(config.root, DATASET))

    with pytest.raises(CorruptVersion, match=r"images v2: classes bee, cow have the same id, 2.*Withdraw it") as caught:
        plan()
    command = str(caught.value).partition("python3 -m flows.feature_store ")[2]
    assert run_command(command.split()) == 0
    planned = plan()
    assert (planned.base, planned.classes) == (1, {"cat": 0, "dog": 1, "emu": 2})


def test_the_footer_of_a_plan_grows_with_its_images_not_with_its_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each task parses it: with a row group a unit, twice as many units took four times as long."""
    config = configured(tmp_path, "cat")
    for number in range(2, 41):
        Image.new("L", (8, 8), number).save(tmp_path / "images" / "cat" / f"{number}.png")
    monkeypatch.setattr(plan_module, "PLAN_ROW_GROUP", 16)
    for units, together, cut in (
        (20, 8, config.model_copy(update={"images_per_file": 2})),
        (2, 1, config.model_copy(update={"images_per_file": 20})),
    ):
        planned = plan_images(cut, versions.reserve(cut.root, f"{DATASET}-{units}", "run"), None)
        assert planned.units == units
        assert pq.ParquetFile(planned.uri).num_row_groups == -(-units // together)
        whole = pq.read_table(planned.uri)
        size = cut.images_per_file
        rows = list(read_units(planned.uri, range(units), size))
        assert pa.concat_tables(rows).equals(whole)
        assert all(len(unit) == size for unit in rows)
        assert read_unit(planned.uri, units - 1, size).equals(rows[-1])
        assert list(read_units(planned.uri, [1, 0], size)) == [rows[1], rows[0]]


class Step:
    """A task of the flow that only says that it was done."""

    def __init__(self, done: list[str], name: str, *results: Any) -> None:
        self._done, self._name, self._results = done, name, list(results)

    def __call__(self, *_: Any, **_more: Any) -> Any:
        self._done.append(self._name)
        return self._results.pop(0) if len(self._results) > 1 else self._results[0]

    def submit(self, *arguments: Any) -> Any:
        return SimpleNamespace(result=lambda: self(*arguments))


@pytest.mark.parametrize("lost", [0, 2, 3])
def test_a_run_that_was_overtaken_plans_anew_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    config = ImageAugmentationConfig(root=str(tmp_path))
    done: list[str] = []
    steps = {
        "prepare_images": [config],
        "reserve_versions": [[SimpleNamespace(committed=False, dataset=DATASET)]],
        "plan_run": [None],
        "augment": [None],
        "validate_images": [None],
        "publish_versions": [*[[]] * lost, ["published"]],
    }
    for name, results in steps.items():
        monkeypatch.setattr(module, name, Step(done, name, *results))
    monkeypatch.setattr(module, "run_record", lambda: None)
    monkeypatch.setattr(module, "running", nullcontext)  # nothing is retried
    if lost == module.TRIES:
        with pytest.raises(VersionConflict, match=r"images: other runs published first each of 3 times.*one run at a"):
            module.image_augmentation.fn(config)
    else:
        assert module.image_augmentation.fn(config) == ["published"]
    turn = [*steps][1:]
    assert done == ["prepare_images", *turn * min(lost + 1, module.TRIES)]
