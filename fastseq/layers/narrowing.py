"""Twins of layers for inference, whose matrices are narrow."""

from __future__ import annotations

import fnmatch
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import numpy as np

from fastseq import checks
from fastseq.checks import Array
from fastseq.narrow import TYPES, NarrowArray, narrowed

N = TypeVar("N", bound="Narrowable")

# Verbs that need weights of the dtype of the layer: a twin with narrow weights refuses them.
TRAINING_VERBS = ("forward", "backward", "fit", "training_forward", "training_backward", "zero_grad", "load_state_dict")


def real(array: Any) -> Array:
    """An array as it is, or a narrow one as float32."""
    if not isinstance(array, NarrowArray):
        plain: Array = array
        return plain
    made = array.real()
    made.flags.writeable = False
    return made


class Narrowable:
    """What `Layer` has of twins: `with_weights`, and what a twin refuses.

    The arrays of a twin hold a `NarrowArray` in the place of each matrix that is narrow.
    """

    # Patterns of the names of those parameters that are matrices of products, or tables of vectors: what a twin of
    # `with_weights` has in a narrow type.
    _products: ClassVar[tuple[str, ...]] = ()
    _weight_type: str = "float32"

    dtype: np.dtype[Any]
    _arrays: Mapping[str, Any]
    _config: dict[str, Any]

    @abstractmethod
    def _assign(self, changed: Mapping[str, Array]) -> None: ...

    @abstractmethod
    def _adopt(self, changed: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def _check_mapping(self, given: Mapping[str, Any], arrays: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def _freeze(self) -> None: ...

    @property
    def weights(self) -> str:
        """Type of the weights of products: "float32", or of a twin "bfloat16" or "int8"; else that of `dtype`."""
        return self.dtype.name if self._weight_type == "float32" else self._weight_type

    def with_weights(self: N, type: str, *, keep: Any = ()) -> N:
        """Return a twin for inference whose matrices are in a narrow type: less memory to hold and to read.

        Inputs, outputs, states, biases and norms stay float32. What enters a product is made narrow as the weights are:
        rounded to bfloat16, or to 8 bits with one scale for each row, found when the row is used. A row's result does
        not depend on the batch that it stands in, nor on the number of threads.

        Parameters
        ----------
        type : {"bfloat16", "int8"}
            "bfloat16" is float32 rounded to 8 bits of precision, "int8" whole numbers from -127 to 127 with one scale
            for each output of a matrix.
        keep : list of str, optional
            Patterns of names of `parameters`, as ``"*attention*"``: those stay float32. Matrices of one layer that are
            added in one sum, as weight_ih and weight_hh of a recurrent layer, are kept together.

        Returns
        -------
        layer or model
            Of the same class. It does not hold the float32 weights, and cannot be trained: `forward`, `backward`,
            `grads` and setting a parameter raise a `TypeError`. What `parameters` shows are the narrow weights as
            float32.

        Raises
        ------
        ValueError
            For another type, for a pattern that no name fits, or where the dtype is not float32.
        TypeError
            Where this is a twin already.
        """
        if type not in TYPES[1:]:
            raise ValueError(f"type should be {' or '.join(map(repr, TYPES[1:]))}, not {type!r}")
        self._refuse_where_narrow("with_weights")
        if self.dtype != np.float32:
            raise ValueError(f"type: a layer should be of float32 to have {type} weights, and {self!r} is not")
        patterns = [keep] if isinstance(keep, str) else list(keep)
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise TypeError(f"keep should hold patterns of names, not {checks.describe(pattern)}")
            if not fnmatch.filter(self._arrays, pattern):
                raise ValueError(f"keep should hold patterns that fit a parameter, and {pattern!r} fits none")
        arrays: dict[str, Any] = dict(self._arrays)
        for names in self._product_groups(""):
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns):
                arrays |= {name: narrowed(arrays[name], type) for name in names}
        return self._restored(arrays, type)

    def _restored(self: N, arrays: Mapping[str, Any], weight_type: str) -> N:
        """Return another layer of this configuration, with these arrays."""
        made = object.__new__(self.__class__)
        made._restore(self._config, arrays, weight_type)
        return made

    def _product_groups(self, prefix: str) -> list[tuple[str, ...]]:
        """The names of the matrices of products; those of one group are of one type."""
        return [(prefix + name,) for name in self._arrays if any(fnmatch.fnmatchcase(name, p) for p in self._products)]

    def _restore(self, config: Any, arrays: Mapping[str, Any], weight_type: str) -> None:
        """Become a layer of some configuration, with these arrays."""
        self.__init__(**config)  # type: ignore[misc]
        if weight_type == "float32":
            self._assign(arrays)
        else:
            self._adopt(arrays)
            self._become_twin(weight_type)
        self._freeze()

    def _become_twin(self, weight_type: str) -> None:
        """From now on the weights are narrow, and the layer cannot be trained."""
        self._weight_type = weight_type
        self.__dict__.update({verb: self._refusal(verb) for verb in TRAINING_VERBS if hasattr(type(self), verb)})

    def _refusal(self, what: str) -> Any:
        """What stands in the place of a verb of training."""

        def refuse(*args: Any, **options: Any) -> Any:
            self._refuse_where_narrow(what)

        return refuse

    def _refuse_where_narrow(self, what: str) -> None:
        if self._weight_type != "float32":
            raise TypeError(
                f"{what} needs float32 weights, and this {type(self).__name__} is a twin with {self._weight_type}"
                " weights, for inference alone"
            )

    def _take_narrow(self, given: Mapping[str, Any], weight_type: str) -> None:
        """Become the twin that a file holds."""
        self._check_mapping(given, {name: array for name, array in given.items() if name in self._arrays})
        allowed = {name for group in self._product_groups("") for name in group}
        for group in self._product_groups(""):
            if len({isinstance(given[name], NarrowArray) for name in group}) > 1:
                raise ValueError(f"{' and '.join(group)} should be of one type")
        arrays = {}
        for name, array in given.items():
            if isinstance(array, NarrowArray) and name not in allowed:
                raise ValueError(f"{name} should be of float32, not {weight_type}")
            narrow = isinstance(array, NarrowArray)
            arrays[name] = array if narrow else np.array(checks.real_array(name, array, self.dtype), order="C")
        self._adopt(arrays)
        self._become_twin(weight_type)
