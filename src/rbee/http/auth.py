"""Who may come in: loopback by default, a bearer key beyond it, and no stranger's web page."""

from __future__ import annotations

import hmac
import ipaddress
from functools import lru_cache
from urllib.parse import urlsplit

from msgspec import Struct

from rbee.errors import AuthenticationError, ForbiddenError, StartError

LOCAL_PRINCIPAL = "local"
KEY_PRINCIPAL = "key"


@lru_cache(32)
def is_loopback(host: str) -> bool:
    """Tell whether a host name or address never leaves this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def require_key_off_loopback(host: str, api_key: str | None) -> None:
    """Refuse to serve beyond loopback without a credential.

    Raises:
        StartError: `host` is no loopback address and there is no RBEE_API_KEY.
    """
    if not is_loopback(host) and not api_key:
        raise StartError(
            f"Serving on {host} would let everybody in: RBEE_API_KEY is not set.",
            remedy="Set RBEE_API_KEY to a long random word, or serve on 127.0.0.1.",
        )


class Door(Struct, frozen=True, kw_only=True):
    """What a server lets in.

    Attributes:
        api_key: The bearer key every route but liveness asks for; None on loopback without one.
        hosts: Names besides loopback that a `Host` header may have; `*` takes any.
        origins: Origins of web pages that may call, besides the server's own.
    """

    api_key: str | None = None
    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()

    def check_host(self, header: str | None) -> None:
        """Refuse a request that was meant for another name (DNS rebinding).

        Raises:
            ForbiddenError: The `Host` is neither loopback nor configured.
        """
        name = _host_of(f"//{header or ''}")
        allowed = {host.lower() for host in self.hosts}
        if not (is_loopback(name) or (name and name in allowed) or "*" in allowed):
            raise ForbiddenError(
                f"The host `{(header or '')[:100]}` is not one this server answers to.",
                remedy="Use a loopback address, or add the name to allowed_hosts.",
            )

    def check_origin(self, origin: str | None, host: str | None) -> None:
        """Refuse a web page of another site.

        Raises:
            ForbiddenError: There is an `Origin`, and it is neither the server's own nor allowed.
        """
        if origin is None or origin in self.origins:
            return
        if host and origin.lower() in {f"http://{host.lower()}", f"https://{host.lower()}"}:
            return
        raise ForbiddenError(
            f"Pages of `{origin[:100]}` may not call this server.",
            remedy="Add the origin to allowed_origins if you trust it.",
        )

    def principal(self, authorization: str | None) -> str:
        """Return who is calling.

        Raises:
            AuthenticationError: A key is asked for, and this is not it.
        """
        if not self.api_key:
            return LOCAL_PRINCIPAL
        scheme, _, given = (authorization or "").partition(" ")
        key = given.strip().encode("latin-1", "replace")  # headers are decoded as Latin-1: these are the bytes
        if scheme.lower() != "bearer" or not hmac.compare_digest(key, self.api_key.encode()):
            raise AuthenticationError()
        return KEY_PRINCIPAL


@lru_cache(32)
def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # no address at all, such as `[::1`
        return ""
