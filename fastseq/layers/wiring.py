"""The nodes and wires of a graph: which there are, in what order they run, and all that is wrong with them."""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fastseq import checks
from fastseq.layers.base import TIMES, Layer
from fastseq.layers.connectable import OUTPUT, Timed
from fastseq.layers.containers import declares_widths, found_twice

HINTS = 10  # names that others like them are looked for
FAULTS_SHOWN = 30  # faults in a message, at most; and cycles that are looked for


class Node(NamedTuple):
    """A layer and the names of the values that it reads."""

    layer: Layer
    inputs: tuple[str, ...]


class Wiring:
    """The nodes of a graph in the order in which they run.

    The value that a node gives has the name of the node, or ``<node>.<value>`` where the layer gives several
    (`fastseq.layers.connectable`).

    Attributes
    ----------
    inputs : tuple of str
    nodes : dict of Node
        As they were declared.
    outputs : dict of str
        From the name of an output to that of a value.
    order : list of str
        Names of nodes. Each comes after the nodes that it reads, otherwise they are as declared.
    timed : dict of bool or None
        Of each value and input, whether it has an axis of time; None where that is not known.
    spent : dict of list of str
        Of each node, the values that no later node reads and that are no outputs.
    """

    def __init__(self, inputs: Any, nodes: Any, outputs: Any, without_time: Any) -> None:
        self.inputs = _names("inputs", inputs)
        self._inputs = frozenset(self.inputs)
        self.nodes, repeated = _nodes(nodes)
        self.outputs, twice = _outputs(outputs)
        static = _names("without_time", without_time, empty=True)
        faults = [f"inputs has {name!r} twice" for name in _repeated(self.inputs)]
        faults += [f"nodes has {name!r} twice" for name in repeated]
        faults += [f"outputs has {name!r} twice" for name in twice]
        faults += [f"without_time: {name!r} is no input" for name in static if name not in self._inputs]
        faults += self._name_faults() + self._layer_faults()
        unknown = self._unknown()
        self.order, cycles = self._sorted()
        faults += unknown + cycles
        if not faults:
            faults = self._unused()
        if not faults:
            self.timed, faults = self._times(static)
            self.widths, more = self.widths_from({})
            faults += more
        if faults:
            shown = [
                *faults[:FAULTS_SHOWN],
                *([f"and {len(faults) - FAULTS_SHOWN} more"] * (len(faults) > FAULTS_SHOWN)),
            ]
            raise ValueError(f"the graph cannot be made: {'; '.join(shown)}")
        self.spent = self._last_reads()

    def source(self, value: str) -> str:
        """Return the input, or the node, that a value comes from."""
        return value if value in self._inputs or value in self.nodes else value.partition(".")[0]

    def value(self, node: str, name: str) -> str:
        """Return the name in the graph of a value that a node gives."""
        return node if name == OUTPUT else f"{node}.{name}"

    def given(self, node: str) -> list[str]:
        """Return the names of all values that a node gives."""
        return [self.value(node, name) for name in self.nodes[node].layer._values()]

    def _name_faults(self) -> list[str]:
        faults = [f"nodes: {name!r} is an input, too" for name in self.nodes if name in self._inputs]
        faults += [f"nodes: {name!r} should be a name without a dot" for name in self.nodes if "." in name]
        return faults

    def _layer_faults(self) -> list[str]:
        """Return what is wrong with layers by themselves."""
        faults: list[str] = []
        first = next(iter(self.nodes.values())).layer
        for name, (layer, inputs) in self.nodes.items():
            where = f"nodes[{name!r}], {_a(layer)},"
            if layer.dtype != first.dtype:
                faults.append(f"{where} is of {layer.dtype}, not of {first.dtype} as the first")
            if layer.time not in TIMES:
                faults.append(f"{where} has the time {layer.time!r}, not one of {', '.join(map(repr, TIMES))}")
            fault = layer._arity_fault(len(inputs))
            if fault is not None:
                faults.append(f"{where} {fault}")
        twice = found_twice(node.layer for node in self.nodes.values())
        return faults if twice is None else [*faults, f"every layer should be there once, but {twice!r} is there twice"]

    def _unknown(self) -> list[str]:
        """Return the faults of names that nothing has."""
        known = [*self.inputs, *(value for node in self.nodes for value in self.given(node))]
        there = set(known)
        faults: list[str] = []
        reads = [(f"nodes[{name!r}] reads", value) for name, node in self.nodes.items() for value in node.inputs]
        for who, value in [*reads, *((f"outputs: {name!r} is", value) for name, value in self.outputs.items())]:
            if value not in there:
                hint = self._hint(value, known) if len(faults) < HINTS else "is not there"
                faults.append(f"{who} {value!r}, which {hint}")
        faults += [
            f"outputs: {value!r} is an input and not of a node"
            for value in self.outputs.values()
            if value in self._inputs
        ]
        return faults

    def _hint(self, value: str, known: Sequence[str]) -> str:
        """Return why there is no such value."""
        node = value.partition(".")[0]
        if node in self.nodes:
            given = " or ".join(map(repr, self.given(node)))
            return f"there is not: {_a(self.nodes[node].layer)} gives {given}"
        near = difflib.get_close_matches(value, known[: HINTS * 100], 1)
        return "is no input and no node" + (f"; {near[0]!r} may be meant" if near else "")

    def _before(self) -> dict[str, list[str]]:
        """Return of each node the nodes that it reads, each once."""
        return {
            name: list(dict.fromkeys(source for value in node.inputs if (source := self.source(value)) in self.nodes))
            for name, node in self.nodes.items()
        }

    def _sorted(self) -> tuple[list[str], list[str]]:
        """Return the nodes in order of dependency, and the faults of cycles, whose nodes are in no order."""
        before = self._before()
        after: dict[str, list[str]] = {name: [] for name in self.nodes}
        for name, sources in before.items():
            for source in sources:
                after[source].append(name)
        places = {name: place for place, name in enumerate(self.nodes)}
        names = list(self.nodes)
        waits = {name: len(sources) for name, sources in before.items()}
        ready = [places[name] for name, count in waits.items() if not count]  # ascending, which is a heap
        order: list[str] = []
        faults: list[str] = []
        while len(order) < len(self.nodes):
            while ready:
                name = names[heapq.heappop(ready)]
                order.append(name)
                for reader in after[name]:
                    waits[reader] -= 1
                    if not waits[reader]:
                        heapq.heappush(ready, places[reader])
            done = set(order)
            left = {name for name in self.nodes if name not in done}
            if not left or len(faults) == FAULTS_SHOWN:
                break
            cycle = _cycle(next(name for name in self.nodes if name in left), before, left)
            faults.append(f"nodes: {' reads '.join(map(repr, [*cycle, cycle[0]]))}, which is a cycle")
            for name in cycle:  # as if they were done, for the cycles that are left
                waits[name] = -1
                heapq.heappush(ready, places[name])
        return order, faults

    def _unused(self) -> list[str]:
        """Return the faults of nodes and inputs that no output depends on."""
        used: set[str] = set()
        pending = [self.source(value) for value in self.outputs.values()]
        while pending:
            name = pending.pop()
            if name not in used:
                used.add(name)
                pending += [self.source(value) for value in self.nodes[name].inputs] if name in self.nodes else []
        return [
            *(f"nodes[{name!r}] is not used: no output depends on it" for name in self.nodes if name not in used),
            *(f"inputs: {name!r} is not used: no output depends on it" for name in self.inputs if name not in used),
        ]

    def _times(self, static: Iterable[str]) -> tuple[dict[str, Timed], list[str]]:
        """Return which values have an axis of time, and the faults of layers that miss it."""
        unmoving = frozenset(static)
        timed: dict[str, Timed] = {name: name not in unmoving for name in self.inputs}
        faults = []
        for name in self.order:
            layer, inputs = self.nodes[name]
            own = [timed[value] for value in inputs]
            fault = layer._time_fault(own)
            if fault is not None:
                faults.append(f"nodes[{name!r}], {_a(layer)}, {fault}, and reads {' and '.join(map(repr, inputs))}")
            after = layer._times_after(own)
            timed.update({self.value(name, value): after[value] for value in layer._values()})
        return timed, faults

    def widths_from(self, given: Mapping[str, int | None]) -> tuple[dict[str, int | None], list[str]]:
        """Return the sizes of the vectors of all values, given those of inputs, and the faults of those that differ."""
        widths: dict[str, int | None] = {name: given.get(name) for name in self.inputs}
        faults = []
        for name in self.order:
            layer, inputs = self.nodes[name]
            if not declares_widths(layer):
                widths.update(dict.fromkeys(self.given(name)))
                continue
            own = [widths[value] for value in inputs]
            after, fault = layer._widths_through(own)
            if fault is not None:
                faults.append(f"nodes[{name!r}], {layer._brief()}, {fault} as {' and '.join(map(repr, inputs))}")
            widths.update({self.value(name, value): after[value] for value in layer._values()})
        return widths, faults

    def _last_reads(self) -> dict[str, list[str]]:
        kept = set(self.outputs.values())
        spent: dict[str, list[str]] = {}
        seen: set[str] = set()
        for name in reversed(self.order):
            read = dict.fromkeys(value for value in self.nodes[name].inputs if value not in seen and value not in kept)
            spent[name] = list(read)
            seen.update(read)
        return spent


def _a(layer: Layer) -> str:
    return f"a {type(layer).__name__}"


def _cycle(start: str, before: Mapping[str, Sequence[str]], left: set[str]) -> list[str]:
    """Return a cycle among the nodes that are left, each of which reads another of them; each reads the next."""
    path: dict[str, None] = {}
    name = start
    while name not in path:
        path[name] = None
        name = next(source for source in before[name] if source in left)
    walked = list(path)
    return walked[walked.index(name) :]


def _repeated(names: Iterable[str]) -> list[str]:
    seen: set[str] = set()
    return [name for name in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]


def _names(what: str, value: Any, empty: bool = False) -> tuple[str, ...]:
    """Return names that were given as one string or several."""
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, tuple | list):
        raise TypeError(f"{what} should be a name or a tuple of names, not {checks.describe(value)}")
    for name in names:
        _check_name(what, name)
    if not names and not empty:
        raise ValueError(f"{what} should be at least one name")
    return tuple(names)


def _check_name(what: str, name: Any) -> None:
    if not isinstance(name, str) or not name:
        raise TypeError(f"{what} should hold names, strings that are not empty, not {checks.describe(name)}")


def _nodes(value: Any) -> tuple[dict[str, Node], list[str]]:
    """Return nodes by name, and the names that are there twice; given as a mapping or as pairs."""
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, tuple | list):
        raise TypeError(f"nodes should be a mapping from names to nodes, not {checks.describe(value)}")
    if not pairs:
        raise ValueError("nodes should be at least one node")
    nodes: dict[str, Node] = {}
    names = []
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"nodes should hold pairs of a name and a node, not {checks.describe(pair)}")
        name, node = pair
        _check_name("nodes", name)
        if not isinstance(node, tuple | list) or not node:
            raise TypeError(
                f"nodes[{name!r}] should be a tuple of a layer and the names of what it reads, not"
                f" {checks.describe(node)}"
            )
        layer, *inputs = node
        if not isinstance(layer, Layer):
            raise TypeError(f"nodes[{name!r}] should begin with a layer, not {checks.describe(layer)}")
        for read in inputs:
            _check_name(f"nodes[{name!r}]", read)
        names.append(name)
        nodes[name] = Node(layer, tuple(inputs))
    return nodes, _repeated(names)


def _outputs(value: Any) -> tuple[dict[str, str], list[str]]:
    """Return values by the names of outputs, and the names that are there twice."""
    if isinstance(value, Mapping):
        pairs = list(value.items())
        if not pairs:
            raise ValueError("outputs should be at least one name")
    else:
        pairs = [(name, name) for name in _names("outputs", value)]
    for pair in pairs:
        for name in pair:
            _check_name("outputs", name)
    return dict(pairs), _repeated([name for name, _ in pairs])
