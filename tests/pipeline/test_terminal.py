"""Progress lines for logs, and text that cannot steer a terminal."""

import io

from hypothesis import given
from hypothesis import strategies as st

from pipeline.terminal import Lines, duration, plain, progress, size


def test_lines_are_sparse_and_the_end_is_always_told():
    stream, now = io.StringIO(), [0.0]
    show = Lines("synth", stream, clock=lambda: now[0])
    for done in range(11):
        show(done, 10, "5 images")
        now[0] += 5.0
    show.finish()
    show.finish()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "synth: 0/10, 5 images"
    assert lines[1] == "synth: 6/10, 5 images, 20 s left"
    assert lines[-1] == "synth: 10/10, 5 images"
    assert len(lines) == 3


def test_speed_counts_only_what_this_run_did():
    stream, now = io.StringIO(), [0.0]
    show = Lines("synth", stream, clock=lambda: now[0])
    show(90, 100, "")
    now[0] = 30.0
    show(93, 100, "")
    assert stream.getvalue().splitlines()[-1] == "synth: 93/100, 1 min 10 s left"


def test_what_is_mostly_brief_gets_no_line_unless_it_lasts():
    for seconds, lasts in ((0.5, False), (4.0, True)):
        stream, now = io.StringIO(), [0.0]
        show = Lines("eval", stream, clock=lambda now=now: now[0], brief=True)
        for batch in range(11):
            show(512 * batch, 12345 if batch < 10 else 0)  # a total that is not known
            now[0] += seconds
        show.finish()
        lines = stream.getvalue().splitlines()
        assert bool(lines) == lasts
        if lasts:
            assert lines[0].startswith("eval: 1536/12345") and lines[-1] == "eval: 5120" and len(lines) == 4


def test_no_terminal_means_lines_and_quiet_means_nothing():
    stream = io.StringIO()
    with progress("t", stream) as show:
        show(1, 1, "")
    assert stream.getvalue() == "t: 1/1\n"
    with progress("t", stream, quiet=True) as show:
        show(1, 1, "")
    assert stream.getvalue() == "t: 1/1\n"


def test_a_terminal_gets_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with progress("synth [x]", stream) as show:
        show(1.5, 2, "[bold]note")
    assert "synth [x]" in stream.getvalue() and "[bold]note" in stream.getvalue()


@given(st.text())
def test_plain_text_is_printable(text):
    assert plain(text).isprintable()
    assert text.isprintable() <= (plain(text) == text)


def test_plain_shows_what_it_defuses():
    assert plain("a\x1b[31m\u202eb\n") == "a\\x1b[31m\\u202eb\\n"


def test_durations_and_sizes():
    assert [duration(s) for s in (0, 59.6, 3599, 3600)] == ["0 s", "1 min 00 s", "59 min 59 s", "1 h 00 min"]
    assert [size(n) for n in (0, 999, 1000, 2.5e12)] == ["0 B", "999 B", "1.0 kB", "2.5 TB"]
