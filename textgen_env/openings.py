"""Short openings of sentences, written for this package, that may turn out well or badly.

Each topic holds templates with one slot and its fillers. Openings of one template resemble
each other, so splits into train, validation and test keep a template whole.
"""

from __future__ import annotations

OPENINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "reviews": {
        "I watched the {} last night, and": (
            "new detective film",
            "second season",
            "live recording",
            "remake",
            "long documentary",
        ),
        "The {} in this book": ("first chapter", "narrator", "map", "dialogue", "last page"),
        "After two weeks with this {}, I": ("phone", "backpack", "coffee machine", "bicycle", "keyboard"),
        "The acting in the {} was": ("school play", "opening scene", "pilot episode", "radio drama", "sequel"),
        "What struck me about the {} was": (
            "exhibition",
            "concert",
            "museum tour",
            "puppet show",
            "new album",
        ),
        "We gave the {} three stars because": (
            "guest house",
            "boat trip",
            "video game",
            "garden tool",
            "cookbook",
        ),
    },
    "diary": {
        "Dear diary, {} I": ("today", "this morning", "on Sunday", "just before lunch", "after the rain"),
        "I woke up at {} and": ("five", "noon", "first light", "half past six", "the sound of the bins"),
        "My {} called today to say": ("sister", "landlord", "old teacher", "cousin", "dentist"),
        "It has been {} since I": (
            "a year",
            "ten days",
            "one whole summer",
            "three birthdays",
            "a long time",
        ),
        "I finally opened the {} that": ("letter", "parcel", "drawer", "email", "old suitcase"),
        "Before going to bed I thought about {} and": (
            "the interview",
            "my brother",
            "the new house",
            "what you said",
            "next week",
        ),
    },
    "stories": {
        "Once there was a {} who": ("clockmaker", "small dragon", "lighthouse keeper", "girl", "tired king"),
        "The {} opened the door and": ("stranger", "old woman", "boy", "guard", "cat"),
        "At the edge of the {} stood": ("forest", "village", "frozen lake", "desert", "quarry"),
        "Nobody in the town knew why the {}": (
            "bell rang",
            "river turned",
            "baker left",
            "lights went out",
            "horse came back",
        ),
        "She found a {} under the": ("silver key", "photograph", "tiny door", "folded map", "blue stone"),
        "When the {} arrived, everybody": ("circus", "ship", "tax collector", "first snow", "new neighbour"),
    },
    "work": {
        "The {} with the team this morning": ("meeting", "call", "workshop", "review", "breakfast"),
        "My new {} is": ("manager", "desk", "schedule", "contract", "office mate"),
        "The customer wrote that the {}": (
            "delivery",
            "invoice",
            "repair",
            "software update",
            "phone line",
        ),
        "On my first day as a {} I": ("nurse", "carpenter", "bus driver", "teacher", "programmer"),
        "The {} project ended last week, and": ("bridge", "research", "website", "housing", "translation"),
        "When they read out the {}, our department": (
            "results",
            "budget",
            "names",
            "survey",
            "plan for spring",
        ),
    },
    "travel": {
        "The train to {} was": ("the coast", "Lisbon", "the capital", "Kyoto", "the mountains"),
        "Our guide in {} told us": ("the old town", "Nairobi", "the cave", "the harbour", "Quito"),
        "From the {} window we saw": ("hotel", "plane", "bus", "attic", "ferry"),
        "The night before the {} we": ("flight", "hike", "crossing", "border", "long drive"),
        "Looking back, the {} trip": ("camping", "winter", "school", "canoe", "business"),
        "At the {} they asked us to": ("airport", "campsite", "station", "embassy", "car rental"),
    },
    "food": {
        "The {} at the corner place tasted": ("soup", "dumplings", "bread", "lentil curry", "apple cake"),
        "My grandmother's {} always": ("kitchen", "stew", "pancakes", "Sunday table", "recipe book"),
        "The waiter brought the {} and": ("menu", "bill", "fish", "second plate", "wrong dessert"),
        "I tried to cook {} for the first time, and": (
            "rice",
            "a whole pumpkin",
            "noodles",
            "risotto",
            "for twenty people",
        ),
        "Lunch at the {} today was": ("canteen", "harbour", "new bakery", "hospital", "market"),
        "The smell of {} in the morning": ("coffee", "toast", "onions", "oranges", "the spice shop"),
    },
    "weather": {
        "The {} came early this year, and": ("snow", "rain", "heat", "spring", "fog"),
        "After the {} the streets were": ("storm", "parade of clouds", "thaw", "long drought", "hail"),
        "The forecast for {} said": ("Friday", "the weekend", "the islands", "the harvest", "tomorrow"),
        "A {} wind blew through": ("cold", "warm", "dry", "western", "sudden"),
        "By {} the sky over the valley": ("evening", "dawn", "midday", "October", "the time we left"),
        "We were sitting in the {} when the clouds": ("garden", "stadium", "boat", "car", "open-air cinema"),
    },
    "people": {
        "My neighbour, a {}, is": (
            "retired pilot",
            "music student",
            "young father",
            "beekeeper",
            "night nurse",
        ),
        "The children in the {} were": ("park", "back row", "choir", "swimming pool", "waiting room"),
        "When I met the {} again, he": ("painter", "captain", "boy from school", "old dentist", "goalkeeper"),
        "Everyone says that the {} twins": ("Parker", "baker's", "older", "Moreno", "tall"),
        "The doctor looked at the {} and": ("X-ray", "clock", "little boy", "test results", "bandage"),
        "To my {}, I want to say that": ("parents", "teammates", "first boss", "daughter", "old friends"),
    },
}
"""Topic to template to fillings."""
