"""The configuration of `quantkit serve`: read strictly, and keys that tell nothing."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from types import SimpleNamespace

import pytest

from quantkit.errors import UsageError
from quantkit.serve import keys as api_keys
from quantkit.serve.config import open_config, read_config
from quantkit.serve.keys import Key, digest, find_tenant
from quantkit.serve.policy.tiers import Tenant, Tier

SECRET = "a-secret-of-some-length"
GOOD = f"""\
tiers:
  paid: {{weight: 8, ttft: 0.5, max_queue: 64}}
  free: {{}}
tenants:
  acme:
    tier: paid
    keys: [{SECRET}, "sha256:{hashlib.sha256(b"hashed").hexdigest()}"]
    requests_per_second: 10
    tokens_per_second: 5e3
    concurrency: 16
    operator: true
  guest: {{tier: free, keys: [another-secret-of-theirs]}}
"""


def test_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(GOOD)
    config = read_config(path)
    assert config.tiers == (Tier("paid", 8.0, 0.5, 64), Tier("free"))
    assert config.tenants == (
        Tenant("acme", "paid", 10.0, 5000.0, 16),
        Tenant("guest", "free"),
    )
    assert config.operators == {"acme"}
    assert find_tenant(config.keys, SECRET) == "acme"
    assert find_tenant(config.keys, "hashed") == "acme"
    assert find_tenant(config.keys, "another-secret-of-theirs") == "guest"
    assert find_tenant(config.keys, "something else") is None
    assert SECRET not in repr(config)


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("tier: paid", "tier: payed", 6, "did you mean 'paid'"),
        ("weight: 8", "weight: 0", 2, "not positive"),
        ("ttft: 0.5", "ttft: soon", 2, "not a number"),
        ("max_queue: 64", "max_queue: 0", 2, "below 1"),
        ("max_queue: 64", "max_q: 64", 2, "did you mean 'max_queue'"),
        ("concurrency: 16", "concurrency: 1.5", 10, "not a whole number"),
        ("requests_per_second: 10", "requests_per_second: -1", 8, "not positive"),
        ("operator: true", "operator: yes please", 11, "not true or false"),
        (SECRET, "short", 7, "at least 16 characters"),
        (SECRET, "12345678901234567890", 7, "is not text"),
        (SECRET, "sha256:abc", 7, "64 hexadecimal digits"),
        (SECRET, "another-secret-of-theirs", 12, "also one of 'acme'"),
        (SECRET, "ein-Schlüssel-von-hier", 7, "not ASCII"),
        (SECRET, f'"\\ud800{SECRET}"', 7, "not ASCII"),
        ("[another-secret-of-theirs]", "another-secret-of-theirs", 12, "not a list of keys"),
        ("[another-secret-of-theirs]", "[]", 12, "not a list of keys"),
        ("[another-secret-of-theirs]", "", 12, "not a list of keys"),
        ("acme:", "'a b':", 6, "is not a name"),
        ("tier: free, ", "", 12, "no tier"),
    ],
)
def test_mistakes_have_a_line(tmp_path: Path, old: str, new: str, line: int, message: str) -> None:
    path = tmp_path / "serve.yaml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(UsageError, match=message) as error:
        read_config(path)
    assert str(error.value).startswith(f"{path}:{line} "), error.value
    assert SECRET not in str(error.value)
    assert "another-secret" not in str(error.value)
    assert "Schlüssel" not in str(error.value)


@pytest.mark.parametrize("text", ["", "tiers: {}\ntenants: {}\n", "tiers: [a]\ntenants: {}\n"])
def test_files_without_content(tmp_path: Path, text: str) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(UsageError):
        read_config(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_config(tmp_path / "missing.yaml")


def test_plain_keys_are_tenants_of_their_own() -> None:
    config = open_config(["one", "two"])
    assert [find_tenant(config.keys, key) for key in ("one", "two", "three")] == [
        "key-1",
        "key-2",
        None,
    ]
    assert {tenant.tier for tenant in config.tenants} == {"default"}
    assert open_config().keys == ()
    assert len(open_config().tenants) == 1


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return hmac.compare_digest(a, b)

    monkeypatch.setattr(api_keys, "hmac", SimpleNamespace(compare_digest=compare))
    known = [Key(digest(f"key {i}"), str(i)) for i in range(20)]
    for given in ("key 0", "key 19", "nothing", ""):
        compared.clear()
        find_tenant(known, given)
        assert compared == [(32, 32)] * 20
