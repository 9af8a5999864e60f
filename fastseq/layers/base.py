"""The base classes of layers: configuration, parameters and their gradients, state dicts, files."""

from __future__ import annotations

import inspect
import json
import os
import sys
import threading
from abc import ABCMeta, abstractmethod
from collections.abc import Iterator, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import numpy as np

from fastseq import checks, elsewhere, io
from fastseq.backend import COMPILED, Backend
from fastseq.checks import Array
from fastseq.layers import settings
from fastseq.layers.connectable import Connectable
from fastseq.layers.narrowing import Narrowable, real
from fastseq.layers.rows import cleared
from fastseq.layers.settings import Dtype

L = TypeVar("L", bound="Layer")

# Values of `Layer.time`.
POINTWISE, SEQUENCE, POOLING = TIMES = ("pointwise", "sequence", "pooling")
SUMMARY_WIDTH = 60  # characters of the column of `summary` that describes a layer

_replacing = threading.Lock()  # held while `_arrays` is replaced, so that of two threads neither loses its change


def _new_lock() -> None:
    global _replacing
    _replacing = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)  # another thread of the parent process may hold the old lock


class Parameters(MutableMapping[str, Array]):
    """The parameters of a layer: a mapping from name to read-only array.

    Setting a name replaces its array by a copy of the value, in the dtype of the layer. Names cannot be added or
    removed.
    """

    def __init__(self, layer: Layer) -> None:
        self._layer = layer

    def __getitem__(self, name: str) -> Array:
        return real(self._layer._arrays[name])

    def __setitem__(self, name: str, value: Any) -> None:
        self._layer._refuse_where_narrow("setting a parameter")
        old = self._layer._arrays
        if name not in old:
            raise ValueError(f"name should be one of {', '.join(old)}, not {name!r}")
        array = checks.real_array(name, value, self._layer.dtype)
        if array.shape != old[name].shape:
            raise ValueError(f"{name} should be of shape {old[name].shape}, not {array.shape}")
        self._layer._assign({name: array})

    def __delitem__(self, name: str) -> None:
        raise TypeError("a parameter cannot be removed from its layer")

    def __iter__(self) -> Iterator[str]:
        return iter(self._layer._arrays)

    def __len__(self) -> int:
        return len(self._layer._arrays)

    def __repr__(self) -> str:
        return "{" + ", ".join(f"{name}: {array.shape}" for name, array in self._layer._arrays.items()) + "}"


class Tape:
    """The values that `backward` needs from one `forward`; opaque, never changed, and may be used several times.

    It belongs to one layer, and to the parameters that the layer had in that forward.
    """

    __slots__ = ("_kept", "_layer")

    def __init__(self, layer: Layer, kept: Any) -> None:
        self._layer = layer
        self._kept = kept

    def __repr__(self) -> str:
        return f"<tape of {self._layer!r}>"


def is_ours(made: Any) -> bool:
    """Return whether a class or a function is defined in this package."""
    return str(made.__module__).partition(".")[0] == "fastseq"


class LayerType(ABCMeta):
    """Metaclass of layers: it reads the settings that a class declares, and makes attributes of instances read-only."""

    # The checks of ABCMeta support virtual subclasses, which there are none of here, and are many times slower.
    __instancecheck__ = type.__instancecheck__
    __subclasscheck__ = type.__subclasscheck__

    _settings: dict[str, settings.Setting]

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> LayerType:
        """Make a class, and generate ``__init__`` and documentation where it declares or inherits settings."""
        namespace["_declared"] = declared = settings.declared(namespace)
        made = super().__new__(mcs, name, bases, namespace, **options)
        made._settings = settings.collected(made)
        by_hand = "__init__" in namespace or (not declared and not hasattr(made.__init__, "generated"))  # type: ignore[misc]
        if made._settings and not by_hand:
            made.__init__ = settings.constructor(made, made._settings)  # type: ignore[misc]
            if namespace.get("__doc__"):
                made.__doc__ = settings.documentation(namespace["__doc__"], made._settings)
        return made

    def __call__(cls: type[L], *args: Any, **settings: Any) -> L:  # type: ignore[misc]
        """Make a layer; afterwards its attributes are read-only."""
        try:
            layer: L = super().__call__(*args, **settings)  # type: ignore[misc]
        except TypeError:
            elsewhere.refuse_unknown(cls.__name__, cls, settings)
            raise
        if "_config" not in layer.__dict__:
            raise TypeError(
                f"{cls.__name__}.__init__ should call super().__init__ with the settings that make such a layer"
            )
        layer._freeze()
        advice = layer._advice()
        if advice is not None and not checks.is_of_package(sys._getframe(1)):  # models choose their layers deliberately
            checks.warn(advice)
        return layer

    @property
    def __signature__(cls) -> inspect.Signature:
        """The signature of ``__init__``; otherwise `inspect` would show that of ``__call__`` above."""
        signature = inspect.signature(cls.__init__)  # type: ignore[misc]
        return signature.replace(parameters=list(signature.parameters.values())[1:])


class Layer(Narrowable, Connectable, metaclass=LayerType):
    """A set of named parameters and a configuration; the base of all layers, and of your own.

    A layer holds no activations: `forward` returns what `backward` needs, on a tape. A class of your own has an
    ``__init__`` that calls this one and `add_parameter`, a ``__call__`` for inference, and for training a `forward` and
    a `backward`, which use `tape`, `kept` and `targets`.

    Parameters
    ----------
    dtype : floating dtype
        Of the parameters.
    **config
        What ``__init__`` of the class was given, by the names of its arguments: numbers, strings, booleans, None, and
        lists and dictionaries of them. It is shown by ``repr``, saved with the layer and given to ``__init__`` again
        when the layer is loaded. Each setting becomes an attribute.

    Attributes
    ----------
    time : {"pointwise", "sequence", "pooling"}
        How the layer treats the axis of time, axis 1 of x (B, T, ...). "pointwise": each step is computed by itself,
        without lengths; a container sets outputs in the padding to 0. "sequence": there is an output for each step,
        which may depend on other steps, or one for every few (`output_lengths`); call and `forward` take ``lengths``,
        and outputs past those of a row are 0. "pooling":
        call and `forward` take ``lengths``, and return one output for each row, without an axis of time.
    carries_state : bool
        Whether call and `forward` take a state and return it, as recurrent layers do:
        ``y, state = layer(x, state, lengths=lengths, resets=resets)``, and the same with a tape from ``forward``; then
        `backward` takes ``truncate`` and returns the gradients of x and of the state. Of convolutions, whose call takes
        whole sequences, `run` and `forward_carrying` take and return it.
    """

    time: str = POINTWISE
    carries_state: bool = False

    _backend: ClassVar[Backend] = COMPILED  # the operations that the layer calls
    _keeps_width: ClassVar[bool] = False  # whether output vectors have the size of the input vectors

    # Methods whose error for an unknown argument names the one that is meant. Methods that take few microseconds are
    # not wrapped, because the wrapper costs another Python call.
    _naming: ClassVar[tuple[str, ...]] = ()

    dtype: Dtype
    _config: dict[str, Any]
    _frozen: bool = False
    _declares: bool = False  # whether the class passed its configuration to `__init__` below
    # Trailing axes that a pointwise layer computes on together; x has at least these besides (B, T).
    _features: int = 0
    _random: ClassVar[bool] = False  # whether the forward of a `Pointwise` layer is random
    # Never changed in place: a change of parameters stores a new dict here. Values derived from parameters, such as
    # packed weights, keep the dict they were computed from, and are stale once this is another one.
    _arrays: Mapping[str, Array]
    _gradients: dict[str, Array] | None = None  # allocated on first use, which inference does not need

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if is_ours(cls):
            for verb in cls._naming:
                if verb in cls.__dict__:
                    setattr(cls, verb, elsewhere.naming(cls.__dict__[verb]))

    def __init__(self, *, dtype: Any = "float32", **config: Any) -> None:
        self.dtype = checks.real_dtype("dtype", dtype, None)
        takes = inspect.signature(type(self)).parameters
        whole = {name: _plain(name, value) for name, value in config.items()}
        if "dtype" in takes:
            whole["dtype"] = self.dtype.name
        _check_makes(type(self).__name__, takes, whole)
        self._config, self._declares = whole, True
        self._arrays = {}
        for name, value in config.items():
            if not hasattr(self, name):
                setattr(self, name, value)

    def add_parameter(self, name: str, array: Any) -> None:
        """Add a parameter to the layer; to be called in ``__init__``.

        Parameters
        ----------
        name : str
            Not empty, and not the name of another parameter.
        array : array
            The initial value: real numbers, copied, and converted to the dtype of the layer.
        """
        if self._frozen:
            raise TypeError(f"parameters are added in __init__, not to a {type(self).__name__} that is made")
        if not isinstance(name, str) or not name:
            raise TypeError(f"name should be a string that is not empty, not {checks.describe(name)}")
        if name in self._arrays:
            raise ValueError(f"name should be of no parameter that is there, not {name!r}")
        given = checks.as_array("array", array)
        if given.dtype.kind not in "fiu":
            raise TypeError(f"array should hold real numbers, not {given.dtype}")
        self._assign({name: given})

    def tape(self, *values: Any) -> Tape:
        """Make the tape that `forward` returns beside its outputs, of the values that `backward` needs."""
        return Tape(self, values)

    def kept(self, tape: Any) -> Any:
        """Return the values that `forward` passed to `tape`; a tape of another layer is an error."""
        return self._kept(tape)

    def targets(self, grads: Any) -> dict[str, Array]:
        """Return the arrays by name that `backward` adds gradients to, with ``+=``.

        They are those of `grads` of the layer, or of the mapping that `backward` was given.
        """
        return dict(self._targets(grads))

    def run(self, x: Any, state: Any = None, *, lengths: Any = None, resets: Any = None) -> tuple[Array, Any]:
        """Run any layer in inference, with the same arguments and results for all layers.

        Parameters
        ----------
        x : array of shape (B, T, ...)
            Inputs of the layer.
        state : optional
            The state that an earlier run returned; only where the layer carries a state.
        lengths : array of shape (B,), optional
            The real steps of each row. Outputs past them are 0, and do not depend on `x` past them.
        resets : array of bool of shape (B, T), optional
            Where states are reset to zeros; only where the layer carries a state.

        Returns
        -------
        y : ndarray
        state
            The state of each row after its last step; None where the layer carries none.
        """
        me: Any = self
        if self.carries_state:
            y, end = me(x, **_some(state=state, lengths=lengths, resets=resets))
            return y, end
        self._check_no_state(state, resets)
        if self.time != POINTWISE:
            return me(x, **_some(lengths=lengths)), None
        x, lengths = self._cleared(x, lengths)
        return self._clear_outputs(x, me(x), lengths), None

    def forward_carrying(
        self, x: Any, state: Any = None, *, lengths: Any = None, resets: Any = None, seed: int | None = None
    ) -> tuple[Array, Any, Tape]:
        """Run `forward` of any layer, with the same arguments and results for all; for containers and the trainer.

        Parameters
        ----------
        x, state, lengths, resets
            As of `run`.
        seed : int, optional
            Fixes the masks of dropout.

        Returns
        -------
        y : ndarray
        state
            None where the layer carries none.
        tape : Tape
            For `backward`.
        """
        me: Any = self
        if not hasattr(me, "forward"):
            raise TypeError(f"a layer needs a forward to be trained, and {self!r} has none")
        if self.carries_state:
            y, end, tape = me.forward(x, seed=seed, **_some(state=state, lengths=lengths, resets=resets))
            return y, end, tape
        self._check_no_state(state, resets)
        if self.time != POINTWISE:
            y, *_, tape = me.forward(x, seed=seed, **_some(lengths=lengths))
            return y, None, tape
        x, lengths = self._cleared(x, lengths)
        y, tape = me.forward(x, seed=seed)
        return self._clear_outputs(x, y, lengths), None, tape

    def backward_carrying(
        self, dy: Any, tape: Tape, *, truncate: int | None = None, grads: Mapping[str, Array] | None = None
    ) -> Array | None:
        """Run `backward` of any layer; return the gradient of x, or None where x has none."""
        me: Any = self
        result = me.backward(dy, tape, grads=grads, **_some(truncate=truncate))
        dx = result[0] if isinstance(result, tuple) else result
        return dx if isinstance(dx, np.ndarray) else None

    def output_lengths(self, lengths: Any) -> Array:
        """Return how many steps of outputs there are, of rows of so many steps of inputs.

        Parameters
        ----------
        lengths : int or array of integers
            Each 0 or more.

        Returns
        -------
        lengths : ndarray of int64, of the same shape

        Raises
        ------
        ValueError
            Also where the layer pools, and outputs have no axis of time.
        """
        given = checks.integers("lengths", lengths)
        if given.size and given.min() < 0:
            raise ValueError(f"lengths should be 0 or more, not {given.min()}")
        if self.time == POOLING:
            raise ValueError(f"{self._making()} gives one output for all steps, which has no length")
        return np.asarray(self._lengths_after(given.astype(np.int64)), np.int64)

    def _lengths_after(self, lengths: Array, state: Any = None) -> Array:
        """Return the lengths of outputs, of rows that start from a state; without checks."""
        return lengths

    def unstreamable(self) -> str | None:
        """Return why the layer cannot be trained on consecutive chunks of streams; None where it can."""
        if self.time == POOLING:
            return f"{self._making()} gives one output for all steps, and would give one for every chunk"
        if getattr(self, "bidirectional", False):
            return f"{self._making()} is bidirectional, and its reverse direction would start anew in every chunk"
        if self.time == SEQUENCE and not self.carries_state:
            return f"{self._making()} carries no state, and would see nothing of the chunks before"
        return None

    def _stepless(self) -> str | None:
        """Return why calls step by step, with the state carried, differ from one call; None if they do not."""
        return self.unstreamable()

    def _step_on(self, x_t: Array, state: Any) -> tuple[Array, Any]:
        """Compute the next step (B, ...), of a layer whose `_stepless` is None."""
        y, state = self.run(x_t[:, None], state)
        return y[:, 0], state

    def _check_no_state(self, state: Any, resets: Any) -> None:
        for name, value in (("state", state), ("resets", resets)):
            if value is not None:
                raise ValueError(f"{name} should be None: {self._making()} carries no state")

    def _cleared(self, x: Any, lengths: Any) -> tuple[Any, Array | None]:
        """Return x with zeros past the lengths, and the lengths, checked; for a pointwise layer."""
        if lengths is None:
            return x, None
        x = checks.as_array("x", x)
        axes = 2 + self._features
        if x.ndim < axes:
            form = ", ".join(["B", "T", *["..."][: x.ndim < 3 or self._features > 0]])
            raise ValueError(
                f"x should be of shape ({form}), of {axes} axes at least, where lengths are given, not {x.shape}"
            )
        lengths = checks.lengths(lengths, *x.shape[:2])
        return (cleared(x, lengths) if x.dtype.kind in "fiu" else x), lengths

    def _clear_outputs(self, x: Any, y: Array, lengths: Array | None) -> Array:
        if lengths is None:
            return y
        if y.shape[:2] != x.shape[:2]:
            raise ValueError(
                f"{self._making()} should give an output for every step, since its time is {self.time!r}, but of"
                f" x {x.shape} it made {y.shape}"
            )
        return cleared(y, lengths)

    def _advice(self) -> str | None:
        """Return a warning about settings that are allowed but probably a mistake; None without one."""
        return None

    def _initial(self, rng: np.random.Generator) -> dict[str, Array]:
        """Return initial parameters, distributed as by PyTorch's default."""
        return {}

    def _row_blocks(self, name: str) -> list[int]:
        """How the rows of a matrix divide into matrices of their own, of each gate for instance."""
        return [len(self._arrays[name])]

    def _freeze(self) -> None:
        """Make attributes read-only."""
        self._frozen = True

    def __setattr__(self, name: str, value: object) -> None:
        if self._frozen and not name.startswith("_"):
            kind = type(self).__name__
            if name in self._arrays:
                raise AttributeError(f'{name} is a parameter: set it by layer.parameters["{name}"] = ...')
            if hasattr(self, name):
                raise AttributeError(f"{name} is fixed once a {kind} is made")
            if is_ours(type(self)):  # classes of users may have other attributes
                raise AttributeError(f"{name} is no attribute of a {kind}, and cannot become one")
        super().__setattr__(name, value)

    def _assign(self, changed: Mapping[str, Array]) -> None:
        """Replace parameters by copies of some arrays, each of the shape of the one it replaces."""
        with np.errstate(all="ignore"):  # a small float64 may become a float32 of 0
            self._adopt({name: np.array(array, dtype=self.dtype, order="C") for name, array in changed.items()})

    def _adopt(self, changed: Mapping[str, Any]) -> None:
        """Replace parameters without copying.

        The arrays are C-contiguous, of the layer's dtype or narrow, and owned by the caller alone; ownership passes to
        the layer.
        """
        for array in changed.values():
            if isinstance(array, np.ndarray):
                array.flags.writeable = False
        with _replacing:
            self._arrays = {**self._arrays, **changed}

    @property
    def parameters(self) -> Parameters:
        """Mapping from name to read-only array; assign to a name to change it."""
        return Parameters(self)

    @property
    def grads(self) -> Mapping[str, Array]:
        """Mapping from the name of every parameter to the array that `backward` adds its gradient into."""
        self._refuse_where_narrow("grads")
        if self._gradients is None:
            with _replacing:
                if self._gradients is None:
                    self._gradients = {name: np.zeros_like(array) for name, array in self._arrays.items()}
        return MappingProxyType(self._gradients)

    def zero_grad(self) -> None:
        """Set every gradient to zero, in place."""
        for array in self.grads.values():
            array.fill(0)

    def _targets(self, grads: Any) -> Mapping[str, Array]:
        """Return the arrays that `backward` adds gradients to: `grads` of the layer, or those passed, checked."""
        if grads is None:
            return self.grads
        given = checks.mapping("grads", grads)
        wanted = self._arrays
        faults = checks.are((name for name in wanted if name not in given), "missing")
        faults += checks.are((name for name in given if name not in wanted), "unknown")
        for name in (name for name in wanted if name in given):
            array = given[name]
            if type(array) is not np.ndarray or array.dtype != self.dtype or not array.flags.carray:
                faults.append(
                    f"{name} should be a writeable, contiguous array of {self.dtype}, not {checks.describe(array)}"
                )
            elif array.shape != wanted[name].shape:
                faults.append(f"{name} should be of shape {wanted[name].shape}, not {array.shape}")
        if faults:
            raise ValueError(f"grads does not fit {self!r}: {'; '.join(faults)}")
        return given

    def _kept(self, tape: Any) -> Any:
        """Check that a tape is of this layer, and return its values."""
        if not isinstance(tape, Tape):
            raise TypeError(f"tape should be what forward returned, not {checks.describe(tape)}")
        if tape._layer is not self:
            raise ValueError(f"tape should be of a forward of this {self!r}, not of another layer's: {tape!r}")
        return tape._kept

    def state_dict(self) -> dict[str, Array]:
        """Return copies of all parameters by name; names and layouts are those of PyTorch."""
        return {name: np.array(real(array)) for name, array in self._arrays.items()}

    def load_state_dict(self, mapping: Mapping[str, Any]) -> None:
        """Replace all parameters by the arrays of a mapping, a PyTorch state dict for example.

        Parameters
        ----------
        mapping : mapping from str to array
            Exactly the names of `parameters`, each of its shape. Any real floating dtype. Copied.

        Raises
        ------
        ValueError
            Listing every name that is unknown, missing or of another shape; the layer is unchanged.
        """
        given = checks.mapping("mapping", mapping)
        wanted = self._arrays
        arrays = {name: checks.real_array(name, given[name], self.dtype) for name in wanted if name in given}
        self._check_mapping(given, arrays)
        self._assign(arrays)

    def _check_mapping(self, given: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
        """Raise a ValueError that names all that is unknown, missing or of another shape."""
        wanted = self._arrays
        faults = checks.are((name for name in wanted if name not in given), "missing")
        faults += checks.are((name for name in given if name not in wanted), "unknown")
        faults += [
            f"{name} should be of shape {wanted[name].shape}, not {array.shape}"
            for name, array in arrays.items()
            if array.shape != wanted[name].shape
        ]
        if faults:
            hint = _without_prefix(given, wanted)
            hint = hint or self._recognise({name: getattr(value, "shape", ()) for name, value in given.items()})
            raise ValueError(f"mapping does not fit {self!r}: {'; '.join(faults)}{hint}")

    def _recognise(self, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """Return a hint what else the shapes may be, for the message of a state dict that does not fit."""
        return ""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the layer to a safetensors file, whole or not at all; `fastseq.load` reads it back."""
        own = [io.own_class(type(part), part._declares) for part in self._saved_parts()]
        own_names = [name for name in own if name is not None]
        io.save(path, type(self).__name__, self._config, self._arrays, own_names, self._weight_type)

    def _saved_parts(self) -> list[Layer]:
        """Return the layers whose class and configuration are stored in a file of this one."""
        return [self]

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self._config, "arrays": dict(self._arrays), "weights": self._weight_type}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._restore(state["config"], state["arrays"], state.get("weights", "float32"))

    def _making(self) -> str:
        """Return the call that makes a layer of this configuration."""
        settings = ", ".join(f"{name}={value!r}" for name, value in self._config.items())
        return f"{type(self).__name__}({settings})"

    def _brief(self) -> str:
        """Return `_making` without arguments that have their default."""
        takes = inspect.signature(type(self)).parameters
        settings = [
            f"{name}={value!r}"
            for name, value in self._config.items()
            if name not in takes or type(value) is not type(takes[name].default) or value != takes[name].default
        ]
        return f"{type(self).__name__}({', '.join(settings)})"

    def _count(self) -> int:
        """Return the number of elements of all parameters."""
        return sum(array.size for array in self._arrays.values())

    def __repr__(self) -> str:
        narrow = "" if self._weight_type == "float32" else f", weights of products in {self._weight_type}"
        return f"{self._making()} with {self._count():,} parameters{narrow}"

    def summary(self) -> str:
        """Return a table of the parts of the layer or model, with output shapes and numbers of parameters."""
        rows = [*self._summary_rows(""), ("", "in all", "", self._count())]
        cells = [(name, _shortened(what, SUMMARY_WIDTH), gives, f"{count:,}") for name, what, gives, count in rows]
        cells.insert(0, ("", type(self).__name__, "output", "parameters"))
        widths = [max(len(row[column]) for row in cells) for column in range(4)]
        lines = [
            f"{name:<{widths[0]}}  {what:<{widths[1]}}  {gives:<{widths[2]}}  {count:>{widths[3]}}"
            for name, what, gives, count in cells
        ]
        return "\n".join(line.strip() if not widths[0] else line.rstrip() for line in lines)

    def _summary_rows(self, prefix: str) -> list[tuple[str, str, str, int]]:
        """Return name, description, output shape and number of parameters of each part."""
        return [(prefix, self._brief(), self._output_form(True), self._count())]

    def _gives(self) -> int | None:
        """Return the size of an output vector where the settings fix it; None: that of the inputs, or not known."""
        return None

    def _takes(self) -> int | None:
        """Return the size of an input vector where the settings fix it; None: any, or not known."""
        return None

    def _width_after(self, width: int | None) -> int | None:
        """Return the size of an output vector, given that of an input vector; None where it is not known."""
        return width if self._keeps_width else self._gives()

    def _output_form(self, timed: bool, width: int | None = None) -> str:
        """Return the shape of outputs as far as it is known; `timed`: whether inputs have an axis of time."""
        width = self._gives() or width
        axes = ["B", *(["T"] if timed and self.time != POOLING else []), *([] if width is None else [str(width)])]
        return "" if width is None else f"({', '.join(axes)})"


@settings.dataclass_transform(
    field_specifiers=(
        settings.size,
        settings.flag,
        settings.fraction,
        settings.number,
        settings.choice,
        settings.checked,
        settings.floating,
        settings.random_seed,
    )
)
class Configured(Layer):
    """A layer or model whose settings are declared in the body of its class, see `fastseq.layers.settings`."""

    def _settle(self, given: Mapping[str, Any]) -> None:
        """Check and store settings, then make parameters; called by the generated ``__init__``."""
        for name, setting in type(self)._settings.items():
            value = setting.check(name, given[name])
            if name == "dtype":
                value = checks.real_dtype(name, value, self._backend.dtypes)
            setattr(self, name, value)
        self._resolve()
        self._config = {name: getattr(self, name) for name in type(self)._settings}
        if "dtype" in self._config:
            self._config["dtype"] = self.dtype.name
        self._build()

    def _resolve(self) -> None:
        """Check settings against each other, and set those whose default depends on others."""

    def _build(self) -> None:
        """Make parameters and other attributes from the settings."""
        self._arrays = {}
        self._assign(self._initial(np.random.default_rng(getattr(self, "seed", None))))


class Pointwise(Configured):
    """A layer with one input and no other argument; a subclass implements `_forward` and `_backward`."""

    @abstractmethod
    def _forward(self, x: Any, seed: int | None) -> tuple[Array, Any]:
        """Return outputs and the values that `_backward` needs; in inference `seed` is None, and nothing is random."""

    @abstractmethod
    def _backward(self, dy: Array, kept: Any, targets: Mapping[str, Array]) -> Array:
        """Return the gradient of x, and add those of parameters to `targets`; `dy` has the shape of y."""

    def __call__(self, x: Any) -> Array:
        """Apply the layer; inference.

        Parameters
        ----------
        x : array
            Real floating numbers, of a shape that the class takes.

        Returns
        -------
        y : ndarray

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        return self._forward(x, None)[0]

    def forward(self, x: Any, seed: int | None = None) -> tuple[Array, Tape]:
        """Apply the layer in training; return outputs and a tape for `backward`.

        Parameters
        ----------
        x : array
            As for a call. Must not be changed while the tape is in use.
        seed : int, optional
            Fixes the masks of dropout, the only randomness; drawn by default.

        Returns
        -------
        y : ndarray
        tape : Tape
        """
        y, kept = self._forward(x, mask_seed(seed) if self._random else checks.seed("seed", seed))
        return y, Tape(self, (y.shape, kept))

    def backward(self, dy: Any, tape: Tape, *, grads: Mapping[str, Array] | None = None) -> Array:
        """Compute gradients from that of the outputs.

        Parameters
        ----------
        dy : array of the shape of y
        tape : Tape
            Returned by `forward`.
        grads : mapping from str to ndarray, optional
            Arrays that gradients of parameters are added to; `grads` of the layer by default.

        Returns
        -------
        dx : ndarray of the shape of x
        """
        shape, kept = self._kept(tape)
        return self._backward(checks.like("dy", dy, self.dtype, shape), kept, self._targets(grads))


class Composite(Layer):
    """A layer made of layers: its parameters and gradients are theirs, named ``<child>.<name>``."""

    _naming: ClassVar[tuple[str, ...]] = ("__call__", "forward", "generate", "stream", "forecast", "log_prob")

    _children: dict[str, Layer]
    _by_own_rule: ClassVar[tuple[str, ...]] = ()  # children that `initialise` leaves as they are
    _real_children: ClassVar[tuple[str, ...]] = ()  # children that a twin has in float32

    @property
    def _arrays(self) -> Mapping[str, Array]:  # type: ignore[override]
        return {f"{child}.{name}": a for child, layer in self._children.items() for name, a in layer._arrays.items()}

    def _adopt(self, changed: Mapping[str, Any]) -> None:
        for child, layer in self._children.items():
            if own := under(child, changed):
                layer._adopt(own)

    def _product_groups(self, prefix: str) -> list[tuple[str, ...]]:
        children = self._children.items()
        return [
            group
            for child, layer in children
            if child not in self._real_children
            for group in layer._product_groups(f"{prefix}{child}.")
        ]

    def _become_twin(self, weight_type: str) -> None:
        super()._become_twin(weight_type)
        for layer in self._children.values():
            layer._become_twin(weight_type)

    @property
    def grads(self) -> Mapping[str, Array]:
        """Mapping from the name of every parameter to the array that `backward` adds its gradient into."""
        self._refuse_where_narrow("grads")
        return MappingProxyType(
            {f"{child}.{name}": a for child, layer in self._children.items() for name, a in layer.grads.items()}
        )

    def _summary_rows(self, prefix: str) -> list[tuple[str, str, str, int]]:
        children = self._children.items()
        return [(name, part._brief(), part._output_form(True), part._count()) for name, part in children]

    def _making(self) -> str:
        return self._brief()

    def _child_targets(self, grads: Any) -> dict[str, Mapping[str, Array] | None]:
        """Return the argument `grads` for the backward of each child; `grads` itself is checked here."""
        if grads is None:
            return dict.fromkeys(self._children)
        targets = self._targets(grads)
        return {child: under(child, targets) for child in self._children}


def _without_prefix(given: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return a hint how to remove a prefix from the names of a state dict, if the names fit without it."""
    some = next(iter(wanted), None)
    found = [name[: -len(some)] for name in given if name.endswith(some)] if some else []
    for prefix in (one for one in found if one):
        own = [name for name in given if name.startswith(prefix)]
        if {name[len(prefix) :] for name in own} == wanted.keys():
            only = "" if len(own) == len(given) else f" if name.startswith({prefix!r})"
            return (
                f"; without the prefix {prefix!r} the names fit: give"
                f" {{name.removeprefix({prefix!r}): array for name, array in mapping.items(){only}}}"
            )
    return ""


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 4]} ..."


def _some(**options: Any) -> dict[str, Any]:
    """Return the options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def _check_makes(kind: str, takes: Mapping[str, inspect.Parameter], config: Mapping[str, Any]) -> None:
    """Raise an error where a configuration is not a complete set of arguments of its class."""
    kinds = {parameter.kind for parameter in takes.values()}
    faults = [
        f"{name} is missing"
        for name, parameter in takes.items()
        if name not in config
        and parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        faults += [f"{name} is no argument of it" for name in config if name not in takes]
    if faults:
        raise TypeError(
            f"super().__init__ should be given by name all that {kind}.__init__ takes, so that the layer can be made"
            f" again when it is loaded: {'; '.join(faults)}"
        )


def _plain(name: str, value: Any) -> Any:
    """Return a setting in a form that JSON can hold; else raise an error."""
    plain = value.item() if isinstance(value, np.generic) else value
    try:
        json.dumps(plain)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} should be a number, a string, a boolean, None, or lists or dictionaries of those, so that a file"
            f" can hold it, not {checks.describe(value)}"
        ) from None
    return plain


def under(child: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Return the entries of one child, without its prefix."""
    prefix = f"{child}."
    return {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}


def mask_seed(seed: Any) -> int:
    """Return the seed of the dropout masks of a forward: the argument, or a random one for None."""
    given = checks.seed("seed", seed)
    return int.from_bytes(os.urandom(8), "little") >> 1 if given is None else given


def seeds_of(seed: int | None, count: int) -> list[int | None]:
    """Derive `count` seeds from one; all are None where it is None."""
    return [None if seed is None else child_seed(seed, i) for i in range(count)]


def child_seed(seed: int, child: int) -> int:
    """Derive the seed of the child of this number: 63 bits of splitmix64."""
    whole = (1 << 64) - 1
    z = (seed + (child + 1) * 0x9E3779B97F4A7C15) & whole
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & whole
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & whole
    return (z ^ z >> 31) >> 1
