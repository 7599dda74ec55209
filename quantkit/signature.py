"""Signatures: who made a checkpoint, and that no byte of it changed since.

OpenSSF's model signing (github.com/sigstore/model-transparency, the PyPI package `model-signing`)
with a pair of elliptic-curve keys: a sigstore bundle beside the weights whose signed in-toto
statement lists the sha256 of every file. No network, no certificate, no log.

Hashes in the manifest find damage; only a signature finds who changes a file and its hash.
"""

from __future__ import annotations

import os
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from quantkit.errors import QuantkitError, UsageError

#: The signature's file, beside the weights; the one file of a checkpoint that is not signed.
SIGNATURE = "model.sig"


def sign(folder: Path, key: Path) -> Path:
    """Sign every file of a checkpoint; an older signature is replaced.

    Args:
        folder: the checkpoint.
        key: PEM file of an unencrypted private key on P-256, P-384 or P-521.

    Returns:
        the signature's path.

    Raises:
        UsageError: the package is missing, or the key cannot be read.
        QuantkitError: the folder cannot be signed, as with symbolic links in it.
    """
    library = _library()
    try:
        config = library.signing.Config().use_elliptic_key_signer(private_key=key)
    except Exception as e:  # cryptography's own types vary by what is wrong with the file
        raise _bad_key(key, "private", e) from e
    path = folder / SIGNATURE
    staging = path.with_name(f".{SIGNATURE}.tmp")
    staging.unlink(missing_ok=True)  # it would be signed, too
    try:
        config.set_hashing_config(_hashing(library)).sign(folder, staging)
        os.replace(staging, path)
    except (ValueError, OSError) as e:
        staging.unlink(missing_ok=True)
        raise QuantkitError(f"{folder}: cannot be signed ({e})") from e
    except BaseException:  # Ctrl-C: one file more, and an older signature would not hold
        staging.unlink(missing_ok=True)
        raise
    return path


def check_signature(folder: Path, key: Path) -> None:
    """Every file is the one that the holder of the private key signed, and there is no other.

    Args:
        folder: the checkpoint.
        key: PEM file of the public key.

    Raises:
        UsageError: the package is missing, the key cannot be read, or there is no such folder.
        QuantkitError: no signature, one by another key, or a file that was changed, added or
            removed since; it is named.
    """
    library = _library()
    if not folder.is_dir():
        raise UsageError(
            f"{folder}: no such folder", remedy="only the folder of a checkpoint can be signed"
        )
    try:
        config = library.verifying.Config().use_elliptic_key_verifier(public_key=key)
    except Exception as e:  # see `sign`
        raise _bad_key(key, "public", e) from e
    path = folder / SIGNATURE
    if not path.is_file():
        raise QuantkitError(
            f"{folder}: has no {SIGNATURE}", remedy="sign it: quantkit sign CKPT --key FILE"
        )
    try:
        with redirect_stdout(sys.stderr):  # the library warns of old bundles by print
            config.set_hashing_config(_hashing(library)).verify(folder, path)
    except Exception as e:  # bundles can be damaged in ways that raise from five libraries
        names = _named(str(e))
        if names:
            raise QuantkitError(
                f"{folder}: {names[0]} is not as it was signed ({len(names)} files)",
                remedy="do not use it; get the checkpoint from its source again",
            ) from e
        raise QuantkitError(
            f"{path}: is not a signature by {key} ({type(e).__name__}: {e})".rstrip(": )") + ")",
            remedy="do not use the checkpoint, or name the key of the one who signed it",
        ) from e


def _named(message: str) -> list[str]:
    """Files that the library's message says were changed, added or removed."""
    message = message.replace("\\'", "'")  # it is the repr of a list
    changed = re.findall(r"Hash mismatch for '([^']+)'", message)
    listed = re.findall(r"(?:Extra|Missing) files (?:found )?in model '[^']*': ([^\"']+)", message)
    return [*changed, *(name.strip() for group in listed for name in group.split(","))]


def _hashing(library: Any) -> Any:
    config = library.hashing.Config().use_file_serialization(hashing_algorithm="sha256")
    # By default files of git are left out: nothing in a checkpoint may escape the signature.
    return config.set_ignored_paths(paths=[Path(SIGNATURE)], ignore_git_paths=False)


def _library() -> Any:
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as e:
        raise UsageError(
            f"signatures need the package model-signing ({e})",
            remedy="pip install 'quantkit[sign]'",
        ) from e
    return SimpleNamespace(hashing=hashing, signing=signing, verifying=verifying)


def _bad_key(key: Path, kind: str, error: Exception) -> UsageError:
    if not key.is_file():
        return UsageError(f"{key}: no such file")
    return UsageError(
        f"{key}: is not an unencrypted {kind} key on P-256, P-384 or P-521 in PEM ({error})",
        remedy="make a pair: openssl ecparam -genkey -name prime256v1 -noout -out private.pem; "
        "openssl ec -in private.pem -pubout -out public.pem",
    )
