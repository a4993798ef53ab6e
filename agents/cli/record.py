"""``textgen record``: texts as a Minari dataset, for offline learning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agents.cli.options import (
    Greedy,
    OptionalRun,
    PartnerAgain,
    Prompts,
    RewardWithoutRun,
    Seed,
    Trust,
    check_one_writer,
    given,
    own_object,
    own_reward,
    partner_again,
    reward_again,
)
from agents.terminal import open_console, say
from textgen_env.errors import ConfigError

if TYPE_CHECKING:
    from textgen_env.policies import Agent


def record_command(
    out: Annotated[
        Path, typer.Option(help="Folder for the dataset; must be new or empty. Minari finds names like sentiment-v0.")
    ],
    run: OptionalRun = None,
    episodes: Annotated[int, typer.Option(help="Texts.", min=1)] = 1000,
    model: Annotated[str | None, typer.Option(help="Without RUN: sample this language model itself.")] = None,
    prompts: Prompts = None,
    reward: RewardWithoutRun = None,
    partner: PartnerAgain = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Without RUN: length limit of a text, in tokens.", min=1, show_default="20")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Without RUN: candidates a step.", min=1, show_default="16")] = None,
    candidate_scores: Annotated[
        bool, typer.Option("--candidate-scores", help="Without RUN: record what each candidate would score.")
    ] = False,
    greedy: Greedy = False,
    seed: Seed = 0,
    trust: Trust = False,
) -> None:
    """Record texts of a trained agent, or of a language model itself, as a Minari dataset.

    With all that was observed, the masks, and the log-probability of every action: what offline
    learning needs (see docs/clients.md).
    """
    from agents.runs.parts import some_prompts
    from agents.text_dqn.offline import record
    from textgen_env.prompts import make_prompts

    check_one_writer(run, model)
    settings = given({"max_new_tokens": max_new_tokens, "top_k": top_k})
    start = own_object("prompts", prompts)
    if run is None:
        settings |= given({"model": own_object("model", model), "prompts": start, "reward": own_reward(reward)})
        agent, env, name = _language_model(settings, candidate_scores, rows=min(episodes, 64))
    elif settings or candidate_scores:
        raise ConfigError("--max-new-tokens, --top-k and --candidate-scores are those of the run; leave them out")
    else:
        again = {"reward": reward_again(run, reward), "partner": partner_again(run, partner)}
        agent, env, name = _trained(run, again, trust)
    source = some_prompts(env.episodes.prompts if start is None else make_prompts(start), episodes, seed)
    texts = [source[i % len(source)] for i in range(episodes)]
    dataset = record(agent, env, texts, out, seed=seed, deterministic=greedy, metadata={"algorithm_name": name})
    say(open_console(), f"{dataset.total_episodes:,} texts of {dataset.total_steps:,} tokens are in {out}/")


def _trained(run: Path, again: Mapping[str, Any], trust: bool) -> tuple[Agent, Any, str]:
    from agents.runs.run import load_run

    opened = load_run(run, **again, trust=trust)
    return opened.agent, opened.env, opened.config.agent


def _language_model(settings: dict[str, Any], candidate_scores: bool, rows: int) -> tuple[Agent, Any, str]:
    import gymnasium as gym

    from agents.baselines.one_step import SampleAgent
    from agents.zoo import OBSERVATION

    keys = [*OBSERVATION, "candidate_scores"] if candidate_scores else [*OBSERVATION]
    env = gym.make_vec("TextGen-v0", num_envs=rows, **{"max_new_tokens": 20, **settings, "observation": keys})
    return SampleAgent(), env, "language model"
