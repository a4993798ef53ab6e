"""What the teacher is asked to write: instructions and openings, drawn from templates and words.

``draw(rng)`` gives an instruction, and for most texts the words with which the text must begin.
Names in braces are drawn from ``WORDS``, the same word for the same name in both, so that opening
and instruction fit; a digit after a name asks for another word. The openings that the package
offers as prompts (``textgen_env.openings``) are not among these.
"""

from __future__ import annotations

import re

import numpy as np


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split("|"))


WORDS: dict[str, tuple[str, ...]] = {
    "length": _split("one sentence | two short sentences | two sentences | two sentences | three short sentences"),
    "good": _split(
        "happy | grateful | cheerful | proud | warm | excited | loving | hopeful | peaceful | delighted | funny | "
        "very positive"
    ),
    "bad": _split(
        "sad | angry | disappointed | worried | bitter | tired | lonely | frightened | annoyed | gloomy | hurt | very "
        "negative"
    ),
    "plain": _split(
        "calm | matter-of-fact | curious | mysterious | surprising | quiet | simple | strange | mixed | honest"
    ),
    "product": _split(
        "phone | backpack | coffee machine | bicycle | keyboard | lamp | tent | pair of boots | vacuum cleaner | "
        "camera | sofa | pillow | blender | printer | watch | jacket | laptop | garden hose | knife set | speaker | "
        "toy robot | suitcase"
    ),
    "show": _split(
        "film | detective film | comedy | documentary | series | remake | play | concert | puppet show | cartoon | "
        "musical | horror film | radio drama | opera | first episode | last season | war film | circus show | ballet "
        "| sequel"
    ),
    "reading": _split(
        "novel | poem | cookbook | biography | comic | travel guide | thriller | book of fairy tales | magazine"
    ),
    "venue": _split(
        "hotel | restaurant | museum | campsite | cinema | cafe | guest house | zoo | swimming pool | theatre | gym | "
        "hostel | bakery | exhibition | pub | castle | boat trip | guided tour | garage | hairdresser | bookshop"
    ),
    "part": _split(
        "ending | acting | music | story | first chapter | dialogue | service | staff | room | breakfast | price | "
        "battery | sound | screen | colour | plot | main character | quality | handle | view | food | opening scene | "
        "manual | delivery"
    ),
    "person": _split(
        "baker | teacher | nurse | captain | painter | farmer | doctor | girl | boy | old man | old woman | king | "
        "queen | wizard | clockmaker | fisherman | soldier | thief | tailor | gardener | guard | stranger | pilot | "
        "student | musician | postman | shepherd | sailor | princess | carpenter | driver | child | waiter | "
        "librarian | beekeeper | goalkeeper | judge | cook"
    ),
    "animal": _split(
        "cat | dog | fox | bear | mouse | dragon | horse | owl | rabbit | wolf | crow | frog | bee | elephant | duck"
    ),
    "relation": _split(
        "sister | brother | mother | father | cousin | grandmother | grandfather | neighbour | friend | best friend | "
        "daughter | son | uncle | aunt | teacher | boss | landlord | dentist | doctor | colleague | husband | wife | "
        "roommate | old friend"
    ),
    "name": _split(
        "Anna | Tom | Maria | Ben | Lily | Omar | Clara | Jack | Nina | Paul | Sara | Leo | Emma | Max | Rosa | Ivan "
        "| Mia | Sam | Aisha | Peter | Julia | Kofi | Lucy | David | Elena | Hugo | Ruth | Mark | Sophie | Noah | "
        "Ella | Karim"
    ),
    "place": _split(
        "forest | village | lake | desert | harbour | market | park | garden | station | school | kitchen | city | "
        "old town | river | beach | mountains | island | bridge | library | hospital | farm | castle | cave | street "
        "| square | church | office | valley"
    ),
    "town": _split(
        "Lisbon | Kyoto | Nairobi | Quito | Paris | Rome | Berlin | Oslo | Cairo | London | Madrid | Vienna | Boston "
        "| Prague | Lima | Dublin | the coast | the capital | the mountains | the north | the sea | the border"
    ),
    "object": _split(
        "key | photograph | letter | map | door | stone | box | ring | book | mirror | bell | coin | hat | boat | "
        "clock | lamp | coat | parcel | drawer | suitcase | ladder | window | violin | umbrella | bicycle | candle | "
        "feather | shoe | painting | bottle"
    ),
    "food": _split(
        "soup | bread | apple cake | stew | rice | noodles | fish | salad | curry | pancakes | cheese | dumplings | "
        "coffee | tea | toast | pizza | eggs | chocolate | pumpkin pie | beans | oranges | honey | chicken | ice "
        "cream | pasta | sandwich | onions"
    ),
    "job": _split(
        "meeting | call | workshop | review | project | report | interview | presentation | contract | budget | "
        "deadline | team | invoice | delivery | repair | website | schedule | customer | office | training | shift | "
        "survey | update | plan"
    ),
    "weather": _split(
        "snow | rain | wind | storm | fog | heat | sun | spring | autumn | winter | frost | thunder | hail | drought "
        "| cold | sky | clouds | summer | moon | sunrise | sunset | breeze | ice | flood"
    ),
    "trip": _split(
        "train ride | flight | hike | bus ride | ferry | camping trip | road trip | boat trip | school trip | walk | "
        "holiday | ski trip | night train | weekend | long drive | canoe trip | city tour | bike tour"
    ),
    "time": _split(
        "yesterday | this morning | last night | today | on Sunday | last week | after lunch | at noon | in the "
        "evening | last summer | on Friday | at dawn | before breakfast | two days ago | in spring | tonight | this "
        "afternoon"
    ),
    "event": _split(
        "a birthday | a lost wallet | an exam | a new home | a goodbye | a wedding | a broken window | good news | "
        "bad news | a long wait | a mistake | a gift | a quarrel | a visit | a first day | a dream | a walk | a "
        "promise | a phone call | an illness | a race | a lost dog | a lazy day | a small victory | a sleepless night "
        "| a rainy day | a concert"
    ),
}
WORDS["mood"] = WORDS["good"] + WORDS["bad"] + WORDS["plain"]

GENERAL = _split(
    "I | We | It | She | He | They | There | This | The | My | When | After | In the {place} | At the {place} | "
    "{name} | Every | Nobody | Everyone | Some | One | If | Today | The {person} | The {object} | My {relation} | A "
    "{person} | It is | It was | I am | I was | We were | She had | He said | They had | There was a | There is | I "
    "think | I have | What a | How | No | With | On the way to {town} | Because of the {weather} | Before the {trip}"
)

KINDS: dict[str, tuple[float, tuple[str, ...], tuple[str, ...]]] = {
    "review": (
        0.19,
        _split(
            "Write {length} of a {mood} review of a {product}. | Write {length} of a {mood} review of a {show}. | "
            "Write {length} of a {mood} review of a {venue}. | Write {length} of a {mood} review of a {reading}."
        ),
        _split(
            "The {part} of this {show} | The {part} was | I bought this {product} and | This {product} is | We stayed "
            "at the {venue} and | I read the {reading} and | The {part} in the {show} is | I saw the {show} | My "
            "{relation} gave me this {product} | Do not buy this {product} | I expected more from the {venue}, | I "
            "love the {part} of | The worst thing about the {venue} | The best thing about this {product} | We "
            "watched the {show} {time} and | After a month with the {product}, | One star: | Five stars: | I would "
            "recommend the {venue} | The {venue} was | The {show} was | What I liked about the {reading} | I was "
            "surprised by the {part} | The {part} is good, but | They gave the {show} | Our visit to the {venue}"
        ),
    ),
    "diary": (
        0.17,
        _split(
            "Write {length} of a {mood} diary entry about {event}. | Write {length} of a {mood} diary entry about my "
            "{relation}. | Write {length} of a {mood} diary line, in the first person."
        ),
        _split(
            "Dear diary, | Dear diary, {time} | I woke up | {time} I | I could not sleep because | My {relation} "
            "called | My {relation} told me that | I feel | I finally | I have not seen my {relation} | I opened the "
            "{object} | It has been a | I miss | I found the {object} that | I keep thinking about | I thought about "
            "{event} | I am so | Nothing went right | I wrote to my {relation} | When I came home, | All day I | I "
            "wish | I spent the day | I went to bed | I promised myself | Tomorrow I"
        ),
    ),
    "story": (
        0.2,
        _split(
            "Write {length} of a {mood} story about a {person} and a {object}. | Write {length} of a {mood} story "
            "about a {person} in a {place}. | Write {length} of a {mood} fairy tale about a {animal}. | Write the "
            "first {length} of a {mood} tale about {name}."
        ),
        _split(
            "Once upon a time | Once there was a {animal} | The {person} had a {object} | {name} found a {object} | A "
            "{person} lived in the {place} | {name} was a {person} who | The {person} looked at the {object} | There "
            "was an old {object} in the {place} | The {animal} and the {animal2} | One night the {person} | She "
            "opened the {object} and | Nobody knew why the {person} | The {person} knocked on the door and | In a "
            "small {place} | When the {person} came to the {place}, | He took the {object} | Deep in the {place} | "
            "The {object} was | Long ago, a {person} | {name} and {name2} were | Everybody in the {place} | At the "
            "end of the {place} there was | The little {animal} | {name} walked to the {place}"
        ),
    ),
    "work": (
        0.1,
        _split(
            "Write {length} of a {mood} note about a {job} at work. | Write {length} of a {mood} email to a colleague "
            "about the {job}. | Write {length} about a {mood} day at work."
        ),
        _split(
            "The {job} was | The {job} with the {person} | My new {job} | My first day as a {person} | Our boss | The "
            "{job} {time} was | The team | The customer said that | We finished the {job} | When the {job} was over, "
            "| I work as a {person} and | The {job} is late | Everyone in the office | Thank you for the {job} | I am "
            "sorry about the {job} | My colleague | They told us that the {job} | After the {job} I"
        ),
    ),
    "travel": (
        0.09,
        _split(
            "Write {length} of a {mood} travel note about a {trip}. | Write {length} of a {mood} postcard from "
            "{town}. | Write {length} about a {mood} {trip} to {town}."
        ),
        _split(
            "The {trip} was | The train to {town} | We arrived in {town} | Our {trip} to {town} | From the window | "
            "The guide told us | On the {trip} we | In {town} we | We missed the | The road to {town} | At the "
            "airport | The hotel in {town} | The day before the {trip}, | Looking back at the {trip}, | They stopped "
            "us at | We walked through the {place} and | Greetings from {town}! | The people in {town}"
        ),
    ),
    "food": (
        0.08,
        _split(
            "Write {length} about {mood} memories of {food}. | Write {length} of a {mood} note about cooking {food}. "
            "| Write {length} of a {mood} report about a lunch of {food}."
        ),
        _split(
            "The {food} was | The {food} tasted | My {relation} cooked | I made {food} {time} and | The waiter | The "
            "smell of {food} | We ate {food} | For dinner we | I tried the {food} | Lunch {time} was | The kitchen | "
            "The secret of good {food} | My {relation}'s {food} | I ordered the {food} and | The cook | Nothing "
            "tastes"
        ),
    ),
    "weather": (
        0.07,
        _split(
            "Write {length} of a {mood} description of the {weather}. | Write {length} about the {weather} in the "
            "{place}, in a {mood} voice. | Write {length} of a weather report with {weather}."
        ),
        _split(
            "The {weather} came | The {weather} over the {place} | After the {weather} | It rained | A cold wind | "
            "The forecast says | In the evening the sky | The {weather} was so | When the {weather} began, | By noon "
            "| The {place} was covered | The sun | We waited in the {place} until | Tomorrow the {weather}"
        ),
    ),
    "person": (
        0.08,
        _split(
            "Write {length} of a {mood} description of my {relation}. | Write {length} of a {mood} description of a "
            "{person}. | Write {length} of a {mood} letter to my {relation}."
        ),
        _split(
            "My {relation} is | My {relation}, a {person}, | The {person} looked | When I met the {person}, | Dear "
            "{name}, | {name} is a {person} who | The children in the {place} | Everyone says that {name} | {name} "
            "always | I want to tell my {relation} that | The old {person} | She is the kind of | He never | The "
            "{person} smiled and"
        ),
    ),
    "record": (
        0.01,
        _split("Write one line of JSON with the keys name, job and mood for {name}, a {good} {person}."),
        _split('{"name": "'),
    ),
    "rhyme": (
        0.01,
        _split("Write one {mood} rhyming line about the {weather}. | Write one {mood} rhyming line about a {animal}."),
        _split(" | The {animal} | The {weather} | My {object}"),
    ),
}
"""Kind of text to its share, its instructions, and its openings."""


_SUBJECT = re.compile(r"\{(product|show|venue|reading)\}")


def fill(template: str, drawn: dict[str, str], rng: np.random.Generator) -> str:
    """Return ``template`` with words for the names in braces: those of ``drawn``, which new ones join."""

    def word(match: re.Match[str]) -> str:
        name = match[1]
        if name not in drawn:
            words = WORDS[name.rstrip("2")]
            drawn[name] = words[rng.integers(len(words))]
        return drawn[name]

    return re.sub(r"\{(\w+)\}", word, template)


def draw(rng: np.random.Generator) -> tuple[str, str]:
    """Return an instruction and an opening, which is empty for a fifth of the texts."""
    names = list(KINDS)
    shares = np.array([KINDS[name][0] for name in names])
    kind = names[rng.choice(len(names), p=shares / shares.sum())]
    _, instructions, openings = KINDS[kind]
    drawn: dict[str, str] = {}
    instruction = fill(instructions[rng.integers(len(instructions))], drawn, rng)
    if kind not in ("record", "rhyme"):
        place = rng.random()
        if place < 0.2:
            return instruction, ""
        # An opening must not be about another thing than the instruction.
        fitting = tuple(o for o in openings if set(_SUBJECT.findall(o)) <= drawn.keys())
        openings = GENERAL if place < 0.4 else fitting
    opening = fill(openings[rng.integers(len(openings))], drawn, rng)
    return instruction, opening[:1].upper() + opening[1:]
