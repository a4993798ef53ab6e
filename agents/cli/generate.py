"""``textgen generate``: texts of a trained agent, or of a language model itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agents.cli.options import (
    AsJson,
    Greedy,
    PartnerAgain,
    RewardWithoutRun,
    Seed,
    Trust,
    Writer,
    check_one_writer,
    given,
    own_object,
    own_reward,
    partner_again,
    reward_again,
)
from agents.terminal import json_text
from textgen_env.errors import ConfigError
from textgen_env.terminal import printable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from textgen_env.policies import Agent
    from textgen_env.prompts import Prompt
    from textgen_env.vector_env import TextGenVectorEnv

DEFAULT_PROMPT = "The movie was"

Starts = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt",
        help="How the texts begin. Several: one after the other.",
        metavar="TEXT",
        show_default="The movie was; with a run in a task or with a partner its test prompts, one after the other",
    ),
]
Num = Annotated[
    int | None, typer.Option(help="Texts.", min=1, show_default="4, or one for each --prompt where these are more")
]
SampledModel = Annotated[str | None, typer.Option(help="Without RUN: sample this language model itself.")]
SampledDtype = Annotated[
    str | None,
    typer.Option(help="Without RUN: precision of its weights; see 'textgen train --help'.", show_default="auto"),
]
SampledTopK = Annotated[
    int | None, typer.Option(help="Without RUN: the likeliest tokens to sample from.", min=1, show_default="16")
]
SampledMaxNewTokens = Annotated[
    int | None, typer.Option(help="Without RUN: length limit of a text, in tokens.", min=1, show_default="32")
]
Particles = Annotated[
    int | None,
    typer.Option(
        help="Pick each text from so many, by weight: better texts, at so many times the tokens. Their values "
        "come from RUN; without one from the reward's running score, if it has one.",
        min=1,
        show_default="1, unweighted",
    ),
]
Judge = Annotated[
    bool, typer.Option("--judge/--no-judge", help="With --particles: ask the reward about finished texts.")
]
ActingBeta = Annotated[
    float | None,
    typer.Option(
        help="Acting temperature, in reward units a nat: smaller for more reward and more KL. With --particles: the "
        "price of KL that they are weighted by.",
        show_default="the run's",
    ),
]


@dataclass(frozen=True)
class _Author:
    """An agent, or a language model, ready to write."""

    agent: Agent
    env: TextGenVectorEnv
    starts: Sequence[Prompt]  # one after the other
    greedy: bool = False  # it acts so
    unscored: str = ""  # the reason why texts have no reward


def generate_command(
    run: Writer = None,
    prompt: Starts = None,
    num: Num = None,
    model: SampledModel = None,
    dtype: SampledDtype = None,
    top_k: SampledTopK = None,
    reward: RewardWithoutRun = None,
    partner: PartnerAgain = None,
    max_new_tokens: SampledMaxNewTokens = None,
    beta: ActingBeta = None,
    greedy: Greedy = False,
    particles: Particles = None,
    judge: Judge = True,
    seed: Seed = 0,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Write texts with a trained agent, or with a language model itself.

    With --json: a list of objects with prompt, completion, reward (null if the run's own function is not at hand), and
    logprob (nats, of the completion under the language model). In a conversation also turns: who said what. With
    --particles also tokens, value_at_least (beta log Z), and particles: all texts with their weights.
    """
    check_one_writer(run, model)
    if particles is not None and greedy:
        raise ConfigError("--particles picks texts by weight, --greedy takes the likeliest tokens: leave one out")
    if particles is None and not judge:
        raise ConfigError("--no-judge is a setting of --particles; without them texts are always scored")
    acting = None if particles is not None else beta  # with particles it is their price of KL
    num = num or max(4, len(prompt or ()))
    if run is None:
        settings = given({"top_k": top_k, "max_new_tokens": max_new_tokens})
        author = _language_model(model, dtype, prompt, reward, partner, settings, acting, rows=min(num, 64))
    else:
        if own := list(given({"--dtype": dtype, "--top-k": top_k, "--max-new-tokens": max_new_tokens})):
            raise ConfigError(f"{', '.join(own)}: a run has its own, which it was trained with; leave out")
        author = _author_of(run, prompt, reward, partner, acting, trust)
        if author.unscored:
            typer.echo(printable(f"warning: the texts are not scored: {author.unscored}", one_line=True), err=True)
            judge = False
    prompts = [author.starts[i % len(author.starts)] for i in range(num)]
    if particles is None:
        written = _plain(author, prompts, seed, greedy)
    else:
        source = {} if run is None else _of_run(run, author.agent, particles, judge)
        written = _weighted(author.env, prompts, seed, n=particles, beta=beta, judge=judge, **source)
    _show(written, as_json)
    if particles is not None and not as_json:
        typer.echo(_cost(written, particles), err=True)


def _show(written: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """Print a line a text, in a conversation also one a turn below it; or JSON."""
    if as_json:
        typer.echo(json_text(written))
        return
    for text in written:
        reward_shown = "unjudged" if text["reward"] is None else f"{text['reward']:+.3f}"
        said = "" if "turns" in text else text["completion"]
        typer.echo(printable(f"{reward_shown}  {text['prompt']}|{said}"))
        for turn in text.get("turns", ()):
            paid = f"  ({turn['reward']:+.3f})" if turn["reward"] else ""
            typer.echo(printable(f"  {turn['speaker'] + ':':9}{turn['text'].strip()}{paid}"))


def _plain(author: _Author, prompts: Sequence[Prompt], seed: int, greedy: bool) -> list[dict[str, Any]]:
    """Return a text for each prompt as plain data; their rewards are None where they are not known."""
    from textgen_env.evaluation import roll_out

    texts = roll_out(author.agent, author.env, prompts, seed, deterministic=greedy or author.greedy)
    rewards = [None if author.unscored else float(value) for value in texts.rewards]
    written: list[dict[str, Any]] = [
        {"prompt": prompt, "completion": completion, "reward": reward, "logprob": float(logprob)}
        for prompt, completion, reward, logprob in zip(
            texts.prompts, texts.completions, rewards, texts.logprobs, strict=True
        )
    ]
    for text, turns in zip(written, texts.turns, strict=False):
        text["turns"] = [turn._asdict() for turn in turns]
    return written


def _weighted(env: TextGenVectorEnv, prompts: Sequence[Prompt], seed: int, **settings: Any) -> list[dict[str, Any]]:
    """Return a text for each prompt, drawn from weighted ones, as plain data."""
    from agents.baselines.particles import ParticlesAgent
    from agents.baselines.planning import ROWS

    settings["rows"] = min(ROWS, len(prompts) * settings["n"])

    def plain(numbers: npt.NDArray[np.float64]) -> list[float | None]:
        return [None if math.isnan(number) else number for number in numbers.tolist()]  # JSON knows no NaN

    written = []
    for prompt, text in zip(prompts, ParticlesAgent(env, seed, **settings).write(prompts), strict=True):
        rewards = plain(text.rewards)
        columns = zip(text.completions, rewards, text.weights.tolist(), strict=True)
        written.append(
            {
                "prompt": prompt.text,
                "completion": text.completion,
                "reward": rewards[text.chosen],
                "logprob": float(text.logprobs[text.chosen]),
                "tokens": text.tokens,
                "value_at_least": text.value_at_least,
                "particles": [{"completion": c, "reward": reward, "weight": weight} for c, reward, weight in columns],
            }
        )
    return written


def _of_run(run: Path, agent: Agent, particles: int, judge: bool) -> dict[str, Any]:
    """Return the settings of a run's particles: tempered, if its evaluation has measured so many."""
    from agents.baselines.particles import usual_pick
    from agents.runs.spending import tempered_settings

    tempered = tempered_settings(run / "evaluation", particles)
    if not tempered or not judge:
        tempered["pick"] = usual_pick(particles, judge)
    return {"values": agent, **tempered}


def _cost(written: Sequence[Mapping[str, Any]], particles: int) -> str:
    """Return a line about what the texts cost and what they are worth."""
    tokens = sum(text["tokens"] for text in written) / len(written)
    line = f"Each picked from {particles} by weight, at {tokens:.0f} tokens"
    if written[0]["value_at_least"] is None:
        return f"{line}; no text was judged, so the last weight is left out."
    value = sum(text["value_at_least"] for text in written) / len(written)
    return f"{line}; estimated to be worth at least J = {value:.3f}."


def _author_of(
    run: Path, prompt: list[str] | None, reward: str | None, partner: str | None, beta: float | None, trust: bool
) -> _Author:
    """Return the agent of a run at the temperature ``beta``."""
    from agents.runs.run import load_writer
    from agents.runs.stored import stored_config
    from agents.shared import is_shared

    starts = _starts(prompt)
    if is_shared(run):
        return _shared(run, starts, reward, beta)
    config = stored_config(run, trust, check=False)
    has_own = config.has_partner or config.task is not None  # prompts that come with what the agent is not told
    loaded, unscored = load_writer(
        run,
        prompts=None if has_own else starts,
        reward=reward_again(run, reward),
        partner=partner_again(run, partner),
        trust=trust,
    )
    if has_own:
        own = list(loaded.test_prompts)
        starts = own if prompt is None else [found for start in starts for found in _with_text(own, start)]
    if beta is not None:
        if not hasattr(loaded.agent, "beta"):
            raise ConfigError(f"agent {loaded.config.agent!r} has no acting temperature; leave --beta out")
        loaded.agent.beta = beta
    return _Author(loaded.agent, loaded.env, starts, loaded.greedy, unscored)


def _with_text(prompts: Sequence[Prompt], start: Prompt) -> Sequence[Prompt]:
    """Return the prompts with the text of ``start``, or it alone: others come with what the agent is not told."""
    return [prompt for prompt in prompts if prompt.text == start.text] or [start]


def _shared(source: Path, starts: Sequence[Prompt], reward: str | None, beta: float | None) -> _Author:
    """Return the same as ``_author_of``, of an agent on the hub or in a folder that ``save_pretrained`` wrote."""
    from agents.baselines.planning import ROWS
    from agents.shared import open_shared

    opened = open_shared(source, own_reward(reward), rows=ROWS)
    if beta is not None:
        opened.agent.beta = beta
    return _Author(opened.agent, opened.env, starts, unscored=opened.unscored)


def _starts(prompt: list[str] | None) -> Sequence[Prompt]:
    from textgen_env.prompts import Prompt

    return [Prompt(text) for text in prompt or [DEFAULT_PROMPT]]


def _language_model(
    model: str | None,
    dtype: str | None,
    prompt: list[str] | None,
    reward: str | None,
    partner: str | None,
    settings: Mapping[str, Any],
    beta: float | None,
    rows: int,
) -> _Author:
    """Return the agent that samples a language model, and an environment for it."""
    from agents.baselines.one_step import SampleAgent
    from textgen_env.models import load_language_model
    from textgen_env.vector_env import TextGenVectorEnv

    if partner is not None:
        raise ConfigError("--partner is that of a run: leave it out with --model")
    if beta is not None:
        raise ConfigError(
            "--beta is the temperature of a trained agent, or of --particles; the language model itself has none"
        )
    loaded = load_language_model(own_object("model", model), dtype or "auto")
    settings = {"max_new_tokens": 32, "top_k": min(16, loaded.vocab_size - len(loaded.end_ids)), **settings}
    longest = max(1, min(512, loaded.max_context - settings["max_new_tokens"]))
    env = TextGenVectorEnv(rows, loaded, None, own_reward(reward) or "sentiment", max_prompt_tokens=longest, **settings)
    return _Author(SampleAgent(), env, _starts(prompt))
