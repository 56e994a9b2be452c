import io
import re

import pytest
from rich.console import Console

from spamprune.engine.stages import Stages


def stages():
    out = io.StringIO()
    return Stages(Console(file=out, width=80, markup=False)), out


def test_a_stage_is_named_at_once_and_its_time_told_at_the_end():
    made, out = stages()
    with made.stage("work [0]"):
        assert out.getvalue() == "work [0] … "
    assert re.fullmatch(r"work \[0\] … \d+\.\d s\n", out.getvalue())


def test_notes_have_lines_of_their_own():
    made, out = stages()
    with made.stage("work"):
        made.note("half")
    made.note("afterwards")
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert lines[:2] == ["work …", "  half"]
    assert lines[2].startswith("work: ")
    assert lines[3:] == ["  afterwards"]


def test_an_error_ends_the_line():
    made, out = stages()
    with pytest.raises(ZeroDivisionError), made.stage("work"):
        raise ZeroDivisionError
    assert out.getvalue() == "work … \n"
