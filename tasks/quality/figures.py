"""Figures of a written version: what its gate judges, and what its manifest is made of."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from tasks.quality.profile import TableProfile
from tasks.store.manifest import ColumnSpec, FileEntry, RowBalance
from tasks.store.reservation import Reservation


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures that the gates of all kinds judge; a kind of dataset adds more.

    Attributes:
        schema: Schema of the data files.
        profile: Profile of the data files.
        balances: Row balances.

    """

    schema: pa.Schema
    profile: TableProfile
    balances: tuple[RowBalance, ...]


@dataclass(frozen=True, kw_only=True)
class Written(Figures):
    """Result of a job that wrote a version, before the commit.

    Attributes:
        reservation: Reservation of the version.
        files: Data files.
        rejected_files: Files of rejected rows.
        timings: Seconds of each stage.

    """

    reservation: Reservation
    files: tuple[FileEntry, ...]
    rejected_files: tuple[FileEntry, ...]
    timings: dict[str, float]

    @property
    def columns(self) -> tuple[ColumnSpec, ...]:
        """Schema of the data files, for the manifest."""
        return tuple(ColumnSpec(name=f.name, type=str(f.type), nullable=f.nullable) for f in self.schema)
