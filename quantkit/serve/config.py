"""``quantkit serve --config FILE``: tiers, tenants and the keys that name them.

.. code-block:: yaml

    tiers:                       # the best first
      paid: {weight: 8, ttft: 1.0, max_queue: 64}
      free: {weight: 1, ttft: 20}
    tenants:
      acme:
        tier: paid
        keys: [sha256:5e88…]     # of the key, as `printf %s KEY | sha256sum` prints it, or the key
        requests_per_second: 10
        tokens_per_second: 5000
        concurrency: 16
      monitoring: {tier: free, keys: [sha256:93a2…], operator: true}   # may read /metrics
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import UsageError
from quantkit.serve.keys import HASHED, MAKE_A_KEY, Key, digest
from quantkit.serve.policy.tiers import DEFAULT, Tenant, Tier
from quantkit.strict_yaml import Node, compose, nearest

#: Names become labels of metrics.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
MAX_TIERS = 16
#: Each request compares all keys, and a tenant is a label of metrics.
MAX_KEYS = 10_000
#: Shorter keys can be guessed.
MIN_KEY_LENGTH = 16


@dataclass(frozen=True)
class ServeConfig:
    """Who may call, and as what.

    Attributes:
        tiers: the best first.
        tenants: each of one of the tiers.
        keys: what each key stands for; none lets everybody in as the first tenant.
        operators: names of the tenants that may read /metrics, which tells of all.
    """

    tiers: tuple[Tier, ...]
    tenants: tuple[Tenant, ...]
    keys: tuple[Key, ...]
    operators: frozenset[str]


def open_config(keys: Sequence[str] = ()) -> ServeConfig:
    """One tier without promises. Each key, by its place in the file, is a tenant of its own, so
    that they share fairly; without keys everybody is one tenant."""
    names = [f"key-{i}" for i in range(1, len(keys) + 1)] or [DEFAULT]
    return ServeConfig(
        (Tier(DEFAULT),),
        tuple(Tenant(name, DEFAULT) for name in names),
        tuple(Key(digest(key), name) for key, name in zip(keys, names, strict=False)),
        frozenset(names),
    )


def read_config(path: Path) -> ServeConfig:
    """Read a configuration file.

    Raises:
        UsageError: with file and line, for everything that is not as above.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"configuration {path} cannot be read: {error}") from error
    root = compose(text, str(path))
    sections = root.mapping(("tiers", "tenants"), ("tiers", "tenants"))
    tiers = _tiers(sections["tiers"])
    tenants: list[Tenant] = []
    operators = set()
    keys: dict[bytes, Key] = {}
    for name, node in _named(sections["tenants"], "tenant"):
        tenants.append(_tenant(name, node, [tier.name for tier in tiers]))
        fields = _fields(node)
        if "operator" in fields and fields["operator"].truth():
            operators.add(name)
        listed = fields["keys"]
        if not listed.is_list or not listed.node.value:  # `items` would show what is there
            listed.fail("keys: not a list of keys", "write [KEY]")
        for item in listed.items():
            key = Key(_digest(item), name)
            if key.digest in keys:
                item.fail(
                    f"a key of tenant {name!r} is also one of {keys[key.digest].tenant!r}",
                    "a key stands for one tenant",
                )
            keys[key.digest] = key
    if len(keys) > MAX_KEYS:
        sections["tenants"].fail(f"tenants: {len(keys)} keys; at most {MAX_KEYS}")
    return ServeConfig(tiers, tuple(tenants), tuple(keys.values()), frozenset(operators))


def _tiers(node: Node) -> tuple[Tier, ...]:
    tiers = []
    for name, value in _named(node, "tier"):
        fields = value.mapping(("weight", "ttft", "max_queue"))
        tiers.append(
            Tier(
                name,
                weight=fields["weight"].positive() if "weight" in fields else 1.0,
                ttft=fields["ttft"].positive() if "ttft" in fields else None,
                max_queue=fields["max_queue"].whole(1) if "max_queue" in fields else None,
            )
        )
    if len(tiers) > MAX_TIERS:
        node.fail(f"tiers: {len(tiers)}; at most {MAX_TIERS}")
    return tuple(tiers)


def _tenant(name: str, node: Node, tiers: list[str]) -> Tenant:
    fields = _fields(node)
    tier = fields["tier"].text()
    if tier not in tiers:
        fields["tier"].fail(f"tier {tier!r} is not one of the file's tiers", nearest(tier, tiers))
    rates = {
        rate: fields[rate].positive()
        for rate in ("requests_per_second", "tokens_per_second")
        if rate in fields
    }
    concurrency = fields["concurrency"].whole(1) if "concurrency" in fields else None
    return Tenant(name, tier, concurrency=concurrency, **rates)


def _fields(node: Node) -> dict[str, Node]:
    limits = ("requests_per_second", "tokens_per_second", "concurrency")
    return node.mapping(("tier", "keys", "operator", *limits), ("tier", "keys"))


def _named(node: Node, what: str) -> list[tuple[str, Node]]:
    found = node.mapping()
    if not found:
        node.fail(f"{node.label}: there is none", f"name at least one {what}")
    for name, value in found.items():
        if not NAME.fullmatch(name):
            value.fail(
                f"{what} {name!r} is not a name",
                "use at most 64 letters, digits, dots, dashes and underscores",
            )
    return list(found.items())


def _digest(item: Node) -> bytes:
    """Of a key, or as it is written. No message shows a key: messages end up in logs."""
    if not isinstance(value := item.plain(), str):
        item.fail("keys: a key is not text", "quote it")
    if value.startswith(HASHED):
        if not re.fullmatch(r"[0-9a-f]{64}", value.removeprefix(HASHED)):
            item.fail(f"keys: {HASHED} needs 64 hexadecimal digits, in small letters")
        return bytes.fromhex(value.removeprefix(HASHED))
    if not value.isascii():
        item.fail("keys: a key is not ASCII, which is all that a header carries", MAKE_A_KEY)
    if len(value) < MIN_KEY_LENGTH or value != value.strip():
        item.fail(
            f"keys: a key needs at least {MIN_KEY_LENGTH} characters and no blanks around it",
            MAKE_A_KEY,
        )
    return digest(value)
