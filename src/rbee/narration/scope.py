"""Whom a sentence is about: job, correlation id, actor and model, carried in contextvars."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import msgspec
from msgspec import Struct

P = ParamSpec("P")
R = TypeVar("R")


class Scope(Struct, frozen=True):
    """What is filled in for every event said within the scope; None means absent."""

    job_id: str | None = None
    correlation_id: str | None = None
    actor: str | None = None
    hive_id: str | None = None
    worker_id: str | None = None
    model: str | None = None


_EMPTY = Scope()  # frozen, so one default serves all
_scope: contextvars.ContextVar[Scope] = contextvars.ContextVar("rbee_scope", default=_EMPTY)


def current_scope() -> Scope:
    """Return the scope in force here."""
    return _scope.get()


@contextmanager
def scope(**names: str | None) -> Iterator[Scope]:
    """Set some names of the scope for the `with` block, keep the others, and restore all afterwards.

    Tasks made inside inherit the scope; threads do not, unless they are run with `run_in_scope`.
    """
    inner = msgspec.structs.replace(_scope.get(), **names)
    token = _scope.set(inner)
    try:
        yield inner
    finally:
        try:
            _scope.reset(token)
        except ValueError:
            # A generator closed in another context: that context never saw our value.
            pass


def run_in_scope(function: Callable[P, R]) -> Callable[P, R]:
    """Return `function` bound to the scope of this moment, for a thread or an executor."""
    captured = _scope.get()

    def bound(*args: P.args, **kwargs: P.kwargs) -> R:
        context = contextvars.copy_context()

        def inside() -> Any:
            _scope.set(captured)
            return function(*args, **kwargs)

        result: R = context.run(inside)
        return result

    return bound
