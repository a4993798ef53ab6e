"""The text so far and the candidates with their probabilities: as a string, and as an image."""

from __future__ import annotations

import textwrap
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from textgen_env.episode import Episodes
from textgen_env.rows import Phase
from textgen_env.terminal import printable

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

BAR = 20  # characters of the bar that stands for probability 1
SHOWN = 16  # candidates listed
LINE_WIDTH = 86  # characters a line of the image


def describe(episodes: Episodes, row: int) -> str:
    """Return the row as text: prompt | completion, then one line a candidate, best first."""
    rows, phase = np.array([row]), episodes.phases[row]
    (prompt,) = episodes.prompts_at(rows)
    if prompt is None or phase == Phase.EMPTY:
        return "(no episode: call reset)"
    prompt_ids, ids = episodes.ids_of(row)
    completion = episodes.text_of(row)
    lines = [printable(f"{prompt.text}│{completion}{'   [end]' if phase == Phase.ENDED else ''}")]
    lines.append(
        f"{episodes.steps(rows)[0]} of {episodes.config.max_new_tokens} tokens, score {episodes.score_of(row):.3f}"
    )
    if phase == Phase.ENDED:
        return "\n".join(lines)
    proposals, legal = episodes.proposals(rows), episodes.legal(rows)[0]
    best = np.argsort(-proposals.logprobs[0], kind="stable")[:SHOWN]
    tokens = proposals.candidates[0, best].tolist()
    texts = [text[len(completion) :] for text in episodes.model.continuations(prompt_ids, ids, tokens)]
    for action, token, text in zip(best, tokens, texts, strict=True):
        if legal[action]:
            probability = float(np.exp(proposals.logprobs[0, action]))
            shown = "<end>" if token in episodes.model.end_ids else printable(repr(text))
            lines.append(f"{action:>4} {probability:6.1%} {'█' * round(BAR * probability):<{BAR}} {shown}")
    return "\n".join(lines)


def draw(episodes: Episodes, row: int) -> npt.NDArray[np.uint8]:
    """Return ``describe`` drawn in black on white, (420, 640, 3) uint8."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (640, 420), "white")
    wrapped = (textwrap.wrap(line, LINE_WIDTH, drop_whitespace=False) for line in describe(episodes, row).splitlines())
    text = "\n".join(part for parts in wrapped for part in parts or [""])
    ImageDraw.Draw(image).multiline_text((10, 10), text, fill="black", font=_font())
    return np.asarray(image, dtype=np.uint8).copy()


@cache
def _font() -> FreeTypeFont:
    """Return the monospaced font that comes with Matplotlib: it has accents and bars, Pillow's own has neither."""
    from matplotlib import get_data_path
    from PIL import ImageFont

    return ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf"), size=12)
