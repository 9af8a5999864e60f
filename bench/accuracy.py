"""Measure what narrow weights cost in accuracy on real tasks, and what they save in memory.

    python bench/accuracy.py                                     # all tasks; prints the table of docs/narrow-weights.md
    python bench/accuracy.py --task pronounce --count 1000       # one task, on fewer words
    python bench/accuracy.py --task pronounce --keep "*.linear2.*"    # parameters that stay float32
    python bench/accuracy.py --models models                     # keep the trained character models for the next run
    python bench/accuracy.py --json docs/accuracy.json           # replace in this file the tasks that were run

Tasks:

pronounce    word and phoneme error of the shipped model of ``fastseq demo``, on the words of cmudict that it was not
             trained on
sentences    all-MiniLM-L6-v2: cosine to the float32 vectors, and agreement of a search over the CPython topics
lstm         bits per character of an LSTM, trained here on the CPython topics
transformer  bits per character of a Transformer, trained here on the same text
g2p-en       words and phonemes that the GRU of g2p-en says otherwise than with float32 weights
memory       resident memory of a process that serves a model

A task whose packages are not installed is left out, with a message that names them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import fastseq as fs
from fastseq import _simd
from fastseq.bench.runner import processor
from fastseq.cli.demo import BEAMS, MODEL

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "examples"))  # whose data, models and measures these are

NARROW = ("bfloat16", "int8")
TYPES = ("float32", *NARROW)
BEST = 10  # hits of a search that are compared
STEPS = {"lstm": 1000, "transformer": 300}  # of training


class LeftOut(Exception):
    """A task that cannot be run here, and why."""


@dataclass
class Measure:
    """One figure of a task for each type of weights.

    Attributes
    ----------
    name : str
    unit : str
    digits : int
        After the decimal point.
    values : dict from str to float
        By type; without "float32" where the figure is itself a comparison with float32.
    compared : {"value", "difference", "percent", "ratio"}
        What is held against the limit: the value, its difference from that of float32, the same in percent of that of
        float32, or the ratio of both.
    limits : dict from str to float
        By narrow type: the least where `compared` is "value", else the most.
    """

    name: str
    unit: str
    digits: int
    values: dict[str, float]
    compared: str = "difference"
    limits: dict[str, float] = field(default_factory=dict)

    def cost(self, type: str) -> float:
        """What is held against the limit."""
        value = self.values[type]
        if self.compared == "value":
            return value
        real = self.values["float32"]
        return {"difference": value - real, "percent": 100 * (value / real - 1), "ratio": value / real}[self.compared]

    def within(self, type: str) -> bool:
        """Whether the limit is kept."""
        if type not in self.limits:
            return True
        cost, limit = self.cost(type), self.limits[type]
        return cost >= limit if self.compared == "value" else cost <= limit + 1e-9


def twins(model: Any, keep: Sequence[str]) -> dict[str, Any]:
    """A model with each type of weights; patterns of `keep` that fit none of its parameters are left out."""
    fit = [pattern for pattern in keep if _fits(model, pattern)]
    return {"float32": model, **{name: model.with_weights(name, keep=fit) for name in NARROW}}


def _fits(model: Any, pattern: str) -> bool:
    from fnmatch import fnmatchcase

    return any(fnmatchcase(name, pattern) for name in model.parameters)


def by_type(models: Mapping[str, Any], measure: Callable[[Any], Any]) -> dict[str, Any]:
    """A measure of each of some models; says on stderr how long each took."""
    measured = {}
    for name, model in models.items():
        start = time.perf_counter()
        measured[name] = measure(model)
        print(f"  {name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return measured


def pronounce(options: argparse.Namespace) -> tuple[str, list[Measure]]:
    """Word and phoneme error of the shipped model."""
    import pronounce
    import train_pronounce
    from safetensors import safe_open

    try:
        with safe_open(MODEL, framework="numpy") as file:
            metadata = file.metadata()
        held_out = train_pronounce.read_words(int(metadata["split_seed"])).held_out
    except pronounce.Missing as error:
        raise LeftOut(str(error)) from None
    words, phonemes = train_pronounce.first(held_out, options.count), json.loads(metadata["phonemes"])
    names = list(words)
    said = by_type(
        twins(fs.load(MODEL), options.keep),
        lambda model: train_pronounce.say(model, names, phonemes, num_beams=options.beams),
    )
    wrong = {name: train_pronounce.errors(one, words) for name, one in said.items()}
    data = (
        f"model of `fastseq demo`, {len(words):,} words of cmudict that it was not trained on, {options.beams} beam"
        f"{'' if options.beams == 1 else 's'}"
    )
    return data, [
        Measure(
            "words wrong",
            "%",
            2,
            {name: 100 * words for name, (words, _) in wrong.items()},
            limits={"bfloat16": 0.1, "int8": 0.3},
        ),
        Measure("phonemes wrong", "%", 2, {name: 100 * phonemes for name, (_, phonemes) in wrong.items()}),
        changed("words changed", said["float32"], {name: said[name] for name in NARROW}),
    ]


def changed(name: str, real: Sequence[Any], narrow: Mapping[str, Sequence[Any]]) -> Measure:
    """The share of items that differ from what float32 weights gave."""
    values = {
        type: 100 * sum(one != other for one, other in zip(real, said, strict=True)) / len(real)
        for type, said in narrow.items()
    }
    return Measure(name, "%", 2, values, "value")


def g2p_en(options: argparse.Namespace) -> tuple[str, list[Measure]]:
    """What the GRU of g2p-en says otherwise."""
    import pronounce
    from train_pronounce import distance

    try:
        pronouncer = pronounce.Pronouncer(fs, pronounce.read_weights())
        dictionary = pronounce.read_dictionary(options.count or 10_000)
    except pronounce.Missing as error:
        raise LeftOut(str(error)) from None
    words = list(dictionary)

    def say(model: Any) -> list[list[str]]:
        pronouncer.model = model
        return pronouncer(words)

    said = by_type(twins(pronouncer.model, options.keep), say)
    real, narrow = said["float32"], {name: said[name] for name in NARROW}
    total = sum(map(len, real))
    edits = {
        name: 100 * sum(map(distance, real, one)) / total  # insertions, deletions and substitutions
        for name, one in narrow.items()
    }
    wrong = {
        name: 100 * sum(one not in dictionary[word] for word, one in zip(words, each, strict=True)) / len(words)
        for name, each in said.items()
    }
    return f"GRU of g2p-en 2.1.0, {len(words):,} words of cmudict, greedy", [
        Measure("phonemes changed", "%", 2, edits, "value"),
        changed("words changed", real, narrow),
        Measure("words wrong", "%", 2, wrong),
    ]


def sentences(options: argparse.Namespace) -> tuple[str, list[Measure]]:
    """Vectors of all-MiniLM-L6-v2, and a search by them: the title of each topic is looked for in all paragraphs."""
    import pydoc_data.topics

    import embed

    try:
        embedder = embed.Embedder(embed.model_folder())
    except embed.Missing as error:
        raise LeftOut(str(error)) from None
    paragraphs = [paragraph.text for paragraph in embed.read_paragraphs()]
    if options.count is not None:
        paragraphs = [paragraphs[i] for i in np.linspace(0, len(paragraphs) - 1, options.count).astype(int)]
    topics = pydoc_data.topics.topics
    queries = [topics[name].strip().split("\n")[0].replace('"', "") for name in sorted(topics)]

    def vectors(model: Any) -> Any:
        embedder.model = model
        return np.split(embedder([*paragraphs, *queries]).astype(np.float64), [len(paragraphs)])

    found = by_type(twins(embedder.model, options.keep), vectors)
    cosines = {name: [(a * b).sum(1) for a, b in zip(found[name], found["float32"], strict=True)] for name in NARROW}
    cosines = {name: np.concatenate(each) for name, each in cosines.items()}
    hits = {name: np.argsort(-(asked @ corpus.T), axis=1)[:, :BEST] for name, (corpus, asked) in found.items()}
    overlap = {
        name: float(np.mean([len(set(a) & set(b)) / BEST for a, b in zip(hits[name], hits["float32"], strict=True)]))
        for name in NARROW
    }
    first = {name: float((hits[name][:, 0] == hits["float32"][:, 0]).mean()) for name in NARROW}
    data = (
        f"all-MiniLM-L6-v2, {len(paragraphs):,} paragraphs of the CPython topics, the titles of the {len(queries)}"
        " topics as queries"
    )
    limits = {"bfloat16": 0.9998, "int8": 0.997}
    return data, [
        Measure("mean cosine", "", 5, {name: float(each.mean()) for name, each in cosines.items()}, "value", limits),
        Measure("least cosine", "", 5, {name: float(each.min()) for name, each in cosines.items()}, "value", limits),
        Measure(f"overlap of the best {BEST}", "%", 1, {name: 100 * each for name, each in overlap.items()}, "value"),
        Measure("same best hit", "%", 1, {name: 100 * each for name, each in first.items()}, "value"),
    ]


def train_lstm(text: Any, steps: int) -> Any:
    """Two layers of 128; the state is carried along 16 streams, in chunks of 64 characters."""
    model = fs.models.RecurrentLM(len(text.characters), 64, 128, 2, cell="lstm", seed=0)
    rate = 4e-3
    model.fit(
        text.ids,
        batch_size=16,
        chunk=64,
        steps=steps,
        optimiser=fs.training.AdamW(model, rate),
        schedule=fs.training.CosineSchedule(rate, steps, warmup_steps=steps // 20),
        clip_norm=1.0,
        progress=False,
        seed=0,
    )
    return model


def train_transformer(text: Any, steps: int) -> Any:
    """The model of examples/char_gpt.py, with fewer steps."""
    import char_gpt

    return char_gpt.fit_transformer(text, steps, 0)


def characters(kind: str, name: str, train: Callable[[Any, int], Any]) -> Callable[..., tuple[str, list[Measure]]]:
    """The task of a character model."""

    def task(options: argparse.Namespace) -> tuple[str, list[Measure]]:
        import char_lm

        text = char_lm.read_text()
        steps = options.steps or STEPS[kind]
        path = None if options.models is None else Path(options.models) / f"{kind}-{steps}.safetensors"
        if path is not None and path.exists():
            model = fs.load(path)
        else:
            model = train(text, steps)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                model.save(path)
        held_out = text.held_out[: options.count]
        bits = by_type(twins(model, options.keep), lambda model: float(model.bits_per_symbol(held_out)))
        data = f"{name}, {steps:,} steps of training on the CPython topics, {len(held_out):,} held-out characters"
        return data, [Measure("bits per character", "", 4, bits, "percent", {"bfloat16": 0.2, "int8": 1.0})]

    return task


def transformer_lm() -> Any:
    """58 million parameters, one table for symbols and outputs."""
    return fs.models.TransformerLM(20_000, 768, 12, 6, context=256, positions="rotary", seed=0)


def lstm_lm() -> Any:
    """62 million parameters."""
    return fs.models.RecurrentLM(10_000, 1024, 2048, 1, cell="lstm", seed=0)


SERVED = {"Transformer": transformer_lm, "LSTM": lstm_lm}

SERVE = """
import json, sys
import fastseq as fs

def kilobytes(what):
    with open("/proc/self/status") as lines:
        (size,) = (line.split()[1] for line in lines if line.startswith(what + ":"))
    return int(size)

before = kilobytes("VmRSS")
model = fs.load(sys.argv[1])
for _ in range(2):
    model.generate([list(range(1, 9))] * 2, 2, temperature=0)
    model([list(range(1, 9))] * 2)
print(json.dumps({"before": before, "resident": kilobytes("VmRSS"), "peak": kilobytes("VmHWM")}))
"""


def serve(path: Path) -> dict[str, float]:
    """Megabytes of a process that loads a file and calls the model, and what it held before that."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", SERVE, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return {name: size / 1e3 * 1.024 for name, size in json.loads(done.stdout).items()}


def memory(options: argparse.Namespace) -> tuple[str, list[Measure]]:
    """What a process holds that serves a model, and the same without what Python and fastseq hold without one."""
    if not Path("/proc/self/status").exists():
        raise LeftOut("resident memory is read from /proc/self/status, which this system does not have")
    limits = {"bfloat16": 0.55, "int8": 0.32}
    measures = []
    sizes = []
    for kind, make in SERVED.items():
        model = make()
        size = sum(array.nbytes for array in model.parameters.values()) / 1e6
        sizes.append(f"{kind} language model of {size:.0f} MB")
        with tempfile.TemporaryDirectory() as folder:
            paths = {name: Path(folder) / f"{name}.safetensors" for name in TYPES}
            for name, twin in twins(model, options.keep).items():
                twin.save(paths[name])
                del twin
            del model
            found = by_type(paths, serve)
            files = {name: path.stat().st_size / 1e6 for name, path in paths.items()}
        resident = {name: one["resident"] for name, one in found.items()}
        own = {name: one["resident"] - one["before"] for name, one in found.items()}
        measures += [
            Measure(f"{kind}: resident size", "MB", 0, resident, "ratio", limits),
            Measure(f"{kind}: without Python's own", "MB", 0, own, "ratio", limits),
            Measure(f"{kind}: peak", "MB", 0, {name: one["peak"] for name, one in found.items()}, "ratio"),
            Measure(f"{kind}: file", "MB", 0, files, "ratio"),
        ]
    return f"{' and '.join(sizes)}, own processes, after two calls of `generate` and of the model", measures


TASKS: dict[str, Callable[[argparse.Namespace], tuple[str, list[Measure]]]] = {
    "pronounce": pronounce,
    "sentences": sentences,
    "lstm": characters("lstm", "LSTM 2×128", train_lstm),
    "transformer": characters("transformer", "Transformer 4×128", train_transformer),
    "g2p-en": g2p_en,
    "memory": memory,
}


def about() -> dict[str, Any]:
    """Where and when something was measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "fastseq": fs.__version__,
        "instruction_set": _simd.chosen,
        "instructions": dict(_simd.narrow_instructions),
        "processor": processor(),
    }


def table(run: Mapping[str, Any], names: Sequence[str] | None = None) -> str:
    """The tasks of a run as Markdown, and lines that say what was measured, where and when."""
    missing = [name for name in names or () if name not in run["tasks"]]
    if missing:
        raise SystemExit(f"there is no task {', '.join(missing)} in the run")
    chosen = {name: run["tasks"][name] for name in names or run["tasks"]}
    wheres = list(dict.fromkeys(_where(one) for one in chosen.values()))
    lines = [
        *(f"{where}." for where in wheres),
        "",
        "| | float32 | bfloat16 | int8 | limits |",
        "|---|---|---|---|---|",
    ]
    for one in chosen.values():
        lines.append(f"| **{one['data']}** | | | | |")
        lines += [_row(Measure(**measure)) for measure in one["measures"]]
    return "\n".join(lines) + "\n"


def _where(task: Mapping[str, Any]) -> str:
    used = ", ".join(f"{type} by {instructions}" for type, instructions in task["instructions"].items())
    kept = f", float32 kept: {', '.join(task['keep'])}" if task["keep"] else ""
    return (
        f"{task['date']}, fastseq {task['fastseq']} on {task['instruction_set']} ({used}),"
        f" {task['processor'] or 'unknown processor'}{kept}"
    )


def _row(measure: Measure) -> str:
    cells = [measure.name]
    for name in TYPES:
        if name not in measure.values:
            cells.append("")
            continue
        cell = f"{measure.values[name]:,.{measure.digits}f}{_unit(measure.unit)}"
        if name != "float32" and measure.compared != "value":
            cell += f" ({_cost(measure, measure.cost(name))})"
        cells.append(cell if measure.within(name) else f"{cell}, **missed**")
    limits = [measure.limits[name] for name in NARROW if name in measure.limits]
    word = "at least" if measure.compared == "value" else "at most"
    kept = f"{word} {' and '.join(_limit(measure, limit) for limit in limits)}" if limits else ""
    return f"| {' | '.join([*cells, kept])} |"


def _unit(unit: str) -> str:
    return f" {unit}" if unit else ""


def _cost(measure: Measure, cost: float) -> str:
    if measure.compared == "ratio":
        return f"{cost:.3f}×"
    if measure.compared == "percent":
        return f"{cost:+.3f} %"
    return f"{cost:+.{measure.digits}f}"


def _limit(measure: Measure, limit: float) -> str:
    if measure.compared == "value":
        return f"{limit:g}"
    return {"ratio": f"{limit:g}×", "percent": f"{limit:+g} %"}.get(measure.compared, f"{limit:+g}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--task", action="append", choices=list(TASKS), help="only this one; may be given several times"
    )
    parser.add_argument("--keep", action="append", default=[], metavar="PATTERN", help="parameters that stay float32")
    parser.add_argument("--count", type=int, metavar="N", help="only so many words, paragraphs, characters")
    parser.add_argument("--beams", type=int, default=BEAMS, metavar="N", help=f"beams of pronounce ({BEAMS})")
    parser.add_argument("--steps", type=int, metavar="N", help="steps of training a character model")
    parser.add_argument("--models", metavar="FOLDER", help="where trained character models are read from and kept")
    parser.add_argument("--json", metavar="FILE", help="write the figures; other tasks in the file stay")
    options = parser.parse_args(arguments)
    if any(value is not None and value < 1 for value in (options.count, options.beams, options.steps)):
        parser.error("--count, --beams and --steps should be at least 1")
    done: dict[str, Any] = {}
    for name in options.task or TASKS:
        print(f"{name}:", file=sys.stderr, flush=True)
        try:
            data, measures = TASKS[name](options)
        except LeftOut as reason:
            print(f"  left out: {reason}", file=sys.stderr, flush=True)
            continue
        done[name] = {
            **about(),
            "keep": options.keep,
            "data": data,
            "measures": [asdict(measure) for measure in measures],
        }
        if options.json is not None:
            _write(Path(options.json), {name: done[name]})
    if done:
        print(table({"tasks": done}))
    return 0


def _write(path: Path, tasks: Mapping[str, Any]) -> None:
    """Put tasks into a file of a run, in the order of `TASKS`."""
    known = json.loads(path.read_text())["tasks"] if path.exists() else {}
    known |= tasks
    ordered = {name: known[name] for name in TASKS if name in known}
    path.write_text(json.dumps({"tasks": ordered}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
