from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.image import imread

from tunedock.errors import DiskError
from tunedock.events import Event
from tunedock.train import plot
from tunedock.train.plot import CJK_FONTS, SHIPPED_FONT, collect, draw_losses, plot_losses, smooth

FONTS = Path(plot.__file__).with_name("fonts")


def metrics(step: int, **values: float | None) -> Event:
    return {"kind": "metrics", "time": 0.0, "step": step, "epoch": 0.0, "values": values}


def a_run(steps: int = 60) -> list[Event]:
    events: list[Event] = [{"kind": "note", "time": 0.0, "message": "starting"}]
    for step in range(1, steps + 1):
        events.append(metrics(step, loss=2 / step + 0.1 * (step % 3), learning_rate=1e-4 * (1 - step / steps)))
        if step % 10 == 0:
            events.append(metrics(step, eval_loss=1 + abs(step - 40) / 40))
    return events


def test_svg_and_png(tmp_path: Path) -> None:
    made = plot_losses(a_run(), tmp_path / "plots", "a run")
    assert made == [tmp_path / "plots" / "loss.svg", tmp_path / "plots" / "loss.png"]
    assert made[0].read_text("utf-8").startswith("<?xml")
    assert imread(made[1]).shape[:2] == (750, 1200)
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["loss.png", "loss.svg"]


def test_what_is_drawn() -> None:
    series = collect(a_run(), ("loss", "eval_loss", "learning_rate"))
    upper, lower = draw_losses(series["loss"], series["eval_loss"], series["learning_rate"], "a run").axes
    lines: dict[str, Any] = {str(line.get_label()): line for line in upper.lines}
    assert list(lines) == ["training", "training, smoothed", "validation", "best validation 1, step 40"]
    assert len(lines["training"].get_xdata()) == 60
    assert np.allclose(lines["training, smoothed"].get_ydata(), smooth(list(series["loss"].values())))
    assert lines["best validation 1, step 40"].get_xydata().tolist() == [[40.0, 1.0]]
    assert lower.get_ylabel() == "learning rate"
    assert upper.get_title(loc="left") == "a run"


@pytest.mark.parametrize("steps", [1, 2, 19, 20])
@pytest.mark.filterwarnings("error")
def test_short_runs(tmp_path: Path, steps: int) -> None:
    assert len(plot_losses(a_run(steps), tmp_path, "short")) == 2


def test_only_validation_and_only_training(tmp_path: Path) -> None:
    assert plot_losses([metrics(5, eval_loss=1.0)], tmp_path, "validation only")
    assert plot_losses([metrics(5, loss=1.0)], tmp_path, "training only")
    assert len(draw_losses({5: 1.0}, {}, {}, "no learning rate").axes) == 1


def test_nothing_to_draw(tmp_path: Path) -> None:
    events = [metrics(1, loss=None, learning_rate=1e-4), metrics(2, grad_norm=1.0)]
    assert plot_losses(events, tmp_path / "plots", "nothing") == []
    assert not (tmp_path / "plots").exists()


def test_steps_done_again_replace_the_first_attempt() -> None:
    events = [
        metrics(1, loss=1.0),
        metrics(2, loss=2.0),
        metrics(2, eval_loss=20.0),
        metrics(3, loss=3.0),
        metrics(2, loss=2.5),  # resumed from step 1
        metrics(3, loss=None),
    ]
    assert collect(events, ("loss", "eval_loss")) == {"loss": {1: 1.0, 2: 2.5}, "eval_loss": {}}


def test_smoothing_keeps_levels_and_lines_and_calms_noise() -> None:
    assert smooth([3.0] * 50) == pytest.approx([3.0] * 50)
    line = np.arange(200.0)
    assert smooth(line.tolist())[10:-10] == pytest.approx(line[10:-10])  # no lag
    noise = np.random.default_rng(0).normal(size=400)
    assert smooth(noise.tolist()).std() < 0.5 * noise.std()


@pytest.mark.parametrize("title", ["loss of $x", r"$\frac{", "50% $ and $ more", "<b>&amp;</b> -- -->", "\\"])
@pytest.mark.filterwarnings("error::UserWarning")
def test_a_title_is_text_and_no_formula(tmp_path: Path, title: str) -> None:
    svg, _ = plot_losses([metrics(1, loss=1.0)], tmp_path, title)
    assert "<b>" not in re.sub(r"<!--.*?-->", "", svg.read_text("utf-8"), flags=re.DOTALL)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "plots").write_text("a file stands where the folder should")
    with pytest.raises(DiskError, match="the plot cannot be written"):
        plot_losses(a_run(), tmp_path / "plots", "a run")


HIDDEN_FONTS = """
import sys, warnings
from pathlib import Path
from matplotlib import font_manager
manager = font_manager.fontManager
manager.ttflist = [font for font in manager.ttflist if "mpl-data" in font.fname]  # no font of the system
from tunedock.train import plot
if sys.argv[1] == "tofu":
    plot.families = lambda: ["DejaVu Sans"]
else:
    warnings.simplefilter("error")
    assert plot.families() == ["DejaVu Sans", plot.SHIPPED_FONT]
event = {"kind": "metrics", "time": 0.0, "step": 1, "epoch": 0.0, "values": {"loss": 1.0}}
for name, title in (("one", "微调训练损失模型甲"), ("other", "评估指标比较数据乙")):
    plot.plot_losses([event], Path(sys.argv[2]) / name, title)
"""


def render_without_system_fonts(mode: str, folder: Path) -> dict[str, bytes]:
    command = [sys.executable, "-c", HIDDEN_FONTS, mode, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in folder.rglob("loss.*")}


def glyphs(svg: bytes) -> list[str]:
    """Outlines of the characters drawn."""
    return sorted(re.findall(r'<path id="[^"]*" d="([^"]*)"', svg.decode("utf-8")))


def test_chinese_titles_without_any_system_font(tmp_path: Path) -> None:
    """Two titles of one length look the same in tofu; in a font they differ. A missing glyph's warning is an error here."""
    tofu = render_without_system_fonts("tofu", tmp_path / "tofu")
    assert tofu["one/loss.png"] == tofu["other/loss.png"]
    made = render_without_system_fonts("shipped", tmp_path / "shipped")
    assert made["one/loss.png"] != made["other/loss.png"]
    assert made["one/loss.png"] != tofu["one/loss.png"]
    assert glyphs(made["one/loss.svg"]) != glyphs(made["other/loss.svg"])
    assert b"<text" not in made["one/loss.svg"]  # outlines: it shows on a reader's machine without the font, too


def test_an_installed_chinese_font_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = FONTS / "TunedockCJK-Regular.ttf"
    installed = font_manager.FontEntry(fname=str(shipped), name="WenQuanYi Zen Hei")
    gone = font_manager.FontEntry(fname="/nowhere/NotoSansCJK.ttc", name=CJK_FONTS[0])
    monkeypatch.setattr(plot.fontManager, "ttflist", [installed, gone])
    assert plot.families.__wrapped__() == ["DejaVu Sans", "WenQuanYi Zen Hei", SHIPPED_FONT]


def test_the_shipped_font_has_the_common_characters() -> None:
    font = font_manager.get_font(FONTS / "TunedockCJK-Regular.ttf")
    level_1 = "".join(
        bytes([lead, trail]).decode("gb2312", errors="ignore")
        for lead in range(0xB0, 0xD8)
        for trail in range(0xA1, 0xFF)
    )
    assert len(level_1) == 3755
    wanted = level_1 + "，。、：；？！（）《》【】「」０９Ａｚ％＋"  # “” are in DejaVu Sans
    assert [character for character in wanted if ord(character) not in font.get_charmap()] == []
    assert (FONTS / "TunedockCJK-Regular.ttf").stat().st_size < 900_000
    assert "Apache License" in (FONTS / "LICENSE.txt").read_text("utf-8")
