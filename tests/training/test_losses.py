"""The losses: both engines, values and gradients."""

from __future__ import annotations

import inspect
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
from common import Array, assert_close, assert_same_bits, inputs, random_lengths, run_python, threads, tolerance

import fastseq as fs

BOTH = pytest.mark.parametrize("module", [fs, fs.reference], ids=["compiled", "reference"])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])

# Of each loss: its name, its options.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("softmax_cross_entropy", {}),
    "softmax_ignored": ("softmax_cross_entropy", {"ignore_index": 2}),
    "softmax_smooth": ("softmax_cross_entropy", {"label_smoothing": 0.2, "ignore_index": -100}),
    "binary": ("binary_cross_entropy_with_logits", {}),
    "squared": ("mean_squared_error", {}),
    "huber": ("huber", {"delta": 0.7}),
}
LOSSES = pytest.mark.parametrize("case", CASES)
SOFTMAX = [case for case in CASES if case.startswith("softmax")]
ELEMENTS = [case for case in CASES if not case.startswith("softmax")]


def function(case: str, module: Any = fs) -> Any:
    name, options = CASES[case]
    return lambda x, t, **more: getattr(module.losses, name)(x, t, **{**options, **more})


def example(case: str, *shape: int, dtype: Any = "float32", seed: int = 0) -> tuple[Array, Array]:
    """Predictions and targets."""
    x = 3 * inputs(shape, dtype, seed)
    rng = np.random.default_rng([seed, 12])
    if not case.startswith("softmax"):
        return x, (rng.random(shape) if case == "binary" else 2 * rng.normal(size=shape)).astype(dtype)
    targets = rng.integers(0, shape[-1], shape[:-1])
    if "ignore_index" in CASES[case][1]:
        targets[rng.random(targets.shape) < 0.3] = CASES[case][1]["ignore_index"]
    return x, targets


def wide(case: str, x: Array, t: Array) -> tuple[Array, Array]:
    """The same for the reference, in a wider dtype."""
    dtype = np.float64 if x.dtype == np.float32 else np.longdouble
    return x.astype(dtype), t if case in SOFTMAX else t.astype(dtype)


def compare(case: str, x: Array, t: Array, **more: Any) -> None:
    loss, gradient = function(case)(x, t, **more)
    expected, expected_gradient = function(case, fs.reference)(*wide(case, x, t), **more)
    k = x.shape[-1] if case in SOFTMAX else 1
    assert type(loss) is float and gradient.dtype == x.dtype and gradient.shape == x.shape
    # Where predictions are right to the last bit, softmax - 1 and log 1 leave the reference no more than its own eps.
    floor = 2 * np.finfo(expected_gradient.dtype).eps
    for what, ours, theirs in (("loss", np.array(loss), np.array(expected)), ("gradient", gradient, expected_gradient)):
        if np.isfinite(theirs).all() and np.abs(theirs).max(initial=0) < 2**20 * floor:
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=floor, err_msg=what)
        else:
            assert_close(ours, theirs, tolerance(x.dtype, k, 1), what)


# The compiled losses against the reference


@pytest.mark.every_isa
@DTYPES
@LOSSES
def test_parity(case: str, dtype: str) -> None:
    for width in (1, 2, 3, 5, 8, 15, 16, 17, 33, 64, 67, 96, 130, 1000, 5000):
        for lead in ((3,), (2, 4)):
            classes = width + 2 if case == "softmax_ignored" else width  # there has to be the one that is ignored
            x, t = example(case, *lead, classes, dtype=dtype, seed=width)
            compare(case, x, t)
            if len(lead) == 2:
                compare(case, x, t, lengths=np.array([1, 3]))


@pytest.mark.every_isa
@LOSSES
def test_work_for_several_threads(case: str) -> None:
    x, t = example(case, 7, 60, 96)
    for n_threads in (1, 3):
        with threads(n_threads):
            compare(case, x, t)
            compare(case, x, t, lengths=random_lengths(7, 60))


@LOSSES
@BOTH
def test_shapes(case: str, module: Any) -> None:
    """Any leading axes, and none; an array of no axis where that makes sense."""
    loss = function(case, module)
    x, t = example(case, 2, 3, 4, 5, dtype="float64")
    value, gradient = loss(x, t)
    if case in SOFTMAX:
        flat = loss(x.reshape(-1, 5), t.reshape(-1))
        one = loss(x[0, 0, 0], 3)
        assert one[1].shape == (5,) and one[0] == pytest.approx(loss(x[0, 0, :1], np.array([3]))[0], rel=1e-14)
    else:
        flat = loss(x.reshape(-1), t.reshape(-1))
        assert loss(x[0, 0, 0, 0], t[0, 0, 0, 0])[1].shape == ()
    assert flat[0] == pytest.approx(value, rel=1e-14)
    assert_same_bits(flat[1].reshape(x.shape), gradient)
    assert loss(x.tolist(), t.tolist())[0] == value


@pytest.mark.every_isa
@DTYPES
def test_logits_of_every_size(dtype: str) -> None:
    """From predictions that are right to the last bit to those as wrong as can be."""
    limit = 80 if dtype == "float32" else 600
    for size in (0.0, 1e-6, 1.0, 15.0, limit, 10.0 * limit, 1e30):
        x = (inputs((40, 7), "float64") * size).astype(dtype)
        for targets in (x.argmax(axis=1), x.argmin(axis=1)):
            for case in ("softmax", "softmax_smooth"):
                compare(case, x, targets)
        t = np.random.default_rng(0).random((40, 7)).astype(dtype)
        for labels in (t, np.round(t)):
            compare("binary", x, labels)


@pytest.mark.every_isa
@DTYPES
def test_a_prediction_that_is_nearly_right_keeps_its_gradient(dtype: str) -> None:
    """Softmax minus one cancels; what all the other classes have together does not."""
    x = np.zeros((1, 5), dtype)
    x[0, 3] = 30
    loss, gradient = fs.losses.softmax_cross_entropy(x, [3])
    others = 4 * np.exp(-30.0)
    assert loss == pytest.approx(np.log1p(others), rel=1e-6)
    np.testing.assert_allclose(gradient[0, 3], -others / (1 + others), rtol=1e-6)
    np.testing.assert_allclose(gradient[0, 0], np.exp(-30.0), rtol=1e-5)
    loss, gradient = fs.losses.binary_cross_entropy_with_logits(np.full(2, -30, dtype), np.zeros(2, dtype))
    assert loss == pytest.approx(np.log1p(np.exp(-30.0)), rel=1e-6)
    np.testing.assert_allclose(gradient, np.exp(-30.0) / 2, rtol=1e-6)


@pytest.mark.every_isa
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@LOSSES
def test_nan_and_inf_go_where_the_reference_sends_them(case: str, value: float) -> None:
    x, t = example(case, 6, 21)
    x[2, 9] = value
    if case in SOFTMAX:
        t[2] = 4
    with np.errstate(all="ignore"):
        compare(case, x, t)
        if case in SOFTMAX:
            t[2] = 9
            compare(case, x, t)
        else:
            t[4, 3] = value
            compare(case, x, t)


# Gradients


@BOTH
@LOSSES
def test_finite_differences(case: str, module: Any) -> None:
    loss = function(case, module)
    x, t = example(case, 3, 4, 5, dtype="float64")
    if case == "huber":
        d = x - t
        t = t + np.where(np.abs(np.abs(d) - 0.7) < 1e-3, 0.1, 0)  # not at the bend
    for more in ({}, {"lengths": np.array([4, 0, 2])}):
        _, gradient = loss(x, t, **more)
        expected = np.zeros_like(x)
        for place in np.ndindex(x.shape):
            step = np.zeros_like(x)
            step[place] = 1e-5
            expected[place] = (loss(x + step, t, **more)[0] - loss(x - step, t, **more)[0]) / 2e-5
        assert_close(gradient, expected, 1e-6)


@BOTH
@LOSSES
def test_pytorch(case: str, module: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, while it starts
        torch = pytest.importorskip("torch", reason="PyTorch is not installed: take the extra 'peers'")
    theirs = {
        "softmax_cross_entropy": torch.nn.functional.cross_entropy,
        "binary_cross_entropy_with_logits": torch.nn.functional.binary_cross_entropy_with_logits,
        "mean_squared_error": torch.nn.functional.mse_loss,
        "huber": torch.nn.functional.huber_loss,
    }
    name, options = CASES[case]
    x, t = example(case, 30, 9, dtype="float64")
    for smoothing in (None, 0.0, 0.5, 1.0) if case == "softmax_smooth" else (None,):
        more = {} if smoothing is None else {"label_smoothing": smoothing}
        loss, gradient = function(case, module)(x, t, **more)
        tensor = torch.tensor(x, requires_grad=True)
        value = theirs[name](tensor, torch.tensor(t), **{**options, **more})
        value.backward()
        assert_close(np.array(loss), value.detach().numpy(), 1e-9)
        assert_close(gradient, tensor.grad.numpy(), 1e-9)


def test_the_values_of_the_textbook() -> None:
    x = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]))
    loss, gradient = fs.losses.softmax_cross_entropy(x, [0, 1])
    assert loss == pytest.approx(-(np.log(0.5) + np.log(0.2)) / 2)
    np.testing.assert_allclose(gradient, np.array([[-0.5, 0.25, 0.25], [0.1, -0.8, 0.7]]) / 2)
    loss, gradient = fs.losses.binary_cross_entropy_with_logits(np.log([1.0, 3.0]), np.array([1.0, 0.25]))
    assert loss == pytest.approx(-(np.log(0.5) + 0.25 * np.log(0.75) + 0.75 * np.log(0.25)) / 2)
    np.testing.assert_allclose(gradient, [-0.25, 0.25])
    loss, gradient = fs.losses.mean_squared_error(np.array([1.0, 5.0]), np.array([2.0, 2.0]))
    assert loss == 5 and gradient.tolist() == [-1, 3]
    loss, gradient = fs.losses.huber(np.array([1.0, 5.0]), np.array([1.5, 2.0]), delta=2)
    assert loss == (0.125 + 4) / 2 and gradient.tolist() == [-0.25, 1]


# What counts


@BOTH
@LOSSES
def test_nothing_past_a_length_matters(case: str, module: Any) -> None:
    loss = function(case, module)
    x, t = example(case, 5, 6, 7)
    lengths = np.array([6, 0, 2, 5, 1])
    past = np.arange(6) >= lengths[:, None]
    value, gradient = loss(x, t, lengths=lengths)
    assert not gradient[past].any() and not np.signbit(gradient[past]).any() and gradient[~past].any()
    assert value == pytest.approx(loss(x[~past], t[~past])[0], rel=1e-6)
    np.testing.assert_allclose(gradient[~past], loss(x[~past], t[~past])[1], rtol=1e-5, atol=1e-7)
    for garbage in (np.nan, np.inf, 1e38):
        x[past] = garbage
        t[past] = 99 if case in SOFTMAX else garbage
        again, same = loss(x, t, lengths=lengths)
        assert again == value
        assert_same_bits(same, gradient)
    longer = np.concatenate([x, x[:, :3]], axis=1), np.concatenate([t, t[:, :3]], axis=1)
    more, padded = loss(*longer, lengths=lengths)
    assert_same_bits(padded[:, :6], gradient)
    assert more == value if module is fs else more == pytest.approx(value, rel=1e-6)


@BOTH
@LOSSES
def test_nothing_counts(case: str, module: Any) -> None:
    loss = function(case, module)
    x, t = example(case, 3, 4, 5)
    x[...] = np.nan
    results = [loss(x, t, lengths=[0, 0, 0]), loss(x[:0], t[:0]), loss(x[:, :0], t[:, :0], lengths=[0, 0, 0])]
    if case == "softmax_ignored":
        results.append(loss(x, np.full_like(t, 2)))
    for value, gradient in results:
        assert value == 0 and type(value) is float
        assert not gradient.any() and not np.signbit(gradient).any()


@BOTH
def test_what_is_ignored(module: Any) -> None:
    x, t = example("softmax", 4, 5, 6)
    t[:, 0] = -100
    value, gradient = module.losses.softmax_cross_entropy(x, t, ignore_index=-100)
    assert value == pytest.approx(module.losses.softmax_cross_entropy(x[:, 1:], t[:, 1:])[0], rel=1e-6)
    assert not gradient[:, 0].any()
    x[:, 0] = np.nan
    again, same = module.losses.softmax_cross_entropy(x, t, ignore_index=-100)
    assert again == value
    assert_same_bits(same, gradient)
    t[1, 3], lengths = 2**40, [5, 3, 5, 5]
    assert np.isfinite(module.losses.softmax_cross_entropy(x, t, ignore_index=np.int64(-100), lengths=lengths)[0])


# The same bits


@pytest.mark.every_isa
@DTYPES
@LOSSES
def test_threads(case: str, dtype: str) -> None:
    x, t = example(case, 9, 70, 96, dtype=dtype)
    for more in ({}, {"lengths": random_lengths(9, 70)}):
        results = []
        for n_threads in (1, 2, 3, 5):
            with threads(n_threads):
                results.append(function(case)(x, t, **more))
        for value, gradient in results[1:]:
            assert value == results[0][0]
            assert_same_bits(gradient, results[0][1])


@pytest.mark.every_isa
@LOSSES
def test_lengths_of_whole_rows_change_nothing(case: str) -> None:
    x, t = example(case, 6, 50, 33)
    (one, gradient), (other, same) = function(case)(x, t), function(case)(x, t, lengths=np.full(6, 50))
    assert one == other
    assert_same_bits(same, gradient)


@BOTH
@LOSSES
def test_arrays_in_any_memory(case: str, module: Any) -> None:
    loss = function(case, module)
    x, t = example(case, 4, 5, 6)
    value, gradient = loss(x, t)

    def forms(array: Array) -> list[Array]:
        spread = np.repeat(np.repeat(array, 2, axis=0), 2, axis=-1)
        frozen = array.copy()
        frozen.flags.writeable = False
        raw = np.zeros(array.nbytes + 1, np.uint8)
        off = raw[1:].view(array.dtype).reshape(array.shape)
        off[...] = array
        turned = np.ascontiguousarray(array.T).T
        return [spread[::2, ..., ::2], frozen, array.astype(array.dtype.newbyteorder()), off, turned, array[::-1][::-1]]

    for x_form, t_form in zip(forms(x), forms(t), strict=True):
        before = x_form.copy(), t_form.copy()
        again, same = loss(x_form, t_form)
        assert again == value and same.dtype == np.float32 and same.dtype.isnative and same.flags.writeable
        assert_same_bits(same, gradient)
        np.testing.assert_array_equal(x_form, before[0])
        np.testing.assert_array_equal(t_form, before[1])


# Bad input


@BOTH
@LOSSES
def test_bad_predictions(case: str, module: Any) -> None:
    loss = function(case, module)
    name = "predictions" if case in ("squared", "huber") else "logits"
    x, t = example(case, 4, 5, 6)
    for bad in (x.astype(int), x.astype(complex), x > 0, x.astype(object), "x", None, [["x"]]):
        with pytest.raises(TypeError, match=rf"\b{name} should"):
            loss(bad, t)
    if module is fs:
        for dtype in ("float16", "longdouble"):
            with pytest.raises(TypeError, match=rf"\b{name} should be float32 or float64"):
                loss(x.astype(dtype), t)
    for lengths in ([5, 5, 5], [6, 0, 0, 0], [-1, 0, 0, 0], [[5, 5, 5, 5]]):
        with pytest.raises(ValueError, match="lengths"):
            loss(x, t, lengths=lengths)
    for lengths in ([5.0, 5, 5, 5], [True] * 4, "5555"):
        with pytest.raises(TypeError, match="lengths"):
            loss(x, t, lengths=lengths)
    with pytest.raises(ValueError, match=rf"\b{name} should be of shape \(B, T"):
        loss(x[0] if case in SOFTMAX else x[0, 0], t[0] if case in SOFTMAX else t[0, 0], lengths=[5])


@BOTH
@pytest.mark.parametrize("case", ELEMENTS)
def test_bad_real_targets(case: str, module: Any) -> None:
    loss = function(case, module)
    x, t = example(case, 4, 5)
    for wrong in (t[:3], t[0], t[..., None], t.T, 0.5):
        with pytest.raises(ValueError, match=r"\btargets should be of shape \(4, 5\)"):
            loss(x, wrong)
    for bad in (t.astype(int), t > 0, t.astype(complex), None):
        with pytest.raises(TypeError, match=r"\btargets should"):
            loss(x, bad)
    assert_same_bits(loss(x, t.astype("float64"))[1], loss(x, t)[1])


@BOTH
def test_bad_classes(module: Any) -> None:
    loss = module.losses.softmax_cross_entropy
    x, t = example("softmax", 4, 5, 6)
    for wrong in (t[:3], t[0], t[..., None], t.T, 3):
        with pytest.raises(ValueError, match=r"\btargets should be of shape \(4, 5\)"):
            loss(x, wrong)
    for bad in (t.astype(float), t > 0, None, np.full(t.shape, "a")):
        with pytest.raises(TypeError, match=r"\btargets should hold integers"):
            loss(x, bad)
    for value, dtype in ((6, "int64"), (-1, "int8"), (-100, "int32"), (255, "uint8"), (2**64 - 1, "uint64")):
        wrong = t.astype(dtype)
        wrong[2, 3] = np.array(value).astype(dtype)
        with pytest.raises(ValueError) as error:
            loss(x, wrong)
        assert f"targets should be in 0..5, but targets[2, 3] is {value}" in str(error.value)
        assert loss(x, wrong, lengths=[5, 5, 3, 5])[0] > 0
    with pytest.raises(ValueError, match=r"targets\[2, 3\] is -100"):
        loss(x, np.where(np.arange(20).reshape(4, 5) == 13, -100, t), ignore_index=-1)
    for ignore_index in (1.0, "1", True, [1]):
        with pytest.raises(TypeError, match="ignore_index"):
            loss(x, t, ignore_index=ignore_index)
    for label_smoothing in (-0.1, 1.1, np.nan, np.inf):
        with pytest.raises(ValueError, match="label_smoothing"):
            loss(x, t, label_smoothing=label_smoothing)
    for label_smoothing in (None, "0.1", True):
        with pytest.raises(TypeError, match="label_smoothing"):
            loss(x, t, label_smoothing=label_smoothing)
    for empty in (np.zeros((3, 0)), np.zeros(())):
        with pytest.raises(ValueError, match=r"logits should be of shape \(\.\.\., V\)"):
            loss(empty, np.zeros(empty.shape[:-1], int))


@BOTH
def test_bad_delta(module: Any) -> None:
    for delta in (0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="delta"):
            module.losses.huber(np.zeros(2), np.zeros(2), delta=delta)
    for delta in (None, "1", True):
        with pytest.raises(TypeError, match="delta"):
            module.losses.huber(np.zeros(2), np.zeros(2), delta=delta)


# The modules


@pytest.mark.parametrize("name", fs.losses.__all__)
def test_both_modules_say_the_same(name: str) -> None:
    ours, theirs = getattr(fs.losses, name), getattr(fs.reference.losses, name)
    assert inspect.signature(ours) == inspect.signature(theirs) and inspect.getdoc(ours) == inspect.getdoc(theirs)
    assert ours is not theirs
    assert pickle.loads(pickle.dumps(ours)) is ours and pickle.loads(pickle.dumps(theirs)) is theirs


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "longdouble"])
@LOSSES
def test_the_reference_takes_any_floating_dtype(case: str, dtype: str) -> None:
    x, t = example(case, 4, 5, dtype=dtype)
    loss, gradient = function(case, fs.reference)(x, t)
    exact, exact_gradient = function(case, fs.reference)(
        x.astype("longdouble"), t if case in SOFTMAX else t.astype("longdouble")
    )
    assert gradient.dtype == dtype
    assert_close(gradient, exact_gradient, tolerance(dtype, 5, 1))
    assert loss == pytest.approx(exact, rel=4 * tolerance(dtype, 5, 1))


def test_no_memory_is_a_memory_error() -> None:
    run_python(
        """
        import resource, numpy as np, fastseq as fs
        x = np.zeros((1 << 24, 1), "float32")
        t = np.zeros(1 << 24, "int8")
        fs.losses.mean_squared_error(x[:5], x[:5])
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 25), resource.RLIM_INFINITY))
        for call in (lambda: fs.losses.softmax_cross_entropy(x, t), lambda: fs.losses.huber(x, x)):
            try:
                call()
            except MemoryError:
                continue
            raise SystemExit("no MemoryError")
        assert fs.losses.huber(x[:5], x[:5])[0] == 0
        """
    )
