from typing import Any, Final, TypeVar

import numpy as np

Real = TypeVar("Real", np.float32, np.float64)
Shape = TypeVar("Shape", bound=tuple[int, ...])

NAMES: Final[tuple[str, ...]]
available: Final[tuple[str, ...]]
chosen: Final[str]
chosen_reals: Final[str]
available_reals: Final[tuple[str, ...]]
narrow_instructions: Final[dict[str, str]]
openmp: Final[bool]
lanes: Final[dict[int, int]]

def exp(x: np.ndarray[Shape, np.dtype[Real]]) -> np.ndarray[Shape, np.dtype[Real]]: ...
def tanh(x: np.ndarray[Shape, np.dtype[Real]]) -> np.ndarray[Shape, np.dtype[Real]]: ...
def sigmoid(x: np.ndarray[Shape, np.dtype[Real]]) -> np.ndarray[Shape, np.dtype[Real]]: ...
def multiply_adds(rounds: int) -> int: ...
def read_memory(rounds: int, x: np.ndarray[Any, np.dtype[Real]]) -> int: ...
