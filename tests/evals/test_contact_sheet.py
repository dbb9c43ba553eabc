"""The sheet is drawn whatever a question or a model says."""

from __future__ import annotations

import numpy as np
from PIL import Image
from storm_jax.evals.contact_sheet import Panel, draw_contact_sheet


def test_texts_of_any_kind_and_length_are_drawn(tmp_path):
    frames, times = np.zeros((3, 8, 8, 3), np.uint8), np.arange(3.0)
    texts = ["", "$5 or $\\frac{", "word " * 400, "\n\n<video>\n", "x" * 500, "{}%_^&", "多语言 🎬"]
    panels = [
        Panel(
            title=text,
            frames=frames,
            times=times,
            question=text,
            answer=text,
            prediction=text,
            right=False,
        )
        for text in texts
    ]
    draw_contact_sheet(tmp_path / "sheet.png", panels)
    width, height = Image.open(tmp_path / "sheet.png").size
    assert width == 1100 and 1000 < height < 3800
