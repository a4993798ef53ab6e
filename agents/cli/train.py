"""``textgen train``: an agent learns, is measured, and everything is kept in a folder."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from agents.cli.options import (
    Address,
    AsJson,
    Engine,
    Prompts,
    Samples,
    Texts,
    Trust,
    change,
    given,
    named_again,
    parse_spec,
    uses_ray,
)
from agents.tables import show_table
from agents.terminal import json_text, open_console, say
from textgen_env.config import MOST_SEED
from textgen_env.errors import ConfigError
from textgen_env.files import read_json

if TYPE_CHECKING:
    from agents.runs.config import RunConfig
    from agents.runs.run import RunResult, TextSource

INTERRUPTED = 130

WHERE = {"resume", "engine", "actors", "address", "trust", "track", "as_json"}
"""Options that say where a run is worked on; all others belong to its configuration."""

NAMED_AGAIN = {"reward", "partner"}
"""Options that name a run's own function once more when it is resumed."""

LEARNING, WRITING = "Learning", "Texts and reward"
"""Groups of options in the help."""

Out = Annotated[Path | None, typer.Option(help="Folder for the run; must be new or empty.", show_default="runs/AGENT")]
AgentName = Annotated[
    str | None,
    typer.Option(help="See 'textgen list agents'.", show_default="text_dqn", metavar="NAME", rich_help_panel=LEARNING),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="Language model: a name, folder, hub id, .gguf file, or FILE.py:NAME.",
        show_default="tiny",
        rich_help_panel=WRITING,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Precision of its weights: float32, bfloat16, float16, or auto, what is fast on this machine.",
        show_default="auto",
        metavar="NAME",
        rich_help_panel=WRITING,
    ),
]
Prune = Annotated[
    str | None,
    typer.Option(
        help="Prune the language model once: METHOD:AMOUNT, the share to remove, or none.",
        show_default="none",
        rich_help_panel=LEARNING,
    ),
]
RewardSpec = Annotated[
    str | None,
    typer.Option(
        help="A name; a function of yours, FILE.py:NAME or module:NAME; or JSON: "
        "'{\"sentiment\": 1, \"my_reward.py:score\": 0.5}'. See 'textgen list rewards'. With --partner also none: the "
        "partner's rewards alone. With --resume: the run's own function once more, if it was changed.",
        show_default="sentiment",
        rich_help_panel=WRITING,
    ),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        help="A task of the suite, which has its own model, prompts, reward and partner: Needle, or "
        "GuessNumber:numbers=15. See 'textgen list tasks'.",
        show_default="none",
        metavar="NAME",
        rich_help_panel=WRITING,
    ),
]
PartnerSpec = Annotated[
    str | None,
    typer.Option(
        help="Who answers the agent's turns: a function of yours, FILE.py:NAME or module:NAME; a name; or JSON: "
        '\'{"name": "script", "lines": ["Why?", "I see."]}\'. See docs/conversations.md.',
        show_default="none",
        rich_help_panel=WRITING,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        help="Environment steps to learn from, one token each.", min=1, show_default="70000", rich_help_panel=LEARNING
    ),
]
Envs = Annotated[
    int | None, typer.Option(help="Texts written at a time.", min=1, show_default="64", rich_help_panel=LEARNING)
]
RunSeed = Annotated[
    int | None,
    typer.Option(
        help="Of prompts, agent and evaluation.", min=0, max=MOST_SEED, show_default="0", rich_help_panel=LEARNING
    ),
]
Beta = Annotated[
    float | None, typer.Option(help="Price of KL, in reward units a nat.", show_default="0.1", rich_help_panel=LEARNING)
]
TopK = Annotated[
    int | None,
    typer.Option(help="Candidates a step: the number of actions.", min=1, show_default="16", rich_help_panel=WRITING),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        help="Length limit of a text, in tokens.", min=1, show_default="20; 64 with --partner", rich_help_panel=WRITING
    ),
]
MinNewTokens = Annotated[
    int | None,
    typer.Option(
        help="No end of text (with --partner: of a turn) before so many tokens.",
        min=0,
        show_default="as --max-new-tokens; 0 with --partner",
        rich_help_panel=WRITING,
    ),
]
MaxTurns = Annotated[
    int | None,
    typer.Option(help="With --partner: turns of the agent.", min=1, show_default="4", rich_help_panel=WRITING),
]
MaxTurnTokens = Annotated[
    int | None,
    typer.Option(
        help="With --partner: length limit of a turn, in tokens.", min=1, show_default="16", rich_help_panel=WRITING
    ),
]
MaxReplyTokens = Annotated[
    int | None,
    typer.Option(
        help="With --partner: length limit of a reply, in tokens.", min=1, show_default="32", rich_help_panel=WRITING
    ),
]
MaxPromptTokens = Annotated[
    int | None,
    typer.Option(help="Length limit of a prompt, in tokens.", min=1, show_default="64", rich_help_panel=WRITING),
]
CandidateScores = Annotated[
    bool | None,
    typer.Option(
        help="Let the agent see what each candidate would score.",
        rich_help_panel=LEARNING,
        show_default="text_dqn does where the reward can score the beginning of a text",
    ),
]
Score = Annotated[
    str | None,
    typer.Option(
        help="How text_dqn tells candidates apart before a text is finished: given, by the reward's running score; "
        "learned, from rewards of finished texts; judge, learned, and while learning the reward is also asked about "
        "some unfinished texts; or none.",
        rich_help_panel=LEARNING,
        show_default="given where there is one, else learned",
        metavar="NAME",
    ),
]
CheckpointEvery = Annotated[
    int | None,
    typer.Option(
        help="Steps from one checkpoint to the next; 0 for none.", min=0, show_default="20000", rich_help_panel=LEARNING
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(help="Start from a JSON or YAML file, or a run's config.json; options go over it."),
]
Minutes = Annotated[
    float | None,
    typer.Option(
        help="How long the whole should take: steps, texts and samples are chosen by the speed of this machine.",
        show_default="none",
    ),
]
Resume = Annotated[
    Path | None,
    typer.Option(
        help="Go on with the run in this folder, from its last checkpoint. A function of yours that was changed since "
        "is named again: --reward or --partner.",
        metavar="RUN",
    ),
]
Track = Annotated[
    str | None,
    typer.Option(
        help="Where to send the figures as well: wandb, trackio, or tensorboard, whose events are in the run's folder.",
        show_default="events if TensorBoard is installed",
    ),
]
Actors = Annotated[
    int | None, typer.Option(help="With --engine ray: processes that write.", min=1, show_default="the cores")
]


def train_command(
    ctx: typer.Context,
    out: Out = None,
    agent: AgentName = None,
    task: TaskName = None,
    model: Model = None,
    dtype: Dtype = None,
    prune: Prune = None,
    prompts: Prompts = None,
    reward: RewardSpec = None,
    partner: PartnerSpec = None,
    steps: Steps = None,
    envs: Envs = None,
    seed: RunSeed = None,
    beta: Beta = None,
    top_k: TopK = None,
    max_new_tokens: MaxNewTokens = None,
    min_new_tokens: MinNewTokens = None,
    max_prompt_tokens: MaxPromptTokens = None,
    max_turns: MaxTurns = None,
    max_turn_tokens: MaxTurnTokens = None,
    max_reply_tokens: MaxReplyTokens = None,
    candidate_scores: CandidateScores = None,
    score: Score = None,
    texts: Texts = None,
    samples: Samples = None,
    checkpoint_every: CheckpointEvery = None,
    config: ConfigFile = None,
    minutes: Minutes = None,
    resume: Resume = None,
    engine: Engine = "local",
    actors: Actors = None,
    address: Address = None,
    track: Track = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Train an agent, measure it on prompts that it has not seen, and keep the run in a folder.

    Without options the small model in the box learns to write positive texts of 20 tokens (VADER's
    compound score, -1 to 1). With --json: the run's summary.json, and its folder.
    """
    from agents.runs import run as runs

    if resume is None:
        _check_minutes(minutes, engine, {"--steps": steps, "--texts": texts, "--samples": samples})
    console = open_console(stderr=as_json)
    place: dict[str, Any] = {"text_source": _text_source(engine, actors, address), "console": console, "track": track}
    if resume is not None:
        _check_only_where(ctx)
        _show(runs.resume(resume, **named_again(resume, reward, partner), trust=trust, **place), console, as_json)
        return
    changes: dict[str, Any] = {"agent": agent, "model": model, "prune": prune, "prompts": prompts, "task": task}
    changes |= {"reward": parse_spec("reward", reward), "partner": parse_spec("partner", partner)}
    changes |= {"steps": steps, "envs": envs, "seed": seed, "beta": beta, "checkpoint_every": checkpoint_every}
    changes |= {"eval_texts": texts, "eval_samples": samples}
    env: dict[str, Any] = {"top_k": top_k, "max_new_tokens": max_new_tokens, "max_prompt_tokens": max_prompt_tokens}
    env |= {"max_turns": max_turns, "max_turn_tokens": max_turn_tokens, "max_reply_tokens": max_reply_tokens}
    env |= {"min_new_tokens": min_new_tokens, "dtype": dtype}
    settings = _settings(config, changes, env, candidate_scores, trust)
    if score is not None:
        own = {**settings.agent_settings, "score": None if score == "none" else score}
        settings = replace(settings, agent_settings=own)
    folder = out or _free_folder(Path("runs"), settings.agent)
    _show(runs.train(settings, folder, minutes=minutes, **place), console, as_json)


def _text_source(engine: str, actors: int | None, address: str | None) -> TextSource:
    from agents.runs.run import local

    if not uses_ray(engine, actors=actors, address=address):
        return local
    from agents.distributed.actors import RayTextSource
    from textgen_env.models.device import own_cores

    return RayTextSource(actors or own_cores(), address)


def _check_only_where(ctx: typer.Context) -> None:
    """Raise ``ConfigError`` if an option that belongs to the configuration was given."""
    # By name: typer may bring a copy of click, with an enumeration of its own.
    typed = {name for name in ctx.params if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"}
    if extra := typed - WHERE - NAMED_AGAIN:
        options = ", ".join("--" + name.replace("_", "-") for name in sorted(extra))
        raise ConfigError(f"a run is resumed with its own configuration: leave out {options}")


def _check_minutes(minutes: float | None, engine: str, sizes: dict[str, int | None]) -> None:
    """Raise ``ConfigError`` if ``--minutes`` is no time, or stands beside an option that it would choose."""
    if minutes is None:
        return
    if not 0 < minutes < float("inf"):
        raise ConfigError(f"--minutes must be above 0 and finite, got {minutes:g}")
    if clash := list(given(sizes)):
        raise ConfigError(f"--minutes chooses {', '.join(clash)}: leave out one or the other")
    if engine != "local":
        raise ConfigError("--minutes times this machine alone: leave out --engine, or give --steps")


def _settings(
    start: Path | None, changes: dict[str, Any], env_changes: dict[str, Any], candidate_scores: bool | None, trust: bool
) -> RunConfig:
    """Return the configuration in the file ``start``, or the default one, with the given options."""
    from agents.runs.config import RunConfig
    from agents.runs.stored import read_config
    from agents.zoo import OBSERVATION
    from textgen_env.config import OF_CONVERSATIONS

    if start is None:
        config = RunConfig(**given(changes | {"prune": None if changes["prune"] == "none" else changes["prune"]}))
    else:
        read = read_config(start, trust)
        config = change(read, **changes)
        if config.agent != read.agent and config.env["observation"] == replace(read, env={}).env["observation"]:
            env = {name: value for name, value in config.env.items() if name != "observation"}
            config = replace(config, env=env)  # the usual keys of the other agent
        if (config.task, config.has_partner) != (read.task, read.has_partner):
            raise ConfigError(
                f"--task and --partner change what the settings in {str(start)!r} mean: put them into the file, with "
                "the env settings that should not be the usual ones"
            )
    new = given(env_changes)
    all_full = config.env.get("min_new_tokens") == config.env.get("max_new_tokens")
    if "max_new_tokens" in new and all_full and config.task is None and not config.has_partner:
        new = {"min_new_tokens": new["max_new_tokens"], **new}
    if candidate_scores is not None:
        of_turns = OF_CONVERSATIONS if config.has_partner else ()
        new["observation"] = (*OBSERVATION, *of_turns, *(("candidate_scores",) if candidate_scores else ()))
    return replace(config, env={**config.env, **new})


def _free_folder(parent: Path, name: str) -> Path:
    """Return the first of ``parent/name``, ``parent/name-2``, ... that does not exist."""
    names = (name if n == 1 else f"{name}-{n}" for n in range(1, sys.maxsize))
    return next(parent / free for free in names if not (parent / free).exists())


def _show(result: RunResult, console: Console, as_json: bool) -> None:
    """Print the table and the end of a run; one that was stopped exits with 128 + the signal's number."""
    from agents.runs.report import report_notes, table

    if as_json:
        from agents.runs.files import SUMMARY_FILE

        summary = read_json(result.folder / SUMMARY_FILE, (), allow_nan=True)
        typer.echo(json_text({"folder": str(result.folder)} | summary))
    elif result.report is not None:
        show_table(console, table(result.report), *report_notes(result.report))
    state = "finished" if result.finished else "stopped early: what there is was saved"
    say(
        console,
        f"{state}. {result.steps:,} steps in {result.seconds:.0f} s of training. Everything is in {result.folder}/",
    )
    if not result.finished:
        raise typer.Exit(INTERRUPTED if result.signum is None else 128 + result.signum)
    from agents.runs.stored import stored_config

    config = stored_config(result.folder, check=False)
    own = "" if config.task or config.has_partner else ' --prompt "The movie was"'
    say(console, f"try: textgen generate {result.folder}{own}")
