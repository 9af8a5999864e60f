"""Words pronounced by the model that comes with the package, and what it looks at while it does."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from fastseq import threads
from fastseq.bench import UsageError
from fastseq.checks import Array
from fastseq.cli.table import counted, duration

MODEL = Path(__file__).parent.parent / "data" / "pronounce.safetensors"
WORDS = ("fastseq", "recurrent", "attention", "knowledge")
BLOCKS = " ░▒▓█"
MAX_PHONEMES = 40  # phonemes of a word; the longest of the dictionary has 28
BEAMS = 5
CALLS, SECONDS = 3, 0.2  # a word is timed for so many calls, and so long, at least
MAP = "The map under each word: a column for each letter, a row for each phoneme; the darker, the more it looks there."


class Said(NamedTuple):
    """A word and what was made of it."""

    word: str
    phonemes: tuple[str, ...]
    weights: Array  # (phonemes, letters), each row sums to 1


class Pronouncer:
    """A model of pronunciation from a file.

    Parameters
    ----------
    path : path
        What ``examples/train_pronounce.py --out`` wrote.
    engine : module
        `fastseq`, or `fastseq.reference` for the same layers in NumPy.

    Attributes
    ----------
    letters : list of str
        What words are made of; a letter's place is its id.
    phonemes : list of str
        A phoneme's place is its id.
    metadata : dict
        Everything the file says of itself.
    """

    def __init__(self, path: Path, engine: ModuleType) -> None:
        from safetensors import safe_open

        from fastseq import io

        self.model: Any = io.load_into(path, engine)
        with safe_open(path, framework="numpy") as file:
            self.metadata: dict[str, str] = file.metadata()
        self.letters: list[str] = json.loads(self.metadata["letters"])
        self.phonemes: list[str] = json.loads(self.metadata["phonemes"])

    def ids(self, word: str) -> Array:
        """The letters of a word as ids."""
        return np.array([self.letters.index(letter) for letter in word], np.int64)

    def say(self, word: str) -> tuple[str, ...]:
        """The phonemes of a word, as beam search finds them."""
        said = self.model.generate(self.ids(word), MAX_PHONEMES, num_beams=BEAMS)
        return tuple(self.phonemes[i] for i in said)

    def attention(self, word: str, phonemes: Sequence[str]) -> Array:
        """What each phoneme attends to in the letters, (phonemes, letters): the mean of the heads of one layer.

        Of several layers it is the one that looks most at single letters.
        """
        target = np.array([self.phonemes.index(phoneme) for phoneme in phonemes], np.int64)
        _, weights = self.model(self.ids(word), target, return_weights=True)
        layers = [
            own.mean(axis=0) if own.ndim == 3 else own for own in (weights if isinstance(weights, list) else [weights])
        ]
        sharpest: Array = max(layers, key=lambda own: float(own.max(axis=1).mean()))
        return sharpest[: len(phonemes)]


def block_map(said: Said) -> list[str]:
    """The attention between letters and phonemes as lines: a column for each letter, a row for each phoneme."""
    margin = max((len(phoneme) for phoneme in said.phonemes), default=0)
    lines = [f"{'':{margin}}  {' '.join(said.word)}"]
    for phoneme, row in zip(said.phonemes, said.weights, strict=True):
        cells = (BLOCKS[min(int(weight * len(BLOCKS)), len(BLOCKS) - 1)] for weight in row)
        lines.append(f"{phoneme:{margin}}  {' '.join(cells)}".rstrip())
    return lines


def seconds_of(call: Callable[[], Any]) -> float:
    """The shortest of several calls, in seconds."""
    shortest, calls, began = float("inf"), 0, time.perf_counter()
    while calls < CALLS or time.perf_counter() - began < SECONDS:
        start = time.perf_counter()
        call()
        shortest = min(shortest, time.perf_counter() - start)
        calls += 1
    return shortest


def comparison(ours: float, theirs: float) -> str:
    """Both times of a word, and their ratio."""
    ratio = max(ours, theirs) / min(ours, theirs)
    said = f"{ratio:.{0 if ratio >= 10 else 1}f}× {'slower' if theirs >= ours else 'faster'}"
    return f"fastseq {duration(ours)} · the same model in NumPy {duration(theirs)} ({said})"


def checked(words: Sequence[str], letters: Sequence[str], longest: int) -> list[str]:
    """Words as the model takes them."""
    result = []
    for word in words:
        small = word.lower()
        if not small or set(small) - set(letters):
            raise UsageError(f"WORDS should be of the letters a to z and apostrophes, not {word!r}")
        if len(small) > longest:
            raise UsageError(f"WORDS should have at most {longest} letters, not {len(small)}: {word!r}")
        result.append(small)
    return result


def draw(said: Sequence[Said], path: str) -> None:
    """A picture of the attention of the first word that something was said of."""
    from fastseq import plotting

    first = next((one for one in said if one.phonemes), None)
    if first is None:
        raise UsageError("--plot: nothing was said, and there is nothing to draw")
    try:
        plotting.attention_map(
            first.weights,
            first.phonemes,
            list(first.word),
            row_label="phoneme that is said",
            column_label="letter that is looked at",
            title=f'Where each phoneme of "{first.word}" looks',
            path=path,
        )
    except (ImportError, OSError, ValueError) as error:
        raise UsageError(f"--plot: {error}") from None


def run(options: Namespace) -> int:
    """Pronounce words; the exit status is 1 if engine and reference do not agree."""
    import fastseq

    fast = Pronouncer(MODEL, fastseq)
    longest = getattr(fast.model, "max_length", 1000)
    words = checked(options.words or WORDS, fast.letters, longest)
    reference = Pronouncer(MODEL, fastseq.reference)
    said, differ = [], 0
    print(f"{MAP}\n")
    for word in words:
        phonemes = fast.say(word)
        one = Said(word, phonemes, fast.attention(word, phonemes))
        equal = reference.say(word) == phonemes
        differ += not equal
        ours, theirs = (seconds_of(lambda who=who, word=word: who.say(word)) for who in (fast, reference))  # type: ignore[misc]
        print(f"{word}: {' '.join(phonemes)}\n")
        print("\n".join(f"    {line}" for line in block_map(one)))
        print(f"\n{comparison(ours, theirs)} · {'same answer' if equal else 'ANOTHER ANSWER'}\n", flush=True)
        said.append(one)
    size = sum(array.size for array in fast.model.parameters.values())
    print(
        f"The model: fs.models.{type(fast.model).__name__} with {size:,} parameters, trained by"
        f" examples/train_pronounce.py.\n{BEAMS} beams, {counted(threads.get_num_threads(), 'thread')}, the best of"
        f" several calls."
    )
    if options.plot is not None:
        draw(said, options.plot)
    return 1 if differ else 0
