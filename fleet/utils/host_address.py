"""Hosts and ports: as text, and whether a process may listen there."""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from contextlib import closing
from typing import Final

from fleet.errors import ConfigError

LABEL: Final = "[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
HOST_NAME: Final = re.compile(rf"(?=.{{1,253}}\Z)({LABEL}\.)*{LABEL}\.?")
NUMBERS: Final = re.compile(r"(?:0[xX][0-9A-Fa-f]*|[0-9]+)(?:\.(?:0[xX][0-9A-Fa-f]*|[0-9]+))*\.?")
"""An IPv4 address in any form that some system reads, or what is left of one."""
IPV6_NETWORK_BITS: Final = 64
BROADCAST: Final = ipaddress.IPv4Address("255.255.255.255")


def host_port(host: str, port: int) -> str:
    """Return ``HOST:PORT``, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def address_family(host: str, port: int = 0) -> socket.AddressFamily:
    """Return the family, IPv4 or IPv6, of the first address of `host`. Raises OSError."""
    try:
        family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except UnicodeError:  # a label that is empty or too long
        raise OSError(errno.EINVAL, "it is no name of a host") from None
    return family


def listen_remedy(error: OSError | OverflowError, another: str) -> str:
    """Return why a process cannot listen, and the next step; `another` is that for its port."""
    if isinstance(error, OverflowError):
        return f"{error}; {another}"
    if error.errno == errno.EADDRINUSE:
        return f"the port is in use; stop what uses it, or {another}"
    if error.errno == errno.EACCES:
        return f"{error.strerror}; {another}"
    return f"{error.strerror}; check the host's name and this machine's addresses"


def bind_probe(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to `host` and `port`. Raises OSError."""
    probe = socket.socket(address_family(host, port))
    try:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
    except BaseException:
        probe.close()
        raise
    return probe


def free_port(host: str) -> int:
    """Return a port of `host` that is free now."""
    with closing(bind_probe(host, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def check_host(host: str) -> None:
    """Check that `host` is a name or an address alone, without a scheme, a port or brackets.

    An address is one machine's, and an IPv4 address has four decimal numbers.

    Raises:
        ValueError: it is not; a decoder reports it in its own error.
    """
    if not (_is_machine_address(host) or _is_name(host)):
        raise ValueError(
            f"host {host[:80]!r}: expected a name or an address alone, such as fleet.example, "
            "192.0.2.5 or ::1; correct it, and give the port by itself"
        )


def _is_machine_address(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return not address.is_multicast and address != BROADCAST


def _is_name(host: str) -> bool:
    return bool(HOST_NAME.fullmatch(host)) and not NUMBERS.fullmatch(host)


def check_reachable(host: str) -> None:
    """Check that a client can connect to `host`, which must not stand for "every address".

    Raises:
        ConfigError: it is ``0.0.0.0`` or ``::``, in any of the forms that the system reads.
    """
    if _is_every_address(host):
        raise ConfigError(
            f"--host {host} is an address to listen on, not one that devices can connect to; "
            "give --host the name or address of the server's machine; the server itself has "
            f"--listen {host}"
        )


def _is_every_address(host: str) -> bool:
    try:
        return socket.inet_aton(host) == bytes(4)  # also 0, 0x0 and 0.0
    except OSError:
        pass
    try:
        address = ipaddress.IPv6Address(host)
    except ValueError:  # a name
        return False
    mapped = address.ipv4_mapped
    return address.is_unspecified or (mapped is not None and mapped.is_unspecified)


def peer_network(address: str) -> str:
    """Return the address that limits count: a whole IPv6 network of 64 bits is one."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if parsed.version == 4:
        return address
    if parsed.ipv4_mapped:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, IPV6_NETWORK_BITS), strict=False))
