"""The files that the coordinator serves as they are: its own description and the dashboard."""

from __future__ import annotations

from importlib import resources

import msgspec

from inferfleet.coordinator.handlers import Pages
from inferfleet.coordinator.openapi import description


def pages() -> Pages:
    """Return the description made from the table, and the dashboard's files out of the package."""
    folder = resources.files("inferfleet.coordinator") / "dashboard"
    names = ("index.html", "dashboard.css", "dashboard.js")
    html, css, script = (folder.joinpath(name).read_bytes() for name in names)
    return Pages(msgspec.json.encode(description()), html, css, script)
