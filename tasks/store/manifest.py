"""Manifest of a version: the values that its manifest and its report are made of, and its long lists of files.

Frozen pydantic models, so that the JSON beside the data has one schema, checked on reading as on writing.

A manifest names its data files, rejected files and side files, and the files of its inputs. Where these are more than
`MOST_INLINE` together, they are the rows of one Parquet file, `_files/part-00000-a<attempt>.parquet`, whose digest is
in the manifest:

    list    string  'data', 'rejected', 'side' or 'input'
    input   int32   place of the input in the manifest's inputs, from 0; null in the other lists
    path    string  relative to the version's directory; of an input: location of the file
    rows    int64   null for an input
    bytes   int64
    digest  string  with its method as prefix; of an input: its fingerprint
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from tasks.io import storage
from tasks.io.errors import BalanceError
from tasks.io.hashing import PATTERN, digest
from tasks.store import layout

MANIFEST_FORMAT = 1
SUPERSEDED = "superseded"
"""Name of the check that fails if another run has published first from the same base version."""

Verdict = Literal["pass", "warn", "fail"]
Status = Literal["published", "rejected"]
Outcome = Literal["refused", "warned", "blind", "not applicable"]
Count = Annotated[int, Field(ge=0)]


class Record(BaseModel):
    """Base of all values kept as JSON: immutable, and unknown fields are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


def _inside(path: str) -> str:
    fault = layout.escape_of(path)
    if fault is not None:
        raise ValueError(f"{path!r} {fault}: a version's files are inside of its directory")
    return path


class FileEntry(Record):
    """Data file of a version."""

    path: Annotated[str, AfterValidator(_inside)] = Field(description="Path relative to the version's directory.")
    rows: Count = Field(description="Number of rows.")
    bytes: Count = Field(description="Size in bytes.")
    digest: str = Field(
        pattern=f"^{PATTERN}$", description="Digest of the file's bytes, hexadecimal, behind its method: 'blake3:…'."
    )


class ColumnSpec(Record):
    """Column of the written schema."""

    name: str = Field(description="Column name.")
    type: str = Field(description="Arrow type, as pyarrow prints it.")
    nullable: bool = Field(default=True, description="Whether the schema allows nulls.")


class RowBalance(Record):
    """Balance of the rows of one source or stage: in = out + rejected + filtered + deduplicated.

    That this adds up proves little: code that loses a row may also forget to count it. So the same figures are counted
    a second time elsewhere, and compared by `check_equal`: rows of a file by its Parquet footer, rows in transit by the
    shuffle, rows written and rejected by the footers of the files that the manifest will list.
    """

    name: str = Field(description="What was counted, such as 'transactions' or 'customer-features'.")
    rows_in: Count = Field(description="Rows read.")
    rows_out: Count = Field(description="Rows used or written.")
    rejected: dict[str, Count] = Field(
        default_factory=dict, description="Rows rejected, by reason; kept in _rejected/."
    )
    filtered: dict[str, Count] = Field(default_factory=dict, description="Rows left out by intent, by reason.")
    deduplicated: Count = Field(default=0, description="Exact duplicates of a row that was kept.")

    @property
    def missing(self) -> int:
        """Rows that are not accounted for (negative: rows that appeared); 0 if the rows balance."""
        accounted = self.rows_out + sum(self.rejected.values()) + sum(self.filtered.values()) + self.deduplicated
        return self.rows_in - accounted

    def check(self) -> None:
        """Raise `BalanceError` with all the figures unless the rows balance."""
        if self.missing:
            raise BalanceError(
                f"{self.name}: rows don't balance: {self.rows_in} in, {self.rows_out} out, "
                f"{sum(self.rejected.values())} rejected, {sum(self.filtered.values())} filtered, "
                f"{self.deduplicated} deduplicated: {self.missing:+d} unaccounted for"
            )


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


class Histogram(Record):
    """Counts of finite values between consecutive edges; each bin holds its left edge, the last bin both."""

    edges: tuple[float, ...] = Field(description="Bin edges, ascending, one more than counts (empty when no value).")
    counts: tuple[int, ...] = Field(description="Values in each bin.")


class ColumnProfile(Record):
    """Profile of one column over a whole version."""

    kind: Literal["numeric", "boolean", "string", "temporal", "other"] = Field(description="Kind of column.")
    count: Count = Field(description="Rows, nulls included.")
    nulls: Count = Field(default=0, description="Null values.")
    nans: Count = Field(default=0, description="NaN values (not counted as null).")
    infinities: Count = Field(default=0, description="Positive or negative infinities.")
    minimum: float | str | None = Field(default=None, description="Smallest finite value; ISO 8601 for times.")
    maximum: float | str | None = Field(default=None, description="Largest finite value; ISO 8601 for times.")
    mean: float | None = Field(default=None, description="Mean of the finite values.")
    std: float | None = Field(default=None, description="Sample standard deviation (n-1) of the finite values.")
    quantiles: dict[str, float] = Field(
        default_factory=dict, description="Quantiles of the finite values, by level ('0.25')."
    )
    distinct: Count | None = Field(default=None, description="Number of distinct values, exact when it is small.")
    distinct_exact: bool = Field(default=False, description="Whether `distinct` is exact.")
    top_values: tuple[tuple[str, int], ...] = Field(default=(), description="Most frequent values with their counts.")
    histogram: Histogram | None = Field(default=None, description="Fine histogram, the reference for drift.")


class CheckResult(Record):
    """Verdict of one rule."""

    name: str = Field(description="Rule, such as 'nulls' or 'drift'.")
    column: str | None = Field(default=None, description="Column it judged, if one.")
    verdict: Verdict = Field(description="pass, warn (published, but look) or fail (not published).")
    figure: float | str | None = Field(default=None, description="What was measured.")
    bound: str = Field(description="What was asked for, such as '≤ 0.1'.")
    message: str = Field(description="One sentence for a person.")


class Partition(Record):
    """Distribution of a version's rows over its files."""

    key: str = Field(description="Column whose stable hash, modulo `buckets`, is the number of a row's bucket.")
    buckets: int = Field(ge=1, description="Number of buckets, a power of two; bucket b is the file part-<b>.")


class GateResult(Record):
    """Verdict of the quality gate: the worst of its checks."""

    verdict: Verdict = Field(description="Worst verdict of all checks.")
    checks: tuple[CheckResult, ...] = Field(description="Every check that was made.")


class FaultResult(Record):
    """Result of a gate's self-test with one fault."""

    fault: str = Field(description="Name of the fault.")
    injected: str = Field(description="What was done to the sample, one sentence.")
    outcome: Outcome = Field(
        description="'refused' (a check failed), 'warned', 'blind' (no verdict changed) or 'not applicable'."
    )
    caught_by: tuple[str, ...] = Field(default=(), description="Checks whose verdict got worse, worst first.")
    message: str = Field(description="One sentence for a person: the worst check's, or why nothing noticed.")


class InputFile(Record):
    """Source file at the time it was read."""

    uri: str = Field(description="Where the file was.")
    bytes: Count = Field(description="Size in bytes.")
    fingerprint: str = Field(description="Digest or ETag, with its method as prefix.")


class InputRecord(Record):
    """Input of a version: raw files, or a published version of another dataset."""

    name: str = Field(description="Role, such as 'transactions'.")
    uri: str = Field(description="What the configuration named.")
    version: int | None = Field(default=None, description="Version, where the input is one of our datasets.")
    rows: Count | None = Field(default=None, description="Rows read.")
    files: tuple[InputFile, ...] = Field(default=(), description="Its files.")


class RunRecord(Record):
    """Run that made a version."""

    flow_run_id: str = Field(description="Prefect flow-run id, or another unique id where Prefect isn't used.")
    flow_run_name: str | None = Field(default=None, description="Prefect flow-run name.")
    deployment: str | None = Field(default=None, description="Prefect deployment, if one started the run.")
    attempt: int = Field(default=1, ge=1, description="Attempt under the same reservation, from 1.")


class ReportDigest(Record):
    """Validation report that belongs to a version."""

    json_sha256: str = Field(description="SHA-256 of _report.json.")
    html_sha256: str = Field(description="SHA-256 of _report.html.")


class Manifest(Record):
    """Complete record of a version. Its presence with status 'published' is the commit."""

    format: int = Field(default=MANIFEST_FORMAT, description="Version of this file's own schema.")
    dataset: str = Field(description="Dataset name, such as 'feature-store/customer-features'.")
    version: int = Field(ge=1, description="Version number N of vN.")
    status: Status = Field(description="'published', or 'rejected' by the quality gate.")
    created_at: dt.datetime = Field(description="When the manifest was made, UTC.")
    files: tuple[FileEntry, ...] = Field(description="Data files: readers read exactly these.")
    rejected_files: tuple[FileEntry, ...] = Field(default=(), description="Files of rejected rows.")
    side_files: tuple[FileEntry, ...] = Field(
        default=(), description="Files that tell more about the version, such as its inputs one by one."
    )
    file_lists: FileEntry | None = Field(
        default=None,
        description="Parquet file that holds all lists of files, of the inputs too, where they are long: they are "
        "empty here then. See tasks/store/manifest.py.",
    )
    columns: tuple[ColumnSpec, ...] = Field(description="Schema of the data files.")
    partition: Partition | None = Field(default=None, description="How the rows are spread over the files, if by key.")
    as_of: tuple[dt.datetime, ...] = Field(
        default=(), description="Times (UTC, ascending) that a feature version holds the features of."
    )
    balances: tuple[RowBalance, ...] = Field(description="Row balances of the sources and of the entities.")
    profile: dict[str, ColumnProfile] = Field(description="Profile of each column.")
    gate: GateResult = Field(description="The quality gate's verdict.")
    self_test: tuple[FaultResult, ...] = Field(
        default=(), description="What the gate made of faults that were injected into a sample of the version."
    )
    report: ReportDigest | None = Field(default=None, description="Digests of the validation report.")
    inputs: tuple[InputRecord, ...] = Field(description="What it was made from.")
    config: dict[str, Any] = Field(description="The full configuration of the run (no credentials).")
    definition: dict[str, Any] = Field(default_factory=dict, description="The declaration that was computed.")
    code_digest: str = Field(description="Digest of the code and definitions that computed it.")
    packages: dict[str, str] = Field(description="Versions of Python and of the libraries.")
    run: RunRecord = Field(description="The run that made it.")

    def __str__(self) -> str:
        """Return its name in sentences."""
        return f"{self.dataset} v{self.version}"

    def uri(self, root: str, *path: str) -> str:
        """Return the version's directory under a normalised root, or a file in it."""
        return layout.join(layout.version_uri(root, self.dataset, self.version), *path)

    @property
    def rows(self) -> int:
        """Number of rows in the data files."""
        return sum(file.rows for file in self.files)

    @property
    def companions(self) -> tuple[FileEntry, ...]:
        """Files beside the data, which stay if the version is rejected: rejected rows, side files, lists of files."""
        lists = () if self.file_lists is None else (self.file_lists,)
        return (*self.rejected_files, *self.side_files, *lists)

    @property
    def superseded(self) -> str | None:
        """Reason if the version gave way to another one with the same base version; else None."""
        return next((check.message for check in self.gate.checks if check.name == SUPERSEDED), None)

    def as_input(self, uri: str) -> InputRecord:
        """Return this version as the input of another; `uri` is its directory."""
        files = tuple(
            InputFile(uri=f"{uri}/{file.path}", bytes=file.bytes, fingerprint=file.digest) for file in self.files
        )
        return InputRecord(name=self.dataset, uri=uri, version=self.version, rows=self.rows, files=files)


MOST_INLINE = 500
_LISTS = {"data": "files", "rejected": "rejected_files", "side": "side_files"}
_INPUT = "input"
_SCHEMA = pa.schema(
    [
        pa.field("list", pa.string(), nullable=False),
        pa.field("input", pa.int32()),
        pa.field("path", pa.string(), nullable=False),
        pa.field("rows", pa.int64()),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("digest", pa.string(), nullable=False),
    ]
)


def lists_apart(manifest: Manifest) -> tuple[Manifest, bytes]:
    """Return a manifest in its stored form, and the contents of the file with its lists; b'' if they are short."""
    named = [(name, None, getattr(manifest, field)) for name, field in _LISTS.items()]
    of_inputs = [(_INPUT, place, one.files) for place, one in enumerate(manifest.inputs)]
    tables = [_table(*one) for one in (*named, *of_inputs)]
    table = pa.concat_tables(tables)
    if table.num_rows <= MOST_INLINE:
        return manifest, b""
    data = storage.parquet_bytes(table).to_pybytes()
    path = layout.side_name("files", manifest.run.attempt)
    entry = FileEntry(path=path, rows=table.num_rows, bytes=len(data), digest=digest(data))
    inputs = tuple(one.model_copy(update={"files": ()}) for one in manifest.inputs)
    emptied: dict[str, object] = dict.fromkeys(_LISTS.values(), ())
    return manifest.model_copy(update={**emptied, "inputs": inputs, "file_lists": entry}), data


def with_lists(uri: str, manifest: Manifest) -> Manifest:
    """Return a complete manifest, the inverse of `lists_apart`.

    Raises:
        ValueError: the file with the lists is missing, or isn't the one written with the manifest.
    """
    entry = manifest.file_lists
    if entry is None:
        return manifest
    try:
        data = storage.read_bytes(layout.join(uri, entry.path))
    except FileNotFoundError as error:
        raise ValueError(f"its lists of files, {entry.path}, are missing") from error
    if digest(data, entry.digest) != entry.digest:
        raise ValueError(f"its lists of files, {entry.path}, aren't those that it was written with")
    table = pq.read_table(pa.BufferReader(data), schema=_SCHEMA)
    lists = {
        field: tuple(
            FileEntry(path=path, rows=rows, bytes=size, digest=stated)
            for path, rows, size, stated in _rows(table, pc.equal(table["list"], name))
        )
        for name, field in _LISTS.items()
    }
    inputs = tuple(
        one.model_copy(
            update={
                "files": tuple(
                    InputFile(uri=path, bytes=size, fingerprint=stated)
                    for path, _, size, stated in _rows(table, pc.equal(table["input"], place))
                )
            }
        )
        for place, one in enumerate(manifest.inputs)
    )
    return manifest.model_copy(update={**lists, "inputs": inputs})


def _table(name: str, place: int | None, files: Sequence[FileEntry | InputFile]) -> pa.Table:
    own = [one for one in files if isinstance(one, FileEntry)]
    sources = [one for one in files if isinstance(one, InputFile)]
    columns = {
        "list": [name] * len(files),
        "input": [place] * len(files),
        "path": [*(one.path for one in own), *(one.uri for one in sources)],
        "rows": [*(one.rows for one in own), *(None for _ in sources)],
        "bytes": [one.bytes for one in files],
        "digest": [*(one.digest for one in own), *(one.fingerprint for one in sources)],
    }
    return pa.table(columns, schema=_SCHEMA)


def _rows(table: pa.Table, which: pa.ChunkedArray) -> Iterator[tuple[str, int, int, str]]:
    found = table.filter(which)
    yield from zip(*(found[name].to_pylist() for name in ("path", "rows", "bytes", "digest")), strict=True)
