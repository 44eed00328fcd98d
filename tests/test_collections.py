"""Sources of passages: what each format yields, and what bad input is told."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path

import pytest

from shoulders.errors import DataError
from shoulders.reader.collections import documents, html
from shoulders.reader.collections.documents import SUFFIXES
from shoulders.reader.collections.source import Sourced, open_source
from shoulders.reader.passage import Passage

HEADER = "id\ttext\ttitle\n"


def read(path: Path, notes: list[str] | None = None, words: int | None = None) -> list[Sourced]:
    kept: list[str] = [] if notes is None else notes
    return list(open_source(path, words=words).read(kept.append))


def passages(path: Path, notes: list[str] | None = None) -> list[Passage]:
    return [sourced.passage for sourced in read(path, notes)]


def refused(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read(path)
    return str(caught.value)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def pdf(pages: list[str], title: str = "") -> bytes:
    """Return a PDF with a line of text for each page; an empty one has no text at all."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", ""]
    kids = []
    for text in pages:
        drawn = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET" if text else "0 0 m 9 9 l S"
        objects.append(f"<< /Length {len(drawn)} >>\nstream\n{drawn}\nendstream")
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents {len(objects)} 0 R "
            "/Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> "
            ">> >> >>"
        )
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>"
    objects.append(f"<< /Title ({title}) >>")
    out, places = "%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        places.append(len(out))
        out += f"{number} 0 obj\n{content}\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    trailer = f"<< /Size {len(objects) + 1} /Root 1 0 R /Info {len(objects)} 0 R >>"
    start = f"startxref\n{len(out)}\n%%EOF\n"
    return (
        out + f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer\n{trailer}\n{start}"
    ).encode()


def test_dpr_tables_quoted_and_not(tmp_path: Path) -> None:
    table = write(
        tmp_path / "psgs.tsv",
        HEADER
        + '1\t"Aaron ( or ; ""Ahärôn"") is, he said, ""here"""\tAaron\n'
        + '2\t"Rip It Up" was a single, "the" one\t"Rip"\r\n'
        + '3\t"only the beginning\tT\n'
        + '4\t"Both" and "ends"\tT\n',
    )
    assert passages(table) == [
        Passage("1", "Aaron", 'Aaron ( or ; "Ahärôn") is, he said, "here"'),
        Passage("2", "Rip", '"Rip It Up" was a single, "the" one'),
        Passage("3", "T", '"only the beginning'),
        Passage("4", "T", '"Both" and "ends"'),
    ]
    assert read(table)[1].place == f"{table}:3"


def test_columns_in_any_order_bom_gzip(tmp_path: Path) -> None:
    content = "\ufefftitle\tid\ttext\nT\t7\twords\n"
    plain = write(tmp_path / "a.tsv", content)
    packed = write(tmp_path / "b.tsv.gz", gzip.compress(content.encode()))
    assert passages(plain) == passages(packed) == [Passage("7", "T", "words")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("1\ttext\ttitle\n", ":1: the first line must name the columns id, text, title"),
        (HEADER + "1\ta\tb\n2\tno title\n", ":3: 2 columns, expected 3"),
        (HEADER + "1\ta\tb\tc\n", ":2: 4 columns, expected 3"),
        (HEADER + "\ttext\ttitle\n", ":2: an empty id"),
        ((HEADER + "1\tabc\n").encode()[:-1] + b"\xff\tt\n", ":2: not valid UTF-8 at byte 6"),
        (HEADER + "1\t" + "x" * 16_000_001 + "\tt\n", ":2: a line of over 16,000,000 bytes"),
    ],
)
def test_bad_tables_are_named_by_line(tmp_path: Path, content: str | bytes, said: str) -> None:
    assert refused(write(tmp_path / "t.tsv", content)).startswith(f"{tmp_path / 't.tsv'}{said}")


def test_a_damaged_gzip_file(tmp_path: Path) -> None:
    packed = gzip.compress((HEADER + "1\ta\tb\n" * 5000).encode())
    assert "damaged gzip file" in refused(write(tmp_path / "t.tsv.gz", packed[: len(packed) // 2]))
    assert "damaged gzip file" in refused(write(tmp_path / "u.tsv.gz", b"no gzip at all"))


def test_jsonl_of_beir_and_our_own(tmp_path: Path) -> None:
    rows = [
        {"_id": "d1", "title": "T", "text": "line\u2028separator", "metadata": {"url": "u"}},
        {"id": 2, "text": "own", "source": "a/b.txt"},
    ]
    content = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    path = write(tmp_path / "beir" / "corpus.jsonl", content)
    expected = [Passage("d1", "T", "line\u2028separator"), Passage("2", "", "own", "a/b.txt")]
    assert passages(path) == expected
    write(tmp_path / "beir" / "queries.jsonl", "not a corpus")
    assert passages(tmp_path / "beir") == expected, "a folder in BEIR's layout"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not valid JSON"),
        ("[1]", "a passage must be a JSON object"),
        ('{"text": "a"}', "no text in field 'id' or '_id'"),
        ('{"id": "1", "txt": "a"}', "unknown field 'txt' (did you mean 'text'?)"),
        ('{"id": "1", "text": 3}', "field 'text' must be a text, not a number"),
        ('{"id": true, "text": "a"}', "no text in field 'id'"),
        ('{"id": "1", "text": "a", "titel": "b"}', "unknown field 'titel' (did you mean 'title'?)"),
        ('{"id": "1", "id": "2", "text": "a"}', "not valid JSON: 'id' stands there twice"),
        (r'{"id": "1", "text": "\ud800"}', "field 'text' holds half a surrogate pair"),
        (r'{"id": "\ud800", "text": "a"}', "field 'id' holds half a surrogate pair"),
    ],
)
def test_bad_jsonl_is_named_by_line(tmp_path: Path, line: str, said: str) -> None:
    path = write(tmp_path / "p.jsonl", '{"id": "0", "text": "fine"}\n' + line + "\n")
    assert refused(path).startswith(f"{path}:2: {said}")


def test_passages_that_say_nothing_are_left_out_and_counted(tmp_path: Path) -> None:
    """Published collections have some, FiQA's five."""
    table = write(tmp_path / "t.tsv", HEADER + "1\t \t\n2\twords\t\n3\t\t\n")
    notes: list[str] = []
    assert [p.id for p in passages(table, notes)] == ["2"]
    assert notes == [
        f"t.tsv: 2 passages have neither text nor title: left out ({table}:2, '1' first)"
    ]
    rows = ['{"_id": "a", "title": "", "text": "", "metadata": {}}', '{"_id": "b", "text": "c"}']
    corpus = write(tmp_path / "corpus.jsonl", "\n".join(rows))
    assert [p.id for p in passages(corpus, notes)] == ["b"]
    assert len(notes) == 2


def test_fields_of_peoples_own_are_left_alone(tmp_path: Path) -> None:
    row = {"id": "1", "text": "a", "course": "CS101", "test": "b", "mask": 1, "URL": "u"}
    assert passages(write(tmp_path / "p.jsonl", json.dumps(row))) == [Passage("1", "", "a")]


def test_comments_and_line_breaks_end_no_paragraph(tmp_path: Path) -> None:
    """React's pages have a comment between any two texts."""
    page = (
        "<h2><!-- -->Opening <!-- -->hours</h2><p>opened in <!-- -->1892<!-- --> on the "
        "4<!-- -->th</p><p>a<br>b</p>"
    )
    _, blocks = html.parse(page.encode(), print, "page")
    assert [(" ".join(b.text.split()), b.heading) for b in blocks] == [
        ("Opening hours", True),
        ("opened in 1892 on the 4th", False),
        ("a b", False),
    ]


def test_documents_of_every_kind(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "Plain words.\n\nSecond paragraph.")
    write(tmp_path / "a.md", "intro\n\n# The **title** #\n\nSee [the docs](http://x.y) now.")
    write(
        tmp_path / "sub" / "page.html",
        "<html><head><title> A\n page </title><style>p{}</style></head><body><nav>menu</nav>"
        "<h1>Head</h1><p>One <b>bo</b>ld<br>word.<table><tr><td>x<td>y</table>"
        "<script>var no;</script><p>&Uuml;ber &amp; out</body></html>",
    )
    write(tmp_path / "sub" / "doc.pdf", pdf(["First page.", "Second page."], "A paper"))
    write(tmp_path / ".hidden.txt", "hidden")
    write(tmp_path / ".git" / "x.txt", "hidden")
    write(tmp_path / "image.png", b"\x89PNG")
    notes: list[str] = []
    assert passages(tmp_path, notes) == [
        Passage("a.md#1", "The **title**", "intro The **title** See the docs now.", "a.md"),
        Passage("b.txt#1", "b", "Plain words. Second paragraph.", "b.txt"),
        Passage("sub/doc.pdf#1", "A paper", "First page. Second page.", "sub/doc.pdf"),
        Passage("sub/page.html#1", "A page", "Head One bold word. x y Über & out", "sub/page.html"),
    ]
    assert notes == ["left out, files of other kinds: 1 .png"]
    assert [p.id for p in passages(tmp_path / "b.txt")] == ["b.txt#1"], "a single document"


def test_ids_do_not_depend_on_other_documents(tmp_path: Path) -> None:
    write(tmp_path / "m.txt", "Some words. " * 200)
    before = passages(tmp_path)
    write(tmp_path / "a.txt", "Others first.")
    assert passages(tmp_path)[1:] == before
    assert [p.id for p in before] == [f"m.txt#{n + 1}" for n in range(len(before))]


def test_what_cannot_be_read_is_left_out_and_named(tmp_path: Path) -> None:
    write(tmp_path / "bad.txt", b"hello \xff world")
    write(tmp_path / "binary.txt", b"\x7fELF\0\0\0\0")
    write(tmp_path / "broken.pdf", b"%PDF-1.4\nnothing")
    write(tmp_path / "empty.txt", b"")
    write(tmp_path / "latin.html", "<meta charset=latin-1><p>caf\u00e9".encode("latin-1"))
    write(tmp_path / "partly.pdf", pdf(["Some text.", ""]))
    write(tmp_path / "scan.pdf", pdf(["", ""]))
    write(tmp_path / "wide.txt", "UTF-16 wörds".encode("utf-16"))
    notes: list[str] = []
    found = {p.source: p.text for p in passages(tmp_path, notes)}
    assert found == {
        "bad.txt": "hello \ufffd world",
        "latin.html": "café",
        "partly.pdf": "Some text.",
        "wide.txt": "UTF-16 wörds",
    }
    told = {note.split(":")[0]: note for note in notes}
    assert "not valid UTF-8 near byte 7" in told["bad.txt"]
    assert "not a text file" in told["binary.txt"]
    assert "not a readable PDF" in told["broken.pdf"]
    assert told["empty.txt"] == "empty.txt: left out: empty"
    assert "1 of 2 pages have no text" in told["partly.pdf"]
    assert "a PDF without text (scanned pages?)" in told["scan.pdf"]
    assert len(notes) == 6


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    assert refused(folder).startswith(f"{folder}: no documents in it (known: ")
    write(folder / "scan.pdf", pdf([""]))
    said = refused(folder)
    assert "no text in its 1 documents" in said
    assert "scan.pdf: left out: a PDF without text" in said


def test_a_locked_pdf(tmp_path: Path) -> None:
    import pypdf

    writer = pypdf.PdfWriter()
    writer.add_blank_page(100, 100)
    writer.encrypt("secret", algorithm="RC4-128")
    writer.write(tmp_path / "locked.pdf")
    assert "locked by a password" in refused(tmp_path / "locked.pdf")


def test_unknown_and_missing_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read '.docx' files; known are .tsv, .jsonl"):
        open_source(write(tmp_path / "a.docx", "x"))
    with pytest.raises(DataError, match="no such file or folder"):
        open_source(tmp_path / "none")
    assert {".txt", ".md", ".html", ".pdf"} <= SUFFIXES.keys()


def test_deeply_nested_html(tmp_path: Path) -> None:
    write(tmp_path / "deep.html", "<div>" * 3000 + "bottom" + "</div>" * 3000)
    assert passages(tmp_path)[0].text == "bottom"


def test_characters_across_the_borders_of_reads(tmp_path: Path) -> None:
    text = "ä" * 3 + " " + "wörd " * 300_000  # 1.8 MB: two-byte characters at every border
    write(tmp_path / "long.txt", text)
    notes: list[str] = []
    found = passages(tmp_path, notes)
    assert " ".join(p.text for p in found).split() == text.split()
    assert notes == []


def test_memory_does_not_grow_with_the_collection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = "word " * 60
    table = tmp_path / "big.tsv"
    with table.open("w") as file:
        file.write(HEADER)
        file.writelines(f"{n}\t{row}\ttitle\n" for n in range(2000))
    single = write(tmp_path / "single.txt", "A line of more words. " * 40_000)  # one line
    monkeypatch.setattr(documents, "_READ", 1 << 16)
    for path, limit in ((table, 300_000), (single, 1_000_000)):
        tracemalloc.start()
        count = sum(1 for _ in open_source(path).read(print))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count > 1900
        assert peak < limit, f"{path.name}: {peak:,} bytes"


def test_estimates_are_near(tmp_path: Path) -> None:
    table = write(tmp_path / "t.tsv", HEADER + "".join(f"{n}\ttext {n}\tt\n" for n in range(5000)))
    assert open_source(table).estimate().passages == pytest.approx(5000, rel=0.2)
    folder = tmp_path / "docs"
    write(folder / "a.txt", "Some words of a sentence, eight at once. " * 5000)
    counted = len(passages(folder))
    assert open_source(folder).estimate().passages == pytest.approx(counted, rel=0.4)


@pytest.mark.skipif(os.name == "nt", reason="file names there are always valid text")
def test_a_file_name_that_is_no_text(tmp_path: Path) -> None:
    write(tmp_path / "fine.txt", "fine")
    (tmp_path / os.fsdecode(b"bad\xff.txt")).write_text("words")
    notes: list[str] = []
    assert [p.source for p in passages(tmp_path, notes)] == ["fine.txt"]
    assert "its name is not valid UTF-8" in notes[0]


def test_shared_data_is_read_whole(shared_data: Path) -> None:
    found = passages(shared_data / "nq" / "passages.tsv")
    assert len(found) == 7197
    assert len({p.id for p in found}) == 7197
    assert found[46].text.startswith('"The Glory of Love" is a song')
