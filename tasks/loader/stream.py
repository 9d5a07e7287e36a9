"""The loader: a published version as batches for one of several workers, in a reproducible order.

    with TrainingStream("s3://bucket/data/training-datasets/streaming-ready/customers", batch_size=1024) as stream:
        for epoch in range(10):
            for batch in stream:                                # {"features": …, "label": …, "sample_id": …, "mask": …}
                …
                checkpoint = {…, "stream": stream.state_dict()}

Guarantees:

- Over all workers each sample comes exactly once an epoch, and each worker gets as many batches as the others.
- The order depends on the version, the seed and the epoch alone. A worker's part of a step follows from its
  number: each reads about its share of the files.
- A state is the place of all workers together: any of them can save it, and any number of workers can resume from it,
  without losing or repeating a sample.
- A batch belongs to its receiver: nothing writes to it later.

A stream belongs to the process that opened it, which alone knows its place: it can't be sent to another one, and a
forked copy raises an error instead of waiting for a missing thread. It is a loader itself and needs no DataLoader;
where there must be one, `tasks.loader.torch_loader` has it, whose processes share the steps of one stream.

It runs in Ray Train's workers, under torchrun, and alone; it needs neither Ray nor, for numpy, PyTorch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Unpack

import numpy as np

from tasks.io.errors import ConfigError, InputError
from tasks.loader.arguments import one_of, truth_values, whole_number
from tasks.loader.batch_stream import Batch, BatchStream
from tasks.loader.grouping import GroupedSource, Grouping, Plan, Stretches, continued, grouping_of
from tasks.loader.options import Options
from tasks.loader.order import EpochOrder, Share, batch_count
from tasks.loader.sampling import Draws, distribution, weights_of
from tasks.loader.shards import memory_bytes
from tasks.loader.sources import Source, Takes, steps_at_once


class TrainingStream(BatchStream):
    """Batches of one split of a streaming-ready version for one worker.

    Args:
        uri: Directory of a version (…/v3), or of a dataset for its latest version.
        batch_size: Samples of a batch of each worker.
        balance: 'class' to draw each class equally often.
        weights: Weights by which samples are drawn: a mapping of classes, by name or number, to the weight of each of
            their samples; a pair of arrays (ids, weights), int64 and float64 (others have 1); 'weight': stored ones.
        replacement: False: no sample comes twice in an epoch. Then an epoch of weighted samples is as long as the
            proportions allow; balanced, each class comes as often as the smallest one.
        epoch_size: Samples of an epoch over all workers; None: as many as the split has. Epochs smaller than the split
            go on where the last one has ended.
        repeat: Samples of an epoch as a multiple of the split's.
        length_buckets: Longest length of each bucket, ascending: the sequences of a step, of all workers, are of one
            bucket, in rows as long as its bound. Those that are left at the end of an epoch fill its last steps, of
            several buckets. The order depends on world_size * batch_size, too.
        pack: Elements of a row that whole sequences fill: a batch has `batch_size` rows, 'segment' with the number of
            the sequence at each element, from 1 (0: padding), and 'position' in it, int32 (n, pack); 'length', 'label'
            and 'sample_id' are (n, most segments), 0 where a row has fewer. Epochs differ in length.
        options: Those of `BatchStream`.

    Drawn samples come as often as their weight says, rounded down or up in each epoch; so does each class.
    `distribution` tells more.

    Raises:
        ConfigError: an argument is invalid, or it isn't a streaming-ready version.
        VersionNotFound: there is no such published version.
        CorruptVersion: as for `BatchStream`; or the labels, weights or ids that are drawn by can't be read.

    """

    def __init__(
        self,
        uri: str | os.PathLike[str],
        *,
        batch_size: int,
        balance: Literal["class"] | None = None,
        weights: Mapping[Any, float] | tuple[Any, Any] | Literal["weight"] | None = None,
        replacement: bool = True,
        epoch_size: int | None = None,
        repeat: int = 1,
        length_buckets: Sequence[int] | None = None,
        pack: int | None = None,
        **options: Unpack[Options],
    ) -> None:
        truth_values(replacement=replacement)
        if balance is not None:
            one_of("balance", balance, ("class",))
        repeat = whole_number("repeat", repeat, "give how often the split makes up an epoch", least=1)
        if epoch_size is not None:
            epoch_size = whole_number("epoch_size", epoch_size, "an epoch has at least one sample", least=1)
            if repeat != 1:
                raise ConfigError(f"epoch_size = {epoch_size} and repeat = {repeat}: give one of them")
        super().__init__([uri], batch_size=batch_size, **options)
        self._version, shards = self._versions[0], self._opened[0]
        self._draws: Draws | None = None
        size, further = shards.samples, {}
        if weights is not None or balance is not None or epoch_size is not None or repeat != 1:
            drawn = shards.samples * repeat if epoch_size is None and repeat != 1 else epoch_size
            if (drawn or size) * 8 > memory_bytes():
                raise ConfigError(f"an epoch of {drawn or size:,} drawn samples takes 8 bytes each, more than memory")
            if weights is None and balance is None:
                groups, values = np.zeros(size, np.int64), np.ones(1)
            else:
                groups, values = weights_of(self._version, self._split, weights, balance)
            self._draws = Draws(groups, values, drawn, replacement)
            size = self._draws.size
            further = {"epoch_size": size, "replacement": replacement, "weights": self._draws.digest}
        self._sizes = self._sizes_of(shards, size)
        self._grouping: Grouping | None = None
        if length_buckets is not None or pack is not None:
            if self._draws is not None:
                raise ConfigError(
                    "length_buckets and pack deliver each sample once: leave out weights, balance, epoch_size, repeat"
                )
            order = (self._sizes, self._seed, self._shuffle)
            self._grouping = grouping_of(self._version, self._split, self._padding, length_buckets, pack)(*order)
            further = self._grouping.identity
            size = self._grouping.plan(0).rows if self._grouping.row else size
        self._stretches = self._whole(0)
        manifest = self._version.manifest
        told = {
            "dataset": manifest.dataset,
            "version": manifest.version,
            "split": self._split,
            "samples": shards.samples,
        }
        self._set_order(size, told, **further)

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch."""
        super().set_epoch(epoch)
        self._stretches = self._whole(epoch)

    def _whole(self, epoch: int) -> tuple[int, Stretches]:
        """Return an epoch that is planned as a whole for steps of this number of workers."""
        return epoch, ((0, self.world_size * self._batch_size),)

    def _batches_of(self, epoch: int) -> int:
        if self._grouping is None or not self._grouping.row:
            return self._batches
        return batch_count(self._grouping.plan(epoch).rows, self._batch_size, self._remainder)

    def _next_epoch(self) -> None:
        super()._next_epoch()
        self._stretches = self._whole(self._epoch)

    def _place(self) -> dict[str, Any]:
        parts = self._grouping is not None and not self._grouping.row
        further = {"stretches": [list(one) for one in self._stretches[1]]} if parts else {}
        return {**super()._place(), **further}

    def _restore(self, state: Mapping[str, Any], cure: str) -> None:
        if self._grouping is None or self._grouping.row:
            return
        parts, batches = state["stretches"], state["batches"]
        kept = continued(parts, batches, self._batch_size, self.world_size * self._batch_size)
        if kept is None:
            raise InputError(f"the state's stretches = {parts!r} are no parts of {batches} batches: {cure}")
        self._stretches = state["epoch"], kept

    def sample(
        self, sample_id: int | None = None, *, index: int | None = None, epoch: int | None = None, copy: int = 0
    ) -> Batch:
        """Return one sample, with the columns of a batch, except the mask, and without the batch's axis.

        It is compared with its checksum. The first look-up by id reads all ids, and keeps 16 bytes for each.

        Args:
            sample_id: Its id.
            index: Its number in the split, from 0, in the order of the files.
            epoch: None for the sample as it is stored; else transformed as in this epoch, but not mixed with another.
            copy: Which of its copies in the epoch, from 0, if it was drawn several times.

        Raises:
            InputError: there is no such sample, or not exactly one of the first two arguments is given.
            ConfigError: an epoch is given to a stream without a transform.
            CorruptVersion: it is damaged or missing.
        """
        return self._sample(0, sample_id, index, epoch, copy)

    def distribution(self, by: Literal["class", "weight"] = "class") -> dict[str, dict[str, int]]:
        """Return the samples of each class: 'natural' in the split, and 'epoch' in the current epoch over all workers.

        Args:
            by: 'weight' for the samples of each stored weight, or of ranges of them if there are more than ten.

        Raises:
            ConfigError: the version has no classes, or no weights.
            CorruptVersion: they can't be read.
        """
        drawn = None if self._draws is None else self._draws.of_epoch(self._seed, self._epoch)
        return distribution(self._version, self._split, by, drawn)

    def _sources(self) -> list[Source]:
        samples, sizes, seed, shuffle, draws = self._samples, self._sizes, self._seed, self._shuffle, self._draws
        if self._grouping is not None:
            grouping, (known, stretches), size = self._grouping, self._stretches, self._batch_size
            whole = self._whole(known)[1]

            def plan_of(epoch: int) -> Plan:
                return grouping.plan(epoch, () if grouping.row else stretches if epoch == known else whole, size)

            return [GroupedSource(self._opened[0], grouping, plan_of)]

        def order_of(epoch: int) -> EpochOrder:
            drawn = None if draws is None else draws.of_epoch(seed, epoch)
            return EpochOrder(samples, sizes, seed, epoch, shuffle, drawn)

        return [Source(self._opened[0], order_of, seed)]

    def _takes(self, epoch: int, first: int, starts: range, share: Share) -> Iterator[list[Takes]]:
        begin, step, count = first * share.batch_size, (share.step, *share.bounds), steps_at_once(share.batch_size)
        groups = (starts[at : at + count] for at in range(0, len(starts), count))
        return ([Takes(0, epoch, np.array([(begin + start, *step) for start in own]), step)] for own in groups)
