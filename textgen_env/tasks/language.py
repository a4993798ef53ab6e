"""Six tasks in English, on the model in the box or any other.

Prompts are split by template: agents learn on the training part, bounds and results are those of the
test part. The optimum is unknown; ``bounds.json`` holds the best that a search
within the candidates has found, made by ``python -m benchmarks.bounds``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial, wraps
from importlib.resources import files
from inspect import cleandoc, signature
from typing import Any

import numpy as np
import numpy.typing as npt

from textgen_env.errors import ConfigError
from textgen_env.prompts import ListPrompts, Prompt, PromptSource, make_prompts
from textgen_env.rewards import Generation, Json, Reward, make_reward
from textgen_env.tasks.base import TASKS, Bounds, Task
from textgen_env.tasks.exact import check_between, check_number

MODEL = "tiny"
"""The default model of language tasks."""

WORDS = ("day", "friend", "home", "love", "old", "water", "door", "music", "rain", "dog", "window", "bread")
"""Words of the keywords task, which takes the first ``count``."""

KEYS = ("name", "mood", "job", "city")
"""Keys of the JSON task, which takes the first ``keys``; prompts open the first two."""


@dataclass(frozen=True)
class TaskRecipe:
    """The parts of a language task, besides its id."""

    prompts: PromptSource
    reward: Any  # see textgen_env.rewards.make_reward
    settings: Mapping[str, Any]  # fields of EnvConfig
    ceiling: float = 1.0


def language_task(id: str) -> Callable[[Callable[..., TaskRecipe]], Callable[..., TaskRecipe]]:
    """Register a function from sizes to a ``TaskRecipe`` as a task."""

    def register(recipe: Callable[..., TaskRecipe]) -> Callable[..., TaskRecipe]:
        @TASKS.register(id)
        @wraps(recipe)
        def task(**given: Any) -> Task:
            bound = signature(recipe).bind(**given)
            bound.apply_defaults()
            made = recipe(**bound.arguments)
            return Task(
                id=id,
                summary=cleandoc(recipe.__doc__ or "").partition("\n")[0],
                sizes=bound.arguments,
                model=bound.arguments.get("model", MODEL),
                train_prompts=made.prompts.split("train"),
                test_prompts=made.prompts.split("test"),
                reward=make_reward(made.reward),
                settings=made.settings,
                known_bounds=partial(searched_bounds, id, bound.arguments, made.ceiling),
            )

        return recipe

    return register


@cache
def searched() -> Sequence[Mapping[str, Any]]:
    """Return the entries of ``bounds.json``: one for each task at some sizes."""
    entries: Sequence[Mapping[str, Any]] = json.loads(files(__package__).joinpath("bounds.json").read_text("utf-8"))[
        "bounds"
    ]
    return entries


def searched_bounds(id: str, sizes: Mapping[str, Any], ceiling: float) -> Bounds:
    """Return the bounds of a language task at these sizes.

    Raises:
        ConfigError: nobody has searched; says how to.
    """
    for entry in searched():
        if entry["id"] == id and entry["sizes"] == dict(sizes):
            return Bounds(entry["language_model"], entry["best"], ceiling)
    plain = {
        name: value if isinstance(value, str | int | float) else type(value).__name__ for name, value in sizes.items()
    }
    asked = " ".join(f"{name}={value}" for name, value in plain.items())
    raise ConfigError(
        f"no bounds are known for {id} at {asked}: search them with "
        f"python -m benchmarks.bounds --tasks {id} --sizes {asked}"
    )


def _fixed_length(length: int, **settings: Any) -> dict[str, Any]:
    check_between("length", length, 1, 256)
    return {"max_new_tokens": length, "min_new_tokens": length, **settings}


@language_task("TextGen/Sentiment-v0")
def sentiment(model: Any = MODEL, length: int = 20) -> TaskRecipe:
    """Write something that sounds positive.

    ## Description
    Continue the opening of a review, a diary, a story, ... in words that VADER rates as positive.

    ## Action space
    `Discrete(16)`: the likeliest tokens.

    ## Observation
    As of `TextGen-v0`; the running score of the text so far is part of it.

    ## Rewards
    VADER's compound score of the completion, -1 to 1.

    ## Starting state
    One of the openings in the box; a tenth of their templates is kept for testing.

    ## Episode end
    After `length` tokens.

    ## Arguments
    `model`, anything that `TextGen-v0` takes; `length`, 1 to 256 tokens.

    ## Bounds
    Best: of a search within the candidates. Ceiling: 1.

    ## Reference
    Hutto and Gilbert 2014 (VADER); the task of RL4LMs and TRL, there with film reviews.
    """
    return TaskRecipe(make_prompts("openings"), "sentiment", _fixed_length(length))


@language_task("TextGen/Keywords-v0")
def keywords(model: Any = MODEL, length: int = 24, count: int = 4) -> TaskRecipe:
    """Use all of the given words, without repeating oneself.

    ## Description
    Continue an opening with a text that has `count` given words in it, the first of ``WORDS``.

    ## Action space
    `Discrete(16)`: the likeliest tokens.

    ## Observation
    As of `TextGen-v0`; the running score of the text so far is part of it.

    ## Rewards
    The share of the words that occur, minus the share of 4-grams that repeat an earlier one.

    ## Starting state
    One of the openings in the box; a tenth of their templates is kept for testing.

    ## Episode end
    After `length` tokens.

    ## Arguments
    `model`, anything that `TextGen-v0` takes; `length`, 1 to 256 tokens; `count`, 1 to 12 words.

    ## Bounds
    Best: of a search within the candidates. Ceiling: 1.

    ## Reference
    CommonGen, Lin et al. 2020, arXiv:1911.03705.
    """
    check_between("count", count, 1, len(WORDS))
    reward = [[{"name": "keywords", "words": WORDS[:count]}, 1.0], [{"name": "repetition", "n": 4}, -1.0]]
    return TaskRecipe(make_prompts("openings"), reward, _fixed_length(length))


@language_task("TextGen/Readability-v0")
def readability(model: Any = MODEL, length: int = 24, grade: float = 10.0) -> TaskRecipe:
    """Write for readers of a given school grade.

    ## Description
    Continue an opening with a text of a Flesch-Kincaid grade: long words and sentences raise it.

    ## Action space
    `Discrete(16)`: the likeliest tokens.

    ## Observation
    As of `TextGen-v0`; the running score of the text so far is part of it.

    ## Rewards
    1 - |grade of the completion - `grade`| / 10, at least 0.

    ## Starting state
    One of the openings in the box; a tenth of their templates is kept for testing.

    ## Episode end
    After `length` tokens.

    ## Arguments
    `model`, anything that `TextGen-v0` takes; `length`, 1 to 256 tokens; `grade`, -3 to 30.

    ## Bounds
    Best: of a search within the candidates. Ceiling: 1.

    ## Reference
    Kincaid et al. 1975.
    """
    check_number("grade", grade, -3, 30)
    return TaskRecipe(make_prompts("openings"), {"name": "readability", "target": grade}, _fixed_length(length))


class ClosedJson(Reward):
    """JSON whose outer brace may be missing: the better of the text as it is and with "}" after it.

    Range and cost: those of the ``json`` reward with the same schema. Running score: no.
    """

    name = "json"

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._json = Json(schema, part="text")

    def __call__(self, generations: Sequence[Generation]) -> npt.NDArray[np.float64]:
        closed = [replace(generation, completion=generation.completion + "}") for generation in generations]
        return np.maximum(self._json(generations), self._json(closed))


@language_task("TextGen/Json-v0")
def json_object(model: Any = MODEL, length: int = 16, keys: int = 3) -> TaskRecipe:
    """Finish a JSON object that has all of its keys.

    ## Description
    The prompt has opened an object and the string of its second key. The text has to close the string,
    to add the keys that are missing, and to end there; the last brace is not insisted on.

    ## Action space
    `Discrete(16)`: the likeliest tokens.

    ## Observation
    As of `TextGen-v0`; a prefix has no running score.

    ## Rewards
    0, or 0.5 if prompt and completion are a JSON object, or 1 if it also has the first `keys` of ``KEYS``.

    ## Starting state
    One of 40 beginnings; a tenth of the names is kept for testing.

    ## Episode end
    At a closing brace, at the end of text, or after `length` tokens.

    ## Arguments
    `model`, anything that `TextGen-v0` takes; `length`, 1 to 256 tokens; `keys`, 2 (both are there) to 4.

    ## Bounds
    Best: of a search within the candidates. Ceiling: 1.

    ## Reference
    Format rewards as in Geng et al. 2025, "JSONSchemaBench", arXiv:2501.10868.
    """
    check_between("length", length, 1, 256)
    check_between("keys", keys, 2, len(KEYS))
    people = ("Ann", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jack")
    begun = [
        Prompt(f'{{"{KEYS[0]}": "{name}", "{KEYS[1]}": "{mood}', metadata={"template": name})
        for name in people
        for mood in ("very ", "not ", "a bit ", "")
    ]
    reward = ClosedJson({"type": "object", "required": list(KEYS[:keys])})
    return TaskRecipe(ListPrompts(begun), reward, {"max_new_tokens": length, "stop": ("}",)})


@language_task("TextGen/Couplet-v0")
def couplet(model: Any = MODEL, length: int = 10) -> TaskRecipe:
    """Write the second line of a couplet: it rhymes, and has as many syllables as the first.

    ## Description
    The prompt is a line of eight syllables. Nothing before the last word shows if it will rhyme.

    ## Action space
    `Discrete(16)`: the likeliest tokens.

    ## Observation
    As of `TextGen-v0`; the running score is that of the metre alone.

    ## Rewards
    Half for the rhyme, half for the metre: 1 - |syllables - 8| / 8. Both are guessed from the spelling.

    ## Starting state
    One of 40 lines; a tenth of them is kept for testing.

    ## Episode end
    At the end of the line, at the end of text, or after `length` tokens.

    ## Arguments
    `model`, anything that `TextGen-v0` takes; `length`, 1 to 256 tokens.

    ## Bounds
    Best: of a search within the candidates. Ceiling: 1.

    ## Reference
    Rhyme and metre as separate goals: Hopkins and Kiela 2017, "Automatically generating rhythmic verse".
    """
    check_between("length", length, 1, 256)
    lines = ListPrompts([Prompt(f"{line},\n") for line in FIRST_LINES])
    reward = [["rhyme", 0.5], [{"name": "metre", "syllables": 8}, 0.5]]
    return TaskRecipe(lines, reward, {"max_new_tokens": length, "stop": ("\n",)})


@language_task("TextGen/LeadRouge-v0")
def lead_rouge(length: int = 20) -> TaskRecipe:
    """Write the sentence that somebody else wrote, every token of the vocabulary allowed.

    ## Description
    The prompt is a short piece of news, the reference how it goes on. On the model in the box only,
    whose vocabulary is small enough to be an action space.

    ## Action space
    `Discrete(V)`: action i is token id i.

    ## Observation
    As of `TextGen-v0` without candidates; the running score of the text so far is part of it.

    ## Rewards
    ROUGE-L F1 of the completion against the reference, 0 to 1.

    ## Starting state
    One of 50 pieces of news; a tenth of the templates is kept for testing.

    ## Episode end
    At the end of text, or after `length` tokens.

    ## Arguments
    `length`, 4 to 256 tokens.

    ## Bounds
    Best: the reference itself where it fits into the length, else of a search. Ceiling: 1.

    ## Reference
    Lin 2004 (ROUGE); leads of the news as in See et al. 2017, arXiv:1704.04368.
    """
    check_between("length", length, 4, 256)
    news = [
        Prompt(event.format(place), reference=lead.format(place), metadata={"template": event})
        for (event, lead), places in NEWS.items()
        for place in places
    ]
    return TaskRecipe(ListPrompts(news), "rouge", {"max_new_tokens": length, "top_k": None})


FIRST_LINES = (
    "The winter sun is going down",
    "I walked alone along the shore",
    "The little bird began to sing",
    "My mother told me long ago",
    "The moon is high above the hill",
    "We danced until the break of day",
    "The river runs below the town",
    "An old man sat beside the door",
    "I never thought that you would stay",
    "The stars were shining in the night",
    "She gave me bread, she gave me wine",
    "The leaves are falling from the tree",
    "A cat was sleeping on the chair",
    "The children ran across the land",
    "I wrote your name upon the wall",
    "The rain is knocking at the pane",
    "He took the road that leads to town",
    "The garden dreams beneath the snow",
    "My heart was heavy as a stone",
    "The baker sings and bakes his bread",
    "A ship came in from far away",
    "The wind has blown the clouds apart",
    "I heard a voice, I saw a light",
    "The king has lost his golden ring",
    "Tomorrow I will write to you",
    "The clock has stopped, the fire is cold",
    "We sat together in the shade",
    "The dog lay down beside the bed",
    "A letter came for me today",
    "The morning opens like a book",
    "I left my hat upon the train",
    "The mountain wears a coat of white",
    "She smiled at me and said my name",
    "The road is long, the night is near",
    "The kitchen smells of apple cake",
    "I lost my way inside the wood",
    "The bells are ringing, loud and clear",
    "A stranger knocked upon my door",
    "The summer ends, the fields are bare",
    "You are the song I want to hear",
)
"""Lines of eight syllables."""

NEWS = {
    ("A storm hit the {} last night.", " The {} was closed and nobody was hurt."): (
        "harbour", "village", "old bridge", "airport", "market",
    ),
    ("The new {} opened on Monday.", " Many people came to see the {} on the first day."): (
        "library", "school", "station", "museum", "hospital",
    ),
    ("A dog was lost in the {}.", " A boy found the dog in the {} and took it home."): (
        "park", "forest", "city", "snow", "mountains",
    ),
    ("The price of {} went up again.", " People are not happy that {} costs more than last year."): (
        "bread", "milk", "coffee", "rice", "fish",
    ),
    ("Our {} won the game.", " The {} played very well and everyone was proud."): (
        "team", "school", "town", "club", "class",
    ),
    ("There was a fire in the {}.", " The fire in the {} started in the kitchen early in the morning."): (
        "hotel", "bakery", "factory", "castle", "theatre",
    ),
    ("A famous {} is coming to town.", " The {} will give a talk at the school on Friday."): (
        "painter", "writer", "singer", "doctor", "pilot",
    ),
    ("The {} is getting old.", " The town wants to build a new {} next year."): (
        "bridge", "theatre", "tower", "pool", "market hall",
    ),
    ("The first {} came early this year.", " The farmers were surprised by the early {}."): (
        "snow", "rain", "frost", "apples", "birds",
    ),
    ("A little girl found a {}.", " The little girl gave the {} back to the old man."): (
        "ring", "letter", "key", "watch", "photograph",
    ),
}  # fmt: skip
"""Beginnings of stories with their continuations, and the fillers of both."""
