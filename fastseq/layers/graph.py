"""A container of layers that read each other's outputs: branches, several inputs, several outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from fastseq import checks
from fastseq.checks import Array
from fastseq.layers.base import POINTWISE, POOLING, SEQUENCE, Tape, child_seed, mask_seed, under
from fastseq.layers.connectable import OUTPUT, Timed, Values
from fastseq.layers.containers import Container, locate, shortened
from fastseq.layers.rows import cleared
from fastseq.layers.wiring import Node, Wiring

_NO_FRAME: Any = None  # what a node gives at a step that completes no window of frames


class Graph(Container):
    """Layers that read inputs and each other's outputs, by name.

    Each node is a layer and the names of what it reads: inputs of the graph or other nodes, in any order of
    declaration. Several may read the same value; its gradient is the sum of theirs.

    `lengths` are passed to every layer whose `time` is not "pointwise"; values with an axis of time are 0 past them. A
    layer that changes the number of steps, as `Conv1d` with a stride, changes the lengths of what it gives.
    Where a pointwise layer of several inputs, as `Add`, `Multiply` or `Concatenate`, reads both values with an axis of
    time and values without one, the latter are repeated at every step. Parameters are named ``<node>.<name>``.

    Parameters
    ----------
    inputs : str or tuple of str
        Names of the inputs.
    nodes : mapping from str to tuple
        By name ``(layer, *names)``: the layer, and what it reads, in the order of its arguments. The outputs of a node
        have its name. A recurrent node also gives the state after the last step of its last layer, directions side by
        side, (B, D * H), as ``<node>.h`` and, of an LSTM, ``<node>.c``. A graph at a node gives its outputs, if it has
        several, as ``<node>.<output>``. Names of nodes have no dots. Every layer is there once, all are of one dtype,
        and an output depends on each.
    outputs : str, tuple of str, or mapping from str to str
        Names of the nodes whose values are outputs; a mapping gives outputs names of their own.
    without_time : str or tuple of str
        Names of inputs without an axis of time, (B, ...): one vector for each row.

    Notes
    -----
    With one input, x is an array, otherwise a mapping from names to arrays, or a tuple in the order of `inputs`. With
    one output, y is an array, otherwise a dict: unlike the fields of a named tuple, outputs may have any names. The
    same holds for gradients.
    """

    def __init__(self, inputs: Any, nodes: Any, outputs: Any, *, without_time: Any = ()) -> None:
        self._wiring = wiring = Wiring(inputs, nodes, outputs, without_time)
        self._children = {name: node.layer for name, node in wiring.nodes.items()}
        self.dtype = next(iter(self._children.values())).dtype
        self._config = {
            "inputs": list(wiring.inputs),
            "nodes": [
                {"name": name, "class": type(layer).__name__, "config": layer._config, "inputs": list(names)}
                for name, (layer, names) in wiring.nodes.items()
            ],
            "outputs": dict(wiring.outputs),
            "without_time": [name for name in wiring.inputs if not wiring.timed[name]],
        }
        self._stateful = tuple(name for name in wiring.order if self._children[name].carries_state)
        self._read = frozenset(value for node in wiring.nodes.values() for value in node.inputs)
        self._time = self._time_of_all()
        self._again = {name: self._repeated(node) for name, node in wiring.nodes.items()}
        self._given = {
            name: {part: wiring.value(name, part) for part in self._children[name]._values()} for name in wiring.order
        }
        self._become_twin_of_twins()

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs."""
        return self._wiring.inputs

    @property
    def nodes(self) -> Mapping[str, Node]:
        """The nodes by name, as they were declared: each has `layer`, and `inputs`, the names of what it reads."""
        return MappingProxyType(self._wiring.nodes)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return tuple(self._wiring.outputs)

    @property
    def time(self) -> str:  # type: ignore[override]
        """How the whole treats the axis of time: "pooling" where no output has one, "sequence" or "pointwise"."""
        return self._time

    @property
    def carries_state(self) -> bool:  # type: ignore[override]
        """Whether one of the nodes carries a state."""
        return bool(self._stateful)

    def __call__(self, x: Any, state: Any = None, *, lengths: Any = None, resets: Any = None) -> Any:
        """Run all nodes; inference.

        Parameters
        ----------
        x : array, or mapping from str to array
            The input; of several a mapping by name, or a tuple in the order of `inputs`. A list of rows of unequal
            lengths is padded, and gives its `lengths`.
        state : dict, optional
            Initial states of the nodes that carry one, as `run` or `initial_state` returned them.
        lengths : array of shape (B,), optional
            The real steps of each row of the inputs (B, T, ...), integers in 0..T in any order. Outputs past them are
            0, and do not depend on inputs past them.
        resets : array of bool of shape (B, T), optional
            True where states are reset to zeros before the step; for the nodes that carry one.

        Returns
        -------
        y : ndarray, or dict of ndarray
            The output; of several a dict by name.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        return self.run(x, state, lengths=lengths, resets=resets)[0]

    def run(self, x: Any, state: Any = None, *, lengths: Any = None, resets: Any = None) -> tuple[Any, Any]:
        """Run all nodes in inference, and return their states.

        Parameters
        ----------
        x, state, lengths, resets
            As of a call.

        Returns
        -------
        y : ndarray, or dict of ndarray
        state : dict, or None
            By name the state of each node that carries one, after the last step of each row; None where no node does.
        """
        states, ends = self._states(state, resets), {}
        values, lengths = self._opened(x, lengths)

        def compute(name: str, node: Node, arrays: list[Array], own: Array | None) -> Values:
            again = resets if node.layer.carries_state else None
            given, ends[name] = node.layer._run_values(arrays, states.get(name), own, again)
            return given

        self._run_nodes(values, self._lengths_by_value(lengths, states), lengths, compute)
        return self._result(values), self._ends(ends)

    def step(self, x_t: Any, state: Any = None) -> tuple[Any, Any]:
        """Run one time step, for streams; the bits are those of a call over all steps.

        Parameters
        ----------
        x_t : array of shape (B, I), or (B,) of ids, or mapping from str to array
            The input at this step; of several a mapping by name, or a tuple in the order of `inputs`. An input without
            an axis of time is passed at every step.
        state : dict, optional
            As returned by the step before, `run` or `initial_state`; zeros by default.

        Returns
        -------
        y_t : ndarray of shape (B, ...), or dict of ndarray
            The output at this step; None where it depends on a window of frames that this step does not complete.
        state : dict, or None
            The argument `state` of the next step, as `run` returns it.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be. Also where a node needs all steps at once: one that
            pools or is bidirectional, attention, positions, or one that reads a last state.
        """
        lost = self._stepless()
        if lost is not None:
            raise ValueError(f"step needs layers that can go on by one step, but {lost}")
        states, ends = self._states(state, None), {}
        values: Values = {}
        for name, value in self._by_name("x_t", x_t).items():
            values[name] = checks.as_array(self._argument("x_t", name), value)
            if not values[name].ndim:
                raise ValueError(
                    f"{self._argument('x_t', name)} should be of shape (B, ...), one step of each row, not ()"
                )
        self._check_agree("x_t", {name: array.shape[:1] for name, array in values.items()}, "(B, ...)")

        rows = len(next(iter(values.values())))

        def compute(name: str, node: Node, arrays: list[Array], own: None) -> Values:
            if self._waits(name, node, arrays):
                layer: Any = node.layer
                waiting = states.get(name)
                ends[name] = layer.initial_state(rows) if waiting is None and layer.carries_state else waiting
                return dict.fromkeys(layer._values(), _NO_FRAME)
            given, ends[name] = node.layer._step_values(arrays, states.get(name))
            return given

        self._run_nodes(values, {}, None, compute, one_step=True)
        return self._result(values), self._ends(ends)

    def _waits(self, name: str, node: Node, arrays: Sequence[Array | None]) -> bool:
        """Return whether what a node reads is not there at this step."""
        missing = {value for value, array in zip(node.inputs, arrays, strict=True) if array is None}
        there = [v for v in node.inputs if v not in missing and self._wiring.timed[v]]
        if missing and there:
            raise ValueError(
                f"nodes[{name!r}] should read values of the same steps, not {sorted(missing)[0]!r}, which has none at"
                f" this one, and {there[0]!r}, which has"
            )
        return bool(missing)

    def _step_on(self, x_t: Any, state: Any) -> tuple[Any, Any]:
        return self.step(x_t, state)

    def _lengths_after(self, lengths: Array, state: Any = None) -> Array:
        return next((own for own in self._lengths_of_values(lengths, state).values()), lengths)

    def _lengths_of_values(self, lengths: Array, state: Any) -> dict[str, Array]:
        found = self._lengths_by_value(lengths, {} if state is None else state)
        outputs = zip(self._values(), self._wiring.outputs.values(), strict=True)
        return {part: found[value] for part, value in outputs if value in found}

    def forward(
        self, x: Any, state: Any = None, *, lengths: Any = None, resets: Any = None, seed: int | None = None
    ) -> tuple[Any, Tape]:
        """Run all nodes in training, with dropout; return outputs and a tape for `backward`.

        Parameters
        ----------
        x, state, lengths, resets
            As for a call. `x` must not be changed while the tape is in use.
        seed : int, optional
            Fixes the masks of dropout, which differ from node to node; drawn by default.

        Returns
        -------
        y : ndarray, or dict of ndarray
            The output; of several a dict by name. Read-only where the tape refers to it.
        tape : Tape
            For `backward`.
        """
        y, _, tape = self.forward_carrying(x, state, lengths=lengths, resets=resets, seed=seed)
        return y, tape

    def forward_carrying(
        self, x: Any, state: Any = None, *, lengths: Any = None, resets: Any = None, seed: int | None = None
    ) -> tuple[Any, Any, Tape]:
        """Run `forward`, and return between y and tape the states, as `run` does."""
        seed = mask_seed(seed)
        states, ends = self._states(state, resets), {}
        values, lengths = self._opened(x, lengths)
        seeds = {name: child_seed(seed, place) for place, name in enumerate(self._children)}
        forms = {name: (array.shape, array.dtype.kind) for name, array in values.items()}
        tapes = {}

        def compute(name: str, node: Node, arrays: list[Array], own: Array | None) -> Values:
            again = resets if node.layer.carries_state else None
            given, ends[name], tapes[name] = node.layer._forward_values(
                arrays, states.get(name), own, again, seeds[name]
            )
            names = self._given[name]
            forms.update({names[part]: (array.shape, array.dtype.kind) for part, array in given.items()})
            return {part: _read_only(array) if names[part] in self._read else array for part, array in given.items()}

        by_value = self._lengths_by_value(lengths, states)
        self._run_nodes(values, by_value, lengths, compute)
        return self._result(values), self._ends(ends), Tape(self, (tapes, forms, by_value))

    def backward(
        self, dy: Any, tape: Tape, *, truncate: int | None = None, grads: Mapping[str, Array] | None = None
    ) -> Any:
        """Compute gradients from that of the outputs.

        Gradients of a value that several nodes read are added in a fixed order: that of the output first, then those
        of its readers, the last to run first.

        Parameters
        ----------
        dy : array, or mapping from str to array
            Of the shape of y; ignored past the length of a row. Of several outputs a mapping by name, in which an
            output may be missing that has no gradient, or a tuple in the order of `outputs`, in which it may be None.
        tape : Tape
            Returned by `forward`.
        truncate : int, optional
            For the nodes that carry a state: how many steps gradients go back, as in recurrent layers.
        grads : mapping from str to ndarray, optional
            Arrays that gradients of parameters are added to; `grads` of the layers by default.

        Returns
        -------
        dx : ndarray of the shape of x, or None; or dict of those
            0 past the length of a row. None where an input is symbols, which have no gradient.
        """
        tapes, forms, by_value = self._kept(tape)
        if truncate is not None and not self.carries_state:
            raise ValueError("truncate should be None where no layer carries a state")
        gradients = self._output_gradients(dy, {value: form[0] for value, form in forms.items()})
        targets = self._child_targets(grads)
        for name in reversed(self._wiring.order):
            layer, names = self._wiring.nodes[name]
            dvalues = self._gradients_of(name, gradients, forms, by_value)
            if not dvalues:
                continue
            found = layer._backward_values(
                dvalues,
                tapes[name],
                len(names),
                truncate if layer.carries_state else None,
                targets[name],
            )
            for value, again, gradient in zip(names, self._again[name], found, strict=True):
                if gradient is not None:
                    _add(gradients, value, gradient[:, 0] if again else gradient)
        return self._input_gradients(gradients, forms, by_value)

    def initial_state(self, batch_size: int) -> Any:
        """Return the default initial states: a dict, as `run` returns it.

        Parameters
        ----------
        batch_size : int
            Rows of the batch, 0 or more.
        """
        count = checks.size("batch_size", batch_size)
        children: dict[str, Any] = {name: self._children[name] for name in self._stateful}
        return {name: layer.initial_state(count) for name, layer in children.items()} or None

    def unstreamable(self) -> str | None:
        """Return why the nodes cannot be trained on consecutive chunks of streams; None where they can."""
        return self._reads_states() or super().unstreamable()

    def _stepless(self) -> str | None:
        faults = ((name, layer._stepless()) for name, layer in self._children.items())
        return self._reads_states() or next((f"nodes[{n!r}]: {why}" for n, why in faults if why is not None), None)

    def _reads_states(self) -> str | None:
        """Return which last state is read, that of all steps; None where none is."""
        wiring = self._wiring
        read = [value for node in wiring.nodes.values() for value in node.inputs] + list(wiring.outputs.values())
        for value in read:
            source = wiring.source(value)
            if source != value and wiring.nodes[source].layer.carries_state and wiring.timed[value] is False:
                return f"{value!r} is a state after all steps, and is read"
        return None

    # Arguments and results.

    def _argument(self, argument: str, name: str) -> str:
        return argument if len(self.inputs) == 1 else f"{argument}[{name!r}]"

    def _by_name(self, argument: str, x: Any) -> dict[str, Any]:
        """Return the inputs by name."""
        names = self.inputs
        if len(names) == 1 and not isinstance(x, Mapping):
            return {names[0]: x}
        if isinstance(x, tuple | list) and len(x) == len(names):
            return dict(zip(names, x, strict=True))
        if not isinstance(x, Mapping):
            raise TypeError(
                f"{argument} should be a mapping from {', '.join(map(repr, names))} to arrays, or a tuple of"
                f" {len(names)}, not {checks.describe(x)}"
            )
        faults = checks.are((repr(name) for name in names if name not in x), "missing")
        faults += checks.are((repr(name) for name in x if name not in names), "unknown")
        if faults:
            raise ValueError(f"{argument} should have the inputs of the graph: {'; '.join(faults)}")
        return {name: x[name] for name in names}

    def _opened(self, x: Any, lengths: Any) -> tuple[Values, Array | None]:
        """Return the inputs by name and the lengths, after the checks that do not depend on layers."""
        given, timed = self._by_name("x", x), self._wiring.timed
        ragged = None
        for name, value in given.items():
            if timed[name]:
                given[name], own = checks.ragged(self._argument("x", name), value, lengths)
                if own is not lengths:
                    if ragged is not None and not np.array_equal(own, ragged):
                        raise ValueError(f"x[{name!r}] should have rows of {ragged.tolist()} steps, not {own.tolist()}")
                    ragged = own
        values = {name: checks.as_array(self._argument("x", name), value) for name, value in given.items()}
        lengths = lengths if ragged is None else ragged
        for name, array in values.items():
            if lengths is not None and timed[name] and array.ndim < 2:
                raise ValueError(
                    f"{self._argument('x', name)} should be of shape (B, T, ...) where lengths are given, not"
                    f" {array.shape}"
                )
        if None not in timed.values():  # no operator on whole arrays, in which the batch may be another axis
            self._check_agree("x", {name: array.shape[:1] for name, array in values.items()}, "(B, ...)")
        if lengths is None:
            return values, None
        moving = {name: array.shape[:2] for name, array in values.items() if timed[name]}
        if not moving:
            raise ValueError("lengths should be None: no input has an axis of time")
        self._check_agree("x", moving, "(B, T, ...)")
        checked = checks.lengths(lengths, *next(iter(moving.values())))
        for name in moving:
            if values[name].dtype.kind in "fiu":
                values[name] = cleared(values[name], checked)
        return values, checked

    def _check_agree(self, argument: str, shapes: Mapping[str, tuple[int, ...]], form: str) -> None:
        """Raise an error where the first axes of inputs differ."""
        if len(set(shapes.values())) > 1:
            told = ", ".join(f"{name!r} {shape}" for name, shape in shapes.items())
            raise ValueError(f"{argument} should have inputs {form} that agree in the first axes, not {told}")

    def _states(self, state: Any, resets: Any) -> Mapping[str, Any]:
        """Check the states; return them by node, none of those that start from zeros."""
        if not self._stateful:
            self._check_no_state(state, resets)
        if state is None:
            return {}
        names = " and ".join(map(repr, self._stateful))
        if not isinstance(state, Mapping):
            raise TypeError(f"state should be a mapping with the states of {names}, not {checks.describe(state)}")
        if set(state) != set(self._stateful):
            raise ValueError(f"state should have the states of {names}, not of {', '.join(map(repr, state))}")
        return state

    def _ends(self, ends: Mapping[str, Any]) -> dict[str, Any] | None:
        return {name: ends[name] for name in self._stateful} or None

    def _result(self, values: Values) -> Any:
        outputs = self._wiring.outputs
        if len(outputs) == 1:
            return next(values[value] for value in outputs.values())
        return {name: values[value] for name, value in outputs.items()}

    # Nodes.

    def _time_of_all(self) -> str:
        wiring = self._wiring
        times = {layer.time for layer in self._children.values()}
        without = all(wiring.timed[value] is False for value in wiring.outputs.values())
        if without and (times != {POINTWISE} or self._reads_states() is not None):
            return POOLING
        return POINTWISE if times == {POINTWISE} else SEQUENCE

    def _repeated(self, node: Node) -> list[bool]:
        """Return which of the values that a node reads are repeated at every step."""
        timed = [self._wiring.timed[name] for name in node.inputs]
        mixed = node.layer.time == POINTWISE and True in timed and not isinstance(node.layer, Graph)
        return [mixed and one is False for one in timed]

    def _lengths_by_value(self, lengths: Array | None, states: Mapping[str, Any]) -> dict[str, Array]:
        """Return the lengths of each value that has an axis of time; none without lengths."""
        if lengths is None:
            return {}
        timed = self._wiring.timed
        found = {name: lengths for name in self.inputs if timed[name]}
        for name, names in self._given.items():
            node = self._wiring.nodes[name]
            read = {value: found[value] for value in node.inputs if value in found}
            first = next(iter(read), None)
            for value, own in read.items():
                if first is not None and not np.array_equal(own, read[first]):
                    raise ValueError(
                        f"nodes[{name!r}] should read values of the same lengths, not {first!r} of"
                        f" {read[first].tolist()} and {value!r} of {own.tolist()}"
                    )
            after = node.layer._lengths_of_values(lengths if first is None else read[first], states.get(name))
            found |= {value: after[part] for part, value in names.items() if timed[value] and part in after}
        return found

    def _run_nodes(
        self,
        values: Values,
        by_value: Mapping[str, Array],
        lengths: Array | None,
        compute: Callable[[str, Node, list[Array], Any], Values],
        one_step: bool = False,
    ) -> None:
        """Run all nodes in order, and add what they give to the values; those that nobody reads any more are dropped.

        ``compute(name, node, arrays, lengths)`` returns what a node gives. `by_value` are the lengths of values;
        `lengths` those of the inputs, for nodes of which nobody knows. With `one_step` no array has an axis of time.
        """
        timed = self._wiring.timed
        for name, names in self._given.items():
            node, again = self._wiring.nodes[name], self._again[name]
            arrays = [values[value] for value in node.inputs]
            if not one_step and True in again:
                arrays = [array[:, None] if one else array for array, one in zip(arrays, again, strict=True)]
            own = next((by_value[value] for value in node.inputs if value in by_value), None)
            if own is None and not all(timed[value] is False for value in node.inputs):
                own = lengths
            try:
                given = compute(name, node, arrays, own)
            except (TypeError, ValueError) as error:
                locate(error, f"nodes[{name!r}]", node.layer)
                raise
            for part, array in given.items():
                value = names[part]
                values[value] = cleared(array, by_value[value]) if value in by_value else array
            for value in self._wiring.spent[name]:
                del values[value]

    # Gradients.

    def _output_gradients(self, dy: Any, shapes: Mapping[str, tuple[int, ...]]) -> Values:
        """Return the gradients of values that are outputs, of those that have one."""
        outputs = self._wiring.outputs
        if len(outputs) == 1:
            ((name, value),) = outputs.items()
            dy = dy[name] if isinstance(dy, Mapping) and set(dy) == {name} else dy
            return {value: checks.like("dy", dy, self.dtype, shapes[value])}
        if isinstance(dy, tuple | list) and len(dy) == len(outputs):
            dy = {name: array for name, array in zip(outputs, dy, strict=True) if array is not None}
        if not isinstance(dy, Mapping):
            raise TypeError(
                f"dy should be a mapping from {', '.join(map(repr, outputs))} to arrays, or a tuple of {len(outputs)},"
                f" not {checks.describe(dy)}"
            )
        unknown = checks.are((repr(name) for name in dy if name not in outputs), "unknown")
        if unknown:
            raise ValueError(f"dy should have outputs of the graph: {'; '.join(unknown)}")
        gradients: Values = {}
        for name, value in outputs.items():
            if name in dy:
                _add(gradients, value, checks.like(f"dy[{name!r}]", dy[name], self.dtype, shapes[value]))
        return gradients

    def _gradients_of(
        self, node: str, gradients: Values, forms: Mapping[str, Any], by_value: Mapping[str, Array]
    ) -> Values:
        """Take the gradients of the values that a node gives, by their names in its layer; empty without any."""
        dvalues: Values = {}
        for name, value in self._given[node].items():
            if value in gradients:
                array = gradients.pop(value)
                dvalues[name] = cleared(array, by_value[value]) if value in by_value else array
        if dvalues and OUTPUT not in dvalues and OUTPUT in self._given[node]:
            dvalues[OUTPUT] = np.zeros(forms[node][0], self.dtype)
        return dvalues

    def _input_gradients(self, gradients: Values, forms: Mapping[str, Any], by_value: Mapping[str, Array]) -> Any:
        """Return the gradients of the inputs; zeros of real numbers that no gradient reached."""
        found: dict[str, Array | None] = {}
        for name in self.inputs:
            shape, kind = forms[name]
            array = gradients.get(name)
            if array is not None:
                array = cleared(array, by_value[name]) if name in by_value else array
            elif kind == "f":
                array = np.zeros(shape, self.dtype)
            found[name] = array
        return found if len(found) > 1 else found[self.inputs[0]]

    def backward_carrying(
        self, dy: Any, tape: Tape, *, truncate: int | None = None, grads: Mapping[str, Array] | None = None
    ) -> Any:
        """Run `backward`, as of any layer."""
        return self.backward(dy, tape, truncate=truncate, grads=grads)

    # A graph at a node of another.

    def _values(self) -> tuple[str, ...]:
        return (OUTPUT,) if len(self.outputs) == 1 else self.outputs

    def _arity_fault(self, count: int) -> str | None:
        return None if count == len(self.inputs) else f"has {len(self.inputs)} inputs, not {count}"

    def _times_after(self, timed: Sequence[Timed]) -> dict[str, Timed]:
        own = [self._wiring.timed[value] for value in self._wiring.outputs.values()]
        return dict(zip(self._values(), own, strict=True))

    def _time_fault(self, timed: Sequence[Timed]) -> str | None:
        for name, given in zip(self.inputs, timed, strict=True):
            if given is not None and given is not self._wiring.timed[name]:
                return f"takes {name!r} with{'' if self._wiring.timed[name] else 'out'} an axis of time"
        return None

    def _widths_through(self, widths: Sequence[int | None]) -> tuple[dict[str, int | None], str | None]:
        after, faults = self._wiring.widths_from(dict(zip(self.inputs, widths, strict=True)))
        fault = f"cannot take these sizes, since {faults[0]}," if faults else None
        return dict(zip(self._values(), (after[value] for value in self._wiring.outputs.values()), strict=True)), fault

    def _run_values(
        self, arrays: Sequence[Array], state: Any, lengths: Array | None, resets: Any
    ) -> tuple[Values, Any]:
        y, end = self.run(dict(zip(self.inputs, arrays, strict=True)), state, lengths=lengths, resets=resets)
        return (y if len(self.outputs) > 1 else {OUTPUT: y}), end

    def _forward_values(
        self, arrays: Sequence[Array], state: Any, lengths: Array | None, resets: Any, seed: int
    ) -> tuple[Values, Any, Tape]:
        x = dict(zip(self.inputs, arrays, strict=True))
        y, end, tape = self.forward_carrying(x, state, lengths=lengths, resets=resets, seed=seed)
        return (y if len(self.outputs) > 1 else {OUTPUT: y}), end, tape

    def _backward_values(
        self, dvalues: Mapping[str, Array], tape: Tape, count: int, truncate: int | None, grads: Any
    ) -> tuple[Array | None, ...]:
        dy = dvalues if len(self.outputs) > 1 else dvalues[OUTPUT]
        found = self.backward(dy, tape, truncate=truncate, grads=grads)
        return tuple(found[name] for name in self.inputs) if count > 1 else (found,)

    def _step_values(self, arrays: Sequence[Array], state: Any) -> tuple[Values, Any]:
        y, end = self.step(dict(zip(self.inputs, arrays, strict=True)), state)
        return (y if len(self.outputs) > 1 else {OUTPUT: y}), end

    # Widths in a `Sequential`.

    def _takes(self) -> int | None:
        if len(self.inputs) > 1:
            return None
        readers = (node for node in self._wiring.nodes.values() if node.inputs[:1] == self.inputs)
        return next((takes for layer, _ in readers if (takes := layer._takes()) is not None), None)

    def _width_after(self, width: int | None) -> int | None:
        widths, _ = self._wiring.widths_from({self.inputs[0]: width})
        return next(widths[value] for value in self._wiring.outputs.values())

    def _gives(self) -> int | None:
        return next(self._wiring.widths[value] for value in self._wiring.outputs.values())

    # Files, copies, descriptions.

    def _declaration(self, layers: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the arguments of a graph of these nodes and other layers."""
        nodes = {name: (layers[name], *names) for name, (_, names) in self._wiring.nodes.items()}
        return self.inputs, nodes, dict(self._wiring.outputs), tuple(self._config["without_time"])

    def _made_of(self, layers: Mapping[str, Any]) -> Graph:
        inputs, nodes, outputs, static = self._declaration(layers)
        return type(self)(inputs, nodes, outputs, without_time=static)

    def _restored(self, arrays: Mapping[str, Any], weight_type: str) -> Graph:
        children = self._children.items()
        return self._made_of({name: layer._restored(under(name, arrays), weight_type) for name, layer in children})

    def __getstate__(self) -> dict[str, Any]:
        return {"declaration": self._declaration(self._children)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        inputs, nodes, outputs, static = state["declaration"]
        self.__init__(inputs, nodes, outputs, without_time=static)  # type: ignore[misc]
        self._freeze()

    def __copy__(self) -> Graph:
        return self._made_of({name: copy.copy(layer) for name, layer in self._children.items()})

    def _brief(self) -> str:
        nodes = shortened([f"{name!r}: {layer._brief()}" for name, layer in self._children.items()])
        inputs, outputs = (names[0] if len(names) == 1 else names for names in (self.inputs, self.outputs))
        return f"{type(self).__name__}({inputs!r}, {{{', '.join(nodes)}}}, {outputs!r})"

    def _summary_rows(
        self, prefix: str, timed: bool = True, width: int | None = None
    ) -> list[tuple[str, str, str, int]]:
        rows = []
        given = {} if width is None else {self.inputs[0]: width}
        widths, _ = self._wiring.widths_from(given)
        for name, (layer, names) in self._wiring.nodes.items():
            own = f"{prefix}.{name}" if prefix else name
            if isinstance(layer, Container):
                rows.append((own, f"{', '.join(names)} -> {type(layer).__name__} of", "", 0))
                rows += layer._summary_rows(own, True, widths[names[0]] if names else None)
                continue
            has_time = timed and self._wiring.timed[name] is not False
            known = widths[name]
            form = "" if known is None else f"(B, {'T, ' if has_time else ''}{known})"
            rows.append((own, f"{', '.join(names)} -> {layer._brief()}", form, layer._count()))
        return rows


def _add(gradients: Values, value: str, gradient: Array) -> None:
    """Add a gradient to that of a value; no array is changed, since others may hold it."""
    gradients[value] = gradients[value] + gradient if value in gradients else gradient


def _read_only(array: Array) -> Array:
    view = array.view()
    view.flags.writeable = False
    return view
