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
    own_object,
    own_reward,
    reward_again,
)
from agents.terminal import json_text
from textgen_env.errors import ConfigError
from textgen_env.terminal import printable

if TYPE_CHECKING:
    from textgen_env.policies import Agent
    from textgen_env.prompts import Prompt
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

    With --json: a list of objects with prompt, completion, reward (null if the run's own function is not at hand),
    and logprob (nats, of the completion under the language model).
    """
    from textgen_env.evaluation import roll_out
    from textgen_env.prompts import Prompt

    check_one_writer(run, model)
    start = Prompt(prompt)
    unscored = ""
    if run is None:
        agent, env = _language_model(model, reward, max_new_tokens or 32, beta, rows=min(num, 64))
    else:
        if max_new_tokens is not None:
            raise ConfigError("--max-new-tokens is that which the run was trained with; leave it out")
        agent, env, run_is_greedy, unscored = _trained(run, start, reward_again(run, reward), beta, trust)
        greedy = greedy or run_is_greedy
        if unscored:
            typer.echo(printable(f"warning: the texts are not scored: {unscored}", one_line=True), err=True)
    texts = roll_out(agent, env, [start] * num, seed, deterministic=greedy)
    rewards = [None if unscored else float(value) for value in texts.rewards]
    written: list[dict[str, Any]] = [
        {"prompt": prompt, "completion": completion, "reward": value, "logprob": float(logprob)}
        for completion, value, logprob in zip(texts.completions, rewards, texts.logprobs, strict=True)
    ]
    if as_json:
        typer.echo(json_text(written))
        return
    for text in written:
        value = "–     " if unscored else f"{text['reward']:+.3f}"
        typer.echo(printable(f"{value}  {text['prompt']}|{text['completion']}"))


def _trained(
    run: Path, prompt: Prompt, reward: Any, beta: float | None, trust: bool
) -> tuple[Agent, TextGenVectorEnv, bool, str]:
    """Return the agent of a run at the temperature ``beta``, its environment, True if it acts greedily, and the reason
    why texts have no reward, or ""."""
    from agents.runs.run import load_writer

    opened, unscored = load_writer(run, prompts=[prompt], reward=reward, trust=trust)
    if beta is not None:
        if not hasattr(opened.agent, "beta"):
            raise ConfigError(f"agent {opened.config.agent!r} has no acting temperature; leave --beta out")
        opened.agent.beta = beta
    return opened.agent, opened.env, opened.greedy, unscored


def _language_model(
    model: str | None, reward: str | None, new_tokens: int, beta: float | None, rows: int
) -> tuple[Agent, TextGenVectorEnv]:
    """Return the agent that samples a language model, and an environment for it."""
    from agents.baselines.one_step import SampleAgent
    from textgen_env.models import load_language_model
    from textgen_env.vector_env import TextGenVectorEnv

    if beta is not None:
        raise ConfigError("--beta is the temperature of a trained agent; the language model itself has none")
    loaded = load_language_model(own_object("model", model))
    settings: dict[str, Any] = {
        "top_k": min(16, loaded.vocab_size - len(loaded.end_ids)),
        "max_new_tokens": new_tokens,
        "max_prompt_tokens": max(1, min(512, loaded.max_context - new_tokens)),
    }
    return SampleAgent(), TextGenVectorEnv(rows, loaded, None, own_reward(reward) or "sentiment", **settings)
