"""The stores of the tests of this directory: each is made once a session."""

from tests.audit.explained_store import made_store
from tests.audit.replayed import kept_aside, made_once

__all__ = ["kept_aside", "made_once", "made_store"]
