"""The sets of operations that layers and models run on, as one typed value.

A `Backend` names an implementation of every operation: `COMPILED` is defined here, the one in NumPy in
`fastseq.reference`. Arguments are checked above; an operation receives arrays of one dtype in the layout that it needs.
`n_threads` is the number of threads it may use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, Protocol, TypeVar, cast

import numpy as np

from fastseq import (
    _additive_attention,
    _attention,
    _autoregression,
    _convolution,
    _decoding,
    _dense,
    _losses,
    _markov,
    _optimisers,
    _recurrent,
    _recurrent_decoder,
    _transformer,
    joining,
    over_time,
)
from fastseq.checks import Array
from fastseq.narrow import Weight
from fastseq.windows import Windows

C = TypeVar("C", bound=type)
F = TypeVar("F", bound=Callable[..., Any])


class Recurrent(Protocol):
    """RNN, LSTM and GRU; `cells` are packed weights, [layer][direction]."""

    def pack(
        self,
        kind: str,
        w_ih: Weight,
        w_hh: Weight,
        b_ih: Array | None,
        b_hh: Array | None,
        w_hr: Weight | None,
        /,
        *vectors: Array | None,
    ) -> Any:
        """Weights of one direction of one layer in the form of the other operations; `vectors` are the cell's own."""

    def input_table(self, cell: Any, embedding: Weight, n_threads: int, /) -> Array | None:
        """The input part of the pre-activations for every symbol, for `run`; None where a table does not pay."""

    def fits(self, cells: Any, x: object, dims: int, state: object, out: object, /) -> bool:
        """Whether arguments are known to need no check."""

    def run(
        self,
        cells: Any,
        x: Array,
        h: Array,
        c: Array | None,
        lengths: Array | None,
        resets: Array | None,
        n_threads: int,
        tables: Any = None,
        /,
    ) -> tuple[Array, Array, Array | None]:
        """Whole sequences through all layers and directions: y, and where each row ends."""

    def step(
        self, cells: Any, x: Array, h: Array, c: Array | None, out: Array | None, n_threads: int, /
    ) -> tuple[Array, Array, Array | None]:
        """One time step through all layers."""

    def rollout(
        self,
        cells: Any,
        weight: Weight,
        bias: Array,
        x: Array,
        h: Array,
        c: Array | None,
        steps: int,
        n_threads: int,
        /,
    ) -> tuple[Array, Array, Array | None]:
        """Steps that each take a linear map of the outputs of the one before."""

    def forward(
        self,
        cells: Any,
        x: Array,
        h: Array,
        c: Array | None,
        lengths: Array | None,
        resets: Array | None,
        n_threads: int,
        /,
    ) -> tuple[Array, Array, Array | None, Any]:
        """One layer, with a tape."""

    def gates(self, tape: Any, /) -> dict[str, Array]:
        """Every gate at every step."""

    def backward(
        self,
        tape: Any,
        dy: Array,
        dh: Array | None,
        dc: Array | None,
        truncate: int | None,
        grads: Any,
        keep: bool,
        n_threads: int,
        /,
    ) -> tuple[Array, Array, Array | None, Any]:
        """Gradients of `forward`; those of the weights are added to `grads`."""


class Dense(Protocol):
    """Linear maps, embeddings, norms, activations and dropout, over rows."""

    def linear_pack(self, weight: Weight, bias: Array | None, /) -> Any:
        """Weights in the form of `linear_forward` and `linear_backward`."""

    def linear_forward(self, packed: Any, x: Array, n_threads: int, /) -> Array:
        """x W^T + b."""

    def linear_backward(
        self, packed: Any, x: Array, dy: Array, dweight: Array, dbias: Array | None, n_threads: int, /
    ) -> Array:
        """The gradient of x."""

    def embedding_forward(self, weight: Weight, ids: Array, n_threads: int, /) -> Array:
        """Rows of `weight`."""

    def embedding_backward(self, ids: Array, dy: Array, dweight: Array, padding_idx: int, n_threads: int, /) -> None:
        """Add to the gradient of the weight."""

    def layer_norm_forward(
        self, x: Array, weight: Array | None, bias: Array | None, eps: float, n_threads: int, /
    ) -> tuple[Array, Array, Array]:
        """y, the means and the scales."""

    def layer_norm_backward(
        self,
        x: Array,
        weight: Array | None,
        means: Array,
        scales: Array,
        dy: Array,
        dweight: Array | None,
        dbias: Array | None,
        n_threads: int,
        /,
    ) -> Array:
        """The gradient of x."""

    def rms_norm_forward(self, x: Array, weight: Array | None, eps: float, n_threads: int, /) -> tuple[Array, Array]:
        """y and the scales."""

    def rms_norm_backward(
        self, x: Array, weight: Array | None, scales: Array, dy: Array, dweight: Array | None, n_threads: int, /
    ) -> Array:
        """The gradient of x."""

    def activation_forward(self, x: Array, kind: str, n_threads: int, /) -> Array:
        """A function of every element."""

    def activation_backward(self, x: Array, dy: Array, kind: str, n_threads: int, /) -> Array:
        """The gradient of x."""

    def softmax_forward(self, x: Array, n_threads: int, /) -> Array:
        """The softmax of every row."""

    def softmax_backward(self, y: Array, dy: Array, n_threads: int, /) -> Array:
        """The gradient of x."""

    def dropout(self, x: Array, p: float, seed: int, stream: int, n_threads: int, /) -> Array:
        """x / (1 - p), or 0 with probability p."""


class Convolution(Protocol):
    """Convolution over time."""

    def conv_pack(self, weight: Weight, bias: Array | None, groups: int, /) -> Any:
        """Weights in the form of `conv_forward` and `conv_backward`."""

    def conv_forward(self, packed: Any, x: Array, windows: Windows, n_threads: int, /) -> Array:
        """The outputs of all windows, zeros past those of a row."""

    def conv_backward(
        self,
        packed: Any,
        x: Array,
        windows: Windows,
        dy: Array,
        dweight: Array,
        dbias: Array | None,
        n_threads: int,
        /,
    ) -> Array:
        """The gradient of x."""


class Attention(Protocol):
    """Softmax attention over heads, and rotary positions."""

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        spans: tuple[Array, Array] | None,
        lengths: Array | None,
        mask: Array | None,
        causal: bool,
        window: int | None,
        scale: float,
        want_weights: bool,
        n_threads: int,
        /,
    ) -> tuple[Array, Array | None]:
        """The outputs and, if wanted, the attention weights."""

    def usual_attention(self, q: Any, k: Any, v: Any, causal: bool, n_threads: int, /) -> Array | None:
        """The outputs without masks, where the arguments are known to need no check; else None."""

    def attention_forward(
        self,
        q: Array,
        k: Array,
        v: Array,
        spans: tuple[Array, Array] | None,
        lengths: Array | None,
        mask: Array | None,
        causal: bool,
        window: int | None,
        scale: float,
        dropout: float,
        seed: int,
        n_threads: int,
        /,
    ) -> tuple[Array, Any]:
        """The outputs, and what `attention_backward` needs."""

    def attention_backward(self, kept: Any, dout: Array, n_threads: int, /) -> tuple[Array, Array, Array]:
        """Gradients of q, k and v."""

    def rotary(
        self, x: Array, cos: Array, sin: Array, positions: Array, interleaved: bool, inverse: bool, n_threads: int, /
    ) -> Array:
        """Heads rotated by the angles of their positions."""


class AdditiveAttention(Protocol):
    """Additive attention of a recurrent decoder, and tanh."""

    def tanh_forward(self, x: Array, n_threads: int, /) -> Array:
        """tanh of every element."""

    def tanh_backward(self, y: Array, dy: Array, n_threads: int, /) -> Array:
        """The gradient of x."""

    def align(
        self, query: Array, projected: Array, keys: Array, score: Array, firsts: Array, counts: Array, n_threads: int, /
    ) -> tuple[Array, Array]:
        """Contexts and attention weights."""

    def align_backward(
        self,
        query: Array,
        projected: Array,
        keys: Array,
        score: Array,
        starts: Array | None,
        firsts: Array,
        counts: Array,
        weights: Array,
        dcontext: Array,
        dprojected: Array,
        dkeys: Array,
        dscore: Array,
        n_threads: int,
        /,
    ) -> Array:
        """The gradient of the queries; the others are added."""


class Pooling(Protocol):
    """One vector of all steps of a row, or of each window of them."""

    def pooling_forward(self, x: Array, lengths: Array | None, kind: str, /) -> tuple[Array, Any]:
        """y (B, D), and what `pooling_backward` needs."""

    def pooling_backward(self, dy: Array, kept: Any, kind: str, /) -> Array:
        """The gradient of x."""

    def reverse(self, x: Array, lengths: Array | None, /) -> Array:
        """The steps of each row (B, T, ...) in reverse order; its own backward."""

    def merge_forward(self, x: Array, mode: str, /) -> Array:
        """y (..., H) of both directions (..., 2H)."""

    def merge_backward(self, dy: Array, x: Array, mode: str, /) -> Array:
        """dx (..., 2H)."""

    def window_pooling_forward(self, x: Array, windows: Windows, kind: str, /) -> Array:
        """y (B, outputs, C)."""

    def window_pooling_backward(self, x: Array, windows: Windows, kind: str, dy: Array, /) -> Array:
        """The gradient of x."""


class Joining(Protocol):
    """One array of several of the same number of axes, "add", "multiply" or "concatenate"."""

    def join_forward(self, arrays: Sequence[Array], kind: str, /) -> tuple[Array, Any]:
        """y, and what `join_backward` needs."""

    def join_backward(self, dy: Array, kept: Any, kind: str, /) -> list[Array]:
        """The gradient of each array."""


class Transformer(Protocol):
    """Stacks of Transformer blocks in inference, and the keys and values that they keep."""

    @property
    def Pages(self) -> Any:
        """The class of keys and values of a batch of sequences."""

    def block_pack(self, settings: Mapping[str, Any], sublayers: list[Any], /) -> Any:
        """The weights of a block in the form of the other operations."""

    def run_blocks(
        self,
        blocks: Any,
        x: Array,
        starts: Array,
        positions: Array | None,
        causal: bool,
        mask: Array | None,
        memory: Array | None,
        memory_starts: Array | None,
        memory_mask: Array | None,
        final_norm: Any,
        want_weights: bool,
        n_threads: int,
        /,
    ) -> tuple[Array, list[Any] | None]:
        """All blocks over the rows of a batch."""

    def no_pages(self, blocks: Any, dtype: Any, rows: int, /) -> Any:
        """Pages of rows without tokens."""

    def memory_pages(self, blocks: Any, memory: Array, starts: Array, n_threads: int, /) -> Any:
        """Keys and values of a memory."""

    def run_cached(
        self,
        blocks: Any,
        x: Array,
        starts: Array,
        pages: Any,
        memory: Any,
        final_norm: Any,
        n_threads: int,
        /,
    ) -> tuple[Array, Any]:
        """All blocks over further tokens of each row; the outputs, and the pages with them."""


class Losses(Protocol):
    """Means of losses over what counts, and their gradients."""

    def softmax_cross_entropy(
        self, logits: Array, targets: Array, count: int, label_smoothing: float, n_threads: int, /
    ) -> tuple[float, Array]:
        """-log softmax(logits)[target]."""

    def binary_cross_entropy_with_logits(
        self, logits: Array, targets: Array, lengths: Array | None, count: int, n_threads: int, /
    ) -> tuple[float, Array]:
        """-t log sigmoid(x) - (1 - t) log(1 - sigmoid(x))."""

    def mean_squared_error(
        self, predictions: Array, targets: Array, lengths: Array | None, count: int, n_threads: int, /
    ) -> tuple[float, Array]:
        """(prediction - target)^2."""

    def huber(
        self, predictions: Array, targets: Array, delta: float, lengths: Array | None, count: int, n_threads: int, /
    ) -> tuple[float, Array]:
        """The Huber loss."""


class Optimisers(Protocol):
    """One step of an optimiser for one parameter; what clipping needs."""

    def sgd(
        self,
        p: Array,
        g: Array,
        momenta: Array | None,
        out: Array,
        lr: float,
        momentum: float,
        nesterov: bool,
        weight_decay: float,
        n_threads: int,
        /,
    ) -> None:
        """Gradient descent."""

    def rmsprop(
        self,
        p: Array,
        g: Array,
        squares: Array,
        momenta: Array | None,
        out: Array,
        lr: float,
        alpha: float,
        eps: float,
        momentum: float,
        weight_decay: float,
        n_threads: int,
        /,
    ) -> None:
        """RMSProp."""

    def adam(
        self,
        p: Array,
        g: Array,
        means: Array,
        squares: Array,
        out: Array,
        step: int,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        decoupled: bool,
        n_threads: int,
        /,
    ) -> None:
        """Adam, or AdamW where the decay is decoupled."""

    def scale(self, x: Array, factor: float, n_threads: int, /) -> None:
        """Multiply an array in place."""

    def sum_of_squares(self, x: Array, n_threads: int, /) -> float:
        """The sum of the squares of all elements."""


class Decoding(Protocol):
    """From logits to symbols."""

    def search(self, decoder: Any, logits: Array, prompts: list[Array], keys: Array | None, settings: Any, /) -> Any:
        """A search over a decoder whose rows stand at the ends of prompts."""


class RecurrentDecoder(Protocol):
    """Compiled decoders of recurrent models."""

    def pack_pair(self, weight: Weight, bias: Array | None, columns: int, /) -> Any:
        """Weights of a linear map over two vectors one after another, split at `columns`."""

    @property
    def Weights(self) -> Any:
        """The class of the weights of a decoder."""

    @property
    def Decoder(self) -> Any:
        """The class of a decoder."""


class Autoregression(Protocol):
    """Autoregressive models of series."""

    def triangle(self, x: Array, lengths: Array, order: int, first: int, n_threads: int, /) -> Array:
        """The triangular factor of every series' equations."""

    def predict(self, x: Array, lengths: Array, intercept: Array, coefficients: Array, n_threads: int, /) -> Array:
        """What is expected after every step."""

    def rollout(self, recent: Array, intercept: Array, coefficients: Array, horizon: int, n_threads: int, /) -> Array:
        """Predictions that take predictions for values."""

    def rollout_perceptron(
        self,
        recent: Array,
        hidden_weight: Array,
        hidden_bias: Array,
        output_weight: Array,
        output_bias: Array,
        activation: str,
        horizon: int,
        n_threads: int,
        /,
    ) -> Array:
        """The same for a perceptron."""

    def activate(self, x: Array, activation: str, /) -> Array:
        """The activation of the perceptron's hidden units."""


class Markov(Protocol):
    """Markov chains."""

    @property
    def Decoder(self) -> Any:
        """The class of a decoder."""


@dataclass(frozen=True)
class Backend:
    """One implementation of every operation.

    Parameters
    ----------
    name : str
        For messages and for people.
    dtypes : tuple of str, or None
        The dtypes it takes; None: every floating dtype.
    recurrent, dense, convolution, attention, additive_attention, pooling, joining, transformer, losses, \
optimisers, decoding, autoregression, markov
        The operations, by subject.
    recurrent_decoder, transformer_decoder : optional
        Decoders that `decoding` drives without Python; None: models are decoded by their `step`.
    """

    name: str
    dtypes: tuple[str, ...] | None
    recurrent: Recurrent
    dense: Dense
    convolution: Convolution
    attention: Attention
    additive_attention: AdditiveAttention
    pooling: Pooling
    joining: Joining
    transformer: Transformer
    losses: Losses
    optimisers: Optimisers
    decoding: Decoding
    autoregression: Autoregression
    markov: Markov
    recurrent_decoder: RecurrentDecoder | None = None
    transformer_decoder: Callable[..., Any] | None = None
    _classes: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def __repr__(self) -> str:
        return f"<backend {self.name}>"

    def takes(self, dtype: np.dtype[Any]) -> bool:
        """Whether its operations take arrays of a dtype."""
        return self.dtypes is None or dtype.name in self.dtypes

    def of(self, cls: C) -> C:
        """Return the class of layers that is `cls` over this backend: what a layer makes its children of."""
        return cast(C, self._classes.get(cls, cls))

    def made_from(self, cls: C, module: str) -> C:
        """Make the class that is `cls` over this backend, and return it from `of` from now on.

        Parameters
        ----------
        cls : type
            A class of layers or models over the compiled operations.
        module : str
            Where the new class is to be found by its name, for pickles.
        """
        namespace = {"__module__": module, "__qualname__": cls.__qualname__, "_backend": self}
        made = type(cls)(cls.__name__, (cls,), namespace)
        made.__doc__ = cls.__doc__  # which has the entries of settings already
        self._classes[cls] = made
        return made

    def over(self, function: F, module: str) -> F:
        """Return a function over this backend: the same code, with another default of its argument `_backend`.

        Parameters
        ----------
        function : function
            Over the compiled operations, decorated by `elsewhere.hiding_private`.
        module : str
            Where the new function is to be found by its name, for pickles.
        """
        made = FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
        )
        made.__kwdefaults__ = {**(function.__kwdefaults__ or {}), "_backend": self}
        made.__dict__.update(function.__dict__)
        made.__doc__, made.__module__, made.__annotations__ = function.__doc__, module, function.__annotations__
        return cast(F, made)


COMPILED = Backend(
    name="compiled",
    dtypes=("float32", "float64"),
    recurrent=_recurrent,
    dense=_dense,
    convolution=_convolution,
    attention=_attention,
    additive_attention=_additive_attention,
    pooling=over_time,
    joining=joining,
    transformer=_transformer,
    losses=_losses,
    optimisers=_optimisers,
    decoding=_decoding,
    autoregression=_autoregression,
    markov=_markov,
    recurrent_decoder=_recurrent_decoder,
    transformer_decoder=_transformer.Decoder,
)

_backends = [COMPILED]


def register(backend: Backend) -> None:
    """Add a backend to those that `for_dtype` and `general` choose from."""
    _backends.append(backend)


def for_dtype(dtype: np.dtype[Any]) -> Backend:
    """Return the first backend that takes a dtype: the compiled one if it can."""
    return next(backend for backend in _backends if backend.takes(dtype))


def general() -> Backend:
    """Return the backend that takes every dtype, and decoders written in Python."""
    return next(backend for backend in _backends if backend.dtypes is None)
