"""Progress on a terminal: done of total, images per second and the time that remains."""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

# The rate is taken over the last few reports, so that a slow start (compiling, loading) is soon forgotten.
_WINDOW = 20


class Reporter:
    """Counts what is done, `worked` of it by this run, which `rate` and `remaining` go by. Thread-safe."""

    def __init__(self, total: int, done: int = 0) -> None:
        self.total = total
        self.done = done
        self.changed: Callable[[], None] = lambda: None
        self.worked = 0
        self._history = deque([(time.monotonic(), 0)], maxlen=_WINDOW)
        self._lock = threading.Lock()

    def advance(self, n: int = 1) -> None:
        """Report n more images done."""
        with self._lock:
            self.done += n
            self.worked += n
            self._history.append((time.monotonic(), self.worked))
        self.changed()

    def skip(self, n: int = 1) -> None:
        """Report n more images that an earlier run had done: they count as done but not in the rate."""
        with self._lock:
            self.done += n
        self.changed()

    @property
    def rate(self) -> float | None:
        """Images per second over the latest reports; None before the first one."""
        with self._lock:
            (begin, before), (end, after) = self._history[0], self._history[-1]
        return (after - before) / (end - begin) if end > begin else None

    @property
    def remaining(self) -> float | None:
        """Seconds to go at this rate; None before the first report."""
        rate = self.rate
        return max(self.total - self.done, 0) / rate if rate else None

    def __str__(self) -> str:
        text = f"{self.done}/{self.total}"
        if (rate := self.rate) is not None:
            text += f"  {rate:.3g} images/s" if rate < 1000 else f"  {rate:.0f} images/s"
        if (remaining := self.remaining) is not None:
            text += f"  {_clock(remaining)} left"
        return text


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"


@contextmanager
def progress(
    total: int, label: str, quiet: bool | None = None, stream: TextIO | None = None, *, done: int = 0
) -> Iterator[Reporter]:
    """Show how far a stage is while the block runs; the block calls `.advance(n)` on what it gets.

    Written to `stream` (standard error), and only if that is a terminal: into a file or a pipe goes nothing.
    `quiet` silences a terminal too. `done` is what an earlier run had finished: it counts as done but not in
    the rate.
    """
    reporter = Reporter(total, done)
    stream = sys.stderr if stream is None else stream
    if quiet or not stream.isatty():
        yield reporter
        return

    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.text import Text

    class Figures(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(str(reporter))

    # Standard output is left alone: it may carry JSON.
    display = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        Figures(),
        console=Console(file=stream),
        refresh_per_second=4,
        redirect_stdout=False,
    )
    with display:
        task = display.add_task(label, total=total, completed=done)
        reporter.changed = lambda: display.update(task, completed=reporter.done)
        yield reporter
