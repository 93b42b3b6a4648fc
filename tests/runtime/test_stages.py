"""Progress on plain lines where there is no terminal."""

import io
import threading

from rich.console import Console

from moebius_runtime.commands.stages import SILENCE, Stages


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def stages(terminal=False):
    clock, stream = Clock(), io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=200, highlight=False, soft_wrap=True, markup=False)
    return Stages("work", console, clock), clock, stream


def test_a_line_for_each_stage_and_no_more_than_one_in_a_while():
    say, clock, stream = stages()
    for step in range(100):
        say("picture 1", step, 100)
        clock.now += 1
    say("write: unet")
    say("write: decoder")
    lines = stream.getvalue().splitlines()
    assert lines == [
        "work: picture 1: 0 of 100 (0 s)",
        "work: picture 1: 30 of 100 (30 s)",
        "work: picture 1: 60 of 100 (60 s)",
        "work: picture 1: 90 of 100 (90 s)",
        "work: write: unet (100 s)",
    ]


def test_a_stage_that_reports_nothing_is_named_again():
    say, clock, stream = stages()
    clock.now = SILENCE
    say.beat()
    say("parse")
    for _ in range(90):
        clock.now += 1
        say.beat()
    assert stream.getvalue().splitlines() == [
        "work: started (30 s)",
        "work: parse (30 s)",
        "work: parse (60 s)",
        "work: parse (90 s)",
        "work: parse (120 s)",
    ]


def test_a_terminal_gets_a_spinner_and_no_lines():
    say, clock, stream = stages(terminal=True)
    with say:
        say("parse", 1, 2)
        clock.now = 100.0
        say.beat()
    assert "work: parse" not in stream.getvalue()


def test_the_timer_ends_with_the_work():
    say, _, _ = stages()
    with say:
        pass
    for thread in threading.enumerate():
        if thread.name == "stages":
            thread.join(5)
            assert not thread.is_alive()


def test_what_a_terminal_would_obey_is_not_printed():
    say, _, stream = stages()
    say("a\nb\x1b[31m")
    assert stream.getvalue() == "work: a b\\x1b[31m (0 s)\n"
