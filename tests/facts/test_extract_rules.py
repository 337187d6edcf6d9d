"""Facts by rule: what the forms of documents give away, what merely looks like it, and unreadable documents."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from kblam_ray.errors import DocumentError, InputError
from kblam_ray.facts.extract.documents import find_documents, parse_text, parser_of, read_bytes
from kblam_ray.facts.extract.findings import Parsed, split_pair, table_findings

Triple = tuple[str, str, str]


def parse(name: str, text: str | bytes) -> Parsed:
    data = text if isinstance(text, bytes) else text.encode()
    return parser_of(name)(data, name)


def triples(name: str, text: str | bytes) -> list[Triple]:
    return [(each.entity, each.property, each.value) for each in parse(name, text).findings]


@pytest.mark.parametrize(
    ("line", "pair"),
    [
        ("Weight: 30 kg", ("Weight", "30 kg")),
        ("  - **Max pressure:** 12 bar ", ("Max pressure", "12 bar")),
        ("* Access:   by boat", ("Access", "by boat")),
        ("価格：３００円", ("価格", "３００円")),
        ("Home page: https://example.com/a:b", ("Home page", "https://example.com/a:b")),
        ("Opening: 9:30 to 17:00", ("Opening", "9:30 to 17:00")),
    ],
)
def test_a_key_value_line(line: str, pair: tuple[str, str]) -> None:
    assert split_pair(line) == pair


@pytest.mark.parametrize(
    "line",
    [
        "http://example.com: here",
        "See https://example.com",
        "It starts at 12:30 sharp",
        "12: 30",
        "Phase 2: 30 of them",
        "Dear all: we meet on Monday",
        "Please note: the shop closes early",
        "Three things matter: speed, cost and trust",
        "Note: this is not a fact",
        "TODO: write more",
        "He said: never again",
        "The result was clear: we won",
        "There is one rule: do not lie",
        "std::vector<int> x",
        "if (x) { a: 1 }",
        "Weight:",
        ": value",
        "a very long run of words that is no key at all: x",
        "First. Second: third",
        "plain words",
    ],
)
def test_what_only_looks_like_a_pair(line: str) -> None:
    assert split_pair(line) is None


def test_plain_text_is_about_its_file_or_the_name_that_begins_a_block() -> None:
    text = "Founded: 1931\n\nName: Tim Ode\nBorn: 1950\n\nBorn: 1951\n"
    assert triples("/x/old_mill.txt", text) == [
        ("old mill", "Founded", "1931"),
        ("Tim Ode", "Born", "1950"),
        ("old mill", "Born", "1951"),
    ]
    assert [each.position for each in parse("/x/old_mill.txt", text).findings] == [
        {"line": 1},
        {"line": 4},
        {"line": 6},
    ]


def test_front_matter_is_facts_about_its_title() -> None:
    text = (
        "---\ntitle: Atlas Pump\nvendor: {name: Karo, city: Graz}\ntags: [a, b]\nday: 2021-03-04\ndraft: true\nnone:\n"
        "---\nWeight: 3 kg\n"
    )
    expected = [
        ("Atlas Pump", "vendor name", "Karo"),
        ("Atlas Pump", "vendor city", "Graz"),
        ("Atlas Pump", "tags", "a, b"),
        ("Atlas Pump", "day", "2021-03-04"),
        ("Atlas Pump", "Weight", "3 kg"),
    ]
    assert triples("a.txt", text) == triples("a.md", text) == expected
    assert parse("a.md", text).findings[-1].position == {"line": 9}
    with pytest.raises(DocumentError, match=r"front matter that is not YAML.*\(a\.md\)"):
        parse("a.md", "---\na: [1\n---\n")
    assert triples("a.md", "---\njust a ruler\n---\n") == []


def test_markdown_pairs_belong_to_the_nearest_heading_that_names_something() -> None:
    text = (
        "# Atlas Pump\n\n**Weight:** 30 kg\nColour: `red`\n\n## Specifications\n\n- Power: 2 kW\n\n"
        "## Boreas Fan\n\n> Noise: low\n\n```\nsecret: 1\n```\n\n    indented: 2\n"
    )
    assert triples("a.md", text) == [
        ("Atlas Pump", "Weight", "30 kg"),
        ("Atlas Pump", "Colour", "red"),
        ("Atlas Pump", "Power", "2 kW"),
        ("Boreas Fan", "Noise", "low"),
    ]
    assert [each.position["line"] for each in parse("a.md", text).findings] == [3, 4, 8, 12]


def test_front_matter_without_a_title_is_about_the_main_heading() -> None:
    assert triples("docs/index.md", "---\nowner: Ada\n---\n# Atlas Pump\n\nWeight: 3 kg\n") == [
        ("Atlas Pump", "owner", "Ada"),
        ("Atlas Pump", "Weight", "3 kg"),
    ]
    assert triples("docs/fan.md", "---\nowner: Ada\n---\n# Overview\n") == [("fan", "owner", "Ada")]


def test_markdown_tables() -> None:
    text = (
        "# Karo\n\n| Property | Value |\n|--|--|\n| Founded | 1931 |\n| Seat | - |\n\n"
        "| # | City | Country | Staff |\n|--|--|--|--|\n| 1 | Lyon | France | 40 |\n| 2 | Graz | Austria | n/a |\n"
    )
    assert triples("a.md", text) == [
        ("Karo", "Founded", "1931"),
        ("Lyon", "Country", "France"),
        ("Lyon", "Staff", "40"),
        ("Graz", "Country", "Austria"),
    ]
    assert [each.position["line"] for each in parse("a.md", text).findings] == [5, 10, 10, 11]


def test_a_definition_list_is_a_glossary_or_a_list_of_values() -> None:
    assert triples("a.md", "# Karo\n\nSeal\n: A rubber ring that keeps the water out\n") == [
        ("Seal", "definition", "A rubber ring that keeps the water out")
    ]
    assert triples("a.md", "# Karo\n\nOwner\n: the crown\n") == [("Karo", "Owner", "the crown")]


def test_a_table_without_a_header_is_understood_only_if_it_has_two_columns() -> None:
    assert len(table_findings(None, [(["Depth", "40 m"], [{}, {}]), (["Area:", "3 km²"], [{}, {}])], "Lake")) == 2
    assert table_findings(None, [(["a", "b", "c"], [{}] * 3)], "Lake") == []


def test_html() -> None:
    page = """<html><head><title>Mira Lake</title><style>a: b</style></head><body><nav>Home: here</nav>
<h1>Mira <b>Lake</b></h1><script>x: 1</script>
<table><tr><th>Depth</th><td>40 m</td></tr><tr><th>Area</th><td>3 km²</td></tr></table>
<h2>Overview</h2><p>Country: Norway<br>Region: Oppland</p><pre>code: 1</pre>
<table><thead><tr><th>Fish</th><th>Share</th></tr></thead><tbody><tr><td>Trout</td><td>30 %</td></tr></tbody></table>
<dl><dt>Owner</dt><dd>the crown</dd></dl><ul><li><b>Access:</b> by boat</li></ul>
<div>Guide: Ada<div>Boat: Tern</div></div></body></html>"""
    found = triples("lake.html", page)
    assert found == [
        ("Mira Lake", "Depth", "40 m"),
        ("Mira Lake", "Area", "3 km²"),
        ("Mira Lake", "Country", "Norway"),
        ("Mira Lake", "Region", "Oppland"),
        ("Trout", "Share", "30 %"),
        ("Mira Lake", "Owner", "the crown"),
        ("Mira Lake", "Access", "by boat"),
        ("Mira Lake", "Guide", "Ada"),
        ("Mira Lake", "Boat", "Tern"),
    ]
    assert parse("lake.html", page).findings[0].position == {"line": 3}
    assert "x: 1" not in parse("lake.html", page).text


def test_html_places_a_fact_on_the_line_of_its_value() -> None:
    page = (
        "<script>\n1\n</script><p>Weight: 3 kg<br>\nColour:\n red</p>\n<table>\n<tr>\n<th>Seat</th>\n"
        "<td>Graz</td>\n</tr>\n</table><dl>\n<dt>Owner</dt>\n<dd>\nKaro</dd></dl>"
    )
    found = parse("a.html", page).findings
    assert [(each.value, each.position["line"]) for each in found] == [
        ("3 kg", 3),
        ("red", 4),
        ("Graz", 9),
        ("Karo", 14),
    ]


def test_html_tables_and_lists_that_lay_out_the_page_are_read_from_the_inside() -> None:
    page = (
        "<h1>Karo</h1><table><tr><td><table><tr><th>Seat</th><td>Graz</td></tr></table></td>"
        "<td><dl><dt>Owner</dt><dd>Ada</dd></dl></td></tr><tr><td>Staff</td><td>40</td></tr></table>"
        "<dl><dt>Press</dt><dd>Phone: 1<dl><dt>Fax</dt><dd>2</dd></dl></dd></dl>"
        "<table><tr><td>Rating: A</td></tr></table><ul><li>Bank: Nord<ul><li>Branch: West</li></ul></li></ul>Loose: end"
    )
    assert sorted(triples("a.html", page)) == [
        ("Karo", "Bank", "Nord"),
        ("Karo", "Branch", "West"),
        ("Karo", "Fax", "2"),
        ("Karo", "Loose", "end"),
        ("Karo", "Owner", "Ada"),
        ("Karo", "Phone", "1"),
        ("Karo", "Rating", "A"),
        ("Karo", "Seat", "Graz"),
        ("Karo", "Staff", "40"),
    ]


def test_html_cells_that_span_rows_and_columns() -> None:
    page = (
        "<table><tr><th rowspan=2>Region</th><th rowspan=2>City</th><th colspan=2>Staff</th></tr>"
        "<tr><th>2020</th><th>2021</th></tr>"
        "<tr><td rowspan=2>North</td><td>Oslo</td><td>1</td><td>2</td></tr><tr><td>Bergen</td><td>3</td><td>4</td></tr>"
        "<tr><td colspan=2>Total</td><td>4</td><td>6</td></tr></table>"
        "<table><thead><tr><td>Fish</td><td>Share</td></tr></thead><tr><td>Trout</td><td>30 %</td></tr></table>"
    )
    assert triples("a.html", page) == [
        ("North", "City", "Oslo"),
        ("North", "Staff 2020", "1"),
        ("North", "Staff 2021", "2"),
        ("North", "City", "Bergen"),
        ("North", "Staff 2020", "3"),
        ("North", "Staff 2021", "4"),
        ("Total", "Staff 2020", "4"),
        ("Total", "Staff 2021", "6"),
        ("Trout", "Share", "30 %"),
    ]


def test_html_comments_are_no_text_and_inline_tags_no_blanks() -> None:
    page = (
        "<p>Weight: 3 kg<!-- was: 5 --></p><div><p>one</p>two</div>"
        "<details><summary>three</summary>four<hr>five</details><button>Save: now</button>"
        "<table><tr><td>Gas</td><td>H<sub>2</sub>O</td></tr></table>"
    )
    assert triples("a.html", page) == [("a", "Weight", "3 kg"), ("a", "Gas", "H2O")]
    assert parse("a.html", page).text.split("\n") == [
        "a",
        "",
        "Weight: 3 kg",
        "one",
        "two",
        "three",
        "four",
        "five",
        "Gas",
        "H2O",
    ]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.html"])
def test_names_in_a_list_begin_what_follows_them(name: str) -> None:
    lines = ["Name: Ada", "Role: guide", "Name: Tim", "Role: cook"]
    text = "".join(f"- {line}\n" for line in lines) + "\nName: Mira\n"
    if name == "a.html":
        text = "<ul>" + "".join(f"<li>{line}</li>\n" for line in lines) + "</ul><p>Name: Mira</p>"
    assert triples(name, text) == [("Ada", "Role", "guide"), ("Tim", "Role", "cook"), ("a", "Name", "Mira")]


def test_positions_in_front_matter_and_beside_line_breaks() -> None:
    text = "---\ntitle: Pump\nvendor:\n  name: Karo\ntags:\n  - a\n---\nWeight: 1<br>Size: 2\nPower: 3\n"
    assert [(each.value, each.position) for each in parse("a.md", text).findings] == [
        ("Karo", {"line": 4}),
        ("a", {"line": 6}),
        ("1", {"line": 8}),
        ("2", {"line": 8}),
        ("3", {"line": 9}),
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.md", "---\nday: 2024-02-30\n---\n"),
        ("a.md", "---\na: &a [*a]\n---\n"),
        ("a.md", "---\na: " + "[" * 3_000 + "\n---\n"),
        ("a.md", "---\na: " + "1" * 5_000 + "\n---\n"),
        ("a.html", "<![foo <p>Weight: 3</p>"),
        ("a.html", '<meta charset="undefined"><p>Weight: 3</p>'),
    ],
)
def test_what_parsers_choke_on_is_a_bad_document(name: str, text: str) -> None:
    with pytest.raises(DocumentError, match=rf"\({name}\)"):
        parse(name, text)


def test_an_intranet_page_that_is_all_one_form() -> None:
    page = "<form id=aspnetForm><label>Search: </label><input value=x><select><option>All: x</select><p>Seat: Graz</p>"
    assert triples("a.html", page) == [("a", "Seat", "Graz")]


def test_html_nested_deeper_than_python() -> None:
    assert triples("a.html", "<div>" * 3_000 + "Weight: 3") == [("a", "Weight", "3")]


def test_html_in_the_encoding_it_declares() -> None:
    assert triples("a.html", '<meta charset="utf-16"><p>Weight: 3</p>') == [("a", "Weight", "3")]
    page = '<meta charset="iso-8859-1"><p>Straße: Müllerstraße</p>'.encode("latin-1")
    assert triples("a.html", page) == [("a", "Straße", "Müllerstraße")]
    with pytest.raises(DocumentError, match="a page without text"):
        parse("a.html", "<html><script>1</script></html>")


def pdf(pages: list[list[str]], title: str | None = None, password: str | None = None) -> bytes:
    """A PDF of lines of text, made by hand: pypdf writes no text itself."""
    from pypdf import PdfWriter
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    writer = PdfWriter()
    font = writer._add_object(
        DictionaryObject(
            {
                NameObject("/Type"): NameObject("/Font"),
                NameObject("/Subtype"): NameObject("/Type1"),
                NameObject("/BaseFont"): NameObject("/Helvetica"),
            }
        )
    )
    for lines in pages:
        page = writer.add_blank_page(400, 400)
        stream = DecodedStreamObject()
        shown = " ".join(f"({line}) Tj 0 -20 Td" for line in lines)
        stream.set_data(f"BT /F1 12 Tf 20 380 Td {shown} ET".encode())
        page[NameObject("/Contents")] = writer._add_object(stream)
        fonts = DictionaryObject({NameObject("/F1"): font})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
    if title:
        writer.add_metadata({"/Title": title})
    if password is not None:
        writer.encrypt(user_password=password, owner_password="owner", algorithm="RC4-128")
    buffer = io.BytesIO()
    writer.write(buffer)
    return buffer.getvalue()


def test_pdf_pages_and_lines() -> None:
    data = pdf([["Data sheet", "Weight: 30 kg"], ["Colour: red"]], title="Atlas Pump")
    parsed = parse("x/pump.pdf", data)
    assert [(each.entity, each.property, each.value) for each in parsed.findings] == [
        ("Atlas Pump", "Weight", "30 kg"),
        ("Atlas Pump", "Colour", "red"),
    ]
    assert [each.position for each in parsed.findings] == [{"page": 1, "line": 2}, {"page": 2, "line": 1}]
    assert parsed.text[parsed.page_starts[1] :].startswith("Colour")
    assert triples("x/pump_2.pdf", pdf([["Colour: red"]])) == [("pump 2", "Colour", "red")]
    assert triples("a.pdf", pdf([["Colour: red"]], password="")) == [("a", "Colour", "red")]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (pdf([["Colour: red"]])[:300], "a damaged PDF"),
        (b"%PDF-1.4 and nothing else", "a damaged PDF"),
        (b"not a PDF at all", "a damaged PDF"),
        (pdf([["Colour: red"]], password="secret"), "an encrypted PDF"),
        (pdf([[]]), "without text, perhaps a scan"),
    ],
)
def test_a_pdf_that_cannot_be_read_is_named(data: bytes, reason: str) -> None:
    with pytest.raises(DocumentError, match=rf"{reason}.*\(x/bad\.pdf\).*Help:"):
        parse("x/bad.pdf", data)


def test_text_that_is_not_utf8_is_named_with_its_line() -> None:
    with pytest.raises(DocumentError, match=r"not UTF-8 text.*at byte 8 \(a\.txt: line 2\)"):
        parse_text(b"a: b\nc: \xff\n", "a.txt")
    assert triples("a.txt", "Straße: lang\r\n".encode("utf-16")) == [("a", "Straße", "lang")]
    assert triples("a.txt", b"\xef\xbb\xbfWeight: 3\r\nSize: 4\r\n") == [("a", "Weight", "3"), ("a", "Size", "4")]


def test_finding_documents(tmp_path: Path) -> None:
    for name in ("b.md", "a.txt", "sub/c.HTML", "d.docx", ".hidden.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    found, passed_over = find_documents([str(tmp_path), str(tmp_path / "a.txt")])
    assert [Path(uri).relative_to(tmp_path).as_posix() for uri in found] == ["a.txt", "b.md", "sub/c.HTML"]
    assert passed_over == 1
    with pytest.raises(InputError, match="unsupported kind of document"):
        find_documents([str(tmp_path / "d.docx")])
    with pytest.raises(InputError, match="no such file"):
        find_documents([str(tmp_path / "absent.md")])
    (tmp_path / "blank.md").write_text(" \n")
    with pytest.raises(DocumentError, match=r"an empty document \(.*blank\.md\)"):
        read_bytes(str(tmp_path / "blank.md"))
