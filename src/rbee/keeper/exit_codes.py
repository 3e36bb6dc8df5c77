"""How the keeper ends: the numbers scripts rely on. 2 (usage) and 3 (not ready) come with their errors."""

EXIT_FINE = 0
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
EXIT_OUTPUT_CLOSED = 141
