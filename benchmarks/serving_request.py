"""The server side of one HTTP request on a connection, read with httptools: no more than the benchmark needs."""

from __future__ import annotations

import asyncio

import httptools


class RequestProtocol(asyncio.Protocol):
    """Collects a request and calls `asked` with it; whoever inherits answers, and closes the connection."""

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._path = ""
        self._body = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # TCP
        """Take the connection."""
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Read on; what is no HTTP ends the connection."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.abort()

    def on_url(self, url: bytes) -> None:
        """Note the path."""
        self._path += url.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        """Note a part of the body."""
        self._body += body

    def on_message_complete(self) -> None:
        """Answer."""
        self.asked(self._parser.get_method().decode("latin-1"), self._path, self._body)

    def asked(self, method: str, path: str, body: bytes) -> None:
        """Answer a request that is there whole."""
        raise NotImplementedError
