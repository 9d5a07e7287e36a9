from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tasks.io.errors import ConfigError, CorruptVersion, InputError
from tasks.loader.batch_stream import BatchStream
from tasks.loader.mixed import MixedStream, SourceOrder, apportion
from tasks.loader.order import Sizes
from tasks.loader.stream import TrainingStream
from tests.conftest import new_bucket
from tests.delivery.making import damage, image_version, publish, table_samples, table_version

MIXES = ["stratified", "proportional", "alternating"]
NUMBERS = (90, 40, 25)
"""Samples of three versions; the first has two streams in its order."""


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    roots = [str(tmp_path_factory.mktemp("root")) for _ in NUMBERS]
    files = [[5] * 14 + [10, 10], [40], [25]]
    return [table_version(root, *own, seed=seed) for seed, (root, own) in enumerate(zip(roots, files, strict=True))]


Delivered = list[tuple[int, int]]
"""Source and id of each real sample."""


def workers(
    sources: Mapping[str, float], count: int, state: dict[str, Any] | None = None, **options: Any
) -> list[MixedStream]:
    options = {"batch_size": 8, "as_numpy": True, "prefetch": 0, "columns": ["sample_id"], **options}
    streams = [MixedStream(sources, rank=rank, world_size=count, **options) for rank in range(count)]
    for stream in streams:
        if state is not None:
            stream.load_state_dict(json.loads(json.dumps(state)))
    return streams


def run(streams: Sequence[BatchStream], steps: int | None = None, damaged: bool = False) -> list[Delivered]:
    """Real samples of each global batch in turn."""
    batches: list[Delivered] = []
    for number, step in enumerate(zip(*streams, strict=True), start=1):
        for batch in step:
            real = batch.get("mask", slice(None))
            source = batch.get("source", np.zeros(len(batch["sample_id"]), np.int64))
            assert source.dtype == np.int64
            assert len(source) == streams[0]._batch_size or damaged
            batches.append(list(zip(source[real].tolist(), batch["sample_id"][real].tolist(), strict=True)))
        if number == steps:
            break
    return batches


def flat(batches: Sequence[Delivered]) -> Delivered:
    return [pair for batch in batches for pair in batch]


def counts(pairs: Delivered, sources: int) -> list[int]:
    return np.bincount([source for source, _ in pairs], minlength=sources).tolist()


def steps_of(batches: Sequence[Delivered], size: int) -> list[Delivered]:
    """Samples of some consecutive global batches each, sorted, without the empty ones at the end."""
    return [sorted(flat(batches[at : at + size])) for at in range(0, len(batches), size) if flat(batches[at:])]


QUOTAS = st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any)


@given(quotas=QUOTAS, laps=st.integers(1, 3), places=st.lists(st.integers(0, 300), min_size=1, max_size=5))
def test_a_stratified_order_has_each_source_s_share_of_any_number_of_first_samples(quotas, laps, places) -> None:
    quotas = [quota * laps for quota in quotas]
    size = sum(quotas)
    found = SourceOrder(quotas, "stratified", 1, 0).before(range(2 * size + 1))
    ideal = np.arange(2 * size + 1)[:, None] * np.array(quotas) / size
    assert (np.abs(found - ideal) < 1).all()
    assert (np.diff(found, axis=0) >= 0).all()
    assert (found.sum(axis=1) == np.arange(2 * size + 1)).all()
    # Any place is found at once, whatever was asked before.
    places = sorted(place % (2 * size + 1) for place in places)
    order = SourceOrder(quotas, "stratified", 1, 0)
    assert [order.before([place])[0].tolist() for place in places] == found[places].tolist()
    order = SourceOrder(quotas, "stratified", 1, 0)
    parts = [part for part in (places[: len(places) // 2], places[len(places) // 2 :]) if part]
    assert [row for part in parts for row in order.before(part).tolist()] == found[places].tolist()


@given(quotas=QUOTAS, key=st.integers(0, 2**64 - 1), place=st.integers(0, 300))
def test_a_proportional_order_is_a_permutation_of_the_quotas(quotas, key, place) -> None:
    size = sum(quotas)
    found = SourceOrder(quotas, "proportional", 1, key).before(range(2 * size + 1))
    assert ((np.diff(found, axis=0) >= 0).all(), (found.sum(axis=1) == np.arange(2 * size + 1)).all()) == (True, True)
    assert (found[size].tolist(), found[2 * size].tolist()) == (quotas, [2 * quota for quota in quotas])
    again = SourceOrder(quotas, "proportional", 1, key).before([place % size, size])
    assert again.tolist() == found[[place % size, size]].tolist()


def test_every_permutation_of_the_quotas_is_as_likely() -> None:
    seen: dict[tuple[int, ...], int] = {}
    for key in range(6000):
        found = SourceOrder([2, 1, 1], "proportional", 1, key * 0x9E3779B97F4A7C15 % 2**64).before(range(5))
        sequence = tuple(np.diff(found, axis=0).argmax(axis=1).tolist())
        seen[sequence] = seen.get(sequence, 0) + 1
    assert len(seen) == 12
    assert max(abs(count - 500) for count in seen.values()) < 5 * 500**0.5


@given(
    size=st.integers(0, 10**9),
    shares=st.lists(st.fractions(0, 100, max_denominator=1000), min_size=1, max_size=6).filter(any),
)
def test_quotas_add_up_and_are_within_one_of_the_exact_numbers(size, shares) -> None:
    found = apportion(size, shares)
    assert sum(found) == size
    assert all(
        abs(count - Fraction(size) * share / sum(shares)) < 1 for count, share in zip(found, shares, strict=True)
    )


@dataclass(frozen=True)
class Case:
    weights: tuple[float, ...]
    mix: str
    batch_size: int
    epoch_size: int | None
    seed: int

    def options(self) -> dict[str, Any]:
        size = self.epoch_size
        if self.mix == "alternating" and size is not None:
            size = max(size // self.batch_size, 1) * self.batch_size
        return {"mix": self.mix, "batch_size": self.batch_size, "epoch_size": size, "seed": self.seed}


CASES = st.builds(
    Case,
    weights=st.tuples(*[st.one_of(st.integers(0, 4), st.floats(0.1, 5))] * 3).filter(any),
    mix=st.sampled_from(MIXES),
    batch_size=st.integers(1, 24),
    epoch_size=st.one_of(st.none(), st.integers(1, 220)),
    seed=st.integers(0, 2**63 - 1),
)
QUICK = settings(max_examples=25)


@QUICK
@given(case=CASES, count=st.integers(1, 5))
def test_counts_are_exact_and_each_step_is_the_same_for_any_number_of_workers(three, case: Case, count: int) -> None:
    sources = dict(zip(three, case.weights, strict=True))
    (alone,) = workers(sources, 1, **case.options())
    several = workers(sources, count, **case.options())
    size, total = alone._samples, sum(case.weights)
    taken: Delivered = []
    for epoch in range(3):
        batches = run([alone])
        assert steps_of(run(several), count) == steps_of(batches, count)
        delivered = flat(batches)
        taken += delivered
        assert len(delivered) == size
        unit = case.batch_size if case.mix == "alternating" else 1
        for found, weight in zip(counts(delivered, 3), case.weights, strict=True):
            assert abs(found - size * weight / total) < unit + 1e-6
        if case.mix == "alternating":
            assert all(len({source for source, _ in batch}) == 1 for batch in batches)
        if case.mix == "stratified":
            quotas = np.array(counts(delivered, 3))
            for number in range(len(batches)):
                here = flat(batches[: number + 1])
                assert (np.abs(counts(here, 3) - quotas * len(here) / size) < 1).all()
        # Each source comes as a whole before any of its samples comes again, and each time in another order.
        for source, samples in enumerate(NUMBERS):
            own = [sample for number, sample in taken if number == source]
            laps = [own[at : at + samples] for at in range(0, len(own), samples)]
            assert all(len(set(lap)) == len(lap) for lap in laps)
            assert len({tuple(lap) for lap in laps}) == len(laps) or len(laps[-1]) < 5
        assert alone.epoch == epoch + 1


@QUICK
@given(
    case=CASES,
    counts_of_workers=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    steps=st.lists(st.integers(0, 4), min_size=4, max_size=4),
    changes=st.lists(st.one_of(st.none(), st.tuples(*[st.integers(0, 5)] * 3).filter(any)), min_size=4, max_size=4),
    remainder=st.sampled_from(["pad", "drop"]),
)
def test_what_is_resumed_by_any_workers_is_the_whole_also_with_other_weights(
    three, *, case: Case, counts_of_workers, steps, changes, remainder
) -> None:
    """The number of workers changes after some steps; weights change there, too. One worker does it without a stop."""
    sources = dict(zip(three, case.weights, strict=True))
    options = {**case.options(), "remainder": remainder}
    size = options["epoch_size"]
    assume(remainder == "pad" or (size is not None and size >= case.batch_size * max(counts_of_workers)))
    (whole,) = workers(sources, 1, **options)
    state = whole.state_dict()
    for count, go, change in zip(counts_of_workers, steps, changes, strict=False):
        streams = workers(sources, count, state, **options)
        if whole.epoch < streams[0].epoch:  # too little was left for a step of several workers
            run([whole])
        if change is not None:
            for stream in (*streams, whole):
                stream.set_weights(dict(zip(three, change, strict=True)))
        if go:
            found = run(streams, go)
            expected = run([whole], min(len(found), len(whole) - whole.state_dict()["batches"]))
            assert steps_of(found, count) == steps_of(expected, count)
            if whole.epoch < streams[0].epoch:
                run([whole])
        states = [stream.state_dict() for stream in (*streams, whole)]
        assert {json.dumps(one) for one in states} == {json.dumps(states[0])}
        state = states[0]


def test_one_source_has_the_order_of_a_training_stream(three) -> None:
    options: dict[str, Any] = {"batch_size": 8, "as_numpy": True, "seed": 5}
    alone, mixed = TrainingStream(three[0], **options), MixedStream({three[0]: 2}, **options)
    assert [run([mixed]) for _ in range(2)] == [run([alone]) for _ in range(2)]


def test_batches_have_exact_counts_and_the_values_of_their_sources(three) -> None:
    first, second, _ = three
    with MixedStream({first: 3, second: 1}, batch_size=8, as_numpy=True, normalise=True, epoch_size=80) as stream:
        constants = [np.array(stream.definition["normalise"][name], np.float32) for name in ("mean", "std")]
        stored = [table_samples(number, seed) for seed, number in enumerate(NUMBERS)]
        for batch in stream:
            assert batch.keys() == {"features", "label", "sample_id", "source", "mask"}
            assert batch["source"].tolist() == [0] * 6 + [1] * 2
            for row, source in enumerate(batch["source"]):
                (at,) = np.flatnonzero(stored[source]["sample_id"] == batch["sample_id"][row])
                expected = (stored[source]["features"][at] - constants[0]) / constants[1]
                np.testing.assert_allclose(batch["features"][row], expected, rtol=1e-5, atol=1e-6)
                assert batch["label"][row] == stored[source]["label"][at]
        assert stream.stats.source_samples == (60, 20)
        assert stream.stats.samples == 80
        assert stream.distribution() == {"natural": {first: 90, second: 40}, "epoch": {first: 60, second: 20}}


def test_an_oracle_in_plain_python_deals_the_same_samples(three) -> None:
    """Batches of 4 with 1.5, 1.5 and 1 samples of the sources; each goes through its epochs one after the other."""
    (stream,) = workers(dict(zip(three, (3, 3, 2), strict=True)), 1, batch_size=4, epoch_size=240)
    laps: list[list[int]] = []
    for source, (uri, samples) in enumerate(zip(three, NUMBERS, strict=True)):
        shards, order = stream._opened[source], stream._sources()[source]._order_of
        ids = table_samples(samples, source)["sample_id"]
        assert shards.samples == samples
        assert uri == stream._names[source]
        laps.append([ids[i] for lap in range(6) for i in order(lap).take(0, samples)])
    taken = [0, 0, 0]
    for number, batch in enumerate(run([stream])):
        own = counts(batch, 3)
        assert own in ([2, 1, 1], [1, 2, 1])
        for source in range(3):
            due = laps[source][taken[source] : taken[source] + own[source]]
            assert sorted(sample for where, sample in batch if where == source) == sorted(due)
            taken[source] += own[source]
        assert abs(taken[0] - taken[1]) <= 1
        assert taken[2] == number + 1


@pytest.mark.parametrize(
    ("weights", "options", "expected"),
    [
        ((1, 1, 1), {}, [25, 25, 25]),  # until the smallest is used up
        ((3, 1, 1), {}, [75, 25, 25]),
        ((0.1, 0.1, 0), {}, [40, 40, 0]),
        ((1 / 3, 1 / 3, 1 / 3), {}, [25, 25, 25]),
        ((1, 1, 1), {"stop": "all"}, [90, 90, 90]),
        ((1, 1, 1), {"epoch_size": 10}, [4, 3, 3]),
        ((1, 1, 1), {"mix": "alternating"}, [24, 24, 24]),
        ((1, 2, 0.2), {"by": "repeat"}, [90, 80, 5]),
        ((10, 100, 0), {"by": "choose"}, [10, 100, 0]),
    ],
)
def test_the_size_of_an_epoch_follows_from_weights_and_sources(three, weights, options, expected) -> None:
    (stream,) = workers(dict(zip(three, weights, strict=True)), 1, **options)
    assert counts(flat(run([stream])), 3) == expected
    assert list(stream.distribution()["epoch"].values()) == expected


def test_weights_change_within_an_iteration_from_the_next_batch_on(three) -> None:
    first, second, _ = three
    for prefetch in (0, 3):
        streams = workers({first: 1, second: 1}, 2, epoch_size=96, prefetch=prefetch)
        found = []
        for step, batches in enumerate(zip(*streams, strict=True)):
            found += [np.bincount(batch["source"], minlength=2).tolist() for batch in batches]
            if step == 1:
                for stream in streams:
                    stream.set_weights({second: 0, first: 4})
            if step == 3:
                for stream in streams:
                    stream.set_weights({first: 1, second: 7})
        assert found == [[4, 4]] * 4 + [[8, 0]] * 4 + [[1, 7]] * 4
        assert streams[0].state_dict()["weights"] == [1.0, 7.0]
        assert streams[0].distribution()["epoch"] == {first: 12, second: 84}


def test_set_epoch_goes_to_what_an_epoch_would_be_and_a_run_gets_there(three) -> None:
    sources = dict(zip(three, (2, 1, 1), strict=True))
    for mix in MIXES:
        (stream,) = workers(sources, 1, mix=mix)
        epochs = [run([stream]) for _ in range(3)]
        assert len({str(epoch) for epoch in epochs}) == 3
        (other,) = workers(sources, 1, mix=mix)
        other.set_epoch(2)
        assert run([other]) == epochs[2]


def test_a_state_of_another_mix_is_refused_and_names_each_difference(three) -> None:
    sources = dict(zip(three, (2, 1, 1), strict=True))
    (stream,) = workers(sources, 1)
    run([stream], 3)
    state = stream.state_dict()
    assert len(json.dumps(state)) < 1000
    cases: list[tuple[dict[str, float], dict[str, Any], str]] = [
        (
            dict(zip(three, (2, 1, 3), strict=True)),
            {"epoch_size": 50},
            r"opened_with \[2.0, 1.0, 1.0\] \(here \[2.0, 1",
        ),
        (sources, {"mix": "proportional"}, r"mix 'stratified' \(here 'proportional'\)"),
        (sources, {"epoch_size": 60}, r"epoch_size \d+ \(here 60\)"),
        (dict(zip(three[::-1], (1, 1, 2), strict=True)), {}, r"samples \[90, 40, 25\] \(here \[25, 40, 90\]\)"),
    ]
    for others, options, message in cases:
        with pytest.raises(InputError, match=message):
            workers(others, 1, state, **options)
    with pytest.raises(InputError, match="the state lacks dataset"):
        TrainingStream(three[0], batch_size=8).load_state_dict(state)
    for change, message in (
        ({"weights": [1.0, 1.0]}, "the state's weights = .* aren't those of 3 sources: give what state_dict"),
        ({"weights": [0.0] * 3}, "the state's weights = "),
        ({"weights": [1.0, float("nan"), 1.0]}, "the state's weights = "),
        ({"taken": [1, 2, -3]}, "the state's taken = "),
        ({"taken": [1, 2, 2**64]}, "the state's taken = "),
        ({"taken": None}, "the state's taken = "),
        ({"since": 4}, "the state's since = 4 is none of 3 batches"),
        ({"since": "0"}, "the state's since = '0'"),
    ):
        with pytest.raises(InputError, match=message):
            stream.load_state_dict({**state, **change})
    assert stream.state_dict() == state


def labelled(root: Path, features: int = 3, label: Any = "class", **samples: Any) -> str:
    columns = {**table_samples(20, features=features), **samples}
    if label is None:
        del columns["label"]
    return publish(str(root), {"train": [columns]}, batch_size=10)


def test_versions_that_do_not_fit_together_are_refused(three, tmp_path: Path, monkeypatch) -> None:
    other = image_version(str(tmp_path / "images"), 20)
    wide = labelled(tmp_path / "wide", features=4)
    bare = labelled(tmp_path / "bare", label=None)
    for uri, message in (
        (other, r"v1 doesn't fit .*v1: kind is 'images' and 'table'; publish it anew .* or leave it out"),
        (wide, r"shape is \(4,\) and \(3,\)"),
        (bare, "kind of label is None and 'class'"),
    ):
        with pytest.raises(ConfigError, match=message):
            MixedStream({three[0]: 1, uri: 1}, batch_size=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": [{"name": "a"}, {"name": "b"}, {"name": "z"}]}, "feature 2 is 'z' and 'c'"),
        ({"label": {"column": "label", "kind": "class", "classes": ["a", "x"]}}, "class 1 is 'x' and 'b'"),
        ({"label": {"column": "label", "kind": "class", "classes": ["a"]}}, "class 1 is None and 'b'"),
        ({"label": {"column": "label", "kind": "number"}}, "kind of label is 'number' and 'class'"),
    ],
)
def test_versions_of_other_meaning_are_refused(three, monkeypatch, change, message: str) -> None:
    from tasks.loader.version_files import Version, open_version, refuse_misfits

    first = open_version(three[0])
    named = {"features": [{"name": name} for name in "abc"]}
    here, there = (
        Version(first.root, first.manifest.model_copy(update={"definition": first.definition | named | further}))
        for further in ({}, change)
    )
    refuse_misfits([here, here])
    with pytest.raises(ConfigError, match=message):
        refuse_misfits([here, there])


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ((-1, 1, 1), {}, "weight of '.*' = -1: use finite numbers, 0 or more"),
        ((float("nan"), 1, 1), {}, "weight of '.*' = nan: use finite"),
        ((float("inf"), 1, 1), {}, "weight of '.*' = inf: use finite"),
        (("2", 1, 1), {}, "weight of '.*' = '2': use finite"),
        ((True, 1, 1), {}, "weight of '.*' = True: use finite"),
        ((None, 1, 1), {}, "weight of '.*' = None: use finite"),
        ((10**400, 1, 1), {}, "weight of '.*' = 1000.*: use finite"),
        ((0, 0, 0.0), {}, "all weights are 0; give one of them"),
        ((1, 1, 1), {"mix": "random"}, "mix = 'random': use 'stratified' or 'proportional' or 'alternating'"),
        ((1, 1, 1), {"by": "share"}, "by = 'share': use 'proportion'"),
        ((1, 1, 1), {"stop": "last"}, "stop = 'last': use 'first' or 'all'"),
        ((1, 1, 1), {"epoch_size": 0}, "epoch_size = 0: give the samples of an epoch, below 2,147,483,648"),
        ((1, 1, 1), {"epoch_size": 2**31}, "epoch_size = 2147483648: give"),
        ((1, 1, 1), {"epoch_size": 10, "by": "repeat"}, "epoch_size = 10: by = 'repeat' determines it"),
        ((1, 1, 1), {"epoch_size": 10, "mix": "alternating"}, "epoch_size = 10: alternating batches of 8 need"),
        ((0.5, 1, 1), {"by": "choose"}, "by = 'choose' takes whole numbers of samples"),
        ((1e-300, 1, 1), {"stop": "all"}, "make an epoch of .*: use weights for 1 to"),
        ((1, 1, 1e9), {"by": "repeat"}, "make an epoch of 25,000,000,130: use weights"),
        ((1, 1, 1), {"batch_size": 0}, "batch_size = 0"),
        ((1, 1, 1), {"split": "test"}, "has no samples in split 'test'"),
        ((1, 1, 1), {"columns": ["source"]}, r"columns = \['source'\]: give a list of some"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(three, weights, options, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        workers(dict(zip(three, weights, strict=True)), 1, **options)


def test_sources_that_are_none_are_refused(three) -> None:
    wrong: list[tuple[Any, str]] = [
        ({}, "sources = {}: give a mapping"),
        ([three[0]], "give a mapping of versions"),
        ({three[0]: 1, Path(three[0]): 1}, "a version is there twice"),
        ({5: 1}, "uri = 5: name each source"),
    ]
    for sources, message in wrong:
        with pytest.raises(ConfigError, match=message):
            MixedStream(sources, batch_size=4)
    (stream,) = workers({three[0]: 1, three[1]: 1}, 1)
    before = stream.state_dict()
    changes: list[tuple[Any, str]] = [
        ({three[0]: 1}, "give a weight for each source and for no other"),
        ({three[0]: 1, three[1]: 1, three[2]: 1}, "for no other"),
        ({three[0]: 1, three[1]: -1}, "= -1: use finite"),
        ({three[0]: 0, three[1]: 0}, "all weights are 0"),
        (None, "give a weight for each source"),
    ]
    for sources, message in changes:
        with pytest.raises(ConfigError, match=message):
            stream.set_weights(sources)
    assert stream.state_dict() == before


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("count", [1, 3])
def test_steps_that_are_dealt_together_are_those_dealt_alone_and_any_of_them_can_be_resumed(
    three, monkeypatch, mix: str, count: int
) -> None:
    """A group has steps of several laps of the smaller sources, and those that fill the last batches."""
    sources = dict(zip(three, (3, 2, 1), strict=True))
    options = {"mix": mix, "stop": "all", "columns": None, "batch_size": 7}

    def steps(most: int, start: dict[str, Any] | None = None, end: int | None = None) -> list[Any]:
        monkeypatch.setattr("tasks.loader.sources._STEPS", most)
        streams = workers(sources, count, start, **options)
        return [
            ([{name: values.tolist() for name, values in batch.items()} for batch in step], streams[0].state_dict())
            for step in itertools.islice(zip(*streams, strict=True), end)
        ]

    alone = steps(1)
    assert len(alone) > 64 // count // 3
    for most in (2, 5, 64):
        assert steps(most) == alone
    for at in range(0, len(alone) - 1, 3):
        assert steps(5, alone[at][1], 3) == alone[at + 1 : at + 4]


def test_damage_is_found_in_the_step_that_has_it_also_in_a_group(three, tmp_path: Path, monkeypatch) -> None:
    bad = table_version(str(tmp_path), 60, seed=9)
    part = "split=train/part-00000-a1.parquet"
    damage(bad, part, (Path(bad) / part).read_bytes().index(table_samples(60, 9)["features"][35].tobytes()))
    reached = []
    for most in (1, 64):
        monkeypatch.setattr("tasks.loader.sources._STEPS", most)
        (stream,) = workers({three[0]: 1, bad: 1}, 1, batch_size=2, shuffle=False)
        found = []
        with pytest.raises(CorruptVersion, match=f"{part}: batch 3 has not the checksum"):
            found.extend(batch["sample_id"].tolist() for batch in stream)
        reached.append((found, stream.state_dict()))
    assert reached[0] == reached[1]
    assert len(reached[0][0]) == 30


def test_a_damaged_source_is_named_or_its_samples_are_skipped_and_counted(three, tmp_path: Path) -> None:
    bad = table_version(str(tmp_path), 30, 30, seed=9)
    part = "split=train/part-00000-a1.parquet"
    damage(bad, part, (Path(bad) / part).read_bytes().index(table_samples(60, 9)["features"][0].tobytes()))
    sources = {three[0]: 1, bad: 1}
    with pytest.raises(CorruptVersion, match=f"{part}: batch 0 has not the checksum"):
        run(workers(sources, 1))
    good = sorted(table_samples(60, 9)["sample_id"][10:].tolist())
    for count in (1, 3):
        streams = workers(sources, count, on_corrupt="skip")
        found = flat(run(streams, damaged=True))
        assert sorted(sample for source, sample in found if source == 1) == good
        assert counts(found, 2) == [60, 50]
        assert sum(stream.stats.skipped_samples for stream in streams) == 10


def test_a_source_that_vanishes_in_mid_epoch_is_named_and_nothing_comes_twice(
    three, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("tasks.loader.shards._MAPPED_AT_ONCE", 0)
    gone = table_version(str(tmp_path), *[20] * 20, seed=9)
    (stream,) = workers({three[0]: 1, gone: 1}, 1)
    stream._sizes[1] = Sizes(4, 2, 8, 2, 8)  # few samples are announced ahead
    iteration = iter(stream)
    found = [next(iteration)["sample_id"] for _ in range(3)]
    for path in Path(gone).rglob("*.parquet"):
        path.rename(path.with_suffix(".away"))
    with pytest.raises(CorruptVersion, match=r"part-000\d\d-a1.parquet is missing, but its manifest lists it"):
        found.extend(batch["sample_id"] for batch in iteration)
    assert stream.state_dict()["batches"] == len(found)
    for path in Path(gone).rglob("*.away"):
        path.rename(path.with_suffix(".parquet"))
    found.extend(batch["sample_id"][batch["mask"]] for batch in stream)
    assert len(set(np.concatenate(found).tolist())) == len(np.concatenate(found)) == 180


def test_each_worker_downloads_its_share_of_each_source(s3_url: str, tmp_path: Path) -> None:
    files = [20 + number * 7 % 11 for number in range(32)]  # four streams
    sources = {table_version(new_bucket(s3_url), *files, seed=seed): 1 for seed in range(2)}
    found: list[int] = []
    for rank in range(4):  # each with a cache of its own, as on a node of its own
        with MixedStream(
            sources, batch_size=16, rank=rank, world_size=4, as_numpy=True, cache_dir=tmp_path / str(rank)
        ) as stream:
            found += [sample for batch in stream for sample in batch["sample_id"][batch["mask"]].tolist()]
            assert stream.stats.cache_misses <= 2 * (32 // 4 + 8)  # a stream more of each
    assert len(set(found)) == len(found) == 2 * sum(files)


def test_single_samples_come_from_a_source(three) -> None:
    (stream,) = workers(dict.fromkeys(three, 1), 1, columns=None)
    samples = table_samples(40, 1)
    assert stream.sample(three[1], int(samples["sample_id"][7]))["label"] == samples["label"][7]
    assert stream.sample(Path(three[1]), index=7)["sample_id"] == samples["sample_id"][7]
    with pytest.raises(ConfigError, match="source = 'x': use"):
        stream.sample("x", 1)
