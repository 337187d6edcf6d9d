"""Who may do what: keys from the environment, kept as hashes; without keys only this machine may come in."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from hmac import compare_digest
from ipaddress import ip_address
from typing import Literal

from kblam_ray.errors import AuthenticationError, InputError, PermissionDeniedError

Access = Literal["ask", "write"]

ASKING_KEYS = "KBLAM_API_KEYS"
ADMIN_KEYS = "KBLAM_ADMIN_KEYS"


@dataclass(frozen=True, repr=False)
class Keys:
    """SHA-256 hashes of the keys that may ask and of those that may also write. Empty: nobody has a key.

    Hashes are what travels between processes; what a client sends is hashed and compared with all of them in constant
    time.
    """

    asking: tuple[bytes, ...] = ()
    admin: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, *, asking: Iterable[str] = (), admin: Iterable[str] = ()) -> Keys:
        """The hashes of keys.

        Raises:
            InputError: a key that cannot stand in a header; the message does not show it.
        """
        return cls(tuple(map(_hashed, asking)), tuple(map(_hashed, admin)))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Keys:
        """The keys in `KBLAM_API_KEYS` and `KBLAM_ADMIN_KEYS`, each a list with commas or blanks between.

        Raises:
            InputError: see `of`.
        """
        asking, admin = (environment.get(name, "").replace(",", " ").split() for name in (ASKING_KEYS, ADMIN_KEYS))
        return cls.of(asking=asking, admin=admin)

    def __bool__(self) -> bool:
        return bool(self.asking or self.admin)

    def __repr__(self) -> str:
        return f"Keys({len(self.asking)} to ask, {len(self.admin)} to write)"

    def check(self, authorization: Sequence[bytes], access: Access) -> None:
        """Let a request pass or raise.

        Args:
            authorization: the values of all its Authorization headers.

        Raises:
            AuthenticationError: no key, or an unknown one.
            PermissionDeniedError: a key to ask with, where one to write is needed.
        """
        if not self:
            return
        help = "send `Authorization: Bearer KEY`, with one of the server's keys"
        scheme, _, key = authorization[0].partition(b" ") if len(authorization) == 1 else (b"", b"", b"")
        if scheme.lower() != b"bearer":
            given = "no key was given" if not authorization else "the Authorization header is not `Bearer KEY`"
            raise AuthenticationError(given, where="Authorization", help=help)
        digest = sha256(key.strip()).digest()
        may_write = _is_among(digest, self.admin)
        may_ask = _is_among(digest, self.asking)
        if not (may_write or may_ask):
            raise AuthenticationError("the key is not known here", where="Authorization", help=help)
        if access == "write" and not may_write:
            raise PermissionDeniedError(
                "this key may ask, but not write", where="Authorization", help=f"use one of the {ADMIN_KEYS}"
            )

    def check_host(self, host: str) -> None:
        """Raises InputError if a server with these keys may not listen at `host`."""
        if not self and not is_loopback(host):
            raise InputError(
                "without keys the server listens on loopback only",
                where=f"host {host}",
                help=f"set {ASKING_KEYS} and {ADMIN_KEYS} in the environment, or listen on 127.0.0.1",
            )

    def check_client(self, client: str | None, hosts: Sequence[bytes]) -> None:
        """Raises PermissionDeniedError if nobody has a key and a client is not on this machine.

        Args:
            client: its address.
            hosts: the values of its Host headers. A page from anywhere, opened in a browser on this machine, can have
                its own name resolve to this machine; the header still says that name.
        """
        if self:
            return
        if client is None or not is_loopback(client):
            raise PermissionDeniedError(
                "this server has no keys and answers clients on its own machine only",
                help=f"set {ASKING_KEYS} and {ADMIN_KEYS} where the server runs",
            )
        if len(hosts) > 1 or any(not is_loopback(_host_name(host)) for host in hosts):
            raise PermissionDeniedError(
                "this server has no keys and goes by the names of its own machine only",
                where="Host",
                help="call it 127.0.0.1 or localhost, or set keys where the server runs",
            )


def is_loopback(host: str) -> bool:
    """Whether a name or an address means this machine and no network."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        address = ip_address(host.strip("[]"))
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _host_name(header: bytes) -> str:
    text = header.decode("latin-1").strip()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0]


def _hashed(key: str) -> bytes:
    if not (key.isascii() and key.isprintable()) or not key or key != key.strip():
        raise InputError(
            "a key has characters that cannot stand in a header",
            where=f"{ASKING_KEYS}, {ADMIN_KEYS}",
            help="use letters, digits and punctuation of ASCII",
        )
    return sha256(key.encode()).digest()


def _is_among(digest: bytes, hashes: Sequence[bytes]) -> bool:
    found = False
    for each in hashes:
        # No early exit: the time must not tell which one it was.
        found |= compare_digest(digest, each)
    return found
