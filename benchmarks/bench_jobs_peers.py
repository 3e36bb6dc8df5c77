"""A no-op job from submit to finished, beside peers that run jobs; every side in turn.

A peer's job is finished when its body has run and written one byte into a pipe, ours when its end is on disk.
Peers get their jobs in one burst, from another process than their worker's. Workers run as they do by default,
only that Huey looks for jobs each 10 ms, RQ has two workers and Procrastinate ten jobs at a time. Ours has 64
jobs in flight; as a library it lives in one process, where whoever creates a job runs it too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import uvloop

from benchmarks.jobs_peers import PEERS, Measured, Peer, measure_peer
from benchmarks.jobs_rbee import measure_http, measure_library
from benchmarks.peers.install import PeersMissingError, peers_python
from benchmarks.report import Row, main, median, percentile
from benchmarks.services import ServiceMissingError

TITLE = "A no-op job, from submit to finished"
ROUNDS = 3
SMALL_ROUNDS = 1
LIBRARY, HTTP = "rbee, library, SQLite with fsync", "rbee, over HTTP, SQLite with fsync"
WANTED = {LIBRARY: (">= 8,000/s", "p50 <= 2 ms"), HTTP: (">= 1,500/s", "")}

Rounds = dict[str, list[Measured]]


def _measure_round(python: Path | None, is_small: bool, rounds: Rounds, missing: dict[str, str]) -> None:
    """Let every side have its turn once."""
    rounds[LIBRARY].append(uvloop.run(measure_library(is_small)))
    rounds[HTTP].append(uvloop.run(measure_http(is_small)))
    if python is None:
        return
    for peer in _peers(is_small):
        try:
            rounds[peer.title].append(measure_peer(peer, python, is_small))
        except ServiceMissingError as error:
            missing[peer.title] = str(error)


def _peers(is_small: bool) -> list[Peer]:
    return [peer for peer in PEERS if peer.is_durable or not is_small]


def measure(is_small: bool) -> Sequence[Row]:
    """Measure all sides; the peers that can be had."""
    missing: dict[str, str] = {}
    rounds: Rounds = defaultdict(list)
    try:
        python = peers_python("jobs")
    except PeersMissingError as error:
        python, missing["peers"] = None, str(error)
    for _ in range(SMALL_ROUNDS if is_small else ROUNDS):
        _measure_round(python, is_small, rounds, missing)
    rows = [row for title in WANTED for row in _own_rows(title, rounds[title])]
    for peer in _peers(is_small):
        if peer.title in rounds:
            rows += _peer_rows(peer, rounds[peer.title], rounds[LIBRARY])
    return [*rows, *(Row(title, "not measured", why) for title, why in missing.items())]


def _own_rows(title: str, measured: list[Measured]) -> list[Row]:
    many, alone = WANTED[title]
    return [
        Row(title, _rate(measured), wanted=many),
        Row(f"{title}: one alone, p50 / p99", _alone(measured), wanted=alone),
    ]


def _peer_rows(peer: Peer, measured: list[Measured], ours: list[Measured]) -> list[Row]:
    """Compare a peer with our library round by round: above 1 we are ahead."""
    wanted = "> 1" if peer.is_durable else ""
    pairs = list(zip(measured, ours, strict=True))
    faster = median([own.per_s / its.per_s for its, own in pairs])
    sooner = median([its.alone_p50_ms / own.alone_p50_ms for its, own in pairs])
    return [
        Row(peer.title, _rate(measured), "rbee, library", faster, wanted),
        Row(f"{peer.title}: one alone, p50 / p99", _alone(measured), "rbee, library", sooner, wanted),
    ]


def _rate(measured: list[Measured]) -> str:
    return f"{median([one.per_s for one in measured]):,.0f} jobs/s"


def _alone(measured: list[Measured]) -> str:
    taken_ms = [each_ms for one in measured for each_ms in one.alone_ms]
    return f"{median(taken_ms):.1f} / {percentile(taken_ms, 99):.1f} ms"


if __name__ == "__main__":
    main(TITLE, measure)
