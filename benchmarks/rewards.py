"""What rewards cost, and how good the two that guess are.

    python -m benchmarks.rewards                     # microseconds a text, and a candidate; half a minute
    python -m benchmarks.rewards --ratings hutto_ICWSM_2014.tar.gz
    python -m benchmarks.rewards --ratings hutto_ICWSM_2014.tar.gz --pronunciations cmudict.dict

The first makes the table of costs in ``docs/rewards.md``. With the 23,703 sentences that people
rated for VADER it trains a classifier on four fifths and reports the accuracy on the last fifth
beside VADER's; they are in the sdist of vaderSentiment (``additional_resources``), which
``pip download --no-deps --no-binary :all: vaderSentiment==3.3.2`` fetches. With a pronouncing
dictionary in CMUdict's format it reports how often rhymes and syllables by spelling are right.
"""

from __future__ import annotations

import argparse
import itertools
import re
import tarfile
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from textgen_env.prompts import make_prompts
from textgen_env.rewards import REWARDS, Generation, Reward, make_reward
from textgen_env.rewards.classifier import train_classifier
from textgen_env.rewards.lexical import count_syllables, split_words
from textgen_env.rewards.rhyme import rime

BATCH, CANDIDATES, TOKENS = 64, 16, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratings", help="hutto_ICWSM_2014.tar.gz")
    parser.add_argument("--pronunciations", help="a dictionary in CMUdict's format")
    chosen = parser.parse_args()
    if not chosen.ratings:
        costs()
        return
    rated = rated_sentences(Path(chosen.ratings))
    accuracies(rated)
    if chosen.pronunciations:
        spelling(rated, Path(chosen.pronunciations))


# --- costs


def costs() -> None:
    """Print the table of microseconds a text, and a candidate of the running score."""
    texts = random_texts(np.random.default_rng(0))
    generations = [
        Generation("The weather was", text, ids=(1,), logprobs=(-1.0,), reference="cold and wet, but the soup was good")
        for text in texts
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "classifier.json")
        train_classifier([("ab"[i % 2], text) for i, text in enumerate(texts)], file, min_count=1)
        print("| reward | microseconds a text | running score: microseconds a candidate |\n|---|---|---|")
        for name in sorted(REWARDS):
            if name in ("shaped", "transformers"):  # what they cost is what they are made of
                continue
            reward = make_reward({"name": name, **needed(name, file)})
            text_cost = 1e6 * best_of(5, lambda reward=reward: reward(generations)) / BATCH
            print(f"| {name} | {text_cost:,.1f} | {running_cost(reward, texts)} |")


def needed(name: str, file: str) -> dict[str, object]:
    settings: dict[str, dict[str, object]] = {
        "keywords": {"words": ["sun", "rain", "soup", "train", "letter"]},
        "regex": {"pattern": r"\bgood \w+ing\b"},
        "json": {"schema": {"type": "object", "required": ["name"]}},
        "classifier": {"file": file},
    }
    return settings.get(name, {})


def random_texts(rng: np.random.Generator) -> list[str]:
    """Return texts of about 32 tokens: words of the openings, a tenth of them with a feeling."""
    plain = sorted({word for prompt in make_prompts() for word in prompt.text.split()})
    charged = ["good", "great", "bad", "sad", "love", "terrible", "happy", "awful", "nice", "not", "very", "but"]
    words = [*rng.choice(plain, 9 * BATCH * TOKENS), *rng.choice(charged, BATCH * TOKENS)]
    ends = rng.choice(["", "", "", "", "", ",", ".", "!", ".\n"], len(words))
    pieces = rng.permutation([f" {word}{end}" for word, end in zip(words, ends, strict=True)])
    return ["".join(pieces[i * 26 : (i + 1) * 26]) for i in range(BATCH)]


def running_cost(reward: Reward, texts: Sequence[str]) -> str:
    """Return the microseconds a candidate: 64 rows halfway through, 16 continuations never seen before each."""
    running = reward.running()
    if running is None:
        return "none"
    seconds = []
    for attempt in range(5):
        states, continuations = [], []
        for row, text in enumerate(texts):
            cut = len(text) // 2 - attempt
            start = running.start("The weather was", "cold and wet, but the soup was good", {})
            states.append(running.extend(start, text[:cut]))
            others = [texts[(row + i * 3 + attempt) % BATCH] for i in range(CANDIDATES)]
            continuations.append([text[:cut] + other[: other.index(" ", 1 + 5)] for other in others])
        begin = time.perf_counter()
        for state, completions in zip(states, continuations, strict=True):
            running.lookahead(state, completions)
        seconds.append(time.perf_counter() - begin)
    return f"{1e6 * float(np.median(seconds)) / (BATCH * CANDIDATES):.1f}"


def best_of(times: int, work: Callable[[], object]) -> float:
    """Return the seconds of the fastest run, after one that warms up."""
    work()
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


# --- accuracy


def rated_sentences(archive: Path) -> list[tuple[float, str, str]]:
    """Return (mean rating, sentence, source) of every sentence that people rated."""
    rated = []
    with tarfile.open(archive) as files:
        for name in sorted(files.getnames()):
            if name.endswith("_GroundTruth.txt"):
                content = files.extractfile(name)
                assert content is not None
                for line in content.read().decode("utf-8", "replace").splitlines():
                    _, rating, sentence = line.split("\t", 2)
                    rated.append((float(rating), sentence, Path(name).name.split("_")[0]))
    return rated


def accuracies(rated: Sequence[tuple[float, str, str]]) -> None:
    """Print the share of held-out sentences whose sign the classifier and VADER get right."""
    order = np.random.default_rng(0).permutation(len(rated))
    held_out, rest = order[: len(order) // 5], order[len(order) // 5 :]
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "classifier.json")
        examples = [("positive" if rated[i][0] > 0 else "negative", rated[i][1]) for i in rest]
        train_classifier(examples, file)
        generations = [Generation("", rated[i][1]) for i in held_out]
        classifier = make_reward({"name": "classifier", "file": file})(generations) > 0.5
    vader = make_reward("sentiment")(generations) > 0
    positive = np.array([rated[i][0] > 0 for i in held_out])
    sources = np.array([rated[i][2] for i in held_out])
    print(f"{len(rated)} sentences, {len(held_out)} held out")
    print("| source | held out | classifier | VADER |\n|---|---|---|---|")
    for source in (None, *np.unique(sources)):
        where = np.ones(len(sources), bool) if source is None else sources == source
        shares = [float((answer == positive)[where].mean()) for answer in (classifier, vader)]
        print(f"| {source or 'all'} | {where.sum()} | {shares[0]:.3f} | {shares[1]:.3f} |")


def spelling(rated: Sequence[tuple[float, str, str]], dictionary: Path) -> None:
    """Print how often syllables and rhymes by spelling agree with the dictionary, on frequent words."""
    sounds: dict[str, list[list[str]]] = defaultdict(list)
    for line in dictionary.read_text(encoding="utf-8").splitlines():
        word, *phones = line.split("#")[0].split()
        sounds[re.sub(r"\(\d\)$", "", word)].append(phones)
    counts = Counter(word for _, sentence, _ in rated for word in split_words(sentence))
    known = [w for w, _ in counts.most_common() if w in sounds and w.isascii() and w.isalpha() and len(w) > 1][:3000]
    syllables = {word: {sum(p[-1].isdigit() for p in phones) for phones in sounds[word]} for word in known}
    right = np.mean([count_syllables(word) in syllables[word] for word in known])
    print(f"\nsyllables of the {len(known)} most frequent words: {right:.3f} right")
    single = [word for word in known if 1 in syllables[word]]
    for title, words in (("all of them", known), ("words of one syllable", single)):
        by_sound = {word: {sound_from_stress(phones) for phones in sounds[word]} for word in words}
        by_spelling = {word: rime(word) for word in words}
        outcomes: Counter[tuple[bool, bool]] = Counter()
        for word, other in itertools.combinations(words, 2):
            guessed = by_spelling[word] == by_spelling[other] != ""
            outcomes[guessed, bool(by_sound[word] & by_sound[other])] += 1
        hits = outcomes[True, True]
        precision, recall = hits / (hits + outcomes[True, False]), hits / (hits + outcomes[False, True])
        print(f"rhymes among {title} ({len(words)}): precision {precision:.2f}, recall {recall:.2f}")


def sound_from_stress(phones: Sequence[str]) -> str:
    """Return the phones from the last stressed vowel on: what perfect rhymes share."""
    vowels = [i for i, phone in enumerate(phones) if phone[-1].isdigit()]
    stressed = [i for i in vowels if phones[i][-1] in "12"] or vowels or [0]
    return " ".join(re.sub(r"\d", "", phone) for phone in phones[stressed[-1] :])


if __name__ == "__main__":
    main()
