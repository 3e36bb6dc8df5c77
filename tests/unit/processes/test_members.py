from __future__ import annotations

from rbee.processes.members import Root, tree_members
from rbee.processes.procfs import ProcessEntry


def entry(pid: int, parent: int = 1, *, group: int = 0, session: int = 0, start: int = 100) -> ProcessEntry:
    return ProcessEntry(pid, parent, group or pid, session or pid, "S", 1, start)


def members(root: Root | None, *entries: ProcessEntry, marked: frozenset[int] = frozenset()) -> set[int]:
    table = {each.pid: each for each in entries}
    return tree_members(table, root, marked=marked, known=(), spared={1, 2})


def test_members_are_descendants_session_group_and_marked() -> None:
    found = members(
        Root(10, 100),
        entry(10),
        entry(11, 10),  # a child that left the session
        entry(12, 11),
        entry(13, 1, session=10),
        entry(14, 1, group=10),
        entry(15, 1),
        entry(16, 15),  # a child of a marked one
        entry(20, 1),
        marked=frozenset({15}),
    )
    assert found == {10, 11, 12, 13, 14, 15, 16}


def test_number_that_a_stranger_has_now_leads_to_nobody() -> None:
    stranger = entry(10, start=500)
    assert members(Root(10, 100, ended_ticks=300), stranger, entry(11, 10, session=10, start=510)) == set()


def test_session_of_a_dead_root_counts_for_those_from_before_its_end() -> None:
    root = Root(10, 100, ended_ticks=300)
    assert members(root, entry(11, session=10, start=200), entry(12, session=10, start=400)) == {11}
    assert members(Root(10, 100), entry(11, session=10, start=200)) == set()


def test_session_of_a_root_that_does_not_lead_it_is_left_alone() -> None:
    root = entry(10, session=5, group=5)
    assert members(Root(10, 100), root, entry(5), entry(11, session=5, group=5)) == {10}


def test_spared_process_is_no_way_to_its_children() -> None:
    assert members(None, entry(2), entry(3, 2), entry(4, 3), marked=frozenset({2})) == set()
