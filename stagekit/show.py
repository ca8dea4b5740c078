"""What the user sees while a pipeline runs: a table, progress with rate and time left, samples, the way out."""

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table


class Show:
    """Writes to a terminal, or plain lines where there is none; nothing with `quiet`."""

    def __init__(self, quiet: bool = False, file: TextIO | None = None) -> None:
        self.quiet = quiet
        self._console = Console(file=file or sys.stdout, highlight=False, soft_wrap=not sys.stdout.isatty())

    def line(self, text: str = "", style: str | None = None) -> None:
        """One line of text."""
        if not self.quiet:
            self._console.print(escape(text), style=style)

    def table(self, title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table; plain where the output is no terminal."""
        if self.quiet:
            return
        table = Table(
            title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False
        )
        for name in head:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        self._console.print(table)

    def sample(self, title: str, parts: Mapping[str, str], limit: int = 400) -> None:
        """A sample of generated text, part by part."""
        if self.quiet:
            return
        self._console.print(escape(title), style="bold")
        for name, text in parts.items():
            short = " ".join(text.split())
            short = short if len(short) <= limit else f"{short[:limit]} ..."
            self._console.print(f"  [cyan]{escape(name)}[/cyan]  {escape(short)}")

    def progress(self, what: str, total: int, unit: str, units: str, passing: bool = False) -> "Progress":
        """A progress display for `total` things; `unit` and `units` are their singular and plural. What is `passing`
        leaves no line behind on a terminal."""
        return Progress(self, what, total, unit, units, passing)


class Progress:
    """Done of total, rate, time left. One line that is rewritten on a terminal; a line now and then elsewhere."""

    def __init__(self, show: Show, what: str, total: int, unit: str, units: str, passing: bool = False) -> None:
        self._passing = passing
        self._show, self._what, self._total, self._unit, self._units = show, what, total, unit, units
        self._started = self._printed = time.monotonic()
        self._first: int | None = None
        self._live = show._console.is_terminal and not show.quiet

    def update(self, done: int, extra: str = "", ago: float = 0.0) -> None:
        """Say how far the work is. The first call says where it started (`ago` seconds before), so that the rate of a
        resumed run is right."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._started = done, now - ago
        if self._show.quiet:
            return
        finished = done >= self._total
        if (not finished or self._passing) and now - self._printed < (0.5 if self._live else 20.0):
            return
        self._printed = now
        text = f"  {self._bar(done)} {self._what} {done}/{self._total} {self._units}{self._pace(done, now)}{extra}"
        if self._live:
            width = max(20, self._show._console.width - 1)
            sys.stdout.write(f"\r{text[:width]:<{width}}" + ("\n" if finished and not self._passing else ""))
            sys.stdout.flush()
        else:
            self._show.line(text)

    def close(self) -> None:
        """End the line of a display that did not reach its total."""
        if self._live:
            sys.stdout.write("\n")

    def _bar(self, done: int) -> str:
        filled = round(20 * min(1.0, done / max(1, self._total)))
        return "[" + "#" * filled + "." * (20 - filled) + "]"

    def _pace(self, done: int, now: float) -> str:
        assert self._first is not None
        made, spent = done - self._first, now - self._started
        if made <= 0 or spent <= 0:
            return ""
        left = (self._total - done) * spent / made
        rate = made / spent
        per = f"{rate:.1f} {self._units}/s" if rate >= 1 else f"{1 / rate:.1f} s/{self._unit}"
        return f", {per}, {clock(left)} left" if left > 0 else f", {per}, {clock(spent)}"


def clock(seconds: float) -> str:
    """A duration as people read it."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
