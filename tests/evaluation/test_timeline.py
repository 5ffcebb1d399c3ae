"""The timeline of a question: one file, every event at its place, nothing of the input read as HTML."""

import re

import pytest

from marc_jax.evaluation import timeline


def page(**changes):
    given = {
        "question": "who <b>sings</b> ?",
        "answer": "nobody & no one",
        "tracks": {
            "a<1>.mp4": timeline.Track(10.0, [(0.0, 2.5, 0.1), (2.5, 10.0, 0.9)]),
            "b.mp4": timeline.Track(4.0, [(0.0, 4.0, 0.5)]),
        },
        "shown": [timeline.Shown("a<1>.mp4", 2, 2.5, 10.0, 0.9, b"jpeg"), timeline.Shown("b.mp4", 1, 0.0, 4.0, 0.5)],
        "times": {"prefill": 0.0021},
    }
    return timeline.page(**{**given, **changes})


def test_every_event_is_where_it_is_in_time():
    text = page()
    assert "left:0.000%;width:25.000%" in text and "left:25.000%;width:75.000%" in text
    assert 'title="event 2: 0:02.5 to 0:10.0, similarity 0.900">2</i>' in text
    assert "2.10 ms" in text and "2 events" in text and "1 event<" in text


def test_the_page_is_one_file_and_text_stays_text():
    text = page()
    assert "who &lt;b&gt;sings" in text and "a&lt;1&gt;.mp4" in text and "nobody &amp; no one" in text
    assert "<script" not in text and not re.search(r"(src|href)=\"(?!data:)", text)
    assert text.count("data:image/jpeg;base64,anBlZw==") == 1 and text.count("no picture") == 1


def test_nothing_read_and_nothing_said_is_a_page_too():
    text = page(answer="", tracks={"a.mp4": timeline.Track(0.0, [])}, shown=[], times={})
    assert "(nothing)" in text and "Where the time went" not in text


@pytest.mark.parametrize("seconds, text", [(0, "0:00.0"), (59.96, "1:00.0"), (3723.44, "1:02:03.4"), (75.5, "1:15.5")])
def test_times_are_read_as_on_a_player(seconds, text):
    assert timeline.clock(seconds) == text
