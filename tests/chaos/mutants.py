"""Show that the chaos tests can fail: remedies are taken out of a copy, one at a time, and the tests run on it.

Run it by hand, with the names of some remedies or none for all: `.venv/bin/python -m tests.chaos.mutants fencing`.
It ends with 0 when every remedy that was taken out was missed by at least one test.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from msgspec import Struct

ROOT = Path(__file__).resolve().parents[2]
RUN_S_MAX = 600
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


class Mutant(Struct, frozen=True):
    """One remedy, and how it is taken out.

    Attributes:
        name: The remedy.
        file: Where it is, below src/rbee.
        text: What stands there.
        instead: What stands there in the copy.
        tests: Those that have to miss it.
    """

    name: str
    file: str
    text: str
    instead: str
    tests: str


MUTANTS = (
    Mutant(
        "fencing",
        "queen/claims.py",
        "return speaker.placed.get(job_id) == attempt",
        "return True",
        "test_zombie_owner.py",
    ),
    Mutant(
        "source-check",
        "queen/claims.py",
        "    if speaker.is_hive:\n        return kind",
        "    if not speaker.is_hive:\n        return True\n    if speaker.is_hive:\n        return kind",
        "test_tail_on_death.py",
    ),
    Mutant(
        "commit-before-publish",
        "jobs/sqlite_writer.py",
        '        connection.execute("COMMIT")\n',
        "        self._on_commit([one for write in batch for one in write.published])\n"
        "        import time\n\n"
        "        time.sleep(0.02)  # or a test would have to be very lucky\n"
        '        connection.execute("COMMIT")\n',
        "test_process_chaos.py",
    ),
    Mutant(
        "cursor-in-the-transaction",
        "jobs/sqlite_store.py",
        "            return _ingest(tx, batches)\n",
        "            names = [(batch.source,) for batch in batches]\n"
        "            find = 'SELECT * FROM cursors WHERE source = ?'\n"
        "            put = 'INSERT OR REPLACE INTO cursors VALUES (?, ?, ?)'\n"
        "            old = [row for name in names if (row := tx.execute(find, name).fetchone())]\n"
        "            done = _ingest(tx, batches)\n"
        "            new = [row for name in names if (row := tx.execute(find, name).fetchone())]\n"
        "            [tx.execute(put, row) for row in old]\n"
        "            self._late = lambda tx: [tx.execute(put, row) for row in new] and None\n"
        "            return done\n\n"
        "        import asyncio\n\n"
        "        done = await self._writer.write(run)\n"
        "        await asyncio.sleep(0.02)  # or a test would have to be very lucky\n"
        "        await self._writer.write(self._late)\n"
        "        return done\n",
        "test_process_chaos.py",
    ),
    Mutant(
        "files-are-read-before-the-end",
        "queen/workers.py",
        "if all(cursors.get(name, (0, 0))[0] >= size for name, size in ended.sources.items()):",
        "if cursors is not None:",
        "test_tail_on_death.py",
    ),
    Mutant(
        "a-request-starts-once",
        "worker/desk.py",
        "return request_id in self._running or self._ids.recall(request_id) is Memory.STARTED",
        "return False",
        "test_process_chaos.py",
    ),
    Mutant(
        "older-requests-are-stopped",
        "queen/old_requests.py",
        "        try:\n            if self._book.state_of",
        "        return\n        try:\n            if self._book.state_of",
        "test_zombie_owner.py",
    ),
    Mutant(
        "adoption",
        "hive/worker_file.py",
        "    if file.status is not None:\n        return None\n",
        "    return None\n",
        "test_hive_death.py",
    ),
    Mutant(
        "lease",
        "processes/lease.py",
        "            if self._lease.is_lost(held=self._ask(), now_s=time.monotonic()):",
        "            if self._lease.is_lost(held=True, now_s=time.monotonic()):",
        "test_hive_death.py",
    ),
    Mutant(
        "cont-after-term",
        "processes/tree.py",
        "                self._send(entry.identity, signal.SIGCONT)  # a stopped process hears nothing else\n",
        "",
        "test_tail_on_death.py",
    ),
)


def main() -> int:
    """Take out the remedies that are named; returns the exit code."""
    wanted = set(sys.argv[1:]) or {mutant.name for mutant in MUTANTS}
    unknown = wanted - {mutant.name for mutant in MUTANTS}
    if unknown:
        print(f"There is no {', '.join(sorted(unknown))}.")
        return 2
    survivors = [mutant.name for mutant in MUTANTS if mutant.name in wanted and not _is_missed(mutant)]
    print(f"Missed by no test: {', '.join(survivors)}." if survivors else "Each was missed by a test.")
    return 1 if survivors else 0


def _is_missed(mutant: Mutant) -> bool:
    """Tell whether a test fails without the remedy; says which."""
    with tempfile.TemporaryDirectory(prefix="rbee-mutant-") as directory:
        copy = Path(directory)
        for name in ("src", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        _take_out(mutant, copy / "src" / "rbee" / mutant.file)
        failed = _failed_tests(copy, mutant.tests)
    print(f"without {mutant.name}: {', '.join(failed) or 'nothing fails'}", flush=True)
    return bool(failed)


def _take_out(mutant: Mutant, path: Path) -> None:
    before = path.read_text("utf-8")
    if before.count(mutant.text) != 1:
        raise SystemExit(f"{mutant.name}: {mutant.file} has changed; say anew what is to be taken out.")
    path.write_text(before.replace(mutant.text, mutant.instead), "utf-8")


def _failed_tests(copy: Path, tests: str) -> list[str]:
    """Run the small tests on a copy, in a session of their own, and return the names of those that fail."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", f"tests/chaos/{tests}"]
    process = subprocess.Popen(
        command,
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        out, _ = process.communicate(timeout=RUN_S_MAX)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # guardians are in sessions of their own, and clear up
        process.communicate()
        return [f"{tests} (no end within {RUN_S_MAX} s)"]
    return [name.split("::")[-1] for name in _FAILED.findall(out)]


if __name__ == "__main__":
    sys.exit(main())
