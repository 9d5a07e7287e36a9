"""Whatever the bytes or values are, what parses them answers, or raises an error of ours; nothing else, ever.

Hypothesis makes them: a few seconds' worth by default, and FUZZ_FACTOR times as many with `-m nightly`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from tasks.cli.command_line import parse_arguments
from tasks.delivery.config import DeliveryConfig
from tasks.features.config import FeatureStoreConfig
from tasks.features.loading import load_definitions
from tasks.images.config import ImageAugmentationConfig
from tasks.images.formats import JpegHeader, read_jpeg_header
from tasks.images.labels import LABELS, read_labels
from tasks.io.errors import ConfigError, CorruptVersion, DefinitionError, PipelineError, SourceError
from tasks.store.reading import Withdrawal, parse_withdrawals
from tasks.store.reservation import Attempt, parse_manifest
from tasks.training_sets.definition import load_models
from tests.images.test_decode import encoded, scene
from tests.processes import ran, ran_pytest
from tests.store.publishing import DATASET, publish

FACTOR = int(os.environ.get("FUZZ_FACTOR", "20"))
QUICK = 60

CONFIGS: list[type[BaseModel]] = [ImageAugmentationConfig, FeatureStoreConfig, DeliveryConfig]

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["", "..", "0", "-1", "nan", "inf", "1e999", "a,b", "\0", "\ud800", "x:y", "s3://", "2024-13-45"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def quick(examples: int = QUICK) -> Callable[[Any], Any]:
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    times = int(os.environ.get("FUZZ_TIMES", "1"))
    return settings(max_examples=examples * times, suppress_health_check=checks)


def mutated(data: st.DataObject, seed: bytes) -> bytes:
    """Bytes with a few of them changed, cut, removed, doubled or put in."""
    made = bytearray(seed)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(made)))
        match data.draw(st.sampled_from(["change", "cut", "remove", "insert", "double"])):
            case "change":
                made[at : at + 1] = bytes([data.draw(st.integers(0, 255))])
            case "cut":
                del made[at:]
            case "remove":
                del made[at : at + data.draw(st.integers(1, 30))]
            case "insert":
                made[at:at] = data.draw(st.binary(max_size=12) | st.sampled_from([b'"', b"\n", b"\0", b"\xff", b"{["]))
            case "double":
                made[at:at] = made[at : at + data.draw(st.integers(1, 30))]
    return bytes(made)


def altered(data: st.DataObject, content: Any) -> Any:
    """A value with one part of it replaced, somewhere."""
    if isinstance(content, dict) and content and data.draw(st.integers(0, 5)):
        key = data.draw(st.sampled_from(sorted(content)))
        return {**content, key: altered(data, content[key])}
    if isinstance(content, list) and content and data.draw(st.integers(0, 5)):
        index = data.draw(st.integers(0, len(content) - 1))
        return [*content[:index], altered(data, content[index]), *content[index + 1 :]]
    return data.draw(json_values)


def fields_of(model: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            names += fields_of(inner, f"{prefix}{name}.")
        names.append(f"{prefix}{name}")
    return names


@pytest.mark.parametrize("config", CONFIGS)
@quick()
@given(data=st.data())
def test_parameters_as_json(config: type[BaseModel], data: st.DataObject) -> None:
    """As Prefect gives them: a configuration or a ValidationError; one that is taken survives the way back."""
    content = altered(data, json.loads(config().model_dump_json()))
    try:
        text = json.dumps(content)
        made = config.model_validate_json(text)
    except ValidationError:
        return
    assert config.model_validate_json(made.model_dump_json()) == made


@pytest.mark.parametrize("config", CONFIGS)
@quick()
@given(data=st.data())
def test_arguments_of_the_command_line(config: type[BaseModel], data: st.DataObject) -> None:
    known = fields_of(config)
    names = st.sampled_from(known) | st.text(max_size=6)
    texts = st.text(max_size=10) | json_values.map(str)
    arguments = []
    for _ in range(data.draw(st.integers(1, 3))):
        option = f"--{data.draw(names)}".replace("_", "-")
        arguments += [f"{option}={data.draw(texts)}"] if data.draw(st.booleans()) else [option, data.draw(texts)]
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        try:
            parse_arguments(config, arguments, "fuzz")
        except ConfigError as fault:
            assert "\n" not in str(fault)  # noqa: PT017 - whether it raises is the input's choice
        except SystemExit as left:
            assert left.code == 0 or said.getvalue().count("\n") == 1  # noqa: PT017


@quick(15)
@given(data=st.data())
def test_a_flow_started_by_hand_says_what_is_wrong_in_its_file(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """The command line's own parser, with its YAML file: a configuration, or it ends with a message and a status."""
    config = data.draw(st.sampled_from(CONFIGS))
    seed = yaml.safe_dump(json.loads(config().model_dump_json())).encode()
    file = tmp_path_factory.mktemp("config") / "given.yaml"
    file.write_bytes(data.draw(st.binary(max_size=60)) if data.draw(st.booleans()) else mutated(data, seed))
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            parse_arguments(config, ["--config", str(file)], "fuzz")
        except PipelineError as fault:
            assert str(fault)  # noqa: PT017 - whether it raises is the input's choice
        except SystemExit as left:
            assert left.code != 0  # noqa: PT017 - whether it raises is the input's choice
            assert said.getvalue()


DEFINITIONS = yaml.safe_dump(
    {
        "events": {"visits": {"time": "at", "columns": {"at": {"kind": "time"}, "shop": "any", "paid": "number"}}},
        "groups": {
            "shop-features": {
                "entity": "shop",
                "source": "visits",
                "features": {"n": "COUNT(*)", "paid": "SUM(paid) FILTER (WHERE paid > 0)"},
                "windows": [{"days": [7, 30], "features": {"recent": "SUM(paid)"}}],
                "derived": {"mean": "paid / n"},
                "bounds": {"n": [0, None]},
            }
        },
    }
).encode()
MODELS = yaml.safe_dump(
    {
        "labels": {"churn": {"entity": "customer_id", "at": ["2024-01-31"], "days": 30, "target": "COUNT(*) = 0"}},
        "models": {"churn": {"label": "churn", "features": ["customer-features:*"], "ttl_days": 30}},
    }
).encode()


@pytest.mark.parametrize(("load", "seed"), [(load_definitions, DEFINITIONS), (load_models, MODELS)])
def test_the_seeds_are_whole(tmp_path: Path, load: Callable[[str], Any], seed: bytes) -> None:
    (tmp_path / "given.yaml").write_bytes(seed)
    assert load(str(tmp_path / "given.yaml"))


@pytest.mark.parametrize(("load", "seed"), [(load_definitions, DEFINITIONS), (load_models, MODELS)])
@quick()
@given(data=st.data())
def test_definitions(
    tmp_path_factory: pytest.TempPathFactory, load: Callable[[str], Any], seed: bytes, data: st.DataObject
) -> None:
    file = tmp_path_factory.getbasetemp() / "given.yaml"
    if data.draw(st.booleans()):
        file.write_bytes(mutated(data, seed))
    else:
        content = altered(data, yaml.safe_load(seed))
        try:
            file.write_text(yaml.safe_dump(content))
        except UnicodeEncodeError:
            return
    try:
        load(str(file))
    except DefinitionError as fault:
        assert str(fault)  # noqa: PT017 - whether it raises is the input's choice


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return publish(str(tmp_path_factory.mktemp("root")), "run").model_dump_json(indent=2).encode()


@quick(150)
@given(data=st.data())
def test_manifests(manifest: bytes, data: st.DataObject) -> None:
    if data.draw(st.booleans()):
        made = mutated(data, manifest) if data.draw(st.booleans()) else data.draw(st.binary(max_size=50))
    else:
        made = json.dumps(altered(data, json.loads(manifest))).encode()
    try:
        found = parse_manifest("s3://b/_manifest.json", made, DATASET, 1)
    except CorruptVersion as fault:
        assert str(fault).startswith("s3://b/_manifest.json")  # noqa: PT017 - whether it raises is the input's choice
        return
    assert (found.dataset, found.version) == (DATASET, 1)
    assert all(not entry.path.startswith("/") and ".." not in entry.path.split("/") for entry in found.files)


@quick(100)
@given(data=st.data())
def test_reservations_and_withdrawals(data: st.DataObject) -> None:
    from tasks.store import reservation

    owner = {"host": "h", "boot_id": "b", "pid": 1, "process_start": "1"}
    when = "2026-01-01T00:00:00Z"
    attempt = {"run_id": "r", "attempt": 1, "owner": owner, "created_at": when, "token": "t"}
    withdrawal = {"reason": "r", "when": when, "by": "me"}
    for seed, parse in (
        (attempt, lambda made: reservation._parse("s3://b/_reservation.json", made)),
        (withdrawal, lambda made: parse_withdrawals({1: "u"}, {"u": made}).get(1)),
    ):
        text = json.dumps(seed).encode()
        made = mutated(data, text) if data.draw(st.booleans()) else json.dumps(altered(data, seed)).encode()
        try:
            found = parse(made)
        except CorruptVersion:
            continue
        assert isinstance(found, Attempt | Withdrawal)
        assert str(found)


def label_seeds() -> list[tuple[str, bytes]]:
    table = pa.table({"image_id": ["a", "b"], "class_name": ["x", None], "n": [1.0, 2.5]})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return [
        ("labels.csv", b'image_id,class_name\na,x\n"b, c",y\nd,"e\nf"\n'),
        ("labels.tsv", b"image_id\tclass_name\na\tx\n"),
        ("labels.parquet", sink.getvalue()),
    ]


@pytest.mark.parametrize(("name", "seed"), label_seeds(), ids=lambda value: value if isinstance(value, str) else "")
@quick(100)
@given(data=st.data())
def test_files_of_labels(tmp_path_factory: pytest.TempPathFactory, name: str, seed: bytes, data: st.DataObject) -> None:
    file = tmp_path_factory.getbasetemp() / name
    file.write_bytes(mutated(data, seed) if data.draw(st.integers(0, 3)) else data.draw(st.binary(max_size=80)))
    try:
        found = read_labels(str(file), "image_id", "class_name")
    except SourceError as fault:
        assert str(file) in str(fault)  # noqa: PT017 - whether it raises is the input's choice
        return
    assert found.schema == LABELS
    assert found.num_rows


def test_half_a_character_in_sql_is_refused(tmp_path: Path) -> None:
    """Found by the fuzz."""
    file = tmp_path / "models.yaml"
    file.write_text(MODELS.decode().replace("COUNT(*) = 0", '"\\ud800"'))
    with pytest.raises(DefinitionError, match=r"ud800.*has a character that is none"):
        load_models(str(file))


def test_a_parquet_file_of_labels_whose_names_are_no_utf_8_is_refused(tmp_path: Path) -> None:
    """Found by the fuzz."""
    file = tmp_path / "labels.parquet"
    pq.write_table(pa.table({"image_id": ["a"], "class_name": ["x"], "name": [1]}), file, store_schema=False)
    file.write_bytes(file.read_bytes().replace(b"name\x15", b"n\x80me\x15").replace(b"\x04name", b"\x04n\x80me"))
    with pytest.raises(SourceError, match=r"labels\.parquet.*can't be read"):
        read_labels(str(file), "image_id", "class_name")


_DECODE = """
import sys, resource
resource.setrlimit(resource.RLIMIT_CPU, (300, 300))
from tests.bad_input.test_fuzz import decode_many
decode_many(int(sys.argv[1]), int(sys.argv[2]))
"""
PICTURES = [
    *(("JPEG", {}), ("JPEG", {"progressive": True}), ("JPEG", {"restart_marker_blocks": 1}), ("PNG", {})),
    *(("WEBP", {"lossless": True}), ("WEBP", {}), ("GIF", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})),
    *(("TIFF", {"compression": "jpeg"}), ("BMP", {}), ("JPEG2000", {}), ("ICO", {}), ("TGA", {}), ("PPM", {})),
]
MEMORY = 400 << 20


def decode_many(examples: int, seed: int) -> None:
    """Decode mutilated pictures; ends this process with an error where one answer is wrong or takes too much."""
    import random
    import re
    import time

    from tasks.images.decode import REASONS, Decoder, Rejection

    def peak() -> int:
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10  # type: ignore[index]

    draw = random.Random(seed)
    seeds = [encoded(scene(40, 31), form, **options) for form, options in PICTURES]
    decoder = Decoder(1_000_000, (0, 0, 0))
    for data in seeds:
        decoder.decode(data)
    before = peak()
    for number in range(examples):
        made = bytearray(draw.choice(seeds))
        for _ in range(draw.randint(1, 6)):
            at = draw.randrange(min(len(made), draw.choice([64, 300, 10**9])) or 1)
            match draw.randrange(5):
                case 0:
                    made[at : at + 1] = bytes([draw.choice([0, 1, 127, 128, 254, 255, draw.randrange(256)])])
                case 1:
                    made[at : at + 4] = draw.choice(
                        [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4), b"\0\0\xff\xff"]
                    )
                case 2:
                    del made[at : at + draw.randint(1, 40)]
                case 3:
                    made[at:at] = draw.randbytes(draw.randint(1, 40))
                case 4:
                    made[at:at] = made[: draw.randint(1, 200)]
        data = bytes(made)
        print(number, data.hex() if len(data) < 4000 else len(data), file=sys.stderr)  # of a crash this is what is left
        started = time.process_time()
        found = decoder.decode(data)
        assert time.process_time() - started < 20, "it takes too long"
        if isinstance(found, Rejection):
            assert found.reason in REASONS
            assert found.detail.endswith(".")
        else:
            height, width, channels = found.pixels.shape
            assert 0 < height * width <= 1_000_000
            assert channels == 4
        assert isinstance(read_jpeg_header(b"\xff\xd8\xff" + data), JpegHeader | None)
    grown = peak() - before
    assert grown < MEMORY, f"{grown >> 20} MiB more at the peak"
    print("decoded", examples)


def decode_in_a_process(examples: int, seed: int) -> None:
    made = ran([sys.executable, "-c", _DECODE, str(examples), str(seed)], 500)
    last = "\n".join(made.stderr.splitlines()[-12:])
    assert made.returncode == 0, f"status {made.returncode}; the last ones: {last}"
    assert made.stdout.endswith(f"decoded {examples}\n")


def test_mutilated_pictures() -> None:
    """In a process of its own: libraries in C may do worse than raise."""
    decode_in_a_process(1500, 0)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(1, 4))
def test_many_mutilated_pictures(seed: int) -> None:
    decode_in_a_process(1500 * FACTOR, seed)


@quick(200)
@given(data=st.binary(max_size=80))
def test_jpeg_headers(data: bytes) -> None:
    for start in (b"", b"\xff\xd8\xff", b"\xff\xd8\xff\xc0\x00\x11\x08", b"\xff\xd8\xff\xe1"):
        found = read_jpeg_header(start + data)
        assert found is None or found.height * found.width > 0


FUZZED = [
    test_parameters_as_json,
    test_arguments_of_the_command_line,
    test_definitions,
    test_manifests,
    test_reservations_and_withdrawals,
    test_files_of_labels,
    test_jpeg_headers,
]


@pytest.mark.nightly
@pytest.mark.parametrize("test", FUZZED, ids=lambda test: test.__name__)
def test_with_many_more_examples(test: Any, request: pytest.FixtureRequest) -> None:
    """By pytest itself, in a process of its own, so that parameters and fixtures are as they are by default."""
    chosen = (__file__, "-k", f"{test.__name__} and not many")
    environment = {**os.environ, "FUZZ_TIMES": str(FACTOR)}
    made = ran_pytest(*chosen, timeout=580, env=environment, cwd=request.config.rootpath)
    assert made.returncode == 0, made.stdout[-5000:]
