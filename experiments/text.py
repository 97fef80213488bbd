"""
English text to continue a language model on, where no hub of data sets is reached: the manuals that
Debian packages.

    packages  --fetch-->  .deb files  --documents-->  texts  --fresh-->  no paragraph comes twice
              --by hash of the content-->  text-00.jsonl, text-01.jsonl, ... and manifest.json

    python -m experiments.text --output=data/text
    python data.py --input data/text/*.jsonl --output data/text-smollm2 --tokenizer SmolLM2

The first needs apt-get and dpkg-deb, as Debian 12 has them, but not root. From the same packages it
makes the same bytes, whatever the number of workers. A package that has moved on is taken in the
version there is; stderr and the manifest say so. Sorting by hash mixes the packages, so that the
last 1 %, which train.py holds out, is a bit of all.

What counts as English prose is a share of its commonest words. By it tables, listings of code and
other languages leave, and most pages that only list an interface. Read data.py next. Checked in
tests/test_text.py.
"""
import bz2
import gzip
import hashlib
import html
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

from infra import files

# name=version, as Debian 12 had them
PACKAGES = """
abs-guide=10-4 ada-reference-manual-2020=1:2020.1commit85143dcb-4 allegro4-doc=2:4.4.3.1-3
anarchism=15.3-3 ant-doc=1.10.13-1 apache2-doc=2.4.71-1~deb12u1 autoconf-doc=2.71-3
bacula-doc=9.6.7-2 bash-doc=5.2.15-2 bind9-doc=1:9.18.49-1~deb12u3 brz-doc=3.3.2-3
buildbot-doc=3.7.0-2 c++-annotations-html=12.2.0-2 cinder-doc=2:21.3.1-1~deb12u1
clang-14-doc=1:14.0.6-12 cmake-doc=3.25.1-1 crawl-common=2:0.28.0-1.1 csound-doc=1:6.18.0+dfsg0-1
dar-docs=2.7.8-2 db5.3-doc=5.3.28+dfsg2-1 debian-handbook=11.20220922 debian-policy=4.6.2.0
debian-reference-en=2.100 developers-reference=12.18 dict-devil=1.0-13.1 dict-foldoc=20230119-1
dict-gcide=0.48.5+nmu2 dict-jargon=4.4.7-3.1 docker-doc=20.10.24+dfsg1-1+deb12u1
docutils-doc=0.19+dfsg-6 dpdk-doc=22.11.11-0+deb12u1 dx-doc=1:4.4.4-15 dynare-doc=5.3-1
emscripten-doc=3.1.6~dfsg-5 enigma-doc=1.20-dfsg.1-2.2 erlang-doc=1:25.2.3+dfsg-1+deb12u4
erlang-manpages=1:25.2.3+dfsg-1+deb12u4 exim4-doc-html=4.96-1 ffmpeg-doc=7:5.1.9-0+deb12u1
fish-common=3.6.0-3.1+deb12u1 fontforge-doc=1:20230101~dfsg-1.1~deb12u1 fortunes=1:1.99.1-7.3
freebsd-manpages=12.2-1 frr-doc=8.4.4-1.1~deb12u2 gap-doc=4.12.1-2 geographiclib-doc=2.1.2-1
ghc-doc=9.0.2-4 giac-doc=1.9.0.35+dfsg2-1.1 gimp-help-en=2.10.34-2 git-doc=1:2.39.5-0+deb12u3
glance-doc=2:25.1.0-2+deb12u5 gnome-devel-docs=40.3-1 gnome-user-docs=43.0-2
gnuplot-doc=5.4.4+dfsg1-2 gnutls-doc=3.7.9-2+deb12u7 gradle-doc=4.4.1-18
graphviz-doc=2.42.2-7+deb12u1 grass-doc=8.2.1-1 harden-doc=3.19+nmu1 heat-doc=1:19.0.0-3
icinga2-doc=2.13.6-2+deb12u2 imagemagick-6-doc=8:6.9.11.60+dfsg-1.6+deb12u15
ironic-doc=1:21.4.4-0+deb12u2 jmeter-help=2.13-5 kea-doc=2.2.0-6 keystone-doc=2:22.0.2-0+deb12u6
krb5-doc=1.20.1-2+deb12u5 lava-server-doc=2023.01-2 lemonldap-ng-doc=2.16.1+ds-deb12u10
libboost1.74-doc=1.74.0+ds1-21 libreoffice-help-en-us=4:7.4.7-1+deb12u14 libssl-doc=3.0.22-1~deb12u2
libstdc++-12-doc=12.2.0-14+deb12u1 libvirt-doc=9.0.0-4+deb12u2 libx11-doc=2:1.8.4-2+deb12u2
lilypond-doc-html=2.24.1-2 linux-doc-6.1=6.1.192-3 llvm-15-doc=1:15.0.6-4 mailutils-doc=1:3.15-4
manila-doc=1:15.1.0-2 manpages=6.03-2 manpages-dev=6.03-2 maxima-doc=5.46.0-11 mh-book=200605-2.2
mit-scheme-doc=12.1-3 mplayer-doc=2:1.5+svn38408-1 ncurses-doc=6.4-4 netcdf-doc=1:4.9.0-3
neutron-doc=2:21.0.0-7+deb12u1 ngspice-doc=39.3+ds-1 nim-doc=1.6.10-2
nodejs-doc=18.20.4+dfsg-1~deb12u3 nova-doc=2:26.2.2-1~deb12u5 ns3-doc=3.37-2
ntpsec-doc=1.2.2+dfsg1-1+deb12u1 numba-doc=0.56.4+dfsg-2 octave-doc=7.3.0-2
octavia-doc=11.0.0-2+deb12u1 openafs-doc=1.8.9-1+deb12u1 openmpi-doc=4.1.4-3 parallel=20221122+ds-2
perl-doc=5.36.0-7+deb12u4 png-definitive-guide=20060430-4 postfix-doc=3.7.11-0+deb12u1
postgresql-doc-15=15.20-0+deb12u1 povray-doc=1:3.7.0.10-2 python-astropy-doc=5.2.1-2+deb12u1
python-biopython-doc=1.80+dfsg-4 python-brian-doc=2.5.1-3 python-celery-doc=5.2.6-5
python-dask-doc=2022.12.1+dfsg-2 python-django-doc=3:3.2.25-0+deb12u7 python-flask-doc=2.2.2-3
python-hypothesis-doc=6.67.1-1 python-lxml-doc=4.9.2-1+deb12u1 python-nipype-doc=1.8.5-3
python-pygame-doc=2.1.2+dfsg-5 python-pymatgen-doc=2022.11.7+dfsg1-11+deb12u2
python-pytest-doc=7.2.1-2 python-scipy-doc=1.10.1-2 python-scrapy-doc=2.8.0-2
python-sqlalchemy-doc=1.4.46+ds1-1 python-statsmodels-doc=0.13.5+dfsg-7 python-sympy-doc=1.11.1-1
python3.11-doc=3.11.2-6+deb12u9 qt5-doc-html=5.15.8-2 qtbase5-doc-html=5.15.8+dfsg-11+deb12u3
qtcreator-doc=9.0.2-2 qtdeclarative5-doc-html=5.15.8+dfsg-3
qtlocation5-doc-html=5.15.8+dfsg-3+deb12u1 qtmultimedia5-doc-html=5.15.8-2
qtwebengine5-doc-html=5.15.13+dfsg-1~deb12u1 r-doc-html=4.2.2.20221110-2 racket-doc=8.7+dfsg1-1
renpy-doc=8.0.3+dfsg-1 rsyslog-doc=8.2302.0+dfsg-1 rust-doc=1.63.0+dfsg1-2 sagemath-doc=9.5-6
sbcl-doc=2:2.2.9-1 scons-doc=4.4.0+dfsg-1 sendmail-doc=8.17.1.9-2+deb12u2 shorewall-doc=5.2.8-2
slurm-wlm-doc=22.05.8-4+deb12u3 sphinx-doc=5.3.0-4 sqlite3-doc=3.40.1-2+deb12u2
swi-prolog-doc=9.0.4+dfsg-2 swift-doc=2.30.1-0+deb12u3 tcl8.6-doc=8.6.13+dfsg-2 tcllib=1.21+dfsg-1
tk8.6-doc=8.6.13-2 topcat-doc=4.8.7-3 translate-toolkit-doc=3.8.4-1 twisted-doc=22.4.0-4+deb12u1
user-mode-linux-doc=20060501+repack0-1 vim-doc=2:9.0.1378-2+deb12u2 weka-doc=3.6.14-3
wireshark-doc=4.0.17-0+deb12u3 x11proto-dev=2022.1-1 xapian-doc=1.4.22-1 yade-doc=2023.02a-1
zsh-doc=5.9-4
"""
# Of these, only the files whose path matches.
ONLY = {
    "debian-handbook": "/en-US/",
    "ghc-doc": "/users_guide/",
    "gnome-user-docs": "/help/C/",
    "libstdc++-12-doc": "/manual/|/faq",
    "lilypond-doc-html": r"/Documentation/(?!internals|snippets)[^.]*\.html",
    "rust-doc": r"/(book|reference|nomicon|rustc|cargo|rust-by-example|edition-guide|rustdoc"
                r"|embedded-book|error_codes|unstable-book|std)/",
    "sagemath-doc": "/en/",
}
OTHER_WAY = ("python data.py --input=FOLDER makes shards of other text, such as FineWeb-Edu's "
             "parquet files")
CHARS_PER_TOKEN = 3.65  # SmolLM2: 392.0M characters were 107.5M tokens
SHARD = 50e6           # characters in a .jsonl file, about
LONGEST = 100_000      # characters in a document; longer ones are cut between paragraphs
SHORTEST = 200         # of a document that is kept
LEAST_ENGLISH = 0.22   # share of COMMON among the words of a document that is kept
COMMON = re.compile(r"\b(?:the|of|and|to|is|for|that|with|be|this|are|it|in|a|by|from|not|or|as|if"
                    r"|can|will|you|on|an|which)\b", re.I | re.A)


# ---------------------------------------------------------------- packages

def fetch(name, version, cache):
    """
    The .deb file of a package in the folder `cache`, where it stays: this version, or else the one
    that can be had; None if none can. OSError if there is no apt-get.
    """
    wanted = sorted(cache.glob(f"{name}_{version.replace(':', '%3a')}_*.deb"))
    there = wanted or sorted(cache.glob(f"{name}_*.deb"))
    if there:
        return there[-1]
    if not shutil.which("apt-get"):
        raise OSError(f"there is no apt-get here to fetch {name}: run this on Debian, or fill the "
                      f"folder {cache} there. {OTHER_WAY}")
    # apt-get writes under the final name from the start. Whoever finds a file in the cache must
    # find it whole.
    for asked in f"{name}={version}", name:
        with tempfile.TemporaryDirectory(dir=cache) as partial:
            subprocess.run(["apt-get", "download", "-qq", asked], cwd=partial, capture_output=True)
            for deb in Path(partial).glob("*.deb"):
                return Path(shutil.move(deb, cache / deb.name))
    return None


def version_of(deb):
    """What the name of a .deb file says."""
    return deb.name.split("_")[1].replace("%3a", ":")


def unpacked(deb, only=""):
    """(path, bytes) of the files in a .deb that may be documents. ValueError if it is damaged."""
    command = ["dpkg-deb", "--fsys-tarfile", deb]
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as opened:
            with tarfile.open(fileobj=opened.stdout, mode="r|") as members:
                for member in members:
                    if member.isreg() and reader(member.name) and re.search(only, member.name):
                        yield member.name, members.extractfile(member).read()
    except tarfile.TarError as error:
        raise ValueError(f"{deb} is damaged ({error}): delete it and run this again") from None


# ---------------------------------------------------------------- documents

# Not prose, or nothing of its own: indices, sources of pages, changelogs, licences.
SKIP = re.compile(
    r"/(_sources|_modules|_static|lintian|bug|doc-base|examples?|tests?)/|/man/(?!man\d)|offensive"
    r"|/(changelog|copyright|news|thanks|authors|credits|genindex|py-modindex|search|index-all"
    r"|license|copying|gpl|fdl|doc-index|general-index|todo)[^/]*$|-(source|members)\.html", re.I)
PACKED = {".gz": gzip.decompress, ".dz": gzip.decompress, ".bz2": bz2.decompress,
          ".xz": lzma.decompress}


def reader(path):
    """The function that makes text of such a file; None if it is no document."""
    path = "/" + (path.rpartition(".")[0] if Path(path).suffix in PACKED else path)
    if SKIP.search(path):
        return None
    return next((read for name, read in READERS if re.search(name, path, re.I)), None)


def documents(found):
    """
    found: (path, bytes) of files -> their texts in the order of paths, and how many files were
    {"read", "broken", "not English"}. A text has at most LONGEST characters.
    """
    texts, counts, found = [], {"read": 0, "broken": 0, "not English": 0}, sorted(found)
    # Where a manual has pages of HTML, Info is the same once more.
    twice = of_info if any(reader(path) is of_html for path, _ in found) else None
    for path, data in found:
        if reader(path) is twice:
            continue
        try:
            text = tidy(reader(path)(decoded(path, data)))
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError):
            counts["broken"] += 1
            continue
        good = is_english(text)
        counts["read" if good else "not English"] += 1
        texts += pieces(text) if good else []
    return texts, counts


def decoded(path, data):
    if Path(path).suffix in PACKED:
        data = PACKED[Path(path).suffix](data)
    # Info marks its pictures by zeros, but few of them.
    if data.count(0) > len(data) / 1000:
        raise ValueError(f"{path} is no text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def tidy(text):
    """Without the spaces, blank lines and invisible characters that are left over."""
    text = re.sub("[\0\b\r\xad\u200b\u00b6]", "", text).replace("\xa0", " ").replace("\f", "\n")
    text = re.sub(r"[ \t]+\n", "\n", text.expandtabs())
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"^- *\n+", "- ", text, flags=re.M)).strip()


def is_english(text):
    """Is this English prose, and enough of it?"""
    words = len(text.split())
    letters = len(re.findall(r"[A-Za-z ]", text))
    return (len(text) >= SHORTEST and letters >= 0.75 * len(text)
            and len(COMMON.findall(text)) >= LEAST_ENGLISH * words)


def pieces(text):
    """The text in parts of at most LONGEST, which end between paragraphs, or lines, if they can."""
    while len(text) > LONGEST:
        ends = [text.rfind(gap, LONGEST // 2, LONGEST) for gap in ("\n\n", "\n")]
        end = next((end for end in ends if end > 0), LONGEST)
        yield text[:end].strip()
        text = text[end:].strip()
    if len(text) >= SHORTEST:
        yield text


# ---------------------------------------------------------------- formats

def of_plain(text):
    """Plain text, reStructuredText, Markdown, POD, dictionaries, fortunes without their marks."""
    return re.sub(r".\x08|^%$", "", text, flags=re.M)


def of_info(text):
    """Info without the heads of its nodes."""
    return re.sub(r"^\x1f.*\n|^File: .*Node: .*\n", "", text, flags=re.M)


TAG = re.compile(r"<!--.*?-->|<(/?[A-Za-z][\w:-]*)([^<>]*)>|<[!?][^>]*>", re.S)
UNREAD = re.compile(r"<(script|style|svg|math|noscript|template)\b.*?</\1\s*>", re.S | re.I)
# Left out with all that is within: the page around the text, by tag and by class.
AROUND = set("head nav header footer aside form button select object info".split())
BOX = re.compile(
    r"\b(?:class|id|role)\s*=\s*[\"']?(?:[^\"'>]*\s)?(\S*sidebar|nav|\S*navigation|related\b|toc"
    r"|table-of-contents|breadcrumb|\S*footer|headerlink|indexterm|search|menu|doc-header)", re.I)
BOXES = set("div ul ol dl table td section span a".split())
PARAGRAPH = set("p h1 h2 h3 h4 h5 h6 div pre table dl ul ol section article blockquote title para "
                "screen programlisting sect1 sect2 sect3 listitem item steps note".split())
LINE = set("br tr li dt dd hr term".split())


def of_html(text):
    """HTML, DocBook or Mallard without tags: paragraphs, lists and what is in <pre> keep lines."""
    # html.parser would take four times as long.
    parts = TAG.split(UNREAD.sub(" ", text))  # text, tag, attributes, text, tag, ...
    out, pre, box, depth = [], False, None, 0
    for data, tag, rest in zip(parts[::3], parts[1::3] + [None], parts[2::3] + [None]):
        if not box:
            out.append(data if pre else re.sub(r"\s+", " ", data))
        if not tag:
            continue
        opens, alone, tag = tag[0] != "/", rest.endswith("/"), tag.lower().lstrip("/")
        if tag == "body":
            box = None  # whatever was not closed
        elif box:
            if tag == box and not alone:
                depth += 1 if opens else -1
            box = box if depth else None
        elif opens and not alone and (tag in AROUND or tag in BOXES and BOX.search(rest)):
            box, depth = tag, 1
        else:
            pre = opens if tag == "pre" else pre
            out.append(edge(tag, opens))
    text = html.unescape("".join(out))
    return re.sub(r"(?<=\S) {2,}(?=\S)", " ", re.sub(r"\n (?=\S)", "\n", text))


def edge(tag, opens):
    """What stands in the text where this tag begins or ends."""
    if tag in PARAGRAPH:
        return "\n\n"
    if tag in LINE:
        return "\n- " if tag == "li" and opens else "\n"
    return " " if tag in ("td", "th") else ""


ESCAPE = re.compile(
    r"\\(?:[fmMFgkn](?:\(..|\[[^]]*\]|.)|s[-+]?\d+|s\[[^]]*\]|\*?\((?P<two>..)|\*?\[(?P<name>[^]]*)"
    r"\]|\*.|[hvwNoDlLbxZ]'[^']*'|\".*|(?P<one>.)?)")
SIGNS = {"-": "-", "e": "\\", "\\": "\\", "~": " ", " ": " ", "0": " ", "t": " ", "'": "'",
         "`": "`", ".": ".", "lq": '"', "rq": '"', "dq": '"', "oq": "'", "cq": "'", "aq": "'",
         "Aq": "'", "em": "--", "en": "-", "hy": "-", "bu": "*", "co": "(C)", "rg": "(R)",
         "rs": "\\", "ti": "~", "ha": "^", "ga": "`", "at": "@", "->": "->", "<-": "<-",
         "<=": "<=", ">=": ">="}
UNSEEN = {"de": "..", "de1": "..", "am": "..", "ig": "..", "TS": ".TE", "EQ": ".EN", "PS": ".PE"}
HEADS = {"SH", "SS", "Sh", "Ss"}
LITERAL, FILLED = {"nf", "EX", "CS", "Vb"}, {"fi", "EE", "CE", "Ve"}
BREAKS = set("PP LP P Pp sp HP TP IP It TQ br Bl El AP RS RE Bd Ed DS DE".split())
HIDDEN = set("TH Dd Dt Os TA UE ME PD IX XE BS BE VS VE AS RCS Id UC Rs Re SY YS Bk Ek".split())
# mdoc calls these within a line, too
CALLED = set("Ar Fl Cm Nm Pa Xr Dv Va Ev Em Sy Li Op Ql Dq Sq Pq Fn Ft Fa Vt Er Ic Ad An Aq Bq Qq "
             "No Ns Oo Oc Ta Ap Xo Xc Qo Qc Do Dc So Sc Po Pc".split())


def of_roff(text):
    """A manual page, in man's macros or mdoc's. Tables and equations are left out."""
    start = re.search(r"^\.\s*(TH|Dd)\b", text, re.M)  # definitions stand before it
    mdoc = start and start[1] == "Dd"
    out, literal, until = [], False, None
    for line in text[start.start() if start else 0:].split("\n"):
        if until:
            until = None if line.startswith(until) else until
        elif line[:1] not in (".", "'"):
            line = sign_of(line)
            end = "\n" if literal or line[:1] == " " else " "
            out.append(line + end if line.strip() else "\n\n")
        else:
            name, _, rest = line[1:].strip().partition(" ")
            words = [sign_of(a or b) for a, b in re.findall(r'"([^"]*)"?|(\S+)', rest)]
            until = UNSEEN.get(name)
            literal = (literal or name in LITERAL) and name not in FILLED | HEADS
            out.append(request(name, words, mdoc) + "\n" * literal)
    return "".join(out)


def sign_of(line):
    return ESCAPE.sub(lambda m: SIGNS.get(m["one"] or m["two"] or m["name"], ""), line)


def request(name, words, mdoc):
    """What a line of roff that begins with `.name` adds to the text."""
    if mdoc:
        words = ["-" if word == "Fl" else word for word in words if word not in CALLED - {"Fl"}]
        words = ["-"] * (name == "Fl") + words
    shown = " ".join(words)
    if mdoc:
        shown = re.sub(r"(^| )- ", r"\1-", re.sub(r" ([,.;:)])(?= |$)", r"\1", shown))
    if name in HEADS:
        return f"\n\n{shown}\n\n"
    if name in LITERAL | FILLED:
        return "\n\n"
    if name in BREAKS:
        shown = {"IP": " ".join(words[:1]), "It": shown, "AP": shown}.get(name, "")
        return "\n" if name == "br" else f"\n\n{shown}" + " " * bool(shown)
    if name in HIDDEN or not words or not name[:1].isupper():
        return ""
    # The two letters of BR, IR ... are fonts that alternate from word to word.
    return ("".join(words) if re.fullmatch("[BIR]{2}", name) else shown) + " "


READERS = [(r"\.(x?html?|page|docbook|xml|en)$", of_html),
           (r"/man[1-9n]\w*/[^/]+\.[1-9n]\w*$", of_roff),
           (r"\.info(-\d+)?$", of_info),
           (r"\.(txt|text|rst|md|markdown|pod|texi|texinfo|dict|asc|adoc|org)$"
            r"|/fortunes/[^.]+$", of_plain)]


# ---------------------------------------------------------------- the corpus

def of_package(task):
    """documents of (a .deb, the paths to take of it): the work of one process."""
    deb, only = task
    return documents(unpacked(deb, only))


def fresh(text, seen):
    """
    The text without the paragraphs of a line or more that are in `seen`, to which its own are
    added: hashes of letters, so that numbers and spaces make no difference. "" if half was known.
    """
    kept, new = [], 0
    for paragraph in text.split("\n\n"):
        if len(paragraph) >= 60:
            letters = re.sub(r"[\W\d_]+", "", paragraph, flags=re.A).lower() or paragraph
            key = hashlib.blake2b(letters.encode(), digest_size=8).digest()
            if key in seen:
                continue
            seen.add(key)
            new += len(paragraph)
        kept.append(paragraph)
    rest = "\n\n".join(kept)
    return rest if new >= SHORTEST and len(rest) >= len(text) / 2 else ""


def write(texts, packages, output):
    """
    The .jsonl files and the manifest. texts: {package: [text]}, in the order in which the first of
    two like paragraphs is kept; packages: {package: what the manifest tells of it}. -> the manifest
    """
    seen, rows = set(), []
    for package, found in texts.items():
        new = [text for text in (fresh(text, seen) for text in found) if text]
        packages[package] |= {"documents": len(new), "characters": sum(map(len, new))}
        rows += [(hashlib.sha256(text.encode()).hexdigest(), package, text) for text in new]
    rows.sort()
    whole, shards, size = hashlib.sha256(), [[]], 0
    for key, package, text in rows:
        whole.update(key.encode())
        if size >= SHARD:
            shards, size = [*shards, []], 0
        shards[-1].append({"text": text, "from": package})
        size += len(text)
    made = {output / f"text-{n:02d}.jsonl": shard for n, shard in enumerate(shards)}
    files.write_lines(made)
    # What an earlier run left would be taken for ours.
    for old in set(output.glob("text-*.jsonl")) - set(made):
        old.unlink()
    manifest = {"documents": len(rows), "characters": sum(len(row[2]) for row in rows),
                "sha256": whole.hexdigest(), "packages": packages}
    files.save(manifest, output / "manifest.json")
    return manifest


def run(args):
    output = Path(args.output)
    cache = Path(args.cache or output / "packages")
    cache.mkdir(parents=True, exist_ok=True)
    if not shutil.which("dpkg-deb"):
        raise OSError("there is no dpkg-deb here to open packages: run this on Debian. "
                      f"{OTHER_WAY}")
    wanted = dict(entry.split("=", 1) for entry in PACKAGES.split())
    print(f"{len(wanted)} packages of Debian, kept in {cache}", flush=True)
    with ThreadPoolExecutor(4) as pool:
        debs = dict(zip(wanted, pool.map(fetch, wanted, wanted.values(), [cache] * len(wanted))))

    lacking = [name for name, deb in debs.items() if not deb]
    if lacking and not args.go_on:
        raise OSError(f"{len(lacking)} packages cannot be had, {lacking[0]} among them (`apt-get "
                      f"download {lacking[0]}` says why; apt-get update may help): leave them out "
                      "with --go_on")
    packages = {}
    for name, expected in wanted.items():
        found = version_of(debs[name]) if debs[name] else None
        packages[name] = {"expected": expected, "version": found}
        if found != expected:
            print(f"note: {name} {expected} is expected, {found or 'nothing'} was found",
                  file=sys.stderr)

    # The largest are begun first: the end then waits for no one.
    debs = {name: deb for name, deb in debs.items() if deb}
    order = sorted(debs, key=lambda name: -debs[name].stat().st_size)
    texts = dict.fromkeys(debs)
    with ProcessPoolExecutor(args.workers) as pool:
        tasks = [(debs[name], ONLY.get(name, "")) for name in order]
        for name, (texts[name], counts) in zip(order, pool.map(of_package, tasks)):
            sha256 = hashlib.sha256(debs[name].read_bytes()).hexdigest()
            packages[name] |= {"sha256": sha256, "files": counts}
            print(f"{name}: {counts}", flush=True)
    manifest = write(texts, packages, output)
    tokens = manifest["characters"] / CHARS_PER_TOKEN
    print(f"{manifest['documents']:,} documents, {manifest['characters'] / 1e6:,.1f}M characters, "
          f"sha256 {manifest['sha256'][:12]}: about {tokens / 1e6:,.0f}M tokens of SmolLM2, of "
          f"which 80M are {80e6 / tokens:.1f} epochs and 190M {190e6 / tokens:.1f}. Next:\n"
          f"python data.py --input {output}/*.jsonl --output {output}-smollm2 --tokenizer SmolLM2")


def flags():
    from infra.cli import flag_parser, positive
    parser = flag_parser("text.py", "English text out of Debian's packages, as .jsonl files.")
    add = parser.add_argument
    add("--output", default="data/text", metavar="DIR", help="folder for the text")
    add("--cache", metavar="DIR", help="folder of the packages fetched; None: packages below "
        "--output")
    add("--go_on", action="store_true", help="leave out packages that cannot be had")
    add("--workers", type=positive, default=os.cpu_count(), help="processes that read packages; "
        "the text does not depend on it")
    return parser


def main(argv=None):
    from infra.cli import command
    args = flags().parse_args(argv)
    command("text.py", lambda: run(args), interrupted="interrupted; what was fetched is kept, and "
            "the same command goes on")


if __name__ == "__main__":
    files.told_to_end()
    main()
