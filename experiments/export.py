"""
A run's newest checkpoint as one model in Hugging Face's layout, for others to read.

    python -m experiments.export out/NAME DIR --dtype=bfloat16
    python -m experiments.export out/NAME DIR --memory=off

Several GPUs write a checkpoint in parts, in fp32 and with the optimizer's moments. An export has
the weights alone, whole, and the tokenizer beside them. Without its memory a model is plain
attention again, and opens in transformers if it is of a family that they share; it computes
something else than it was trained to. Checked in tests/test_checkpoint.py.
"""
from dataclasses import replace
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
    config, state = model.config, model.state_dict()
    if args.memory == "off":
        if not config.memory:
            raise ValueError(f"--memory=off: {source} has none to take out")
        config = replace(config, memory=None)
        state = {name: tensor for name, tensor in state.items() if ".memory." not in name}
    weights.write(to, config, state, tokenizer_beside(source, config.vocab_size))
    without = ", without its memory" if args.memory == "off" else ""
    print(f"{source} is now {to}, {args.dtype}{without}")


def main():
    parser = flag_parser("export.py", "Write a run's newest checkpoint as one model in Hugging "
                         "Face's layout.")
    parser.add_argument("run", metavar="RUN", help="a run of train.py (out/NAME), one of its "
                        "checkpoints, or any model that we load")
    parser.add_argument("to", metavar="DIR", help="a new folder")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"],
                        help="of the weights")
    parser.add_argument("--memory", default="keep", choices=["keep", "off"],
                        help="off: without it, in the names of the model's family if it has one")
    args = parser.parse_args()
    command("export.py", lambda: export(args))


if __name__ == "__main__":
    main()
