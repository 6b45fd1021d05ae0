"""What will be trained on, for people: lengths, padding, duplicates, rows with their targets."""

import hashlib
import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxtune.data.batch import TokenRow
from jaxtune.data.packing import make_plan
from jaxtune.data.table import TokenTable
from jaxtune.schema import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BARS, WIDTH = 12, 40
COLOURED = ("\x1b[1;32m", "\x1b[0m")
MARKED = ("⟦", "⟧")


def histogram(table: TokenTable) -> str:
    """Lengths of rows as a bar chart of text."""
    counts, edges = _binned(table.lengths)
    lines = []
    for count, first, last in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "█" * round(WIDTH * count / counts.max())
        lines.append(f"{first:>7} to {last - 1:<7} {count:>8} {bar}")
    return "\n".join(lines)


def draw(table: TokenTable, picture: Path) -> None:
    """Draws the same into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    axes.hist(table.lengths, bins=60)
    axes.set(xlabel="tokens", ylabel="rows")
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def padding(table: TokenTable, cfg: Data, seed: int) -> str:
    """How much of an epoch's rows is padding, packed as the config says."""
    order = np.random.default_rng([seed, 0]).permutation(len(table)).tolist()
    num_rows = len(make_plan(table.lengths, order, cfg))
    length = cfg.max_seq_len + (cfg.max_target_len if table.paired else 0)
    share = 1 - table.lengths.sum() / (num_rows * length)
    how = cfg.packer if cfg.packing else "one example a row"
    text = f"{num_rows} rows of {length} tokens ({how}), {share:.2%} padding"
    if not cfg.packing and cfg.pad_to == "longest":
        text += " at most: data.pad_to=longest cuts it by batch"
    return text


def duplicates(table: TokenTable) -> int:
    """Rows whose tokens an earlier row has, too."""
    seen = {hashlib.sha256(row.tokens.tobytes()).digest() for row in table}
    return len(table) - len(seen)


def show(row: TokenRow, tokenizer: "PreTrainedTokenizerFast", is_terminal: bool) -> str:
    """A row's text; what carries loss is green on a terminal, else in brackets."""
    begin, end = COLOURED if is_terminal else MARKED
    parts = []
    for trained, run in groupby(range(len(row.tokens)), key=lambda t: bool(row.trained[t])):
        text = tokenizer.decode(row.tokens[list(run)].tolist())
        parts.append(f"{begin}{text}{end}" if trained else str(text))
    return "".join(parts)


def export(table: TokenTable, path: Path) -> None:
    """Writes rows as JSON lines: `tokens`, and 0 or 1 for each in `trained`."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(_exported(table))


def _exported(table: TokenTable) -> Iterator[str]:
    for row in table:
        fields = {"tokens": row.tokens.tolist(), "trained": row.trained.astype(int).tolist()}
        yield json.dumps(fields) + "\n"


def _binned(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts in up to `BARS` ranges of whole numbers, and their edges."""
    low, high = int(lengths.min()), int(lengths.max())
    step = max(1, -(-(high + 1 - low) // BARS))
    edges = np.arange(low, high + 1 + step, step)
    return np.histogram(lengths, edges)[0], edges
