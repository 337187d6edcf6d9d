"""The page and the files beside it: self-contained, escaped, complete; and in a real Chromium."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from report_samples import EVIL, cost_unit, interference_unit, questions_unit, rows, section, summary

from kblam_ray.errors import InputError, MissingDependencyError, StorageError
from kblam_ray.evaluation.report import Published, Report, make_report, sweep_markdown, write_report
from kblam_ray.evaluation.report.browser import browser_of

WAYS = (("attention", True, None), ("attention", True, "verbatim"), ("dense", None, None))
CHROMIUM = os.environ.get("CHROMIUM_PATH") or shutil.which("chromium")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """What stands in a page: its elements, its text, and whether everything that was opened is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.raw: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] in ("script", "style"):
            self.raw.setdefault(self._open[-1], []).append(data)
        else:
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def evil_section(name: str = "sweep"):
    """A small sweep whose every name and text is hostile."""
    given = summary(
        questions_unit(10, ways=WAYS, source=EVIL, kinds=["simple"]),
        questions_unit(1_000, ways=WAYS, source=EVIL, kinds=["simple"]),
        cost_unit(source=EVIL),
        cost_unit(source=f"{EVIL} too", sizes=[10]),
        notes=[EVIL],
        base_model=EVIL,
    )
    given["environment"]["command"] = EVIL
    given["settings"][EVIL] = EVIL
    published = Published(("what", "published", EVIL), ((EVIL, "about 80 %", "78.0 %"),), EVIL)
    return section(
        name, title=EVIL, about=f"{EVIL}\n\n{EVIL}", summary=given, rows=rows(text=EVIL), published=published
    )


@pytest.fixture(scope="module")
def report() -> Report:
    return make_report(f"Report {EVIL}", [evil_section()], about=EVIL)


@pytest.fixture(scope="module")
def page(report: Report) -> Page:
    return Page(report.html)


def test_nothing_is_fetched(page: Page, report: Report):
    addresses = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data", "action", "poster")
    ]
    assert addresses
    assert [address for address in addresses if not address.startswith(("#", "data:"))] == []
    assert "@import" not in report.html
    assert not re.search(r"url\((?!#)", report.html)
    (policy,) = [one["content"] for one in page.all("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    *_, script = page.raw["script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_what_comes_from_facts_is_text(page: Page):
    assert page.all("img") == []
    assert len(page.all("script")) == 2
    assert [name for _, attributes in page.elements for name in attributes if name.startswith("on")] == []
    assert page.text.count("onerror=") > 10


def test_the_questions_are_data_that_the_script_reads(page: Page):
    data = json.loads(page.raw["script"][0])
    assert [system["name"] for system in data["systems"]] == ["attention + prior, verbatim", "dense, read", "cosine"]
    first = data["questions"][0]
    assert first["wanted"] == [f"value 0 {EVIL}"]
    assert first["answers"]["0"] == {"text": f"answer 0 {EVIL}", "is_right": True, "refused": False, "place": None}
    assert first["answers"]["2"] == {"text": None, "is_right": True, "refused": None, "place": 1}


def test_every_link_leads_somewhere_and_every_name_is_given_once(page: Page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"].removeprefix("#") for attributes in page.all("a")]
    assert len(links) > 5
    assert set(links) <= set(ids)


def test_the_page_says_what_was_found_and_how(page: Page):
    for text in (
        "80.0 %", "best of the others: 64.0 % (dense, read)", "about 80 %", "hashing:64", "0123456789ab",
        "2 cores of a test", "Is the answer right?", "How long an answer takes", "All figures as tables",
        "6 of 12 questions", "question 1 of world", "with scripts allowed",
    ):  # fmt: skip
        assert text.lower() in page.text.lower(), text
    assert f"2 knowledge bases: {EVIL}, {EVIL} too · 10 to 1,000 facts · 36 rows" in page.text
    assert "0123456789abcdef, with changes" in page.text
    assert len(page.all("figure")) == len(page.all("figcaption"))
    assert page.all("noscript")


def test_equal_input_gives_an_equal_report():
    def made() -> Report:
        asked = summary(questions_unit(10, ways=[("cosine", None, None)], kinds=["simple"]))
        return make_report("Report", [section(summary=asked)])

    assert made() == made()


def test_markdown_shows_the_plots_that_were_made(report: Report):
    shown = re.findall(r"!\[[^\]]*\]\(plots/([^)]+)\)", report.markdown)
    assert shown == list(report.plots)
    assert len(shown) > 5
    assert all(re.fullmatch(r"[a-z0-9-]+\.png", name) for name in shown)
    # The command is shown as it was given, as code.
    assert "<script" not in re.sub(r"^ {4}.*$", "", report.markdown, flags=re.MULTILINE)
    assert "| facts |" in report.markdown


def test_several_sections_share_a_page():
    nothing = summary(notes=["not run here"])
    asked = summary(questions_unit(10, ways=[("cosine", None, None)], kinds=["simple"]))
    published = Published(("what", "published"), (("retrieval", "0.9"),))
    told = make_report("All", [
        section("Answers", title="First", summary=asked, rows=rows(2)),
        section("answers!", title="Second", summary=asked, rows=rows(2).slice(0, 0)),
        section("how", title="Third", summary=nothing, rows=rows().slice(0, 0), published=published),
    ])  # fmt: skip
    page = Page(told.html)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {"answers", "answers-2", "how-2", "how", "how-2-published"} <= set(ids)
    assert {name.partition("-")[0] for name in told.plots} == {"answers"}
    assert page.text.count("Nothing was measured here.") == 1
    assert len([one for one in page.all("script") if one.get("type") == "application/json"]) == 1
    # Of the three runs two have the same settings and are told of once.
    assert "First; Second" in page.text


def test_wrong_sections_are_refused():
    with pytest.raises(InputError, match="two sections of one name"):
        make_report("t", [section("a"), section("a")])
    with pytest.raises(InputError, match="as many cells"):
        make_report("t", [section(published=Published(("a", "b"), (("1",),)))])


def test_tables_of_a_sweep():
    units = [questions_unit(size, source=source) for source in ("a|b", "nouns") for size in (10, 1_000)]
    text = sweep_markdown(summary(*units, interference_unit(), cost_unit()))
    assert "### a|b" in text
    assert "### nouns" in text
    assert "| 1,000 | base model, no facts | 43.0 (38.0 to 48.0) |" in text
    assert "| 10 | BM25 of question and key |" in text
    assert "| 10 | BM25 facts in context |" in text
    assert "| 10,000 | with prior | 21.00 (20.00 to 22.00) | 1.10 (1.10 to 1.10) |" in text
    assert "| 100 | all facts in context | 1,500 tokens: does not fit | - | - | - | - |" in text
    assert "| 1,000 | attention, nearest 64 | 20 | 220 (219 to 221) |" in text
    assert "- a note of the sweep" in text
    sources = sweep_markdown(summary(interference_unit(source="a|b"), interference_unit(source="c")))
    assert "| a\\|b | 0 | alone |" in sources


def test_a_sample_of_the_questions():
    table = rows(60, sizes=[10, 1_000], sources=["world", "nouns"])
    sample = browser_of(table, 16)
    assert sample.num_asked == 240
    assert len(sample.questions) == 2 * (4 + 2)
    assert {question["where"] for question in sample.questions} == {"world, 1,000 facts", "nouns, 1,000 facts"}
    # Kinds and knowledge bases take turns.
    assert [(one["where"][:5], one["kind"]) for one in sample.questions[:4]] == [
        ("world", "simple"), ("world", "unanswerable"), ("nouns", "simple"), ("nouns", "unanswerable"),
    ]  # fmt: skip
    assert browser_of(table, 16).to_json() == sample.to_json()
    assert browser_of(table.slice(0, 0), 16).questions == []
    long = browser_of(rows(6, text="x" * 5_000), 16)
    assert max(len(question["question"]) for question in long.questions) == 400


def test_written_to_a_folder_and_to_a_store(report: Report, tmp_path, s3_uri):
    names = write_report(str(tmp_path / "new" / "place"), report)
    assert names[:2] == ["report.html", "report.md"]
    found = {path.relative_to(tmp_path / "new" / "place").as_posix(): path for path in tmp_path.rglob("*.*")}
    assert set(found) == set(names)
    assert found["report.html"].read_text(encoding="utf-8") == report.html
    assert found[names[2]].read_bytes() == report.plots[names[2].removeprefix("plots/")]

    import boto3

    assert write_report(f"{s3_uri}/reports/one", report) == names
    client = boto3.client("s3")
    bucket = s3_uri.removeprefix("s3://")
    stored = client.list_objects_v2(Bucket=bucket, Prefix="reports/one/")["Contents"]
    assert {one["Key"].removeprefix("reports/one/") for one in stored if one["Size"]} == set(names)
    page = client.get_object(Bucket=bucket, Key="reports/one/report.html")["Body"].read()
    assert page.decode() == report.html


def test_a_process_that_ends_while_it_writes_leaves_the_page_that_was_there(report: Report, tmp_path, monkeypatch):
    """Each file takes its name when it is whole, the page after its plots."""
    (tmp_path / "report.html").write_text("earlier")
    replace, replaced = os.replace, []

    def ending(new, place):
        if len(replaced) == len(report.plots) + 1:
            raise KeyboardInterrupt
        replaced.append(place)
        replace(new, place)

    monkeypatch.setattr(os, "replace", ending)
    with pytest.raises(KeyboardInterrupt):
        write_report(str(tmp_path), report)
    assert (tmp_path / "report.html").read_text() == "earlier"
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == report.markdown
    assert not list(tmp_path.rglob(".kblam-*"))


def test_a_report_that_cannot_be_written_says_so(report: Report, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        write_report(str(tmp_path / "file"), report)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="the page is tested with the package playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium: install Debian's package chromium, or say where it is in CHROMIUM_PATH")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, report: Report, tmp_path):
    """Opens the page; at the end nothing was asked of anybody, and there was no error in it."""
    write_report(str(tmp_path), report)
    contexts, errors, requests = [], [], []

    def opened(width: int = 1280, **settings: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, **settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto((tmp_path / "report.html").as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert errors == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []


def test_questions_are_filtered_in_a_browser(opened):
    page = opened()
    assert page.title() == f"Report {EVIL}"
    assert page.locator(".question").count() == 6
    page.get_by_label("kind of question").select_option("unanswerable")
    assert page.locator(".question").count() == 2
    assert page.locator(".question .tag", has_text="refused").count() == 4
    page.get_by_label("kind of question").select_option("")
    page.get_by_label("way of answering").select_option(label="dense, read")
    page.get_by_label("its answer").select_option("wrong")
    assert [text.split()[1] for text in page.locator(".asked").all_inner_texts()] == ["1", "3"]
    assert page.locator(".answer.chosen .who").all_inner_texts() == ["dense, read"] * 2
    page.get_by_label("its answer").select_option("")
    page.get_by_label("with the words").fill("VALUE 2")
    assert page.locator(".asked").all_inner_texts() == [f"Question 2 of world? {EVIL}"]
    assert page.locator("img").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(opened, scheme):
    page = opened(390, color_scheme=scheme)
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert all(box["width"] > 250 for box in map(lambda one: one.bounding_box(), page.locator("svg.plot").all()))
    ground, ink = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    brightness = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in (ground, ink)]
    assert (brightness[0] > brightness[1]) == (scheme == "light")


def test_it_is_read_without_scripts(opened):
    page = opened(java_script_enabled=False)
    assert "Question 1 of world?" in page.locator("noscript").inner_text()
    assert page.locator(".controls").count() == 0


def test_paper_is_light_and_has_what_is_unfolded(opened):
    page = opened(color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(246, 247, 248)"
    tables = page.locator("#sweep-tables")
    assert not tables.is_visible()
    page.evaluate("document.querySelector('#sweep-tables').open = true")
    assert tables.is_visible()
    assert not page.locator(".controls").is_visible()


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_package_that_is_missing_is_named(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"{package}.*kblam-ray\[evaluate\]"):
        make_report("Report", [section(summary=summary(questions_unit(10, ways=[("cosine", None, None)])))])
