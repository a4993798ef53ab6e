"""``textgen play``: a page to write on, token by token, beside an agent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agents.cli.options import (
    OptionalRun,
    RewardWithoutRun,
    Trust,
    check_one_writer,
    own_object,
    own_reward,
    reward_again,
)
from textgen_env.errors import ConfigError
from textgen_env.terminal import printable

if TYPE_CHECKING:
    from agents.playground.desk import Desk


def play_command(
    run: OptionalRun = None,
    model: Annotated[
        str | None, typer.Option(help="Without RUN: this language model, beside score lookahead if the reward allows.")
    ] = None,
    reward: RewardWithoutRun = None,
    max_new_tokens: Annotated[int, typer.Option(help="Without RUN: length limit of a text, in tokens.", min=1)] = 32,
    host: Annotated[str, typer.Option(help="Address to serve on; 0.0.0.0 for the whole network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to serve on.", min=1, max=65535)] = 7860,
    trust: Trust = False,
) -> None:
    """Open a page: choose tokens, go back and branch, and let agent and language model write on the same luck."""
    from agents.playground.page import build_page, load_gradio

    check_one_writer(run, model)
    load_gradio()
    desk = _of_run(run, reward, trust) if run is not None else _of_model(model, reward, max_new_tokens)
    page = build_page(desk, f"textgen play {run or model}")
    page.launch(server_name=host, server_port=port, share=False, quiet=False, show_error=True)


def _of_run(run: Path, reward: str | None, trust: bool) -> Desk:
    from dataclasses import replace

    from agents.playground.desk import Desk
    from agents.runs.parts import open_env
    from agents.runs.run import load_writer
    from agents.runs.stored import stored_config

    if stored_config(run, trust, check=False).has_partner:
        raise ConfigError(
            f"{str(run)!r} holds a run with a partner, and the page knows no replies: use textgen generate {run}"
        )
    opened, unscored = load_writer(run, reward=reward_again(run, reward), trust=trust)
    if unscored:
        typer.echo(printable(f"warning: the texts are not scored: {unscored}", one_line=True), err=True)
    own = opened.env.episodes
    env = open_env(replace(opened.config, envs=2), own.model, own.prompts, own.reward)
    return Desk(env, opened.agent, opened.agent_name, scored=not unscored)


def _of_model(model: str | None, reward: str | None, max_new_tokens: int) -> Desk:
    from agents.baselines.one_step import LookaheadAgent
    from agents.playground.desk import Desk
    from textgen_env.models import load_language_model
    from textgen_env.rewards import make_reward
    from textgen_env.vector_env import TextGenVectorEnv

    loaded, scorer = load_language_model(own_object("model", model)), make_reward(own_reward(reward) or "sentiment")
    can_look_ahead = scorer.running() is not None
    settings: dict[str, Any] = {
        "top_k": min(16, loaded.vocab_size - len(loaded.end_ids)),
        "max_new_tokens": max_new_tokens,
        "max_prompt_tokens": max(1, min(512, loaded.max_context - max_new_tokens)),
        "observation": LookaheadAgent.needs if can_look_ahead else ("logprobs", "action_mask"),
    }
    env = TextGenVectorEnv(2, loaded, None, scorer, **settings)
    return Desk(env, LookaheadAgent() if can_look_ahead else None, "score lookahead")
