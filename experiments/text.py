"""
English text to continue a language model on, where no hub is reached: manuals out of Debian.

    packages  --fetch-->  .deb files  --documents-->  texts  --fresh-->  no paragraph comes twice
              --by hash of the content-->  text-00.jsonl, text-01.jsonl, ... and manifest.json

    python -m experiments.text --output=data/text
    python data.py --input data/text/*.jsonl --output data/text-smollm2 --tokenizer SmolLM2

The first needs apt-get and dpkg-deb, as Debian 12 has them, but not root. From the same packages,
which text.txt lists, it makes the same bytes with any number of workers. A package that moved on is
looked for where mirrors keep old ones for a while, then taken in the version there is; stderr and
the manifest say so. Sorting by hash mixes the packages: the last 1 %, which train.py holds out, is
a bit of all. data.py is next; tests/test_text.py checks.
"""
import gzip
import hashlib
import html
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from infra import cli, files

# The packages: name=version, as Debian 12 had it, and a regex of paths if only some are wanted.
LIST = Path(__file__).with_suffix(".txt")
CHARS_PER_TOKEN = 3.645  # 387.5M characters, sha256 27d48932e6c4, are 106.3M tokens of SmolLM2
SHARD = 50_000_000     # characters in a .jsonl file, about
LONGEST = 100_000      # characters in a document; longer ones are cut between paragraphs
SHORTEST = 200         # of a document that is kept
LEAST_ENGLISH = 0.22   # share of COMMON among the words of a document that is kept
COMMON = re.compile(r"\b(?:the|of|and|to|is|for|that|with|be|this|are|it|in|a|by|from|not|or|as|if"
                    r"|can|will|you|on|an|which)\b", re.I | re.A)


# ---------------------------------------------------------------- packages

def listed():
    """{package: (version, regex of paths)} of text.txt. ValueError for a line that is none."""
    packages = {}
    for number, line in enumerate(LIST.read_text("utf-8").splitlines(), 1):
        try:
            [(name, version, only)] = re.findall(r"^([^\s=]+)=(\S+) *(\S*)$", line)
            packages[name] = version, re.compile(only)
        except (ValueError, re.error):
            raise ValueError(f"{LIST}, line {number}: {files.short(line)} is not name=version, nor "
                             "that and a regex of paths: mend it") from None
    return packages


def fetch(name, version, cache):
    """The .deb of a package, kept in the folder `cache`: this version or another; None if none."""
    wanted = sorted(cache.glob(f"{name}_{version.replace(':', '%3a')}_*.deb"))
    there = wanted or sorted(cache.glob(f"{name}_*.deb"))
    if there:
        return there[-1]
    # What the cache has must be whole, and these write under the final name from the start.
    for command in ways_to_fetch(name, version):
        with tempfile.TemporaryDirectory(dir=cache) as partial:
            done = subprocess.run(command, cwd=partial, capture_output=True)
            debs = [*Path(partial).glob("*.deb")]
            if done.returncode == 0 and debs:
                return Path(shutil.move(debs[0], cache / debs[0].name))
    return None


def ways_to_fetch(name, version):
    """
    Commands, each for when those before have failed: this version; the same from where mirrors keep
    for a while what they list no more, for which nobody vouches but the hash of all text; another.
    """
    yield ["apt-get", "download", "-qq", f"{name}={version}"]
    said = subprocess.run(["apt-get", "download", "--print-uris", name], capture_output=True)
    for folder, kind in re.findall(r"'(\S+)/[^/']+(_\w+\.deb)'", said.stdout.decode()):
        yield ["/usr/lib/apt/apt-helper", "download-file",
               f"{folder}/{name}_{version.split(':')[-1]}{kind}",
               f"{name}_{version.replace(':', '%3a')}{kind}"]
    yield ["apt-get", "download", "-qq", name]


# ---------------------------------------------------------------- documents

def of_package(deb, only):
    """documents of a .deb, of the paths in which `only` finds something. ValueError: damaged."""
    command = ["dpkg-deb", "--fsys-tarfile", deb]
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as opened:
            with tarfile.open(fileobj=opened.stdout, mode="r|") as members:
                return documents((member.name, members.extractfile(member).read())
                                 for member in members if member.isreg()
                                 and reader(member.name) and only.search(member.name))
    except tarfile.TarError as error:
        raise ValueError(f"{deb} is damaged ({error}): delete it and run this again") from None


# Not prose, or nothing of its own: indices, sources of pages, changelogs, licences.
SKIP = re.compile(
    r"/(_sources|_modules|_static|lintian|bug|doc-base|examples?|tests?)/|/man/(?!man\d)|offensive"
    r"|/(changelog|copyright|news|thanks|authors|credits|genindex|py-modindex|search|index-all"
    r"|license|copying|gpl|fdl|doc-index|general-index|todo)[^/]*$|-(source|members)\.html", re.I)
PACKED = (".gz", ".dz")


def reader(path):
    """The function that makes text of such a file; None if it is no document."""
    path = "/" + (path[:-3] if path.endswith(PACKED) else path)
    return next((read for name, read in READERS
                 if re.search(name, path, re.I) and not SKIP.search(path)), None)


def documents(found):
    """
    found: (path, bytes) of files -> their texts in the order of paths, and how many files were
    {"read", "broken", "not English"}. A text has at most LONGEST characters.
    """
    texts, counts = [], {"read": 0, "broken": 0, "not English": 0}
    for path, data in sorted(found):
        try:
            data = gzip.decompress(data) if path.endswith(PACKED) else data
            text = tidy(reader(path)(decoded(data)))
            kind = "read" if is_english(text) else "not English"
        except (OSError, EOFError, zlib.error):
            kind = "broken"
        counts[kind] += 1
        texts += pieces(text) if kind == "read" else []
    return texts, counts


def decoded(data):
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def tidy(text):
    """Without the spaces, blank lines and invisible characters that are left over."""
    text = re.sub("[\b\r\xad\u200b\u00b6]", "", text).replace("\xa0", " ").replace("\f", "\n")
    text = re.sub(r"[ \t]+\n", "\n", text.expandtabs())
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"^- *\n+", "- ", text, flags=re.M)).strip()


def is_english(text):
    """Is this prose, and enough of it? Tables, code and other languages lack the common words."""
    letters = len(re.findall(r"[A-Za-z ]", text))
    return (len(text) >= SHORTEST and letters >= 0.75 * len(text)
            and len(COMMON.findall(text)) >= LEAST_ENGLISH * len(text.split()))


def pieces(text):
    """The text in parts of at most LONGEST, which end between paragraphs if they can."""
    while len(text) > LONGEST:
        end = max(0, text.rfind("\n\n", 1, LONGEST)) or LONGEST
        yield text[:end]
        text = text[end:].lstrip("\n")
    yield text


# ---------------------------------------------------------------- formats

def of_plain(text):
    """Plain text, reStructuredText, Markdown, POD, dictionaries, fortunes without their marks."""
    return re.sub(r".\x08|^%$", "", text, flags=re.M)


TAG = re.compile(r"<(/?[A-Za-z][\w:-]*)([^<>]*)>")
UNREAD = re.compile(r"<!--.*?-->|<[!?][^>]*>|<(script|style)\b.*?</\1\s*>", re.S | re.I)
# Left out with all that is within: the page around the text, by tag, or by tag and class.
AROUND = set("head nav header footer aside form button select noscript svg math info".split())
BOXES = set("div ul ol dl table td section span a".split())
BOX = re.compile(
    r"\b(?:class|id|role)\s*=\s*[\"']?(?:[^\"'>]*\s)?(\S*sidebar|nav|\S*navigation|related\b|toc"
    r"|table-of-contents|breadcrumb|\S*footer|headerlink|search|menu|doc-header)", re.I)
# What stands in the text where such a tag begins or ends.
EDGES = {"td": " ", "th": " ", **dict.fromkeys("br tr li dt dd hr".split(), "\n"), **dict.fromkeys(
    "p h1 h2 h3 h4 h5 h6 div pre table dl ul ol section article blockquote title screen item "
    "steps note".split(), "\n\n")}


def of_html(text):
    """HTML or Mallard without tags: paragraphs, lists and what is in <pre> keep lines."""
    parts = TAG.split(UNREAD.sub("", text))  # text, tag, attributes, text, tag, ...
    out, pre, box, depth = [], False, None, 0
    for data, tag, rest in zip(parts[::3], parts[1::3] + ["end"], parts[2::3] + [""]):
        if not box:
            out.append(data if pre else re.sub(r"\s+", " ", data))
        opens, tag = tag[0] != "/", tag.lower().lstrip("/")
        if box:
            if tag == box:
                depth += 1 if opens else -1
            box = box if depth else None
        elif opens and (tag in AROUND or tag in BOXES and BOX.search(rest)):
            box, depth = tag, 1
        else:
            pre = opens if tag == "pre" else pre
            out.append("\n- " if tag == "li" and opens else EDGES.get(tag, ""))
    return re.sub(r"(?<=\n) (?=\S)|(?<=\S ) +(?=\S)", "", html.unescape("".join(out)))


# Comments; definitions and tables, with all that is within.
UNSEEN = re.compile(r"^(?:[.'] *\\\".*?|\.(?:de|am|ig).*?\n\.\.|\.TS.*?\n\.TE)\n", re.M | re.S)
ESCAPE = re.compile(r"\\(?:\".*|f(?:\(..|\[[^]]*\]|.)|s[-+]?\d+|\*?\((..)|\*?\[([^]]*)\]|(.)?)")
SIGNS = {**{sign: sign for sign in "-\\ '`."}, "&": "\u200b", "~": " ", "0": " ", "e": "\\",
         "rs": "\\", "lq": '"', "rq": '"', "dq": '"', 'L"': '"', 'R"': '"', "cq": "'", "aq": "'",
         "Aq": "'", "ga": "`", "em": "--", "en": "-", "bu": "*", "ha": "^", "ti": "~"}
HEADS, LITERAL, FILLED = {"SH", "SS"}, {"nf", "EX", "CS", "Vb"}, {"fi", "EE", "CE", "Ve"}
BREAKS = HEADS | LITERAL | FILLED | set("PP LP P IP TP HP AP OP OOP RS RE sp Sp br".split())
# So many of the words after these are text: after IP, a width comes second.
SHOWN = {"IP": 1, **dict.fromkeys("SH SS AP OP OOP B I SM SB BI BR IB IR RB RI QW UR".split())}


def of_roff(text):
    """A manual page in man's macros, without fonts."""
    out, literal = [], False
    text = UNSEEN.sub("", text[text.find("\n.TH") + 1:])  # more definitions stand before it
    text = ESCAPE.sub(lambda m: SIGNS.get(m[1] or m[2] or m[3], ""), text)
    for line in text.split("\n"):
        gap = "\n" if literal or line[:1] == " " else " "
        macro = re.match(r"\. *(\w*) *(.*)", line)
        if not macro:
            out.append(line + gap if line.strip() else "\n\n")
            continue
        name, words = macro[1], re.findall(r'"([^"]*)"?|(\S+)', macro[2])
        if name in BREAKS:
            literal = name in LITERAL or literal and name not in FILLED | HEADS
            out.append("\n" if name == "br" else "\n\n")
        if words and name in SHOWN:
            # The two letters of BR, IR ... are fonts that alternate from word to word.
            join = "" if re.fullmatch("[BIR]{2}", name) else " "
            out.append(join.join(quoted or bare for quoted, bare in words[:SHOWN[name]]))
            out.append("\n\n" if name in HEADS else gap)
    return "".join(out)


READERS = [(r"\.(x?html?|page)$", of_html),
           (r"/man[1-9n]\w*/[^/]+\.[1-9n]\w*$", of_roff),
           (r"\.(txt|rst|md|pod|texi|dict)$|/fortunes/[^.]+$", of_plain)]


# ---------------------------------------------------------------- the corpus

def fresh(text, seen):
    """
    The text without the paragraphs of a line or more that are in `seen`, to which its own are
    added: hashes of letters, so that numbers and spaces make no difference. "" if little is new.
    """
    kept, new = [], 0
    for paragraph in text.split("\n\n"):
        letters = re.sub(r"[\W\d_]+", "", paragraph, flags=re.A).lower()
        key = hashlib.blake2b(letters.encode(), digest_size=8).digest()
        if len(paragraph) < 60:
            kept.append(paragraph)
        elif key not in seen:
            kept.append(paragraph)
            new += len(paragraph)
            seen.add(key)
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
    shards, size = {}, 0
    for _, package, text in rows:
        shard = shards.setdefault(output / f"text-{size // SHARD:02d}.jsonl", [])
        shard.append({"text": text, "from": package})
        size += len(text)
    files.write_lines(shards)
    # What an earlier run left would be taken for ours.
    for old in set(output.glob("text-*.jsonl")) - set(shards):
        old.unlink()
    whole = hashlib.sha256("".join(key for key, _, _ in rows).encode()).hexdigest()
    manifest = {"documents": len(rows), "characters": size, "sha256": whole, "packages": packages}
    files.save(manifest, output / "manifest.json")
    return manifest


def run(args):
    output = Path(args.output)
    cache = Path(args.cache or output / "packages")
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise OSError("apt-get or dpkg-deb is missing: run this on Debian. `python data.py --input="
                      "FOLDER` makes shards of other text, such as FineWeb-Edu's parquet files")
    wanted, packages, debs, texts = listed(), {}, {}, {}
    print(f"{len(wanted)} packages of Debian, kept in {cache}", flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    for name, (expected, _) in wanted.items():
        deb = fetch(name, expected, cache)
        if not deb and not args.go_on:
            raise OSError(f"{name} cannot be had (`apt-get download {name}` says why; apt-get "
                          "update may help): --go_on leaves out what is lacking")
        found = deb and deb.name.split("_")[1].replace("%3a", ":")
        packages[name] = {"expected": expected, "version": found}
        if found != expected:
            print(f"note: {name} {expected} is expected, {found or 'nothing'} was found",
                  file=sys.stderr)
        if deb:
            debs[name] = deb
    if any(of["version"] != of["expected"] for of in packages.values()):
        print(f"note: the text is another than docs/real-model-plan.md's. After apt-get update, "
              f"delete these packages from {cache} to fetch the versions expected, as far as there "
              "still are any", file=sys.stderr)

    with ProcessPoolExecutor(args.workers) as pool:
        results = pool.map(of_package, debs.values(), (wanted[name][1] for name in debs))
        for name, (texts[name], counts) in zip(debs, results):
            sha256 = hashlib.sha256(debs[name].read_bytes()).hexdigest()
            packages[name] |= {"sha256": sha256, "files": counts}
            print(f"{name}: {counts}", flush=True)
    made = write(texts, packages, output)
    tokens = made["characters"] / CHARS_PER_TOKEN / 1e6
    print(f"{made['documents']:,} documents, sha256 {made['sha256'][:12]}, about {tokens:,.0f}M "
          f"tokens of SmolLM2. Next:\npython data.py --input {output}/*.jsonl --output "
          f"{output}-smollm2 --tokenizer SmolLM2")


def flags():
    parser = cli.flag_parser("text.py", "English text out of Debian's packages, as .jsonl files.")
    add = parser.add_argument
    add("--output", default="data/text", metavar="DIR", help="folder for the text")
    add("--cache", metavar="DIR", help="folder of the packages; None: packages below --output")
    add("--go_on", action="store_true", help="leave out packages that cannot be had")
    add("--workers", type=cli.positive, default=os.cpu_count(), help="processes that read")
    return parser


def main(argv=None):
    args = flags().parse_args(argv)
    cli.command("text.py", lambda: run(args), interrupted="interrupted; what was fetched is kept")


if __name__ == "__main__":
    files.told_to_end()
    main()
