"""What every build of the package has to do: layers, a decoder, training and models beside their references.

Run by `.ci/run` on each build, away from the checkout. Prints what it found.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import fastseq as fs
from fastseq import _simd

THREADS = 1, 3
DTYPES = "float32", "float64"
LENGTHS = [17, 0, 3, 9, 17, 1, 16, 2, 5]
# What one input that is rounded the other way does to a result: the last bit of a bfloat16, a level of an int8.
ROUNDED = {"bfloat16": 2**-8, "int8": 1 / 127}


def twin(layer: Any, name: str, *arguments: Any, **settings: Any) -> Any:
    """The same layer or model over NumPy, with the same weights."""
    place = fs.reference.models if hasattr(fs.models, name) else fs.reference
    reference = getattr(place, name)(*arguments, **settings)
    reference.load_state_dict(layer.state_dict())
    return reference


def assert_alike(results: list[list[Any]], what: Any, within: float = 1e-4) -> None:
    for array, expected in zip(*results, strict=True):
        off = np.abs(array - expected).max() / np.abs(expected).max()
        assert off <= within, (*what, f"off by {off:.1e} of the largest, allowed {within:.1e}")


def recurrent(name: str, dtype: str) -> None:
    settings = {"bidirectional": True, "dtype": dtype}
    layer = getattr(fs, name)(5, 35, 2, **settings, seed=1)
    reference = twin(layer, name, 5, 35, 2, **settings)
    x = np.random.default_rng(2).standard_normal((9, 17, 5)).astype(dtype)
    for n_threads in THREADS:
        fs.set_num_threads(n_threads)
        results = []
        for one in (layer, reference):
            y, _, tape = one.forward(x, lengths=LENGTHS)
            one.zero_grad()
            dx, _ = one.backward(np.sin(y), tape, truncate=7)
            results.append([one(x, lengths=LENGTHS)[0], y, dx, *one.grads.values()])
        assert_alike(results, (name, dtype))
    layer = getattr(fs, name)(5, 35, seed=1, dtype=dtype)
    assert (layer.step(x[:, 0])[0] == layer(x)[0][:, 0]).all(), (name, dtype)


def decoder(dtype: str, **settings: Any) -> None:
    settings |= {"dropout": 0.0, "dtype": dtype}
    layer = fs.TransformerDecoder(2, 24, 3, 37, **settings, seed=1)
    reference = twin(layer, "TransformerDecoder", 2, 24, 3, 37, **settings)
    x, memory = np.random.default_rng(3).standard_normal((2, 5, 19, 24)).astype(dtype)
    given = {
        "lengths": [19, 0, 3, 1, 7],
        "memory_lengths": [2, 19, 0, 5, 8],
        "mask": np.random.default_rng(4).random((5, 1, 19, 19)) < 0.8,
        "memory_mask": np.random.default_rng(5).standard_normal((3, 19, 19)).astype(dtype),
    }
    for n_threads in THREADS:
        fs.set_num_threads(n_threads)
        results = []
        for one in (layer, reference):
            y, tape = one.forward(x, memory, **given)
            one.zero_grad()
            results.append([one(x, memory, **given), y, *one.backward(np.sin(y), tape), *one.grads.values()])
        assert (results[0][0] == results[0][1]).all()
        assert_alike(results, (settings, dtype))


def training() -> None:
    layers = (
        fs.Embedding(9, 21, seed=1),
        fs.LSTM(21, 40, seed=2),
        fs.Dropout(0.1),
        fs.LayerNorm(40),
        fs.Linear(40, 9, seed=3),
    )
    model = fs.Sequential(*layers)
    data = fs.training.Streams(np.arange(5000) % 9, batch_size=7, steps=19, seed=4)
    optimiser = fs.training.AdamW(model, 0.01)
    loss = fs.training.fit(
        model, data, loss="cross_entropy", optimiser=optimiser, steps=60, progress=False, seed=5
    ).loss
    assert loss[-1] < 0.3 < loss[0], loss


def generation(name: str, *arguments: Any, **settings: Any) -> None:
    model = getattr(fs.models, name)(*arguments, **settings, seed=1)
    reference = twin(model, name, *arguments, **settings)
    for n_threads in THREADS:
        fs.set_num_threads(n_threads)
        for way in {"num_beams": 3}, {"seed": 2, "top_k": 4}:
            results = [one.generate([[1, 2, 3], [4]], 18, stop=[0], **way) for one in (model, reference)]
            assert all((a == b).all() for a, b in zip(*results, strict=True)), (name, way)


def narrow(weights: str) -> None:
    x = np.random.default_rng(6).standard_normal((9, 17, 24)).astype("float32")
    settings: dict[str, Any]
    for name, arguments, settings in (
        ("LSTM", (24, 35, 2), {"bidirectional": True, "proj_size": 9}),
        ("GRU", (24, 35), {"reset_after": False}),
        ("TransformerEncoder", (2, 24, 3, 37), {"dropout": 0.0, "activation": "swiglu"}),
    ):
        layer = getattr(fs, name)(*arguments, **settings, seed=1)
        reference = twin(layer, name, *arguments, **settings).with_weights(weights)
        layer = layer.with_weights(weights)
        for n_threads in THREADS:
            fs.set_num_threads(n_threads)
            results = [one(x, lengths=LENGTHS) for one in (layer, reference)]
            outputs = [[y[0] if isinstance(y, tuple) else y] for y in results]
            assert_alike(outputs, (name, weights), ROUNDED[weights])
    model = fs.models.TransformerLM(7, 24, 3, 2, context=9, seed=1).with_weights(weights)
    model.generate([[1, 2, 3], [4]], 18, num_beams=3)
    pairs = fs.models.Seq2Seq(7, 7, 5, 35, attention="additive", seed=1).with_weights(weights)
    pairs.generate([[1, 2, 3], [4]], 9, num_beams=3)


def main() -> None:
    for dtype in DTYPES:
        for name in "RNN", "LSTM", "GRU":
            recurrent(name, dtype)
        decoder(dtype, rotary=1e4, norm="rms", window=5)
        decoder(dtype, norm_first=True, activation="gelu", final_norm=True)
    training()
    for weights in "bfloat16", "int8":
        narrow(weights)
    generation("TransformerLM", 7, 24, 3, 2, context=9)
    generation("RecurrentLM", 7, 5, 35, 2)
    generation("TransformerSeq2Seq", 7, 7, 24, 3, 1, 1, max_length=20)
    generation("Seq2Seq", 7, 7, 5, 35, attention="additive")
    print(fs.__file__, _simd.chosen, "OpenMP" if _simd.openmp else "no OpenMP")


if __name__ == "__main__":
    main()
