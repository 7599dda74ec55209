"""What keeps the page within a phone's width, read off its HTML: needs no browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from report_builders import write_run

from quantkit.report import read_history, read_run, render

VOID = {"meta", "br"}


class Layout(HTMLParser):
    """Collects the ancestors' classes of every table and ``pre``, and the widths that are set."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.tables: list[list[str]] = []
        self.widths: list[str] = []
        self.viewport = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if tag == "table":
            self.tables.append([name for _, names in self.open for name in names.split()])
        if tag == "meta" and found.get("name") == "viewport":
            self.viewport = found["content"]
        if tag in ("svg", "table", "div", "img"):
            self.widths.append(found.get("width", ""))
        if tag not in VOID:
            self.open.append((tag, found.get("class", "")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        self.open.pop()


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = write_run(tmp_path_factory.mktemp("phone") / "small")
    run = read_run(folder)
    return render(run, read_history(run, [folder]))


def test_the_viewport_is_the_devices(html: str) -> None:
    assert Layout(html).viewport == "width=device-width, initial-scale=1"


def test_wide_tables_scroll_within_their_box(html: str) -> None:
    found = Layout(html)
    assert len(found.tables) > 8
    assert all("scroll" in names for names in found.tables)
    assert re.search(r"\.scroll \{ overflow-x: auto; \}", html)


def test_no_element_has_a_width_of_its_own(html: str) -> None:
    assert set(Layout(html).widths) <= {"", "100%"}
    style = html[html.index("<style>") : html.index("</style>")]
    fixed = [int(px) for px in re.findall(r"(?<![-\w])(?:min-)?width: ?(\d+)px", style)]
    assert fixed
    assert max(fixed) <= 360


def test_prompts_and_names_wrap(html: str) -> None:
    assert re.search(r"body \{[^}]*overflow-wrap: anywhere", html)
    assert re.search(r"\.quoted \{ white-space: pre-wrap", html)


def test_nothing_is_fetched(html: str) -> None:
    assert "default-src 'none'" in html
    assert not re.search(r"https?://|<script|@import|url\(", html)
