"""experiments/text.py: what becomes text, what is left out, and that it is the same again."""
import gzip
import hashlib
import json
import shutil
import subprocess
from types import SimpleNamespace

import pytest

from experiments import text

PROSE = ("The memory of a key is an average of all that came before it, and it is read by the "
         "query that comes after. If the gate of a channel is near one, then it forgets slowly.")
PARAGRAPHS = [f"{PROSE} In the {name} of the book this is said in other words." for name in
              ("first chapter", "second part", "last appendix", "preface", "margin", "index")]


def html(*paragraphs):
    body = "".join(f"<p>{paragraph}</p>" for paragraph in paragraphs)
    return f"<html><body>{body}</body></html>".encode()


def one(path, data):
    """The only text of one file."""
    texts, counts = text.documents([(path, data)])
    assert counts == {"read": 1, "broken": 0, "not English": 0} and len(texts) == 1
    return texts[0]


# ---------------------------------------------------------------- formats

def test_html_keeps_text_and_lines_and_nothing_of_the_page_around():
    """A script, a menu or an entity as text; words of two cells as one; lines of code run on."""
    page = f"""<html><head><title>unseen</title><style>p {{ unseen }}</style></head><body>
        <div class="sphinxsidebar unseen"><div>unseen</div><p>unseen</p></div>
        <nav>unseen <ul><li>unseen</ul></nav> <!-- unseen <p> -->
        <script>if (a < b) unseen();</script>
        <h1>Title<a class="headerlink" href="#">unseen</a></h1>
        <p>{PARAGRAPHS[0]}
           <b>x</b> &lt; y&nbsp;&amp; z</p><br/>
        <ul><li><p>one</p></li><li>two</li></ul>
        <pre>def f(x):\n    return <i>x</i></pre>
        <table><tr><td>left</td><td>right</td></tr></table></body></html>"""
    assert one("usr/share/doc/a.html", page.encode()) == (
        f"Title\n\n{PARAGRAPHS[0]} x < y & z\n\n- one\n\n- two\n\ndef f(x):\n    return x\n\n"
        "left right")


def test_manual_pages_lose_their_macros():
    """Fonts, escapes, definitions or tables in the text; BR's words apart; examples run on; a
    line lost for its dot; a width of IP's as text."""
    man = rf""".\" a comment
.de unseen
..
.TH LS 1 "unseen"
.SH NAME
ls \- list \fIfiles\fP
.PP
{PARAGRAPHS[0]}
.TS
unseen
.TE
.BR open (2)
and
.B \-\-all
.nf
one   \(lqtwo\(rq
three\&
.fi
.TP
.B \-a
all \*(lqof\*(rq them
.br
\&.profile
.IP "a name" 4
is kept
"""
    assert one("usr/share/man/man1/ls.1.gz", gzip.compress(man.encode())) == (
        f"NAME\n\nls - list files\n\n{PARAGRAPHS[0]} open(2) and --all\n\none   \"two\"\nthree\n\n"
        "-a all \"of\" them\n.profile\n\na name is kept")


def test_plain_text_is_opened_and_kept_as_it_is():
    """A packed file taken for broken; lines joined; a mark of fortunes or an overstrike as text."""
    body = f"{PARAGRAPHS[0]}\n\n  * one\n  * two"
    marked = body.replace("\n\n", "\n\n%\n").replace("one", "o\bon\bne\be")
    for path, data in [("a.rst.gz", gzip.compress(body.encode())), ("a.txt", body.encode()),
                       ("a.dict.dz", gzip.compress(body.encode())), ("a.md", marked.encode())]:
        assert one(f"usr/share/doc/{path}", data) == body


def test_files_of_no_use_are_not_read():
    """Changelogs, licences, sources of pages, pages of other languages, pictures as documents."""
    for path in ("doc/a/changelog.Debian.gz", "doc/a/copyright", "html/_sources/a.rst.txt",
                 "share/man/de/man1/ls.1.gz", "html/genindex.html", "a.png", "a.py", "a.info.gz"):
        assert text.reader(f"usr/share/{path}") is None, path


def test_what_is_no_english_prose_is_left_out():
    """Tables of numbers, code, another language, or stubs of a line in the corpus."""
    bad = {"numbers.txt": "0.25 1.50 3.75 the of and\n" * 50,
           "code.txt": "for (i = n; i < m; i++) { call(i, &buffer[i]); }\n" * 50,
           "german.txt": "Der Schlüssel einer Erinnerung vergisst alles, was vorher kam. " * 20,
           "stub.txt": "This is the end of it."}
    texts, counts = text.documents((path, body.encode()) for path, body in bad.items())
    assert texts == [] and counts == {"read": 0, "broken": 0, "not English": 4}


def test_a_broken_file_is_counted_and_the_others_are_read():
    """A crash at a cut or changed archive, or its bytes as text."""
    packed = gzip.compress(PARAGRAPHS[0].encode() * 9)
    found = [("a.txt.gz", packed[:60]), ("b.txt.gz", b"no gzip"), ("c.dict.dz", b"\x1f\x8b"),
             ("d.txt.gz", packed[:20] + bytes(20) + packed[40:]), ("e.txt", b"\0\1\2" * 99),
             ("g.txt", PARAGRAPHS[0].encode()),
             ("h.txt", PARAGRAPHS[1].encode() + b" caf\xe9")]
    texts, counts = text.documents(reversed(found))  # an archive has them in any order
    assert texts == [PARAGRAPHS[0], PARAGRAPHS[1] + " caf\xe9"]
    assert counts == {"read": 2, "broken": 4, "not English": 1}


def test_long_documents_are_cut_between_paragraphs():
    """A dictionary of 40 MB as one document; a piece that ends within a word, or a lost one."""
    paragraphs = [f"{PROSE} {n}" for n in range(1500)]
    cut = list(text.pieces("\n\n".join(paragraphs)))
    assert len(cut) == 3 and max(map(len, cut)) <= text.LONGEST
    assert [paragraph for piece in cut for paragraph in piece.split("\n\n")] == paragraphs
    assert sum(map(len, text.pieces("x" * 250_000))) == 250_000


# ---------------------------------------------------------------- the corpus

def test_no_paragraph_comes_twice():
    """A licence in every document; two versions of a manual; a heading lost as a repetition, or a
    page of headings kept for one line."""
    seen = set()
    assert text.fresh("\n\n".join(["Title", *PARAGRAPHS[:3]]), seen).count("\n\n") == 3
    assert text.fresh("\n\n".join(["Title", *PARAGRAPHS[2:5]]), seen) == "\n\n".join(
        ["Title", *PARAGRAPHS[3:5]])
    assert text.fresh("\n\n".join(PARAGRAPHS[1:]), seen) == ""  # one of five is new
    assert text.fresh("A page of headings\n\n" * 20 + f"{PROSE[:90]} and one line.", seen) == ""
    assert text.fresh(PARAGRAPHS[0].replace(" ", "\n").upper() + " 7", seen) == ""


def corpus(folder, texts):
    folder.mkdir(exist_ok=True)
    manifest = text.write(texts, {name: {} for name in texts}, folder)
    return manifest, {file.name: file.read_bytes() for file in folder.iterdir()}


def test_order_and_hash_depend_on_the_content_alone(tmp_path, monkeypatch):
    """Packages one after the other, so that one is all the validation; a file of an earlier run
    left among the new ones; a hash that does not see the text."""
    monkeypatch.setattr(text, "SHARD", 500)
    bodies = [f"{PROSE} {chr(97 + n) * 9} {PROSE}".replace("key", chr(97 + n) * 5)
              for n in range(20)]
    texts = {"one": bodies[:10], "two": bodies[10:]}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "text-99.jsonl").write_text("old")
    manifest, made = corpus(tmp_path / "a", texts)
    assert corpus(tmp_path / "b", texts) == (manifest, made) and "text-99.jsonl" not in made
    rows = [json.loads(line) for name in sorted(made) if name.endswith(".jsonl")
            for line in made[name].splitlines()]
    assert sorted(row["text"] for row in rows) == sorted(bodies) and len(made) > 3
    keys = [hashlib.sha256(row["text"].encode()).digest() for row in rows]
    assert keys == sorted(keys)
    assert all(row["text"] in texts[row["from"]] for row in rows)
    assert manifest["characters"] == sum(map(len, bodies)) and manifest["documents"] == 20
    assert manifest["packages"]["one"] == {"documents": 10,
                                           "characters": sum(map(len, bodies[:10]))}
    texts["two"][3] += "."
    assert corpus(tmp_path / "b", texts)[0]["sha256"] != manifest["sha256"]


# ---------------------------------------------------------------- packages

def package(folder, name, version, files):
    """A .deb of these files, as apt-get download names it."""
    tree = folder / f"{name}.tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: a <a@b.c>\n"
        "Description: a package\n")
    for path, data in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(data)
    deb = folder / f"{name}_{version.replace(':', '%3a')}_all.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", tree, deb], check=True,
                   capture_output=True)
    shutil.rmtree(tree)


def listing(monkeypatch, tmp_path, *lines):
    """These are the packages of text.txt."""
    (tmp_path / "list.txt").write_text("\n".join(lines))
    monkeypatch.setattr(text, "LIST", tmp_path / "list.txt")


@pytest.fixture
def have(monkeypatch, tmp_path):
    """have(*programs): only these are on the machine, and two packages are wanted."""
    def only(*programs):
        real = shutil.which
        monkeypatch.setattr(shutil, "which", lambda name: name in programs and (real(name) or name))
    listing(monkeypatch, tmp_path, "a-doc=1:1.0-1", "b-doc=2.0-1  /en/")
    return only


def test_the_list_is_read_and_a_line_that_is_none_is_named(tmp_path, monkeypatch):
    """A regex that is dropped, so that all languages are read; a traceback of re's or of zip's."""
    assert text.listed()["sagemath-doc"][1].pattern == "/en/" and len(text.listed()) > 150
    for bad in "a-doc", "a-doc=1 /en/ /de/", "a-doc=1 (", "", "=1", "a-doc = 1":
        listing(monkeypatch, tmp_path, "b-doc=2.0-1", bad, "c-doc=1")
        with pytest.raises(ValueError, match="list.txt, line 2: .* is not name=version"):
            text.listed()


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="dpkg-deb makes the packages")
def test_packages_become_text_and_other_versions_are_noted(tmp_path, monkeypatch, have, capsys):
    """A version that moved on passes in silence, or ends the run; a cache is fetched anew."""
    have("apt-get", "dpkg-deb")
    package(tmp_path, "a-doc", "1:1.0-1", {"usr/share/doc/a/a.html": html(*PARAGRAPHS[:2])})
    package(tmp_path, "b-doc", "2.1-1", {"usr/share/doc/en/b.html": html(PARAGRAPHS[2]),
                                         "usr/share/doc/fr/b.html": html(PARAGRAPHS[3])})
    monkeypatch.setattr(subprocess, "run", None)  # all is in the cache, and nothing is fetched
    made = []
    for workers in "1", "2":
        output = tmp_path / workers
        text.main(["--output", str(output), "--cache", str(tmp_path), "--workers", workers])
        made.append({file.name: file.read_bytes() for file in output.iterdir()})
    assert made[0] == made[1]
    rows = [json.loads(line) for line in made[0]["text-00.jsonl"].splitlines()]
    assert sorted((row["from"], row["text"]) for row in rows) == [
        ("a-doc", "\n\n".join(PARAGRAPHS[:2])), ("b-doc", PARAGRAPHS[2])]
    packages = json.loads(made[0]["manifest.json"])["packages"]
    assert packages["a-doc"]["version"] == packages["a-doc"]["expected"] == "1:1.0-1"
    assert (packages["b-doc"]["version"], packages["b-doc"]["expected"]) == ("2.1-1", "2.0-1")
    deb = tmp_path / "b-doc_2.1-1_all.deb"
    assert packages["b-doc"]["sha256"] == hashlib.sha256(deb.read_bytes()).hexdigest()
    told = capsys.readouterr()
    one, two = told.err[:len(told.err) // 2], told.err[len(told.err) // 2:]
    assert one == two and one.startswith("note: b-doc 2.0-1 is expected, 2.1-1 was found\nnote: ")
    assert one.count("\n") == 2 and f"apt-get update, delete these packages from {tmp_path}" in one
    assert "python data.py --input" in told.out and "tokens of SmolLM2" in told.out


def test_fetching_asks_for_the_version_then_for_an_older_then_for_any(tmp_path, monkeypatch):
    """The newest version taken though ours is there, or beside it; half a file in the cache."""
    asked, pool = [], {}

    def run(command, cwd=None, capture_output=True):
        if "--print-uris" in command:
            url = f"'http://a.org/pool/b/{command[-1]}_2.1-1%2bdeb_all.deb' b.deb 9 SHA256:0"
            return SimpleNamespace(returncode=0, stdout=url.encode())
        asked.append(command[-1])
        if command[1] == "download-file" and command[2] in pool:
            (tmp_path / cwd / command[3]).write_text(pool[command[2]])
        elif command[-1] == "b-doc":
            (tmp_path / cwd / "b-doc_2.1-1_all.deb").write_text("whole")
        else:
            (tmp_path / cwd / "b-doc_2.0-1_all.deb").write_text("half")
            return SimpleNamespace(returncode=100)
        return SimpleNamespace(returncode=0)
    monkeypatch.setattr(subprocess, "run", run)
    deb = text.fetch("b-doc", "2.0-1", tmp_path)
    assert asked == ["b-doc=2.0-1", "b-doc_2.0-1_all.deb", "b-doc"] and deb.read_text() == "whole"
    assert deb.name == "b-doc_2.1-1_all.deb" and list(tmp_path.iterdir()) == [deb]
    assert text.fetch("b-doc", "2.0-1", tmp_path) == deb and len(asked) == 3
    assert text.fetch("a-doc", "1:1.0-1", tmp_path) is None
    pool["http://a.org/pool/b/a-doc_1.0-1_all.deb"] = "older"
    old = text.fetch("a-doc", "1:1.0-1", tmp_path)
    assert old.name == "a-doc_1%3a1.0-1_all.deb" and old.read_text() == "older"
    (tmp_path / "a-doc_1%3a1.1-1_all.deb").touch()
    assert text.fetch("a-doc", "1:1.0-1", tmp_path) == old


@pytest.mark.parametrize("programs, remedy", [
    (("apt-get",), "python data.py --input"), (("dpkg-deb",), "python data.py --input"),
    (("dpkg-deb", "apt-get"), "--go_on")])
def test_what_cannot_be_had_is_one_line(tmp_path, monkeypatch, capsys, have, programs, remedy):
    """A traceback on a machine without Debian's tools, or a corpus that lacks a package unsaid."""
    have(*programs)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(
        stdout=b"", returncode=100))
    with pytest.raises(SystemExit) as end:
        text.main(["--output", str(tmp_path)])
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.count("\n") == 1 and remedy in told


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="dpkg-deb makes the packages")
@pytest.mark.parametrize("kept", [0, 100, -300])
def test_a_damaged_package_is_one_line(tmp_path, monkeypatch, have, capfd, kept):
    """A traceback of tarfile's, out of a worker; or the text of the half that is there."""
    listing(monkeypatch, tmp_path, "a-doc=1")
    package(tmp_path, "a-doc", "1", {f"usr/share/{n}.html": html(*PARAGRAPHS) for n in range(999)})
    deb = tmp_path / "a-doc_1_all.deb"
    deb.write_bytes(deb.read_bytes()[:kept])
    with pytest.raises(SystemExit) as end:
        text.main(["--output", str(tmp_path), "--cache", str(tmp_path), "--workers=1"])
    told = capfd.readouterr().err
    assert end.value.code == 2 and told.count("\n") == 1 and f"{deb} is damaged" in told


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="dpkg-deb makes the packages")
def test_a_run_goes_on_without_a_package_if_told_to(tmp_path, monkeypatch, have, capsys):
    """--go_on that ends all the same, or says nothing of what is missing."""
    have("dpkg-deb", "apt-get")
    package(tmp_path, "a-doc", "1:1.0-1", {"usr/share/doc/a/a.html": html(*PARAGRAPHS)})
    monkeypatch.setattr(text, "fetch", lambda name, version, cache: next(
        cache.glob(f"{name}_*.deb"), None))
    text.main(["--output", str(tmp_path), "--cache", str(tmp_path), "--go_on", "--workers=1"])
    assert "note: b-doc 2.0-1 is expected, nothing was found" in capsys.readouterr().err
    manifest = json.loads((tmp_path / "manifest.json").read_bytes())
    assert manifest["packages"]["b-doc"] == {"expected": "2.0-1", "version": None}
    assert manifest["documents"] == 1
