from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rbee.contracts.events import decode_source_line
from rbee.contracts.ids import new_id
from rbee.contracts.operations import QueenCheck
from rbee.contracts.states import JobState, Reason
from rbee.contracts.stretches import split
from rbee.errors import InvalidRequestError
from rbee.queen.ingest import STRETCHES_MAX, parse_batch
from tests.unit.queen.queen_stage import Parts, narration, parts, stretch, token, worker_exit

# Exactly once


def lines_of(job_id: str) -> st.SearchStrategy[bytes]:
    """Lines of all kinds: believed, forged, raw, empty, overlong."""
    return st.one_of(
        st.integers(0, 10**6).map(lambda number: token(job_id, text=str(number))),
        st.integers(0, 10**6).map(lambda number: narration(message=str(number), job_id=job_id, attempt=1)),
        st.just(token("job-of-another")),
        st.integers(0, 10**6).map(lambda number: b"raw %d\n" % number),
        st.just(b"\n"),
        st.sampled_from([16383, 16384, 16385, 40_000]).map(lambda size: b"r" * size + b"\n"),
        st.just(token(job_id, text="t" * 30_000)),
    )


JOB = new_id("job")
contents = st.builds(
    lambda lines, rest: b"".join(lines) + rest,
    st.lists(lines_of(JOB), min_size=1, max_size=12),
    st.sampled_from([b"", b"unfinished", b"u" * 20_000]),
)


async def _logs_of(files: dict[str, bytes], batches: list[list[tuple[str, int, int]]]) -> dict[str, Any]:
    """Bring the files in these batches, then what is missing; return the logs and cursors."""
    async with parts() as queen:
        sources = {}
        for name in files:
            worker_id = await queen.worker()
            queen.place(JOB, worker_id)
            sources[name] = f"{worker_id}/stdout"
        await queen.registry.store.append(JOB, [])
        await _make_job(queen)
        for batch in batches:
            await queen.bring(
                *[stretch(sources[name], start, files[name][start:end]) for name, start, end in batch]
            )
        logs = {
            name: _plain(await queen.log(source.partition("/")[0]), sources) for name, source in sources.items()
        }
        by_source = {
            name: [
                event for event in _plain(await queen.log(JOB), sources) if event.get("src", {}).get("id") == name
            ]
            for name in files
        }
        cursors = await queen.registry.store.cursors(sources.values())
        return {
            "workers": logs,
            "job": by_source,
            "cursors": {name: cursors[source][0] for name, source in sources.items()},
        }


async def _make_job(queen: Parts) -> None:
    await queen.registry.create(QueenCheck(), correlation_id="c", job_id=JOB)


def _plain(events: list[dict[str, Any]], sources: dict[str, str]) -> list[dict[str, Any]]:
    """Leave out what differs from run to run: numbers, times, ids of workers."""
    names = {source: name for name, source in sources.items()}
    plain = []
    for event in events:
        kept = {key: value for key, value in event.items() if key not in ("seq", "observed_ts", "ts")}
        if "src" in kept:
            kept["src"] = {**kept["src"], "id": names[kept["src"]["id"]]}
        plain.append(kept)
    return plain


def _borders(data: bytes) -> list[int]:
    """Return where a follower may cut: at the ends of pieces."""
    pieces = split(data, offset=0, part=0, final=True)
    return [*(piece.offset for piece in pieces.pieces), pieces.offset]


@st.composite
def deliveries(draw: st.DrawFn) -> tuple[dict[str, bytes], list[list[tuple[str, int, int]]]]:
    """Draw two files, and batches that bring all of them: with repeats, overlaps, and what comes too early."""
    files = {name: draw(contents) for name in ("a", "b")}
    batches: list[list[tuple[str, int, int]]] = []
    progress = dict.fromkeys(files, 0)
    borders = {name: _borders(data) for name, data in files.items()}
    while any(progress[name] < len(files[name]) for name in files):
        batch = []
        for name in draw(st.permutations(list(files))):
            if progress[name]:  # noise: a repeat, or something beyond the cursor
                begin, end = sorted(draw(st.lists(st.sampled_from(borders[name]), min_size=2, max_size=2)))
                if end <= progress[name] or begin > progress[name]:
                    batch.append(
                        (name, draw(st.integers(min(begin, end - 1), begin)) if begin < end else begin, end)
                    )
            ahead = [border for border in borders[name] if border > progress[name]]
            if ahead:
                end = draw(st.sampled_from(ahead))
                batch.append((name, draw(st.integers(0, progress[name])), end))
                progress[name] = end
        batches.append(batch)
    return files, batches


@given(deliveries())
@settings(max_examples=60, deadline=None)
def test_any_delivery_gives_the_same_logs_as_one_batch(
    delivery: tuple[dict[str, bytes], list[list[tuple[str, int, int]]]],
) -> None:
    files, batches = delivery
    whole = [[(name, 0, len(data)) for name, data in files.items()]]

    async def both() -> tuple[dict[str, Any], dict[str, Any]]:
        return await _logs_of(files, batches), await _logs_of(files, whole)

    brought, expected = asyncio.run(both())

    assert brought == expected
    assert brought["cursors"] == {name: len(data) for name, data in files.items()}
    for name, data in files.items():
        events = [*brought["workers"][name], *brought["job"][name]]
        offsets = sorted(event["src"]["offset"] for event in events)
        assert offsets == [start for start, end in pairwise(_borders(data)) if end > start]


# Cursors


async def test_batch_below_the_cursor_writes_nothing_and_answers_the_cursor(queen: Parts) -> None:
    source = f"{await queen.worker()}/stdout"
    await queen.bring(stretch(source, 0, b"one\ntwo\n"))

    assert await queen.bring(stretch(source, 0, b"one\n")) == {source: 8}
    assert len(await queen.log(source.partition("/")[0])) == 2


async def test_batch_above_the_cursor_is_refused_with_the_cursor(queen: Parts) -> None:
    source = f"{await queen.worker()}/stdout"
    await queen.bring(stretch(source, 0, b"one\n"))

    assert await queen.bring(stretch(source, 8, b"three\n")) == {source: 4}
    assert len(await queen.log(source.partition("/")[0])) == 1


async def test_unknown_source_is_taken_from_the_first_offset_offered(queen: Parts) -> None:
    source = f"{new_id('worker')}/stdout"

    assert await queen.bring(stretch(source, 4096, b"late\n")) == {source: 4101}
    [event] = await queen.log(source.partition("/")[0])
    assert (event["text"], event["src"]["offset"]) == ("late", 4096)


async def test_empty_stretch_asks_for_the_cursor(queen: Parts) -> None:
    source = f"{await queen.worker()}/stdout"
    await queen.bring(stretch(source, 0, b"one\n"))

    assert await queen.bring(stretch(source, 4, b"")) == {source: 4}


async def test_lost_stretch_is_one_gap_in_every_log_concerned_and_moves_the_cursor(queen: Parts) -> None:
    job_id = await queen.job()
    worker_id = await queen.worker(job_id)
    other = await queen.job()
    queen.place(other, worker_id)
    source = f"{worker_id}/stdout"
    await queen.bring(stretch(source, 0, b"one\n"))
    lost = b'{"source":"%b","offset":4,"lost_bytes":96,"lost_lines":3}\n' % source.encode()

    assert await queen.bring(lost) == {source: 100}
    assert await queen.bring(lost) == {source: 100}
    for log_id in (worker_id, job_id, other):
        gaps = [event for event in await queen.log(log_id) if event["kind"] == "gap"]
        assert [(gap["lost_bytes"], gap["lost_lines"], gap["source"]) for gap in gaps] == [(96, 3, source)]
    assert await queen.bring(stretch(source, 100, b"next\n")) == {source: 105}


async def test_loss_that_begins_below_the_cursor_counts_only_what_is_above(queen: Parts) -> None:
    worker_id = await queen.worker()
    source = f"{worker_id}/stdout"
    await queen.bring(stretch(source, 0, b"one\n"))

    await queen.bring(b'{"source":"%b","offset":0,"lost_bytes":100}\n' % source.encode())

    assert (await queen.log(worker_id))[-1]["lost_bytes"] == 96


async def test_line_for_an_ended_job_goes_to_the_worker_without_its_text(queen: Parts) -> None:
    job_id = await queen.job()
    worker_id = await queen.worker(job_id)
    queen.place(job_id, worker_id)
    await _end(queen, job_id)
    before = await queen.log(job_id)

    await queen.bring(stretch(f"{worker_id}/stdout", 0, token(job_id, text="late words")))

    assert await queen.log(job_id) == before
    [event] = await queen.log(worker_id)
    assert event["action"] == "queen_refuse_line"
    assert "late words" not in str(event)


async def _end(queen: Parts, job_id: str) -> None:
    await queen.registry.end(job_id, JobState.CANCELLED, reason=Reason.USER, message="Enough.")


# Whose file


@pytest.mark.parametrize(
    "name",
    ["other hive", "job", "no kind", "other worker", "stdin", "newline", "quote", "other boot"],
)
async def test_file_that_is_not_the_hives_is_not_read_but_counted_and_acknowledged(
    queen: Parts, name: str
) -> None:
    job_id = await queen.job()
    theirs = await queen.worker(job_id, hive_id=new_id("hive"))
    own = await queen.worker(job_id)
    source = {
        "other hive": f"{new_id('hive')}/boot1",
        "job": f"{job_id}/stdout",
        "no kind": "stdout",
        "other worker": f"{theirs}/stdout",
        "stdin": f"{own}/stdin",
        "newline": f"{own}/stdout\n",
        "quote": f'{own}/stdout","job_id":"{job_id}',
        "other boot": f"{queen.hive_id}/../boot1",
    }[name]
    said = narration(job_id=job_id)

    assert await queen.bring(stretch(source, 10, said)) == {source: 10 + len(said)}
    assert await queen.said(job_id) == ["state"]
    assert await queen.said(theirs) == []
    assert await queen.said(own) == []
    [gap] = await queen.log(queen.hive_id)
    assert (gap["reason"], gap["source"], gap["lost_bytes"]) == (
        "refused",
        source,
        len(said),
    )
    assert await queen.registry.store.cursors([source]) == {}


async def test_job_placed_on_another_hives_worker_is_not_spoken_of_by_this_hive(queen: Parts) -> None:
    job_id, worker_id = await queen.job(), new_id("worker")
    queen.workers.place(job_id, worker_id, new_id("hive"), 1)

    await queen.bring(stretch(f"{worker_id}/stdout", 0, token(job_id)))

    assert await queen.said(job_id) == ["state"]


async def test_hive_speaks_of_a_job_only_once_it_was_handed_to_it(queen: Parts) -> None:
    job_id = await queen.job()
    said = narration("hive_receive", job_id=job_id)
    await queen.bring(stretch(queen.boot, 0, said))
    queen.workers.hand(queen.hive_id, job_id)
    await queen.bring(stretch(queen.boot, len(said), said))

    assert await queen.said(queen.hive_id) == ["queen_refuse_line"]
    assert await queen.said(job_id) == ["state", "hive_receive"]


@pytest.mark.parametrize(
    "fields",
    [
        {"worker_id": "job-1"},
        {"worker_id": 5},
        {"fields": {"sources": ["x"]}},
        {"fields": {"sources": {"worker-x/stdout": -1}}},
        {"fields": {"sources": {"another/stdout": 1}}},
        {"fields": {"exit_code": "one"}},
    ],
)
async def test_end_of_a_worker_that_cannot_be_read_is_an_ordinary_line_of_the_hive(
    queen: Parts, fields: dict[str, Any]
) -> None:
    said = narration("worker_exit", "It ended.", **{"worker_id": new_id("worker"), **fields})

    assert await queen.bring(stretch(queen.boot, 0, said)) == {queen.boot: len(said)}
    assert len(await queen.log(queen.hive_id)) == 1


async def test_hive_tells_no_end_of_another_hives_worker(queen: Parts) -> None:
    job_id = await queen.job()
    worker_id = await queen.worker(job_id, hive_id=new_id("hive"))
    placement = queen.workers.place(job_id, worker_id, "hive-of-another", 1)

    await queen.bring(stretch(queen.boot, 0, worker_exit(worker_id, {})))

    assert not placement.closing.done()
    assert await queen.said(worker_id) == []
    assert await queen.said(queen.hive_id) == ["worker_exit"]


# Form


@pytest.mark.parametrize(
    "body",
    [
        b"not json\n",
        b"{}\n",
        b'{"source":"s","offset":-1,"bytes":0}\n',
        b'{"source":"s","offset":0,"bytes":-1}\n',
        b'{"source":"s","offset":0,"bytes":5}\nabc',
        b'{"source":"s","offset":0,"bytes":5}',
        b'{"source":"s","offset":99999999999999999999999999,"bytes":0}\n',
        b'{"source":"s","offset":0,"bytes":1,"lost_bytes":1}\nx',
        b'{"source":"s","offset":0,"bytes":1}\nx\xff',
    ],
)
async def test_malformed_batch_is_refused_whole(queen: Parts, body: bytes) -> None:
    source = f"{await queen.worker()}/stdout"

    with pytest.raises(InvalidRequestError):
        await queen.bring(stretch(source, 0, b"one\n"), body)

    assert await queen.registry.store.cursors([source]) == {}


async def test_batch_of_too_many_stretches_is_refused(queen: Parts) -> None:
    with pytest.raises(InvalidRequestError, match="at most"):
        await queen.bring(*[stretch("s", 0, b"")] * (STRETCHES_MAX + 1))


def test_empty_batch_has_no_stretches() -> None:
    assert list(parse_batch(b"")) == []


async def test_two_stretches_of_one_source_in_a_batch_follow_each_other(queen: Parts) -> None:
    worker_id = await queen.worker()
    source = f"{worker_id}/stdout"

    assert await queen.bring(stretch(source, 0, b"one\n"), stretch(source, 4, b"two\n")) == {source: 8}
    assert [event["text"] for event in await queen.log(worker_id)] == ["one", "two"]


async def test_concurrent_batches_of_one_hive_are_taken_one_after_the_other(queen: Parts) -> None:
    source = f"{await queen.worker()}/stdout"
    data = b"".join(b"%d\n" % number for number in range(50))

    answers = await asyncio.gather(*[queen.bring(stretch(source, 0, data)) for _ in range(5)])

    assert answers == [{source: len(data)}] * 5
    texts = [event["text"] for event in await queen.log(source.partition("/")[0])]
    assert texts == [str(number) for number in range(50)]


def test_stage_lines_are_what_the_contract_reads() -> None:
    assert decode_source_line(token("job-1").strip()) is not None
    assert msgspec.json.decode(narration())["v"] == 1
