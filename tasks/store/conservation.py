"""Conservation law on counts, checked independently of the stages: rows are counted in the files.

    in = out + rejected + filtered + deduplicated

A stage reports how many rows it took, kept and left out (`RowBalance`). That this adds up proves little: code that
loses a row may also forget to count it. So the same figures are counted a second time elsewhere and compared: rows of a
file by its Parquet footer, rows in transit by the shuffle, rows written and rejected by the footers of the files that
the manifest will list. A difference fails the run with both figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow.parquet as pq

from tasks.io import storage
from tasks.io.errors import BalanceError
from tasks.store import layout
from tasks.store.manifest import FileEntry, RowBalance

_READERS = 16


def check_equal(name: str, said: int, counted: int, what: str) -> None:
    """Raise `BalanceError` unless two counts of the same things are equal.

    Args:
        name: Name of the counted things, such as 'transactions'.
        said: First count.
        counted: Second count.
        what: Origin of the counts, with a place for the second figure: 'were sent to their buckets, {} arrived'.

    """
    if said != counted:
        raise BalanceError(f"{name}: {said} {what.format(counted)}: {said - counted:+d} unaccounted for")


def check_written(
    dataset: str,
    uri: str,
    files: Sequence[FileEntry],
    rejected: Sequence[FileEntry],
    balances: Sequence[RowBalance],
) -> None:
    """Compare the reports of a version's files with their contents.

    Every balance must add up, every file must hold as many rows as reported, and the files of rejected rows as
    many as the balances count.

    Args:
        dataset: Name, for messages.
        uri: Directory of the version.
        files: Data files.
        rejected: Files of rejected rows.
        balances: Balances of the rows.

    Raises:
        BalanceError: they differ; the message has both figures.

    """
    for balance in balances:
        balance.check()
    entries = [*files, *rejected]
    with ThreadPoolExecutor(_READERS) as readers:
        counted = list(readers.map(lambda entry: _rows(layout.join(uri, entry.path)), entries))
    for entry, rows in zip(entries, counted, strict=True):
        check_equal(f"{dataset}, {entry.path}", entry.rows, rows, "were reported as written, the file holds {}")
    reasons = sum(sum(balance.rejected.values()) for balance in balances)
    check_equal(dataset, reasons, sum(entry.rows for entry in rejected), "were rejected, _rejected/ holds {}")


def _rows(uri: str) -> int:
    with storage.open_input(uri) as source:
        return int(pq.read_metadata(source).num_rows)
