"""``textgen generate``: texts of a trained agent, or of a language model itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agents.cli.options import (
    AsJson,
    Greedy,
    OptionalRun,
    RewardWithoutRun,
    Seed,
    Trust,
    check_one_writer,
    parse_reward,
)
from agents.terminal import json_text
from textgen_env.errors import ConfigError
from textgen_env.terminal import printable

if TYPE_CHECKING:
    from textgen_env.policies import Agent
    from textgen_env.vector_env import TextGenVectorEnv

ActingBeta = Annotated[
    float | None,
    typer.Option(
        help="Acting temperature, in reward units a nat: smaller for more reward and more KL.",
        show_default="the run's",
    ),
]


def generate_command(
    run: OptionalRun = None,
    prompt: Annotated[str, typer.Option(help="How the texts begin.", metavar="TEXT")] = "The movie was",
    num: Annotated[int, typer.Option(help="Texts.", min=1)] = 4,
    model: Annotated[
        str | None, typer.Option(help="Without RUN: sample this language model itself, from its 16 likeliest tokens.")
    ] = None,
    reward: RewardWithoutRun = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Without RUN: length limit of a text, in tokens.", min=1, show_default="32")
    ] = None,
    beta: ActingBeta = None,
    greedy: Greedy = False,
    seed: Seed = 0,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Write texts with a trained agent, or with a language model itself.

    With --json: a list of objects with prompt, completion, reward, and logprob (nats, of the
    completion under the language model).
    """
    from textgen_env.evaluation import roll_out
    from textgen_env.prompts import Prompt

    check_one_writer(run, model)
    start = Prompt(prompt)
    if run is None:
        agent, env = _language_model(model, reward, max_new_tokens or 32, beta, rows=min(num, 64))
    else:
        if reward is not None or max_new_tokens is not None:
            raise ConfigError("--reward and --max-new-tokens are those that the run was trained with; leave them out")
        agent, env, run_is_greedy = _trained(run, beta, trust)
        greedy = greedy or run_is_greedy
    texts = roll_out(agent, env, [start] * num, seed, deterministic=greedy)
    written = [
        {"prompt": prompt, "completion": completion, "reward": float(value), "logprob": float(logprob)}
        for completion, value, logprob in zip(texts.completions, texts.rewards, texts.logprobs, strict=True)
    ]
    if as_json:
        typer.echo(json_text(written))
        return
    for text in written:
        typer.echo(printable(f"{text['reward']:+.3f}  {text['prompt']}|{text['completion']}"))


def _trained(run: Path, beta: float | None, trust: bool) -> tuple[Agent, TextGenVectorEnv, bool]:
    """Return the agent of a run at the temperature ``beta``, its environment, and True if it acts greedily."""
    from agents.runs.run import load_run

    opened = load_run(run, trust=trust)
    if beta is not None:
        if not hasattr(opened.agent, "beta"):
            raise ConfigError(f"agent {opened.config.agent!r} has no acting temperature; leave --beta out")
        opened.agent.beta = beta
    return opened.agent, opened.env, opened.greedy


def _language_model(
    model: str | None, reward: str | None, new_tokens: int, beta: float | None, rows: int
) -> tuple[Agent, TextGenVectorEnv]:
    """Return the agent that samples a language model, and an environment for it."""
    from agents.baselines.one_step import SampleAgent
    from textgen_env.models import load_language_model
    from textgen_env.vector_env import TextGenVectorEnv

    if beta is not None:
        raise ConfigError("--beta is the temperature of a trained agent; the language model itself has none")
    loaded = load_language_model(model)
    settings: dict[str, Any] = {
        "top_k": min(16, loaded.vocab_size - len(loaded.end_ids)),
        "max_new_tokens": new_tokens,
        "max_prompt_tokens": max(1, min(512, loaded.max_context - new_tokens)),
    }
    return SampleAgent(), TextGenVectorEnv(rows, loaded, None, parse_reward(reward) or "sentiment", **settings)
