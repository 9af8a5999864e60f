"""Draw random models of Keras and save each with inputs and outputs: a program, run in a process of its own.

python keras_models.py FOLDER COUNT SEED
"""

import os
import sys
import warnings
from pathlib import Path

os.environ["KERAS_BACKEND"] = "torch"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

FORMS = ("m.keras", "m.h5")


def drawn(keras, rng):
    """A model of Keras and inputs of it."""
    layers = keras.layers
    draw = lambda *choices: choices[rng.integers(len(choices))]  # noqa: E731
    size = lambda: int(rng.integers(1, 7))  # noqa: E731
    symbols = draw(True, False)
    masked = symbols and draw(True, False)
    made = []
    if symbols:
        made.append(layers.Embedding(9, size(), mask_zero=masked))
    timed, ends = True, False
    for _ in range(rng.integers(1, 5)):
        kind = draw("SimpleRNN", "LSTM", "GRU", "SimpleRNN", "LSTM", "GRU", "Dense", "norm", "other", "pool")
        if kind in ("SimpleRNN", "LSTM", "GRU") and timed:
            sequences = draw(True, True, False)
            settings = {"use_bias": draw(True, True, False), "return_sequences": sequences}
            if kind == "SimpleRNN":
                settings["activation"] = draw("tanh", "relu", "sigmoid")
            if kind == "GRU":
                settings["reset_after"] = draw(True, False)
            settings["go_backwards"] = draw(True, False, False) and not (masked and sequences)
            settings["dropout"] = draw(0.0, 0.3)
            one = getattr(layers, kind)(size(), **settings)
            if settings["go_backwards"] and draw(True, False):  # the layers of both directions, and they are exchanged
                given = {**one.get_config(), "go_backwards": False, "name": f"{one.name}_other"}
                one = layers.Bidirectional(one, backward_layer=type(one).from_config(given))
            elif not settings["go_backwards"] and draw(True, False):
                one = layers.Bidirectional(one, merge_mode=draw("concat", "sum", "mul", "ave"))
            made.append(one)
            timed = sequences
        elif kind == "Dense":
            activation = draw(None, "relu", "tanh", "sigmoid", "silu", "softmax", "gelu", "linear")
            one = layers.Dense(size(), activation=activation, use_bias=draw(True, False))
            made.append(layers.TimeDistributed(one) if timed and draw(True, False) and not masked else one)
        elif kind == "norm":
            scale = draw(True, False)
            made.append(
                layers.LayerNormalization(epsilon=draw(1e-3, 1e-2), scale=scale, center=not scale or draw(True, False))
            )
        elif kind == "other":
            made.append(
                draw(layers.Dropout(0.3), layers.Activation("tanh"), layers.ReLU(), layers.SpatialDropout1D(0.2))
                if timed
                else layers.Dropout(0.3)
            )
        elif kind == "pool" and timed and not masked:
            made.append(draw(layers.GlobalAveragePooling1D, layers.GlobalMaxPooling1D)())
            timed = False
        ends = not timed
    if all(isinstance(one, layers.SpatialDropout1D) for one in made):
        made.append(layers.Dense(size()))  # something is to be computed
    batch, time = int(rng.integers(1, 5)), int(rng.integers(1, 8))
    if symbols:
        x = rng.integers(1, 9, (batch, time)).astype("int32")
        if masked:
            for row in x:
                place = rng.integers(0, time)
                if ends and draw(True, False):
                    row[rng.random(time) < 0.4] = 0
                    row[rng.integers(time)] = 3
                else:
                    row[place + 1 :] = 0
        source = keras.Input((None,), dtype="int32")
    else:
        x = rng.normal(size=(batch, time, size())).astype("float32")
        source = keras.Input((None, x.shape[-1]))
    if draw(True, False):
        inner = made[1:3]
        if draw(True, False) and len(inner) == 2 and not masked:
            made[1:3] = [keras.Sequential(inner)]
        model = keras.Sequential([source, *made])
    else:
        y = source
        for one in made:
            y = one(y)
        model = keras.Model(source, y)
    return model, x, masked and not ends


def main(folder, count, seed):
    import keras
    from absl import logging

    logging.set_verbosity(logging.ERROR)
    warnings.simplefilter("ignore")
    for trial in range(count):
        rng = np.random.default_rng((seed, trial))
        keras.utils.set_random_seed(trial)
        keras.backend.clear_session()
        model, x, padded = drawn(keras, rng)
        model.set_weights(
            [(rng.normal(size=w.shape) * 0.6).astype("f4") if w.dtype.kind == "f" else w for w in model.get_weights()]
        )
        y = model(x, training=False).detach().numpy()
        path = folder / str(trial)
        path.mkdir()
        for form in FORMS:
            model.save(path / form)
        np.savez(path / "arrays.npz", x=x, y=y, padded=padded)
        (path / "repr.txt").write_text(" ".join(type(one).__name__ for one in model.layers))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
