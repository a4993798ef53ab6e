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

OptionalRun = Annotated[Path | None, typer.Argument(help="A folder that 'textgen train' made.", metavar="RUN")]
Writer = Annotated[
    Path | None,
    typer.Argument(
        help="A folder that 'textgen train' or save_pretrained made, or an agent on the Hugging Face Hub, USER/AGENT.",
        metavar="RUN",
    ),
]
Prompts = Annotated[
    str | None,
    typer.Option(
        help="openings, one of its topics, a .txt or .jsonl file, or FILE.py:NAME; see 'textgen list prompts'."
    ),
]
RewardWithoutRun = Annotated[
    str | None,
    typer.Option(
        help="Without RUN: what to score the texts with. With RUN: its reward once more, if that is a function of "
        "yours: FILE.py:NAME.",
        show_default="sentiment",
    ),
]
RewardAgain = Annotated[
    str | None,
    typer.Option(help="The run's reward once more, if that is a function of yours: FILE.py:NAME."),
]
PartnerAgain = Annotated[
    str | None,
    typer.Option(help="The run's partner once more, if that is a function of yours: FILE.py:NAME."),
]
Texts = Annotated[
    int | None,
    typer.Option(help="Texts to measure each agent on, one a prompt at least.", min=1, show_default="512"),
]
Samples = Annotated[
    int | None,
    typer.Option(help="Samples a prompt to estimate the best possible policy from.", min=2, show_default="64"),
]
Greedy = Annotated[bool, typer.Option("--greedy", help="Take the most probable token at every step.")]
Seed = Annotated[int, typer.Option(help="Of the random numbers.", min=0, max=MOST_SEED)]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Run code that comes with the run: pickles of agents other than text_dqn, and functions that it names "
        "and that you never have.",
    ),
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


def parse_spec(option: str, text: str | None) -> Any:
    """Return a name, or a description given as JSON.

    Raises:
        ConfigError: it begins like JSON, and is none; or it is a file without the name of a function.
    """
    if text is not None and text.endswith(".py"):
        raise ConfigError(f"--{option} {text} names a file alone: say which function of it, --{option} {text}:NAME")
    if text is None or not text.lstrip().startswith(("{", "[")):
        return text
    return parse_json(text, f"--{option} looks like JSON but is none: it", allow_nan=True)


def own_reward(text: str | None) -> Any:
    """Return the reward that ``text`` means, functions of the user's own loaded."""
    from agents.runs.parts import load_instance
    from agents.user_code import replace_references

    return replace_references(parse_spec("reward", text), load_instance)


def own_object(name: str, text: str | None) -> Any:
    """Return the object that a model or prompts (``name``) of the user's own stand for, or else ``text``."""
    from agents.runs.config import RunConfig
    from agents.runs.parts import load_objects

    if text is None:
        return None
    return load_objects(RunConfig(**{name: text}), (name,)).get(name, text)  # type: ignore[arg-type]


def reward_again(run: Path, text: str | None) -> Any:
    """Return the reward of a run that is a function, or a mix with one, named once more; None where it was not.

    Raises:
        ConfigError: the run's reward is no function, has several, or one of another kind.
    """
    if text is None:
        return None
    from agents.runs.stored import stored_config, without_reward
    from agents.user_code import is_reference, replace_references
    from textgen_env.rewards import make_reward

    config, own = stored_config(run, trust=True, check=False), list[Any]()  # nothing of it is run
    replace_references(config.reward, own.append)
    if "reward" not in config.objects and not own:
        raise ConfigError(f"--reward is that of the run ({config.reward!r}); leave it out")
    new = own_reward(text)
    if not config.agent_sees_reward and make_reward(new).running() is not None:
        in_box = None if is_reference(text) else make_reward(without_reward(config)).running()
        if in_box is None:  # otherwise a mix whose other parts the agent has seen
            raise ConfigError("the run's reward scored no prefix, and this one does: its agent knows no such scores")
    if is_reference(config.reward) or not own or not is_reference(text):
        return new
    if len(own) > 1:
        raise ConfigError(
            f"the run's reward has several functions, {' and '.join(own)}: name the whole reward, as JSON, instead of "
            f"--reward {text}"
        )
    return replace_references(config.reward, lambda reference: new)  # in its own place


def partner_again(run: Path, text: str | None) -> Any:
    """Return the partner of a run that is a function, named once more; None where it was not.

    Raises:
        ConfigError: the run's partner is no function, or it has none.
    """
    if text is None:
        return None
    from agents.runs.parts import load_instance
    from agents.runs.stored import stored_config
    from agents.user_code import is_reference

    config = stored_config(run, trust=True, check=False)  # nothing of it is run
    if "partner" not in config.objects and not is_reference(config.partner):
        whose = config.partner or config.task or "nobody"
        raise ConfigError(f"--partner is that of the run ({whose!r}); leave it out")
    if not is_reference(text):
        raise ConfigError(f"--partner must be FILE.py:NAME or module:NAME, got {text!r}")
    return load_instance(text)


def named_again(run: Path, reward: str | None, partner: str | None) -> dict[str, Any]:
    """Return what ``agents.runs.run.resume`` is given where a run's own functions are named once more.

    Raises:
        ConfigError: as of ``reward_again`` and ``partner_again``; or another reward or partner than the run's.
    """
    from agents.runs.stored import located, stored_config
    from agents.user_code import absolute_reference, is_reference, replace_references

    again: dict[str, Any] = {"reward": reward_again(run, reward), "partner": partner_again(run, partner)}
    config, accept = stored_config(run, trust=True, check=False), list[str]()
    for option, text in given({"reward": reward, "partner": partner}).items():
        if option in config.objects:  # nothing to compare with
            continue
        own, spec, named = getattr(located(config, run), option), parse_spec(option, text), list[str]()
        replace_references(spec, named.append)
        same = replace_references(spec, absolute_reference) == replace_references(own, absolute_reference)
        if not named or not (same or is_reference(spec)):
            raise ConfigError(f"a run is resumed with its own {option}: --{option} must be {own!r}, got {text}")
        again[option] = None  # resume loads it
        accept += named
    return again | {"accept": accept}


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
