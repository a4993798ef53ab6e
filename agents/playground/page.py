"""The page of the playground, with gradio: two columns, each with a text, its candidates and its tree.

Everything that people and models write is shown as text: in cells and labels, never as HTML or Markdown.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from agents.playground.desk import WRITERS, Desk, Sheet, View, bar
from textgen_env.errors import TextGenError
from textgen_env.extras import require

HEADINGS = ("token", "language model", "Q - V", "policy")
FIRST_PROMPT = "The movie was"

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
    own = desk.shown_beta
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        sheet = gr.State(None)
        gr.Markdown("Click a candidate to append it, a token to go back to it, or a line of the tree to return to it.")
        with gr.Row():
            prompt = gr.Textbox(FIRST_PROMPT, label="prompt", scale=4, elem_id="prompt")
            seed = gr.Number(0, label="luck", precision=0, minimum=0, scale=1, elem_id="luck")
            begin = gr.Button("Start", variant="primary", scale=1, elem_id="start")
        gr.Markdown(language_model_note(desk), visible=desk.is_language_model)
        with gr.Row():
            beta = gr.Slider(**slider_range(own or 1.0), value=own or 1.0, label="beta", visible=own is not None)
            way = gr.Radio(list(WRITERS), value=WRITERS[0], label="to the end")
            both = gr.Button("Write all to the end", elem_id="write-all")
        columns = [_column(gr, desk, writer) for writer in desk.writers]
        outputs = [sheet, *(part for column in columns for part in column)]
        _connect(gr, desk, columns, sheet, outputs, (prompt, seed, begin, beta, way, both))
        page.load(lambda: _shown(gr, desk, desk.start(FIRST_PROMPT), own), None, outputs)
    return page


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


def _column(gr: Any, desk: Desk, writer: str) -> tuple[Any, ...]:
    """Return text, candidates, state and branches of one writer."""
    name = writer.replace(" ", "-")
    with gr.Column():
        gr.Textbox(writer, show_label=False, interactive=False, container=False)
        text = gr.HighlightedText(label="text so far", show_legend=False, elem_id=f"text-{name}")
        state = gr.Textbox(label="so far", interactive=False, elem_id=f"state-{name}")
        settings: dict[str, Any] = {"interactive": False, "wrap": True, "datatype": "str"}
        candidates = gr.Dataframe(headers=list(HEADINGS), label="next", elem_id=f"next-{name}", **settings)
        tree = gr.Dataframe(headers=["tried", "reward"], label="tried", elem_id=f"tried-{name}", **settings)
    return text, state, candidates, tree


def _connect(
    gr: Any, desk: Desk, columns: list[tuple[Any, ...]], sheet: Any, outputs: list[Any], controls: tuple[Any, ...]
) -> None:
    """Let clicks change the sheet and show it again."""
    prompt, seed, begin, beta, way, both = controls

    def showing(change: Callable[..., Sheet | None]) -> Callable[..., Any]:
        """Return a handler that makes the change and shows the sheet; an error is shown as a warning."""

        def handle(held: Sheet | None, acting: float, *more: Any) -> Any:
            try:
                changed = change(held, acting, *more)
                shown = held if changed is None else changed
                assert shown is not None  # the page starts one when it loads
                return _shown(gr, desk, shown, acting)
            except TextGenError as error:
                raise gr.Error(str(error).replace("<", "‹"), print_exception=False) from error

        return handle

    started = showing(lambda held, acting, text, luck: desk.start(text, int(luck or 0)))
    for event in (begin.click, prompt.submit):
        event(started, [sheet, beta, prompt, seed], outputs)
    written = showing(lambda held, acting, how: desk.write(held, desk.writers, how, acting))
    both.click(written, [sheet, beta, way], outputs)
    beta.release(showing(lambda held, acting: None), [sheet, beta], outputs)
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


def _shown(gr: Any, desk: Desk, sheet: Sheet, beta: float | None) -> list[Any]:
    """Return the sheet and what every part of the page shows of it."""
    found: list[Any] = [sheet]
    for writer in desk.writers:
        view = desk.view(sheet, writer, beta)
        found += [
            [(text, "prompt" if node == 0 else "token") for node, text in view.tokens],
            state_line(view, desk.scored),
            candidate_rows(view),
            [[text, f"{score:+.3f}" if desk.scored else "–"] for _, text, score in view.branches],
        ]
    return found


def state_line(view: View, scored: bool) -> str:
    """Return reward, KL and end of a text in words."""
    worth = f"reward {view.score:+.3f}" if scored else "reward unknown"
    return f"{worth}, KL {view.kl:.2f} nats" + (f", ended ({view.ended})" if view.ended else "")


def candidate_rows(view: View) -> list[list[str]]:
    """Return the lines of the table of candidates."""
    return [
        [
            candidate.text.replace("\n", "⏎"),
            bar(candidate.prior),
            "–" if candidate.advantage is None else f"{candidate.advantage:+.3f}",
            bar(candidate.policy),
        ]
        for candidate in view.candidates
    ]
