"""Where backends are: parsing and normalising what people write into `BACKENDS`."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from .errors import ConfigurationError

_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class BackendAddress:
    """One backend's address.

    Args:
        scheme (`str`): `"http"` or `"https"`.
        host (`str`): Host name or IP address, lower case, IPv6 without brackets.
        port (`int`): Port, always explicit.
        prefix (`str`, *optional*, defaults to `""`): Path prefix, with a leading and without a trailing slash.
    """

    scheme: str
    host: str
    port: int
    prefix: str = ""

    @property
    def name(self) -> str:
        """`host:port` and the prefix: what the ring hashes, and how the backend is called in statistics."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}{self.prefix}"

    @property
    def url(self) -> str:
        """The URL that paths are appended to."""
        return f"{self.scheme}://{self.name}"

    @classmethod
    def parse(cls, text: str) -> BackendAddress:
        """Reads `http://host:port/prefix`; the scheme may be left out, trailing slashes are dropped.

        Raises:
            [`ConfigurationError`]: when it is not such a URL; the message quotes it (never a password in it).
        """
        shown = text.rpartition("@")[2] if "@" in text else text
        candidate = text.strip()
        if "://" not in candidate:
            candidate = f"http://{candidate}"
        allowed = "allowed: http:// or https://, HOST:PORT (IPv6 in brackets) and an optional path prefix"
        try:
            parts = urlsplit(candidate)
            port = parts.port
        except ValueError as error:
            # Its message may quote what was meant as a password.
            what = "not a URL" if "@" in text else str(error)
            raise ConfigurationError(f"backend address {shown!r}: {what}; {allowed}") from None
        if parts.scheme not in _DEFAULT_PORTS:
            raise ConfigurationError(f"backend address {shown!r}: scheme {parts.scheme!r}; {allowed}")
        if parts.username is not None or parts.password is not None:
            raise ConfigurationError(f"backend address {shown!r}: contains user name or password; {allowed}")
        if not parts.hostname or any(c.isspace() for c in candidate):
            raise ConfigurationError(f"backend address {shown!r}: no host, or white space inside; {allowed}")
        if parts.query or parts.fragment:
            raise ConfigurationError(f"backend address {shown!r}: has a query or a fragment; {allowed}")
        if "://" not in text and (parts.hostname in _DEFAULT_PORTS or "//" in parts.path):
            raise ConfigurationError(f"backend address {shown!r}: a misspelt scheme; {allowed}")
        if port == 0:
            raise ConfigurationError(f"backend address {shown!r}: port 0; {allowed}")
        host = _normal(parts.hostname)
        return cls(parts.scheme, host, port or _DEFAULT_PORTS[parts.scheme], parts.path.rstrip("/"))


def _normal(host: str) -> str:
    """One spelling per host: IP addresses as `ipaddress` writes them, names without the root's dot."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host.rstrip(".") or host


def parse_backends(value: str | Iterable[str]) -> list[BackendAddress]:
    """Reads a comma-separated string, or several strings, into addresses.

    Args:
        value (`str` or `Iterable[str]`): One or more addresses. Spaces around them and empty items are ignored.

    Returns:
        `list[BackendAddress]`: At least one, in the order given.

    Raises:
        [`ConfigurationError`]: for none at all, for a malformed one, and for one given twice (a server that is
            listed twice would get two shares of the work).
    """
    items = value.split(",") if isinstance(value, str) else [part for item in value for part in item.split(",")]
    addresses = [BackendAddress.parse(item) for item in items if item.strip()]
    if not addresses:
        raise ConfigurationError(f"no backend address in {value!r}; allowed: URL[,URL...]")
    seen: set[str] = set()
    for address in addresses:
        if address.name in seen:
            raise ConfigurationError(f"backend {address.url} is listed twice; allowed: each server once")
        seen.add(address.name)
    return addresses
