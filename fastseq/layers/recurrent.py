"""RNN, LSTM and GRU: parameters, states, shapes. The arithmetic is in the operations they call."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, overload

import numpy as np

from fastseq import checks, elsewhere, threads
from fastseq.checks import Array
from fastseq.layers.base import SEQUENCE, Configured, Tape, mask_seed
from fastseq.layers.connectable import OUTPUT, Timed, Values
from fastseq.layers.derived import Derived
from fastseq.layers.settings import KW_ONLY, Dtype, choice, flag, floating, fraction, random_seed, size
from fastseq.state import LSTMState, State, adopt

NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")  # of one direction of one layer; see `_vectors`
MAX_LAYERS = 1024  # nobody stacks more, and each is some Python objects


class Kept(NamedTuple):
    """What is on the tape of a recurrent layer."""

    tapes: tuple[Any, ...]  # one a layer, of the operation
    batched: bool
    y_shape: tuple[int, ...]  # with the batch
    seed: int | None  # of the masks between layers; None: there are none


class Recurrent(Configured):
    """What the three recurrent layers share."""

    time = SEQUENCE
    carries_state = True

    _gates: ClassVar[int]
    _state_class: ClassVar[type[State]] = State

    proj_size: ClassVar[int] = 0  # except where a class has such a setting

    input_size: int = size(doc="I.")
    hidden_size: int = size(doc="H.")
    num_layers: int = size(default=1, limit=MAX_LAYERS, doc="Layers stacked; each takes the outputs of the one below.")
    _: KW_ONLY
    bias: bool = flag(default=True, doc="Whether there are biases.")
    dropout: float = fraction(
        default=0.0,
        doc="Share of the outputs between layers that training drops; calls and steps are inference and drop none.",
    )
    bidirectional: bool = flag(default=False, doc="Whether a second set of weights reads each row from its end.")
    dtype: Dtype = floating(default="float32", of="parameters, states and outputs")
    seed: int | None = random_seed(default=None, doc="Fixes the initial parameters, uniform in ±1/sqrt(H).")

    @abstractmethod
    def _kind(self) -> str:
        """The name that operations have for the cell."""

    def _vectors(self) -> dict[str, int]:
        """Parameters of one direction of one layer beside `NAMES`, in the order of the operations: their sizes."""
        return {}

    def _build(self) -> None:
        self._cell = self._kind()
        self._directions = 2 if self.bidirectional else 1
        self._slots = self.num_layers * self._directions
        self._output_size = self.proj_size or self.hidden_size
        self._packed: Derived[Any] = Derived()
        super()._build()

    def _advice(self) -> str | None:
        return advice_on_dropout(self.dropout, self.num_layers)

    def _initial(self, rng: np.random.Generator) -> dict[str, Array]:
        bound = 1 / np.sqrt(self.hidden_size)
        return {name: rng.uniform(-bound, bound, shape) for name, shape in self._parameter_shapes().items()}

    def _gives(self) -> int:
        return self._directions * self._output_size

    def _takes(self) -> int:
        return self.input_size

    def _parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        rows, outputs = self._gates * self.hidden_size, self._output_size
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(self.num_layers):
            inputs = self.input_size if layer == 0 else self._directions * outputs
            for direction in range(self._directions):
                suffix = _suffix(layer, direction)
                shapes[f"weight_ih_{suffix}"] = (rows, inputs)
                shapes[f"weight_hh_{suffix}"] = (rows, outputs)
                if self.bias:
                    shapes[f"bias_ih_{suffix}"] = (rows,)
                    shapes[f"bias_hh_{suffix}"] = (rows,)
                if self.proj_size:
                    shapes[f"weight_hr_{suffix}"] = (outputs, self.hidden_size)
                shapes.update({f"{name}_{suffix}": (size,) for name, size in self._vectors().items()})
        return shapes

    def _row_blocks(self, name: str) -> list[int]:
        rows = len(self._arrays[name])
        return [rows] if name.startswith("weight_hr") else [rows // self._gates] * self._gates

    def _cells(self) -> Any:
        """The weights as the operations want them: one cell for each layer and direction."""
        return self._packed.get(self._arrays, self._pack)

    def _pack(self, arrays: Mapping[str, Array]) -> Any:
        return tuple(
            tuple(self._backend.recurrent.pack(self._cell, *weights) for weights in self._by_direction(arrays, layer))
            for layer in range(self.num_layers)
        )

    def _product_groups(self, prefix: str) -> list[tuple[str, ...]]:
        """What multiplies the input and what multiplies the state are added in one sum; a projection is for itself."""
        suffixes = [_suffix(layer, d) for layer in range(self.num_layers) for d in range(self._directions)]
        groups = [(f"{prefix}weight_ih_{suffix}", f"{prefix}weight_hh_{suffix}") for suffix in suffixes]
        return groups + [(f"{prefix}weight_hr_{suffix}",) for suffix in suffixes if self.proj_size]

    def _by_direction(self, arrays: Mapping[str, Array], layer: int) -> tuple[tuple[Any, ...], ...]:
        """The arrays of one layer in the order the operations have them; None for what it does not have."""
        suffixes = [_suffix(layer, direction) for direction in range(self._directions)]
        names = (*NAMES, *self._vectors())
        return tuple(tuple(arrays.get(f"{name}_{suffix}") for name in names) for suffix in suffixes)

    def _slots_of(self, layer: int) -> slice:
        """Where a layer's states stand among those of all layers."""
        return slice(layer * self._directions, (layer + 1) * self._directions)

    def initial_state(self, batch_size: int) -> State:
        """The state of zeros that a sequence starts from when none is given.

        Parameters
        ----------
        batch_size : int
            Rows of the batch, 0 or more.
        """
        h, c = self._zeros(checks.size("batch_size", batch_size))
        return self._state_class(h) if c is None else LSTMState(h, c)

    def _zeros(self, batch: int) -> tuple[Array, Array | None]:
        h = np.zeros((batch, self._slots, self._output_size), self.dtype)
        c = np.zeros((batch, self._slots, self.hidden_size), self.dtype) if self._state_class is LSTMState else None
        return h, c

    def _state_arrays(self, state: Any, batch: int, time: int, argument: str = "state") -> tuple[Array, Array | None]:
        """The arrays of a state in any of the forms it may be given in, for `batch` rows of `time` steps."""
        if state is None:
            return self._zeros(batch)
        wants = self._state_class
        if isinstance(state, State):
            if type(state) is not wants:
                raise TypeError(f"{argument} should be a {wants.__name__}, not a {type(state).__name__}")
            given = tuple(state)
        elif wants is LSTMState:
            if not isinstance(state, tuple | list) or len(state) != 2:
                raise TypeError(f"{argument} should be an LSTMState or a pair (h, c), not {checks.describe(state)}")
            given = tuple(state)
        else:
            given = (state,)
        arrays = []
        for part, value, width in zip("hc", given, (self._output_size, self.hidden_size), strict=False):
            array = checks.real_array(f"{argument}.{part}", value, self.dtype)
            wanted = (batch, self._slots, width)
            if array.shape != wanted:
                hint = ""
                if array.ndim == 3 and array.shape == (self._slots, batch, width):
                    hint = "; it looks like (num_layers * D, B, H): the batch comes first here, pass swapaxes(0, 1)"
                elif array.shape == (time, self._slots, width):
                    hint = "; x looks like (T, B, I): the batch comes first here, pass x.swapaxes(0, 1)"
                raise ValueError(f"{argument}.{part} should be of shape {wanted}, not {array.shape}{hint}")
            arrays.append(array)
        return arrays[0], (arrays[1] if wants is LSTMState else None)

    @overload
    def __call__(
        self, x: Any, state: Any = ..., *, lengths: Any = ..., resets: Any = ..., return_gates: Literal[False] = ...
    ) -> tuple[Array, State]: ...

    @overload
    def __call__(
        self, x: Any, state: Any = ..., *, lengths: Any = ..., resets: Any = ..., return_gates: Literal[True]
    ) -> tuple[Array, State, dict[str, Array]]: ...

    @elsewhere.hiding_unknown
    def __call__(
        self,
        x: Any,
        state: Any = None,
        *,
        lengths: Any = None,
        resets: Any = None,
        return_gates: Any = False,
        **unknown: Any,
    ) -> Any:
        """Run whole sequences; inference.

        Parameters
        ----------
        x : array of shape (B, T, I), or (T, I) for one sequence without a batch; or list of arrays (T_i, I)
            Real floating numbers. A list of rows of unequal lengths is padded, and gives its `lengths`.
        state : state, array (RNN, GRU) or pair of arrays (LSTM), optional
            Where each row starts, (B, num_layers * D, H); zeros by default.
        lengths : array of shape (B,), optional
            The real steps of each row, integers in 0..T in any order; (1,) for one sequence. Past them `y` is 0
            and nothing in `x` matters; the state returned is the one after the last real step.
        resets : array of bool of shape (B, T), or (T,), optional
            True where a row's state goes back to zeros before the step; the reverse direction, which comes to a step
            from the one after it, drops the state it comes with.
        return_gates : bool
            Whether to return what stood in the gates as well.

        Returns
        -------
        y : ndarray of shape (B, T, D * H), or (T, D * H)
            The outputs of the last layer at every step, forward then reverse.
        state : State or LSTMState
            Where each row ends.
        gates : dict of ndarrays of shape (B, T, num_layers * D, H), or (T, num_layers * D, H)
            With `return_gates`: "i", "f", "g", "o" and the cell state "c" of an LSTM, "r", "z" and "n" of a GRU, and
            "h", the outputs of every layer. 0 past a row's length.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        if unknown:
            elsewhere.refuse_unknown(f"a call of {type(self).__name__}", type(self).__call__, unknown)
        cells = self._cells()
        if isinstance(x, list | tuple):
            x, lengths = checks.ragged("x", x, lengths)
        if type(state) is self._state_class and self._backend.recurrent.fits(cells, x, 3, state, None):
            h, c = state.h, getattr(state, "c", None)
            batched = True
        else:
            x, h, c, batched = self._check_call(x, state)
        if lengths is not None:
            lengths = checks.lengths(lengths, *x.shape[:2])
        if resets is not None:
            resets = checks.resets(resets, x.shape[0], x.shape[1], batched)
        if return_gates is not False and checks.flag("return_gates", return_gates):
            y, end, tapes = self._through(cells, x, h, c, lengths, resets, None)
            of_layers = [self._backend.recurrent.gates(tape) for tape in tapes]
            gates = {name: _joined([gates[name] for gates in of_layers]) for name in of_layers[0]}
            y.flags.writeable = True  # nobody has the tape; and h, which it shares with y, becomes a copy
            gates["h"] = gates["h"].copy() if len(tapes) == 1 else gates["h"]
            return (y, end, gates) if batched else (y[0], end, {name: array[0] for name, array in gates.items()})
        y, h, c = self._backend.recurrent.run(cells, x, h, c, lengths, resets, threads.get_num_threads())
        return (y if batched else y[0]), adopt(h, c)

    def _check_call(self, x: Any, state: Any) -> tuple[Array, Array, Array | None, bool]:
        """Inputs and state as the operations want them, and whether there was a batch."""
        x = checks.real_array("x", x, self.dtype)
        batched = x.ndim == 3
        if x.ndim not in (2, 3) or x.shape[-1] != self.input_size:
            raise ValueError(f"x should be of shape (B, T, {self.input_size}), not {x.shape}")
        if not batched:
            x = x[None]
        return x, *self._state_arrays(state, *x.shape[:2]), batched

    def _through(
        self,
        cells: Any,
        x: Array,
        h: Array,
        c: Array | None,
        lengths: Array | None,
        resets: Array | None,
        seed: int | None,
    ) -> tuple[Array, State, tuple[Any, ...]]:
        """All layers, dropout between them where there is a seed, and the tape of each."""
        n_threads = threads.get_num_threads()
        h_n, c_n = self._zeros(x.shape[0])
        tapes = []
        for layer, directions in enumerate(cells):
            if layer and seed is not None:
                x = self._backend.dense.dropout(x, self.dropout, seed, layer - 1, n_threads)
            slots = self._slots_of(layer)
            c_0 = None if c is None else c[:, slots]
            x, h_n[:, slots], end, tape = self._backend.recurrent.forward(
                directions, x, h[:, slots], c_0, lengths, resets, n_threads
            )
            if c_n is not None:
                c_n[:, slots] = end
            tapes.append(tape)
        return x, _state_of(h_n, c_n), tuple(tapes)

    def forward(
        self, x: Any, state: Any = None, *, lengths: Any = None, resets: Any = None, seed: Any = None
    ) -> tuple[Array, State, Tape]:
        """Run whole sequences for training: what a call gives, except dropout, and what `backward` needs.

        Parameters
        ----------
        x, state, lengths, resets
            As for a call. The tape refers to `x`, where no conversion was needed: leave it as it is until `backward`.
        seed : int, optional
            Fixes what dropout drops; by default another one each time.

        Returns
        -------
        y : ndarray of shape (B, T, D * H), or (T, D * H)
            The outputs of the last layer. Read-only, since the tape refers to them.
        state : State or LSTMState
            Where each row ends.
        tape : Tape
            For `backward`.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        cells = self._cells()
        given = state
        x, lengths = checks.ragged("x", x, lengths)
        x, h, c, batched = self._check_call(x, state)
        if given is not None and not isinstance(given, State):
            h, c = h.copy(), None if c is None else c.copy()  # whoever holds these arrays may change them
        if lengths is not None:
            lengths = checks.lengths(lengths, *x.shape[:2])
        if resets is not None:
            resets = checks.resets(resets, x.shape[0], x.shape[1], batched)
        masks: int | None = mask_seed(seed)
        if self.dropout == 0 or self.num_layers == 1:
            masks = None
        y, end, tapes = self._through(cells, x, h, c, lengths, resets, masks)
        y.flags.writeable = False
        return (y if batched else y[0]), end, Tape(self, Kept(tapes, batched, y.shape, masks))

    def backward(
        self, dy: Any, tape: Tape, *, dstate: Any = None, truncate: Any = None, grads: Any = None
    ) -> tuple[Array, State]:
        """Backpropagation through time [1]_: gradients of the inputs, the initial state and all parameters.

        Parameters
        ----------
        dy : array of shape (B, T, D * H), or (T, D * H)
            The gradient of the loss with respect to the `y` of `forward`. Past a row's length nothing in it matters.
        tape : Tape
            What `forward` returned.
        dstate : state, array (RNN, GRU) or pair of arrays (LSTM), optional
            The gradient with respect to the state that `forward` returned; zeros by default.
        truncate : int, optional
            k: no gradient crosses from step mk to step mk - 1 of a layer's state, counted in each direction's own
            order from its first real step. The initial state has the gradient of the first k steps. Between layers
            nothing is cut.
        grads : mapping from the name of every parameter to an array, optional
            What the gradients are added to; by default the arrays in `grads` of the layer.

        Returns
        -------
        dx : ndarray of the shape of x
            The gradient with respect to `x`: 0 past a row's length.
        dstate : State or LSTMState
            The gradient with respect to the state that `forward` started from.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.

        References
        ----------
        .. [1] P. J. Werbos, "Backpropagation through time: what it does and how to do it", Proceedings of the IEEE
           78, 1990.
        """
        dx, start, _ = self._back(dy, tape, dstate, truncate, grads, False)
        return dx, start

    def _flow(self, dy: Any, tape: Tape, dstate: Any) -> tuple[Array, Array | None]:
        """The gradients of h and c after every step: (B, T, num_layers * D, H). Nothing is added anywhere."""
        nowhere = {name: np.zeros_like(array) for name, array in self._arrays.items()}
        _, _, flows = self._back(dy, tape, dstate, None, nowhere, True)
        c = [flow[1] for flow in flows]
        return _joined([flow[0] for flow in flows]), (None if c[0] is None else _joined(c))

    def _back(
        self, dy: Any, tape: Any, dstate: Any, truncate: Any, grads: Any, keep: bool
    ) -> tuple[Array, State, list[Any]]:
        """Undo `forward`; with `keep` what the operation kept of each layer as well."""
        kept: Kept = self._kept(tape)
        dy = checks.real_array("dy", dy, self.dtype)
        shape = kept.y_shape if kept.batched else kept.y_shape[1:]
        if dy.shape != shape:
            raise ValueError(f"dy should be of the shape of y, {shape}, not {dy.shape}")
        dy = dy.reshape(kept.y_shape) if kept.batched else dy[None]
        dh = dc = None
        if dstate is not None:
            dh, dc = self._state_arrays(dstate, kept.y_shape[0], kept.y_shape[1], "dstate")
        truncate = None if truncate is None else checks.size("truncate", truncate, 1)
        grads = self._targets(grads)
        n_threads = threads.get_num_threads()
        dh_0, dc_0 = self._zeros(kept.y_shape[0])
        flows: list[Any] = [None] * self.num_layers
        for layer in reversed(range(self.num_layers)):
            slots = self._slots_of(layer)
            dy, dh_0[:, slots], start, flows[layer] = self._backend.recurrent.backward(
                kept.tapes[layer],
                dy,
                None if dh is None else dh[:, slots],
                None if dc is None else dc[:, slots],
                truncate,
                self._by_direction(grads, layer),
                keep,
                n_threads,
            )
            if dc_0 is not None:
                dc_0[:, slots] = start
            if layer and kept.seed is not None:
                dy = self._backend.dense.dropout(dy, self.dropout, kept.seed, layer - 1, n_threads)
        return (dy if kept.batched else dy[0]), _state_of(dh_0, dc_0), flows

    def step(self, x_t: Any, state: Any = None, *, out: Array | None = None) -> tuple[Array, State]:
        """Run one time step, for streams.

        Parameters
        ----------
        x_t : array of shape (B, I)
            The input at this step.
        state : state, array (RNN, GRU) or pair of arrays (LSTM), optional
            What the step before returned; zeros by default.
        out : ndarray of shape (B, H) in the dtype of the layer, optional
            Where the outputs are written; any strides. Without it a new array is made.

        Returns
        -------
        y_t : ndarray of shape (B, H)
            The outputs of the last layer: `out`, where it was given.
        state : State or LSTMState
            To be given to the next step.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be. Also for a bidirectional layer, whose
            reverse direction has no next step.
        """
        cells = self._cells()
        if type(state) is self._state_class and self._backend.recurrent.fits(cells, x_t, 2, state, out):
            h, c = state.h, getattr(state, "c", None)
        else:
            x_t, h, c = self._check_step(x_t, state, out)
        y, h, c = self._backend.recurrent.step(cells, x_t, h, c, out, threads.get_num_threads())
        return y, adopt(h, c)

    def _step_on(self, x_t: Array, state: Any) -> tuple[Array, State]:
        return self.step(x_t, state)

    def _last_states(self, state: State) -> Values:
        """Return the arrays of a state in the last layer, directions side by side: (B, D * H)."""
        last = {name: array[:, -self._directions :] for name, array in zip(state._fields, state, strict=True)}
        return {name: array.reshape(len(array), self._directions * array.shape[2]) for name, array in last.items()}

    def _values(self) -> tuple[str, ...]:
        return OUTPUT, *self._state_class._fields

    def _times_after(self, timed: Sequence[Timed]) -> dict[str, Timed]:
        return super()._times_after(timed) | dict.fromkeys(self._state_class._fields, False)

    def _widths_through(self, widths: Sequence[int | None]) -> tuple[dict[str, int | None], str | None]:
        after, fault = super()._widths_through(widths)
        sizes = {"h": self._directions * self._output_size, "c": self._directions * self.hidden_size}
        return after | {name: sizes[name] for name in self._state_class._fields}, fault

    def _run_values(
        self, arrays: Sequence[Array], state: Any, lengths: Array | None, resets: Any
    ) -> tuple[Values, State]:
        values, end = super()._run_values(arrays, state, lengths, resets)
        return values | self._last_states(end), end

    def _forward_values(
        self, arrays: Sequence[Array], state: Any, lengths: Array | None, resets: Any, seed: int
    ) -> tuple[Values, State, Tape]:
        values, end, tape = super()._forward_values(arrays, state, lengths, resets, seed)
        return values | self._last_states(end), end, tape

    def _backward_values(
        self, dvalues: Mapping[str, Array], tape: Tape, count: int, truncate: int | None, grads: Any
    ) -> tuple[Array | None, ...]:
        if len(dvalues) == 1:
            return super()._backward_values(dvalues, tape, count, truncate, grads)
        batch = len(dvalues[OUTPUT])
        arrays = [array for array in self._zeros(batch) if array is not None]
        for name, array in zip(self._state_class._fields, arrays, strict=True):
            if name in dvalues:
                array[:, -self._directions :] = dvalues[name].reshape(batch, self._directions, array.shape[2])
        dstate = self._state_class(*arrays)
        return (self.backward(dvalues[OUTPUT], tape, dstate=dstate, truncate=truncate, grads=grads)[0],)

    def _check_step(self, x_t: Any, state: Any, out: Any) -> tuple[Array, Array, Array | None]:
        """The arguments of a step as the operations want them; what is wrong with them, if anything."""
        if self.bidirectional:
            raise ValueError("step needs a layer that is not bidirectional: the reverse direction starts at the end")
        x = checks.real_array("x_t", x_t, self.dtype)
        if x.ndim != 2 or x.shape[1] != self.input_size:
            raise ValueError(f"x_t should be of shape (B, {self.input_size}), not {x.shape}")
        batch = x.shape[0]
        h, c = self._state_arrays(state, batch, batch)
        if out is not None:
            if type(out) is not np.ndarray or out.dtype != self.dtype:
                raise TypeError(f"out should be an array of {self.dtype}, not {checks.describe(out)}")
            if out.shape != (batch, self._output_size):
                raise ValueError(f"out should be of shape ({batch}, {self._output_size}), not {out.shape}")
            if not out.flags.writeable:
                raise ValueError("out should be writeable, not read-only")
        return x, h, c

    def _recognise(self, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """Name the layer a PyTorch state dict of another size or kind belongs to."""
        w_x, w_h = shapes.get("weight_ih_l0", ()), shapes.get("weight_hh_l0", ())
        if len(w_x) != 2 or len(w_h) != 2:
            prefix = next((name[: -len("weight_ih_l0")] for name in shapes if name.endswith("weight_ih_l0")), "")
            return f"; take the prefix {prefix!r} off the names" if prefix else ""
        projection = shapes.get("weight_hr_l0")
        hidden = projection[1] if projection is not None and len(projection) == 2 else w_h[1]
        kind = {1: "RNN", 3: "GRU", 4: "LSTM"}.get(w_h[0] // hidden if hidden and not w_h[0] % hidden else 0)
        if kind is None:
            return ""
        layers = len({name for name in shapes if name.startswith("weight_hh_l") and "_reverse" not in name})
        settings = [str(w_x[1]), str(hidden)]
        settings += [f"num_layers={layers}"] if layers > 1 else []
        settings += [f"proj_size={w_h[1]}"] if projection is not None else []
        settings += ["layer_norm=True"] if "ln_ih_weight_l0" in shapes else []
        settings += ["bias=False"] if "bias_ih_l0" not in shapes else []
        settings += ["bidirectional=True"] if "weight_hh_l0_reverse" in shapes else []
        return f"; it looks like the state dict of {kind}({', '.join(settings)})"


def advice_on_dropout(dropout: float, num_layers: int) -> str | None:
    """What to say of dropout between layers where there is one layer."""
    if not dropout or num_layers > 1:
        return None
    return (
        f"dropout should be 0 where num_layers is 1: it drops what goes from one layer to the next, so that"
        f" {dropout:g} drops nothing"
    )


def _state_of(h: Array, c: Array | None) -> State:
    """A state of arrays that are nobody else's."""
    h.flags.writeable = False
    if c is not None:
        c.flags.writeable = False
    return adopt(h, c)


def _joined(of_layers: list[Array]) -> Array:
    """What every layer has for its own states, (B, T, D, H), for those of all."""
    return of_layers[0] if len(of_layers) == 1 else np.concatenate(of_layers, axis=2)


def _suffix(layer: int, direction: int) -> str:
    return f"l{layer}_reverse" if direction else f"l{layer}"


class RNN(Recurrent):
    """The plain recurrent network: h' = f(W_ih x + b_ih + W_hh h + b_hh) [1]_.

    References
    ----------
    .. [1] J. L. Elman, "Finding structure in time", Cognitive Science 14, 1990.
    """

    _gates = 1

    _: KW_ONLY
    nonlinearity: str = choice(("tanh", "relu", "sigmoid"), default="tanh", before="bias", doc="f.")

    def _kind(self) -> str:
        return f"rnn_{self.nonlinearity}"


class LSTM(Recurrent):
    """Long short-term memory [1]_, with a forget gate [2]_.

    i, f, o = sigmoid(W x + b + U h + d), g = tanh(W x + b + U h + d), each with its own weights;
    c' = f c + i g; h' = o tanh(c'), or W_hr (o tanh(c')) with `proj_size` [3]_.

    With `layer_norm` [4]_, LN(z) = (z - mean of z) / sqrt(variance of z + 1e-5): the pre-activations of all four gates
    are ln_ih_weight LN(W x) + b + ln_hh_weight LN(U h) + d, each norm over all 4H of them, and
    h' = o tanh(ln_c_weight LN(c') + ln_c_bias). The biases of the two norms of the pre-activations and the bias of the
    gates, which the paper adds up, are b + d. ``ln_ih_weight_l0`` and ``ln_hh_weight_l0`` are of shape (4H,),
    ``ln_c_weight_l0`` and ``ln_c_bias_l0`` of shape (H,); they start at 1 and 0.

    References
    ----------
    .. [1] S. Hochreiter, J. Schmidhuber, "Long short-term memory", Neural Computation 9, 1997.
    .. [2] F. A. Gers, J. Schmidhuber, F. Cummins, "Learning to forget", Neural Computation 12, 2000.
    .. [3] H. Sak, A. Senior, F. Beaufays, "Long short-term memory based recurrent neural network
       architectures for large vocabulary speech recognition", arXiv:1402.1128, 2014.
    .. [4] J. L. Ba, J. R. Kiros, G. E. Hinton, "Layer normalization", arXiv:1607.06450, 2016: equations 20 to 22.
    """

    _gates = 4
    _state_class = LSTMState

    _: KW_ONLY
    proj_size: int = size(  # type: ignore[misc]
        default=0,
        least=0,
        before="bias",
        doc="P: outputs and ``state.h`` have this size in the place of H. 0: no projection. Less than H.",
    )

    layer_norm: bool = flag(
        default=False, before="bias", doc="Whether pre-activations and cell state are normalised; not with `proj_size`."
    )

    def _kind(self) -> str:
        return "lstm_ln" if self.layer_norm else "lstm"

    def _vectors(self) -> dict[str, int]:
        if not self.layer_norm:
            return {}
        gates, units = self._gates * self.hidden_size, self.hidden_size
        of_c = {"ln_c_weight": units, "ln_c_bias": units} if self.bias else {"ln_c_weight": units}
        return {"ln_ih_weight": gates, "ln_hh_weight": gates, **of_c}

    def _initial(self, rng: np.random.Generator) -> dict[str, Array]:
        arrays = super()._initial(rng)
        norms = {name: array.shape for name, array in arrays.items() if name.startswith("ln_")}
        return arrays | {name: np.full(shape, "weight" in name, float) for name, shape in norms.items()}

    def _resolve(self) -> None:
        if self.proj_size and self.layer_norm:
            raise ValueError(f"proj_size should be 0 with layer_norm=True, not {self.proj_size}")
        if self.proj_size >= self.hidden_size:
            raise ValueError(f"proj_size should be less than hidden_size={self.hidden_size}, not {self.proj_size}")


class GRU(Recurrent):
    """The gated recurrent unit [1]_, with the reset gate after or before the recurrent product.

    r, z = sigmoid(W x + b + U h + d), each with its own weights; h' = (1 - z) n + z h, where

    * ``reset_after=True``, PyTorch's: n = tanh(W_in x + b_in + r (W_hn h + b_hn));
    * ``reset_after=False``, the paper's: n = tanh(W_in x + b_in + W_hn (r h) + b_hn).

    References
    ----------
    .. [1] K. Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical machine
       translation", EMNLP 2014.
    """

    _gates = 3

    _: KW_ONLY
    reset_after: bool = flag(default=True, before="bias", doc="Which of the two.")

    def _kind(self) -> str:
        return "gru_reset_after" if self.reset_after else "gru_reset_before"
