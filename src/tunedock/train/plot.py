"""Loss curves of a run, from its events: `loss.svg` and `loss.png`.

matplotlib is used through its objects: no window system, no global figure. Titles may be Chinese on a machine without a
Chinese font: a character DejaVu Sans lacks is taken from an installed CJK font, else from the one in `fonts/`.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import NDArray

from tunedock.errors import DiskError
from tunedock.events import Event

CJK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",  # matplotlib reads the first face of Noto's collection, which is this one; it has all the characters
    "Noto Sans SC",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "SimHei",
    "Droid Sans Fallback",
)
SHIPPED_FONT = "Tunedock CJK"

RAW, SMOOTH, VALIDATION, INK, GRID = "#9db8e8", "#1c56c4", "#c2410c", "#374151", "#e5e7eb"
SMOOTH_FROM = 20
"""Points from which on a smoothed line is drawn over the raw one."""


Series = dict[int, float]
"""Value by optimizer step, in the order of the steps."""


def plot_losses(events: Iterable[Event], folder: Path, title: str) -> list[Path]:
    """Draws training and validation loss over the steps, the learning rate below; returns the files, none without a loss.

    Raises DiskError when the folder cannot be written.
    """
    series = collect(events, ("loss", "eval_loss", "learning_rate"))
    if not (series["loss"] or series["eval_loss"]):
        return []
    figure = draw_losses(series["loss"], series["eval_loss"], series["learning_rate"], title)
    made = []
    for format_ in ("svg", "png"):
        path = folder / f"loss.{format_}"
        content = io.BytesIO()
        figure.savefig(content, format=format_, metadata={"Date": None} if format_ == "svg" else None)
        _write(path, content.getvalue())
        made.append(path)
    return made


def collect(events: Iterable[Event], names: Sequence[str]) -> dict[str, Series]:
    """The named metrics. Null values are passed over, and steps done again after a resume replace the first attempt."""
    series: dict[str, Series] = {name: {} for name in names}
    for event in events:
        if event["kind"] != "metrics":
            continue
        step = event["step"]
        found = {name: value for name in names if (value := event["values"].get(name)) is not None}
        if any(series[name] and next(reversed(series[name])) >= step for name in found):
            series = {name: {at: v for at, v in points.items() if at < step} for name, points in series.items()}
        for name, value in found.items():
            series[name][step] = value
    return series


def draw_losses(loss: Series, eval_loss: Series, learning_rate: Series, title: str) -> Figure:
    """The figure, 8 x 5 inches; without the lower axis when no learning rate is known."""
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    if learning_rate:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        lower.plot(*_xy(learning_rate), color=INK, linewidth=1.2)
        lower.set_ylabel("learning rate", color=INK)
        lower.yaxis.set_major_locator(MaxNLocator(2))
        lower.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
        lower.set_ylim(bottom=0)
        axes = [upper, lower]
    else:
        upper = figure.subplots()
        axes = [upper]
    # `parse_math=False`: a title is text; a name with `$` in it is no formula.
    upper.set_title(
        title, loc="left", parse_math=False, color=INK, fontproperties=FontProperties(family=families(), size=13)
    )
    _draw_training(upper, loss)
    _draw_validation(upper, eval_loss)
    upper.set_ylabel("loss", color=INK)
    upper.legend(frameon=False, labelcolor=INK)
    axes[-1].set_xlabel("step", color=INK)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    for ax in axes:
        _plain(ax)
    return figure


def smooth(values: Sequence[float]) -> NDArray[np.float64]:
    """Mean over a triangular window around each point, a twentieth of all points wide. It does not lag, as a running mean does."""
    half = min(max(len(values) // 40, 2), (len(values) - 1) // 2)
    window = 1.0 - np.abs(np.arange(-half, half + 1)) / (half + 1)
    total: NDArray[np.float64] = np.convolve(values, window, mode="same")
    return total / np.convolve(np.ones(len(values)), window, mode="same")


@cache
def families() -> list[str]:
    """Font families in the order matplotlib looks a character up in: Latin, an installed CJK font, the shipped one."""
    installed = {font.name for font in fontManager.ttflist if Path(font.fname).is_file()}
    fontManager.addfont(Path(__file__).parent / "fonts" / "TunedockCJK-Regular.ttf")
    return ["DejaVu Sans", *[name for name in CJK_FONTS if name in installed][:1], SHIPPED_FONT]


def _xy(series: Series) -> tuple[list[int], list[float]]:
    return list(series), list(series.values())


def _draw_training(ax: Axes, loss: Series) -> None:
    if not loss:
        return
    steps, values = _xy(loss)
    if len(loss) < SMOOTH_FROM:
        ax.plot(steps, values, color=SMOOTH, linewidth=1.6, marker="o", markersize=3, label="training")
        return
    ax.plot(steps, values, color=RAW, linewidth=0.8, label="training")
    ax.plot(steps, smooth(values), color=SMOOTH, linewidth=1.8, label="training, smoothed")


def _draw_validation(ax: Axes, eval_loss: Series) -> None:
    if not eval_loss:
        return
    ax.plot(*_xy(eval_loss), color=VALIDATION, linewidth=1.6, marker="o", markersize=4, label="validation")
    step = min(eval_loss, key=eval_loss.__getitem__)
    best = eval_loss[step]
    label = f"best validation {best:.4g}, step {step}"
    ax.plot([step], [best], linestyle="none", marker="*", markersize=14, color=VALIDATION, label=label)


def _plain(ax: Axes) -> None:
    ax.grid(color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.margins(x=0.02)
    ax.tick_params(colors=INK, labelsize=9, length=0)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(GRID)


def _write(path: Path, content: bytes) -> None:
    """Whole file or nothing, as `run.record.write_atomic`, which writes text."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(content)
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise DiskError(
            f"the plot cannot be written: {error.strerror}",
            where=str(path),
            hint="free disk space or pick another place",
        ) from error
