"""What each token adds to the index of a text, by what the text had before.

fitted weights of the features          ->  take_weights  ->  tables, one for each fold
a prefix, ids that could come next      ->  added         ->  what each would add to z
prefixes of texts, their candidates     ->  sums          ->  z and length so far, what candidates add to both
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from agents.text_dqn.echoes import Echoes
from agents.text_dqn.features import (
    FOLDS,
    LONGEST,
    NUMBERED,
    OCCURRENCES,
    PAIRS,
    RESIDUES,
    JudgedTexts,
    KnownTokens,
    Past,
    TokenKinds,
    layout,
    pair_index,
    texts_of_tokens,
)
from agents.text_dqn.ridge import Design, Fitted
from agents.text_dqn.spelling import CLASSES, CLASSINGS, COUNTED, LETTERED, classes, counted, folded
from textgen_env.models.base import LanguageModel
from textgen_env.policies import Floats


class Contributions(nn.Module):
    """Tables of what tokens add to z, by fold; the last one is the mean of all. All are buffers, zero at first.

    Args:
        vocab_size: V.
        max_new_tokens: T.
    """

    characters: torch.Tensor
    ends: torch.Tensor
    stops: torch.Tensor
    classes: torch.Tensor
    counted: torch.Tensor
    folded: torch.Tensor
    bias: torch.Tensor
    token: torch.Tensor
    first: torch.Tensor
    late: torch.Tensor
    middle: torch.Tensor
    pair: torch.Tensor
    repeat: torch.Tensor
    opening: torch.Tensor
    last: torch.Tensor
    echo: torch.Tensor
    initials: torch.Tensor
    endings: torch.Tensor
    sizes: torch.Tensor
    count: torch.Tensor
    acrostic: torch.Tensor

    def __init__(self, vocab_size: int, max_new_tokens: int) -> None:
        super().__init__()
        self.vocab_size, self.max_new_tokens = vocab_size, max_new_tokens
        shapes = {
            "characters": (vocab_size,),  # of each token
            "ends": (vocab_size,),  # 1 for end tokens
            "stops": (vocab_size,),  # 1 for others that ended each text in which they came; see ``find_stops``
            "counted": (vocab_size, COUNTED + LETTERED),  # 1 for what each has
            "bias": (FOLDS + 1,),
            "token": (FOLDS + 1, vocab_size),
            "first": (FOLDS + 1, vocab_size),
            "late": (FOLDS + 1, vocab_size),  # behind ``middle`` tokens, beside that
            "middle": (),  # tokens, half of the mean length of the texts
            "pair": (FOLDS + 1, PAIRS),
            "repeat": (FOLDS + 1,),  # of a pair that the text had before
            "opening": (FOLDS + 1, vocab_size),
            "last": (FOLDS + 1, vocab_size),
            "echo": (FOLDS + 1, 2, LONGEST + 1),  # at every occurrence, and beside that at the first; by length
            **dict.fromkeys(CLASSINGS, (FOLDS + 1, CLASSES**2)),  # of words, by the one before
            "count": (FOLDS + 1, COUNTED + LETTERED, OCCURRENCES),  # of the first, the second, ... that can be counted
            "acrostic": (FOLDS + 1, NUMBERED, CLASSES),  # of the first, the second, ... word, by initial
        }
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32))
        self.register_buffer("classes", torch.zeros(len(CLASSINGS), vocab_size, dtype=torch.long))
        self.register_buffer("folded", torch.arange(vocab_size))

    @property
    def kinds(self) -> TokenKinds:
        return TokenKinds(self.classes, self.counted, self.folded)

    def describe(self, language_model: LanguageModel, end_ids: Iterable[int]) -> None:
        """Read how many characters each token has, of which class it is and what of it is counted.

        Args:
            end_ids: Tokens that end a text.
        """
        texts = texts_of_tokens(language_model)
        self.characters.copy_(torch.tensor([float(len(text)) for text in texts]))
        words = classes(texts)
        self.classes.copy_(torch.from_numpy(words))
        self.counted.copy_(torch.from_numpy(counted(texts, words[0])))
        self.folded.copy_(torch.from_numpy(folded(texts)))
        self.ends.zero_()
        self.ends[list(end_ids)] = 1.0

    def find_stops(self, texts: JudgedTexts) -> None:
        """Take tokens that only ever came last, and before the budget was spent, for stop strings."""
        last = np.arange(texts.tokens.shape[1]) == texts.lengths[:, None] - 1
        inside = (np.arange(texts.tokens.shape[1]) < texts.lengths[:, None]) & ~last
        early = last & texts.finished[:, None] & (texts.lengths[:, None] < self.max_new_tokens)
        often = [np.bincount(texts.tokens[where], minlength=self.vocab_size) for where in (early, inside)]
        self.stops.copy_(torch.from_numpy((often[0] > 0) & (often[1] == 0)))

    def goes_on(self, ids: torch.Tensor) -> torch.Tensor:
        """Return 0 where ids end a text, by themselves, and 1 elsewhere."""
        return (1.0 - at(self.ends, ids)) * (1.0 - at(self.stops, ids))

    def sums(
        self, fold: torch.Tensor, tokens: torch.Tensor, steps: torch.Tensor, candidates: torch.Tensor, echoes: Echoes
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return z and length of the prefixes, (B, S), and what candidates add to both, (B, S, k).

        Args:
            fold: (B,) whose weights to use; ``FOLDS`` for the mean of all.
            tokens: (B, T) generated ids, from the first on. What follows a prefix is not read.
            steps: (B, S) how many of them each prefix has.
            candidates: (B, S, k) ids.
            echoes: Which of them occur in the prompt.
        """
        places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        past = Past.of(tokens, self.kinds)
        own = self.added(fold, tokens[..., None], echoes.own[..., None], places, tokens, past).squeeze(-1)
        index = self.bias[fold].unsqueeze(-1) + _of_prefixes(own, steps)
        length = _of_prefixes(at(self.characters, tokens), steps)
        more = self.added(fold, candidates, echoes.candidates, steps, tokens, past)
        return index, length, more, at(self.characters, candidates)

    def added(
        self,
        fold: torch.Tensor,
        ids: torch.Tensor,
        echoes: torch.Tensor,
        steps: torch.Tensor,
        tokens: torch.Tensor,
        past: Past,
    ) -> torch.Tensor:
        """Return what ids (B, S, c) add to z after prefixes of ``steps`` (B, S) tokens, whose ``past`` is given."""
        last = torch.where(self.is_end(steps, ids), at(self.last, fold.view(-1, 1, 1) * self.vocab_size + ids), 0.0)
        fold, steps = fold.view(-1, 1, 1), steps.unsqueeze(-1)
        own = self._by_itself(fold, ids, echoes, steps, past)
        return own + last + self._by_last(fold, ids, steps, tokens, past) + self._by_count(fold, ids, steps, past)

    def _by_itself(
        self, fold: torch.Tensor, ids: torch.Tensor, echoes: torch.Tensor, steps: torch.Tensor, past: Past
    ) -> torch.Tensor:
        """Return what ids add wherever they are, where they occur first, and where they come late."""
        own = fold * self.vocab_size + ids
        echo = fold * 2 * (LONGEST + 1) + at(self.characters, ids).long().clamp(max=LONGEST)
        always = at(self.token, own) + torch.where(echoes, at(self.echo, echo), 0.0)
        first = at(self.first, own) + torch.where(echoes, at(self.echo, echo + LONGEST + 1), 0.0)
        late = torch.where(steps >= self.middle, at(self.late, own), 0.0)
        return always + torch.where(_since(past.first, ids) < steps, 0.0, first) + late

    def _by_last(
        self, fold: torch.Tensor, ids: torch.Tensor, steps: torch.Tensor, tokens: torch.Tensor, past: Past
    ) -> torch.Tensor:
        """Return what ids add behind the last token and the last word, or as the first ones."""
        before = tokens.gather(1, (steps.squeeze(-1) - 1).clamp(min=0)).unsqueeze(-1)
        pair = pair_index(at(self.folded, before), at(self.folded, ids))
        repeated = _since(past.pairs, pair) < steps - 1
        added = at(self.pair, fold * PAIRS + pair) + torch.where(repeated, at(self.repeat, fold), 0.0)
        added = torch.where(steps > 0, added, at(self.opening, fold * self.vocab_size + ids))
        for kind, of, last in zip(CLASSINGS, self.classes, past.words, strict=True):
            both = (fold * CLASSES + last.gather(1, steps.squeeze(-1)).unsqueeze(-1)) * CLASSES + at(of, ids)
            added = added + at(getattr(self, kind), both)
        return added

    def _by_count(self, fold: torch.Tensor, ids: torch.Tensor, steps: torch.Tensor, past: Past) -> torch.Tensor:
        """Return what ids add as the first, the second, ... of a kind, and as words of a number."""
        counts = past.counts.gather(1, steps.expand(-1, -1, past.counts.shape[2])).long()
        row = fold * counts.shape[2] + torch.arange(counts.shape[2], device=ids.device)
        next_ones = at(self.count, row * OCCURRENCES + counts).unsqueeze(-1)  # (B, S, COUNTED + LETTERED, 1)
        word = fold * NUMBERED + counts[..., :1].clamp(max=NUMBERED - 1)
        of_words = at(self.acrostic, word * CLASSES + at(self.classes[0], ids))
        return (functional.embedding(ids, self.counted) @ next_ones).squeeze(-1) + of_words

    def is_end(self, steps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return where ids (B, S, c) end texts of ``steps`` (B, S) tokens."""
        return (steps.unsqueeze(-1) >= self.max_new_tokens - 1) | (self.goes_on(ids) == 0)

    def take_weights(self, design: Design, fitted: Fitted, known: KnownTokens) -> Floats:
        """Fill the tables of contributions; return the weights of the marks, their mean over the folds."""
        begin, end = layout(self.vocab_size)
        weights = np.concatenate([fitted.weights, fitted.weights.mean(0, keepdims=True)]) * design.scales
        biases = np.append(fitted.biases, fitted.biases.mean())
        sparse = np.zeros((FOLDS + 1, end))
        sparse[:, design.used] = design.parts(weights)[0]
        of = dict(zip(begin, np.split(sparse, list(begin.values())[1:], 1), strict=True))
        dense = {
            kind: weights[:, columns].astype(np.float32) for kind, columns in design.groups.items() if kind not in begin
        }
        of["token"] += dense["vector"] @ known.vectors.T + dense["spelling"] @ known.spelling.T
        of["first"] += dense["first_spelling"] @ known.spelling.T
        of["late"] += dense["late_vector"] @ known.late_vectors.T + dense["late_spelling"] @ known.traits.T
        of["count"] = np.concatenate([of["count"], of.pop("letter")], 1)
        alike = of.pop("alike")
        for number, kind in enumerate(CLASSINGS):
            of[kind][:, CLASSES + 1 :: CLASSES + 1] += alike[:, number, None]  # a class twice, but not that of no word
        for kind, values in {**of, "bias": biases}.items():
            table = getattr(self, kind)
            table.copy_(torch.from_numpy(values).view(table.shape))
        return np.asarray(dense["length"][-1])


def at(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the entries of ``values`` (n,) at any indices: several times as fast as plain indexing."""
    return values.take(index)


def _since(first: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the places of ``first`` (B, RESIDUES) where ids (B, S, c) occur first; see ``first_occurrences``."""
    return first.gather(1, (ids % RESIDUES).flatten(1)).view(ids.shape)


def _of_prefixes(added: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Return the sums of (B, T) numbers over the first ``steps`` (B, S) of them."""
    return functional.pad(added.cumsum(1), (1, 0)).gather(1, steps)
