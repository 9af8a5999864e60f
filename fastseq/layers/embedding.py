"""Embedding: a row of a matrix for every symbol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastseq import checks, threads
from fastseq.checks import Array
from fastseq.layers.base import Configured, Tape
from fastseq.layers.rows import cleared
from fastseq.layers.settings import KW_ONLY, Dtype, checked, floating, random_seed, size


class Embedding(Configured):
    """A vector for every symbol: y = the row of `weight` that an id names."""

    _products = ("weight",)

    num_embeddings: int = size(doc="V.")
    embedding_dim: int = size(doc="D. The parameter `weight` is (V, D).")
    _: KW_ONLY
    padding_idx: int | None = checked(
        lambda _, value: value,
        default=None,
        takes="int",
        form="int",
        doc="An id, -V..V-1, whose row starts at zero and gets no gradient.",
    )
    dtype: Dtype = floating(default="float32")
    seed: int | None = random_seed(default=None, doc="Fixes the initial parameters, normal with mean 0 and variance 1.")

    def _resolve(self) -> None:
        if self.padding_idx is not None:
            index = checks.size("padding_idx", self.padding_idx, -self.num_embeddings)
            if index >= self.num_embeddings:
                raise ValueError(f"padding_idx should be less than num_embeddings={self.num_embeddings}, not {index}")
            self.padding_idx = index % self.num_embeddings

    def _initial(self, rng: np.random.Generator) -> dict[str, Array]:
        weight = rng.normal(size=(self.num_embeddings, self.embedding_dim))
        if self.padding_idx is not None:
            weight[self.padding_idx] = 0
        return {"weight": weight}

    def _gives(self) -> int:
        return self.embedding_dim

    def __call__(self, ids: Any) -> Array:
        """Look up some symbols.

        Parameters
        ----------
        ids : array, or list of rows of unequal lengths
            Of any shape and integer dtype, each in 0..V-1.

        Returns
        -------
        y : ndarray of shape (..., D)
            Of a list of rows (B, T, D), 0 past the end of each.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be; of an id out of range, its position and value.
        """
        numbers, lengths = self._numbers(ids)
        return cleared(self._looked_up(numbers), lengths)

    def _numbers(self, ids: Any) -> tuple[Array, Array | None]:
        """The ids, and where they were given as rows of unequal lengths, those."""
        ids, lengths = checks.ragged("ids", ids, None)
        return checks.ids("ids", ids, self.num_embeddings), lengths

    def forward(self, ids: Any, seed: int | None = None) -> tuple[Array, Tape]:
        """Call, and keep what `backward` needs.

        Parameters
        ----------
        ids : array
            Of any shape and integer dtype, each in 0..V-1.
        seed : int, optional
            Nothing here is random.

        Returns
        -------
        y : ndarray of shape (..., D)
        tape : Tape
        """
        checks.seed("seed", seed)
        numbers, lengths = self._numbers(ids)
        return cleared(self._looked_up(numbers), lengths), Tape(self, (numbers, lengths))

    def _looked_up(self, ids: Array) -> Array:
        y: Array = self._backend.dense.embedding_forward(
            self._arrays["weight"], ids.reshape(-1), threads.get_num_threads()
        )
        return y.reshape(*ids.shape, self.embedding_dim)

    def backward(self, dy: Any, tape: Tape, *, grads: Mapping[str, Array] | None = None) -> None:
        """Gradient of the parameter, given that of the outputs; symbols have none, and there is nothing to return.

        Parameters
        ----------
        dy : array of shape (..., D)
        tape : Tape
            What `forward` returned.
        grads : mapping from str to ndarray, optional
            Where the gradient of the parameter is added; `grads` of the layer by default.
        """
        ids, lengths = self._kept(tape)
        dy = checks.like("dy", dy, self.dtype, (*ids.shape, self.embedding_dim))
        dy = cleared(dy, lengths).reshape(-1, self.embedding_dim)
        none = -1  # no id
        padding = none if self.padding_idx is None else self.padding_idx
        self._backend.dense.embedding_backward(
            ids.reshape(-1), dy, self._targets(grads)["weight"], padding, threads.get_num_threads()
        )
