"""Pictures of gates, forecasts and attention; that of attention over words is in test_transformer_models.py."""

import numpy as np
import pytest
from common import run_python

import fastseq as fs

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed: take the extra 'plot'")


def panels(figure):
    """The axes that show an image or lines, without scales of colours."""
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>" and (axes.images or axes.lines)]


def resolution(path):
    """Pixels of a PNG, across and down."""
    header = path.read_bytes()[16:24]
    return int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")


def inside(figure):
    """Whether all that is drawn lies within the figure."""
    figure.draw_without_rendering()
    drawn, whole = figure.get_tightbbox(), figure.bbox_inches
    return min(drawn.x0, drawn.y0, whole.x1 - drawn.x1, whole.y1 - drawn.y1) > -0.01


class TestAttention:
    def test_white_is_nothing_and_the_largest_weight_is_darkest(self):
        weights = np.array([[[0.0, 0.2], [0.1, 0.1]], [[0.0, 0.0], [0.4, 0.0]]])
        for axes in panels(fs.plotting.attention_map(weights, ["a", "b"])):
            assert axes.images[0].get_clim() == (0, 0.4)
            white, dark = (np.array(axes.images[0].cmap(value)[:3]) for value in (0.0, 1.0))
            assert (white == 1).all() and (dark < 0.2).all()

    @pytest.mark.parametrize("weights", [np.zeros((2, 2)), np.full((2, 2), np.nan)])
    def test_there_may_be_no_largest_weight(self, weights):
        (axes,) = panels(fs.plotting.attention_map(weights, ["a", "b"]))
        assert axes.images[0].get_clim() == (0, 1)

    def test_axes_say_what_they_are(self):
        figure = fs.plotting.attention_map(np.eye(2), ["a", "b"])
        assert (figure.get_supylabel(), figure.get_supxlabel()) == (
            "token that attends (query)",
            "token attended to (key)",
        )
        assert figure.get_suptitle() == "Attention weights"
        own = fs.plotting.attention_map(np.eye(2), ["ab"] * 2, row_label="phoneme", column_label="5 $", title="t")
        assert (own.get_supylabel(), own.get_supxlabel(), own.get_suptitle()) == ("phoneme", r"5 \$", "t")

    def test_labels_are_upright_where_there_is_room(self):
        def angles(figure):
            return {label.get_rotation() for axes in panels(figure) for label in axes.get_xticklabels()}

        assert angles(fs.plotting.attention_map(np.eye(9), list("knowledge"))) == {0}
        assert angles(fs.plotting.attention_map(np.eye(6), ["the", "cat", "sat", "on", "a", "mat"])) == {0}
        assert angles(fs.plotting.attention_map(np.eye(60), ["wide words"] * 60)) == {90}

    @pytest.mark.parametrize("shape", [(2, 2), (4, 9, 9), (3, 1, 30)])
    def test_everything_is_in_the_picture_at_150_dots_an_inch(self, shape, tmp_path):
        names = [f"word{i}" for i in range(max(shape))]
        title = "What each word of a sentence that is not short attends to in the last of the layers"
        figure = fs.plotting.attention_map(
            np.ones(shape), names[: shape[-2]], names[: shape[-1]], title=title, path=tmp_path / "map.png"
        )
        assert inside(figure) and figure.get_suptitle().replace("\n", " ") == title
        assert resolution(tmp_path / "map.png") == tuple(int(150 * inches) for inches in figure.get_size_inches())


class TestGates:
    @pytest.mark.parametrize(
        ("layer", "titles"),
        [
            (
                fs.LSTM(2, 5, 2, seed=0),
                ["input gate i", "forget gate f", "candidate g", "output gate o", "cell state c", "output h"],
            ),
            (fs.GRU(2, 5, 2, seed=0), ["reset gate r", "update gate z", "candidate n", "output h"]),
            (fs.RNN(2, 5, 2, seed=0), ["output h"]),
        ],
        ids=["LSTM", "GRU", "RNN"],
    )
    def test_every_gate_of_a_layer_is_shown(self, layer, titles, tmp_path):
        x = np.random.default_rng(0).standard_normal((3, 7, 2), np.float32)
        _, _, gates = layer(x, return_gates=True)
        figure = fs.plotting.gates(gates, row=1, layer=1, path=tmp_path / "gates.png")
        shown = panels(figure)
        assert sorted(axes.get_title() for axes in shown) == sorted(titles)
        for axes in shown:
            name = axes.get_title().split()[-1]
            np.testing.assert_array_equal(axes.images[0].get_array(), gates[name][1, :, 1].T)
            low, high = axes.images[0].get_clim()
            assert (low, high) == (0, 1) if name in "iforz" else -low == high == np.abs(gates[name][1, :, 1]).max()
        assert (figure.get_supxlabel(), figure.get_supylabel()) == ("time step", "hidden unit")
        assert figure.get_suptitle() == "Gates and states over time, layer 1"
        assert inside(figure) and resolution(tmp_path / "gates.png")[0] == int(150 * figure.get_figwidth())

    def test_one_sequence_with_its_tokens(self):
        _, _, gates = fs.GRU(2, 5, seed=0)(np.ones((6, 2), np.float32), return_gates=True)
        figure = fs.plotting.gates(gates, list("hello"), length=5, title="hello")
        for axes in panels(figure):
            assert axes.images[0].get_array().shape == (5, 5)
            assert [label.get_text() for label in axes.get_xticklabels()] == list("hello")
        assert figure.get_suptitle() == "hello"

    @pytest.mark.parametrize(
        ("gates", "settings", "kind", "message"),
        [
            (np.ones((2, 3)), {}, TypeError, "gates should be what return_gates=True gives"),
            ({}, {}, TypeError, "gates should be what return_gates=True gives"),
            ({"i": np.ones((2, 3))}, {}, ValueError, r"gates should hold arrays of one shape"),
            ({"i": np.ones((2, 1, 3)), "f": np.ones((3, 1, 3))}, {}, ValueError, "of one shape"),
            ({"i": np.ones((2, 1, 3), int)}, {}, TypeError, r"gates\['i'\] should hold real floating numbers"),
            ({"i": np.ones((2, 1, 3))}, {"row": 1}, ValueError, "row should be from 0 to 0"),
            ({"i": np.ones((2, 1, 3))}, {"layer": -1}, ValueError, "layer should be at least 0"),
            ({"i": np.ones((2, 1, 3))}, {"length": 3}, ValueError, "length should be at most 2"),
            ({"i": np.ones((2, 1, 3))}, {"tokens": ["a"]}, ValueError, "tokens should have 2 tokens, as gates has"),
            ({"i": np.ones((2, 1, 3))}, {"title": 3}, TypeError, "title should be a string"),
        ],
    )
    def test_bad_input(self, gates, settings, kind, message):
        with pytest.raises(kind, match=message):
            fs.plotting.gates(gates, **settings)


class TestForecast:
    def test_forecasts_go_on_from_the_series(self, tmp_path):
        series, times = np.arange(4.0), np.arange(1900, 1910)
        figure = fs.plotting.forecast(
            series,
            {"LSTM": [5.0, 6.0], "GRU": [4.0, 5.0, 6.0]},
            bands={"LSTM": ([4.0, 4.0], [6.0, 8.0])},
            observed=[3.5, 3.0],
            times=times,
            label="sunspots",
            path=tmp_path / "forecast.png",
        )
        (axes,) = panels(figure)
        known, later, first, second, _ = axes.lines
        np.testing.assert_array_equal(known.get_xydata(), np.c_[times[:4], series])
        np.testing.assert_array_equal(later.get_xydata(), [[1903, 3], [1904, 3.5], [1905, 3]])
        np.testing.assert_array_equal(first.get_xydata(), [[1903, 3], [1904, 5], [1905, 6]])
        np.testing.assert_array_equal(second.get_ydata(), [3, 4, 5, 6])
        assert first.get_linewidth() > 2 * second.get_linewidth() and second.get_alpha() < 0.7
        (band,) = axes.collections
        assert band.get_paths()[0].contains_point((1904.9, 7)) and not band.get_paths()[0].contains_point((1904.1, 7))
        assert axes.get_ylabel() == "sunspots" and axes.get_xlabel() == "time"
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["observed", "LSTM", "GRU"]
        assert inside(figure) and resolution(tmp_path / "forecast.png") == (1350, 570)

    def test_what_models_give_is_taken(self):
        series = np.sin(np.arange(40) / 3)
        model = fs.models.AutoRegressive(2)
        model.fit(series)
        (axes,) = panels(fs.plotting.forecast(series, model.forecast(series, 5)))
        np.testing.assert_array_equal(axes.lines[1].get_ydata(), [series[-1], *model.forecast(series, 5)])
        (axes,) = panels(fs.plotting.forecast(np.arange(3)[:, None], [[3], [4]]))
        np.testing.assert_array_equal(axes.lines[1].get_ydata(), [2, 3, 4])

    @pytest.mark.parametrize(
        ("arguments", "settings", "kind", "message"),
        [
            (([], [1.0]), {}, ValueError, r"history should be of shape \(T,\)"),
            ((np.ones((3, 2)), [1.0]), {}, ValueError, r"history should be of shape \(T,\)"),
            ((["a"], [1.0]), {}, TypeError, "history should hold real numbers"),
            (([1.0], {}), {}, ValueError, "forecasts should hold at least one"),
            (([1.0], {"a": []}), {}, ValueError, r"forecasts\['a'\] should be of shape"),
            (([1.0], [1.0]), {"bands": 3.0}, TypeError, "bands should be a pair"),
            (([1.0], [1.0]), {"bands": ([1.0, 2.0], [1.0])}, ValueError, "bands should have 1 steps, not 2 and 1"),
            (([1.0], {"a": [1.0]}), {"bands": {"b": ([1.0], [1.0])}}, ValueError, r"bands\['b'\] should belong"),
            (([1.0], [1.0, 2.0]), {"times": [1, 2]}, ValueError, "times should have at least 3 values"),
            (([1.0], [1.0]), {"label": None}, TypeError, "label should be a string"),
        ],
    )
    def test_bad_input(self, arguments, settings, kind, message):
        with pytest.raises(kind, match=message):
            fs.plotting.forecast(*arguments, **settings)


@pytest.mark.parametrize(
    "call", ["gates({'h': np.ones((2, 1, 3))})", "forecast([1.0], [1.0])", "attention_map(np.eye(1), ['a'])"]
)
def test_without_matplotlib(call):
    code = f"""
    import sys
    sys.modules["matplotlib"] = None
    import numpy as np
    import fastseq as fs
    try:
        fs.plotting.{call}
    except ImportError as error:
        print(error)
    """
    said = run_python(code).stdout
    assert said.startswith(call.partition("(")[0]) and "pip install 'fastseq[plot]'" in said
