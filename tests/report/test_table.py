from __future__ import annotations

import math

from spamprune.report.summary import Spread
from spamprune.report.table import Best, Table, Text, marked


def test_one_table_in_two_renderings() -> None:
    table = Table([Text("Name"), "MACs / sample"], [[Text("a | <b>", long=True), Best("1,234")]])
    assert table.markdown() == (
        "| Name | MACs / sample |\n| --- | ---: |\n| a / <b> | **1,234** |\n"
    )
    drawn = table.html()
    assert '<th class="text">Name</th><th>MACs /&nbsp;sample</th>' in drawn
    assert '<td class="text long">a | &lt;b&gt;</td><td class="best">1,234</td>' in drawn


def test_best_and_ties_are_marked() -> None:
    column = [Spread(90.0, 1.0), Spread(91.0, 1.0), Spread(88.0, 1.0), None, Spread(90.9, None)]
    assert marked(column, "accuracy") == [
        "90.00 ± 1.00 †",  # 1.0 is less than √2
        Best("91.00 ± 1.00"),
        "88.00 ± 1.00",
        "–",
        "90.90",  # no error, nothing to say
    ]


def test_less_is_better_for_the_other_metrics_and_nan_is_never_best() -> None:
    column = [Spread(math.nan, None), Spread(0.5, 0.1), Spread(math.inf, None), Spread(0.5, 0.2)]
    best = [Best("0.500 ± 0.100"), Best("0.500 ± 0.200")]
    assert marked(column, "nll") == ["NaN", best[0], "∞", best[1]]


def test_a_number_without_a_rival_is_not_the_best() -> None:
    assert marked([Spread(math.nan, None)], "nll") == ["NaN"]
    assert marked([Spread(0.5, 0.1), None], "nll") == ["0.500 ± 0.100", "–"]
