"""What figures say."""

from __future__ import annotations

from xml.etree import ElementTree


def words_in(svg: str) -> set[str]:
    """Return the texts of a figure; fails unless it is XML."""
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    return {"".join(e.itertext()).strip() for e in root.iter() if e.tag.endswith("}text")}
