"""`python -m rbee` is the keeper."""

import sys

from rbee.keeper.cli import main

if __name__ == "__main__":
    sys.exit(main())
