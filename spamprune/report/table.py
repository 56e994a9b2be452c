"""A table as data, and its two renderings: HTML for the page, Markdown for a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from spamprune.report.formats import DIGITS, plus_minus
from spamprune.report.summary import Spread

TIES = (
    "† within one standard error of the difference from it, so not told apart by these seeds. A "
    "single seed has no error."
)


@dataclass(frozen=True)
class Text:
    """An entry that is read, not compared; ``long`` ones may wrap."""

    text: str
    long: bool = False


@dataclass(frozen=True)
class Best:
    """The best number of its column."""

    text: str


Entry = str | Text | Best  # a string is a number


@dataclass(frozen=True)
class Table:
    """A head, and rows that are as long as it."""

    head: Sequence[Entry]
    rows: Sequence[Sequence[Entry]]

    def html(self) -> str:
        """Return the table as HTML; it scrolls on its own where it is wider than the page."""
        top = "".join(_html("th", entry) for entry in self.head)
        top = top.replace(" / ", " /&nbsp;")  # a unit stays with its quantity
        rows = ("".join(_html("td", entry) for entry in row) for row in self.rows)
        body = "".join(f"<tr>{row}</tr>\n" for row in rows)
        return (
            '<div class="scroll" tabindex="0"><table>\n'
            f"<thead><tr>{top}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n"
        )

    def markdown(self) -> str:
        """Return the table as Markdown."""
        rule = ["---" if isinstance(entry, Text) else "---:" for entry in self.head]
        rows = [[_markdown(entry) for entry in row] for row in (self.head, *self.rows)]
        return "".join(f"| {' | '.join(row)} |\n" for row in (rows[0], rule, *rows[1:]))


def _html(tag: str, entry: Entry) -> str:
    if isinstance(entry, str):
        return f"<{tag}>{escape(entry)}</{tag}>"
    name = "best" if isinstance(entry, Best) else "text long" if entry.long else "text"
    return f'<{tag} class="{name}">{escape(entry.text)}</{tag}>'


def _markdown(entry: Entry) -> str:
    text = (entry if isinstance(entry, str) else entry.text).replace("|", "/")
    return f"**{text}**" if isinstance(entry, Best) else text


def marked(column: Sequence[Spread | None], metric: str) -> list[Entry]:
    """Return a column's entries: the best, where there are two or more, and what ties with it.

    Args:
        column: What each row has, if anything.
        metric: A field of ``Quality``, which says how many digits are shown, and whether more or
            less is better.
    """
    sign = 1 if metric == "accuracy" else -1
    finite = [value for value in column if value is not None and math.isfinite(value.mean)]
    best = max(finite, key=lambda value: sign * value.mean) if len(finite) > 1 else None
    return [_marked(value, best, plus_minus(value, DIGITS[metric])) for value in column]


def _marked(value: Spread | None, best: Spread | None, text: str) -> Entry:
    if value is None or best is None:
        return text
    if value.mean == best.mean:
        return Best(text)
    if value.error is None or best.error is None:
        return text
    told_apart = abs(best.mean - value.mean) > math.hypot(best.error, value.error)
    return text if told_apart else f"{text} †"
