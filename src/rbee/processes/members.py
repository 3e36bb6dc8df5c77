"""Decide which processes belong to a tree, from what /proc showed. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from msgspec import Struct

from rbee.processes.procfs import Identity, ProcessEntry


class Root(Struct, frozen=True):
    """The process a tree is named after; `ended_ticks` is when a `Child`'s end was seen."""

    pid: int
    start_time: int
    ended_ticks: int | None = None

    @property
    def identity(self) -> Identity:
        """Its number and start time."""
        return (self.pid, self.start_time)


def tree_members(
    entries: Mapping[int, ProcessEntry],
    root: Root | None,
    *,
    marked: Collection[int],
    known: Collection[Identity],
    spared: Collection[int],
) -> set[int]:
    """Decide which processes belong to a tree.

    They are the root, who shares its session or group, who carries the marker, who was a member before, and
    all descendants of these.

    Args:
        entries: Every process there is.
        root: The process the tree is named after, dead or alive.
        marked: Who carries the tree's marker in its environment.
        known: Members of earlier looks.
        spared: Who is never a member, nor a way to one.
    """
    members = {
        entry.pid
        for entry in entries.values()
        if entry.pid in marked
        or entry.identity in known
        or (root is not None and _is_near(entry, root, entries.get(root.pid)))
    } - set(spared)
    children: dict[int, list[int]] = {}
    for entry in entries.values():
        children.setdefault(entry.parent, []).append(entry.pid)
    pending = list(members)
    while pending:
        for pid in children.get(pending.pop(), ()):
            if pid not in members and pid not in spared:
                members.add(pid)
                pending.append(pid)
    return members


def _is_near(entry: ProcessEntry, root: Root, holder: ProcessEntry | None) -> bool:
    """Tell whether `entry` is the root or shares its session or group; `holder` has the root's number now."""
    if holder is not None and holder.start_time == root.start_time:
        if entry.pid == root.pid:
            return True
        return root.pid in (entry.session, entry.group) and root.pid in (holder.session, holder.group)
    # The root is gone and its number may be a stranger's. A session or group of that number is ours only for
    # those who were in one before the number became free.
    before = root.ended_ticks is not None and entry.start_time <= root.ended_ticks
    return before and entry.pid != root.pid and root.pid in (entry.session, entry.group)
