"""
kvpress's leaderboard: RULER at 4,096 tokens, compressed before the question is known.

    python -m experiments.leaderboard --ckpt SmolLM2               # 11 of the 13 tasks, made here
    python -m experiments.leaderboard --ckpt Qwen3-8B --data 4096/test-00000-of-00001.parquet

Its setting (NVIDIA/kvpress, evaluation/): a share of each context's keys and values is dropped, a
quarter to seven eighths; then the question is fed, and the answer is written greedily. A model with
a chat template is asked through it, the context as the user's message; another one reads its
beginning-of-text token, context, question, a line break and the opening of the answer. Context and
question are tokens of their own. Scores are RULER's string matches.

--data is the file that kvpress itself asks (hf download simonjegou/ruler --repo-type dataset), 500
prompts of each of 13 tasks, cut by Llama 3.1's tokenizer. Without it the same kinds of prompts are
made here by the model's own tokenizer, but for the two of question answering: then compare models
and presses with each other, and not with kvpress's table.

Under --out there is for each model and share a folder as kvpress's evaluate.py writes it:
predictions.csv, metrics.json and config.yaml. All else, answers that outlive a stop included, is
eval_niah.py's. Checked in tests/test_leaderboard.py. Letters as in sparse.py.
"""
import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

import eval_niah
import niah
import sparse
from infra import weights
from infra.cli import command, flag_parser, number, positive, seed, usable_device
from infra.files import lines_of, load, parse_json, read_json, save, told_to_end
from infra.parallel import is_first
from sparse import Dense, SnapKV
from triton_ops import backend

CONTEXT = 4096
RATIOS = 0.25, 0.5, 0.75, 0.875  # the share of each context that is dropped
below_1 = number(lambda x: 0 <= x < 1, "a share from 0 to below 1")
TASKS = [*niah.TASKS, "vt", "cwe", "fwe"]


# ---------------------------------------------------------------- presses, as kvpress counts

def kept_of(lengths, ratio):
    """How many entries of contexts of these lengths (B,) stay, rounded as Python does it."""
    return (lengths.double() * (1 - ratio)).long()


@dataclass(frozen=True)
class SnapKVPress(Dense):
    """SnapKV that drops a share of each context, in place of a budget."""
    ratio: float = 0.5
    window: int = 64
    kernel: int = 5

    score, forced, best = SnapKV.score, SnapKV.forced, SnapKV.best
    check_window = SnapKV.check_window

    def compress(self, q, k, v, lengths, dice):
        return self.best(kept_of(lengths, self.ratio), q, k, lengths, dice)


@dataclass(frozen=True)
class StreamingPress(Dense):
    """StreamingLLM's: the first `initial` entries stay, and the last ones."""
    ratio: float = 0.5
    initial: int = 4

    def compress(self, q, k, v, lengths, dice):
        n = kept_of(lengths, self.ratio)[:, None]  # (B, 1)
        slot = torch.arange(int(n.max()), device=k.device)
        kept = slot.where(slot < self.initial, slot + lengths[:, None] - n)
        return kept.where(slot < n, -1)[:, None].expand(-1, k.shape[2], -1)


PRESSES = {"snapkv": SnapKVPress, "streaming_llm": StreamingPress}
sparse.METHODS |= {f"press-{name}": press for name, press in PRESSES.items()}


# ---------------------------------------------------------------- prompts, as kvpress asks them

class Frame:
    """What stands around context and question of one model, and how all of it becomes tokens."""

    def __init__(self, folder, tokenizer, chat=True):
        self.tokenizer, folder = tokenizer, Path(folder)
        settings = self.json_of(folder / "tokenizer_config.json")
        tokens = self.json_of(folder / "tokenizer.json").get("added_tokens", [])
        self.special = {token["content"]: token["id"] for token in tokens if token["special"]}
        self.named = {key: value["content"] if isinstance(value, dict) else value
                      for key, value in settings.items()
                      if key in ("bos_token", "eos_token") and value is not None}
        self.before, self.after = self.named.get("bos_token", ""), "\n"
        file = folder / "chat_template.jinja"
        template = file.read_text() if file.is_file() else settings.get("chat_template")
        if isinstance(template, list):  # several by name
            template = {one["name"]: one["template"] for one in template}.get("default")
        if chat and template:
            self.before, self.after = self.chat(template, folder)

    def json_of(self, file):
        return read_json(file, most=64 << 20) if file.is_file() else {}

    def chat(self, template, folder):
        """The chat's text before a user's message, and behind it up to where the answer begins."""
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message):
            raise TemplateError(message)
        mark = "#" * 32
        space = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        space.globals["raise_exception"] = refuse
        try:
            text = space.from_string(template).render(
                messages=[{"role": "user", "content": mark}], add_generation_prompt=True,
                enable_thinking=False, **self.named)
        except TemplateError as error:
            raise ValueError(f"{folder}: its chat template fails ({error}): --chat=off asks "
                             "without") from None
        before, found, after = text.partition(mark)
        if not found:
            raise ValueError(f"{folder}: its chat template does not show what a user writes: "
                             "--chat=off asks without")
        return before, after

    def encode(self, text):
        """Tokens of a text whose special tokens are meant as such."""
        if not self.special:
            return self.tokenizer.encode(text)
        known = "|".join(map(re.escape, sorted(self.special, key=len, reverse=True)))
        ids = []
        for part in filter(None, re.split(f"({known})", text)):
            ids += [self.special[part]] if part in self.special else self.tokenizer.encode(part)
        return ids

    def example(self, task, index, context, question, prefix, answers, new_tokens, source):
        """One prompt as a niah.Example."""
        rest = question + self.after + prefix
        of_context, of_question = self.encode(self.before + context), self.encode(rest)
        return niah.Example(
            task, index, self.before + context + rest, prefix, of_context + of_question, answers,
            "", [], [], CONTEXT, new_tokens, source, source, len(of_context))


def made_here(args, task, tokenizer, frame):
    """Prompts of ours, cut where kvpress cuts RULER's."""
    kind = (niah.TASKS | niah.OTHERS)[task]
    haystack = niah.read_haystack(args.haystack) if args.haystack else None
    for index in range(args.samples):
        e = niah.make_example(task, CONTEXT, tokenizer, args.seed, index, haystack=haystack,
                              words=args.words)
        prefix = e.answer_prefix.lstrip(" ")  # kvpress leaves the blank with the question
        text = e.prompt.removesuffix(prefix)
        *_, at = (match.start() for match in re.finditer(kind.asks, text))
        yield frame.example(task, index, text[:at], text[at:], prefix, e.answers, e.max_new_tokens,
                            e.keys_from)


def of_file(file, samples):
    """{task: [index, context, question, answer prefix, answers, new tokens]} of kvpress's file."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise ImportError(f"{file} needs pyarrow: pip install pyarrow") from None
    columns = ["task", "context", "question", "answer_prefix", "answer", "max_new_tokens"]
    found = {}
    try:
        rows = parquet.read_table(file, columns=columns).to_pylist()
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{file} is no parquet file with the columns {', '.join(columns)} "
                         f"({str(error).splitlines()[0]})") from None
    for row in rows:
        task = niah.task_name(row["task"])
        of_task = found.setdefault(task, [])
        if len(of_task) < samples:
            of_task.append([len(of_task), *(row[column] for column in columns[1:])])
    order = [*niah.TASKS, *niah.OTHERS]
    return dict(sorted(found.items(), key=lambda of_task: order.index(of_task[0])))


def prompts_for(args):
    """What eval_niah.run asks: a function like its examples_of."""
    def prompts(asked, labels, tokenizers):
        given, found = of_file(args.data, args.samples) if args.data else {}, {}
        for label, path in labels.items():
            frame = Frame(weights.resolve(path), tokenizers[label], args.chat == "on")
            if given:
                found[label] = {task: [frame.example(task, *row, args.data) for row in rows]
                                for task, rows in given.items()}
            else:
                found[label] = {task: [*made_here(args, task, tokenizers[label], frame)]
                                for task in TASKS}
        # Tokenizers differ in what 4,096 tokens of Llama's are, and shares are of each context.
        asked.context_len = max(len(e.ids) + e.max_new_tokens for by_task in found.values()
                                for of_task in by_task.values() for e in of_task)
        return found
    return prompts


# ---------------------------------------------------------------- results, as kvpress writes them

def export(args, report):
    """
    A folder for each model, press and share. -> [(model, press, share, mean score in percent,
    folder)]
    """
    by_setting, means = {}, []
    for row in report["results"]:
        by_setting.setdefault((row["checkpoint"], row["method"]), []).append(row)
    for (label, method), rows in by_setting.items():
        press = re.fullmatch("press-(.+):ratio=([^,]+).*", method)
        name, ratio = (press[1], float(press[2])) if press else ("no_press", 0.0)
        model = label.replace("/", "--")
        folder = Path(args.out) / "kvpress" / f"ruler__4096__{model}__{name}__{ratio:.2f}"
        if args.samples < 500:
            folder = folder.with_name(f"{folder.name}__fraction{args.samples / 500:.3f}")
        metrics = {row["task"]: {"string_match": round(row["ruler"][0], 2)} for row in rows}
        save(metrics, folder / "metrics.json")
        write_predictions(folder / "predictions.csv", [line for row in rows
                                                       for line in told(row, ratio)])
        settings = {"dataset": "ruler", "data_dir": "4096", "model": label, "press_name": name,
                    "compression_ratio": ratio, "fraction": args.samples / 500,
                    "query_aware": False, "max_context_length": None, "seed": args.seed,
                    "press_init_command": method, "output_dir": str(args.out)}
        (folder / "config.yaml").write_text(
            "".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items()))
        scores = [row["ruler"][0] for row in rows]
        means.append((label, name, ratio, sum(scores) / len(scores), folder))
    return means


def told(row, ratio):
    """Rows of predictions.csv, of one task."""
    new_tokens = (niah.TASKS | niah.OTHERS)[row["task"]].max_new_tokens
    with open(row["predictions"], "rb") as file:
        for line in (parse_json(text) for _, text in lines_of(file)):
            yield {"task": row["task"], "answer": line["outputs"], "predicted_answer": line["pred"],
                   "max_new_tokens": new_tokens, "compression_ratio": ratio}


def write_predictions(path, rows):
    """A list of answers is written as Python does, which pandas and ast.literal_eval read."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        writer.writeheader()
        writer.writerows(rows)


# ---------------------------------------------------------------- python -m experiments.leaderboard

def run(args):
    methods = [f"press-{press}:ratio={ratio}" for press in args.presses for ratio in args.ratios]
    asked = eval_niah.flags().parse_args([
        "--ckpt", *args.ckpt, "--methods", *methods, f"--samples={args.samples}",
        f"--seed={args.seed}", f"--context_len={CONTEXT}", f"--batch={args.batch}",
        f"--device={args.device}", f"--kernels={args.kernels}", "--protocol=base", "--blind",
        f"--words={args.words}", *[f"--haystack={args.haystack}"] * bool(args.haystack),
        *[f"--out={args.out}"] * bool(args.out)])
    asked.argv = args.argv
    eval_niah.run(asked, prompts_for(args))
    if not is_first():
        return
    args.out = asked.out
    print("\nRULER's score, %, mean of all tasks; dropped before the question was known")
    for label, name, ratio, mean, folder in export(args, load(asked.json, "results")):
        print(f"{label:24}{name:16}{ratio:7.3f}{mean:8.1f}   {folder}")


def flags():
    parser = flag_parser("leaderboard.py", "RULER at 4,096 tokens as kvpress's leaderboard asks it")
    add = parser.add_argument
    add("--ckpt", nargs="+", required=True, metavar="PATH", help="models, as eval_niah.py takes "
        "them")
    add("--data", metavar="FILE.parquet", help="kvpress's own prompts; None: made here")
    add("--presses", nargs="+", choices=PRESSES, default=["snapkv"], help="what drops")
    add("--ratios", nargs="+", type=below_1, default=RATIOS, metavar="SHARE", help="to be dropped")
    add("--samples", type=positive, default=500, help="prompts of each task, the first ones")
    add("--chat", choices=["on", "off"], default="on", help="ask through the chat template, where "
        "the model has one")
    add("--words", choices=niah.WORDS, default="wonderwords", help="of prompts that are made here; "
        "RULER's are wonderwords")
    add("--haystack", metavar="FILE", help="text of their essays; None: Python's help pages")
    add("--seed", type=seed, default=0, help="of prompts that are made here")
    add("--batch", type=positive, default=16, help="prompts at a time")
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda or cpu")
    backend.add_flag(parser)
    add("--out", metavar="DIR", help="folder of the answers, to go on with if it holds some; None: "
        "a new one in out/")
    return parser


def main(argv=None):
    args = flags().parse_args(argv)
    args.argv = argv
    command("leaderboard.py", lambda: run(args), args, "interrupted; what is answered is kept, and "
            "the same command with --out and its folder goes on")


if __name__ == "__main__":
    told_to_end()
    main()
