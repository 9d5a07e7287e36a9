"""Names of the columns that the pipelines add to a user's, one list for each kind of rows.

A user's column of such a name would be replaced: it is refused where it is declared, as is any name that begins with
'_', which rows have only within a job (`tasks.io.names`).
"""

AS_OF = "as_of"
CREATED, VERSION = "feature_creation_date", "feature_version"
QUALITY = ("missing_value_ratio", "outlier_ratio", "feature_quality_score", "is_training_ready")
MISSING, OUTLYING, SCORE, READY = QUALITY

FEATURES = (*QUALITY, AS_OF, CREATED, VERSION)
"""Columns of feature rows, beside the entity, its features and its dimension's columns."""

EVENT_TIME, TARGET = "event_timestamp", "target"
TRAINING_SET = (EVENT_TIME, TARGET)
"""Columns of training sets, beside the entities and the 'feature_…' columns."""

IMAGE_SCORE, IMAGE_PASSED = "data_quality_score", "validation_passed"
"""Columns of images: their quality verdict."""

RECORDS = frozenset({*QUALITY, CREATED, VERSION, IMAGE_SCORE, IMAGE_PASSED})
"""Columns about how a row was made; a model must not learn from them."""
