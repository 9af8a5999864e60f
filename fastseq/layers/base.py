"""What every layer has: a configuration, parameters, state dicts, files."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, MutableMapping
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


class Layer:
    """A set of named parameters and a configuration. Layers hold no activations."""

    dtype: np.dtype[Any]
    _config: dict[str, Any]
    # Never changed in place: a change puts a new dict here. Whatever is made from the parameters, as the packed
    # weights are, keeps the dict it was made from and is stale when that is no longer this one.
    _arrays: dict[str, Array]

    def __setattr__(self, name: str, value: object) -> None:
        if not name.startswith("_") and hasattr(self, name):
            raise AttributeError(f"{name} is fixed once a {type(self).__name__} is made")
        super().__setattr__(name, value)

    def _replace(self, changed: Mapping[str, Array]) -> None:
        with np.errstate(all="ignore"):  # a small float64 may become a float32 of 0
            copies = {name: np.array(array, dtype=self.dtype, order="C") for name, array in changed.items()}
        for array in copies.values():
            array.flags.writeable = False
        with _replacing:
            self._arrays = {**self._arrays, **copies}

    @property
    def parameters(self) -> Parameters:
        """Mapping from name to read-only array; assign to a name to change it."""
        return Parameters(self)

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
        faults = [f"{name} is missing" for name in wanted if name not in given]
        faults += [f"{name} is unknown" for name in given if name not in wanted]
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
        return {"config": self._config, "arrays": self._arrays}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state["config"])  # type: ignore[misc]
        self._replace(state["arrays"])

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self._config.items())
        count = sum(array.size for array in self._arrays.values())
        return f"{type(self).__name__}({settings}) with {count:,} parameters"
