"""The keeper's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from msgspec import Meta, Struct

from rbee.contracts.ids import is_correlation_id
from rbee.contracts.settings import Settings, load_settings
from rbee.errors import ConfigurationError

QUEEN_PORT = 8500
HIVE_PORT = 9000

Port = Annotated[int, Meta(ge=0, le=65535)]


class KeeperSettings(Settings, kw_only=True, frozen=True):
    """Ask a queen for work, and draw what she says.

    Attributes:
        queen_url: Address of the queen to ask; without it, the one that runs in the home.
        correlation_id: Ties together everything this call causes; made when it is not given.
        api_key: The credential the queen asks for (RBEE_API_KEY).
        host: Address that `rbee up` listens on; anything but loopback needs RBEE_API_KEY.
        queen_port: Port of the queen that `rbee up` starts (8500, or a free one if that is taken); 0 takes any.
        hive_port: Port of the hive that `rbee up` starts (9000, or a free one if that is taken); 0 takes any.
    """

    program: ClassVar[str] = "rbee"
    table: ClassVar[str] = "keeper"
    env: ClassVar[dict[str, str]] = {"queen_port": "QUEEN_PORT", "hive_port": "HIVE_PORT"}
    flags_only: ClassVar[frozenset[str]] = frozenset({"home", "correlation_id"})
    elsewhere: ClassVar[dict[str, tuple[str, str]]] = {
        "queen_port": ("queen", "port"),
        "hive_port": ("hive", "port"),
    }

    queen_url: str | None = None
    correlation_id: str | None = None
    api_key: str | None = None
    host: str = "127.0.0.1"
    queen_port: Port | None = None
    hive_port: Port | None = None


class GlobalOptions(Struct, frozen=True, kw_only=True):
    """What was given before the command's own options; None where nothing was."""

    queen: str | None = None
    home: Path | None = None
    correlation_id: str | None = None

    def settings(self, **more: str | int | None) -> KeeperSettings:
        """Fill the settings from these options, `more` flags, the environment and rbee.toml.

        Raises:
            ConfigurationError: A value that cannot be used.
        """
        flags = {"home": self.home, "queen_url": self.queen, "correlation_id": self.correlation_id, **more}
        argv = [f"--{key.replace('_', '-')}={value}" for key, value in flags.items() if value is not None]
        settings = load_settings(KeeperSettings, argv)
        if settings.correlation_id is not None and not is_correlation_id(settings.correlation_id):
            raise ConfigurationError(
                f"The correlation id `{settings.correlation_id[:60]}` cannot be used.",
                remedy="Give 1 to 128 letters, digits and `._:-` with --correlation-id or RBEE_CORRELATION_ID.",
            )
        return settings
