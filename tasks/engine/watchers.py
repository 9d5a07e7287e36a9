"""Observers of a Ray Data plan that runs: progress, pools that must end, nodes that were lost."""

from __future__ import annotations

import contextlib
import contextvars
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.core.generated.common_pb2 import NodeDeathInfo  # type: ignore[attr-defined]
from ray.data._internal.execution.execution_callback import ExecutionCallback

from tasks.io.location import seconds_from_environment

Progress = Callable[[int], None]

NODE_PATIENCE_SECONDS = 300.0
"""Time that a plan that has lost a node may make no progress."""


class Watcher:
    """Observer of the operators of a plan that runs."""

    __slots__ = ()

    def look(self, topology: Any) -> None:
        """Look at the operators, several times a second."""

    def finish(self) -> None:
        """Note that the plan has ended well."""

    def fail(self) -> None:
        """Note that the plan has failed."""


@dataclass(slots=True)
class Reached(Watcher):
    """Progress of a step, reported in its own unit."""

    step: str
    total: int
    tell: Progress
    reported: int = 0

    def look(self, topology: Any) -> None:
        """Report the progress since the last look, by the tasks that have ended."""
        for operator in topology:
            if operator.name.endswith(f"({self.step})"):
                wanted = operator.num_outputs_total() or 0
                ended = operator.metrics.num_tasks_finished
                done = self.total * min(ended, wanted) // wanted if wanted else 0
                if done > self.reported:
                    self.tell(done - self.reported)
                    self.reported = done

    def finish(self) -> None:
        """Report the rest."""
        if self.total > self.reported:
            self.tell(self.total - self.reported)
            self.reported = self.total


class Pools(Watcher):
    """Watcher that ends a failed plan's actors.

    Ray Data drops its references to them. Those that Ray is about to restart after their worker died start all the
    same, stay idle, and keep their CPUs from the next plan (Ray 2.60).
    """

    __slots__ = ("_actors",)

    def __init__(self) -> None:
        self._actors: list[Any] = []

    def look(self, topology: Any) -> None:
        """Remember the actors of all pools."""
        pools = [operator._actor_pool for operator in topology if hasattr(operator, "_actor_pool")]
        self._actors = [actor for pool in pools for actor in (*pool._running_actors, *pool._pending_actors.values())]

    def fail(self) -> None:
        """End them for good."""
        for actor in self._actors:
            ray.kill(actor)


class Nodes(Watcher):
    """Watcher that ends a plan that has lost a node and makes no progress, so that it is run again.

    Ray recomputes the objects of a dead node, and may wait for ever: a task of a shuffle's second half that is run
    again waits for its rows inside `ray.get`, and keeps its CPU meanwhile (Ray 2.60 lends a CPU on only if the awaited
    object was never made, not if it was lost). With as many such tasks as CPUs left, the tasks that would make the rows
    never run.
    """

    def __init__(self) -> None:
        self._patience = seconds_from_environment("PIPELINE_NODE_PATIENCE_SECONDS", NODE_PATIENCE_SECONDS, most=86_400)
        self._nodes = self._alive()
        self._ended, self._since = 0, time.monotonic()

    def look(self, topology: Any) -> None:
        """Check that a task has ended recently enough.

        Raises:
            TimeoutError: no task has ended for too long, and nodes are lost, not just released as idle.
        """
        ended = sum(operator.metrics.num_tasks_finished for operator in topology)
        now = time.monotonic()
        if ended != self._ended:
            self._ended, self._since = ended, now
        elif now - self._since > self._patience:
            self._since = now
            if lost := self._nodes - self._alive(_LET_GO):
                raise TimeoutError(
                    f"of {len(self._nodes)} Ray nodes {len(lost)} were lost, and no task of the job has ended for "
                    f"{self._patience:g} s (PIPELINE_NODE_PATIENCE_SECONDS) since: it is given up, to be run anew"
                )

    @staticmethod
    def _alive(*deaths: int) -> frozenset[str]:
        """Return the nodes that are alive, or that ended for one of some reasons."""
        nodes = ray.nodes()  # type: ignore[no-untyped-call]
        return frozenset(node["NodeID"] for node in nodes if node["Alive"] or node.get("DeathReason") in deaths)


_LET_GO = NodeDeathInfo.AUTOSCALER_DRAIN_IDLE  # such a node holds no rows
_WATCHED: dict[str, tuple[contextvars.Context, Sequence[Watcher]]] = {}
_WATCH = "watchers"


class _Watch(ExecutionCallback):
    """Ray Data callback that calls a plan's watchers repeatedly; their name is in the plan's context.

    The thread that runs the plan calls it; that thread doesn't know the flow run, so it gets our context. (Ray Data's
    context holds the class and not the watchers, as it is pickled for each task.)
    """

    def on_execution_step(self, executor: Any) -> None:
        for context, watcher in self._watchers(executor):
            context.run(watcher.look, executor._topology)

    def after_execution_succeeds(self, executor: Any) -> None:
        for context, watcher in self._watchers(executor):
            context.run(watcher.finish)

    def after_execution_fails(self, executor: Any, error: Exception) -> None:  # noqa: ARG002
        for context, watcher in self._watchers(executor):
            context.run(watcher.fail)

    @staticmethod
    def _watchers(executor: Any) -> Iterator[tuple[contextvars.Context, Watcher]]:
        context, watchers = _WATCHED.get(executor._data_context.get_config(_WATCH, ""), (None, ()))
        for watcher in watchers:
            assert context is not None
            yield context, watcher


@contextlib.contextmanager
def watched(context: Any, watchers: Sequence[Watcher]) -> Iterator[None]:
    """Watch the plans that are made in this block, and the nodes that they run on."""
    name = uuid.uuid4().hex
    _WATCHED[name] = (contextvars.copy_context(), [*watchers, Nodes(), Pools()])
    others = context.custom_execution_callback_classes
    context.set_config(_WATCH, name)
    context.custom_execution_callback_classes = [*others, _Watch]
    try:
        yield
    finally:
        context.remove_config(_WATCH)
        context.custom_execution_callback_classes = others
        del _WATCHED[name]
