"""
RULER's files: data that its scripts make and ask, predictions that its scripts score.

    data           one object per line: index, input, outputs, answer_prefix ...
    predictions    the same with pred, one file per task, whose name says which

NVIDIA/RULER, scripts/data/prepare.py, scripts/pred/call_api.py and scripts/eval/evaluate.py. The
official RAT+ reads the predictions too. Nothing here knows what a needle is: examples are niah's,
and niah.read_jsonl makes them of rows. Checked in tests/test_niah.py with a row of RULER's own.
"""
from pathlib import Path

from infra.files import lines_of, parse_json, regular, short, write_lines


def write_jsonl(path, examples):
    """Examples as one of RULER's data files, all of it or nothing."""
    # RULER keeps the end of the prompt that opens the answer in a field of its own.
    rows = [{"index": index, "input": e.prompt.removesuffix(e.answer_prefix), "outputs": e.answers,
             "length": len(e.ids) + e.max_new_tokens, "answer_prefix": e.answer_prefix}
            for e, index in zip(examples, indices(examples))]
    for row, e in zip(rows, examples):
        if e.spans:
            row["token_position_answer"] = e.spans[0][0]
    write_lines({Path(path): rows})


def indices(examples):
    """Each example's index; of several questions about one document, a number for each."""
    most = 1 + max((e.question for e in examples), default=0)
    return [e.index * most + e.question for e in examples]


def write_predictions(folder, examples, predictions):
    """One TASK.jsonl per task, as evaluate.py --data_dir folder finds them."""
    files = {}
    for e, index, prediction in zip(examples, indices(examples), predictions, strict=True):
        # evaluate.py stops at a line without `others`, and asks for none of its fields.
        files.setdefault(Path(folder) / f"{e.task}.jsonl", []).append(
            {"index": index, "pred": prediction, "input": e.prompt, "outputs": e.answers,
             "others": {}, "truncation": -1, "length": len(e.ids) + e.max_new_tokens})
    write_lines(files)


def rows_of(path):
    """
    (where, row) of each line of a data file: `where` names it in messages. The row has an index, an
    input, outputs and an answer_prefix ("" if there is none). ValueError if one has not.
    """
    with open(regular(path), "rb") as file:
        for number, line in lines_of(file):
            where = f"{path} line {number}"
            yield where, row_of(line, where)


def row_of(line, where):
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}); write one object per line") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not an object {{...}}; write one per line")
    for field, kind, what in (("index", int, "a number"), ("input", str, "a text"),
                              ("outputs", list, "a list")):
        if not isinstance(row.get(field), kind):
            raise ValueError(f"{where}: no field {field!r} that is {what}; RULER's "
                             "scripts/data/prepare.py writes it")

    outputs = row["outputs"]
    if not 0 < len(outputs) <= 1000 or not all(isinstance(text, str) and text for text in outputs):
        raise ValueError(f"{where}: outputs must be one or more texts (at most 1,000), not "
                         f"{short(outputs)}")
    prefix = row.get("answer_prefix")
    if not isinstance(prefix, (str, type(None))):
        raise ValueError(f"{where}: answer_prefix must be a text, not {short(prefix)}")
    return row | {"answer_prefix": prefix or ""}
