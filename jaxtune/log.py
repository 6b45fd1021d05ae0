"""What a run reports: console, metrics.jsonl, TensorBoard, and the loss curve as a picture.

A write that fails (full disk, say) never stops training: it is one warning.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune import process
from jaxtune.schema import Log as LogConfig


class Writer(NamedTuple):
    """Where rows of metrics go: `write(step, split, metrics)`, and what ends it."""

    write: Callable[[int, str, Mapping[str, float]], None]
    close: Callable[[], None] = lambda: None


def info(text: str) -> None:
    """One line to the console, from the first process only."""
    if process.is_first():
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def warn(text: str) -> None:
    """One warning line to the console's error stream, from any process."""
    sys.stdout.flush()
    sys.stderr.write(f"jaxtune: warning: {process.label()}{text}\n")


def every_few_seconds(label: str) -> Callable[[int, int], None]:
    """A progress callback (done, total) that prints at most every two seconds."""
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 2:
            last = time.monotonic()
            info(f"{label}: {done} of {total}")

    return report


@contextmanager
def counting(label: str) -> Iterator[Callable[[str], None]]:
    """A progress callback for work whose end is not known: a line that moves on a terminal, else
    one every ten seconds; nothing for work of two seconds."""
    began = last = time.monotonic()
    is_terminal = sys.stdout.isatty() and process.is_first()

    def report(text: str) -> None:
        nonlocal last
        now = time.monotonic()
        line = f"{label}: {text} after {now - began:.0f} s"
        if is_terminal and now - began > 2:
            sys.stdout.write(f"\r\x1b[K{line}")
            sys.stdout.flush()
        elif now - last > 10:
            last = now
            info(line)

    yield report
    if is_terminal:
        sys.stdout.write("\r\x1b[K")


class Log:
    """Sends each row of metrics to every writer, and shows progress; in the first process only."""

    def __init__(self, config: LogConfig, folder: Path, start: int, num_steps: int):
        """Opens the writers; rows of metrics.jsonl after step `start` belong to a lost run."""
        self.path = folder / "metrics.jsonl"
        self._folder, self._config = folder, config
        self._num_steps = num_steps
        self._first: tuple[int, float] | None = None  # step and time of the first training row
        self._failed: set[str] = set()
        self._writers: dict[str, Writer] = {}
        self._bar = None
        if not process.is_first():
            return
        self._writers["metrics.jsonl"] = _jsonl_writer(self.path, start)
        if config.tensorboard:
            self._writers["tensorboard"] = _tensorboard_writer(folder / "tensorboard", start)
        if _wants_bar(config.progress):
            self._bar = _Bar(num_steps, start)

    def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Records one row; `split` is "train" or "eval"."""
        for name, writer in self._writers.items():
            try:
                writer.write(step, split, metrics)
            except OSError as error:
                if name not in self._failed:
                    warn(f"{name} cannot be written ({error}); training goes on without it")
                self._failed.add(name)
        if self._config.progress == "off":
            return
        line = _line(metrics)
        if self._bar is not None and split == "train":
            self._bar.update(step, line)
        else:
            self.say(f"{split} step {step}/{self._num_steps}  {line}{self._eta(step, split)}")

    def say(self, text: str) -> None:
        """One line of text, above the progress bar if there is one."""
        if self._bar is not None:
            self._bar.say(text)
        else:
            info(text)

    def close(self) -> None:
        """Ends the progress bar and the writers; safe to call twice."""
        if self._bar is not None:
            self._bar.stop()
        while self._writers:
            self._writers.popitem()[1].close()

    def plot(self) -> dict[str, Path]:
        """Draws the loss curve, if asked for; returns {"plot": path}."""
        if not self._config.plot or not process.is_first():
            return {}
        try:
            return {"plot": plot_losses(self.path, self._folder / "loss.png")}
        except OSError as error:
            warn(f"loss.png cannot be written ({error})")
            return {}

    def _eta(self, step: int, split: str) -> str:
        """Time left by the steps since the first one, which compiles."""
        if split != "train":
            return ""
        if self._first is None:
            self._first = (step, time.monotonic())
            return ""
        first, began = self._first
        seconds = int((time.monotonic() - began) / (step - first) * (self._num_steps - step))
        return f"  eta {seconds // 60}:{seconds % 60:02d}"


_FORMATS = {
    "loss": ("loss", "{:.4f}"),
    "perplexity": ("ppl", "{:.3g}"),
    "accuracy": ("acc", "{:.3f}"),
    "exact_match": ("exact match", "{:.3f}"),
    "f1": ("F1", "{:.3f}"),
    "learning_rate": ("lr", "{:.2e}"),
    "grad_norm": ("grad", "{:.3f}"),
    "tokens_per_second": ("tok/s", "{:.0f}"),
    "padding_ratio": ("pad", "{:.1%}"),
    "mfu": ("mfu", "{:.1%}"),
}


def _line(metrics: Mapping[str, float]) -> str:
    parts = [
        f"{label} {form.format(metrics[name])}"
        for name, (label, form) in _FORMATS.items()
        if name in metrics
    ]
    return "  ".join(parts + ["SKIPPED (not finite)"] * bool(metrics.get("skipped")))


def _wants_bar(progress: str) -> bool:
    return progress == "bar" or (progress == "auto" and sys.stdout.isatty())


class _Bar:
    """A rich progress bar with the newest metrics."""

    def __init__(self, num_steps: int, start: int):
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.table import Column

        # Only the metrics give way when the terminal is narrow.
        metrics = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True))
        columns = (BarColumn(bar_width=16), MofNCompleteColumn(), TimeRemainingColumn(), metrics)
        self._progress = Progress(*columns, expand=True)
        self._task = self._progress.add_task("compiling", total=num_steps, completed=start)
        self._progress.start()

    def update(self, step: int, line: str) -> None:
        self._progress.update(self._task, completed=step, description=line)

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def stop(self) -> None:
        self._progress.stop()


def _jsonl_writer(path: Path, start: int) -> Writer:
    """Appends rows, each once: what a resumed run measures again is there already."""
    kept = [row for row in read_rows(path) if start and row["step"] <= start]
    partial = path.with_suffix(".part")
    partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
    partial.replace(path)
    known = {(row["step"], *row) for row in kept if row["split"] == "eval"}

    def write(step: int, split: str, metrics: Mapping[str, float]) -> None:
        row = {"step": step, "split": split} | {
            name: value if math.isfinite(value) else None for name, value in metrics.items()
        }
        if (step, *row) in known:
            return
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    return Writer(write)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of one of our .jsonl files; a last line cut off by a crash is left out."""
    rows = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _tensorboard_writer(folder: Path, start: int) -> Writer:
    from tensorboardX import SummaryWriter

    events = SummaryWriter(str(folder), purge_step=start + 1)

    def write(step: int, split: str, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            events.add_scalar(f"{split}/{name}", value, step)

    return Writer(write, events.close)


def plot_losses(metrics: Path, picture: Path) -> Path:
    """Draws training and held-out losses of a metrics.jsonl into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    rows = [row for row in read_rows(metrics) if row.get("loss") is not None]
    for split, style in (("train", "-"), ("eval", "o--")):
        points = [(row["step"], row["loss"]) for row in rows if row["split"] == split]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=split, linewidth=1.2, markersize=4)
    axes.set(xlabel="step", ylabel="loss")
    if axes.has_data():
        axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return picture
