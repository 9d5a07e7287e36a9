"""Kinds of datasets: functions for making the rows of each again and for explaining them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tasks.audit.explained import Explanation
from tasks.audit.replay_rows import Again
from tasks.io.errors import InputError
from tasks.store import layout
from tasks.store.manifest import Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Programs for one kind of dataset.

    Attributes:
        again: Class that makes rows again and compares them.
        explain: Function that explains a row's origin, treatment and holders. It takes the root of the store,
            the manifest, the key as it was typed, and the value of `option`; raises InputError if the version has no
            such row and has rejected none, and ConfigError if the key or the value is invalid.
        option: Argument that may be given beside a key: `at`, the time of a row, or `picture`, a file to draw to.
        declared: True if the user declares a version's content, so that the digest of its code includes that.

    """

    again: type[Again]
    explain: Callable[[str, Manifest, str, str | None], Explanation]
    option: str = "at"
    declared: bool = False


def kind_of(manifest: Manifest) -> Kind:
    """Return the kind of a version; the modules of the other kinds aren't loaded.

    Raises:
        InputError: its kind is unknown.

    """
    match layout.kind(manifest.dataset):
        case "features":
            from tasks.audit.explain_features import explain_features
            from tasks.audit.replay_features import FeaturesAgain

            return Kind(again=FeaturesAgain, explain=explain_features, declared=True)
        case "training-set":
            from tasks.audit.explain_training_row import explain_training_row
            from tasks.audit.replay_training import TrainingSetAgain

            return Kind(again=TrainingSetAgain, explain=explain_training_row, declared=True)
        case "images":
            from tasks.audit.explain_image import explain_image
            from tasks.audit.replay_images import ImagesAgain

            return Kind(again=ImagesAgain, explain=explain_image, option="picture")
        case "streaming-copy":
            from tasks.audit.explain_sample import explain_sample
            from tasks.audit.replay_copies import CopyAgain

            return Kind(again=CopyAgain, explain=explain_sample)
        case kind:
            raise InputError(
                f"{manifest.dataset} is of no kind that is known here ({kind}); name features, training sets, images "
                "or streaming-ready copies"
            )
