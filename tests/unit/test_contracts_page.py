"""The page of promises is what the suites say: no promise is missing, none is broken, none is made up."""

from __future__ import annotations

from scripts.contract_table import PAGE, SUITES, promises


def test_the_page_has_every_promise_and_none_is_broken() -> None:
    """``./scripts/contracts`` has been run since a promise was added, changed or taken away."""
    text = PAGE.read_text()
    sections = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    assert list(sections) == [suite.port for suite in SUITES]
    for suite in SUITES:
        rows = [line.split(" | ")[0].removeprefix("| ") for line in sections[suite.port].splitlines() if line]
        known = set(promises(suite).values())
        assert set(rows[2:]) <= known, suite.port
        shown = {said for said in known if f"| {said} |" in text}
        alone = known - shown
        assert len(alone) <= len(known) // 4, sorted(alone)
    assert "**no**" not in text


def test_every_adapter_has_promises_shown() -> None:
    """No column is empty."""
    for section in PAGE.read_text().split("\n## ")[1:]:
        rows = [line.split(" | ")[1:] for line in section.splitlines() if line.startswith("| ")][1:]
        assert rows, section
        for column in zip(*rows, strict=True):
            assert any(cell.startswith("yes") for cell in column), section[:60]
