"""What the demo shows: steps, a progress bar on a terminal (plain lines elsewhere), and the last table."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from inferfleet.demo.tally import Tally

_PLAIN_WIDTH = 100
_PLAIN_EVERY_S = 2.0


class Gauge:
    """How many requests are sent and answered; drawn as bars, or told in a line every two seconds."""

    def __init__(self, console: Console, total: int, progress: Progress | None) -> None:
        self._console = console
        self._total = total
        self._progress = progress
        self._next_line_at = time.monotonic() + _PLAIN_EVERY_S
        self._last_line = ""
        self._tasks: dict[str, TaskID] = {}
        if progress is not None:
            self._tasks = {name: progress.add_task(name, total=total) for name in ("sent", "answered")}

    def show(self, tally: Tally) -> None:
        """Show where things stand now."""
        if self._progress is not None:
            self._progress.update(self._tasks["sent"], completed=tally.sent)
            self._progress.update(self._tasks["answered"], completed=tally.answered)
        elif time.monotonic() >= self._next_line_at:
            self._next_line_at = time.monotonic() + _PLAIN_EVERY_S
            line = f"sent {tally.sent} of {self._total}, answered {tally.answered}"
            if line != self._last_line:
                self._console.print(f"         {line}")
            self._last_line = line


class LiveTable:
    """How a rollout stands: a table that is drawn anew on a terminal, a line every two seconds elsewhere."""

    def __init__(self, console: Console, live: Live | None) -> None:
        self._console = console
        self._live = live
        self._next_line_at = 0.0

    def show(self, title: str, reason: str, lines: Sequence[tuple[str, str, str]]) -> None:
        """Show what stands; ``lines`` are versions, how much they answered, and how much was right."""
        if self._live is not None:
            table = Table(title=title, title_justify="left", caption=reason, caption_justify="left")
            table.add_column("version")
            table.add_column("answered", justify="right")
            table.add_column("right", justify="right")
            for line in lines:
                table.add_row(*line)
            self._live.update(table)
        elif time.monotonic() >= self._next_line_at:
            self._next_line_at = time.monotonic() + _PLAIN_EVERY_S
            versions = ", ".join(f"v{version} {answered} ({right})" for version, answered, right in lines)
            self._console.print(f"         {title}; answered: {versions}", soft_wrap=True)


class Screen:
    """Writes for a person: colours and bars on a terminal, plain lines into a file or pipe."""

    def __init__(self) -> None:
        console = Console(highlight=False)
        self._console = console if console.is_terminal else Console(highlight=False, width=_PLAIN_WIDTH)
        self._began_at = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line with the seconds since the start."""
        seconds = time.monotonic() - self._began_at
        self._console.print(f"[dim]{seconds:5.1f} s[/dim]  {text}", soft_wrap=True)

    def show(self, drawn: Table | str) -> None:
        """Print a table, or text as it is."""
        if isinstance(drawn, str):
            self._console.print(drawn, soft_wrap=True, markup=False)
        else:
            self._console.print(drawn)

    @contextmanager
    def live_table(self) -> Iterator[LiveTable]:
        """Show how a rollout stands while the block runs."""
        if not self._console.is_terminal:
            yield LiveTable(self._console, None)
            return
        with Live(console=self._console, refresh_per_second=5, transient=True) as shown:
            yield LiveTable(self._console, shown)

    @contextmanager
    def gauge(self, total: int) -> Iterator[Gauge]:
        """Show progress towards ``total`` requests while the block runs."""
        if not self._console.is_terminal:
            yield Gauge(self._console, total, None)
            return
        columns = (
            TextColumn("         {task.description:>8}"),
            BarColumn(bar_width=50),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console) as progress:
            yield Gauge(self._console, total, progress)


@dataclass(frozen=True, slots=True)
class VersionLine:
    """One line of the last table: a model version and what it did."""

    route: str
    what: str
    answered: int
    accuracy: float | None
    batches: int
    rows: int


def version_table(lines: list[VersionLine]) -> Table:
    """Return who answered how much, how well, and in batches of which size."""
    table = Table(title="What the fleet answered", title_justify="left")
    table.add_column("route")
    table.add_column("model version")
    for name in ("answered", "accuracy on unseen", "batches", "rows a batch"):
        table.add_column(name, justify="right")
    for line in lines:
        table.add_row(
            line.route,
            line.what,
            str(line.answered),
            "-" if line.accuracy is None else f"{line.accuracy:.1%}",
            str(line.batches) if line.batches else "-",
            f"{line.rows / line.batches:.1f}" if line.batches else "-",
        )
    return table


def sum_table(rows: list[tuple[str, str]]) -> Table:
    """Return the sums, one a line."""
    table = Table(show_header=False)
    table.add_column(justify="right", style="bold")
    table.add_column()
    for name, value in rows:
        table.add_row(name, value)
    return table
