"""A picture per question: it has the promised size, shows what differs, and survives odd input."""

import warnings

import cv2
import numpy as np
import pytest

from marc_jax.evaluation import canvas, pictures

SPANS = [(0, 2), (2, 5), (5, 6)]


def sample(**changes):
    frames = np.random.default_rng(0).integers(0, 256, size=(12, 28, 28, 3), dtype=np.uint8)
    fields = dict(
        frames=frames,
        seconds=np.arange(12) / 4,
        event_spans=SPANS,
        question="Which way does the red disc move?",
        options=("A. left", "B. right"),
        answers={"teacher": ("B. right", True), "student": ("A. left", False)},
        truth="B. right",
        needed_events=(1,),
        retrieved_events={1: 0.8, 2: 0.3},
        merge_weights=np.array([[0.5, 0.25, 0.125, 0.125]]),
        merge_patches=(2, 3, 4, 5),
        title="direction",
    )
    return {**fields, **changes}


def drawn(path, **changes):
    size = pictures.draw_sample(path, **sample(**changes))
    image = cv2.imread(str(path))
    assert (image.shape[1], image.shape[0]) == size
    return image


def test_the_picture_has_the_size_it_says_and_is_not_blank(tmp_path):
    image = drawn(tmp_path / "a.png")
    assert image.shape[1] == 1320 and 600 < image.shape[0] < 1300
    assert image.std() > 10


@pytest.mark.parametrize(
    "change",
    [
        {"retrieved_events": {0: 0.8, 2: 0.3}},
        {"needed_events": (0,)},
        {"merge_weights": np.array([[0.125, 0.25, 0.125, 0.5]])},
        {"answers": {"teacher": ("B. right", True), "student": ("A. left", True)}},
        {"question": "Which way does the blue disc move?"},
        {"truth": "A. left"},
        {"event_spans": [(0, 1), (1, 5), (5, 6)]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_differs_can_be_seen(tmp_path, change):
    a, b = drawn(tmp_path / "a.png"), drawn(tmp_path / "b.png", **change)
    assert a.shape != b.shape or np.any(a != b)


def test_the_same_sample_gives_the_same_bytes(tmp_path):
    drawn(tmp_path / "a.png")
    drawn(tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_heavier_patch_gets_a_wider_piece(tmp_path):
    """The bar under the ribbons: count pixels of the event's own colour along its middle row."""
    even = drawn(tmp_path / "a.png", merge_weights=np.array([[0.2, 0.2, 0.1, 0.5]]))
    odd = drawn(tmp_path / "b.png", merge_weights=np.array([[0.4, 0.3, 0.2, 0.1]]))
    blue = np.array([0xB2, 0x72, 0x00])  # BGR of the first event colour, event 2 owns patches 2 to 4
    rows = [np.all(image == blue, axis=-1).sum(axis=1) for image in (even, odd)]
    assert rows[1].max() > 1.5 * np.median(rows[0][rows[0] > 300])


ODD = {
    "one frame": dict(frames=np.zeros((1, 9, 16, 3), np.uint8), seconds=[0.0], event_spans=[(0, 1)], needed_events=(),
                      retrieved_events={0: None}, merge_weights=[[1.0]], merge_patches=None),
    "one event": dict(event_spans=[(0, 6)], needed_events=(0,), retrieved_events={0: 0.5}),
    "no truth, as for ask": dict(truth=None, needed_events=(), answers={"student": ("something", None)}),
    "no answers": dict(truth=None, answers={}),
    "nothing merged": dict(merge_weights=None, merge_patches=None),
    "no retrieval": dict(retrieved_events={}),
    "many kept, one empty": dict(merge_weights=np.vstack([np.eye(4), np.zeros((6, 4))])),
    "very long": dict(question="why " * 400, answers={"arm " * 30: ("x" * 5000, False)}, options=["option " * 60] * 4),
    "blank lines and tabs": dict(question="a\n\n\tb", answers={"arm": ("", True)}),
    "unicode and dollars": dict(question="Ünï → Ελληνικά Привет 日本語 $x_1$ <b>&", truth="★ ✓"),
    "portrait": dict(frames=np.zeros((12, 64, 24, 3), np.uint8)),
    "wide": dict(frames=np.zeros((12, 18, 64, 3), np.uint8)),
    "odd number of frames": dict(frames=np.zeros((11, 28, 28, 3), np.uint8), seconds=np.arange(11)),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_input_is_drawn_without_a_warning(tmp_path, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert drawn(tmp_path / "a.png", **ODD[name]).std() > 1


def test_long_videos_show_a_subsample_of_their_frames(tmp_path):
    frames = np.zeros((128, 36, 64, 3), np.uint8)
    drawn(tmp_path / "a.png", frames=frames, seconds=np.arange(128.0), event_spans=[(0, 30), (30, 64)],
          retrieved_events={1: 0.2}, merge_patches=(30, 40, 50, 63))  # fmt: skip


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"frames": np.zeros((0, 4, 4, 3), np.uint8), "seconds": []}, "T > 0"),
        ({"seconds": [0.0]}, "1 times for 12 frames"),
        ({"retrieved_events": {3: 0.1}}, "event 3 is not one of the 3"),
        ({"merge_patches": (1, 2)}, "do not fit 2 patches"),
        ({"merge_patches": (2, 3, 4, 9)}, "patch 9 is not one of the 6"),
    ],
)
def test_what_does_not_belong_together_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        pictures.draw_sample(tmp_path / "a.png", **sample(**changes))
    assert list(tmp_path.iterdir()) == []


def test_lines_fit_their_width_and_say_what_was_cut():
    page = canvas.Page()
    text = "the quick brown fox " * 20 + "y" * 300
    lines = page.lines(text, 15, 400, 100)
    assert all(page.width(line, 15) <= 400 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    short = page.lines(text, 15, 400, 2)
    assert len(short) == 2 and short[1].endswith("characters") and page.width(short[1], 15) <= 400
