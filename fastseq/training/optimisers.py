"""Optimisers: SGD, RMSProp, Adam and AdamW, each one compiled pass over a parameter and what is kept for it."""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from fastseq import backend, checks, threads
from fastseq.checks import Array
from fastseq.layers import inside
from fastseq.layers.base import Layer


def operations(array: Array) -> backend.Optimisers:
    """The passes for arrays of a dtype."""
    return backend.for_dtype(array.dtype).optimisers


class _Settings(NamedTuple):
    """What a group may set of its own."""

    lr: float | None
    weight_decay: float
    frozen: bool


class Optimiser(ABC):
    """What the optimisers share: parameters in groups, arrays kept from step to step, the learning rate."""

    _slots: tuple[str, ...]  # names of the arrays that are kept for each parameter

    def __init__(self, layer: Layer, lr: float, weight_decay: float, groups: Any) -> None:
        if not isinstance(layer, Layer):
            raise TypeError(f"layer should be a layer or a model of fastseq, not {checks.describe(layer)}")
        inside.check_trainable(layer, type(self).__name__)
        self._layer = layer
        self._lr = self._first_lr = checks.number("lr", lr, least=0)
        default = _Settings(None, checks.number("weight_decay", weight_decay, least=0), False)
        self._settings = _grouped(tuple(layer.parameters), default, groups)
        if self._first_lr == 0 and any(s.lr is not None for s in self._settings.values()):
            raise ValueError("lr should be more than 0 where a group has an lr of its own, which follows it")
        self._trained = tuple(name for name, settings in self._settings.items() if not settings.frozen)
        self._steps = 0
        arrays = inside.arrays(layer)
        self._kept: dict[str, dict[str, Array]] = {
            slot: {name: np.zeros_like(arrays[name]) for name in self._trained} for slot in self._slots
        }

    @property
    def layer(self) -> Layer:
        """Whose parameters change."""
        return self._layer

    @property
    def steps(self) -> int:
        """Steps taken so far."""
        return self._steps

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the parameters that are not frozen."""
        return self._trained

    @property
    def lr(self) -> float:
        """The learning rate; may be set. That of a group with one of its own changes by the same factor."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = checks.number("lr", value, least=0)

    def step(self, grads: Mapping[str, Any] | None = None) -> None:
        """Change the parameters once.

        Parameters
        ----------
        grads : mapping from str to array, optional
            The gradients, of the shapes of the parameters; those in ``layer.grads`` by default. Not changed.

        Raises
        ------
        ValueError, TypeError
            Naming what is missing or misshapen; nothing has changed then, nor after a `MemoryError`.
        """
        given = self._gradients(grads)
        old = inside.arrays(self._layer)
        new = {name: np.empty_like(old[name]) for name in given}
        step = self._steps + 1
        n_threads = threads.get_num_threads()
        for name, gradient in given.items():
            settings = self._settings[name]
            # In proportion, so that a schedule of the learning rate is one for every group.
            lr = self._lr if settings.lr is None else settings.lr * (self._lr / self._first_lr)
            kept = {slot: arrays[name] for slot, arrays in self._kept.items()}
            self._pass(old[name], gradient, kept, new[name], step, lr, settings.weight_decay, n_threads)
        self._steps = step
        inside.adopt_parameters(self._layer, new)

    def _gradients(self, grads: Any) -> dict[str, Array]:
        """The gradient of every parameter that is trained, as the passes want it."""
        if grads is None:
            own = self._layer.grads
            return {name: own[name] for name in self._trained}
        given = checks.mapping("grads", grads)
        parameters = inside.arrays(self._layer)
        faults = [f"{name} is missing" for name in self._trained if name not in given]
        faults += [f"{name} is unknown" for name in given if name not in parameters]
        arrays = {}
        for name in self._trained:
            if name in given:
                array = np.ascontiguousarray(checks.real_array(f"grads[{name!r}]", given[name], self._layer.dtype))
                if array.shape != parameters[name].shape:
                    faults.append(f"{name} should be of shape {parameters[name].shape}, not {array.shape}")
                arrays[name] = array
        if faults:
            raise ValueError(f"grads does not fit {self._layer!r}: {'; '.join(faults)}")
        return arrays

    @abstractmethod
    def _pass(
        self,
        p: Array,
        g: Array,
        kept: Mapping[str, Array],
        out: Array,
        step: int,
        lr: float,
        weight_decay: float,
        n_threads: int,
    ) -> None:
        """Compute `out`, the parameter `p` after this step, from its gradient `g`; change the arrays of `kept`."""

    def state_dict(self) -> dict[str, Any]:
        """All that a later step depends on: copies of the arrays that are kept, the count of steps, the rate.

        The names of the arrays are ``<what is kept>.<parameter>``; beside them are the numbers ``steps`` and ``lr``.
        """
        arrays = {f"{slot}.{n}": np.array(a) for slot, kept in self._kept.items() for n, a in kept.items()}
        return {"steps": self._steps, "lr": self._lr, **arrays}

    def load_state_dict(self, mapping: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave, of an optimiser of the same kind over the same parameters.

        Raises
        ------
        ValueError
            Naming every name that is unknown, missing or of another shape; the optimiser is as it was then.
        """
        given = checks.mapping("mapping", mapping)
        parameters = inside.arrays(self._layer)
        wanted = {f"{slot}.{name}": parameters[name].shape for slot in self._slots for name in self._trained}
        faults = [f"{name} is missing" for name in ("steps", "lr", *wanted) if name not in given]
        faults += [f"{name} is unknown" for name in given if name not in wanted and name not in ("steps", "lr")]
        arrays = {n: checks.real_array(n, given[n], self._layer.dtype) for n in wanted if n in given}
        faults += [
            f"{name} should be of shape {wanted[name]}, not {array.shape}"
            for name, array in arrays.items()
            if array.shape != wanted[name]
        ]
        if faults:
            raise ValueError(f"mapping does not fit {self!r}: {'; '.join(faults)}")
        steps, lr = checks.size("steps", given["steps"]), checks.number("lr", given["lr"], least=0)
        kept = {slot: {n: np.array(arrays[f"{slot}.{n}"], order="C") for n in self._trained} for slot in self._slots}
        self._steps, self._lr, self._kept = steps, lr, kept

    def __repr__(self) -> str:
        return f"{type(self).__name__}(lr={self._lr:g}) of {self._layer!r}, {self._steps:,} steps"


def _grouped(names: Sequence[str], default: _Settings, groups: Any) -> dict[str, _Settings]:
    """The settings of every parameter: those of the first group that has it, else the default."""
    if groups is None:
        return dict.fromkeys(names, default)
    if isinstance(groups, Mapping | str) or not isinstance(groups, Sequence):
        raise TypeError(f"groups should be a list of dicts, not {checks.describe(groups)}")
    found: dict[str, _Settings] = {}
    for index, group in enumerate(groups):
        where = f"groups[{index}]"
        given = checks.mapping(where, group)
        unknown = [key for key in given if key not in ("names", *_Settings._fields)]
        if unknown:
            raise ValueError(f"{where} should have the keys names, {', '.join(_Settings._fields)}, not {unknown[0]!r}")
        if "names" not in given:
            raise ValueError(f"{where} should have the key names")
        settings = default
        if "lr" in given:
            settings = settings._replace(lr=checks.number(f"{where}['lr']", given["lr"], least=0))
        if "weight_decay" in given:
            decay = checks.number(f"{where}['weight_decay']", given["weight_decay"], least=0)
            settings = settings._replace(weight_decay=decay)
        if "frozen" in given:
            settings = settings._replace(frozen=checks.flag(f"{where}['frozen']", given["frozen"]))
        patterns = [given["names"]] if isinstance(given["names"], str) else given["names"]
        if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError(f"{where}['names'] should be a pattern or a list of them, not {checks.describe(patterns)}")
        for pattern in patterns:
            matching = fnmatch.filter(names, pattern)
            if not matching:
                raise ValueError(f"{where}['names']: {pattern!r} should match one of {', '.join(names)}")
            for name in matching:
                found.setdefault(name, settings)
    return {name: found.get(name, default) for name in names}


class SGD(Optimiser):
    """Stochastic gradient descent, with momentum or Nesterov's.

    m' = momentum m + g;  p' = p - lr m', or p - lr (g + momentum m') with `nesterov`; g has weight_decay p added.

    Parameters
    ----------
    layer : Layer
        Whose parameters change.
    lr : float
        The learning rate; settable as ``lr``.
    momentum : float
        How much of the last direction stays.
    nesterov : bool
        Whether to look ahead along the momentum.
    weight_decay : float
        How much of the parameter is added to its gradient.
    groups : list of dict, optional
        Settings of some parameters: ``names``, one or several patterns as of a shell, and any of ``lr``,
        ``weight_decay`` and ``frozen``. A parameter belongs to the first group that matches its name. The ``lr``
        of a group changes by the same factor as that of the optimiser.
    """

    def __init__(
        self,
        layer: Layer,
        lr: float,
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        groups: Any = None,
    ) -> None:
        self._momentum = checks.number("momentum", momentum, least=0)
        self._nesterov = checks.flag("nesterov", nesterov)
        if self._nesterov and not self._momentum:
            raise ValueError("momentum should be more than 0 with nesterov=True, not 0")
        self._slots = ("momentum",) if self._momentum else ()
        super().__init__(layer, lr, weight_decay, groups)

    def _pass(
        self,
        p: Array,
        g: Array,
        kept: Mapping[str, Array],
        out: Array,
        step: int,
        lr: float,
        weight_decay: float,
        n_threads: int,
    ) -> None:
        momenta = kept.get("momentum")
        operations(p).sgd(p, g, momenta, out, lr, self._momentum, self._nesterov, weight_decay, n_threads)


class RMSProp(Optimiser):
    """Gradients divided by the root of their running mean square [1]_.

    v' = alpha v + (1 - alpha) g²;  m' = momentum m + g / (√v' + eps);  p' = p - lr m'; g has weight_decay p added.

    Parameters
    ----------
    layer : Layer
        Whose parameters change.
    lr : float
        The learning rate; settable as ``lr``.
    alpha : float in [0, 1)
        How much of the mean square stays.
    eps : float
        Added to the root.
    momentum : float
        How much of the last direction stays.
    weight_decay : float
        How much of the parameter is added to its gradient.
    groups : list of dict, optional
        Settings of some parameters; see `SGD`.

    References
    ----------
    .. [1] T. Tieleman, G. Hinton, "Neural networks for machine learning", lecture 6.5, 2012.
    """

    def __init__(
        self,
        layer: Layer,
        lr: float = 1e-2,
        *,
        alpha: float = 0.99,
        eps: float = 1e-8,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        groups: Any = None,
    ) -> None:
        self._alpha = checks.number("alpha", alpha, least=0, below=1)
        self._eps = checks.number("eps", eps, least=0)
        self._momentum = checks.number("momentum", momentum, least=0)
        self._slots = ("square", "momentum") if self._momentum else ("square",)
        super().__init__(layer, lr, weight_decay, groups)

    def _pass(
        self,
        p: Array,
        g: Array,
        kept: Mapping[str, Array],
        out: Array,
        step: int,
        lr: float,
        weight_decay: float,
        n_threads: int,
    ) -> None:
        square, momenta = kept["square"], kept.get("momentum")
        operations(p).rmsprop(
            p, g, square, momenta, out, lr, self._alpha, self._eps, self._momentum, weight_decay, n_threads
        )


class Adam(Optimiser):
    """Running means of the gradient and of its square, both freed of their bias towards the zeros they start from [1]_.

    m' = m + (1 - beta1) (g - m);  v' = beta2 v + (1 - beta2) g²;
    p' = p - lr m' / (1 - beta1^t) / (√(v' / (1 - beta2^t)) + eps) in step t; g has weight_decay p added.

    Parameters
    ----------
    layer : Layer
        Whose parameters change.
    lr : float
        The learning rate; settable as ``lr``.
    betas : pair of floats in [0, 1)
        How much of the mean, and of the mean square, stays.
    eps : float
        Added to the root.
    weight_decay : float
        How much of the parameter is added to its gradient.
    groups : list of dict, optional
        Settings of some parameters; see `SGD`.

    References
    ----------
    .. [1] D. P. Kingma, J. Ba, "Adam: a method for stochastic optimization", ICLR 2015.
    """

    _slots = ("mean", "square")
    _decoupled: ClassVar[bool] = False

    def __init__(
        self,
        layer: Layer,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        groups: Any = None,
    ) -> None:
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise TypeError(f"betas should be a pair of numbers, not {checks.describe(betas)}")
        self._betas = tuple(checks.number(f"betas[{i}]", beta, least=0, below=1) for i, beta in enumerate(betas))
        self._eps = checks.number("eps", eps, least=0)
        super().__init__(layer, lr, weight_decay, groups)

    def _pass(
        self,
        p: Array,
        g: Array,
        kept: Mapping[str, Array],
        out: Array,
        step: int,
        lr: float,
        weight_decay: float,
        n_threads: int,
    ) -> None:
        beta1, beta2 = self._betas
        operations(p).adam(
            p,
            g,
            kept["mean"],
            kept["square"],
            out,
            step,
            lr,
            beta1,
            beta2,
            self._eps,
            weight_decay,
            self._decoupled,
            n_threads,
        )


class AdamW(Adam):
    """Adam whose weight decay stays apart from the gradient [1]_.

    p is replaced by (1 - lr weight_decay) p before Adam's step, and nothing is added to the gradient.

    Parameters
    ----------
    layer : Layer
        Whose parameters change.
    lr : float
        The learning rate; settable as ``lr``.
    betas : pair of floats in [0, 1)
        How much of the mean, and of the mean square, stays.
    eps : float
        Added to the root.
    weight_decay : float
        What share of the parameter, times the learning rate, is taken off in each step.
    groups : list of dict, optional
        Settings of some parameters; see `SGD`.

    References
    ----------
    .. [1] I. Loshchilov, F. Hutter, "Decoupled weight decay regularization", ICLR 2019.
    """

    _decoupled = True

    def __init__(
        self,
        layer: Layer,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        groups: Any = None,
    ) -> None:
        super().__init__(layer, lr, betas=betas, eps=eps, weight_decay=weight_decay, groups=groups)
