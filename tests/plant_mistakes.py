"""Plant single mistakes in the Python above the kernels, one after another, and see which turn a test red.

A program, not collected by pytest; of Python's own library alone beside what the tests need::

    python tests/plant_mistakes.py map                  # which tests run which line; once, and after each change
    python tests/plant_mistakes.py plant --count 150    # mistakes drawn by --seed
    python tests/plant_mistakes.py plant --named        # those that once went unseen, one by one below
    python tests/plant_mistakes.py survivors            # the difference of each that no test saw

A mistake is one edit of the source, found in its syntax tree. The tree is copied into a folder of its own first; a
mistake is made in the memory of a fork that has imported the copy. Only tests that run its lines are run, the quickest
first and one variant of each before another, until one fails or time is up. Results are JSON lines, one a mistake:
"killed", also by a crash, "survived", "timeout" (a mistake that hangs is one that is seen), or "uncovered" where no
test runs the line. What survived and does not matter is explained in plant_mistakes_survivors.md, and is counted as
explained.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import copy
import difflib
import fnmatch
import gc
import json
import math
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FILES = (
    "fastseq/training/*.py",
    "fastseq/models/*.py",
    "fastseq/layers/*.py",
    "fastseq/io/*.py",
    "fastseq/state/*.py",
    "fastseq/losses.py",
    "fastseq/narrow.py",
    "fastseq/init.py",
    "fastseq/checks.py",
)
# Tests that say little of these files for the time that they take, or start programs of their own.
LEFT_OUT = (
    "test_cli*.py",
    "test_every_isa.py",
    "test_examples.py",
    "test_onnx*.py",
    "test_package.py",
    "test_parity.py",
    "test_planted_mistakes.py",
    "test_threads.py",
)
WORK = Path(tempfile.gettempdir()) / "fastseq-mistakes"
EXPLAINED = Path(__file__).resolve().parent / "plant_mistakes_survivors.md"
# Of a test, whose lines are noted: a few, and more where their names differ, as those of kinds of layers do. All of
# them are run before a mistake counts as one that survived.
VARIANTS, MOST_VARIANTS = 4, 24
EACH_VARIANT = (
    "contract",
    "test_defaults",
    "bad_input",
    "bad_arguments",
    "test_wrong",
)  # tests of which each variant is another
HANGS = 30  # seconds after its time that a test which has not come back is taken for one that hangs
BUSY = 6  # seconds on the clock, at most, for one of the processor
CALLS = 20  # of a function in a test, whose lines are noted; later ones seldom take another way
QUIET = ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # hypothesis is imported before the fork


# Mistakes.


@dataclass(frozen=True)
class Mistake:
    """One edit: the text between two places of a file, each (line, byte in it), becomes another."""

    file: str
    function: str
    kind: str
    start: tuple[int, int]
    end: tuple[int, int]
    new: str
    lines: tuple[int, ...]  # those that a test has to run to see it

    def applied(self, source: str) -> str:
        """The source with the mistake."""
        lines = source.encode().splitlines(keepends=True)
        (first, begin), (last, past) = self.start, self.end
        head = b"".join(lines[: first - 1]) + lines[first - 1][:begin]
        tail = lines[last - 1][past:] + b"".join(lines[last:])
        return (head + self.new.encode() + tail).decode()

    def difference(self, source: str) -> str:
        """What it changes."""
        lines = difflib.unified_diff(source.splitlines(), self.applied(source).splitlines(), lineterm="", n=1)
        return "\n".join(list(lines)[2:])

    def name(self, source: str) -> str:
        """What it is known by, whatever stands around it: file, function, kind, and the lines it changes."""
        old, new = source.splitlines(), self.applied(source).splitlines()
        first, past = self.start[0] - 1, self.end[0]
        lines = [*old[first:past], *new[first : past + len(new) - len(old)]]
        changed = [line.strip() for line in lines]
        return f"{self.file} {self.function} [{self.kind}] " + " | ".join(changed)


COMPARED: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
REPLACED: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
# Keywords that change no number and no message: how pictures look, and what is checked twice.
LOOKS = {"alpha", "color", "dpi", "fontsize", "linestyle", "linewidth", "marker", "stacklevel", "strict", "zorder"}
# How often each kind is drawn, against the others.
WEIGHTS = {
    "keyword dropped": 5,
    "arguments swapped": 2,
    "operator": 3,
    "comparison": 3,
    "constant": 2,
    "condition negated": 2,
    "statement dropped": 3,
    "and/or": 1,
    "not removed": 1,
    "default": 1,
    "early return": 1,
}


class Finder(ast.NodeVisitor):
    """All mistakes of a file."""

    def __init__(self, file: str, source: str) -> None:
        self.file = file
        self.found: list[Mistake] = []
        self._functions: list[str] = []
        self._bodies: list[tuple[int, ...]] = []  # the lines of the functions around
        self._statement: ast.stmt | None = None
        self.visit(ast.parse(source))

    def _add(self, kind: str, node: Any, new: str, lines: tuple[int, ...] | None = None) -> None:
        if not self._functions or not self._bodies:
            return
        if lines is None:
            lines = _lines_of(self._statement)
        function = ".".join(self._functions)
        ends = (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)
        self.found.append(Mistake(self.file, function, kind, *ends, new, lines))

    def _put(self, kind: str, node: ast.AST, **changes: Any) -> None:
        """A node with other fields."""
        other = copy.copy(node)
        for name, value in changes.items():
            setattr(other, name, value)
        text = ast.unparse(ast.fix_missing_locations(other))
        if text == ast.unparse(node):
            return
        closed = isinstance(other, ast.Call | ast.Constant | ast.Name | ast.Attribute | ast.Subscript)
        self._add(kind, node, text if closed else f"({text})")

    def visit(self, node: ast.AST) -> None:
        before = self._statement
        if isinstance(node, ast.stmt):
            self._statement = node
        super().visit(node)
        self._statement = before

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._functions.append(node.name)
        self._walk(node.body)
        self._functions.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if any(isinstance(one, ast.Name) and one.id == "overload" for one in node.decorator_list):
            return
        self._functions.append(node.name)
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        self._bodies.append(tuple(sorted({line for statement in body for line in _lines_of(statement)})))
        arguments = node.args
        for value in [*arguments.defaults, *(value for value in arguments.kw_defaults if value is not None)]:
            if isinstance(value, ast.Constant) and (new := _another(value.value)) is not None:
                self._add("default", value, new, self._bodies[-1])
        ends = {type(one) for one in ast.walk(node)} & {ast.Return, ast.Yield, ast.YieldFrom}
        if not ends and len(body) > 1:
            for statement in body[1:]:
                start = ast.Pass(lineno=statement.lineno, col_offset=statement.col_offset)
                start.end_lineno, start.end_col_offset = start.lineno, start.col_offset
                self._add("early return", start, "return; ", _lines_of(statement))
        self._walk(body)
        self._bodies.pop()
        self._functions.pop()

    def _walk(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            self.visit(statement)

    def _dropped(self, node: ast.stmt) -> None:
        self._add("statement dropped", node, "pass")

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):
            self._dropped(node)
            self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._dropped(node)
        self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        self._dropped(node)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if all(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets):
            self._dropped(node)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_If(self, node: ast.If) -> None:
        self._condition(node)
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        self._condition(node)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._condition(node)
        self.generic_visit(node)

    def _condition(self, node: Any) -> None:
        self._add("condition negated", node.test, f"(not ({ast.unparse(node.test)}))")

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self._add("condition negated", test, f"(not ({ast.unparse(test)}))")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        for i, keyword in enumerate(node.keywords):
            if keyword.arg is not None and keyword.arg not in LOOKS:
                self._put("keyword dropped", node, keywords=node.keywords[:i] + node.keywords[i + 1 :])
        plain = not any(isinstance(argument, ast.Starred) for argument in node.args)
        if plain and not (isinstance(node.func, ast.Name) and node.func.id == "isinstance"):
            for i in range(len(node.args) - 1):
                arguments = list(node.args)
                arguments[i], arguments[i + 1] = arguments[i + 1], arguments[i]
                self._put("arguments swapped", node, args=arguments)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        types = [one for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        if type(node.op) in REPLACED and not types:
            self._put("operator", node, op=REPLACED[type(node.op)]())
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for i, operator in enumerate(node.ops):
            if type(operator) in COMPARED:
                operators = list(node.ops)
                operators[i] = COMPARED[type(operator)]()
                self._put("comparison", node, ops=operators)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self._put("and/or", node, op=ast.And() if isinstance(node.op, ast.Or) else ast.Or())
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self._add("not removed", node, f"({ast.unparse(node.operand)})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if (new := _another(node.value)) is not None:
            self._add("constant", node, new)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Text for people: what stands in it is no mistake of arithmetic, and has no places of its own."""


def _another(value: Any) -> str | None:
    """Another constant."""
    if isinstance(value, bool):
        return str(not value)
    if isinstance(value, int):
        return str(value + 1)
    if isinstance(value, float):
        return str(value * 2 if value else 0.5)
    return None


def _lines_of(statement: ast.stmt | None) -> tuple[int, ...]:
    """The lines of a statement; of one with a body those of its head."""
    if statement is None:
        return ()
    body = getattr(statement, "body", None)
    if not body:
        return tuple(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
    return tuple(range(statement.lineno, max(statement.lineno + 1, body[0].lineno)))


def sources(patterns: list[str]) -> dict[str, str]:
    """The files that mistakes are planted in."""
    found = {}
    for pattern in FILES:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            if not patterns or any(fnmatch.fnmatch(name, one) for one in patterns):
                found[name] = path.read_text()
    return found


def drawn(count: int, seed: int, patterns: list[str]) -> list[Mistake]:
    """Mistakes of all kinds, no two in one line."""
    by_kind: dict[str, list[Mistake]] = collections.defaultdict(list)
    for file, source in sources(patterns).items():
        for mistake in Finder(file, source).found:
            by_kind[mistake.kind].append(mistake)
    rng = random.Random(seed)
    for kind in sorted(by_kind):
        rng.shuffle(by_kind[kind])
    kinds = sorted(by_kind)
    chosen: list[Mistake] = []
    taken = set()
    while len(chosen) < count and any(by_kind.values()):
        kind = rng.choices(kinds, [WEIGHTS[kind] if by_kind[kind] else 0 for kind in kinds])[0]
        mistake = by_kind[kind].pop()
        place = mistake.file, mistake.start[0]
        if place not in taken and ast_parses(mistake) and not is_look(mistake):
            taken.add(place)
            chosen.append(mistake)
    return chosen


def is_look(mistake: Mistake) -> bool:
    """Whether it changes the value of one of the keywords that do not matter."""
    line = (ROOT / mistake.file).read_text().encode().splitlines()[mistake.start[0] - 1]
    before = line[: mistake.start[1]].decode()
    return mistake.kind == "constant" and before.endswith(tuple(f"{name}=" for name in LOOKS))


def ast_parses(mistake: Mistake) -> bool:
    """Whether the file still is Python."""
    try:
        ast.parse(mistake.applied((ROOT / mistake.file).read_text()))
    except SyntaxError:
        return False
    return True


# Mistakes that once went unseen: what they are called, where, and one piece of the text that becomes another.
NAMED: list[tuple[str, str, str, str, str]] = [
    (
        "lengths lost in generate of pairs",
        "fastseq/models/sequence_pairs.py",
        "SequencePairModel.generate",
        "self._given(source, lengths, max_new)",
        "self._given(source, None, max_new)",
    ),
    (
        "lengths lost in stream of pairs",
        "fastseq/models/sequence_pairs.py",
        "SequencePairModel.stream",
        "self._given(source, lengths, max_new)",
        "self._given(source, None, max_new)",
    ),
    (
        "lengths lost in the loss of the forecaster",
        "fastseq/models/recurrent_forecaster.py",
        "RecurrentForecaster._loss",
        "self._standard(task.targets), lengths=task.lengths",
        "self._standard(task.targets)",
    ),
    (
        "lengths lost in choose of the chain",
        "fastseq/models/markov.py",
        "MarkovChain.choose",
        'given = symbols("sequences", sequences, lengths, vocab_size)',
        'given = symbols("sequences", sequences, None, vocab_size)',
    ),
    (
        "lengths lost where choose of the chain holds out",
        "fastseq/models/markov.py",
        "MarkovChain.choose",
        "chain.fit(sequences, lengths)",
        "chain.fit(sequences)",
    ),
    (
        "lengths lost in the last fit of choose of the chain",
        "fastseq/models/markov.py",
        "MarkovChain.choose",
        "chosen.fit(sequences, lengths)",
        "chosen.fit(sequences)",
    ),
    (
        "choose of the chain on many short sequences",
        "fastseq/models/markov.py",
        "MarkovChain.choose",
        "given.steps() >= limit",
        "np.arange(len(given.ids)) >= limit",
    ),
    (
        "lengths lost in choose of autoregression",
        "fastseq/models/autoregressive.py",
        "AutoRegressive.choose",
        "model.fit(series, lengths, hold_back=hold_back, **settings)",
        "model.fit(series, hold_back=hold_back, **settings)",
    ),
    (
        "a validation over batches that do not weigh",
        "fastseq/training/learners.py",
        "Mean.add",
        "self.total + value * count",
        "self.total + value",
    ),
    (
        "an empty batch of a validation",
        "fastseq/training/learners.py",
        "Mean.add",
        "if count:",
        "if True:",
    ),
    (
        "the first of several callbacks asks to stop",
        "fastseq/training/trainer.py",
        "_Run.go",
        "self.told_to_stop |=",
        "self.told_to_stop =",
    ),
    (
        "a state carried out of a batch that carries none",
        "fastseq/training/trainer.py",
        "_Run.take",
        "self.state = None if batch.fresh is None else state",
        "self.state = state",
    ),
    (
        "states whose values differ",
        "fastseq/state/attention.py",
        "_same_pages",
        "for array in (keys, values)]",
        "for array in (keys, keys)]",
    ),
    (
        "states whose oldest token differs",
        "fastseq/state/attention.py",
        "_same_pages",
        "- one.window + 1, 0)",
        "- one.window + 2, 0)",
    ),
    (
        "states of other windows",
        "fastseq/state/attention.py",
        "_kind",
        "np.dtype(dtype), state.window,",
        "np.dtype(dtype),",
    ),
    (
        "states of other lengths",
        "fastseq/state/attention.py",
        "AttentionState.__eq__",
        " or not np.array_equal(self.lengths, other.lengths)",
        "",
    ),
    (
        "the default of length_penalty",
        "fastseq/models/symbol_model.py",
        "SymbolModel.generate",
        "length_penalty: float = 1.0",
        "length_penalty: float = 0.0",
    ),
    (
        "the default of length_penalty of pairs",
        "fastseq/models/sequence_pairs.py",
        "SequencePairModel.generate",
        "length_penalty: float = 1.0",
        "length_penalty: float = 0.0",
    ),
    (
        "ignore_index in the loss of a model of tokens",
        "fastseq/models/transformer_encoder.py",
        "TransformerEncoderModel._loss",
        ", ignore_index=_IGNORED",
        "",
    ),
    (
        "sorting beyond the first bucket",
        "fastseq/training/data.py",
        "PaddedBatches._order",
        "range(0, count, BUCKET * size)",
        "range(0, min(1, count), BUCKET * size)",
    ),
    (
        "scheduled sampling with shifted logits",
        "fastseq/models/transformer_seq2seq.py",
        "TransformerSeq2Seq._resampled",
        "np.concatenate([drawn[:1], drawn[:-1]])",
        "drawn",
    ),
    (
        "big-endian keys of a state",
        "fastseq/state/recurrent.py",
        "Seq2SeqState._take_source",
        'np.array(array, dtype=np.dtype(array.dtype.type), order="C")',
        'np.array(array, order="C")',
    ),
    (
        "lengths lost in layers that are nested",
        "fastseq/layers/sequential.py",
        "Sequential.forward_carrying",
        "layer.forward_carrying(x, start, lengths=lengths, resets=own,",
        "layer.forward_carrying(x, start, resets=own,",
    ),
    (
        "lengths lost in a call of layers that are nested",
        "fastseq/layers/sequential.py",
        "Sequential.run",
        "layer.run(x, start, lengths=lengths,",
        "layer.run(x, start,",
    ),
    (
        "a state carried into a batch that carries none",
        "fastseq/training/learners.py",
        "carried",
        "if fresh is None or fresh.all():\n        return None",
        "if fresh is None:\n        return state",
    ),
    (
        "a state carried from a batch of a validation that carries none",
        "fastseq/training/trainer.py",
        "_Run.validate",
        "state = None if batch.fresh is None else result.state",
        "state = result.state",
    ),
    (
        "a learning rate of 0 with groups",
        "fastseq/training/optimisers.py",
        "Optimiser.__init__",
        "if self._first_lr == 0 and any(s.lr is not None for s in self._settings.values())",
        "if False",
    ),
    (
        "the weight of a batch of a validation",
        "fastseq/training/trainer.py",
        "_Run.validate",
        "loss.add(result.loss, result.elements)",
        "loss.add(result.loss, 1)",
    ),
    (
        "whole numbers cut, not rounded",
        "fastseq/narrow.py",
        "quantize",
        "np.rint(x * inverse[:, None])",
        "np.trunc(x * inverse[:, None])",
    ),
    (
        "scales for 128",
        "fastseq/narrow.py",
        "quantize",
        "most / np.float32(LIMIT)",
        "most / np.float32(LIMIT + 1)",
    ),
    (
        "bfloat16 cut, not rounded",
        "fastseq/narrow.py",
        "to_bfloat16",
        "bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)",
        "bits.astype(np.uint64)",
    ),
    (
        "ties of bfloat16 away from even",
        "fastseq/narrow.py",
        "to_bfloat16",
        "0x7FFF + ((bits >> 16) & 1)",
        "0x8000",
    ),
    (
        "NaN to infinity",
        "fastseq/narrow.py",
        "to_bfloat16",
        "(bits >> 16) | 0x40",
        "bits >> 16",
    ),
    (
        "scales of the first rows, whichever are asked for",
        "fastseq/narrow.py",
        "NarrowArray.rows",
        "self.scales[ids][:, None]",
        "self.scales[: len(ids)][:, None]",
    ),
    (
        "a part of a matrix with the scales of its beginning",
        "fastseq/narrow.py",
        "NarrowArray.__getitem__",
        "self.scales[rows]",
        "self.scales[: len(self.values[rows])]",
    ),
    (
        "factor of a table lost",
        "fastseq/narrow.py",
        "NarrowArray.times",
        "self.scales, factor",
        "self.scales, 1.0",
    ),
    (
        "copies of a matrix that can be changed",
        "fastseq/narrow.py",
        "NarrowArray.__init__",
        "array.flags.writeable = False",
        "pass",
    ),
    (
        "the state's weights narrow, the input's not",
        "fastseq/layers/base.py",
        "Layer.with_weights",
        "for name in names for pattern in patterns",
        "for name in names[:1] for pattern in patterns",
    ),
    (
        "a twin that can be trained",
        "fastseq/layers/base.py",
        "Layer._become_twin",
        "for verb in TRAINING_VERBS",
        "for verb in TRAINING_VERBS[1:]",
    ),
    (
        "parts of a twin that can be trained",
        "fastseq/layers/base.py",
        "Composite._become_twin",
        "layer._become_twin(weight_type)",
        "pass",
    ),
    (
        "a pickle that forgets its type",
        "fastseq/layers/base.py",
        "Layer.__getstate__",
        '"weights": self._weight_type',
        '"weights": "float32"',
    ),
    (
        "an array of a file that the layer has not",
        "fastseq/layers/base.py",
        "Layer._take_narrow",
        "for name, array in given.items() if name in self._arrays",
        "for name, array in given.items()",
    ),
    (
        "scales of any length",
        "fastseq/io/__init__.py",
        "_narrow",
        "scales.shape != array.shape[:1] or",
        "",
    ),
    (
        "scales of any dtype",
        "fastseq/io/__init__.py",
        "_narrow",
        "or scales.dtype != np.float32",
        "",
    ),
    (
        "a type of weights that there is not",
        "fastseq/io/__init__.py",
        "_class_name",
        'metadata.get(_WEIGHTS, "float32") not in TYPES',
        "False",
    ),
    (
        "bits of another array",
        "fastseq/io/__init__.py",
        "_bits",
        "begin + first",
        "begin",
    ),
    (
        "an optimiser of a twin",
        "fastseq/training/optimisers.py",
        "Optimiser.__init__",
        "inside.check_trainable(layer, type(self).__name__)",
        "pass",
    ),
]


def named() -> list[Mistake]:
    """The mistakes of `NAMED`, in the files as they are."""
    result = []
    for name, file, function, old, new in NAMED:
        source = (ROOT / file).read_text()
        node: Any = ast.parse(source)
        for part in function.split("."):
            inner = [one for one in ast.walk(node) if getattr(one, "name", None) == part]
            if not inner:
                raise SystemExit(f"{name}: there is no {function} in {file}")
            node = inner[0]
        lines = source.encode().splitlines(keepends=True)
        text = b"".join(lines[node.lineno - 1 : node.end_lineno])
        # However the source is wrapped.
        pattern = rb"\s*".join(re.escape(part.encode()) for part in re.findall(r"\w+|[^\w\s]", old))
        places = list(re.finditer(pattern, text))
        if len(places) != 1:
            raise SystemExit(f"{name}: {old!r} stands {len(places)} times in {function} of {file}")
        start, end = (_place(text, at, node.lineno) for at in places[0].span())
        covered = [one for one in ast.walk(node) if isinstance(one, ast.stmt) and one.lineno <= start[0]]
        inside = [one for one in covered if (one.end_lineno or 0) >= end[0] and one is not node]
        within = _lines_of(inside[-1]) if inside else tuple(range(node.body[0].lineno, (node.end_lineno or 0) + 1))
        result.append(Mistake(file, function, f"named: {name}", start, end, new, within))
    return result


def _place(text: bytes, at: int, first: int) -> tuple[int, int]:
    before = text[:at]
    return first + before.count(b"\n"), at - (before.rfind(b"\n") + 1)


# Which tests run which line.


class Recorder:
    """A plugin of pytest that notes the lines of some files that each test runs."""

    def __init__(self, root: Path, files: list[str], out: Path, limit: float) -> None:
        self._out, self._limit = out, limit
        self._lines: dict[str, set[int]] = {}
        self._locals: dict[str, Any] = {}
        for file in files:
            own: set[int] = set()
            self._lines[file] = own
            self._locals[str(root / file)] = self._local(own)
        self.tests: list[tuple[str, float, bool]] = []
        self.seen: dict[str, dict[int, list[int]]] = {file: {} for file in files}
        self._duration, self._passed = 0.0, True
        self._calls: collections.Counter[Any] = collections.Counter()

    @staticmethod
    def _local(lines: set[int]) -> Any:
        add = lines.add

        def local(frame: Any, event: str, arg: Any) -> Any:
            add(frame.f_lineno)
            return local

        return local

    def _trace(self, frame: Any, event: str, arg: Any) -> Any:
        code = frame.f_code
        local = self._locals.get(code.co_filename)
        if local is None or self._calls[code] > CALLS:
            return None
        self._calls[code] += 1
        return local(frame, event, arg)

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Of the variants of a test a few, spread over all, and those whose names have a word that is new."""
        variants: dict[str, list[Any]] = collections.defaultdict(list)
        for item in items:
            variants[_function_of(item.nodeid)].append(item)
        kept = set()
        for own in variants.values():
            few = len(own) if any(word in own[0].nodeid for word in EACH_VARIANT) else VARIANTS
            spread = {own[round(i * (len(own) - 1) / max(1, few - 1))] for i in range(few)}
            words = {word for item in spread for word in _words_of(item.nodeid)}
            for item in own:
                if len(spread) < MOST_VARIANTS and not words.issuperset(_words_of(item.nodeid)):
                    spread.add(item)
                    words |= _words_of(item.nodeid)
            kept |= spread
        items[:] = [item for item in items if item in kept]

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._duration += report.duration
        self._passed &= report.passed

    def pytest_runtest_logstart(self, nodeid: str, location: Any) -> None:
        for lines in self._lines.values():
            lines.clear()
        self._calls.clear()
        self._duration, self._passed = 0.0, True
        signal.signal(signal.SIGPROF, _too_long)
        signal.setitimer(signal.ITIMER_PROF, self._limit)
        threading.settrace(self._trace)
        sys.settrace(self._trace)

    def pytest_runtest_logfinish(self, nodeid: str, location: Any) -> None:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
        signal.setitimer(signal.ITIMER_PROF, 0)
        number = len(self.tests)
        self.tests.append((nodeid, self._duration, self._passed))
        for file, lines in self._lines.items():
            for line in list(lines):
                self.seen[file].setdefault(line, []).append(number)

    def pytest_sessionfinish(self) -> None:
        self._out.write_text(json.dumps({"tests": self.tests, "lines": self.seen}))


def _function_of(test: str) -> str:
    """A test without what says which variant it is."""
    return test.partition("[")[0]


def _words_of(test: str) -> set[str]:
    """What its variant is called by, without numbers."""
    return set(re.findall(r"[A-Za-z_]\w+", test.partition("[")[2]))


def _too_long(number: int, frame: Any) -> None:
    raise TimeoutError("the test is left out of the map")


class Planted:
    """A plugin of pytest that, in place of its loop, plants one mistake after another and runs the tests of each.

    Everything is imported and collected once. A mistake is made in a fork, where the functions get the code that the
    changed source gives them, so that what it breaks, or leaves behind, ends with the fork.
    """

    def __init__(self, tree: Path, queue: list[Mistake], known: Map, limit: float, told: Callable[..., None]) -> None:
        self._tree, self._queue, self._known, self._limit, self._told = tree, queue, known, limit, told

    def pytest_runtestloop(self, session: Any) -> bool:
        items = {item.nodeid: item for item in session.items}
        variants: dict[str, list[str]] = collections.defaultdict(list)
        for test in items:
            variants[_function_of(test)].append(test)
        gc.freeze()
        for mistake in self._queue:
            begun = time.monotonic()
            tests = [test for test in self._known.covering(mistake) if test in items]
            known = set(tests)
            for function in dict.fromkeys(map(_function_of, tests)):
                tests += [test for test in variants[function] if test not in known]
            outcome, said = "uncovered", ""
            if tests:
                outcome, said = self._judged(mistake, [items[test] for test in tests])
            self._told(mistake, outcome, said, len(tests), time.monotonic() - begun)
        return True

    def _judged(self, mistake: Mistake, items: list[Any]) -> tuple[str, str]:
        """What becomes of a mistake, and the test that failed."""
        end, into = os.pipe()
        child = os.fork()
        if not child:
            said = ""
            try:
                os.setsid()
                os.close(end)
                resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(self._limit + HANGS), resource.RLIM_INFINITY))
                # A fork has one thread, for its parent's workers are not there; the parent of this one has none.
                sys.modules["fastseq.threads"]._forked = False  # type: ignore[attr-defined]
                said = "no function has the lines of the mistake"
                patch(mistake, self._tree)
                said = "a test ended the program"
                said = failing(items, self._limit)
            finally:
                with contextlib.suppress(BaseException):
                    os.write(into, json.dumps(said).encode())
                os._exit(0)
        os.close(into)
        in_time = bool(select.select([end], [], [], BUSY * (self._limit + HANGS))[0])
        answer = os.read(end, 10_000).decode() if in_time else ""
        os.close(end)
        status = os.waitpid(child, 0)[1] if in_time else 0
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # with what a test has left behind
        if not in_time:
            os.waitpid(child, 0)
        if not in_time or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
            return "timeout", ""
        said = json.loads(answer) if answer else f"a test crashed the program, status {status}"
        return ("killed" if said else "survived"), said


def failing(items: list[Any], limit: float) -> str:
    """Run tests until one fails, or until so much time of the processor is gone: its name, or nothing."""
    from _pytest.runner import runtestprotocol

    end = time.process_time() + limit
    for item, following in zip(items, [*items[1:], None], strict=True):
        if any(report.failed for report in runtestprotocol(item, log=False, nextitem=following)):
            return str(item.nodeid)
        if time.process_time() > end:
            break
    return ""


def patch(mistake: Mistake, tree: Path) -> None:
    """Give the functions of a file that is imported the code and the defaults that a mistake gives them."""
    path = str(tree / mistake.file)
    source = Path(path).read_text()
    changed = mistake.applied(source)
    made: dict[tuple[int, str], types.CodeType] = {}
    before = _codes(compile(source, path, "exec"))
    for key, code in _codes(compile(changed, path, "exec")).items():
        if key not in before or code != before[key] or code.co_consts != before[key].co_consts:
            made[key] = code
    defaults = _defaults(changed) if mistake.kind.startswith(("default", "named")) else {}
    found = 0
    gc.unfreeze()
    for thing in gc.get_objects():
        if type(thing) is types.FunctionType and thing.__code__.co_filename == path:
            key = thing.__code__.co_firstlineno, thing.__code__.co_qualname
            if key in made:
                thing.__code__ = made[key]
                found += 1
            if key in defaults:
                places, by_name = defaults[key]
                if thing.__defaults__:
                    own = thing.__defaults__
                    thing.__defaults__ = tuple(places.get(i - len(own), value) for i, value in enumerate(own))
                if thing.__kwdefaults__:
                    thing.__kwdefaults__.update(by_name)
                found += 1
    if not found:
        raise LookupError(f"no function of {mistake.file} has the lines of the mistake")


def _codes(code: types.CodeType) -> dict[tuple[int, str], types.CodeType]:
    """All code of functions in some code, by first line and name."""
    found = {}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found[constant.co_firstlineno, constant.co_qualname] = constant
            found |= _codes(constant)
    return found


def _defaults(source: str) -> dict[tuple[int, str], tuple[dict[int, Any], dict[str, Any]]]:
    """The defaults that are constants, of each function: by place from the end, and by name."""
    found: dict[tuple[int, str], tuple[dict[int, Any], dict[str, Any]]] = {}

    def walk(node: Any, outside: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = outside + getattr(child, "name", "")
            if isinstance(child, ast.FunctionDef):
                own = child.args.defaults
                places = {i - len(own): v.value for i, v in enumerate(own) if isinstance(v, ast.Constant)}
                named = zip(child.args.kwonlyargs, child.args.kw_defaults, strict=True)
                by_name = {argument.arg: v.value for argument, v in named if isinstance(v, ast.Constant)}
                first = min([child.lineno, *(one.lineno for one in child.decorator_list)])
                found[first, name] = places, by_name
                walk(child, f"{name}.<locals>.")
            else:
                walk(child, f"{name}." if isinstance(child, ast.ClassDef) else outside)

    walk(ast.parse(source), "")
    return found


def scratch(number: int) -> Path:
    """A copy of the tree, which is removed when the program ends."""
    into = WORK / f"tree-{os.getpid()}-{number}"
    into.mkdir(parents=True)
    ignored = shutil.ignore_patterns("build", ".*", "__pycache__", "*.egg-info")
    for path in ROOT.iterdir():
        if path.name.startswith(".") or path.name in ("build", "venv"):
            continue
        if path.is_dir():
            shutil.copytree(path, into / path.name, ignore=ignored)
        else:
            shutil.copy2(path, into / path.name)
    return into


def run_pytest(tree: Path, files: list[str], plugin: Any, log: Path, limit: float, more: tuple[str, ...] = ()) -> int:
    """Run tests of a tree in a fork of this process, which has not imported fastseq: pytest's exit status.

    124 after `limit` seconds.
    """
    import pytest  # the fork has it

    child = os.fork()
    if not child:
        status = 70
        try:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background ignores
            with open(log, "wb") as into:
                os.dup2(into.fileno(), 1)
                os.dup2(into.fileno(), 2)
            os.chdir(tree)
            sys.path[:] = [str(tree), str(tree / "tests"), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
            arguments = ["-q", "--no-header", "-p", "no:cacheprovider", *QUIET, "--rootdir", str(tree), *more, *files]
            status = int(pytest.main(arguments, plugins=[plugin]))
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    begun = time.monotonic()
    try:
        while time.monotonic() - begun < limit:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        os.kill(child, signal.SIGINT)  # so that it writes down what it has
        time.sleep(10)
        return 124
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # with what a test has left behind
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


def environment() -> None:
    """The same for the map and for every mistake: one thread, and nothing of it in the tree that is copied."""
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "FASTSEQ_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() not in (ROOT, ROOT / "tests")]
    import hypothesis  # noqa: F401
    import numpy  # noqa: F401


def test_files(patterns: list[str]) -> list[str]:
    """The files of tests, relative to the tree."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    if patterns:
        paths = [path for pattern in patterns for path in paths if fnmatch.fnmatch(path.name, pattern)]
    else:
        paths = [path for path in paths if not any(fnmatch.fnmatch(path.name, pattern) for pattern in LEFT_OUT)]
    return [path.relative_to(ROOT).as_posix() for path in paths]


def make_map(arguments: argparse.Namespace) -> None:
    """The map, one file of tests after another; what was made of the same files before stays."""
    environment()
    folder = WORK / "map"
    folder.mkdir(parents=True, exist_ok=True)
    tree = scratch(0)
    try:
        for file in test_files(arguments.tests):
            out = folder / (Path(file).stem + ".json")
            if arguments.missing and out.exists():
                continue
            out.unlink(missing_ok=True)
            begun = time.monotonic()
            plugin = Recorder(tree, list(sources([])), out, arguments.test_limit)
            status = run_pytest(tree, [file], plugin, WORK / "map.log", arguments.limit)
            print(f"{file}: status {status}, {time.monotonic() - begun:.0f} s", flush=True)
    finally:
        shutil.rmtree(tree)


@dataclass
class Map:
    """Tests by line."""

    durations: dict[str, float]
    tests: dict[str, dict[int, set[str]]]

    @staticmethod
    def read() -> Map:
        """What `map` wrote."""
        durations: dict[str, float] = {}
        tests: dict[str, dict[int, set[str]]] = collections.defaultdict(lambda: collections.defaultdict(set))
        for path in sorted((WORK / "map").glob("*.json")):
            content = json.loads(path.read_text())
            for name, duration, passed in content["tests"]:
                if passed:
                    durations[name] = duration
            names = [name for name, _, _ in content["tests"]]
            for file, lines in content["lines"].items():
                for line, numbers in lines.items():
                    tests[file][int(line)] |= {names[number] for number in numbers if names[number] in durations}
        if not durations:
            raise SystemExit("there is no map yet: python tests/plant_mistakes.py map")
        return Map(durations, tests)

    def covering(self, mistake: Mistake) -> list[str]:
        """The tests that run a line of a mistake: one variant of each, the quickest first, then another of each.

        Those of files that are named after the module come a turn earlier; before all others those whose variant is
        named after the function, its class, or an argument that the line names.
        """
        own = self.tests.get(mistake.file, {})
        found = set().union(*(own.get(line, set()) for line in mistake.lines))
        if mistake.kind == "default":  # which a test may ask for without a call
            found |= {test for test in self.durations if "test_defaults.py" in test}
        modules = Path(mistake.file).parts[1:-1] + (Path(mistake.file).stem,)
        lines = (ROOT / mistake.file).read_text().splitlines()
        head = "\n".join(lines[mistake.lines[0] - 1 : mistake.lines[-1]]) if mistake.kind != "default" else ""
        words = {word.lower() for word in [*mistake.function.split("."), *re.findall(r'"(\w+)"', head)]}
        variants: collections.Counter[str] = collections.Counter()
        turns: dict[str, int] = {}
        for test in sorted(found, key=lambda test: (self.durations[test], test)):
            named = words.intersection(re.findall(r"\w+", test.partition("[")[2].lower()))
            related = any(name in test.partition("::")[0] for name in modules)
            turns[test] = -2 if named else variants[_function_of(test)] - related
            variants[_function_of(test)] += 1
        return sorted(turns, key=turns.__getitem__)  # of one turn, the quickest first


# Planting.


def explained() -> set[str]:
    """The names of the survivors that do not matter."""
    if not EXPLAINED.exists():
        return set()
    return set(re.findall(r"^    (fastseq/.*)$", EXPLAINED.read_text(), re.M))


def plant(arguments: argparse.Namespace) -> None:
    """Plant mistakes, and write what became of each."""
    mistakes = named() if arguments.named else drawn(arguments.count, arguments.seed, arguments.only)
    if arguments.list:
        for mistake in mistakes:
            print(mistake.name((ROOT / mistake.file).read_text()))
        return
    environment()
    known, accepted = Map.read(), explained()
    out = Path(arguments.out).resolve()
    texts = {mistake.file: (ROOT / mistake.file).read_text() for mistake in mistakes}
    results = []
    if arguments.go_on and out.exists():
        for result in map(json.loads, out.read_text().splitlines()):
            if result["outcome"] in ("survived", "uncovered") and result["name"] in accepted:
                result["outcome"] = "explained"
            if result["outcome"] not in ("survived", "uncovered"):
                results.append(result)
    done = {result["name"] for result in results}
    out.write_text("".join(f"{json.dumps(result)}\n" for result in results))
    queue = [one for one in mistakes if one.name(texts[one.file]) not in done]
    if arguments.mapped:
        queue = [one for one in queue if known.covering(one)]
    files = sorted({test.partition("::")[0] for mistake in queue for test in known.covering(mistake)})
    screen = os.dup(1)

    def told(mistake: Mistake, outcome: str, said: str, tests: int, seconds: float) -> None:
        name = mistake.name(texts[mistake.file])
        if outcome in ("survived", "uncovered") and name in accepted:
            outcome = "explained"
        line = {"outcome": outcome, "name": name, "tests": tests, "seconds": round(seconds, 1), "said": said}
        with open(out, "a") as file:
            file.write(json.dumps({**line, **asdict(mistake)}) + "\n")
        os.write(screen, f"{outcome:10} {seconds:6.1f} s  {name}\n".encode())

    workers = []
    for number in range(arguments.jobs):
        child = os.fork()
        if not child:
            tree = scratch(number)
            try:
                plugin = Planted(tree, queue[number :: arguments.jobs], known, arguments.limit, told)
                run_pytest(tree, files, plugin, WORK / f"log-{number}", math.inf)
            finally:
                shutil.rmtree(tree)
            os._exit(0)
        workers.append(child)
    try:
        for child in workers:
            os.waitpid(child, 0)
    except (KeyboardInterrupt, SystemExit):  # --go-on takes it up from here
        for child in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGTERM)
    summary(out)


def summary(out: Path) -> None:
    """How many of each file, and how many of those that matter were seen."""
    results = [json.loads(line) for line in out.read_text().splitlines()]
    by_file: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for result in results:
        by_file[result["file"]][result["outcome"]] += 1
    for file, counts in sorted(by_file.items()):
        print(f"{file:44}", ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    total = collections.Counter(result["outcome"] for result in results)
    seen, unseen = total["killed"] + total["timeout"], total["survived"] + total["uncovered"]
    print(f"{seen} of {seen + unseen} that matter were seen ({seen / max(1, seen + unseen):.1%});", dict(total))


def survivors(arguments: argparse.Namespace) -> None:
    """The difference of every mistake that no test saw."""
    for line in Path(arguments.out).read_text().splitlines():
        result = json.loads(line)
        if result["outcome"] in ("survived", "uncovered"):
            fields = {name: result[name] for name in ("file", "function", "kind", "new")}
            places = {name: tuple(result[name]) for name in ("start", "end", "lines")}
            mistake = Mistake(**fields, **places)
            print(f"{result['outcome']} ({result['tests']} tests): {result['name']}")
            print(mistake.difference((ROOT / mistake.file).read_text()), end="\n\n")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        own = commands.add_parser(name, help=run.__doc__)
        own.set_defaults(run=run)
        return own

    of_map = command("map", make_map)
    of_map.add_argument("tests", nargs="*", help="files of tests, test_models.py or test_*.py; else most of them")
    of_map.add_argument("--missing", action="store_true", help="only those of which there is no map")
    of_map.add_argument("--limit", type=float, default=900, help="seconds for a file of tests")
    of_map.add_argument(
        "--test-limit", type=float, default=10, help="of the processor; tests that need more are left out"
    )
    of_plant = command("plant", plant)
    of_plant.add_argument("--count", type=int, default=150)
    of_plant.add_argument("--seed", type=int, default=0)
    of_plant.add_argument("--jobs", type=int, default=1)
    of_plant.add_argument(
        "--limit",
        type=float,
        default=60,
        help="seconds of the processor for a mistake, after which no other test begins",
    )
    of_plant.add_argument("--named", action="store_true", help="the fixed set in place of drawn ones")
    of_plant.add_argument("--only", nargs="*", default=[], help="files to plant in, fastseq/models/*.py")
    of_plant.add_argument("--list", action="store_true", help="only say what would be planted")
    of_plant.add_argument(
        "--go-on", action="store_true", help="leave out what the results say was seen, or is explained"
    )
    of_plant.add_argument("--mapped", action="store_true", help="leave out those whose lines no test of the map runs")
    of_plant.add_argument("--out", default="mistakes.jsonl")
    command("survivors", survivors).add_argument("--out", default="mistakes.jsonl")
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    arguments.run(arguments)


if __name__ == "__main__":
    main()
