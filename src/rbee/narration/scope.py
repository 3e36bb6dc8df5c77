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


class Place:
    """A scope in force, with room for what `emit` makes of it once, for all events said in it."""

    __slots__ = ("prepared", "scope")

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.prepared: Any = None


_NOWHERE = Place(Scope())
_place: contextvars.ContextVar[Place] = contextvars.ContextVar("rbee_scope", default=_NOWHERE)
current_place = _place.get


def current_scope() -> Scope:
    """Return the scope in force here."""
    return _place.get().scope


@contextmanager
def scope(**names: str | None) -> Iterator[Scope]:
    """Set some names of the scope for the `with` block, keep the others, and restore all afterwards.

    Tasks made inside inherit the scope; threads do not, unless they are run with `run_in_scope`.
    """
    inner = msgspec.structs.replace(_place.get().scope, **names)
    token = _place.set(Place(inner))
    try:
        yield inner
    finally:
        try:
            _place.reset(token)
        except ValueError:
            # A generator closed in another context: that context never saw our value.
            pass


def run_in_scope(function: Callable[P, R]) -> Callable[P, R]:
    """Return `function` bound to the scope of this moment, for a thread or an executor."""
    captured = _place.get()

    def bound(*args: P.args, **kwargs: P.kwargs) -> R:
        context = contextvars.copy_context()

        def inside() -> Any:
            _place.set(captured)
            return function(*args, **kwargs)

        result: R = context.run(inside)
        return result

    return bound
