"""Download over HTTP from hosts that are named, at public addresses, and from nothing else.

A name is resolved once. Every address that comes of it has to be public, and the connection goes to one of these
addresses, as digits, while `Host` and the TLS name stay those of the URL: a name that resolves otherwise the next time
changes nothing. A redirect is followed as if its target had been given. Neither proxies, cookies nor credentials are
read from anywhere.
"""

import asyncio
import functools
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

import h11

_REDIRECTS = 3
_PORTS = {"http": 80, "https": 443}
_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
#: What the standard library counts as public, in some versions or all, and is not: protocol assignments, relays and
#: tunnels to IPv4, documentation, site-local addresses.
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        *("192.0.0.0/24", "192.88.99.0/24"),
        *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20", "fec0::/10"),
    )
)
#: NAT64: IPv4 addresses in the last four bytes.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class FetchError(ValueError):
    """Why a URL was not downloaded and what would be; for people, and without the URL beyond its first characters."""


async def _addresses(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


@dataclass(frozen=True)
class Network:
    """How names are resolved and connections opened.

    resolve: addresses, as text, of a host and port. connect: as `asyncio.open_connection`, is only ever given an
    address that `is_public`.
    """

    resolve: Callable[[str, int], Awaitable[Sequence[str]]] = _addresses
    connect: Callable[..., Awaitable[_Streams]] = asyncio.open_connection


@dataclass(frozen=True)
class Host:
    """A host that may be fetched from: `example.com`, `.example.com` for all below it, either with `:port`."""

    name: str
    port: int | None

    @classmethod
    def parse(cls, text: str) -> "Host":
        """Read an entry of the list of allowed hosts.

        Args:
            text: a name or an address (an IPv6 one in brackets), optionally with `:port`. With a leading dot it stands
                for every name below, at any depth, and not for the name itself.

        Returns:
            The entry, in lower case.

        Raises:
            ValueError: for anything else, such as a URL.
        """
        try:
            split = urlsplit(f"//{text.removeprefix('.')}")
            name, port = split.hostname or "", split.port
        except ValueError:
            name, port = "", None
        if _joined(name, port) != text.lower().removeprefix(".") or not _well_formed(name) or port == 0:
            raise ValueError(
                f"allowed host: got {text[:40]!r}, expected a host's name without scheme and path, e.g. "
                "images.example.com, .example.com for all names below it, or example.com:8080"
            )
        return cls("." + name if text.startswith(".") else name, port)

    def allows(self, name: str, port: int) -> bool:
        """Tell whether a URL with this host (in lower case) and port may be fetched."""
        named = name.endswith(self.name) if self.name.startswith(".") else name == self.name
        return named and (port in _PORTS.values() if self.port is None else port == self.port)


def is_public(address: _Address) -> bool:
    """Tell whether an address belongs to the public internet; of one that wraps an IPv4 address, whether that does."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            return False
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    special = (
        not address.is_global,
        address.is_private,
        address.is_loopback,
        address.is_link_local,
        address.is_multicast,
        address.is_reserved,
        address.is_unspecified,
    )
    return not any(special) and not any(address in network for network in _NOT_PUBLIC)


async def fetch(url: str, hosts: Sequence[str], most: int, seconds: float, network: Network | None = None) -> bytes:
    """Download what an `http` or `https` URL has.

    Args:
        url: as it comes from a stranger.
        hosts: entries of `Host.parse`; without any, nothing is fetched.
        most: bytes at most; the connection is dropped where there are more.
        seconds: for all of it, from the first look-up to the last byte, redirects included.
        network: another way to resolve and connect, for tests.

    Returns:
        The body of the answer, which had status 200 and no content coding.

    Raises:
        FetchError: where the URL is not allowed, or nothing came of it within the limits.
    """
    entries = [Host.parse(host) for host in hosts]
    try:
        async with asyncio.timeout(seconds):
            return await _follow(url, entries, most, network or Network())
    except TimeoutError:
        raise FetchError(
            f"got no complete answer for {shown(url)} within {seconds:g} seconds, expected one; send the image as a "
            "data: URL"
        ) from None


async def _follow(url: str, entries: Sequence[Host], most: int, network: Network) -> bytes:
    for _ in range(_REDIRECTS + 1):
        found = await _get(url, _checked(url, entries), most, network)
        if isinstance(found, bytes):
            return found
        try:
            url = urljoin(url, found)
        except ValueError:
            url = found  # which is refused next
    raise FetchError(f"got more than {_REDIRECTS} redirects, expected an image; give the address it is at in the end")


def _checked(url: str, entries: Sequence[Host]) -> SplitResult:
    if not entries:
        raise FetchError(
            f"got {shown(url)}, but this server fetches no images; send the image as a data: URL "
            "(data:image/png;base64,...), or have the server's operator allow the host"
        )
    # urlsplit drops some of these without a word, and others end a request's line.
    if not url.isascii() or any(character <= " " or character in '\\"<>\x7f' for character in url):
        raise FetchError(f"got {shown(url)}, expected only printable ASCII in it; percent-encode the rest")
    try:
        split = urlsplit(url)
        name, port = split.hostname or "", split.port
    except ValueError:
        name, port = "", None
    if not _well_formed(name) or split.scheme not in _PORTS:
        raise FetchError(f"got {shown(url)}, expected http:// or https:// with a host's name")
    if "@" in split.netloc:
        # Not shown: it may be a password.
        raise FetchError("got a URL with a user's name or a password, expected none; leave them out")
    port = _PORTS[split.scheme] if port is None else port
    if not any(entry.allows(name, port) for entry in entries):
        raise FetchError(
            f"got {shown(url)}, expected a host and a port from which this server may fetch images; send the image as "
            "a data: URL, or have the server's operator allow the host"
        )
    return split


async def _get(url: str, split: SplitResult, most: int, network: Network) -> bytes | str:
    """The body, or the target of a redirect."""
    host = split.hostname or ""
    secure = split.scheme == "https"
    port = split.port or _PORTS[split.scheme]
    addresses = await _public_addresses(url, host, port, network)
    tls: dict[str, Any] = {"ssl": _tls(), "server_hostname": host} if secure else {}
    why = "no connection"
    for address in addresses:
        try:
            reader, writer = await network.connect(str(address), port, **tls)
        except OSError as error:
            why = "no certificate that is valid for it" if isinstance(error, ssl.SSLError) else why
            continue
        try:
            return await _exchange(url, split, most, reader, writer)
        except (OSError, h11.RemoteProtocolError):
            raise FetchError(
                f"got an answer for {shown(url)} that breaks off or is not HTTP, expected an image; try again, or "
                "send the image as a data: URL"
            ) from None
        finally:
            # Not close(), which would wait until a peer that does not read has taken what is left.
            writer.transport.abort()
    raise FetchError(f"got {why} for {shown(url)}, expected one; check the address, or send a data: URL")


async def _public_addresses(url: str, host: str, port: int, network: Network) -> list[_Address]:
    try:
        found = [ipaddress.ip_address(address) for address in await network.resolve(host, port)]
    except (OSError, UnicodeError):
        found = []
    if not found:
        raise FetchError(f"got no address for the host of {shown(url)}, expected one; check its name")
    # All of them: a name that has both kinds is set up to confuse.
    if not all(is_public(address) for address in found):
        raise FetchError(
            f"got {shown(url)}, whose host has an address that is not public, expected a public one; send the image as "
            "a data: URL"
        )
    # IPv4 first: where there is no way out over IPv6, some networks let a connection hang rather than refuse it.
    return sorted(dict.fromkeys(found), key=lambda address: address.version)


async def _exchange(
    url: str, split: SplitResult, most: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> bytes | str:
    connection = h11.Connection(h11.CLIENT)
    target = (split.path or "/") + (f"?{split.query}" if split.query else "")
    headers = [("Host", split.netloc), ("User-Agent", "attnpack-serve"), ("Accept", "image/*")]
    # No coding: what is counted while it comes is what is decoded.
    headers += [("Accept-Encoding", "identity"), ("Connection", "close")]
    for request in (h11.Request(method="GET", target=target, headers=headers), h11.EndOfMessage()):
        writer.write(connection.send(request) or b"")
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(1 << 16))
        elif isinstance(event, h11.Response):
            named = {bytes(name): bytes(value) for name, value in event.headers}
            if event.status_code in (301, 302, 303, 307, 308) and b"location" in named:
                return named[b"location"].decode("latin-1")
            if event.status_code != 200 or named.get(b"content-encoding", b"identity") != b"identity":
                coded = " and a content coding" if event.status_code == 200 else ""
                raise FetchError(f"got status {event.status_code}{coded} for {shown(url)}, expected 200 and an image")
            # A length that is no number h11 refuses.
            _check_size(url, int(named.get(b"content-length", b"0")), most)
        elif isinstance(event, h11.Data):
            body += event.data
            _check_size(url, len(body), most)
        elif isinstance(event, h11.EndOfMessage):
            return bytes(body)


def _check_size(url: str, size: int, most: int) -> None:
    if size > most:
        raise FetchError(f"got more than {most:,} bytes at {shown(url)}, expected at most that; send a smaller image")


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _well_formed(name: str) -> bool:
    """Whether a host, in lower case, is a name or an address; names of digits alone are looked up like others."""
    if ":" not in name:
        return _NAME.fullmatch(name) is not None
    try:
        ipaddress.IPv6Address(name)
    except ValueError:
        return False
    return True


def _joined(name: str, port: int | None) -> str:
    bracketed = f"[{name}]" if ":" in name else name
    return bracketed if port is None else f"{bracketed}:{port}"


def shown(url: str) -> str:
    """Quote the first 40 characters of what was sent as a URL: it may be long, or hold what nobody else should see."""
    return repr(url if len(url) <= 40 else url[:40] + "…")
