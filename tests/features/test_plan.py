"""What a run will do is decided before it starts, and what can't be done is said."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.features.config import FeatureStoreConfig
from tasks.features.definitions import Column, Definitions, DimensionSource, EventSource, FeatureGroup
from tasks.features.plan import FeaturePlan, check_mappings, needs_sample, plan_features, with_uris
from tasks.features.rows import ColumnPlan, judge
from tasks.features.sources import read, read_units
from tasks.features.standard import STANDARD
from tasks.io.errors import DefinitionError, InputError, SourceError

AS_OF = dt.datetime(2025, 1, 1, tzinfo=dt.UTC)
MOMENT = dt.datetime(2024, 6, 1)
TRANSACTIONS: dict[str, Any] = {"customer_id": [1], "product_id": [7], "timestamp": [MOMENT], "amount": [2.5]}
CUSTOMERS: dict[str, Any] = {
    "customer_id": [1],
    "age": [40],
    "gender": ["female"],
    "location": ["Lima"],
    "signup_date": [dt.date(2020, 1, 1)],
}
PRODUCTS: dict[str, Any] = {
    "product_id": [7],
    "category": ["toys"],
    "brand": ["b"],
    "price": [2.0],
    "launch_date": [dt.date(2020, 1, 1)],
}
WITH_CATEGORY = TRANSACTIONS | {"category": ["books"]}


def plan(
    directory: Path,
    transactions: dict[str, Any] | str | None = None,
    customers: dict[str, Any] | None = None,
    products: dict[str, Any] | None = None,
    own: Definitions | None = None,
    **config: Any,
) -> FeaturePlan:
    """The only plan for tables that are given as columns (or CSV text)."""
    uris = {}
    for name, table in (
        ("transactions", transactions or WITH_CATEGORY),
        ("customers", customers),
        ("products", products),
    ):
        if isinstance(table, str):
            uris[name] = str(directory / f"{name}.csv")
            Path(uris[name]).write_text(table)
        elif table is not None:
            uris[name] = str(directory / f"{name}.parquet")
            pq.write_table(pa.table(table), uris[name])
    chosen = FeatureStoreConfig(**uris, **config)
    (only,) = plan_features(with_uris((own or Definitions()).over(STANDARD), chosen), chosen, (AS_OF,))
    return only


def columns_of(planned: FeaturePlan) -> dict[str, ColumnPlan]:
    return {column.name: column for column in planned.events.rows.columns}


def test_all_groups_are_computed_from_one_reading(tmp_path: Path) -> None:
    planned = plan(tmp_path, WITH_CATEGORY, CUSTOMERS, PRODUCTS, rows_per_bucket=5000)
    assert [group.group.name for group in planned.groups] == ["customer-features", "product-features"]
    assert [group.dimension and group.dimension.name for group in planned.groups] == ["customers", "products"]
    assert planned.groups[0].columns == ("amount", "category", "customer_id", "product_id", "timestamp")
    assert planned.groups[1].columns == ("amount", "customer_id", "product_id", "timestamp")
    assert (planned.as_of, planned.time, planned.rows_per_bucket) == ((AS_OF,), "timestamp", 5000)
    assert planned.events.rows.categories == ("category",)


def test_a_dimension_that_is_not_given_is_not_joined(tmp_path: Path) -> None:
    assert [group.dimension for group in plan(tmp_path).groups] == [None, None]


def test_a_column_of_the_transactions_is_taken_from_there(tmp_path: Path) -> None:
    planned = plan(tmp_path, WITH_CATEGORY, products=PRODUCTS)
    assert planned.lookups == ()
    assert "category" in planned.events.rows.file_columns


CHOICES = [
    # the category's columns in the transactions, the mapped one, the one that is read, words of the plan's note
    (["product_category"], None, "product_category", "not 'category' of products"),
    (["category"], None, "category", "not 'category' of products"),
    (
        ["category", "product_category"],
        None,
        "category",
        "not its column 'product_category' or 'category' of products",
    ),
    (["category", "product_category"], "product_category", "product_category", None),
]


@pytest.mark.parametrize(("columns", "mapped", "expected", "note"), CHOICES)
def test_the_transactions_own_category_comes_before_any_look_up(
    tmp_path: Path, columns: list[str], mapped: str | None, expected: str, note: str | None
) -> None:
    mapping = {"category": mapped} if mapped else {}
    rows = TRANSACTIONS | {name: ["books"] for name in columns}
    planned = plan(tmp_path, rows, products=PRODUCTS, transaction_columns=mapping)
    category = columns_of(planned)["category"]
    assert (category.source_name, category.kind, planned.lookups) == (expected, "category", ())
    sentence = f"'category' is the column '{expected}' of transactions, {note}, which may differ"
    assert planned.notes == ((sentence,) if note else ())


def test_a_plan_without_a_choice_says_nothing(tmp_path: Path) -> None:
    assert plan(tmp_path, TRANSACTIONS, products=PRODUCTS).notes == ()
    assert plan(tmp_path, TRANSACTIONS | {"product_category": ["books"]}).notes == ()
    dated = PRODUCTS | {"timestamp": [MOMENT]}
    assert plan(tmp_path, TRANSACTIONS, products=dated).notes == ()


def test_else_it_is_looked_up_in_a_dimension(tmp_path: Path) -> None:
    planned = plan(tmp_path, TRANSACTIONS, products=PRODUCTS)
    (lookup,) = planned.lookups
    assert (lookup.key, lookup.columns, lookup.dimension.name) == ("product_id", ("category",), "products")
    assert lookup.dimension.rows.file_columns == ("product_id", "category")  # the others are read for the join only
    assert "category" not in columns_of(planned)


def test_a_mapped_column_is_looked_up_by_its_own_name(tmp_path: Path) -> None:
    products = {"sku": [7], "department": ["toys"]}
    mapping = {"product_id": "sku", "category": "department"}
    planned = plan(tmp_path, TRANSACTIONS, products=products, product_columns=mapping)
    (lookup,) = planned.lookups
    assert lookup.dimension.rows.file_columns == ("sku", "department")
    assert planned.groups[1].dimension is not None
    assert planned.groups[1].dimension.rows.file_columns == ("sku", "department")  # exactly the mapped columns


def test_a_group_that_does_not_need_it_does_without(tmp_path: Path) -> None:
    planned = plan(tmp_path, TRANSACTIONS, groups="product-features")
    assert [group.group.name for group in planned.groups] == ["product-features"]
    assert planned.lookups == ()


def test_the_mapping_of_transactions(tmp_path: Path) -> None:
    renamed = {"household": [1], "sku": [7], "at": [MOMENT], "sales": [2.5], "kind": ["toys"]}
    mapping = dict(zip(WITH_CATEGORY, renamed, strict=True))
    planned = plan(tmp_path, renamed, transaction_columns=mapping)
    assert {name: column.source_name for name, column in columns_of(planned).items()} == mapping


KEYS = [
    # transactions' key, customers' key, what both become
    ("integers", pa.array([1], pa.int32()), pa.array([1], pa.int64()), "int64"),
    ("text", pa.array(["1"]), pa.array(["1"]), "string"),
    ("integers and text", pa.array([1]), pa.array(["1"]), "string"),
    ("text and integers", pa.array(["1"]), pa.array([1]), "string"),
    ("floats, as a null makes them", pa.array([1.0]), pa.array([1]), "int64"),
    ("floats and text", pa.array([1.0]), pa.array(["1"]), "string"),
    ("unsigned", pa.array([1], pa.uint64()), pa.array([1]), "int64"),
    ("categories", pa.array(["1"]).dictionary_encode(), pa.array(["1"]), "string"),
    ("no value at all in one", pa.array([1]), pa.nulls(1), "int64"),
]


@pytest.mark.parametrize(("why", "events", "dimension", "expected"), KEYS, ids=[case[0] for case in KEYS])
def test_a_key_is_of_one_type_in_all_tables(
    tmp_path: Path, why: str, events: pa.Array, dimension: pa.Array, expected: str
) -> None:
    planned = plan(tmp_path, WITH_CATEGORY | {"customer_id": events}, CUSTOMERS | {"customer_id": dimension})
    customers = planned.groups[0].dimension
    assert customers is not None
    assert columns_of(planned)["customer_id"].key_type == expected
    assert customers.rows.columns[0].key_type == expected
    ours = judge(pl.DataFrame({"customer_id": pl.from_arrow(events)}), only_key(planned.events.rows))
    theirs = judge(pl.DataFrame({"customer_id": pl.from_arrow(dimension)}), only_key(customers.rows))
    assert ours.kept.height == 1
    assert theirs.kept.to_dicts() in ([], ours.kept.to_dicts())


def only_key(rows: Any) -> Any:
    return type(rows)(source="x", columns=tuple(c for c in rows.columns if c.name == "customer_id"))


CSV_KEYS = [
    ("integers", "1", "int64"),
    ("leading zeros", "001", "string"),
    ("text", "c-1", "string"),
    ("floats", "1.0", "int64"),
]


@pytest.mark.parametrize(("why", "key", "expected"), CSV_KEYS, ids=[case[0] for case in CSV_KEYS])
def test_key_types_of_csv(tmp_path: Path, why: str, key: str, expected: str) -> None:
    text = f"customer_id,product_id,timestamp,amount,category\n{key},7,2024-01-01,1,toys\n"
    planned = plan(tmp_path, text)
    assert columns_of(planned)["customer_id"].key_type == expected
    (unit,) = read_units(planned.events.table, planned.events.rows.file_columns, 10)
    (piece,) = read(unit)
    judged = judge(piece.frame, planned.events.rows)
    assert judged.kept["customer_id"].cast(pl.String).to_list() == [key.removesuffix(".0")]


def test_undeclared_columns_of_csv_have_their_type(tmp_path: Path) -> None:
    """A group of one's own over the standard source may use any column of the files."""
    group = FeatureGroup(name="baskets", entity="customer_id", features={"items": pl.col("quantity").sum()})
    text = "customer_id,product_id,timestamp,amount,quantity\n1,7,2024-01-01,1,3\n"
    planned = plan(tmp_path, text, own=Definitions(groups={"baskets": group}), groups="baskets")
    column = columns_of(planned)["quantity"]
    assert (column.kind, column.dtype) == ("any", pl.Int64)


USERS = DimensionSource(name="users", key="user", columns=("country",))
VISITS = EventSource(
    name="visits", time="at", columns={"user": Column(kind="key", required=True), "at": Column(kind="time")}
)


@pytest.mark.parametrize("values", [[1.0], [1]])
def test_an_entity_is_read_as_a_key_though_it_is_not_declared_as_one(tmp_path: Path, values: list[Any]) -> None:
    group = FeatureGroup(name="by-store", entity="store", features={"n": pl.len()})
    own = Definitions(groups={"by-store": group}).over(STANDARD)
    planned = plan(tmp_path, WITH_CATEGORY | {"store": values}, own=own, groups=("by-store",))
    assert (columns_of(planned)["store"].kind, columns_of(planned)["store"].key_type) == ("key", "int64")


BY_USER = FeatureGroup(name="engagement", entity="user", source="visits", features={"n": pl.len()})
BY_PRODUCT = FeatureGroup(name="by-product", entity="product_id", dimension="customers", features={"n": pl.len()})
MISTAKES: list[tuple[str, dict[str, Any], type[InputError], str]] = [
    (
        "a column that is nowhere",
        {"transactions": TRANSACTIONS},
        SourceError,
        r"customer-features needs the column 'category', which stands in none of transactions; if it bears another "
        r"name, map it \(--transaction-columns or --product-columns '\{\"category\": \"…\"\}'\), or choose other "
        r"--groups\. Columns of transactions: customer_id, product_id, timestamp, amount",
    ),
    (
        "nor in a dimension",
        {
            "transactions": TRANSACTIONS,
            "products": {"product_id": [7], "kind": ["a"]},
            "product_columns": {"product_id": "product_id", "brand": "kind"},
        },
        SourceError,
        r"'category', which stands in none of transactions, products",
    ),
    (
        "no amount",
        {"transactions": {k: v for k, v in WITH_CATEGORY.items() if k != "amount"} | {"amuont": [1.0]}},
        SourceError,
        r"has no column 'amount'. Did you mean 'amuont'\?.*--transaction-columns",
    ),
    (
        "a mapping to what isn't there",
        {"transaction_columns": {"amount": "sales_value"}},
        SourceError,
        r"no column 'sales_value'.*The mapping says that it is 'amount'",
    ),
    (
        "a dimension without its key",
        {"customers": {"household": [1], "age": [3]}},
        SourceError,
        r"customers: .*customers\.parquet has no column 'customer_id'.*--customer-columns",
    ),
    (
        "a dimension without its columns",
        {"customers": {"customer_id": [1], "age": [3]}},
        SourceError,
        r"customers: .* has no column 'gender'",
    ),
    (
        "integers for times",
        {"transactions": WITH_CATEGORY | {"timestamp": [1]}},
        SourceError,
        r"'timestamp' holds integers \(int64\); say what they count since 1970: --epoch-unit s, ms",
    ),
    (
        "floats for times",
        {"transactions": WITH_CATEGORY | {"timestamp": [1.5]}},
        SourceError,
        r"'timestamp' is of type double; it must be a timestamp, date, ISO 8601 text",
    ),
    (
        "a time of the day",
        {"transactions": WITH_CATEGORY | {"timestamp": [dt.time(12)]}},
        SourceError,
        r"is of type time64",
    ),
    (
        "a duration",
        {"transactions": WITH_CATEGORY | {"timestamp": [dt.timedelta(1)]}},
        SourceError,
        r"is of type duration",
    ),
    (
        "a column of the dimension that is a feature",
        {"customers": CUSTOMERS | {"total_spent": [1.0]}, "customer_columns": {"total_spent": "total_spent"}},
        DefinitionError,
        r"total_spent is both a feature and a column of the dimension 'customers'",
    ),
    (
        "a derived feature that looks at other entities",
        {
            "own": Definitions(
                groups={
                    "ranks": FeatureGroup(
                        name="ranks",
                        entity="customer_id",
                        features={"n": pl.len()},
                        derived={"rank": pl.col("n").rank()},
                    )
                }
            )
        },
        DefinitionError,
        r"'ranks': derived feature 'rank' = .* looks at other entities' rows, or at their order, .*--rows-per-bucket",
    ),
    (
        "a misspelled group",
        {"groups": "customer-feature"},
        DefinitionError,
        r"'customer-feature'; did you mean 'customer-features'",
    ),
    (
        "a dimension by another key",
        {"customers": CUSTOMERS, "own": Definitions(groups={"by-product": BY_PRODUCT})},
        DefinitionError,
        r"'by-product' is about product_id, but its dimension 'customers' is keyed by customer_id; map the key to",
    ),
    (
        "a source of nowhere",
        {"own": Definitions(groups={"engagement": BY_USER}, events={"visits": VISITS})},
        SourceError,
        r"the source 'visits' that engagement reads has no URI; give 'uri' of 'visits' in the definitions",
    ),
]


@pytest.mark.parametrize(("why", "arguments", "kind", "message"), MISTAKES, ids=[case[0] for case in MISTAKES])
def test_mistakes(tmp_path: Path, why: str, arguments: dict[str, Any], kind: type[InputError], message: str) -> None:
    with pytest.raises(kind, match=message):
        plan(tmp_path, **arguments)


def test_integers_are_times_with_a_unit(tmp_path: Path) -> None:
    planned = plan(tmp_path, WITH_CATEGORY | {"timestamp": [1704067200]}, epoch_unit="s")
    assert planned.events.rows.epoch_unit == "s"


DATES = [
    ("days", [19970101, 19970630], "such as 19970101: they are dates, not counts .* as ISO 8601, 1997-01-01"),
    ("minutes", [202401011230, 202412312359], "ISO 8601, 2024-01-01T12:30:00"),
    ("seconds", [20240101123059], "ISO 8601, 2024-01-01T12:30:59"),
]


@pytest.mark.parametrize("case", DATES, ids=[case[0] for case in DATES])
@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("unit", [None, "s"])
def test_dates_in_digits_are_no_counts(
    tmp_path: Path, case: tuple[str, list[int], str], kind: str, unit: str | None
) -> None:
    _, times, message = case
    columns = {name: values * len(times) for name, values in WITH_CATEGORY.items()} | {"timestamp": times}
    given: Any = pl.DataFrame(columns).write_csv() if kind == "csv" else columns
    with pytest.raises(SourceError, match=message):
        plan(tmp_path, given, epoch_unit=unit)


@pytest.mark.parametrize("times", [[19971301], [19970101, 1704067200], [0, 20240101]])
def test_counts_that_are_no_dates_are_counts(tmp_path: Path, times: list[int]) -> None:
    columns = {name: values * len(times) for name, values in WITH_CATEGORY.items()} | {"timestamp": times}
    assert plan(tmp_path, columns, epoch_unit="s").events.rows.epoch_unit == "s"


def test_what_is_taken_for_null_is_said(tmp_path: Path) -> None:
    header = "customer_id,product_id,timestamp,amount,category\n"
    said = plan(tmp_path, header + "1,2,2024-01-01,3,NA\n2,2,2024-01-01,3,toys\n").notes
    assert said[0].startswith("null in CSV: blank fields, null, NULL")
    assert said[1:] == (
        "transactions: in the column 'category', which is text, 'NA' is a value like any other; if it means 'missing', "
        "say so: --null-values=NA",
    )
    given = plan(tmp_path, header + "1,2,2024-01-01,3,NA\n", null_values="NA,-")
    assert given.notes == ("null in CSV: blank fields, NA, -",)
    assert plan(tmp_path, WITH_CATEGORY).notes == ()  # Parquet has nulls of its own


def test_every_file_is_asked_for_its_kind_of_time(tmp_path: Path) -> None:
    """The first file has times, the second has integers, which without a unit would be taken for anything."""
    for name, time in (("a", MOMENT), ("b", 1704067200)):
        pq.write_table(pa.table(WITH_CATEGORY | {"timestamp": [time]}), tmp_path / f"{name}.parquet")
    config = FeatureStoreConfig(transactions=str(tmp_path))
    with pytest.raises(SourceError, match="holds integers"):
        plan_features(with_uris(STANDARD, config), config, (AS_OF,))


def test_choices_reach_the_rows(tmp_path: Path) -> None:
    choices = {"negative_amounts": "reject", "timezone": "Europe/Berlin", "earliest": dt.datetime(2020, 1, 1)}
    rows = plan(tmp_path, **choices).events.rows
    assert rows.reject_negative == ("amount",)
    assert rows.timezone == "Europe/Berlin"
    assert rows.earliest == dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
    assert rows.as_of == AS_OF
    assert plan(tmp_path).events.rows.reject_negative == ()


def test_one_plan_a_source(tmp_path: Path) -> None:
    (tmp_path / "visits.csv").write_text("user,at\nann,2024-01-01\n")
    (tmp_path / "users.csv").write_text("user,country\nann,de\n")
    pq.write_table(pa.table(WITH_CATEGORY), tmp_path / "transactions.parquet")
    visits = EventSource(name="visits", time="at", columns=VISITS.columns, uri=str(tmp_path / "visits.csv"))
    users = DimensionSource(name="users", key="user", columns=("country",), uri=str(tmp_path / "users.csv"))
    group = FeatureGroup(name="engagement", entity="user", source="visits", dimension="users", features={"n": pl.len()})
    own = Definitions(events={"visits": visits}, dimensions={"users": users}, groups={"engagement": group})
    config = FeatureStoreConfig(transactions=str(tmp_path / "transactions.parquet"))
    plans = plan_features(with_uris(own.over(STANDARD), config), config, (AS_OF,))
    assert [(one.events.name, len(one.groups)) for one in plans] == [("transactions", 2), ("visits", 1)]
    assert plans[1].groups[0].dimension is not None
    assert plans[1].groups[0].dimension.rows.file_columns == ("user", "country")


OWN = Definitions(
    groups={"engagement": BY_USER},
    events={"visits": EventSource(name="visits", time="at", columns=VISITS.columns, uri="v")},
)
SAMPLED: list[tuple[str, Definitions, dict[str, Any], bool]] = [
    ("nothing is given", Definitions(), {}, True),
    ("transactions are given", Definitions(), {"transactions": "t"}, False),
    ("own groups beside the standard ones", OWN, {}, True),
    ("own groups only", OWN, {"groups": "engagement"}, False),
]


@pytest.mark.parametrize(("why", "own", "config", "expected"), SAMPLED, ids=[case[0] for case in SAMPLED])
def test_the_sample_is_needed(why: str, own: Definitions, config: dict[str, Any], expected: bool) -> None:
    assert needs_sample(own.over(STANDARD), FeatureStoreConfig(**config)) == expected


URIS: list[tuple[str, dict[str, Any], dict[str, str | None]]] = [
    ("none", {}, {"transactions": None, "customers": None, "products": None}),
    ("transactions", {"transactions": "t"}, {"transactions": "t", "customers": None, "products": None}),
    (
        "all",
        {"transactions": "t", "customers": "c", "products": "p"},
        {"transactions": "t", "customers": "c", "products": "p"},
    ),
]


@pytest.mark.parametrize(("why", "given", "expected"), URIS, ids=[case[0] for case in URIS])
def test_with_uris(why: str, given: dict[str, Any], expected: dict[str, str | None]) -> None:
    found = with_uris(STANDARD, FeatureStoreConfig(**given))
    assert {source.name: source.uri for source in [*found.events.values(), *found.dimensions.values()]} == expected
    assert found.groups == STANDARD.groups


def test_a_mapping_of_the_definitions_stays_where_the_configuration_gives_none() -> None:
    customers = DimensionSource(name="customers", key="customer_id", uri="own.csv", mapping={"customer_id": "id"})
    own = Definitions(dimensions={"customers": customers}).over(STANDARD)
    given = {"transactions": "t", "customers": "c"}
    assert with_uris(own, FeatureStoreConfig(**given)).dimensions["customers"].mapping == {"customer_id": "id"}
    mapped = FeatureStoreConfig(**given, customer_columns={"customer_id": "no"})
    assert with_uris(own, mapped).dimensions["customers"].mapping == {"customer_id": "no"}


def test_a_mapping_of_what_nothing_reads_is_a_slip() -> None:
    def check(mapping: dict[str, str], own: Definitions | None = None, others: Any = ()) -> None:
        config = FeatureStoreConfig(transactions="t", transaction_columns=mapping)
        check_mappings(with_uris((own or Definitions()).over(STANDARD), config), others)

    by_store = FeatureGroup(name="stores", entity="store", features={"n": pl.len()})
    check({"category": "dept", "customer_id": "household"})
    check({"store": "store_nbr"}, Definitions(groups={"stores": by_store}))
    check({"store": "store_nbr"}, others=[by_store])
    with pytest.raises(
        DefinitionError, match=r"transactions gives 'categry', a column that nothing .*did you mean 'cat"
    ):
        check({"categry": "dept"})
    with pytest.raises(DefinitionError, match=r"gives 'store', a column that nothing reads"):
        check({"store": "store_nbr"})
