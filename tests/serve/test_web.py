"""The page at /: its files, what they may load, and that what they name exists."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest
from serve_helpers import Live

import quantkit.serve
from quantkit.serve.api import web
from quantkit.serve.config import ServeConfig
from quantkit.serve.keys import Key, digest
from quantkit.serve.peer import Peer
from quantkit.serve.policy.tiers import Tenant, Tier

FOLDER = Path(quantkit.serve.__file__).parent / "web"
SCRIPTS = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.js")}
CLOSED = ServeConfig(
    (Tier("only", ttft=5.0),),
    (Tenant("t", "only"),),
    (Key(digest("k"), "t"),),
    frozenset({"t"}),
)


class Markup(HTMLParser):
    """Every attribute of a document, and the text of its scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.inline: list[str] = []
        self._script = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._script = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._script = False

    def handle_data(self, data: str) -> None:
        if self._script and data.strip():
            self.inline.append(data)


def test_files_come_without_a_key_and_with_a_strict_policy(live) -> None:
    server = live(access=CLOSED)
    assert {path.name for path in FOLDER.iterdir()} == {name for name, _ in web.FILES.values()}
    for path, (name, media_type) in web.FILES.items():
        response = httpx.get(server.url + path)
        assert response.status_code == 200, path
        assert response.headers["content-type"] == media_type
        assert response.headers["x-content-type-options"] == "nosniff"
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self'; style-src 'self'; connect-src 'self'" in policy
        assert "unsafe" not in policy
        if name != "index.html":
            assert response.content == (FOLDER / name).read_bytes()
    assert 'data-compare="no"' in httpx.get(server.url).text
    assert httpx.get(server.url + "/web/").status_code == 401
    assert httpx.get(server.url + "/web/../v1/models").status_code == 401


def test_no_web_leaves_nothing_open(live) -> None:
    closed = live(access=CLOSED, page=False)
    assert {httpx.get(closed.url + path).status_code for path in web.FILES} == {401}
    server = live(page=False)
    assert {httpx.get(server.url + path).status_code for path in web.FILES} == {404}


def test_another_hosts_page_cannot_have_it(server: Live) -> None:
    """A name that an attacker lets resolve to this machine."""
    for path in web.FILES:
        assert httpx.get(server.url + path, headers={"host": "evil.example"}).status_code == 403


def test_the_document_loads_its_own_files_and_runs_nothing_inline(server: Live) -> None:
    found = Markup(httpx.get(server.url).text)
    assert found.inline == []
    assert not any(name == "style" or name.startswith("on") for _, name, _ in found.attributes)
    links = {value for _, name, value in found.attributes if name in ("src", "href")}
    assert links == {"data:,", "web/style.css", "web/page.js"}
    ids = [value for _, name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    named = {one for text in SCRIPTS.values() for one in re.findall(r'\$\("([\w-]+)"\)', text)}
    assert named <= set(ids)
    pointed = {
        one
        for _, name, value in found.attributes
        if name in ("for", "aria-labelledby", "aria-describedby")
        for one in value.split()
    }
    assert pointed <= set(ids)
    style = (FOLDER / "style.css").read_text(encoding="utf-8")
    assert not re.search(r"@import|url\(", style)


def test_scripts_import_what_is_served_and_make_no_markup() -> None:
    for name, text in SCRIPTS.items():
        for imported in re.findall(r'from "(.*)";', text):
            assert f"/web/{imported.removeprefix('./')}" in web.PATHS, (name, imported)
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function"
            r"|localStorage|document\.cookie|https?://(?!www\.w3\.org/2000/svg)",
            text,
        ), name
    assert [name for name, text in SCRIPTS.items() if "fetch(" in text] == ["server.js"]


def test_every_endpoint_that_the_page_asks_exists(live) -> None:
    table = re.search(r"ENDPOINTS = \{(.*?)\}", SCRIPTS["server.js"], re.DOTALL)
    assert table
    named = {f"/{path}" for path in re.findall(r'"([^"]+)"', table[1])}
    assert len(named) == 4
    server = live(peer=Peer("http://127.0.0.1:9"))
    assert named <= set(httpx.get(server.url + "/openapi.json").json()["paths"])
    assert 'data-compare="yes"' in httpx.get(server.url).text


def test_every_metric_that_is_plotted_exists(live) -> None:
    names = set(re.findall(r'"((?:requests|tier|kv|prompt|generated)_\w+)"', SCRIPTS["plots.js"]))
    assert len(names) == 11
    server = live(access=CLOSED)
    headers = {"Authorization": "Bearer k"}
    body = {"prompt": "a", "max_tokens": 3, "temperature": 0}
    answer = httpx.post(server.url + "/v1/completions", json=body, headers=headers, timeout=30)
    assert answer.status_code == 200
    text = httpx.get(server.url + "/metrics", headers=headers).text
    for name in names:
        suffix = "_bucket" if name.endswith("_seconds") and "slo" not in name else ""
        assert re.search(rf"^quantkit_{name}{suffix}[{{ ]", text, re.MULTILINE), name
    assert 'quantkit_tier_slo_ttft_seconds{tier="only"} 5.0' in text


@pytest.mark.parametrize("promised", [None, 5.0])
def test_only_promises_are_told(live, promised: float | None) -> None:
    tenant = Tenant("t", "only")
    access = ServeConfig((Tier("only", ttft=promised),), (tenant,), (), frozenset({"t"}))
    text = httpx.get(live(access=access).url + "/metrics").text
    assert ('slo_ttft_seconds{tier="only"}' in text) == (promised is not None)
    assert ('slo_attainment{tier="only"}' in text) == (promised is not None)
