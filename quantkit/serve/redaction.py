"""What captured traffic must not hold: a table of patterns, and own ones from a file.

Patterns find what has a form: addresses, numbers, keys. Names, street addresses and whatever else
is known only by its meaning stay. Captured files are as confidential as the traffic itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from quantkit.errors import UsageError
from quantkit.strict_yaml import compose

#: Name → pattern; a find becomes ``<name>``. Tried in this order. Repetitions are bounded, or begin
#: where the text before cannot be part of them, so that no text takes more than linear time: the
#: interpreter does nothing else while an expression is matched.
PATTERNS: dict[str, re.Pattern[str]] = {
    "email": re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,4}"),
    "key": re.compile(
        # PEM and PGP; the lines in front of an encrypted key hold dashes (DEK-Info: AES-128-CBC).
        r"-----BEGIN (?:[A-Z0-9]{1,20} ){0,3}PRIVATE KEY(?: BLOCK)?-----[^-]{0,20000}"
        r"(?:-[A-Za-z0-9][^-]{0,20000}){0,8}(?:-----END [A-Z0-9 ]{1,40}-----)?"
        r"|(?<![\w-])(?:sk|pk|rk|ghp|gho|ghs|github_pat|glpat|hf|xox[abprs])[-_][\w-]{10,}"
        r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"
        r"|\bAIza[\w-]{35}"
        r"|(?<![\w-])eyJ[\w-]{6,}\.[\w-]{6,}\.[\w-]{6,}"
        r"|(?i:\bbearer )[\w.~+/-]{8,}=*"
        r"|\b(?=[A-Za-z_]{0,255}\d)(?=\d{0,255}[A-Za-z_])\w{32,}"
    ),
    # With a country code or brackets, or in groups as phones are written.
    "phone": re.compile(
        r"(?<![\w.])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d(?:[ .-]?\d){5,12}"
        r"|\(\d{2,5}\)[ .-]?\d(?:[ .-]?\d){4,9}"
        r"|\d{3}[ .-]\d{3}[ .-]\d{4})(?!\w)"
    ),
    # IBANs; cards, accounts and identity numbers, in groups or not.
    "number": re.compile(
        r"(?<![\w.])(?:[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?"
        r"|\d(?:[ -]?\d){7,})(?!\w)"
    ),
}


def redact(text: str, patterns: Mapping[str, re.Pattern[str]]) -> str:
    """Each find of a pattern replaced by the pattern's name in angle brackets."""
    for name, pattern in patterns.items():
        text = pattern.sub(f"<{name}>", text)
    return text


def read_patterns(path: Path) -> dict[str, re.Pattern[str]]:
    """Own patterns, tried before the built-in ones: a YAML mapping of names to regular
    expressions of Python. A name of a built-in pattern replaces it.

    Raises:
        UsageError: with file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"patterns {path} cannot be read: {error}") from error
    own = {}
    for name, node in compose(text, str(path)).mapping().items():
        if not re.fullmatch(r"[a-z][a-z0-9_-]{0,31}", name):
            node.fail(f"{name!r} is not a name", "use small letters, digits and dashes")
        try:
            own[name] = re.compile(node.text())
        except re.error as error:
            node.fail(f"{name}: not a regular expression: {error}")
        if own[name].match(""):
            node.fail(f"{name}: the pattern matches the empty text")
    return own | {name: found for name, found in PATTERNS.items() if name not in own}
