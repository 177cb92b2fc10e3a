"""Text, SubRip, WebVTT and columns of a transcript."""

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from cai_runtime.speech.subtitles import cues, to_srt, to_text, to_tsv, to_vtt


def transcript(*segments):
    return SimpleNamespace(segments=[SimpleNamespace(start=a, end=b, text=text) for a, b, text in segments])


TALK = transcript((0.0, 2.4, " Hello."), (2.4, 3661.0004, " Tom & Jerry <run>"), (36000.5, 360000.25, " End"))


def test_srt():
    assert to_srt(TALK) == (
        "1\n00:00:00,000 --> 00:00:02,400\nHello.\n\n"
        "2\n00:00:02,400 --> 01:01:01,000\nTom & Jerry <run>\n\n"
        "3\n10:00:00,500 --> 100:00:00,250\nEnd\n"
    )
    assert to_srt(transcript((0, 1, "1\n\n00:00:01,000 --> 00:00:02,000\nx"))).splitlines() == [
        "1", "00:00:00,000 --> 00:00:01,000", "1 00:00:01,000 -> 00:00:02,000 x",
    ]  # fmt: skip


def test_vtt():
    assert to_vtt(TALK).startswith("WEBVTT\n\n00:00:00.000 --> 00:00:02.400\nHello.\n\n00:00:02.400 --> 01:01:01.000\n")
    assert "Tom &amp; Jerry &lt;run&gt;\n" in to_vtt(TALK)
    assert to_vtt(transcript((0, 1, "a --> b"))) == "WEBVTT\n\n00:00:00.000 --> 00:00:01.000\na --&gt; b\n"


def test_text_and_columns():
    assert to_text(TALK) == "Hello.\nTom & Jerry <run>\nEnd\n"
    assert to_tsv(transcript((0.1, 1, "a\tb\r\nc\u2028d\0e"))) == "start\tend\ttext\n100\t1000\ta b c d e\n"


def test_nothing_was_said():
    for nothing in (transcript(), [], transcript((0, 1, " \n"))):
        assert (to_text(nothing), to_srt(nothing), to_vtt(nothing)) == ("", "", "WEBVTT\n")
        assert to_tsv(nothing) == "start\tend\ttext\n"


def test_a_list_of_segments_is_enough():
    assert to_text(TALK.segments) == to_text(TALK)


@given(
    st.lists(
        st.tuples(st.floats(0, 1e5), st.floats(0, 1e5), st.text(st.characters(exclude_categories=["Cs"]), max_size=8))
    )
)
def test_cues_follow_each_other_whatever_the_segments(segments):
    talk = transcript(*segments)
    ended = 0
    for cue in cues(talk):
        assert ended <= cue.start < cue.end and cue.text.strip() == cue.text != ""
        ended = cue.end
    count = len(list(cues(talk)))
    for text in (to_text(talk), to_tsv(talk), to_srt(talk), to_vtt(talk)):
        assert text.count("\n") == len(text.splitlines())
    srt, vtt = to_srt(talk).splitlines(), to_vtt(talk).splitlines()
    assert sum("-->" in line for line in srt) == sum("-->" in line for line in vtt) == count
    assert len(srt) == max(4 * count - 1, 0) and len(vtt) == 3 * count + 1
    assert len(to_text(talk).splitlines()) == len(to_tsv(talk).splitlines()) - 1 == count
