"""What every layer has: a configuration, parameters and their gradients, state dicts, files."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any

import numpy as np

from fastseq import checks, io
from fastseq.checks import Array

_replacing = threading.Lock()  # two threads that change different parameters must not lose one


def _new_lock() -> None:
    global _replacing
    _replacing = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)  # another thread of the parent may have held the old one


class Parameters(MutableMapping[str, Array]):
    """The parameters of a layer: a mapping from name to read-only array.

    Setting a name replaces its array by a copy of what is given, in the dtype of the layer. Names are
    neither added nor removed.
    """

    def __init__(self, layer: Layer) -> None:
        self._layer = layer

    def __getitem__(self, name: str) -> Array:
        return self._layer._arrays[name]

    def __setitem__(self, name: str, value: Any) -> None:
        old = self._layer._arrays
        if name not in old:
            raise ValueError(f"name should be one of {', '.join(old)}, not {name!r}")
        array = checks.real_array(name, value, self._layer.dtype)
        if array.shape != old[name].shape:
            raise ValueError(f"{name} should be of shape {old[name].shape}, not {array.shape}")
        self._layer._replace({name: array})

    def __delitem__(self, name: str) -> None:
        raise TypeError("a parameter cannot be removed from its layer")

    def __iter__(self) -> Iterator[str]:
        return iter(self._layer._arrays)

    def __len__(self) -> int:
        return len(self._layer._arrays)

    def __repr__(self) -> str:
        return "{" + ", ".join(f"{name}: {array.shape}" for name, array in self.items()) + "}"


class Tape:
    """What `backward` needs of one `forward`: an opaque value that is never changed and may be used again.

    It belongs to the layer of its forward and to the parameters the layer had then.
    """

    __slots__ = ("_kept", "_layer")

    def __init__(self, layer: Layer, kept: Any) -> None:
        self._layer = layer
        self._kept = kept

    def __repr__(self) -> str:
        return f"<tape of {self._layer!r}>"


class Layer:
    """A set of named parameters and a configuration. Layers hold no activations."""

    dtype: np.dtype[Any]
    _config: dict[str, Any]
    # Never changed in place: a change puts a new dict here. Whatever is made from the parameters, as the packed
    # weights are, keeps the dict it was made from and is stale when that is no longer this one.
    _arrays: Mapping[str, Array]
    _gradients: dict[str, Array] | None = None  # made when first asked for: inference never does

    def _initial(self, rng: np.random.Generator) -> dict[str, Array]:
        """Parameters to start from: PyTorch's default."""
        return {}

    def __setattr__(self, name: str, value: object) -> None:
        if not name.startswith("_") and hasattr(self, name):
            raise AttributeError(f"{name} is fixed once a {type(self).__name__} is made")
        super().__setattr__(name, value)

    def _replace(self, changed: Mapping[str, Array]) -> None:
        """Take copies of some arrays, each of the shape of the parameter it replaces."""
        with np.errstate(all="ignore"):  # a small float64 may become a float32 of 0
            self._adopt({name: np.array(array, dtype=self.dtype, order="C") for name, array in changed.items()})

    def _adopt(self, changed: Mapping[str, Array]) -> None:
        """Take some arrays as they are: C-contiguous, of the layer's dtype, and nobody else's from now on."""
        for array in changed.values():
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
        """Where `backward` adds gradients: the layer's own arrays, or those given, which are looked at here."""
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
        """What `forward` put on a tape of this layer."""
        if not isinstance(tape, Tape):
            raise TypeError(f"tape should be what forward returned, not {checks.describe(tape)}")
        if tape._layer is not self:
            raise ValueError(f"tape should be of a forward of this {self!r}, not of another layer's: {tape!r}")
        return tape._kept

    def state_dict(self) -> dict[str, Array]:
        """Copies of all parameters by name, as PyTorch names and lays them out."""
        return {name: np.array(array) for name, array in self._arrays.items()}

    def load_state_dict(self, mapping: Mapping[str, Any]) -> None:
        """Take all parameters from a mapping, a PyTorch state dict for example.

        Parameters
        ----------
        mapping : mapping from str to array
            Exactly the names of `parameters`, each of its shape. Any real floating dtype. Copied.

        Raises
        ------
        ValueError
            Naming every name that is unknown, missing or of another shape; the layer is as it was then.
        """
        given = checks.mapping("mapping", mapping)
        wanted = self._arrays
        arrays = {name: checks.real_array(name, given[name], self.dtype) for name in wanted if name in given}
        faults = checks.are((name for name in wanted if name not in given), "missing")
        faults += checks.are((name for name in given if name not in wanted), "unknown")
        faults += [
            f"{name} should be of shape {wanted[name].shape}, not {array.shape}"
            for name, array in arrays.items()
            if array.shape != wanted[name].shape
        ]
        if faults:
            hint = self._recognise({name: getattr(value, "shape", ()) for name, value in given.items()})
            raise ValueError(f"mapping does not fit {self!r}: {'; '.join(faults)}{hint}")
        self._replace(arrays)

    def _recognise(self, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """What else the shapes look like, for the message of a state dict that does not fit."""
        return ""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the layer to a safetensors file, whole or not at all; `fastseq.load` reads it back."""
        io.save(path, type(self).__name__, self._config, self._arrays)

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self._config, "arrays": dict(self._arrays)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state["config"])  # type: ignore[misc]
        self._replace(state["arrays"])

    def _making(self) -> str:
        """The call that makes a layer of this configuration."""
        settings = ", ".join(f"{name}={value!r}" for name, value in self._config.items())
        return f"{type(self).__name__}({settings})"

    def __repr__(self) -> str:
        return f"{self._making()} with {sum(array.size for array in self._arrays.values()):,} parameters"


class Composite(Layer):
    """A layer made of layers: its parameters and gradients are theirs, named ``<child>.<name>``."""

    _children: dict[str, Layer]

    @property
    def _arrays(self) -> Mapping[str, Array]:  # type: ignore[override]
        return {f"{child}.{name}": a for child, layer in self._children.items() for name, a in layer._arrays.items()}

    def _adopt(self, changed: Mapping[str, Array]) -> None:
        for child, layer in self._children.items():
            if own := _under(child, changed):
                layer._adopt(own)

    @property
    def grads(self) -> Mapping[str, Array]:
        """Mapping from the name of every parameter to the array that `backward` adds its gradient into."""
        return MappingProxyType(
            {f"{child}.{name}": a for child, layer in self._children.items() for name, a in layer.grads.items()}
        )

    def _child_targets(self, grads: Any) -> dict[str, Mapping[str, Array] | None]:
        """What to give as `grads` to the backward of each child; what was given is looked at here."""
        if grads is None:
            return dict.fromkeys(self._children)
        targets = self._targets(grads)
        return {child: _under(child, targets) for child in self._children}


def _under(child: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The entries of one child, under the names it has for them."""
    prefix = f"{child}."
    return {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}


def mask_seed(seed: Any) -> int:
    """The seed of the dropout masks of a forward: as given, or drawn."""
    given = checks.seed("seed", seed)
    return int.from_bytes(os.urandom(8), "little") >> 1 if given is None else given


def seeds_of(seed: int | None, count: int) -> list[int | None]:
    """A seed for each of some layers."""
    return [None if seed is None else child_seed(seed, i) for i in range(count)]


def child_seed(seed: int, child: int) -> int:
    """The seed that a layer made of layers gives one of them: splitmix64, 63 bits of it."""
    whole = (1 << 64) - 1
    z = (seed + (child + 1) * 0x9E3779B97F4A7C15) & whole
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & whole
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & whole
    return (z ^ z >> 31) >> 1
