"""A whole step of training a character Transformer: forward, backward, clipping and AdamW, in fastseq and PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastseq.checks import Array
from fastseq.cli import UsageError, engines
from fastseq.cli.cases import ITEM, Case, shapes
from fastseq.cli.engines import Model, Outputs

AXES = "layers,width,heads,B,T"
SHAPES = ((4, 128, 4, 12, 64), (6, 384, 6, 8, 256))
SYMBOLS = 96
MAX_NORM = 1.0
# With the usual eps of 1e-8 an element whose gradient is rounding and nothing else moves as far as all others, forward
# or back as it happens, and parameters could not be compared after some steps.
SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-4, "weight_decay": 0.1}
STEPS_COMPARED = 3


@dataclass(frozen=True)
class Step(Case):
    """A step of the Transformer in the arrangement of GPT-2: pre-norm, tanh GELU, learned positions, tied output.

    Parameters
    ----------
    layers, width, heads : int
        The feed-forward is four times as wide within.
    batch, time : int
        Of symbols; there are as many positions as time steps.
    """

    layers: int
    width: int
    heads: int
    batch: int
    time: int

    @property
    def group(self) -> str:
        """For people."""
        return "step"

    @property
    def name(self) -> str:
        """For people."""
        return f"step {self.label}"

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.layers}×{self.width}×{self.heads}, {self.batch}×{self.time}"

    @property
    def axes(self) -> str:
        """For people."""
        return "layers×width×heads, B×T"

    @property
    def train(self) -> bool:
        """It is."""
        return True

    @property
    def engines(self) -> tuple[str, ...]:
        """Those that train."""
        return ("reference", *_PEERS)

    @property
    def outputs(self) -> int:
        """Loss and norm."""
        return 2

    @property
    def terms(self) -> int:
        """How many terms a gradient sums: in one layer after another, over all symbols."""
        return self.layers * 8 * self.width * self.batch * self.time

    @property
    def weights(self) -> int:
        """How many there are in products, those of the output among them."""
        return self.width * (12 * self.layers * self.width + SYMBOLS)

    @property
    def flops(self) -> int:
        """Those of all linear maps and of causal attention, and on the way back of the gradients of both factors."""
        attention = 4 * self.layers * self.width * self.batch * (self.time * (self.time + 1) // 2)
        return 3 * (2 * self.weights * self.batch * self.time + attention)

    @property
    def bytes_read(self) -> int:
        """Bytes of weights: once on the way forward, once on the way back."""
        return 2 * self.working_set

    @property
    def working_set(self) -> int:
        """Bytes of weights."""
        return ITEM * self.weights

    def memory(self, engines: int) -> int:
        """About how many bytes the arrays take in all processes together."""
        of_token = self.layers * (40 * self.width + 2 * self.heads * self.time) + 4 * SYMBOLS
        # The weights, packed weights, gradients, what AdamW keeps of each, and what is new.
        return (engines * ITEM + 2 * ITEM) * (7 * self.weights + self.batch * self.time * of_token)

    def describe(self) -> dict[str, Any]:
        """For programs."""
        return {
            "kind": "train",
            "train": True,
            "layers": self.layers,
            "width": self.width,
            "heads": self.heads,
            "batch": self.batch,
            "time": self.time,
            "symbols": SYMBOLS,
            "weight_bytes_read": self.bytes_read,
        }

    def build(self, engine: str, threads: int) -> Model:
        """A step in an engine; its outputs are loss and norm, then the clipped gradients and the parameters later.

        The gradients are those of the first step, the parameters those after three, by the names of the weights.
        """
        given = numbers(self)
        if engine in engines.OURS:
            return _model(*engines.ours(engine, threads), self, given)
        return _PEERS[engine](self, given, threads)


def chosen(texts: Sequence[str]) -> list[Case]:
    """The cases that the values of --shape ask for, or the usual ones."""
    wanted = shapes(texts, AXES)
    for _, width, heads, _, _ in wanted:
        if width % heads:
            raise UsageError(f"--shape should have a number of heads that divides the width {width}, not {heads}")
    return [Step(layers, width, heads, batch, time) for layers, width, heads, batch, time in wanted or SHAPES]


@dataclass(frozen=True)
class Numbers:
    """The numbers of a case, the same in every process.

    Attributes
    ----------
    weights : dict
        Float32, by the names they have in `fastseq.models.TransformerLM`.
    inputs, targets : arrays of shape (B, T)
        Ids.
    """

    weights: dict[str, Array]
    inputs: Array
    targets: Array


def numbers(case: Step) -> Numbers:
    """The numbers of a case; they depend on the case alone."""
    rng = np.random.default_rng([case.layers, case.width, case.heads, case.batch, case.time])
    given = weights(rng, case.layers, case.width, SYMBOLS, case.time, 0.3)
    frequency = 1 / np.arange(1, SYMBOLS + 1)
    inputs, targets = rng.choice(SYMBOLS, (2, case.batch, case.time), p=frequency / frequency.sum())
    return Numbers(given, inputs, targets)


def weights(
    rng: np.random.Generator,
    layers: int,
    width: int,
    symbols: int,
    context: int,
    deviation: float,
    sharpness: float = 1.0,
) -> dict[str, Array]:
    """Random weights in the arrangement of GPT-2, float32, by the names of `fastseq.models.TransformerLM`.

    Parameters
    ----------
    rng : Generator
    layers, width, symbols, context : int
        There are as many positions as `context` says.
    deviation : float
        That of the embedding, which is the output too, and of the positions.
    sharpness : float
        What the weights of queries and keys are multiplied by, each: the larger, the fewer keys a query attends to.
    """
    inner = 4 * width

    def normal(deviation: float, *shape: int) -> Array:
        return np.float32(deviation) * rng.standard_normal(shape, np.float32)

    def norm(name: str) -> dict[str, Array]:
        return {f"{name}.weight": 1 + normal(0.1, width), f"{name}.bias": normal(0.1, width)}

    def linear(name: str, outputs: int, inputs: int) -> dict[str, Array]:
        return {f"{name}.weight": normal(inputs**-0.5, outputs, inputs), f"{name}.bias": normal(0.1, outputs)}

    # One symbol more: the begin of a text.
    result = {
        "embedding.weight": normal(deviation, symbols + 1, width),
        "positions.weight": normal(deviation, context, width),
    }
    for i in range(layers):
        layer = f"encoder.layers.{i}"
        result |= {
            f"{layer}.self_attn.in_proj_weight": normal(width**-0.5, 3 * width, width),
            f"{layer}.self_attn.in_proj_bias": normal(0.1, 3 * width),
            **linear(f"{layer}.self_attn.out_proj", width, width),
            **linear(f"{layer}.linear1", inner, width),
            **linear(f"{layer}.linear2", width, inner),
            **norm(f"{layer}.norm1"),
            **norm(f"{layer}.norm2"),
        }
        result[f"{layer}.self_attn.in_proj_weight"][: 2 * width] *= np.float32(sharpness)
    return result | norm("encoder.norm")


def _outputs(
    call: Callable[[], Any], gradients: Callable[[], Iterable[Array]], parameters: Callable[[], Iterable[Array]]
) -> Callable[[Any], Outputs]:
    """All of the first step, which was taken, and the parameters some steps later."""

    def outputs(result: Any) -> Outputs:
        first = [np.array(array) for array in (*result, *gradients())]
        for _ in range(1, STEPS_COMPARED):
            call()
        return (*first, *map(np.array, parameters()))

    return outputs


def _model(module: Any, dtype: str, case: Step, numbers: Numbers) -> Model:
    from fastseq import training

    model = module.models.TransformerLM(
        SYMBOLS, case.width, case.heads, case.layers, context=case.time, dropout=0.0, dtype=dtype
    )
    model.load_state_dict(numbers.weights)
    optimiser = training.AdamW(model, **SETTINGS)
    batch = training.Batch(numbers.inputs, numbers.targets)

    def call() -> tuple[float, float]:
        loss, _, tape, *_ = model.training_forward(batch)
        model.zero_grad()
        model.training_backward(tape)
        norm = training.clip_grad_norm(model, MAX_NORM)
        optimiser.step()
        return loss, norm

    def named(arrays: Any) -> list[Array]:
        return [arrays[name] for name in numbers.weights]

    return Model(call, _outputs(call, lambda: named(model.grads), lambda: named(model.parameters)))


def _torch(case: Step, numbers: Numbers, threads: int) -> Model:
    torch = engines.torch(threads)
    functional = torch.nn.functional
    w = {name: torch.from_numpy(array).requires_grad_() for name, array in numbers.weights.items()}
    layers = [f"encoder.layers.{i}" for i in range(case.layers)]
    # Fused is the fastest it has.
    optimiser = torch.optim.AdamW(w.values(), **SETTINGS, fused=True)
    inputs, targets = torch.from_numpy(numbers.inputs), torch.from_numpy(numbers.targets).flatten()

    def linear(x: Any, name: str) -> Any:
        return functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def normed(x: Any, name: str) -> Any:
        return functional.layer_norm(x, (case.width,), w[f"{name}.weight"], w[f"{name}.bias"])

    def attended(x: Any, name: str) -> Any:
        projected = functional.linear(x, w[f"{name}.in_proj_weight"], w[f"{name}.in_proj_bias"])
        q, k, v = projected.unflatten(2, (3, case.heads, -1)).permute(2, 0, 3, 1, 4)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return linear(out.transpose(1, 2).flatten(2), f"{name}.out_proj")

    def call() -> tuple[float, float]:
        x = functional.embedding(inputs, w["embedding.weight"]) + w["positions.weight"]
        for layer in layers:
            x = x + attended(normed(x, f"{layer}.norm1"), f"{layer}.self_attn")
            inner = functional.gelu(linear(normed(x, f"{layer}.norm2"), f"{layer}.linear1"), approximate="tanh")
            x = x + linear(inner, f"{layer}.linear2")
        # The output is tied to the embedding, but for the begin.
        logits = functional.linear(normed(x, "encoder.norm"), w["embedding.weight"][:SYMBOLS])
        loss = functional.cross_entropy(logits.flatten(0, 1), targets)
        optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(w.values(), MAX_NORM)
        optimiser.step()
        return loss.item(), norm.item()

    def gradients() -> Iterable[Array]:
        return (parameter.grad.numpy() for parameter in w.values())

    def parameters() -> Iterable[Array]:
        return (parameter.detach().numpy() for parameter in w.values())

    return Model(call, _outputs(call, gradients, parameters))


_PEERS: dict[str, Callable[[Step, Numbers, int], Model]] = {"torch": _torch}
