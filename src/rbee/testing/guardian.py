"""Stop every process of a home when whoever started them is gone: `python -m rbee.testing.guardian HOME`.

It waits for the end of its standard input, which the test process holds open; the kernel closes that in every
kind of death, SIGKILL included.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
from pathlib import Path

from rbee.processes import stop_tree

GRACE_S = 5.0


def main() -> None:
    """Wait, then stop what is left and remove the home."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    home = Path(sys.argv[1])
    sys.stdin.buffer.read()
    asyncio.run(stop_tree(None, marker=("RBEE_HOME", str(home)), grace_s=GRACE_S))
    if "--keep" not in sys.argv[2:]:
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
