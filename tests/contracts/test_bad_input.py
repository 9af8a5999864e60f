"""The error contract: whatever is wrong with an argument, a TypeError or a ValueError that names it.

Also an OverflowError or a ValueError for sizes that overflow, and a MemoryError for memory that cannot be had.
States, lengths, parameters and files have their own modules.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from common import KINDS, assert_same_bits, inputs, make, random_state, run_python, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fastseq as fs

ALLOWED = (TypeError, ValueError, OverflowError, MemoryError)
BOTH = pytest.mark.parametrize("module", [fs, fs.reference], ids=["compiled", "reference"])
CLASSES = pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])

NOT_INTEGERS: list[Any] = [None, "3", 3.0, 3.5, np.float32(3), True, np.True_, [3], np.array([3]), 3j, object()]
NOT_FLAGS: list[Any] = [None, 0, 1, 1.0, "True", [], np.array([True]), np.int64(1)]


def named(argument: str) -> str:
    return rf"\b{argument}\b"


# Making a layer


@BOTH
@CLASSES
@pytest.mark.parametrize("argument", ["input_size", "hidden_size", "num_layers"])
def test_sizes(argument: str, name: str, module: Any) -> None:
    sizes: dict[str, Any] = {"input_size": 2, "hidden_size": 3, "num_layers": 1}
    cls = getattr(module, name)
    for value in NOT_INTEGERS:
        with pytest.raises(TypeError, match=named(argument)):
            cls(**{**sizes, argument: value})
    for value in (0, -1, -(2**70), np.int8(-3)):
        with pytest.raises(ValueError, match=named(argument)):
            cls(**{**sizes, argument: value})
    for value in (2**63, 2**64 + 3, 10**100):
        with pytest.raises((ValueError, OverflowError), match=named(argument)):
            cls(**{**sizes, argument: value})
    for value in (np.int8(2), np.uint64(2)):
        layer = cls(**{**sizes, argument: value})
        assert getattr(layer, argument) == 2 and type(getattr(layer, argument)) is int


@BOTH
def test_integers_too_long_to_print(module: Any) -> None:
    """Python refuses to print more than 4300 digits; the message names the argument all the same."""
    for value in (10**5000, -(10**5000)):
        with pytest.raises((ValueError, OverflowError), match="hidden_size"):
            module.GRU(2, value)


@BOTH
@CLASSES
@pytest.mark.parametrize("argument", ["bias", "bidirectional"])
def test_flags(argument: str, name: str, module: Any) -> None:
    for value in NOT_FLAGS:
        with pytest.raises(TypeError, match=named(argument)):
            getattr(module, name)(2, 3, **{argument: value})
    assert getattr(getattr(module, name)(2, 3, **{argument: np.True_}), argument) is True


@BOTH
@CLASSES
@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        *(("dropout", value, TypeError) for value in (None, "0.1", True, [0.1], 0.1j, np.zeros(1))),
        *(
            ("dropout", value, ValueError)
            for value in (-0.1, 1, 1.0, 1.5, np.nan, np.inf, -np.inf, 10**400, np.float32(1))
        ),
        *(("seed", value, TypeError) for value in ("1", 1.0, True, [1], np.random.default_rng(0))),
        *(("seed", value, (ValueError, OverflowError)) for value in (-1, 2**64)),
        *(
            ("dtype", value, TypeError)
            for value in (None, "int32", "complex64", bool, object, "S4", "M8[s]", "nonsense")
        ),
        *(("dtype", value, TypeError) for value in (3.5, 4, [], (), "f4,f4", [("a", "f4")])),
        *(
            ("dtype", value, (TypeError, ValueError))
            for value in ("", "f4,(", "(", {"names": ["a"]}, {}, "\0", "f" * 9999)
        ),
    ],
    ids=lambda value: repr(value).split(" at 0x")[0][:40] if not isinstance(value, tuple | type) else "",
)
def test_settings(argument: str, value: Any, error: Any, name: str, module: Any) -> None:
    with pytest.raises(error, match=named(argument)):
        getattr(module, name)(2, 3, **{argument: value})


@CLASSES
@pytest.mark.parametrize("dtype", ["float16", "longdouble", np.half])
def test_the_compiled_layers_are_float32_or_float64(dtype: Any, name: str) -> None:
    if np.dtype(dtype) == np.float64:
        pytest.skip("this machine lacks a long double wider than float64")
    with pytest.raises(TypeError, match="dtype.*float32.*float64"):
        getattr(fs, name)(2, 3, dtype=dtype)
    for good in ("f4", np.float64, float, ">f8", np.dtype("<f4")):
        assert getattr(fs, name)(2, 3, dtype=good).dtype.isnative


@BOTH
def test_what_one_kind_alone_has(module: Any) -> None:
    for value, error in ((None, TypeError), (5, TypeError), (b"tanh", TypeError), (["tanh"], TypeError)):
        with pytest.raises(error, match="nonlinearity"):
            module.RNN(2, 3, nonlinearity=value)
    for value in ("", "Tanh", "gelu", "tanh ", "linear"):
        with pytest.raises(ValueError, match="nonlinearity.*'tanh', 'relu'"):
            module.RNN(2, 3, nonlinearity=value)
    for value in NOT_FLAGS:
        with pytest.raises(TypeError, match="reset_after"):
            module.GRU(2, 3, reset_after=value)
    for value in NOT_INTEGERS:
        with pytest.raises(TypeError, match="proj_size"):
            module.LSTM(2, 3, proj_size=value)
    for value in (-1, 3, 4, 2**62, 2**70):
        with pytest.raises((ValueError, OverflowError), match="proj_size"):
            module.LSTM(2, 3, proj_size=value)


@BOTH
@CLASSES
def test_arguments_that_do_not_exist(name: str, module: Any) -> None:
    cls = getattr(module, name)
    for arguments, more in (((), {}), ((2,), {}), ((2, 3, 1, True), {}), ((2, 3), {"batch_first": True})):
        with pytest.raises(TypeError):
            cls(*arguments, **more)
    layer = cls(2, 3)
    x = inputs((1, 2, 2))
    for call in (
        lambda: layer(),
        lambda: layer(x, None, None),
        lambda: layer(x, hx=None),
        lambda: layer.step(),
        lambda: layer.step(x[:, 0], None, None),
        lambda: layer.step(x[:, 0], lengths=[1]),
        lambda: layer.initial_state(),
    ):
        with pytest.raises(TypeError):
            call()


@pytest.mark.parametrize("argument", ["input_size", "hidden_size", "num_layers"])
def test_huge_layers(argument: str) -> None:
    """Memory that cannot be had is seen before much of it is taken, however it is asked for."""
    code = f"""
    import resource, fastseq as fs
    fs.LSTM(2, 3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    for exponent in (40, 50, 60, 61, 62):
        for module in (fs, fs.reference):
            for cls in (module.RNN, module.LSTM, module.GRU):
                sizes = {{"input_size": 2, "hidden_size": 3, "num_layers": 1}}
                sizes[{argument!r}] = 2**exponent
                try:
                    cls(**sizes)
                except (MemoryError, ValueError, OverflowError):
                    pass
                else:
                    raise SystemExit("made")
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert taken < 500_000, f"{{taken}} kB were taken"
    """
    run_python(code, timeout=120)  # or it hangs


# Calls


@BOTH
@pytest.mark.parametrize("verb", ["call", "step"])
@pytest.mark.parametrize("kind", KINDS)
def test_inputs(kind: str, verb: str, module: Any) -> None:
    layer = make(kind, 2, 3, module=module)
    run, argument, ndim = (layer, "x", 3) if verb == "call" else (layer.step, "x_t", 2)
    shape = (4, 5, 2)[-ndim:]
    good = inputs(shape)
    for dtype in (int, "uint8", bool, complex, object, "S4", "U4", "M8[s]", "m8[s]", [("a", "f4")]):
        with pytest.raises(TypeError, match=named(argument)):
            run(np.zeros(shape, dtype))
    for value in (None, "x", b"x", {}, {1.0}, object(), 5, True, good.astype(int).tolist(), [[None]], iter([1.0]), len):
        with pytest.raises(TypeError, match=named(argument)):
            run(value)
    wrong: list[Any] = [good[..., :1], np.concatenate([good, good], axis=-1), good[..., :0], good[None, None], 1.0, 0.5]
    wrong += [good.reshape(-1), np.zeros(0), [], [[]], [[1.0], [1.0, 2.0]], np.float32(1), np.zeros((1,) * 20)]
    if verb == "step":
        wrong += [good[0], good[None], good.T]
    for value in wrong:
        with pytest.raises(ValueError, match=named(argument)):
            run(value)


class Hostile:
    """What raises something of its own when an array is made of it, as tensors of other libraries do."""

    def __array__(self, *arguments: Any, **more: Any) -> Any:
        raise RuntimeError("no array here")


def nested(value: Any, depth: int) -> Any:
    return [nested(value, depth - 1)] if depth else value


@pytest.mark.parametrize("value", [Hostile(), nested(1.0, 100)], ids=["hostile", "nested"])
@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("x", lambda layer, value: layer(value)),
        ("x_t", lambda layer, value: layer.step(value)),
        ("state", lambda layer, value: layer(inputs((2, 4, 2)), value)),
        ("lengths", lambda layer, value: layer(inputs((2, 4, 2)), lengths=value)),
        ("h", lambda layer, value: fs.State(value)),
        ("weight_hh_l0", lambda layer, value: layer.load_state_dict({**layer.state_dict(), "weight_hh_l0": value})),
        ("other", lambda layer, value: layer.load_state_dict({**layer.state_dict(), "other": value})),
        ("bias_ih_l0", lambda layer, value: layer.parameters.__setitem__("bias_ih_l0", value)),
    ],
)
def test_what_cannot_become_an_array_is_named(argument: str, call: Any, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=named(argument)):
        call(make("gru_after", 2, 3), value)


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_out(kind: str, module: Any) -> None:
    layer = make(kind, 2, 6, module=module)
    x, state = inputs((4, 2)), random_state(layer, 4)
    y, end = layer.step(x, state)
    width = y.shape[1]
    frozen = np.zeros((4, width), "float32")
    frozen.flags.writeable = False
    for out, error in (
        ([[0.0] * width] * 4, TypeError),
        ("out", TypeError),
        (5, TypeError),
        (np.zeros((4, width)), TypeError),
        (np.zeros((4, width), "float16"), TypeError),
        (np.zeros((4, width), int), TypeError),
        (np.zeros((4, width + 1), "float32"), ValueError),
        (np.zeros((3, width), "float32"), ValueError),
        (np.zeros((1, width), "float32"), ValueError),
        (np.zeros((width, 4), "float32"), ValueError),
        (np.zeros((4, 1, width), "float32"), ValueError),
        (np.zeros(4 * width, "float32"), ValueError),
        (frozen, ValueError),
        (np.broadcast_to(np.float32(0), (4, width)), ValueError),
    ):
        before = np.array(out).tobytes()
        with pytest.raises(error, match=named("out")):
            layer.step(x, state, out=out)
        assert np.array(out).tobytes() == before
    # Any strides.
    for out in (
        np.zeros((4, width), "float32"),
        np.zeros((width, 4), "float32").T,
        np.zeros((8, 2 * width), "float32")[::2, ::2],
        np.zeros((4, width), "float32")[::-1, ::-1],
        np.frombuffer(bytearray(16 * width + 1), "float32", offset=1).reshape(4, width),
    ):
        given_back, after = layer.step(x, state, out=out)
        assert given_back is out
        assert_same_bits((np.ascontiguousarray(out), after), (y, end))


@pytest.mark.parametrize("kind", KINDS)
def test_out_may_overlap_what_goes_in(kind: str) -> None:
    width = 4
    layer = make(kind, width, 8 if kind == "lstm_proj" else width)
    x, state = inputs((3, width)), random_state(layer, 3)
    expected = layer.step(x, state)
    memory = np.zeros((4, width), "float32")
    for into, out_of in ((slice(0, 3), slice(0, 3)), (slice(0, 3), slice(1, 4)), (slice(1, 4), slice(0, 3))):
        memory[into] = x
        y_t, end = layer.step(memory[into], state, out=memory[out_of])
        assert_same_bits((y_t.copy(), end), expected, "out over x_t")
    arrays = [array.copy() for array in state]
    y_t, end = layer.step(x, tuple(arrays) if len(arrays) == 2 else arrays[0], out=arrays[0][:, 0])
    assert_same_bits((y_t.copy(), end), expected, "out over the state")
    if kind == "lstm":
        arrays = [array.copy() for array in state]
        y_t, end = layer.step(x, tuple(arrays), out=arrays[1][:, 0])
        assert_same_bits((y_t.copy(), end), expected, "out over the cell state")


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_step_of_a_bidirectional_layer(kind: str, module: Any) -> None:
    layer = make(kind, 2, 3, bidirectional=True, module=module)
    with pytest.raises(ValueError, match="bidirectional"):
        layer.step(inputs((1, 2)))


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_batch_sizes(kind: str, module: Any) -> None:
    layer = make(kind, 2, 3, module=module)
    for value in NOT_INTEGERS:
        with pytest.raises(TypeError, match="batch_size"):
            layer.initial_state(value)
    for value in (-1, np.int8(-1)):
        with pytest.raises(ValueError, match="batch_size"):
            layer.initial_state(value)
    for value in (2**60, 2**62, 2**63, 2**64, 10**30):
        with pytest.raises((MemoryError, ValueError, OverflowError)):
            layer.initial_state(value)
    assert layer.initial_state(np.uint8(0)).batch_size == 0


def test_numbers_of_threads() -> None:
    for value in NOT_INTEGERS:
        with pytest.raises(TypeError, match=named("n")):
            fs.set_num_threads(value)
    before = fs.get_num_threads()
    for value in (0, -1, 2**31, 2**63, 2**64, 10**100, 100_000):
        with pytest.raises((ValueError, OverflowError), match=named("n")):
            fs.set_num_threads(value)
    assert fs.get_num_threads() == before
    fs.set_num_threads(np.int64(3))
    assert fs.get_num_threads() == 3


@BOTH
def test_huge_inputs_that_take_no_memory(module: Any) -> None:
    """A number broadcast to a shape whose outputs no machine can hold."""
    layer = make("gru_after", 2, 64, module=module)
    for shape in ((2**28, 2**28, 2), (2**56, 1, 2), (1, 2**56, 2), (2**58, 0, 2), (2**57, 2)):
        x = np.broadcast_to(np.zeros((), "float32"), shape)
        with pytest.raises((MemoryError, ValueError, OverflowError)):
            layer(x)
    with pytest.raises((MemoryError, ValueError, OverflowError)):
        layer.step(np.broadcast_to(np.zeros((), "float32"), (2**57, 2)))
    assert layer(inputs((1, 1, 2)))[0].shape == (1, 1, 64)


@pytest.mark.parametrize("module", ["fs", "fs.reference"])
def test_no_rows_however_long(module: str) -> None:
    """Nothing is to be done, and nothing is."""
    code = f"""
    import numpy as np, fastseq as fs
    for cls in ({module}.RNN, {module}.LSTM, {module}.GRU):
        y, end = cls(2, 64)(np.zeros((0, 2**50, 2), "float32"))
        assert y.shape == (0, 2**50, 64) and end.batch_size == 0
    """
    run_python(code, timeout=120)  # or it hangs


def test_memory_that_cannot_be_had() -> None:
    """Of outputs, of packed weights, of scratch and of a conversion; everything works after it."""
    code = """
    import resource, gc, numpy as np, fastseq as fs
    from common import assert_same_bits, inputs, make, random_state

    def used():
        return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

    class limit:
        def __init__(self, more): self.more = more
        def __enter__(self): resource.setrlimit(resource.RLIMIT_AS, (used() + self.more, hard))
        def __exit__(self, *_): resource.setrlimit(resource.RLIMIT_AS, (hard, hard))

    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    fs.set_num_threads(1)
    for kind in ("rnn_tanh", "lstm", "lstm_proj", "gru_after", "gru_before"):
        small = make(kind, 8, 16)
        x, state = inputs((3, 5, 8)), random_state(small, 3)
        expected = small(x, state)
        big = np.broadcast_to(np.float32(0.5), (300_000, 40, 8))
        for what in (lambda: small(big), lambda: small(np.broadcast_to(0.5, (300_000, 400, 8))),
                     lambda: small.initial_state(2**33)):
            with limit(64 << 20):
                try:
                    what()
                except MemoryError:
                    pass
                else:
                    raise SystemExit("had")
                assert_same_bits(small(x, state), expected)
        wide = make(kind, 16, 1500)
        with limit(4 << 20):
            try:
                wide(inputs((2, 3, 16)))
            except MemoryError:
                print("packed", end=" ")
        assert wide(inputs((2, 3, 16)))[0].shape[:2] == (2, 3)
        assert_same_bits(small(x, state), expected)
    """
    # What is freed goes back to the system at once, or the packed weights would find room in it.
    environment = {"OPENBLAS_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    assert run_python(code, **environment).stdout.split() == ["packed"] * 5


def test_threads_that_cannot_be_had() -> None:
    """More threads than there is memory for their stacks: a MemoryError, or the right result on fewer."""
    code = """
    import resource, numpy as np, fastseq as fs
    from common import assert_same_bits, example, make, train
    layer = make("lstm", 8, 64)
    linear = fs.Linear(64, 300, seed=0)
    arrays = example(layer, 600, 20)
    def run():
        y, tape = linear.forward(arrays[2])
        return layer(arrays[0]), tuple(train(layer, *arrays).values()), linear.backward(y, tape)
    fs.set_num_threads(1)
    expected = run()
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20), hard))
    fs.set_num_threads(64)
    try:
        assert_same_bits(run(), expected)
    except MemoryError:
        pass
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    fs.set_num_threads(2)
    assert_same_bits(run(), expected)
    print("alive")
    """
    assert run_python(code, OPENBLAS_NUM_THREADS="1").stdout == "alive\n"


def test_a_caller_who_raises_on_every_floating_point_error() -> None:
    """numpy.seterr is the caller's; no FloatingPointError comes from a conversion or from packing."""
    with np.errstate(all="raise"):
        layer = fs.LSTM(2, 3, seed=0)
        x = np.full((2, 3, 2), 1e-300)
        y, _ = layer(x)
        assert np.isfinite(y).all()
        layer(np.full((2, 3, 2), 1e300))  # inf in float32
        layer.parameters["bias_ih_l0"] = np.full(12, 1e-320)
        layer.parameters["bias_hh_l0"] = np.full(12, 3e38, "float32")
        layer.parameters["bias_ih_l0"] = np.full(12, 3e38, "float32")
        assert layer(inputs((1, 2, 2)))[0].shape == (1, 2, 3)


def test_no_warning_comes_from_the_compiled_layers() -> None:
    """Whatever the numbers; warnings are errors here."""
    for kind in KINDS:
        layer = make(kind, 2, 3)
        for value in (np.nan, np.inf, -np.inf, 1e300, -1e300, 1e-320):
            layer(np.full((2, 3, 2), value))
            layer.step(np.full((2, 2), value))
            for name, array in layer.state_dict().items():
                layer.parameters[name] = np.full_like(array, value, dtype="float64")
                layer(inputs((2, 3, 2)))
                layer.parameters[name] = array
    both = make("lstm", 2, 3)
    both.parameters["bias_ih_l0"] = np.full(12, np.inf)
    both.parameters["bias_hh_l0"] = np.full(12, -np.inf)
    assert np.isnan(both(inputs((2, 3, 2)))[0]).all()


# Anything at all

anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 8),
    st.integers(),
    st.floats(width=32),
    st.text(max_size=3),
    st.lists(st.one_of(st.floats(width=32), st.integers(-2, 6), st.none(), st.lists(st.floats(width=32), max_size=3))),
    hnp.arrays(
        st.one_of(hnp.floating_dtypes(), hnp.integer_dtypes(), hnp.boolean_dtypes(), hnp.complex_number_dtypes()),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    ),
)


def nearly(*shape: int) -> Any:
    """Arrays of about the right shape, of any real dtype and byte order, any numbers."""
    sides = st.tuples(*(st.sampled_from([n, n, n, n, n, n + 1, max(n - 1, 0), 0]) for n in shape))
    return hnp.arrays(hnp.floating_dtypes(), sides)


@settings(max_examples=400)
@given(
    kind=st.sampled_from(list(KINDS)),
    module=st.sampled_from([fs, fs.reference]),
    bidirectional=st.booleans(),
    x=st.one_of(nearly(3, 4, 2), nearly(3, 4, 2), nearly(4, 2), anything),
    h=st.one_of(st.none(), nearly(3, 2, 4), nearly(3, 1, 4), anything),
    c=st.one_of(nearly(3, 2, 4), nearly(3, 1, 4), anything),
    pair=st.booleans(),
    lengths=st.one_of(st.none(), hnp.arrays(hnp.integer_dtypes(), 3, elements=st.integers(0, 4)), anything),
)
def test_anything(
    kind: str, module: Any, bidirectional: bool, x: Any, h: Any, c: Any, pair: bool, lengths: Any
) -> None:
    """A result of the right shape, or an allowed exception; what was given is not modified."""
    layer = make(kind, 2, 4, bidirectional=bidirectional, module=module)
    state = (h, c) if pair else h
    arrays = [value for value in (x, h, c, lengths) if isinstance(value, np.ndarray)]
    before = [array.tobytes() for array in arrays]
    with np.errstate(all="ignore"):
        try:
            y, end = layer(x, state, lengths=lengths)
            batch = end.batch_size
            assert y.shape[-1] == layer._directions * end.h.shape[2] and np.ndim(x) == y.ndim
            assert batch == (len(x) if y.ndim == 3 else 1)
        except ALLOWED as error:
            assert str(error)
        try:
            y_t, end = layer.step(x, state)
            assert y_t.shape == (end.batch_size, end.h.shape[2]) and end.batch_size == len(x)
        except ALLOWED as error:
            assert str(error)
    assert [array.tobytes() for array in arrays] == before


@settings(max_examples=200)
@given(
    name=st.sampled_from(["RNN", "LSTM", "GRU"]),
    module=st.sampled_from([fs, fs.reference]),
    sizes=st.tuples(
        *(st.one_of(st.integers(-1, 9), st.integers(-1, 9), anything),) * 2, st.one_of(st.just(1), st.integers(-1, 4))
    ),
    more=st.dictionaries(
        st.sampled_from(
            ["bias", "bidirectional", "dropout", "dtype", "seed", "proj_size", "nonlinearity", "reset_after"]
        ),
        st.one_of(anything, st.sampled_from(["float32", "tanh", True, 0, 0.5])),
        max_size=3,
    ),
)
def test_any_settings(name: str, module: Any, sizes: Any, more: dict[str, Any]) -> None:
    for size in sizes:
        if isinstance(size, int) and size > 100:
            return  # would be had, and take long
    try:
        layer = getattr(module, name)(*sizes, **more)
    except ALLOWED as error:
        assert str(error)
        return
    assert layer(np.zeros((1, 2, layer.input_size), layer.dtype))[0].shape[:2] == (1, 2)


@given(value=anything)
def test_anything_elsewhere(value: Any) -> None:
    layer = make("lstm", 2, 3)
    state = random_state(layer, 3)
    if isinstance(value, int) and not isinstance(value, bool) and value > 10_000:
        value = 3.5
    with threads(1):
        for call in (
            lambda: layer.initial_state(value),
            lambda: layer.load_state_dict(value),
            lambda: layer.load_state_dict({**layer.state_dict(), "weight_ih_l0": value}),
            lambda: layer.load_state_dict({**layer.state_dict(), "weight": value}),
            lambda: layer.parameters.__setitem__("weight_ih_l0", value),
            lambda: layer.parameters.__setitem__(value, np.zeros((12, 2))),
            lambda: state[value],
            lambda: fs.LSTMState(value, state.c),
            lambda: fs.State(value),
            lambda: fs.State.concatenate(value),
            lambda: fs.set_num_threads(value),
            lambda: layer.step(inputs((3, 2)), state, out=value),
        ):
            try:
                call()
            except ALLOWED as error:
                assert str(error)
