"""Names of the columns that the pipelines add to a user's, one list for each kind of rows.

A user's column of such a name would be replaced: it is refused where it is declared, as is any name that begins with
'_', which rows bear only while they are on their way (`tasks.io.names`).
"""

AS_OF = "as_of"
CREATED, VERSION = "feature_creation_date", "feature_version"
QUALITY = ("missing_value_ratio", "outlier_ratio", "feature_quality_score", "is_training_ready")
MISSING, OUTLYING, SCORE, READY = QUALITY

FEATURES = (*QUALITY, AS_OF, CREATED, VERSION)
"""Of rows of features, beside the entity, its features and its dimension's columns."""

EVENT_TIME, TARGET = "event_timestamp", "target"
TRAINING_SET = (EVENT_TIME, TARGET)
"""Of rows of training sets, beside the entities and the 'feature_…' columns."""

IMAGE_SCORE, IMAGE_PASSED = "data_quality_score", "validation_passed"
"""Of images, how they were judged."""

RECORDS = frozenset({*QUALITY, CREATED, VERSION, IMAGE_SCORE, IMAGE_PASSED})
"""What tells of a row's making, from which nothing is to be learned."""
