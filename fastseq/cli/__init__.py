"""The command ``fastseq``: a model that pronounces, what is installed, what files hold, smaller files, a benchmark."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from fastseq.bench import UsageError
from fastseq.narrow import TYPES
from fastseq.version import __version__


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # One line; argparse's own prints the usage above it.
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastseq", description="Sequence models on a CPU.")
    parser.add_argument("--version", action="version", version=f"fastseq {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")

    commands.add_parser("info", help="what is installed, and what it found on this machine")

    demo = commands.add_parser(
        "demo",
        help="pronounce words with a model that comes along",
        description="Pronounce words with the model that comes with the package, and show which letters it looks at.",
    )
    demo.add_argument("words", nargs="*", metavar="WORDS", help="of the letters a to z and apostrophes")
    demo.add_argument("--plot", metavar="FILE", help="draw the attention of the first word; needs matplotlib")

    convert = commands.add_parser(
        "convert",
        help="make a file of a layer or model smaller: bfloat16 or int8 weights",
        description="Read a layer or model that was saved, and write its twin with narrow weights, which is for "
        "inference alone.",
    )
    convert.add_argument("source", metavar="IN", help="a file of layer.save or model.save, in float32")
    convert.add_argument("target", metavar="OUT", help="where the twin is written, whole or not at all")
    convert.add_argument("--weights", required=True, choices=TYPES[1:], help="the type of the weights of products")
    convert.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="PATTERN",
        help="parameters that stay float32, as '*attention*'; may be repeated",
    )

    inspect = commands.add_parser(
        "inspect",
        help="what a file holds: tensors, shapes, types",
        description="Recognise a file or folder by its content, and list its tensors and what it says of itself. No "
        "code of it runs.",
    )
    inspect.add_argument(
        "file",
        metavar="FILE",
        help="of fastseq, safetensors, .npz, PyTorch, ONNX, Keras, or a folder of Hugging Face",
    )
    inspect.add_argument("--key", metavar="KEY", help="where in a checkpoint of PyTorch the state dict is")
    inspect.add_argument("--json", metavar="FILE", help="write everything there, whole or not at all")

    bench = commands.add_parser(
        "bench",
        help="time fastseq beside other engines",
        description="Check that every engine computes the same, then time each in a process of its own, in turn.",
    )
    bench.add_argument(
        "--vs",
        metavar="ENGINES",
        help="of reference, torch, onnxruntime, openvino, ctranslate2, llamacpp, and greedy beside beam search, as far "
        "as they can do what is asked for; with commas (default: those installed, and the reference where it does not "
        "take long)",
    )
    bench.add_argument(
        "--train",
        action="store_true",
        help="time forward and backward of recurrent layers: all gradients, of three shapes for each kind unless told "
        "otherwise",
    )
    bench.add_argument(
        "--kind",
        choices=("lstm", "gru", "rnn", "all", "attention", "encoder", "train", "decode", "generate"),
        default="all",
        help="all (the default) are the recurrent layers; train is a step of training a character Transformer; decode "
        "is greedy decoding with Transformers; generate is drawing from an LSTM language model, and beam search",
    )
    bench.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="B,T,I,H",
        help="batch, time, inputs, hidden; of attention B,heads,T,D; of an encoder B,T; of training "
        "layers,width,heads,B,T; of decoding layers,width,heads,V,context,B; of generating layers,hidden,V,B,symbols; "
        "may be repeated",
    )
    bench.add_argument(
        "--shapes",
        choices=("few", "table"),
        help="of recurrent layers: a few telling shapes (the default), or eight for each kind",
    )
    bench.add_argument(
        "--weights",
        metavar="TYPES",
        help="of float32, bfloat16 and int8, with commas: fastseq and the engines that can, with each type, and their "
        "errors beside their times (default: float32)",
    )
    bench.add_argument("--threads", metavar="N", help="threads of every engine (default: what fastseq would use)")
    bench.add_argument("--rounds", metavar="N", default="5", help="turns of every engine at every shape (default: 5)")
    bench.add_argument("--json", metavar="FILE", help="write every number there, whole or not at all")
    bench.add_argument("--plot", metavar="FILE", help="draw a roofline; needs matplotlib")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments after the name of the command; ``sys.argv`` by default.

    Returns
    -------
    int
        The exit status: 0, 1 where something went wrong on the way, 2 where it was asked for wrongly.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        if options.command is None:
            parser.print_help()
            status = 0
        elif options.command == "info":
            from fastseq.cli import info

            info.run()
            status = 0
        elif options.command == "demo":
            from fastseq.cli import demo

            status = demo.run(options)
        elif options.command == "convert":
            from fastseq.cli import convert

            status = convert.run(options)
        elif options.command == "inspect":
            from fastseq.cli import inspect

            status = inspect.run(options)
        else:
            from fastseq.cli import bench

            status = bench.run(options)
        sys.stdout.flush()
        return status
    except UsageError as error:
        print(f"fastseq {options.command}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader has left, as `head` does. Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
