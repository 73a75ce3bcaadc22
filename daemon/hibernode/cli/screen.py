"""What people look at: tables, reports, and a live line per action. Only this file knows rich.

Without a terminal everything is plain text of any width, with no control characters in it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.live import Live
from rich.text import Text

from hibernode.cli import text

Cell = str | tuple[str, str]  # text, or text and its style
GAP = 2  # cells between two columns
NEVER = 99

STATUS_STYLE = {"ready": "green", "error": "red", "checkpoint_created": "cyan", "processing": "yellow"}


@dataclass(frozen=True)
class Column:
    """`keep`: the column with the smallest goes first where there is no room. `flexible`: may be cut short instead."""

    title: str
    keep: int = NEVER
    right: bool = False
    flexible: bool = False


@dataclass(frozen=True)
class Bar:
    """One live line: what an action is doing. `fraction` is None while nobody knows how much there is to do."""

    label: str
    phase: str
    fraction: float | None
    figures: Sequence[str]  # the most important first: what does not fit is left out


class Screen:
    """Standard output, as this command was asked to use it."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        terminal = sys.stdout.isatty()
        # Said explicitly, because rich takes hints from the environment that would put colours into a pipe.
        self._console = Console(force_terminal=terminal, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self.live = terminal and not self._console.is_dumb_terminal and not as_json
        self._narrow = self._console.width if terminal else None
        self._ascii = not (sys.stdout.encoding or "").lower().startswith("utf")

    # --- for programs ---

    def document(self, value: object) -> None:
        """One JSON document; indented where a person looks at it."""
        self._raw(json.dumps(value, ensure_ascii=False, indent=2 if sys.stdout.isatty() else None))

    def record(self, value: object) -> None:
        """One JSON document of many, on its line, at once."""
        self._raw(json.dumps(value, ensure_ascii=False))

    def _raw(self, line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    # --- for people ---

    def say(self, *parts: Cell) -> None:
        """One line."""
        line = self._line(parts)
        line.rstrip()
        self._console.print(line)

    def _line(self, parts: Iterable[Cell]) -> Text:
        line = Text()
        for part in parts:
            words, style = (part, "") if isinstance(part, str) else part
            line.append(self._encodable(words), style)
        return line

    def _encodable(self, words: str) -> str:
        return words.translate(_ASCII).encode("ascii", "replace").decode() if self._ascii else words

    def good(self, *parts: Cell) -> None:
        self.say(("✓ ", "bold green"), *parts)

    def bad(self, *parts: Cell) -> None:
        self.say(("✗ ", "bold red"), *parts)

    def fields(self, pairs: Iterable[tuple[str, Cell]], *, indent: int = 0) -> None:
        """Names on the left, values on the right; pairs without a value are left out."""
        shown = [(name, value) for name, value in pairs if (value if isinstance(value, str) else value[0])]
        width = max((len(name) for name, _ in shown), default=0)
        for name, value in shown:
            self.say(" " * indent, (f"{name:<{width}}", "dim"), "  ", value)

    def table(self, columns: Sequence[Column], rows: Sequence[Sequence[Cell]], *, empty: str) -> None:
        if not rows:
            self.say(empty)
            return
        chosen = _fitting(columns, rows, self._narrow)
        self.say(*_row([(columns[i].title, "dim") for i, _ in chosen], columns, chosen))
        for row in rows:
            self.say(*_row([row[i] for i, _ in chosen], columns, chosen))

    @contextmanager
    def watching(self) -> Iterator[Board]:
        """A place below the text where lines change in place; it is gone afterwards."""
        board = Board(self)
        with Live(
            console=self._console,
            get_renderable=board.render,
            refresh_per_second=10,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        ):
            yield board

    @property
    def width(self) -> int:
        return self._console.width

    def bar(self, bar: Bar, frame: int) -> Text:
        """At 80 columns all of it fits."""
        head: list[Cell] = [" ", (_SPINNER[frame % len(_SPINNER)], "cyan"), " "]
        if bar.label:
            head += [f"{bar.label}  "]
        head += [(f"{bar.phase:<10}", "bold"), "  "]
        if bar.fraction is not None:
            head += [*_drawn(bar.fraction, self._bar_width(bar)), f"  {bar.fraction:4.0%}"]
        line = self._line(head)
        for figure in bar.figures:
            if figure and line.cell_len + GAP + cell_len(figure) < self.width:
                line.append("  " + self._encodable(figure))
        return line

    def _bar_width(self, bar: Bar) -> int:
        taken = 22 + cell_len(bar.label) + (GAP if bar.label else 0) + _FIGURES
        return max(8, min(40, self.width - taken))


class Board:
    """The live lines, set by whoever follows actions and drawn a few times a second by rich's thread."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._bars: dict[str, Bar] = {}

    def show(self, key: str, bar: Bar) -> None:
        self._bars = self._bars | {key: bar}  # replaced, never changed: the drawing thread reads it

    def remove(self, key: str) -> None:
        self._bars = {k: bar for k, bar in self._bars.items() if k != key}

    def render(self) -> Text:
        frame = int(time.monotonic() * 10)
        return Text("\n").join(self._screen.bar(bar, frame) for bar in self._bars.values())


_FIGURES = 47  # cells kept for them whether they are there or not: a bar that changes its length looks like progress
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_ASCII = str.maketrans(
    {"✓": "+", "✗": "x", "→": "-", "…": "~", "━": "=", "╸": "=", "╺": "-", "·": "-"} | dict.fromkeys(_SPINNER, "*")
)


def _drawn(fraction: float, width: int) -> list[Cell]:
    halves = round(max(0.0, min(1.0, fraction)) * width * 2)
    done = "━" * (halves // 2) + "╸" * (halves % 2)
    return [(done, "cyan"), ("━" * (width - len(done)), "bright_black")]


def _text(cell: Cell) -> str:
    return cell if isinstance(cell, str) else cell[0]


def _row(cells: Sequence[Cell], columns: Sequence[Column], chosen: Sequence[tuple[int, int]]) -> list[Cell]:
    out: list[Cell] = []
    for n, (cell, (i, width)) in enumerate(zip(cells, chosen, strict=True)):
        words, style = (cell, "") if isinstance(cell, str) else cell
        if cell_len(words) > width:
            words = set_cell_size(words, width - 1).rstrip() + "…"
        padding = " " * (width - cell_len(words))
        last = n == len(cells) - 1
        out.append((padding + words if columns[i].right else words if last else words + padding, style))
        if not last:
            out.append(" " * GAP)
    return out


def _fitting(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], room: int | None) -> list[tuple[int, int]]:
    """Which columns to show, and how wide: (index, width). Without a limit, all of them."""
    widths = [max(cell_len(column.title), *(cell_len(_text(row[i])) for row in rows)) for i, column in enumerate(columns)]
    chosen = list(range(len(columns)))
    if room is None:
        return [(i, widths[i]) for i in chosen]
    least = [min(w, 16) if column.flexible else w for w, column in zip(widths, columns, strict=True)]
    spare = room + GAP
    for i in sorted(chosen, key=lambda i: -columns[i].keep):
        if columns[i].keep == NEVER or least[i] + GAP <= spare:
            spare -= least[i] + GAP
        else:
            chosen.remove(i)
    for i in chosen:
        extra = min(max(spare, 0), widths[i] - least[i])
        least[i] += extra
        spare -= extra
    return [(i, least[i]) for i in chosen]


def status(word: str) -> Cell:
    return (word, STATUS_STYLE.get(word, ""))


def ago(then: float) -> str:
    return text.age(then, time.time()) if then else ""
