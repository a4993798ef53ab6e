"""Options that several commands share, and the reading of their values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from textgen_env.config import MOST_SEED
from textgen_env.errors import ConfigError
from textgen_env.files import parse_json

if TYPE_CHECKING:
    from agents.runs.config import RunConfig

OptionalRun = Annotated[Path | None, typer.Argument(help="A folder that 'textgen train' made.", metavar="[RUN]")]
Prompts = Annotated[
    str | None,
    typer.Option(help="openings, one of its topics, or a .txt or .jsonl file; see 'textgen list prompts'."),
]
RewardWithoutRun = Annotated[
    str | None, typer.Option(help="Without RUN: what to score the texts with.", show_default="sentiment")
]
Texts = Annotated[int | None, typer.Option(help="Texts to measure each agent on.", min=1, show_default="512")]
Samples = Annotated[
    int | None,
    typer.Option(help="Samples a prompt to estimate the best possible policy from.", min=2, show_default="64"),
]
Greedy = Annotated[bool, typer.Option("--greedy", help="Take the most probable token at every step.")]
LARGEST_SEED = MOST_SEED
Seed = Annotated[int, typer.Option(help="Of the random numbers.", min=0, max=LARGEST_SEED)]
Trust = Annotated[
    bool, typer.Option("--trust", help="Load agents other than text_dqn too; doing so runs what code their file holds.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON only.")]
Engine = Annotated[str, typer.Option(help="Who does the work: local, this machine alone; or ray.")]
Address = Annotated[
    str | None,
    typer.Option(
        help="With --engine ray: HOST:PORT of a cluster's head, or auto for the one that this machine is part of.",
        show_default="Ray starts here",
    ),
]


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that have a value."""
    return {name: value for name, value in options.items() if value is not None}


def change(config: RunConfig, **options: Any) -> RunConfig:
    """Return ``config`` with the options that have a value."""
    changes = given(options)
    if changes.get("prune") == "none":
        changes["prune"] = None
    return replace(config, **changes)


def parse_reward(text: str | None) -> Any:
    """Return a reward's name, or its description given as JSON.

    Raises:
        ConfigError: it begins like JSON, and is none.
    """
    if text is None or not text.lstrip().startswith(("{", "[")):
        return text
    return parse_json(text, "--reward looks like JSON but is none: it", allow_nan=True)


def check_one_writer(run: Path | None, model: str | None) -> None:
    """Raise ``ConfigError`` unless exactly one of a run and a language model is given."""
    if (run is None) == (model is None):
        raise ConfigError("give either the folder of a run, or --model for the language model itself")


def uses_ray(engine: str, **ray_options: Any) -> bool:
    """Return True if Ray should do the work.

    Raises:
        ConfigError: another engine than local and ray, or options of Ray with the local engine.
    """
    if engine not in ("local", "ray"):
        raise ConfigError(f"--engine must be local or ray, got {engine!r}")
    extra = [f"--{name}" for name in given(ray_options)]
    if engine == "local" and extra:
        raise ConfigError(f"{' and '.join(extra)} belong to a cluster: add --engine ray")
    return engine == "ray"
