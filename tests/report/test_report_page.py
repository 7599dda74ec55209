"""The page: complete, well-formed, escaped, self-contained, the same bytes every time."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_builders import make_results, manifest, write_run

from quantkit.report import read_history, read_run, render
from quantkit.report.run_folder import InputRange
from quantkit.report.sections import MOST_FLIPS, SHORT_PROMPT
from quantkit.results import Results

#: Elements that stand apart from what is before them.
SPACED = {"td", "th", "dt", "dd", "div", "p", "text", "summary", "article", "h2", "h3", "span"}
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Checks that every element is closed in order; collects text, tags and links."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.feed(html)
        self.close()
        assert self.stack == []

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.texts.append(" " if tag in SPACED else "")
        names = [name for name, _ in attrs]
        assert not any(name.startswith("on") for name in names), names
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "action")]
        self.ids += [v or "" for k, v in attrs if k == "id"]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        if "style" not in self.stack:
            self.texts.append(data)


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "small")


@pytest.fixture(scope="module")
def html(failed: Path) -> str:
    return render(read_run(failed))


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def words(page: Page) -> str:
    """The page's text with plain spaces."""
    return page.text.replace("\u00a0", " ").replace("\u202f", " ")


def test_loads_nothing(html: str, page: Page) -> None:
    assert page.links
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert not set(page.tags) & {"script", "link", "img", "iframe", "object", "form", "base"}
    assert not re.search(r"https?:|url\(|@import", html)
    assert "default-src 'none'" in html


def test_headline_names_the_failed_gate(page: Page) -> None:
    assert "✗ FAIL 2 of 9 gates failed, first of all support_intent.acc: 49.8 % where" in words(
        page
    )
    assert "It was not promoted; it is in small.rejected." in words(page)


@pytest.mark.parametrize(
    "value",
    [
        "119.5 MB original 269.1 MB",
        "44.4 % 2.25× smaller",
        "5.19 of the quantized layers",
        "0.0309 nats per token; 99 % of tokens below 0.41",
        "92.4 % of tokens keep their most likely token",
        "22.72 original 22.02 (+3.1 %)",
        "original 63.6 % (−13.8 points)",
        "original 66.7 % (−3.3 points)",
        "field_extract · exact_match 61.2 % original 62.8 % (−1.7 points)",
        "c4.jsonl: 3 documents were shorter than 16 tokens and left out",
        "slice 'billing error' regressed by 42.9 points",
        "grounded_qa.acc ? INCONCLUSIVE",
        "and the bounds, −8.3 and +1.1, lie on both sides of it",
        "2 of 12 must-not-flip items lost: si-0241, si-0281",
        "kl.mean ✓ PASS 0.0309 nats per token; at most 0.0500 is allowed, and even the worse "
        "bound, 0.0321, is inside",
        "margin −5.0",
        "floor 40.0",
        "kept as they were: lm_head",
        "model.layers.29.self_attn.o_proj",
        "w4a16-g64: 4.25 bits, 178 layers",
        "w8a16: 8.03 bits, 32 layers",
        "40 920 tokens in 40 windows of 1 024",
        "mean 0.0309",
        "59.1 % to 67.9 %",
        "120 items (Wilson over 30 clusters); −3.3 points; 7 newly wrong, 3 newly right",
        "No gate holds this task",
        "billing error regressed −42.9 67.9 % 25.0 % 28",
        "10 slices that changed less",
        "Newly wrong: 74",
        "Newly right: 8",
        "support_intent · si-0241 · damaged parcel must not flip Customer message: Goodbye Premium",
        "Original (right) damaged parcel Quantized (wrong) cancel subscription",
        "128 samples of 512 tokens (65 536 in all), seed 0",
        "traffic.jsonl 812 49 152 75.0 %",
        "c4.jsonl 31 16 384 25.0 %",
        "eval 3 min 34 s 63.0 %",
        "total 5 min 39 s",
        "peak memory 1.91 GB",
        "Example CPU 9000",
        "transformers 5.17.0",
        '- {match: "*.down_proj", scheme: w8a16}',
        manifest()["recipe"]["sha256"],
        manifest()["data"]["hash"],
        manifest()["files"]["config.json"],
    ],
)
def test_holds(page: Page, value: str) -> None:
    assert value in words(page)


def test_newly_wrong_before_newly_right_and_must_not_flip_first(page: Page) -> None:
    text = words(page)
    assert text.index("Newly wrong: 74") < text.index("si-0241 · damaged") < text.index("gq-003")
    assert text.index("gq-003") < text.index("Newly right: 8")


def test_blocks_are_in_order(page: Page) -> None:
    text = words(page).partition("All 210 layers")[2]
    at = [text.index(f"model.layers.{i}.self_attn.q_proj") for i in range(30)]
    assert at == sorted(at)


def test_one_plot_a_kind_and_a_gate(html: str) -> None:
    assert html.count("output error and weight error by block") == 7
    assert html.count('class="limit"') == 9
    assert html.count('class="inside"') - 1 == 9  # the legend has one too


def test_same_run_same_bytes(failed: Path, html: str) -> None:
    assert render(read_run(failed)) == html


@pytest.mark.parametrize(("loses", "word"), [(0.0, "PASS"), (0.05, "INCONCLUSIVE"), (0.2, "FAIL")])
def test_every_outcome_is_said_in_words(tmp_path: Path, loses: float, word: str) -> None:
    policy = {"support_intent.acc": {"margin": 0.05}}
    candidate, baseline = (
        replace(
            side,
            tasks={
                "support_intent": replace(
                    task := side.tasks["support_intent"],
                    rows=tuple(replace(row, must_not_flip=False) for row in task.rows),
                )
            },
        )
        for side in make_results(loses=loses)
    )
    run = read_run(write_run(tmp_path / "out", results=(candidate, baseline), policy=policy))
    assert run.verdict is not None
    assert run.verdict.outcome == word
    page = Page(render(run))
    assert f" {word} " in page.text.partition("quantkit report of a run")[2][:60]
    assert ("promoted to out." in page.text) == (word == "PASS")


def test_without_gate(tmp_path: Path) -> None:
    page = Page(render(read_run(write_run(tmp_path / "out", gated=False))))
    text = words(page)
    assert "NOT GATED This checkpoint was written without being scored" in text
    assert "119.5 MB" in text
    assert "All 210 layers" in text
    assert "Calibration data" in text
    assert not {"gates", "tasks", "flips", "text"} & set(page.ids)
    assert {link[1:] for link in page.links} <= set(page.ids)


def test_without_data_or_recipe_file(tmp_path: Path) -> None:
    layers = {
        name: {**layer, "output_error": None, "weight_error": 0.0}
        for name, layer in manifest()["layers"].items()
    }
    layers["lm_head"] = layers["model.layers.0.mlp.up_proj"]
    facts = {"data": None, "layers": layers, "recipe": {"name": None, "sha256": "0", "text": None}}
    page = Page(render(read_run(write_run(tmp_path / "out", gated=False, facts=facts))))
    assert "None: this recipe fits nothing to data." in page.text
    assert "This run has none, because it used no data." in page.text
    assert "Outside the blocks" in page.text


def test_experts_share_a_plot(tmp_path: Path) -> None:
    layer = manifest()["layers"]["model.layers.0.mlp.up_proj"]
    names = [f"model.layers.{b}.mlp.experts.{e}.up_proj" for b in range(3) for e in range(4)]
    facts = {"layers": dict.fromkeys(names, layer)}
    html = render(read_run(write_run(tmp_path / "out", gated=False, facts=facts)))
    Page(html)
    assert html.count("mlp.experts.*.up_proj: output error and weight error by block") == 1


def test_model_output_is_text(tmp_path: Path) -> None:
    evil = '</pre><script>alert(1)</script><img src=x onerror="alert(2)">{{ 7*7 }} & \x1b[2J'
    candidate, baseline = make_results()

    def poison(side: Results) -> Results:
        task = side.tasks["support_intent"]
        rows = tuple(
            replace(r, prompt=evil, prediction=evil, target=evil, slice=evil) for r in task.rows
        )
        return replace(side, tasks={**side.tasks, "support_intent": replace(task, rows=rows)})

    run = read_run(
        write_run(
            tmp_path / "out",
            results=(poison(candidate), poison(baseline)),
            facts={"recipe": {"name": evil, "sha256": evil, "text": evil}, "kept": [evil]},
        )
    )
    html = render(run)
    page = Page(html)
    assert not set(page.tags) & {"script", "img"}
    assert "<script" not in html
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7*7 }}" in page.text
    assert "\x1b" not in html
    assert "␛[2J" in page.text


def test_half_a_character_can_be_written(failed: Path) -> None:
    html = render(replace(read_run(failed), model="broken \ud83d name"))
    assert "broken ? name" in html
    html.encode("utf-8")


def test_many_flips_are_counted(failed: Path) -> None:
    run = read_run(failed)
    flip = run.flips[0]
    many = tuple(replace(flip, id=f"x-{i:03d}") for i in range(MOST_FLIPS + 30))
    gains = tuple(replace(flip, id=f"y-{i}", direction="gain") for i in range(5))
    page = Page(render(replace(run, flips=(*gains, *many))))
    assert page.tags.count("article") == MOST_FLIPS
    assert f"Newly wrong: {MOST_FLIPS + 30}" in page.text
    assert "30 more are in flips.jsonl" in page.text
    assert "Newly right: 5" in page.text
    assert "5 more are in flips.jsonl" in page.text


def test_long_prompt_shows_its_end(failed: Path) -> None:
    run = read_run(failed)
    prompt = "passage " * SHORT_PROMPT + "What is the question?"
    page = Page(render(replace(run, flips=(replace(run.flips[0], prompt=prompt),))))
    assert "passage What is the question? Whole prompt" in page.text
    endless = replace(run.flips[0], prompt="a" * 100_000)
    assert len(render(replace(run, flips=(endless,)))) < 300_000


PROBE = """<script>
document.body.dataset.probe = document.documentElement.scrollWidth + "/" + innerWidth;
</script></body>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_phone_does_not_scroll_sideways(failed: Path, tmp_path: Path) -> None:
    """The page in a frame of 390 px: a browser window may have a larger least width."""
    run, long = read_run(failed), "unbreakable" * 40
    flip = replace(run.flips[0], prompt=long, target=long, candidate_prediction=long, slice=long)
    experts = [replace(x, kind=f"mlp.experts.*.{x.kind}") for x in run.layers]
    html = render(
        replace(
            run,
            model=long,
            flips=(flip, *run.flips),
            layers=tuple(experts),
            warnings=(long,),
            recipe_text=long,
            machine={"system": long},
        ),
        [replace(one, name=long) for one in read_history(run, [failed] * 3)],
    )
    policy = re.compile(r"<meta http-equiv=[^>]*>")
    inner = policy.sub("", html).replace("<details", "<details open").replace("</body>", PROBE)
    (tmp_path / "inner.html").write_text(inner, encoding="utf-8")
    outer = tmp_path / "outer.html"
    outer.write_text(
        '<body><iframe id="f" src="inner.html" width="390" height="800"></iframe><script>'
        'document.getElementById("f").onload = () => { document.title = '
        'document.getElementById("f").contentDocument.body.dataset.probe; };</script></body>',
        encoding="utf-8",
    )
    options = (
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}"),
    )
    done = subprocess.run(
        ["chromium", *options, "--dump-dom", outer.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r"<title>(\d+)/(\d+)</title>", done.stdout)
    assert found, done.stdout[:500]
    width, viewport = map(int, found.groups())
    assert viewport == 390
    assert width <= viewport


def test_static_input_ranges_are_shown_once_for_layers_that_share_one(failed: Path) -> None:
    found = read_run(failed)
    assert "Static input ranges" not in render(found)
    chosen = InputRange("mse()", -3.0, 4.5, {"minmax()": 0.4, "mse()": 0.0123, "entropy()": 0.2})
    layers = tuple(
        replace(x, input_range=chosen) if x.block == 0 and x.kind in ("q_proj", "k_proj") else x
        for x in found.layers
    )
    text = words(Page(render(replace(found, layers=layers))))
    assert "Chosen observers: mse() 1×" in text
    assert "model.layers.0.self_attn.q_proj, k_proj mse() -3 4.5 1.230 %" in text
    assert "entropy() 20.000 %, minmax() 40.000 %" in text
