"""The URL of a cloud server, as `--cloud-url` and the client accept it."""

from __future__ import annotations

import ipaddress
import warnings
from dataclasses import dataclass
from urllib.parse import urlsplit

from edgecloud_sd.host.passwords import AT_SIGN, hide_passwords


@dataclass(frozen=True)
class ServerUrl:
    """The parts of a server's URL. `path` comes before the path of every request; it does not end with a slash."""

    scheme: str
    host: str  # without the brackets of an IPv6 address
    port: int | None
    path: str

    @property
    def host_header(self) -> str:
        """The value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port is None else f"{host}:{self.port}"


def parse_url(text: str) -> ServerUrl:
    """Return the parts of an http or https URL, or raise ValueError with the URL, its problem and the accepted form.

    The error does not repeat a URL with an `@`, because it may contain a password.
    """
    has_user = bool(AT_SIGN.search(text))
    shown = "the given text with '@' (not shown)" if has_user else hide_passwords(repr(text))
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
        host.encode("idna")  # the socket encodes the host like this when it connects
    except ValueError as error:
        reason = "" if has_user else f" ({error})"
        raise ValueError(f"{shown} is not a URL{reason}; give http://host:port or https://host/prefix") from None
    if parts.username or parts.password:
        raise ValueError(
            "the URL (not shown) contains a user name or password, which the client does not send; "
            "give http://host:port or https://host/prefix, and a key with --cloud-key-file"
        )
    is_plain = text.isascii() and text.isprintable() and " " not in text
    is_host = bool(host) and ("%" not in host or ":" in host)  # an address of IPv6 may have a zone, and no name a %
    if parts.scheme not in ("http", "https") or not is_host or not is_plain or parts.query or parts.fragment:
        raise ValueError(f"{shown} is not a URL of a server; give http://host:port or https://host/prefix")
    return ServerUrl(parts.scheme, host, port, parts.path.rstrip("/"))


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a host, an address or `localhost`. Another name may be anywhere."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host.rstrip(".").lower() == "localhost"
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def warn_if_readable_on_the_way(url: str) -> None:
    """Warn about a URL with which a key crosses the network unencrypted."""
    parts = parse_url(url)
    if parts.scheme == "http" and not is_loopback(parts.host):
        problem = "the key and the audio cross the network unencrypted: use an https:// URL, of a proxy with TLS"
        warnings.warn(f"--cloud-url {url}: {problem}", stacklevel=3)
