"""The page at ``/``: chat, live plots, and another server's answers beside ours.

Its files go to anyone who may connect, because a browser sends no key with an address: they are
the same for every model and every caller. What they show, they ask of the API with the key that
was typed in.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from string import Template

from fastapi import FastAPI
from fastapi.responses import Response

_FOLDER = Path(__file__).parent.parent / "web"
_SCRIPT = "text/javascript; charset=utf-8"

#: Path of the page → its file and what that is.
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/web/style.css": ("style.css", "text/css; charset=utf-8"),
    **{
        f"/web/{name}.js": (f"{name}.js", _SCRIPT)
        for name in ("page", "chat", "dom", "plots", "server", "words")
    },
}
PATHS = frozenset(FILES)

#: Scripts and styles are these files and nothing else, and no text becomes markup: a model may
#: write whatever it likes, and is shown what it wrote.
POLICY = "; ".join(
    (
        "default-src 'none'",
        *("script-src 'self'", "style-src 'self'", "connect-src 'self'", "img-src data:"),
        *("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
        *("require-trusted-types-for 'script'", "trusted-types 'none'"),
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Another version of the server may have another page.
    "Cache-Control": "no-cache",
}


def install(app: FastAPI, *, comparing: bool) -> None:
    """Add the page's routes.

    Args:
        app: where to.
        comparing: there is another server to compare with.
    """
    for path, (name, media_type) in FILES.items():
        text = (_FOLDER / name).read_text(encoding="utf-8")
        if path == "/":
            text = Template(text).substitute(compare="yes" if comparing else "no")
        app.get(path, include_in_schema=False)(_sender(text.encode(), media_type))


def _sender(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        return Response(content, media_type=media_type, headers=HEADERS)

    return send
