from __future__ import annotations

from spamprune.report.formats import milliseconds, number, plus_minus, target
from spamprune.report.summary import Spread


def test_numbers() -> None:
    assert number(-1234.567, 1) == "−1,234.6"
    assert number(float("nan"), 2) == "NaN"
    assert plus_minus(Spread(1.234, 0.05), 2) == "1.23 ± 0.05"
    assert plus_minus(Spread(1.234, None), 2) == "1.23"
    assert plus_minus(None, 2) == "–"
    assert plus_minus(Spread(-54_149.0, 6_629.0), 0) == "−54,149 ± 6,629"


def test_targets() -> None:
    assert target({"macs": 0.1, "params": 0.0664}) == "10 % of MACs, 6.64 % of params"
    assert target({"params": 0.3001}) == "30.01 % of params"
    assert target({"bytes": 0.4}) == "40 % of bytes"
    assert target({"evidence": 1.0}) == "most evidence"


def test_milliseconds_are_the_median() -> None:
    assert milliseconds([0.001, 0.5, 0.002]) == "2.00"
    assert milliseconds([0.123]) == "123"
    assert milliseconds([]) == "–"
