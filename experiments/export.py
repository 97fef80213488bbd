"""
A run's newest checkpoint as one model in Hugging Face's layout, for others to read.

    python -m experiments.export out/NAME DIR --dtype=bfloat16

Several GPUs write a checkpoint in parts, in fp32 and with the optimizer's moments. An export has
the weights alone, whole, and the tokenizer beside them. Checked in tests/test_checkpoint.py.
"""
from pathlib import Path

import torch

from infra import weights
from infra.cli import command, flag_parser
from infra.tokenizers import KINDS, ByteTokenizer, folder_of, tokenizer_of
from model import Transformer


def tokenizer_beside(source, vocab_size):
    """
    The tokenizer that goes with the model at `source`; None if there is none, as with weights that
    came alone.
    """
    has_one = any((folder_of(source) / name).exists() for name in KINDS)
    if has_one or vocab_size == ByteTokenizer.n_vocab:
        return tokenizer_of(source, vocab_size)
    return None


def export(args):
    source, to = weights.resolve(args.run), Path(args.to)
    if (to / "config.json").exists():  # it comes last: an export whose disk was full leaves none
        raise ValueError(f"{to / 'config.json'} exists: choose another folder")
    model = Transformer.from_pretrained(source, getattr(torch, args.dtype))
    tokenizer = tokenizer_beside(source, model.config.vocab_size)
    weights.write(to, model.config, model.state_dict(), tokenizer)
    print(f"{source} is now {to}, {args.dtype}")


def main():
    parser = flag_parser("export.py", "Write a run's newest checkpoint as one model in Hugging "
                         "Face's layout.")
    parser.add_argument("run", metavar="RUN", help="a run of train.py (out/NAME), one of its "
                        "checkpoints, or any model that we load")
    parser.add_argument("to", metavar="DIR", help="a new folder")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"],
                        help="of the weights")
    args = parser.parse_args()
    command("export.py", lambda: export(args))


if __name__ == "__main__":
    main()
