"""The parts of a run: its language model, its environment, and prompts to learn from and to measure on."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from agents.runs.config import NO_REWARD, OBJECTS, RunConfig, is_own_code
from agents.user_code import is_reference, load_code, replace_references
from textgen_env.config import EnvConfig
from textgen_env.errors import ConfigError, PromptError, TextGenError
from textgen_env.evaluation import choose_prompts
from textgen_env.models import load_language_model, load_pretrained
from textgen_env.models.base import LanguageModel
from textgen_env.prompts import ListPrompts, PromptSource, make_prompts
from textgen_env.vector_env import TextGenVectorEnv

VALIDATION_PROMPTS = 16
"""Prompts, of those that an agent learns from, on which settings are chosen, at most."""

FEWEST_TO_SPLIT = 20
"""Prompts; of fewer, the test prompts would be too few to say anything about."""


def load_objects(config: RunConfig, names: Sequence[str] = OBJECTS) -> dict[str, Any]:
    """Run the user's own code that the configuration names, and return the objects in it: of ``names``, by name.

    Raises:
        ConfigError: it cannot be imported; or a model of one's own, and ``prune``.
    """
    found: dict[str, Any] = {}
    if "model" in names and is_own_code(config.model):
        if config.prune is not None:
            raise ConfigError(f"prune needs a model by name or in a folder, got the code {config.model!r}")
        model = load_code(str(config.model))
        found["model"] = _made(model, str(config.model)) if inspect.isroutine(model) else model
    if "prompts" in names and is_own_code(config.prompts):
        found["prompts"] = load_code(config.prompts)
    if "reward" in names:
        reward = replace_references(config.reward, load_instance)
        if reward is not config.reward and reward != config.reward:
            found["reward"] = reward
    if "partner" in names and is_reference(config.partner):
        found["partner"] = load_instance(config.partner)
    return found


def load_instance(reference: str) -> Any:
    """Return the user's own reward or partner; of a class, an instance.

    Raises:
        ConfigError: it cannot be imported, the class cannot be called without arguments, or it raised.
    """
    found = load_code(reference)
    return _made(found, reference) if inspect.isclass(found) else found


def _made(maker: Any, reference: str) -> Any:
    """Return what the user's own class or function makes without arguments."""
    try:
        inspect.signature(maker).bind()
    except TypeError as error:
        raise ConfigError(
            f"{reference!r} is a {'class, and is made' if inspect.isclass(maker) else 'function, and is called'} "
            f"without arguments: {error}. Give those defaults, or name an object"
        ) from error
    except ValueError:  # it has no signature
        pass
    try:
        return maker()
    except TextGenError:
        raise
    except Exception as error:
        raise ConfigError(f"{reference!r} raised {type(error).__name__}: {error}") from error


def open_language_model(config: RunConfig) -> tuple[LanguageModel, str | None]:
    """Return the configuration's language model, pruned once if it says so, and a line about that."""
    env, task = config.env_config(), config.opened_task
    if config.prune is None:
        named = config.model if task is None else task.model
        return load_language_model(named, env.dtype, trust_remote_code=env.trust_remote_code), None
    from agents.pruning.methods import parse_pruning
    from agents.pruning.model import prune_
    from textgen_env.models.device import pick_device
    from textgen_env.models.hf import HFModel

    model, tokenizer = load_pretrained(str(config.model), env.dtype, env.trust_remote_code)
    reports = []
    for method, amount in parse_pruning(config.prune):
        model, report = prune_(model, method, amount, tokenizer=tokenizer, seed=config.seed)
        reports.append(str(report))
    model.to(pick_device())  # type: ignore[arg-type]  # transformers types it for itself
    pruned = HFModel(model, tokenizer, name=f"{config.model}, {config.prune}", relayout=True)
    return pruned, f"Language model {config.model}: {'; '.join(reports)}."


def open_env(
    config: RunConfig,
    model: LanguageModel,
    prompts: PromptSource,
    reward: Any,
    observation: Any = None,
    partner: Any = None,
) -> TextGenVectorEnv:
    """Return a vector environment of the run, on a language model that is loaded already."""
    settings = {f.name: getattr(config.env_config(), f.name) for f in fields(EnvConfig)}
    if observation is not None:
        settings["observation"] = observation
    return TextGenVectorEnv(config.envs, model, prompts, reward, partner, **settings)


def reward_and_partner(config: RunConfig, reward: Any, partner: Any) -> tuple[Any, Any]:
    """Return the reward and the partner of a run, given the objects in their place, or None; a reward of None means
    the partner's alone."""
    task = config.opened_task
    if task is not None:
        return task.reward, task.partner
    if reward is None:
        reward = None if config.reward == NO_REWARD and config.has_partner else config.reward
    return reward, config.partner if partner is None else partner


def prompts_of(config: RunConfig, given: Any) -> tuple[PromptSource, PromptSource, str]:
    """Return the prompts to learn from, those to measure on, and a line about them.

    Args:
        given: In place of those that the configuration names, or None.
    """
    task = config.opened_task
    if task is None or given is not None:
        return split_prompts(config.prompts if given is None else given, config.eval_prompts, config.seed)
    chosen = choose_prompts(task.test_prompts, config.eval_prompts, config.seed)
    return (
        task.train_prompts,
        chosen,
        f"Prompts: measured on {len(chosen)} of the {len(task.test_prompts)} of {task.id}.",
    )


def split_prompts(spec: Any, most: int, seed: int) -> tuple[PromptSource, PromptSource, str]:
    """Return the prompts to learn from, at most ``most`` others to measure on, and a line about the split."""
    source = make_prompts(spec)
    try:
        count = len(source)
    except PromptError:  # a function's prompts never end
        fixed = ListPrompts([source[index] for index in range(most)])
        return source, fixed, f"Prompts: made by a function; measured on {most} fixed ones."
    too_few = f"Prompts: {count}, too few to hold some back, so learning and measuring use the same."
    if count < FEWEST_TO_SPLIT:
        return source, choose_prompts(source, most, seed), too_few
    try:
        train, test = source.split("train"), choose_prompts(source.split("test"), most, seed)
    except PromptError:  # too few templates
        return source, choose_prompts(source, most, seed), too_few
    return train, test, f"Prompts: {len(train)} to learn from, {len(test)} others, of other templates, to measure on."


def some_prompts(source: PromptSource, most: int, seed: int) -> PromptSource:
    """Return at most ``most`` of the prompts, chosen by ``seed``; of those that a function makes, the first ones."""
    try:
        return choose_prompts(source, most, seed)
    except PromptError:  # a function's prompts never end
        return ListPrompts([source[index] for index in range(most)])
