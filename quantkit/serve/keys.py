"""API keys: kept as digests, compared without telling anything by the time it takes."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import UsageError

#: How a configuration file marks the SHA-256 of a key. Plain, because keys are random: there is
#: no dictionary to slow down, and a slow hash on each request would be a way to load the server.
HASHED = "sha256:"
MAKE_A_KEY = "make one with `openssl rand -hex 32`"


@dataclass(frozen=True)
class Key:
    """A key's digest (32 bytes) and the tenant that it stands for."""

    digest: bytes
    tenant: str


def digest(key: str) -> bytes:
    """SHA-256. All digests have one length, so comparing them does not tell a key's."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def find_tenant(keys: Sequence[Key], key: str) -> str | None:
    """The tenant of a key. All keys are compared, so the time does not tell which came close."""
    given = digest(key)
    found = None
    for known in keys:
        if hmac.compare_digest(given, known.digest):
            found = known.tenant
    return found


def read_api_keys(path: Path) -> tuple[str, ...]:
    """One key a line; blank lines and lines that begin with ``#`` are skipped.

    Raises:
        UsageError: it cannot be read, holds none, or one that no header can carry.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"API keys file {path} cannot be read: {error}") from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise UsageError(f"API keys file {path} holds no key", remedy="write one key a line")
    for number, line in enumerate(lines, 1):
        if not line.isascii() and not line.startswith("#"):
            raise UsageError(
                f"API keys file {path}:{number} a key is not ASCII, which is all that a header "
                "carries",
                remedy=MAKE_A_KEY,
            )
    return keys
