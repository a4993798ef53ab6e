"""``textgen play``: a page to write on, token by token, beside an agent."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agents.cli.options import (
    RewardWithoutRun,
    Trust,
    Writer,
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
    run: Writer = None,
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
    with _reporting_port(host, port):  # before a model is loaded
        _check_free(host, port)
    desk = _of_run(run, reward, trust) if run is not None else _of_model(model, reward, max_new_tokens)
    page = build_page(desk, f"textgen play {run or model}")
    with _reporting_port(host, port):
        page.launch(server_name=host, server_port=port, share=False, quiet=False, show_error=True)


def _check_free(host: str, port: int) -> None:
    """Raise ``OSError`` if nothing can be served there."""
    family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        tried.bind(address)


@contextmanager
def _reporting_port(host: str, port: int) -> Iterator[None]:
    """Turn the error of a port that is taken, or of an address that is not of this machine, into one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"the page cannot be served on {host}, port {port}: {reason}. Choose another --port, or another --host if "
            "it is no address of this machine"
        ) from error


def _of_run(run: Path, reward: str | None, trust: bool) -> Desk:
    from dataclasses import replace

    from agents.playground.desk import Desk
    from agents.playground.opening import open_shared_desk
    from agents.runs.parts import open_env
    from agents.runs.run import load_writer
    from agents.runs.stored import stored_config
    from agents.shared import is_shared

    if is_shared(run):
        desk, unscored = open_shared_desk(run, own_reward(reward))
        _warn(unscored)
        return desk
    if stored_config(run, trust, check=False).has_partner:
        raise ConfigError(
            f"{str(run)!r} holds a run with a partner, and the page knows no replies: use textgen generate {run}"
        )
    opened, unscored = load_writer(run, reward=reward_again(run, reward), trust=trust)
    _warn(unscored)
    own = opened.env.episodes
    env = open_env(replace(opened.config, envs=2), own.model, own.prompts, own.reward)
    return Desk(env, opened.agent, opened.agent_name, scored=not unscored)


def _warn(unscored: str) -> None:
    if unscored:
        typer.echo(printable(f"warning: the texts are not scored: {unscored}", one_line=True), err=True)


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
