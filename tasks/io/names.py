"""Rules for names from the user, and the closest known name for an unknown one."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from difflib import get_close_matches

from tasks.io.errors import DefinitionError

COLUMN = r"[A-Za-z_][\w.-]*"
"""Pattern of a feature's name in a reference such as 'customer-features:total_spent'."""

_DATASET = re.compile(r"[a-z0-9]+([-_][a-z0-9]+)*")
_VERSION = re.compile(r"v[0-9]+")


def closest(name: str, known: Iterable[str]) -> str:
    """Return the end of an error sentence with the cure: the closest names, or all of a few."""
    names = list(known)
    close = get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(f"'{match}'" for match in close) + "?"
    return f"; known: {', '.join(sorted(names)) or 'none'}"


def check_dataset_name(what: str, name: str, taken: Collection[str] = ()) -> None:
    """Check a name that becomes a directory and a Prefect artifact's key.

    Args:
        what: Kind of thing that it names, for the message.
        name: The name.
        taken: Names that have another meaning there.

    Raises:
        DefinitionError: the name isn't allowed; the message has the rule and an allowed name.

    """
    plain = isinstance(name, str) and _DATASET.fullmatch(name)
    if plain and name not in taken and not _VERSION.fullmatch(name):
        return
    rule = "use lower-case letters, digits, single dashes or underscores"
    word = "-".join(re.findall(r"[a-z0-9]+", str(name).lower())) or what.rpartition(" ")[2]
    if plain:
        rule = f"it is kept for {'a version' if _VERSION.fullmatch(name) else 'something else in its place'}"
        word = f"my-{word}"
    raise DefinitionError(
        f"{what} name '{name}': {rule}, such as '{word}' (it becomes a directory and a Prefect artifact key)"
    )


def check_column_name(what: str, name: str, own: Collection[str] = ()) -> None:
    """Check the name of a feature, or of another column that is published beside features.

    Args:
        what: Owner of the name, for the message, such as "feature group 'x', feature".
        name: The name.
        own: Columns that the pipeline adds to the same rows.

    Raises:
        DefinitionError: it can't be used in a reference, or is in `own`; the message has an allowed name.

    """
    word = "_".join(re.findall(r"\w+", str(name))).strip("_")
    if not re.match(r"[A-Za-z]", word):
        word = f"feature_{word}" if word else "total_spent"
    if name in own:
        raise DefinitionError(
            f"{what} '{name}': the rows get a column '{name}' of ours ({', '.join(own)}), which would replace it; "
            f"rename it, such as 'own_{name}'"
        )
    if isinstance(name, str) and re.fullmatch(COLUMN, name) and not name.startswith("_"):
        return
    raise DefinitionError(
        f"{what} '{name}': begin with a letter and go on with letters, digits, '_', '.' or '-', such as '{word}', so "
        f"that models and look-ups can name it"
    )
