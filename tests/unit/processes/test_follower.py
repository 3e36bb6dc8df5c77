from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rbee.processes import FileFollower, follower

BLOCK = 4096


class Growing:
    """A file with its writer and a follower."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.follower = FileFollower(path)

    def write(self, data: bytes) -> None:
        assert os.write(self.fd, data) == len(data)

    def read_all(self, *, final: bool = False) -> bytes:
        data = b""
        while more := self.follower.read(64 * 1024, final=final).data:
            data += more
        return data


@pytest.fixture
def growing(tmp_path: Path) -> Iterator[Growing]:
    made = Growing(tmp_path / "file")
    yield made
    os.close(made.fd)
    made.follower.close()


def numbered(count: int) -> bytes:
    return b"".join(b"%015d\n" % number for number in range(count))


def test_read_leaves_an_unfinished_line_until_its_newline(growing: Growing) -> None:
    growing.write(b"one\ntw")
    assert growing.follower.read(100).data == b"one\n"
    assert growing.follower.read(100).data == b""
    assert not growing.follower.exhausted
    growing.write(b"o\n")
    stretch = growing.follower.read(100)
    assert (stretch.offset, stretch.data, stretch.part) == (4, b"two\n", 0)
    assert growing.follower.exhausted


def test_read_final_takes_an_unfinished_last_line(growing: Growing) -> None:
    growing.write(b"one\ntw")
    assert growing.read_all(final=True) == b"one\ntw"


def test_read_of_a_line_longer_than_max_bytes_takes_the_whole_line(growing: Growing) -> None:
    growing.write(b"a" * 100 + b"\nb\n")
    assert growing.follower.read(10).data == b"a" * 100 + b"\n"
    assert growing.follower.read(10).data == b"b\n"


def test_read_takes_no_more_than_max_bytes(growing: Growing) -> None:
    growing.write(numbered(100))
    assert growing.follower.read(40).data == numbered(2)


def test_sealed_file_ends_at_the_size_it_had(growing: Growing) -> None:
    growing.write(b"one\ntw")
    assert growing.follower.seal() == 6
    growing.write(b"o\nthree\n")
    assert growing.follower.seal() == 6
    assert growing.read_all() == b"one\ntw"
    assert growing.follower.exhausted


def test_acknowledged_blocks_are_given_back_and_the_size_stays(growing: Growing) -> None:
    data = numbered(64 * 1024)
    growing.write(data)
    os.fsync(growing.fd)
    before = os.stat(growing.path).st_blocks
    assert growing.read_all() == data
    growing.follower.acknowledge(growing.follower.position)
    after = os.stat(growing.path)
    assert before * 512 >= len(data)
    assert after.st_blocks * 512 <= 2 * BLOCK
    assert growing.follower.allocated_bytes == after.st_blocks * 512
    assert after.st_size == len(data)


def test_acknowledgement_moves_a_position_that_was_behind(growing: Growing) -> None:
    growing.write(numbered(10))
    growing.follower.acknowledge(64)
    assert growing.follower.read(1000).offset == 64


def test_acknowledgement_leaves_a_position_that_was_ahead(growing: Growing) -> None:
    growing.write(numbered(10))
    growing.read_all()
    growing.follower.acknowledge(64)
    assert growing.follower.position == 160


def test_rewind_to_what_was_not_acknowledged_reads_the_same_bytes(growing: Growing) -> None:
    data = numbered(10_000)
    growing.write(data)
    growing.read_all()
    growing.follower.acknowledge(80_000)
    growing.follower.rewind(80_000)
    assert growing.follower.skip_hole() == 0
    assert growing.read_all() == data[80_000:]


def test_rewind_behind_the_acknowledgement_reads_no_zeros(growing: Growing) -> None:
    data = numbered(10_000)
    growing.write(data)
    growing.read_all()
    growing.follower.acknowledge(80_000)
    growing.follower.rewind(16)
    assert growing.follower.read(1000).data == b""
    assert not growing.follower.exhausted
    lost = growing.follower.skip_hole()
    assert lost == 80_000 // BLOCK * BLOCK - 16
    assert growing.read_all() == data[16 + lost :]


def test_skip_hole_at_a_file_that_is_all_hole_loses_it_all(growing: Growing) -> None:
    growing.write(b"x" * BLOCK)
    growing.follower.acknowledge(BLOCK)
    growing.follower.rewind(0)
    assert growing.follower.skip_hole() == BLOCK
    assert growing.follower.exhausted
    growing.write(b"after\n")
    assert growing.read_all() == b"after\n"


def test_line_that_runs_into_a_hole_ends_there(growing: Growing) -> None:
    growing.write(b"x" * 3 * BLOCK + b"\nlast\n")
    growing.follower._punched = BLOCK  # another follower gave the first block back to nobody
    growing.follower.acknowledge(2 * BLOCK)
    growing.follower.rewind(0)
    assert growing.follower.read(64 * 1024).data == b"x" * BLOCK
    assert growing.follower.skip_hole() == BLOCK
    assert growing.read_all() == b"x" * BLOCK + b"\nlast\n"


def test_follower_that_forgot_everything_but_the_acknowledgement_loses_nothing(growing: Growing) -> None:
    data = numbered(20_000)
    received = b""
    for start in range(0, len(data), 16_000):
        growing.write(data[start : start + 16_000])
        fresh = FileFollower(growing.path, offset=len(received))
        fresh.read(5_000)  # sent, and killed before the answer
        fresh.rewind(len(received))
        received += fresh.read(7_000).data
        fresh.acknowledge(len(received))
        fresh.close()
    growing.follower.rewind(len(received))
    assert received + growing.read_all() == data


def test_file_system_without_holes_is_asked_once(growing: Growing, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(fd: int, offset: int, length: int) -> None:
        asked.append((offset, length))
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(follower, "punch_hole", refuse)
    growing.write(numbered(10_000))
    for offset in (BLOCK, 2 * BLOCK, 3 * BLOCK):
        growing.follower.acknowledge(offset)
    assert asked == [(0, BLOCK)]
    assert growing.follower.position == 3 * BLOCK


def test_file_cut_by_its_writer_goes_on_at_unused_offsets(growing: Growing) -> None:
    growing.write(b"one\ntwo\n")
    growing.read_all()
    os.truncate(growing.path, 0)
    assert growing.follower.read(100).data == b""
    assert growing.follower.truncations == 1
    growing.write(b"three\n")
    stretch = growing.follower.read(100)
    assert (stretch.offset, stretch.data) == (8, b"three\n")


def test_forget_counts_whole_lines_and_moves_on(growing: Growing) -> None:
    growing.write(numbered(10_000))
    loss = growing.follower.forget(16, 100_001)
    assert (loss.offset, loss.lost_bytes, loss.lost_lines) == (100_016, 100_000, 6_250)
    assert growing.follower.read(16).data == b"%015d\n" % 6_251


def test_forget_without_a_newline_ends_with_the_file(growing: Growing) -> None:
    growing.write(b"one\n" + b"x" * 100_000)
    loss = growing.follower.forget(0, 50_000)
    assert (loss.offset, loss.lost_lines) == (100_004, 1)


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        FileFollower(tmp_path / "nowhere")


def test_what_a_cut_took_is_told_as_lost_and_what_is_appended_then_is_read_whole(growing: Growing) -> None:
    growing.write(b"one\ntwo\n")
    assert growing.follower.read(4).data == b"one\n"
    os.truncate(growing.path, 0)
    growing.write(b"new\n")
    assert (growing.follower.read(100).data, growing.follower.exhausted) == (b"", False)
    assert (growing.follower.skip_hole(), growing.follower.position) == (len(b"two\nnew\n"), 12)
    growing.write(b"three\n")
    assert growing.follower.read(100).data == b"three\n"
    assert growing.follower.truncations == 1


def test_cut_that_grew_past_the_position_again_is_noticed_by_the_size_seen_before(growing: Growing) -> None:
    growing.write(numbered(100))
    growing.follower.read(16)
    os.truncate(growing.path, 0)
    growing.write(b"x" * 40 + b"\n")
    assert growing.follower.read(100).data == b""
    assert growing.follower.skip_hole() == 1600 - 16 + 41


def test_position_set_back_into_what_a_cut_took_reads_no_zeros(growing: Growing) -> None:
    growing.write(b"one\ntwo\n")
    growing.read_all()
    os.truncate(growing.path, 0)
    growing.write(b"x\n")
    growing.follower.read(100)
    growing.write(b"three\n")
    growing.follower.rewind(0)
    assert growing.follower.skip_hole() == 10
    assert growing.read_all() == b"three\n"


def test_sealed_file_that_was_cut_is_read_to_its_end(growing: Growing) -> None:
    growing.write(b"one\ntwo\n")
    growing.read_all()
    os.truncate(growing.path, 0)
    growing.write(b"x\n")
    assert growing.follower.seal() == 10
    assert growing.follower.skip_hole() == 2
    assert growing.follower.exhausted


def test_file_that_is_shorter_than_what_another_reader_had_of_it_loses_nothing_new(growing: Growing) -> None:
    growing.write(b"one\n")
    growing.follower.acknowledge(8)
    assert growing.follower.read(100).data == b""
    assert growing.follower.skip_hole() == 0
    growing.write(b"two\n")
    assert growing.read_all() == b"two\n"


@pytest.mark.parametrize("error", [errno.EIO, errno.EROFS, errno.EPERM, errno.ENOSPC])
def test_blocks_that_cannot_be_given_back_now_are_given_back_later(
    growing: Growing, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    growing.write(numbered(10_000))
    with monkeypatch.context() as patch:

        def refuse(fd: int, offset: int, length: int) -> None:
            raise OSError(error, os.strerror(error))

        patch.setattr(follower, "punch_hole", refuse)
        growing.follower.acknowledge(BLOCK)
    before = growing.follower.allocated_bytes
    growing.follower.acknowledge(3 * BLOCK)
    assert growing.follower.allocated_bytes == before - 3 * BLOCK


def test_cut_file_on_a_full_disk_is_tried_again(growing: Growing, monkeypatch: pytest.MonkeyPatch) -> None:
    growing.write(b"one\ntwo\n")
    growing.read_all()
    os.truncate(growing.path, 0)
    with monkeypatch.context() as patch:

        def refuse(fd: int, offset: int, length: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, "posix_fallocate", refuse)
        assert growing.follower.read(100).data == b""
        assert growing.follower.truncations == 0
    assert growing.follower.read(100).data == b""
    growing.write(b"three\n")
    assert growing.read_all() == b"three\n"


def test_file_whose_name_is_gone_or_another_files_is_followed_all_the_same(growing: Growing) -> None:
    growing.write(b"one\n")
    growing.path.unlink()
    growing.path.write_bytes(b"a stranger's\n")
    growing.write(b"two\n")
    assert growing.follower.tail(4) == b"two\n"
    assert growing.read_all() == b"one\ntwo\n"
    assert growing.follower.open_path.read_bytes() == b"one\ntwo\n"
