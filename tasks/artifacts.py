"""Prefect artifacts of a run: the validation report, the table of checks, and progress while a job runs.

Progress has one direction. The task that drives a Ray Data job runs in a Ray worker, which has no terminal; it keeps a
Prefect progress artifact up to date, for the UI. When a flow is run by hand at a terminal, its own process reads those
artifacts back (`show_progress`) and draws bars from them, so that both show the same figures.
"""

import contextvars
import datetime as dt
import enum
import hashlib
import math
import re
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast
from uuid import UUID

import httpx
import numpy as np
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterType
from prefect.client.schemas.objects import Artifact
from prefect.client.schemas.sorting import ArtifactSort
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import PrefectException
from prefect.logging import get_logger

from tasks.io.errors import ConfigError

MAX_MARKDOWN_BYTES = 1_000_000  # the API takes 20 MB, but browsers are slow with that much
MAX_TABLE_ROWS = 500
MAX_CELL_CHARACTERS = 500
UPDATE_SECONDS = 2.0
PAGE = 200

_PICTURE = re.compile(r"!\[([^\]]*)\]\(data:[^)]*\)")


def artifact_slug(name: str) -> str:
    """Turn a name into an artifact key: lower case letters, digits and dashes, the same for the same name.

    `feature-store/customer-features` gives `feature-store-customer-features`. If letters are lost ('größe',
    '画像'), a digest of the name keeps different names apart.

    Raises:
        ConfigError: the name is empty.
    """
    if not name.strip():
        raise ConfigError(f"an artifact needs a name; got {name!r}")
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^a-z0-9]+", "-", ascii_name.lower()).strip("-")
    if not name.isascii() or not slug:
        slug = f"{slug}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}".strip("-")
    return slug


def publish_report(dataset_key: str, markdown: str, checks: list[dict[str, Any]], link: str | None = None) -> None:
    """Show a validation report in the current flow or task run, as a new version of the dataset's artifacts.

    `<slug>-report` holds the text and `<slug>-checks` the table. `link` is the location of the whole report: a web
    address also becomes `<slug>-link`, any other location is named under the text, because a browser can't open it.

    Raises:
        ConfigError: the dataset key is empty.
        httpx.HTTPError: the API can't be reached or refuses the artifact.
    """
    slug = artifact_slug(dataset_key)
    clickable = link is not None and link.startswith(("http://", "https://"))
    if link is not None:
        markdown += f"\n\nFull report: [{link}]({link})\n" if clickable else f"\n\nFull report: `{link}`\n"
    create_markdown_artifact(_capped(markdown), key=f"{slug}-report", description=f"Validation of {dataset_key}")
    publish_table(f"{slug}-checks", checks, f"Checks of {dataset_key}")
    if link is not None and clickable:
        create_link_artifact(link, link_text="Full report", key=f"{slug}-link", description=f"Report of {dataset_key}")


def publish_table(key: str, rows: list[dict[str, Any]], description: str) -> None:
    """Show a table in the current flow or task run; only the beginning of a long one, with a note.

    Raises:
        ConfigError: the key is empty.
        httpx.HTTPError: the API can't be reached or refuses the artifact.
    """
    shown = [json_safe(row) for row in rows[:MAX_TABLE_ROWS]]
    left_out = f" (the first {len(shown)} of {len(rows)})" if len(rows) > len(shown) else ""
    create_table_artifact(shown, key=artifact_slug(key), description=description + left_out)


def publish_cluster(nodes: list[dict[str, Any]], dashboard: str | None) -> None:
    """Show the Ray cluster of the current run: its nodes, and a link to its dashboard.

    Raises:
        httpx.HTTPError: the API can't be reached or refuses the artifact.
    """
    publish_table("ray-cluster", nodes, "Nodes of the Ray cluster as the run began.")
    if dashboard is not None:
        create_link_artifact(dashboard, link_text="Ray dashboard", key="ray-dashboard", description="Ray's dashboard.")


def json_safe(value: Any) -> Any:
    """Convert a value for JSON and the UI's table; the UI shows no table at all if one cell is infinite.

    NaN becomes null, infinities 'inf' and '-inf', dates ISO text, numpy values plain ones, long text is cut, and
    anything else its `str`.
    """
    if isinstance(value, np.generic) and not isinstance(value, np.datetime64 | np.timedelta64):
        value = value.item()  # for a datetime64 it may be a bare count of nanoseconds
    safe: Any = value
    match value:
        case None | bool() | int():
            pass
        case enum.Enum():
            safe = json_safe(value.value)
        case float():
            safe = None if math.isnan(value) else value if math.isfinite(value) else str(value)
        case Mapping():
            safe = {str(key): json_safe(item) for key, item in value.items()}
        case list() | tuple():
            safe = [json_safe(item) for item in value]
        case np.ndarray():
            safe = json_safe(value.tolist())
        case set() | frozenset():
            safe = sorted((json_safe(item) for item in value), key=str)
        case _:
            text = value.isoformat() if isinstance(value, dt.date | dt.time) else str(value)
            safe = text if len(text) <= MAX_CELL_CHARACTERS else text[: MAX_CELL_CHARACTERS - 1] + "…"
    return safe


def read_artifacts(flow_run_id: UUID, kind: str | None = None) -> list[Artifact]:
    """Return the artifacts of a flow run and its tasks, oldest first; `kind` is markdown, table or progress.

    Raises:
        httpx.HTTPError: the API can't be reached or refuses the request.
    """
    wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
    if kind is not None:
        wanted.type = ArtifactFilterType(any_=[kind])
    found: list[Artifact] = []
    with get_client(sync_client=True) as client:
        while len(found) % PAGE == 0:
            page = client.read_artifacts(
                artifact_filter=wanted, sort=ArtifactSort.ID_DESC, limit=PAGE, offset=len(found)
            )
            found += page
            if not page:
                break
    return sorted(found, key=lambda artifact: (str(artifact.created), str(artifact.id)))


class Progress:
    """Counter of finished units that shows the progress: at most one update per UPDATE_SECONDS, plus the last.

    Call it with the number of units done since the last call. Reporting never fails the job: if the API can't be
    reached, the figure is only late.
    """

    def __init__(self, title: str, total: int | None, unit: str) -> None:
        self.title = title
        self.total = total
        self.unit = unit
        self.done = 0
        self._started = self._shown = time.monotonic()
        self._artifact: UUID | None = None

    def __call__(self, n: int = 1) -> None:
        """Count `n` more units as done."""
        self.done += n
        if time.monotonic() - self._shown >= UPDATE_SECONDS:
            self.show(self._sentence())

    def show(self, sentence: str, percent: float | None = None) -> None:
        """Write the state to the progress artifact of the current run, if there is a run."""
        self._shown = time.monotonic()
        if TaskRunContext.get() is None and FlowRunContext.get() is None:
            return
        if percent is None:
            percent = 100 * min(1.0, self.done / self.total) if self.total else 0.0
        try:
            if self._artifact is None:
                self._artifact = cast(UUID, create_progress_artifact(percent, description=sentence))
            else:
                update_progress_artifact(self._artifact, percent, description=sentence)
        except (httpx.HTTPError, PrefectException) as error:
            get_logger(__name__).warning("Progress of %r isn't shown: %s", self.title, error)

    def _sentence(self) -> str:
        of_total = f" of {self.total:,}" if self.total is not None else ""
        rate = self.done / max(time.monotonic() - self._started, 1e-3)
        slow = f"{rate:.2g}" if rate < 10 else f"{rate:,.0f}"
        return f"{self.title}: {self.done:,}{of_total} {self.unit}, {slow} a second"


@contextmanager
def progress(title: str, total: int | None = None, unit: str = "rows") -> Generator[Progress]:
    """Show the progress of a job; yield a function to call with the units done since the last call.

    `with progress("Computing customer features", total=rows) as advance: advance(1_000)`. Without a total, the count
    is shown and the bar stays empty until the end. If the job fails, the bar stays at its place and shows the failure.
    """
    job = Progress(title, total, unit)
    job.show(f"{title}: started")
    try:
        yield job
    except BaseException as error:
        job.show(f"{job._sentence()}; stopped by {type(error).__name__}")
        raise
    job.show(f"{job._sentence()}; done", percent=100.0)


def show_progress(flow_run_id: UUID) -> AbstractContextManager[None]:
    """Show bars for the progress artifacts of a flow run, on stderr if that is a terminal; otherwise do nothing."""
    return _bars(flow_run_id) if sys.stderr.isatty() else nullcontext()


@contextmanager
def _bars(flow_run_id: UUID) -> Generator[None]:
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    bars = Bars(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip
    known: dict[UUID, TaskID] = {}

    def look() -> None:
        try:
            artifacts = read_artifacts(flow_run_id, kind="progress")
        except (httpx.HTTPError, PrefectException):
            return  # retry at the next look
        for artifact in artifacts:
            bar = known.get(artifact.id)
            if bar is None:
                known[artifact.id] = bar = bars.add_task("", total=100)
            percent = float(str(artifact.data))
            bars.update(bar, completed=percent, description=artifact.description or "", visible=percent < 100)

    with bars, repeated(look, UPDATE_SECONDS / 2, patience=UPDATE_SECONDS):
        yield


@contextmanager
def repeated(look: Callable[[], None], seconds: float, patience: float | None = None) -> Generator[None]:
    """Call a function every so many seconds, in a thread beside the block.

    Args:
        look: Function to call.
        seconds: Time between two calls.
        patience: Seconds to wait for a running call at the end; None: until it has ended.
    """
    stop = threading.Event()

    def follow() -> None:
        while not stop.wait(seconds):
            look()

    # A new thread starts with an empty context: without the copy it would know neither the run nor the API's address.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(follow,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(patience)


def _capped(markdown: str) -> str:
    """Shorten text to MAX_MARKDOWN_BYTES: pictures first (half a picture is useless), then the last lines."""
    if len(markdown.encode()) <= MAX_MARKDOWN_BYTES:
        return markdown
    markdown = _PICTURE.sub(r"*(picture left out for its size: \1)*", markdown)
    data = markdown.encode()
    if len(data) <= MAX_MARKDOWN_BYTES:
        return markdown
    notice = "\n\n*(cut for its size; the full report has the rest)*\n"
    kept = data[: MAX_MARKDOWN_BYTES - len(notice.encode())].decode(errors="ignore")
    return (kept.rpartition("\n")[0] or kept) + notice
