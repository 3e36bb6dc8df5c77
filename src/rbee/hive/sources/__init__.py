"""Where models come from: one module a source, all behind the `Source` protocol."""

from rbee.hive.sources.source import Fetched, Progress, Source, ignore_progress

__all__ = ["Fetched", "Progress", "Source", "ignore_progress"]
