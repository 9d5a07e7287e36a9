"""Kinds of datasets: how the rows of each are made again and explained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tasks.audit.explained import Explanation
from tasks.audit.replay_rows import Answer, replay_table
from tasks.core import layout
from tasks.core.errors import InputError
from tasks.core.manifest import Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Programs for one kind of dataset.

    Attributes:
        replay: Makes rows again and compares them. It takes the root of the store, the manifest, and size and seed of
            the sample; raises ConfigError if this code can't use the version's configuration, and CorruptVersion if a
            stored file has the right digest and can't be read.
        explain: Explains where a row comes from, what was done to it, and who has it. It takes the root of the store,
            the manifest, the key as it was typed, and the value of `option`; raises InputError if the version has no
            such row and has rejected none, and ConfigError if the key or the value can't be one.
        option: What may be given beside a key: the time of a row (at), or a file to draw a picture to (picture).
        code: Packages whose code makes a version.
        declared: Whether the user declares what a version holds, so that the digest of its code includes that.

    """

    replay: Callable[[str, Manifest, int, int], Answer]
    explain: Callable[[str, Manifest, str, str | None], Explanation]
    option: str = "at"
    code: tuple[str, ...]
    declared: bool = False


def kind_of(manifest: Manifest) -> Kind:
    """Return the kind of a version; the modules of the other kinds aren't loaded.

    Raises:
        InputError: it is of none that is known here.

    """
    match layout.kind(manifest.dataset):
        case "features":
            from tasks.audit.explain_features import explain_features
            from tasks.audit.replay_features import FeaturesAgain

            replay = partial(replay_table, FeaturesAgain)
            return Kind(replay=replay, explain=explain_features, code=("core", "features"), declared=True)
        case "training-set":
            from tasks.audit.explain_training_row import explain_training_row
            from tasks.audit.replay_training import TrainingSetAgain

            replay, code = partial(replay_table, TrainingSetAgain), ("core", "features", "serving")
            return Kind(replay=replay, explain=explain_training_row, code=code, declared=True)
        case "images":
            from tasks.audit.explain_image import explain_image
            from tasks.audit.replay_images import replay_images

            return Kind(replay=replay_images, explain=explain_image, option="picture", code=("core", "images"))
        case "streaming-copy":
            from tasks.audit.explain_sample import explain_sample
            from tasks.audit.replay_copies import replay_copy

            return Kind(replay=replay_copy, explain=explain_sample, code=("core", "delivery"))
        case kind:
            raise InputError(
                f"{manifest.dataset} is of no kind that is known here ({kind}); name features, training sets, images "
                "or streaming-ready copies"
            )
