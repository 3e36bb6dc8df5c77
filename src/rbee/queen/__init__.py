"""The queen: jobs, their logs, placement and the public API. It touches no process and no device."""
