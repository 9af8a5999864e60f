"""A training step of a character model, in fastseq and in PyTorch: the same weights, the same batch.

Embedding, two LSTM layers, projection, mean cross-entropy, gradients clipped by their norm, AdamW; the state is carried
from step to step. No engine is imported before it is asked for: run as a program, this says what memory one of them
takes, in a process that holds no other.
"""

import json
import sys

import numpy as np

BATCH, TIME, SYMBOLS, HIDDEN, LAYERS = 32, 64, 96, 256, 2
MAX_NORM = 1.0
# With the usual eps of 1e-8 an element whose gradient is rounding and nothing else moves as far as all others, forward
# or back as it happens, and parameters could not be compared after some steps.
SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-4, "weight_decay": 0.1}
STEPS_COMPARED, STEPS_OF_MEMORY = 3, 20


def numbers():
    """Weights by name, as both engines have them, ids of inputs and targets (B, T), and a state that is not zero."""
    rng = np.random.default_rng(0)
    bound = HIDDEN**-0.5

    def uniform(bound, *shape):
        return rng.uniform(-bound, bound, shape).astype(np.float32)

    # One symbol more: the begin of a text.
    weights = {"embedding.weight": rng.standard_normal((SYMBOLS + 1, HIDDEN), np.float32)}
    for layer in range(LAYERS):
        weights[f"recurrent.weight_ih_l{layer}"] = uniform(bound, 4 * HIDDEN, HIDDEN)
        weights[f"recurrent.weight_hh_l{layer}"] = uniform(bound, 4 * HIDDEN, HIDDEN)
        weights[f"recurrent.bias_ih_l{layer}"] = uniform(bound, 4 * HIDDEN)
        weights[f"recurrent.bias_hh_l{layer}"] = uniform(bound, 4 * HIDDEN)
    # With large logits, and symbols some of which are as frequent as in a text, there is something to clip.
    weights |= {"output.weight": uniform(1.0, SYMBOLS, HIDDEN), "output.bias": uniform(bound, SYMBOLS)}
    frequency = 1 / np.arange(1, SYMBOLS + 1)
    inputs, targets = rng.choice(SYMBOLS, (2, BATCH, TIME), p=frequency / frequency.sum())
    state = uniform(0.5, BATCH, LAYERS, HIDDEN), uniform(1.0, BATCH, LAYERS, HIDDEN)
    return weights, inputs, targets, state


class Step:
    """What both engines have: `call` is a step, which returns loss and norm; `state`, `grads` and `parameters` follow.

    Gradients and parameters are in the order of the weights.
    """

    def outputs(self, result):
        """All of the first step, the gradients as they were clipped; and the parameters some steps later."""
        first = [np.array(array) for array in (*result, *self.state(), *self.grads())]
        for _ in range(1, STEPS_COMPARED):
            self.call()
        return (*first, *map(np.array, self.parameters()))


class Fastseq(Step):
    def __init__(self, reference=False):
        import fastseq as fs

        models, dtype = (fs.reference.models, "float64") if reference else (fs.models, "float32")
        weights, inputs, targets, (h, c) = numbers()
        self._model = models.RecurrentLM(SYMBOLS, HIDDEN, HIDDEN, LAYERS, dtype=dtype)
        self._model.load_state_dict(weights)
        self._optimiser = fs.training.AdamW(self._model, **SETTINGS)
        self._clip = fs.training.clip_grad_norm
        self._batch = fs.training.Batch(inputs, targets)
        self._state = fs.LSTMState(h.astype(dtype), c.astype(dtype))

    def call(self):
        loss, _, tape, self._state = self._model.training_forward(self._batch, self._state)
        self._model.zero_grad()
        self._model.training_backward(tape)
        norm = self._clip(self._model, MAX_NORM)
        self._optimiser.step()
        return loss, norm

    def state(self):
        return self._state

    def grads(self):
        return self._model.grads.values()

    def parameters(self):
        return self._model.parameters.values()


class Torch(Step):
    def __init__(self, threads):
        import torch

        torch.set_num_threads(threads)
        weights, inputs, targets, state = numbers()
        nn = torch.nn
        self._model = nn.ModuleDict(
            {
                "embedding": nn.Embedding(SYMBOLS + 1, HIDDEN),
                "recurrent": nn.LSTM(HIDDEN, HIDDEN, LAYERS, batch_first=True),
                "output": nn.Linear(HIDDEN, SYMBOLS),
            }
        )
        self._model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
        # Fused is the fastest it has.
        self._optimiser = torch.optim.AdamW(self._model.parameters(), **SETTINGS, fused=True)
        self._loss, self._clip = nn.functional.cross_entropy, nn.utils.clip_grad_norm_
        self._inputs, self._targets = torch.from_numpy(inputs), torch.from_numpy(targets).flatten()
        self._state = tuple(torch.from_numpy(part.swapaxes(0, 1).copy()) for part in state)

    def call(self):
        y, state = self._model["recurrent"](self._model["embedding"](self._inputs), self._state)
        loss = self._loss(self._model["output"](y).flatten(0, 1), self._targets)
        self._optimiser.zero_grad()
        loss.backward()
        norm = self._clip(self._model.parameters(), MAX_NORM)
        self._optimiser.step()
        self._state = tuple(part.detach() for part in state)
        return loss.item(), norm.item()

    def state(self):
        return (part.swapaxes(0, 1).numpy() for part in self._state)

    def grads(self):
        return (parameter.grad.numpy() for parameter in self._model.parameters())

    def parameters(self):
        return (parameter.detach().numpy() for parameter in self._model.parameters())


def build(engine, threads):
    """The step in an engine: fastseq, exact (the reference in float64) or torch."""
    if engine == "torch":
        return Torch(threads)
    import fastseq

    fastseq.set_num_threads(threads)
    return Fastseq(reference=engine == "exact")


def peak():
    """The most memory this process has held so far, in bytes."""
    # Not ru_maxrss, which starts from what the process held that started this one.
    with open("/proc/self/status") as lines:
        (size,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return 1024 * int(size)


def main():
    engine, threads = sys.argv[1], int(sys.argv[2])
    __import__(engine)
    imported = peak()
    step = build(engine, threads)
    for _ in range(STEPS_OF_MEMORY):
        step.call()
    print(json.dumps({"import": imported, "peak": peak()}))


if __name__ == "__main__":
    main()
