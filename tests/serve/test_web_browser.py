"""The page in headless Chromium: clicked, typed into, and fed what a hostile model would say."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator

import httpx
import pytest
from serve_helpers import Live, before_forward, wait_until
from stub_server import answering

from quantkit.serve.config import ServeConfig
from quantkit.serve.keys import Key, digest
from quantkit.serve.peer import Peer
from quantkit.serve.policy.tiers import Tenant, Tier

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="neither chromium nor google-chrome is installed"
)
expect = playwright.expect
expect.set_options(timeout=20_000)
HOSTILE = (
    '<img src=x onerror="document.title=1"><script>document.title=2</script> [a](javascript:1)'
)


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield browser
        browser.close()


@pytest.fixture
def visit(browser) -> Iterator[Callable[..., playwright.Page]]:
    """Opens a server's page. In the end no script has failed and the policy was never broken."""
    contexts, wrong = [], []

    def note(message: playwright.ConsoleMessage) -> None:
        # A refused request is logged as well, and is an answer like any other.
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            wrong.append(message.text)

    def visit(server: Live, **options: object) -> playwright.Page:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", note)
        page.goto(server.url)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert wrong == []


def answer_of(server: Live, prompt: str, max_tokens: int = 256) -> str:
    """What the API itself says to the page's request."""
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": max_tokens,
    }
    response = httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60)
    return response.json()["choices"][0]["message"]["content"]


def events(text: str) -> bytes:
    """A streamed answer with this text, word by word."""
    deltas = [{"reasoning_content": "hm"}]
    deltas += [{"content": part} for part in re.findall(r"\S+\s*|\s+", text)]
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": "stop"})
    blocks = [json.dumps({"choices": [choice]}) for choice in choices]
    # As other servers write them: with carriage returns and comments.
    return "".join(f": ping\r\n\r\ndata: {block}\r\n\r\n" for block in blocks).encode()


def test_an_answer_comes_as_it_is_made(server: Live, visit, monkeypatch) -> None:
    page = visit(server)
    expect(page.locator("#model")).to_contain_text("tiny")
    steps: list[int] = []
    go_on = threading.Event()

    def later_ones_wait(token_ids: list[int]) -> None:
        steps.append(1)
        if len(steps) > 12:
            go_on.wait(20)

    with monkeypatch.context() as patch:
        before_forward(patch, server.engine.runner, later_ones_wait)
        page.get_by_label("Message").fill("how are you?")
        page.keyboard.press("Enter")
        said = page.locator(".said")
        expect(said).not_to_be_empty()
        expect(page.locator(".answer")).to_have_attribute("aria-busy", "true")
        expect(page.get_by_role("button", name="Stop")).to_be_enabled()
        assert server.engine.live == 1
        go_on.set()
        expect(page.locator(".timing")).to_contain_text("tokens/s")
    expect(page.locator(".timing")).to_have_text(
        re.compile(r"^TTFT [\d.]+ s · [\d.]+ tokens/s · \d+ tokens")
    )
    assert said.text_content() == answer_of(server, "how are you?")


def test_the_next_turn_has_heard_the_first(server: Live, visit) -> None:
    page = visit(server)
    page.get_by_text("Settings").click()
    page.get_by_label("Max tokens").fill("5")
    page.get_by_label("System prompt").fill("be brief")
    sent = []
    page.on("request", lambda request: sent.append(request))
    for i, prompt in enumerate(("one", "two")):
        page.get_by_label("Message").fill(prompt)
        page.get_by_role("button", name="Send").click()
        expect(page.locator(".timing").nth(i)).to_contain_text("cut at max tokens")
    body = [request for request in sent if request.method == "POST"][-1].post_data_json
    assert [message["role"] for message in body["messages"]] == [
        *("system", "user", "assistant", "user")
    ]
    assert body["messages"][2]["content"] == page.locator(".said").first.text_content()
    assert body["max_tokens"] == 5
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)


def test_escape_stops_an_answer(server: Live, visit, monkeypatch) -> None:
    page = visit(server)
    go_on = threading.Event()
    with monkeypatch.context() as patch:
        before_forward(patch, server.engine.runner, lambda token_ids: go_on.wait(20))
        page.get_by_label("Message").fill("a")
        page.keyboard.press("Enter")
        wait_until(lambda: server.engine.live == 1)
        page.keyboard.press("Escape")
        expect(page.locator(".timing")).to_have_text("stopped")
        expect(page.get_by_text("no part of the conversation")).to_be_visible()
        go_on.set()
        wait_until(lambda: server.engine.live == 0)
    expect(page.get_by_role("button", name="Send")).to_be_enabled()


def test_two_servers_side_by_side(live, visit) -> None:
    """The other one says what ours says, between other words, the last of them hostile."""
    ours = answer_of(live(), "hello")
    theirs = f"CHANGED {ours} {HOSTILE}"
    listed = b'{"data": [{"id": "<b>other</b>"}]}'
    with answering(body=events(theirs), models=listed) as stub:
        server = live(peer=Peer(stub.url))
        page = visit(server)
        page.get_by_label("Compare with").check()
        page.get_by_label("Message").fill("hello")
        page.keyboard.press("Enter")
        expect(page.locator(".difference")).to_contain_text("words differ")
    left, right = page.locator(".said").all()
    assert left.text_content() == ours
    assert right.text_content() == theirs
    assert page.locator(".name").all_text_contents() == ["tiny", "<b>other</b>"]
    assert left.locator("mark").count() == 0
    assert right.locator("mark").all_text_contents() == ["CHANGED", HOSTILE]
    assert page.locator("#transcript img, #transcript script, #transcript a").count() == 0
    assert page.title() == "tiny · quantkit"
    expect(page.locator(".timing").last).to_contain_text("number of tokens not told")
    expect(page.get_by_label("Compare with")).to_be_disabled()


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_the_first_token_may_be_a_thought(live, visit, name: str) -> None:
    """Else a model that thinks would seem late, and fast from then on."""
    usage = {"prompt_tokens": 3, "completion_tokens": 9}
    deltas = [{"role": "assistant", "content": ""}, {name: "hm"}]
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": "length"})
    blocks = [json.dumps({"choices": [choice], "usage": usage}) for choice in choices]
    body = "".join(f"data: {block}\n\n" for block in blocks).encode()
    with answering(body=body, models=b'{"data": [{"id": "other"}]}') as stub:
        page = visit(live(peer=Peer(stub.url)))
        page.get_by_label("Compare with").check()
        page.get_by_label("Message").fill("hello")
        page.keyboard.press("Enter")
        expect(page.locator(".timing").last).to_have_text(
            re.compile(r"^TTFT [\d.]+ s · .*9 tokens · cut at max tokens$")
        )


def test_a_changed_key_leaves_one_loop_of_polls(server: Live, visit) -> None:
    page = visit(server)
    held: list[playwright.Route] = []

    def hold(route: playwright.Route) -> None:
        held.append(route)

    def wait_for(count: int) -> None:
        for _ in range(1000):
            if len(held) >= count:
                return
            page.wait_for_timeout(20)
        pytest.fail(f"{len(held)} polls where {count} were due")

    page.route("**/metrics", hold)
    page.evaluate("import('/web/plots.js').then(({ watch }) => { watch(); watch(); watch(); })")
    wait_for(3)
    for route in held[:3]:
        route.continue_()
    del held[:3]
    wait_for(1)
    page.wait_for_timeout(500)  # in which others would come
    assert len(held) == 1
    held[0].continue_()


@pytest.mark.parametrize(
    ("left", "right", "marked"),
    [
        ("a b c d", "a x c d", (["b"], ["x"])),
        ("a b c", "a b c", ([], [])),
        ("", "a", ([], ["a"])),
        ("a b c d e f", "b x c e y f", (["a", "d"], ["x", "y"])),
        ("one two two three", "one two three three", (["two"], ["three"])),
    ],
)
def test_differing_words(server: Live, visit, left: str, right: str, marked: tuple) -> None:
    page = visit(server)
    found = page.evaluate(
        """async ([left, right]) => {
            const { differing, words } = await import("/web/words.js");
            const lists = [words(left), words(right)];
            return differing(...lists).map((flags, i) => lists[i].filter((_, j) => flags[j]));
        }""",
        [left, right],
    )
    assert found == list(marked)


def test_plots_follow_the_traffic(live, visit) -> None:
    tiers = (Tier("paid", ttft=30.0), Tier("free"))
    tenants = (Tenant("t", "paid"),)
    server = live(access=ServeConfig(tiers, tenants, (), frozenset({"t"})))
    page = visit(server)

    def plot(title: str) -> playwright.Locator:
        return page.get_by_role("figure", name=title, exact=True)

    expect(page.locator("figure")).to_have_count(7)
    expect(plot("Requests").locator("path")).to_have_count(2)
    ttft, attainment = (
        plot("Time to first token, p90 of 30 s"),
        plot("SLO attainment, last 1,000 requests"),
    )
    expect(ttft).to_contain_text("paid – (promised 30.0 s)")
    answer_of(server, "hello", 20)
    expect(ttft).to_contain_text(re.compile(r"paid [\d.]+ m?s \(promised 30.0 s\)free –"))
    assert ttft.locator("path.s0").first.get_attribute("d").startswith("M")
    expect(ttft.locator("svg")).to_have_attribute("aria-label", re.compile("paid .*free –"))
    expect(attainment).to_contain_text("paid 100.0 %")
    expect(attainment).not_to_contain_text("free")
    expect(plot("Tokens a second")).to_contain_text(re.compile(r"generated [\d.]+"))


def test_keys(live, visit) -> None:
    tenants = (Tenant("boss", "only"), Tenant("guest", "only"))
    keys = tuple(Key(digest(tenant.name), tenant.name) for tenant in tenants)
    access = ServeConfig((Tier("only"),), tenants, keys, frozenset({"boss"}))
    page = visit(live(access=access, peer=Peer("http://127.0.0.1:9")))
    field = page.get_by_label("API key")

    def use(key: str) -> None:
        field.fill(key)
        page.keyboard.press("Enter")

    expect(page.get_by_text("The server asks for a key.")).to_be_visible()
    use("wrong")
    expect(page.get_by_text("The server does not know this key.")).to_be_visible()
    use("guest")
    expect(page.locator("#model")).to_contain_text("tiny")
    expect(page.locator("#live-note")).to_contain_text("may not read the metrics")
    expect(page.locator("figure").first).to_be_hidden()
    expect(page.locator("#peer-note")).to_contain_text("may not compare")
    expect(page.get_by_label("Compare with")).to_be_hidden()
    use("boss")
    expect(page.locator("figure").first).to_be_visible()
    expect(page.locator("#peer-note")).to_contain_text("does not answer")
    expect(field).to_have_value("")
    kept = page.evaluate("[{...sessionStorage}, {...localStorage}, document.cookie]")
    assert kept == [{"quantkit.key": "boss"}, {}, ""]
    page.get_by_role("button", name="Forget").click()
    expect(page.get_by_text("The server asks for a key.")).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(live, visit, scheme: str) -> None:
    listed = json.dumps({"data": [{"id": "m" * 200}]}).encode()
    with answering(body=events("unbreakable" * 40), models=listed) as stub:
        page = visit(
            live(peer=Peer(stub.url)),
            viewport={"width": 390, "height": 844},
            is_mobile=True,
            color_scheme=scheme,
        )
        page.get_by_label("Compare with").check()
        page.get_by_label("Message").fill("unbreakable" * 10)
        page.keyboard.press("Enter")
        expect(page.locator(".difference")).to_contain_text("words differ")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        [red, *_] = re.findall(
            r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor")
        )
        assert (int(red) < 64) == (scheme == "dark")


def test_the_keyboard_reaches_everything(server: Live, visit) -> None:
    page = visit(server)
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    for wanted in ("transcript", "prompt", "send", "clear", "SUMMARY"):
        assert wanted in reached
    outline = page.evaluate(
        "(document.querySelector('#prompt').focus(), "
        "getComputedStyle(document.querySelector('#prompt')).outlineStyle)"
    )
    assert outline == "solid"
