"""The web page, in a real Chromium: what people do with it, what it says when things go wrong, and who can use it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from http_samples import wait_until
from page_double import REFUSAL, Double, app_of, served
from serving_samples import (
    ANSWER,
    CAPITALS,
    CURRENCIES,
    QUESTION,
    UNANSWERABLE,
    demo_model,
    make_kb,
)

from kblam_ray.errors import ContextLengthError, OverloadedError, UnavailableError
from kblam_ray.serving.http.access import Keys
from kblam_ray.serving.http.page import mount_page
from kblam_ray.serving.http.page.mount import CONTENT_TYPES

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = os.environ.get("CHROMIUM_PATH") or shutil.which("chromium")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
EVIL = """<img src=x onerror="document.title='owned'"><script>document.title='owned'</script>"""
PEN = "What is the currency code of Peru?"

Open = Callable[..., "Page"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="the page is tested with the package playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium: install Debian's package chromium, or say where it is in CHROMIUM_PATH")
    sync_api.expect.set_options(timeout=60_000)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Open the page at an address; at the end there must have been no error in it that it has not shown."""
    contexts, errors = [], []

    def on_console(message: Any) -> None:
        # The browser itself tells of every answer that is not 2xx; the page has to show it.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            errors.append(message.text)

    def open_page(address: str, width: int = 1280, height: int = 800, scheme: str = "light") -> Page:
        viewport = {"width": width, "height": height}
        contexts.append(browser.new_context(viewport=viewport, color_scheme=scheme, reduced_motion="reduce"))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("console", on_console)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


@pytest.fixture
def double() -> Double:
    double = Double()
    for country, city in CAPITALS.items():
        double.put(country, "capital", city, '{"source":"https://example.org/atlas"}' if country == "Kenya" else None)
    for country, code in CURRENCIES.items():
        double.put(country, "currency code", code)
    double.put("<b>Evil</b>", "tag", EVIL)
    return double


@pytest.fixture
def address(double: Double) -> Iterator[str]:
    with served(app_of(double)) as address:
        yield address


def expect(locator: Any) -> Any:
    from playwright.sync_api import expect

    return expect(locator)


def question_box(page: Page) -> Any:
    return page.get_by_role("textbox", name="Question")


def ask(page: Page, question: str) -> Any:
    """Ask, and give the turn that begins."""
    number = page.locator(".turn").count()
    question_box(page).fill(question)
    page.keyboard.press("Enter")
    return page.locator(".turn").nth(number)


def look_now(page: Page) -> None:
    """Have the page ask for the state of the knowledge base now, not two seconds later."""
    page.evaluate("dispatchEvent(new Event('online'))")


def part(turn: Any, name: str) -> Any:
    return turn.locator(f'[data-part="{name}"]')


def body_of(double: Double, number: int = -1) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in double.asked[number].messages]


# The whole way, with the model that ships and a real table


def test_ask_change_a_fact_and_ask_again(open_page: Open, tmp_path):
    from kblam_ray.serving.local import LocalBackend
    from kblam_ray.serving.settings import ServeSettings
    from kblam_ray.serving.wanted import KbSpec

    table = make_kb(tmp_path)
    backend = LocalBackend(ServeSettings(), {"capitals": KbSpec(table.uri)}, demo_model())
    with served(app_of(backend), backend) as address:
        page = open_page(address)
        expect(page.locator("#served")).to_have_text("version 0 · 18 facts")
        expect(page.locator("#examples button")).to_have_count(3)

        first = ask(page, QUESTION)
        expect(part(first, "answer")).to_have_text(ANSWER)
        expect(first.locator("mark")).to_have_text("Nairobi")
        expect(part(first, "chips")).to_contain_text("version 0")
        card = first.locator(".cards .fact").first
        expect(card).to_contain_text("capital of Kenya")
        expect(card).to_contain_text("source")
        assert float(part(card, "percent").inner_text().removesuffix("%").strip("< ")) > 0

        card.get_by_role("button", name="Edit capital of Kenya").click()
        page.keyboard.type("Mombasa")
        page.keyboard.press("Control+Enter")
        expect(part(first, "changed")).to_contain_text("Version 1 is served")
        expect(page.locator("#served")).to_have_text("version 1 · 18 facts")
        first.locator(".changed").get_by_role("button", name="Ask again").click()
        second = page.locator(".turn").nth(1)
        expect(part(second, "answer")).to_have_text("The capital of Kenya is Mombasa.")
        expect(part(second, "chips")).to_contain_text("version 1")
        expect(part(first, "chips")).to_contain_text("version 0, now 1")

        follow_up = ask(page, "What is the capital of Peru?")
        expect(part(follow_up, "answer")).to_have_text("The capital of Peru is Lima.")
        page.get_by_role("button", name="New conversation").click()
        refused = ask(page, "What is the capital of Spain?")
        expect(part(refused, "chips")).to_contain_text("refused")
        refused.get_by_role("button", name="Add one").click()
        form = page.get_by_role("form", name="Add a fact")
        expect(form.get_by_label("Entity")).to_have_value("Spain")
        form.get_by_label("Value").fill("Madrid")
        form.get_by_role("button", name="Save").click()
        expect(page.locator("#facts-note")).to_contain_text("Added. Version 2 is served.")
        page.locator("#facts-note").get_by_role("button", name="Ask again").click()
        expect(part(page.locator(".turn").nth(1), "answer")).to_contain_text("Madrid")

        page.get_by_label("Look facts up").fill("lisb")
        expect(page.locator("#rows .fact")).to_have_count(1)
        page.get_by_role("button", name="Delete capital of Portugal").click()
        page.locator("#rows").get_by_role("button", name="Delete", exact=True).click()
        expect(page.locator("#facts-note")).to_contain_text("Deleted. Version 3 is served.")
        expect(page.locator("#rows .fact")).to_have_count(0)


# Answers


def test_an_answer_is_seen_while_it_comes_and_can_be_stopped(open_page: Open, double: Double, address: str):
    double.may_stream.clear()
    page = open_page(address)
    turn = ask(page, QUESTION)
    expect(part(turn, "answer")).to_have_text("The")
    expect(turn).to_have_attribute("aria-busy", "true")
    expect(page.get_by_role("button", name="Ask", exact=True).and_(page.locator("#send"))).to_be_hidden()
    page.get_by_role("button", name="Stop").click()
    expect(part(turn, "chips")).to_contain_text("stopped")
    expect(turn).to_have_attribute("aria-busy", "false")
    expect(question_box(page)).to_be_focused()
    wait_until(lambda: double.num_cancelled == 1)  # or what the server still streams comes to its end
    double.may_stream.set()
    again = ask(page, PEN)
    expect(part(again, "answer")).to_have_text("The currency code of Peru is PEN.")
    # What was broken off is no part of the conversation.
    assert body_of(double) == [("user", PEN)]


def test_a_question_waits_until_the_models_are_known(open_page: Open, double: Double, address: str):
    page, held = open_page(address), []
    expect(page.locator("#served")).to_contain_text("version 3")
    page.route("**/v1/models", lambda route: held.append(route))
    page.reload()
    question_box(page).fill(QUESTION)
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    expect(question_box(page)).to_have_value(QUESTION)
    held[0].continue_()
    expect(part(page.locator(".turn"), "answer")).to_have_text(ANSWER)
    assert len(double.asked) == 1


def test_follow_ups_carry_the_conversation_without_answers_that_were_replaced(open_page, double, address):
    page = open_page(address)
    first = ask(page, QUESTION)
    expect(part(first, "chips")).to_contain_text("version 3")
    expect(part(ask(page, PEN), "answer")).to_contain_text("PEN")
    assert body_of(double) == [("user", QUESTION), ("assistant", ANSWER), ("user", PEN)]

    double.put("Kenya", "capital", "Mombasa")
    part(first, "again").click()
    expect(part(page.locator(".turn").nth(2), "answer")).to_contain_text("Mombasa")
    assert body_of(double) == [("user", QUESTION)]
    expect(part(first, "chips")).to_contain_text("asked again below")
    expect(part(ask(page, UNANSWERABLE), "answer")).to_have_text(REFUSAL)
    earlier = [PEN, "The currency code of Peru is PEN.", QUESTION, "The capital of Kenya is Mombasa."]
    assert [content for _, content in body_of(double)] == [*earlier, UNANSWERABLE]

    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(part(ask(page, PEN), "answer")).to_contain_text("PEN")
    assert body_of(double) == [("user", PEN)]


def test_what_is_set_is_what_is_asked_for(open_page: Open, double: Double, address: str):
    page = open_page(address)
    expect(part(ask(page, QUESTION), "chips")).to_contain_text("verbatim")
    asked = double.asked[-1]
    assert (asked.grounding, asked.selection, asked.max_citations) == ("verbatim", None, 5)

    page.get_by_role("combobox", name="Answer").select_option("cite")
    page.get_by_text("Advanced").click()
    page.get_by_label("Attend to").select_option("similar")
    page.get_by_label("how many").fill("7")
    page.get_by_label("Citations, at most").fill("1")
    turn = ask(page, QUESTION)
    expect(turn.locator(".cards .fact")).to_have_count(1)
    asked = double.asked[-1]
    assert (asked.grounding, asked.selection, asked.max_citations) == ("cite", "similar:7", 1)

    page.get_by_label("how many").fill("0")
    ask(page, "never asked")
    expect(page.locator("#similar:invalid")).to_be_focused()
    assert len(double.asked) == 2

    page.get_by_label("Knowledge base").select_option("demo-model")
    expect(page.get_by_label("Attend to")).to_be_hidden()
    expect(page.locator("#rows .fact")).to_have_count(0)
    question_box(page).fill("")
    expect(part(ask(page, QUESTION), "chips")).to_contain_text("base model alone")
    assert (double.asked[-1].kb, double.asked[-1].grounding) == (None, "off")


def test_a_link_chooses_the_knowledge_base_and_asks(open_page: Open, double: Double, address: str):
    page = open_page(f"{address}?model=demo-model:others&q=What+is+the+capital+of+Peru%3F")
    turn = page.locator(".turn")
    expect(part(turn, "answer")).to_have_text("The capital of Peru is Lima.")
    expect(page.get_by_label("Knowledge base")).to_have_value("demo-model:others")
    assert part(turn, "link").get_attribute("href") == "?model=demo-model%3Aothers&q=What+is+the+capital+of+Peru%3F"

    page.goto(f"{address}?model=demo-model:capitals@2")
    expect(page.locator("#notice")).to_contain_text("Asking version 2")
    expect(page.locator("#rows .fact").first).to_be_visible()
    expect(page.get_by_role("button", name=re.compile("^Edit"))).to_have_count(0)
    page.goto(f"{address}?model=demo-model:nothing")
    expect(page.locator("#notice")).to_contain_text("There is no model demo-model:nothing here")


def test_html_in_facts_stays_text(open_page: Open, double: Double, address: str):
    page = open_page(address)
    double.put("Kenya", "motto", "Harambee", f'{{"{EVIL[:4]}":"javascript:alert(1)","url":"https://example.org/a"}}')
    double.version += 1
    turn = ask(page, "What is the tag of <b>Evil</b>?")
    expect(part(turn, "answer")).to_have_text(f"The tag of <b>Evil</b> is {EVIL}.")
    expect(turn.locator(".cards .value")).to_have_text(EVIL)
    page.get_by_label("Look facts up").fill("<B>evil")
    expect(page.locator("#rows .value")).to_have_text([EVIL])
    page.get_by_label("Look facts up").fill("harambee")
    expect(page.locator("#rows .value")).to_have_text(["Harambee"])
    # Only addresses of the web become links.
    links = page.locator("#rows a")
    assert [link.get_attribute("href") for link in links.all()] == ["https://example.org/a"]
    assert page.title() == "kblam-ray: ask a knowledge base"
    assert page.locator("img").count() == 1  # the page's own


# Trouble


def test_keys_are_asked_for_and_kept_for_the_tab(open_page: Open, double: Double):
    keys = Keys.of(asking=["sk-ask"], admin=["sk-admin"])
    with served(app_of(double, keys)) as address:
        page = open_page(f"{address}?q=What+is+the+capital+of+Peru%3F")
        dialog = page.get_by_role("dialog", name="A key, please")
        expect(dialog).to_contain_text("only those who have a key")
        page.keyboard.press("Escape")
        expect(page.locator("#notice")).to_contain_text("only those who have a key")
        page.get_by_role("button", name="Enter a key").click()
        for given, told in (("wrong", "does not know this key"), ("sk-ask", None)):
            dialog.get_by_label("Key").fill(given)
            page.keyboard.press("Enter")
            if told:
                expect(dialog).to_contain_text(told)
        expect(part(page.locator(".turn"), "answer")).to_have_text("The capital of Peru is Lima.")
        assert page.evaluate("sessionStorage.getItem('kblam-ray-key')") == "sk-ask"
        assert page.evaluate("localStorage.length") == 0

        page.get_by_role("button", name="Delete capital of Peru").click()
        page.locator("#rows").get_by_role("button", name="Delete", exact=True).click()
        expect(dialog).to_contain_text("needs an admin key")
        dialog.get_by_role("button", name="Cancel").click()
        expect(page.locator("#rows")).to_contain_text("this key may ask, but not write")
        page.locator("#rows").get_by_role("button", name="Close").click()

        page.locator("#rows").get_by_role("button", name="Edit capital of Peru").click()
        page.keyboard.type("Cusco")
        page.keyboard.press("Control+Enter")
        dialog.get_by_label("Key").fill("sk-admin")
        dialog.get_by_role("button", name="Use this key").click()
        expect(page.locator("#facts-note")).to_contain_text("Saved. Version 4 is served.")
        page.reload()
        expect(part(page.locator(".turn"), "answer")).to_have_text("The capital of Peru is Cusco.")
        page.get_by_role("button", name="Key").click()
        dialog.get_by_role("button", name="Forget the key").click()
        expect(page.locator("#notice")).to_contain_text("only those who have a key")
        assert page.evaluate("sessionStorage.length") == 0
        page.locator("#notice").get_by_role("button", name="Enter a key").click()
        dialog.get_by_label("Key").fill("sk-ask")
        page.keyboard.press("Enter")
        expect(page.locator("#notice")).to_be_empty()
        expect(page.locator(".turn")).to_have_count(1)  # a link's question is asked once


def test_a_busy_server_is_asked_again_when_it_says(open_page: Open, double: Double, address: str):
    page = open_page(address)
    double.failures.append(OverloadedError("128 requests wait", help="ask again in a second"))
    turn = ask(page, QUESTION)
    expect(part(turn, "trouble")).to_contain_text("128 requests wait")
    again = turn.get_by_role("button", name="Try again")
    expect(again).to_be_enabled()
    double.failures.append(UnavailableError("no replica is there", help="ask again"))
    again.click()
    expect(part(turn, "trouble")).to_contain_text("no replica is there")
    turn.get_by_role("button", name="Try again").click()
    expect(part(turn, "answer")).to_have_text(ANSWER)
    expect(part(turn, "trouble")).to_be_empty()
    expect(page.locator(".turn")).to_have_count(1)


def test_an_answer_that_breaks_off_keeps_its_text_and_can_be_had_again(open_page, double, address):
    page = open_page(address)
    double.breaks_off = True
    turn = ask(page, QUESTION)
    expect(part(turn, "trouble")).to_contain_text("the engine has stopped")
    expect(part(turn, "answer")).to_have_text("The")
    double.breaks_off = False
    turn.get_by_role("button", name="Try again").click()
    expect(part(turn, "answer")).to_have_text(ANSWER)

    double.failures.append(ContextLengthError("the prompt is too long", help="ask less"))
    long = ask(page, PEN)
    long.get_by_role("button", name="Ask without the earlier questions").click()
    expect(part(long, "answer")).to_contain_text("PEN")
    assert body_of(double) == [("user", PEN)]


def test_offline_is_said_and_ends(open_page: Open, double: Double, address: str):
    page = open_page(address)
    expect(page.locator("#served")).to_contain_text("version 3")
    page.context.set_offline(True)
    expect(page.locator("#notice")).to_contain_text("offline. Shown is what was last known")
    turn = ask(page, QUESTION)
    expect(part(turn, "trouble")).to_contain_text("offline")
    page.context.set_offline(False)
    expect(page.locator("#notice")).to_be_empty()
    turn.get_by_role("button", name="Try again").click()
    expect(part(turn, "answer")).to_have_text(ANSWER)


def test_a_server_that_is_gone_is_said(open_page: Open, double: Double):
    with served(app_of(double)) as address:
        page = open_page(address)
        expect(page.locator("#served")).to_contain_text("version 3")
    look_now(page)
    expect(page.locator("#notice")).to_contain_text("cannot be reached")
    expect(part(ask(page, QUESTION), "trouble")).to_contain_text("cannot be reached")


def test_pinned_unreachable_failed_and_behind(open_page: Open, double: Double, address: str):
    page = open_page(address)
    turn = ask(page, QUESTION)
    expect(turn.get_by_role("button", name="Edit capital of Kenya")).to_be_visible()
    notice, edits = page.locator("#notice"), page.get_by_role("button", name=re.compile("^(Edit|Delete|Add)"))

    double.description = {"pinned": True, "latest_version": 9}
    look_now(page)
    expect(notice).to_contain_text("Pinned at version 3: its facts cannot be changed. The newest is 9.")
    expect(edits).to_have_count(0)
    notice.get_by_role("button", name="Follow the newest").click()
    expect(notice).to_be_empty()
    expect(turn.get_by_role("button", name="Edit capital of Kenya")).to_be_visible()

    double.description = {"status": "unreachable", "error": "no such bucket"}
    look_now(page)
    expect(notice).to_contain_text("cannot be reached (no such bucket). Version 3 goes on answering.")
    double.description = {"status": "failed", "error": "another encoder"}
    look_now(page)
    expect(notice).to_contain_text("capitals cannot be served (another encoder)")
    double.description = {"status": "loading", "version": None, "latest_version": None, "num_facts": None}
    look_now(page)
    expect(notice).to_contain_text("capitals is being loaded")
    expect(page.locator("#state-facts")).to_have_text("unknown")
    double.description = {"latest_version": 4, "lag_s": 1.25}
    look_now(page)
    expect(page.locator("#state-lag")).to_have_text("1.3 s")
    expect(page.locator("#state-latest")).to_have_text("4")
    expect(notice).to_be_empty()

    # Somebody else changes a fact: the list follows, and the answer says that it is of an older version.
    double.description = {}
    double.put("Peru", "capital", "Cusco")
    double.version = 4
    look_now(page)
    expect(part(turn, "chips")).to_contain_text("version 3, now 4")
    expect(page.locator("#rows")).to_contain_text("Cusco")


# Facts


def test_facts_are_looked_up_and_paged(open_page: Open, double: Double, address: str):
    for number in range(30):
        double.put(f"Town {number}", "mayor", f"Person {number}")
    page = open_page(address)
    rows = page.locator("#rows .fact")
    expect(rows).to_have_count(20)
    page.get_by_role("button", name="Show more").click()
    expect(rows).to_have_count(40)
    page.get_by_role("button", name="Show more").click()
    expect(rows).to_have_count(len(double.facts))
    expect(page.get_by_role("button", name="Show more")).to_be_hidden()
    keys = page.locator("#rows .key").all_inner_texts()
    assert len(set(keys)) == len(double.facts)
    page.get_by_label("Look facts up").fill("PERSON 7")
    expect(rows).to_have_count(1)
    rows.get_by_role("button", name="Ask about mayor of Town 7").click()
    expect(part(page.locator(".turn"), "answer")).to_have_text("The mayor of Town 7 is Person 7.")
    rows.get_by_role("button", name="Ask about mayor of Town 7").click()
    expect(part(page.locator(".turn").nth(1), "chips")).to_contain_text("version 3")
    # The question says all by itself.
    assert body_of(double) == [("user", "What is the mayor of Town 7?")]
    page.get_by_label("Look facts up").fill("nobody")
    expect(page.locator("#facts-note")).to_have_text("No fact holds “nobody”.")


def test_deleting_wants_to_be_confirmed(open_page: Open, double: Double, address: str):
    page = open_page(address)
    delete = page.get_by_role("button", name="Delete capital of Cuba")
    delete.click()
    expect(page.get_by_role("group", name="Delete the capital of Cuba?")).to_be_visible()
    expect(page.get_by_role("button", name="Keep")).to_be_focused()
    page.keyboard.press("Escape")
    expect(delete).to_be_focused()
    assert double.version == 3
    delete.click()
    page.locator("#rows").get_by_role("button", name="Delete", exact=True).click()
    expect(page.locator("#facts-note")).to_contain_text("Deleted. Version 4 is served.")
    expect(delete).to_have_count(0)


def test_a_table_of_many_values_loses_the_old_one(open_page: Open, double: Double, address: str):
    double.is_multi_valued = True
    double.facts.clear()
    double.put("Kenya", "language", "Swahili", '{"id":12345678901234567890}')
    double.put("Kenya", "language", "English")
    page = open_page(address)
    row = page.locator("#rows .fact").filter(has_text="wahili")
    row.get_by_role("button", name="Edit").click()
    page.keyboard.type("Kiswahili")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#facts-note")).to_contain_text("Version 5 is served.")
    assert {fact["value"] for fact in double.facts.values()} == {"Kiswahili", "English"}
    # Again, from the card of an answer that cites what has been replaced since.
    turn = ask(page, "What is the language of Kenya?")
    card = turn.locator(".cards .fact").filter(has_text="Kiswahili")
    for value in ("Sheng", "Luo"):
        part(card, "edit").click()
        page.keyboard.type(value)
        page.keyboard.press("Control+Enter")
        expect(part(card, "value").locator("ins")).to_have_text(value)
        assert {fact["value"] for fact in double.facts.values()} == {value, "English"}
    # Numbers that JavaScript would round come back as they were.
    assert '{"id":12345678901234567890}' in {fact["metadata"] for fact in double.facts.values()}


def test_a_write_that_is_not_served_in_time_stands_and_is_waited_for(open_page, double, address):
    double.is_served = False
    double.description = {"version": 3}
    page = open_page(address)
    page.get_by_role("button", name="Edit capital of Peru").click()
    form = page.get_by_role("form", name="Edit the capital of Peru")
    form.get_by_label("Value").fill("   ")
    form.get_by_role("button", name="Save").click()
    expect(form).to_contain_text("A fact needs a value.")
    form.get_by_label("Value").fill("Cusco")
    form.get_by_role("button", name="Save").click()
    expect(page.locator("#facts-note")).to_contain_text("Saved as version 4; not every replica serves it yet.")
    expect(part(ask(page, "What is the capital of Peru?"), "answer")).to_contain_text("Cusco")
    assert double.asked[-1].min_kb_version == 4
    double.description = {}
    look_now(page)
    expect(page.locator("#state-version")).to_have_text("4")
    expect(part(ask(page, PEN), "answer")).to_contain_text("PEN")
    assert double.asked[-1].min_kb_version is None


# Who can use it

AUDIT = """() => {
  const found = [];
  const visible = (e) => e.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true });
  const number = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const color = number(getComputedStyle(e).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  for (const e of document.body.querySelectorAll("*")) {
    if (!visible(e) || e.closest(".visually-hidden, :disabled, .replaced")) continue;
    const text = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || e.matches("input, textarea");
    const style = getComputedStyle(e);
    if (text && ratio(number(style.color), ground(e)) < 4.5) found.push(["contrast", e.outerHTML.slice(0, 90)]);
    if (e.matches("input, select, textarea") && ratio(number(style.borderTopColor), ground(e.parentElement)) < 3)
      found.push(["edge", e.outerHTML.slice(0, 90)]);
    if (e.matches("button, select, input, summary") && e.getBoundingClientRect().height < 24)
      found.push(["small", e.outerHTML.slice(0, 90)]);
    if (e.tabIndex > 0) found.push(["order", e.outerHTML.slice(0, 90)]);
  }
  const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  if (new Set(ids).size !== ids.length) found.push(["ids", ids.join()]);
  for (const e of document.querySelectorAll("[aria-labelledby], [for]"))
    if (!document.getElementById(e.getAttribute("aria-labelledby") ?? e.getAttribute("for")))
      found.push(["reference", e.outerHTML.slice(0, 90)]);
  const levels = [...document.querySelectorAll("h1, h2, h3, h4")].filter(visible).map((e) => Number(e.tagName[1]));
  levels.forEach((level, i) => i && level > levels[i - 1] + 1 && found.push(["headings", levels.join()]));
  if (levels.filter((level) => level === 1).length !== 1) found.push(["h1", levels.join()]);
  if (document.documentElement.scrollWidth > innerWidth) found.push(["wide", document.documentElement.scrollWidth]);
  if (innerWidth >= 960 && document.documentElement.scrollHeight > innerHeight) found.push(["tall", ""]);
  if (!document.documentElement.lang) found.push(["lang", ""]);
  return found;
}"""
"""What can be measured of accessibility: contrast (WCAG 1.4.3, 1.4.11), sizes (2.5.8), order, headings, reflow."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(360, 740), (1280, 800)])
def test_every_state_can_be_seen_and_used(open_page: Open, double: Double, address: str, width, height, scheme):
    page = open_page(address, width, height, scheme)
    is_narrow = width < 960

    def audit() -> None:
        assert page.evaluate(AUDIT) == []
        tree = page.locator("body").aria_snapshot()
        # A control that nobody can name is shown by its role alone.
        assert re.findall(r"^\s*- (?:button|textbox|searchbox|combobox|spinbutton|link)(?::.*)?$", tree, re.M) == []

    def show(view: str) -> None:
        if is_narrow:
            page.get_by_role("group", name="View").get_by_role("button", name=view).click()

    expect(page.locator("#examples")).to_be_visible()
    audit()
    turn = ask(page, QUESTION)
    expect(turn.locator(".cards .fact").first).to_be_visible()
    expect(part(turn, "answer")).to_be_in_viewport()
    page.get_by_text("Advanced").click()
    expect(page.get_by_role("status").filter(has_text=f"Answer: {ANSWER} Version 3. 2 facts cited.")).to_have_count(1)
    part(turn, "edit").first.click()
    audit()
    page.keyboard.press("Escape")
    expect(part(ask(page, UNANSWERABLE), "chips")).to_contain_text("refused")
    double.failures.append(UnavailableError("no replica is there", help="ask again"))
    failed = ask(
        page, "What is the capital of " + "Llanfairpwllgwyngyllgogerychwyrndrobwllllantysiliogogogoch" * 3 + "?"
    )
    expect(failed.get_by_role("alert")).to_contain_text("no replica is there")
    expect(failed.get_by_role("button")).to_be_enabled()
    expect(failed.get_by_role("alert")).to_be_in_viewport()
    double.description = {"pinned": True, "latest_version": 9}
    look_now(page)
    expect(page.locator("#notice")).to_contain_text("Pinned")
    audit()
    double.description = {}
    look_now(page)
    expect(page.locator("#notice")).to_be_empty()
    show("Facts")
    page.get_by_role("button", name="Add a fact").click()
    page.get_by_role("button", name="Delete capital of Cuba").click()
    audit()
    page.get_by_role("button", name="Key").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    audit()


def test_everything_can_be_done_with_the_keyboard(open_page: Open, double: Double, address: str):
    page = open_page(address)
    expect(page.locator("#examples button").first).to_be_visible()
    expect(question_box(page)).to_be_focused()

    def focused() -> str:
        named = "document.activeElement.getAttribute('aria-label') ?? "
        return page.evaluate(named + "(document.activeElement.id || document.activeElement.textContent)")

    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")  # the second of the examples
    expect(part(page.locator(".turn"), "answer")).to_contain_text("is")
    expect(question_box(page)).to_be_focused()
    page.get_by_role("button", name="New conversation").click()
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    expect(page.locator(".cards .fact")).to_have_count(2)

    order = []
    page.get_by_label("Knowledge base").focus()
    for _ in range(5):
        page.keyboard.press("Tab")
        order.append(focused())
    places = ["key-button", "Conversation", "https://example.org/atlas", "Edit capital of Kenya"]
    assert order == [*places, "Ask about currency code of Kenya"]
    page.get_by_role("button", name="Edit capital of Kenya").and_(page.locator(".turn button")).focus()
    page.keyboard.press("Enter")
    page.keyboard.type("Mombasa")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    again = page.locator(".changed").get_by_role("button", name="Ask again")
    expect(again).to_be_focused()
    page.keyboard.press("Enter")
    expect(part(page.locator(".turn").nth(1), "answer")).to_have_text("The capital of Kenya is Mombasa.")


# How it is served


def test_the_page_is_served_with_headers_that_keep_foreign_scripts_out():
    app = FastAPI()
    mount_page(app)
    client = TestClient(app)
    for name, kind in CONTENT_TYPES.items():
        path = "/" if name == "index.html" else f"/page/{name}"
        answer = client.get(path)
        assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'self';")
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-cache"
        etag = answer.headers["etag"]
        known = client.get(path, headers={"If-None-Match": f'"other", W/{etag}'})
        assert (known.status_code, known.content, known.headers["etag"]) == (304, b"", etag)
        assert client.get(path, headers={"If-None-Match": '"other"'}).content == answer.content
        head = client.head(path)
        assert (head.content, head.headers["content-length"]) == (b"", str(len(answer.content)))
        # Nothing from elsewhere, nothing inline, no way to make HTML of text.
        assert not re.search(r"""(src|href)="(https?:)?//|url\(|@import|\sstyle=|\son\w+=""", answer.text)
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", answer.text)
    assert client.get("/page/mount.py").status_code == 404
    assert client.get("/page/").status_code == 404
    assert "/" not in app.openapi()["paths"]


def test_every_file_of_the_page_is_in_the_package():
    import tomllib
    from pathlib import Path

    root = Path(__file__).parents[2]
    data = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    folder = root / "kblam_ray/serving/http/page"
    packed = {path.name for pattern in data["kblam_ray.serving.http.page"] for path in folder.glob(pattern)}
    assert packed == set(CONTENT_TYPES)
