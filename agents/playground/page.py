"""The page of the playground, with gradio: two columns, each with a text, its candidates and its tree.

Everything that people and models write is shown as text: in cells and labels, never as HTML or Markdown.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from agents.playground.bars import bar, signed_bar
from agents.playground.desk import ROWS_A_TEXT, Desk, View
from agents.playground.tree import Sheet
from textgen_env.errors import ConfigError, TextGenError
from textgen_env.extras import require

HEADINGS = ("token", "language model", "Q - V", "policy")

NEXT_WIDTHS = ["25%", "25%", "25%", "25%"]
TRIED_WIDTHS = ["80%", "20%"]

BETA_RANGE = 10.0
"""The slider of an agent's temperature goes from it divided by this to it times this."""


def load_gradio() -> Any:
    """Return gradio, which then sends nothing about its use.

    Raises:
        ConfigError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    return require("gradio", extra="play", for_="the playground")


def build_page(desk: Desk, title: str = "Playground") -> Any:
    """Return the page, a ``gradio.Blocks``; ``launch`` serves it. Each visitor has a sheet of her own.

    Raises:
        ConfigError: gradio is not installed.
    """
    gr = load_gradio()
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        sheet = gr.State(None)
        gr.Markdown("Click a candidate to append it, a token to go back to it, or a line of the tree to return to it.")
        with gr.Row():
            prompt = gr.Textbox(desk.first_prompt.text, label="prompt", scale=4, elem_id="prompt")
            seed = gr.Number(0, label="luck", precision=0, minimum=0, scale=1, elem_id="luck")
            begin = gr.Button("Start", variant="primary", scale=1, elem_id="start")
        gr.Markdown(language_model_note(desk), visible=desk.is_language_model)
        with gr.Row():
            beta = _beta_slider(gr, desk.shown_beta)
            ways = list(desk.ways)
            way = gr.Radio(ways, value=ways[0], label="to the end", info=particles_note(desk), elem_id="way")
            both = gr.Button("Write all to the end", elem_id="write-all")
        with gr.Row():
            columns = [_column(gr, writer) for writer in desk.writers]
        outputs = [sheet, *(part for column in columns for part in column)]
        _connect(gr, desk, columns, sheet, outputs, (page, prompt, seed, begin, beta, way, both))
    return page


def _beta_slider(gr: Any, beta: float | None) -> Any:
    """Return the slider of the acting temperature, which is not shown for writers that have none."""
    shown = beta or 1.0
    limits = slider_range(shown)
    slider = gr.Slider(**limits, value=shown, label="beta", visible=beta is not None, elem_id="beta")

    def within_limits(number: float | None) -> float:
        return min(max(limits["minimum"], shown if number is None else number), limits["maximum"])

    # Gradio's own refuses every click while a number is half typed, such as the 0 of 0.05, with a traceback.
    slider.preprocess = within_limits
    return slider


def slider_range(beta: float) -> dict[str, float]:
    """Return limits and step of a slider around ``beta``, reward units a nat."""
    return {"minimum": beta / BETA_RANGE, "maximum": beta * BETA_RANGE, "step": beta / BETA_RANGE}


def language_model_note(desk: Desk) -> str:
    """Return a line about an agent that has chosen to act as the language model; nothing about any other."""
    if not desk.is_language_model:
        return ""
    return (
        "Elsewhere this agent acts as the language model: validation found nothing better. Here it acts at the beta "
        "of the slider, so that you see what it has learned."
    )


def particles_note(desk: Desk) -> str:
    """Return a line about writing by particles, or why it is not possible."""
    if desk.no_particles:
        return f"No particles: {desk.no_particles}."
    return (
        f"Particles: one of {ROWS_A_TEXT} texts that go on from here, weighted by reward; the agent's are guided by Q."
    )


def _column(gr: Any, writer: str) -> tuple[Any, ...]:
    """Return text, candidates, state and branches of one writer."""
    name = writer.replace(" ", "-")
    with gr.Column():
        gr.Textbox(writer, show_label=False, interactive=False, container=False)
        text = gr.HighlightedText(
            label="text so far", show_legend=False, show_inline_category=False, elem_id=f"text-{name}"
        )
        state = gr.Textbox(label="so far", interactive=False, elem_id=f"state-{name}")
        settings: dict[str, Any] = {"interactive": False, "wrap": True, "datatype": "str"}
        candidates = gr.Dataframe(
            headers=list(HEADINGS), column_widths=NEXT_WIDTHS, label="next", elem_id=f"next-{name}", **settings
        )
        tree = gr.Dataframe(
            headers=["tried", "reward"], column_widths=TRIED_WIDTHS, label="tried", elem_id=f"tried-{name}", **settings
        )
    return text, state, candidates, tree


def _connect(
    gr: Any, desk: Desk, columns: list[tuple[Any, ...]], sheet: Any, outputs: list[Any], controls: tuple[Any, ...]
) -> None:
    """Let clicks change the sheet and show it again."""
    page, prompt, seed, begin, beta, way, both = controls

    def showing(change: Callable[..., Sheet | None], begins: bool = False) -> Callable[..., Any]:
        """Return a handler that makes the change and shows the sheet; an error is shown as a warning."""

        def handle(held: Sheet | None, acting: float, *more: Any) -> Any:
            try:
                if held is None and not begins:
                    raise ConfigError("there is no text yet: press Start")
                shown = change(held, acting, *more) or held
                return _shown(gr, desk, shown, acting)
            except TextGenError as error:
                raise gr.Error(str(error).replace("<", "‹"), print_exception=False) from error

        return handle

    opened = showing(lambda held, acting: desk.start(desk.first_prompt.text), begins=True)
    page.load(opened, [sheet, beta], outputs)
    started = showing(lambda held, acting, text, luck: desk.start(text, int(luck or 0)), begins=True)
    for event in (begin.click, prompt.submit):
        event(started, [sheet, beta, prompt, seed], outputs)
    written = showing(lambda held, acting, how: desk.write(held, desk.writers, how, acting))
    both.click(written, [sheet, beta, way], outputs)
    # Moved or typed; no handler changes the slider, so that there is no circle.
    beta.input(showing(lambda held, acting: None), [sheet, beta], outputs, trigger_mode="always_last")
    for writer, (text, _, candidates, tree) in zip(desk.writers, columns, strict=True):
        text.select(_on_select(gr, showing(_going(desk, writer))), [sheet, beta], outputs)
        candidates.select(_on_select(gr, showing(_choosing(desk, writer))), [sheet, beta], outputs)
        tree.select(_on_select(gr, showing(_returning(desk, writer))), [sheet, beta], outputs)


def _on_select(gr: Any, handle: Callable[..., Any]) -> Callable[..., Any]:
    def selected(held: Any, acting: float, event: Any) -> Any:
        index = event.index[0] if isinstance(event.index, list | tuple) else event.index
        return handle(held, acting, int(index))

    selected.__annotations__["event"] = gr.SelectData  # gradio finds its argument by the type
    return selected


def _going(desk: Desk, writer: str) -> Callable[..., None]:
    return lambda held, acting, index: desk.go(held, writer, held.trees[writer].path()[index])


def _returning(desk: Desk, writer: str) -> Callable[..., None]:
    def change(held: Sheet, acting: float, index: int) -> None:
        desk.go(held, writer, desk.view(held, writer, acting).branches[index][0])

    return change


def _choosing(desk: Desk, writer: str) -> Callable[..., None]:
    def change(held: Sheet, acting: float, index: int) -> None:
        desk.step(held, writer, desk.view(held, writer, acting).candidates[index].action, acting)

    return change


def _shown(gr: Any, desk: Desk, sheet: Sheet | None, beta: float | None) -> list[Any]:
    """Return the sheet and what every part of the page shows of it."""
    assert sheet is not None
    found: list[Any] = [sheet]
    for writer in desk.writers:
        view = desk.view(sheet, writer, beta)
        found += [
            [(text, "prompt" if node == 0 else "token") for node, text in view.tokens],
            state_line(view, desk.scored),
            candidate_rows(view),
            [[text, worth(score)] for _, text, score in view.branches],
        ]
    return found


def worth(score: float | None) -> str:
    """Return a reward, or a dash where it is not known yet."""
    return "–" if score is None else f"{score:+.3f}"


def state_line(view: View, scored: bool) -> str:
    """Return reward, KL and end of a text in words."""
    reward = f"reward {worth(view.score)}" if scored else "reward unknown"
    return f"{reward}, KL {view.kl:.2f} nats" + (f", ended ({view.ended})" if view.ended else "")


def candidate_rows(view: View) -> list[list[str]]:
    """Return the lines of the table of candidates; the longest bar of Q - V is that of the number farthest from 0."""
    largest = max((abs(c.advantage) for c in view.candidates if c.advantage is not None), default=0.0)
    return [
        [
            candidate.text.replace("\n", "⏎"),
            bar(candidate.prior),
            "–" if candidate.advantage is None else signed_bar(candidate.advantage, largest),
            bar(candidate.policy),
        ]
        for candidate in view.candidates
    ]
