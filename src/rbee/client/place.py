"""Where a queen is: her address, the paths on it, and where to look when she has moved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from urllib.parse import quote, urlencode, urlsplit

from rbee.errors import ConfigurationError

FindUrl = Callable[[], str | None]
"""Returns where the queen is by now, None when that is not known; quick, for an event loop waits for it."""


class Place:
    """The address of a queen that may move.

    Args:
        url: Where she was last.
        find_url: Asked for her address when nobody listens there any more; None when she never moves.

    Raises:
        ConfigurationError: `url` is no address.
    """

    def __init__(self, url: str, find_url: FindUrl | None = None) -> None:
        self.url = checked_url(url)
        self._find_url = find_url

    def look_again(self) -> bool:
        """Look for the queen anew; tell whether she is elsewhere now."""
        found = self._find_url() if self._find_url is not None else None
        if found is None or checked_url(found) == self.url:
            return False
        self.url = checked_url(found)
        return True


def job_path(job_id: str) -> str:
    """Return the path of a job, whatever was given as its id."""
    return "/v1/jobs/" + quote(job_id, safe="")


def with_query(path: str, values: Mapping[str, str | int | None]) -> str:
    """Return `path` with the values that are given as its query."""
    given = {key: value for key, value in values.items() if value is not None}
    return f"{path}?{urlencode(given)}" if given else path


def checked_url(url: str) -> str:
    """Return the address of a server without a slash at its end.

    Raises:
        ConfigurationError: It is not of the form `http://host:port`.
    """
    try:
        parts = urlsplit(url)
        port_is_fine = parts.port is None or parts.port > 0
    except ValueError:
        port_is_fine = False
    if not port_is_fine or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigurationError(
            f"`{url}` is not the address of a queen.",
            remedy="Give it with scheme, host and port, such as http://127.0.0.1:8500.",
        )
    return url.rstrip("/")
