"""A learned running score: what a text is worth so far, from rewards of finished texts alone.

A judge says one number about a finished text. The scorer spreads it over the text: an index z, a
sum of contributions of what occurs in it, and a curve g from z to the reward.

    finished texts, rewards  ->  fit      ->  contributions, potentials
    a prefix, k candidates   ->  forward  ->  score (B, 1), candidate_scores (B, k)

The contributions are a ridge regression on sparse features, which need few texts: tokens, and those that occur
for the first time, or late; the first and the last token; pairs of neighbouring tokens, and of words by how they
begin, end and compare in length; pairs that are repeated; the first, the second, ... word, capital, digit, sign or
letter; the initials of the first, the second, ... word; tokens that the prompt has too; the length in characters.
Rare tokens share weights with others that are spelled alike or have similar embeddings. Judges differ in which of
these kinds matter, so each kind is shrunk by a factor of its own, chosen by predictions for texts that were left
out; the curve is fitted to such predictions. Where a judge saturates, both go through a logistic link. Where
nothing was learned every prefix is scored alike: a random judge.

The score of a prefix is the soft value beta log E[exp(g / beta)] over what the rest of the text will
add, if the language model writes on as it does on average after the last token: roughly what the
best possible policy would make of it. As a potential it moves no optimum, however wrong it is.

Source: return decomposition, Arjona-Medina et al. 2019, arXiv:1806.07857; single-index models,
Kakade et al. 2011, arXiv:1104.2018.
"""

from __future__ import annotations

import numpy as np
import torch

from agents.text_dqn.contributions import Contributions, at
from agents.text_dqn.echoes import Echoes
from agents.text_dqn.features import (
    FOLDS,
    JudgedTexts,
    KnownTokens,
    Past,
    TokenKinds,
    design_of,
    hats,
)
from agents.text_dqn.outlook import Course, Visited, course
from agents.text_dqn.ridge import (
    PENALTIES,
    Design,
    Fitted,
    Problem,
    bent,
    best_curve,
    correlates,
    cross_fit,
    penalties_up_to,
    weigh_groups,
)
from agents.text_dqn.spelling import CLASSINGS
from textgen_env.policies import Floats

GRID = (64, 48)
"""Values of z and of the length for which potentials are tabulated."""

AHEAD = 2
"""Tokens after the last one whose contributions depend on it; what comes later is taken as it is on average."""

FEW_VISITS = 2.0
"""Visits of a token at which half of what it lets expect is believed."""

LEAST_TEXTS = 50
"""Finished texts below which nothing is fitted."""

GROUPS = {
    **dict.fromkeys(("token", "first", "pair", "echo", "vector", "length"), 1.0),
    **dict.fromkeys(("opening", "last", *CLASSINGS, "alike", "count", "spelling", "first_spelling"), 0.3),
    **dict.fromkeys(("late", "late_vector", "late_spelling", "repeat", "letter", "acrostic"), 0.3),
}
"""Kinds of features, and the relevance that each begins with."""

WEIGH_AGAIN = 2.0
"""Their relevance is found anew when there are so many times as many texts."""

MOST_WEIGHED = 2_000
"""Texts that it is found on."""


class TextScorer(Contributions):
    """Scores of prefixes and of their candidates. All its state is buffers, so networks save and load it.

    Silent, with the same score everywhere, until ``fit``.

    Args:
        vocab_size: V.
        max_new_tokens: T.
    """

    penalty: torch.Tensor
    relevance: torch.Tensor
    weighed: torch.Tensor
    prefixes: torch.Tensor
    potential: torch.Tensor
    drift: torch.Tensor
    ahead: torch.Tensor
    persistence: torch.Tensor
    grid: torch.Tensor

    def __init__(self, vocab_size: int, max_new_tokens: int) -> None:
        super().__init__(vocab_size, max_new_tokens)
        shapes = {
            "penalty": (),  # of the last fit, 0 before the first
            "relevance": (len(GROUPS),),  # factor of each kind of feature
            "weighed": (),  # texts from which it was found
            "prefixes": (),  # 1 if prefixes that were judged help to predict finished texts
            "potential": (max_new_tokens + 1, *GRID),  # after t tokens, by the z and the length that are to be expected
            "drift": (2, max_new_tokens + 1),  # of z and of the length, still to come after t tokens
            "persistence": (2, max_new_tokens + 1),  # what a unit of either after t tokens is worth in the end
            "ahead": (FOLDS + 1, AHEAD, vocab_size),  # more than on average that follows a token, by the tokens left
            "grid": (2, 2),  # lowest value and step, of z and of the length
        }
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32))
        self.relevance.copy_(torch.tensor(list(GROUPS.values())))
        self.prefixes.fill_(1.0)
        self.silence()

    def silence(self) -> None:
        """Score every text alike."""
        self.potential.zero_()
        self.grid.fill_(1.0)

    # --- scoring

    @torch.no_grad()
    def forward(
        self,
        tokens: torch.Tensor,
        steps: torch.Tensor,
        candidates: torch.Tensor,
        echoes: Echoes | None = None,
        folds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scores of prefixes, (B, S, 1), and of the texts that each candidate leads to, (B, S, k).

        Args:
            tokens: (B, T) generated ids, from the first on. What follows a prefix is not read.
            steps: (B, S) how many of them each prefix has.
            candidates: (B, S, k) ids.
            echoes: Which of them occur in the prompt. None: none.
            folds: (B,) whose weights to use. None: the mean of all.
        """
        fold = torch.full_like(tokens[:, 0], FOLDS) if folds is None else folds
        echoes = echoes or Echoes.none(tokens, candidates)
        index, length, more, longer = self.sums(fold, tokens, steps, candidates, echoes)
        done, fold = self.is_end(steps, candidates), fold.view(-1, 1, 1)
        before, steps = tokens.gather(1, (steps - 1).clamp(min=0)).unsqueeze(-1), steps.unsqueeze(-1)
        after = torch.where(done, self.max_new_tokens, steps + 1)
        index, length = index.unsqueeze(-1), length.unsqueeze(-1)
        score = self._look_up(steps, index + self._expected(fold, before, steps), length)
        return score, self._look_up(after, index + more + self._expected(fold, candidates, after), length + longer)

    def _expected(self, fold: torch.Tensor, last: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Return what more than on average will be added to z after the last of ``steps`` tokens, (B, S, c)."""
        left = self.max_new_tokens - steps
        place = (fold * AHEAD + left.clamp(1, AHEAD) - 1) * self.vocab_size + last
        return torch.where((steps > 0) & (left > 0), at(self.ahead, place), 0.0)

    def _look_up(self, steps: torch.Tensor, index: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """Return the potential after ``steps`` tokens, bilinear in z and length; flat outside the table."""
        corners = []
        for axis, value in enumerate((index, length)):
            low, step = self.grid[axis].tolist()
            expected = at(self.persistence[axis], steps) * value + at(self.drift[axis], steps)
            place = ((expected - low) / step).clamp(0, GRID[axis] - 1)
            floor = place.floor().long().clamp(max=GRID[axis] - 2)
            corners.append((floor, place - floor))
        (i, a), (j, b) = corners
        values, corner = self.potential.view(-1), (steps * GRID[0] + i) * GRID[1] + j
        low_z = (1 - b) * at(values, corner) + b * at(values, corner + 1)
        high_z = (1 - b) * at(values, corner + GRID[1]) + b * at(values, corner + GRID[1] + 1)
        return (1 - a) * low_z + a * high_z

    # --- learning

    def fit(self, texts: JudgedTexts, known: KnownTokens, visited: Visited, beta: float) -> float:
        """Learn from texts and their rewards; return R2 on the texts that were left out.

        Args:
            texts: At least ``LEAST_TEXTS`` finished ones.
            known: Of the tokens.
            visited: Some states, under the language model's own probabilities.
            beta: The trade between reward and KL, reward units a nat.
        """
        if np.unique(texts.folds).size == 1:
            self.silence()
            return 0.0
        self.middle.fill_(texts.lengths[texts.finished].mean() // 2)
        self.find_stops(texts)
        if not self._learns_from_prefixes(texts, known):
            texts = texts.rows(texts.finished)
        design, marks = self._design(texts, known)
        design, fitted = self._fitted(design, texts)
        predicted, rewards = fitted.left_out[texts.finished], texts.rewards[texts.finished]
        if not correlates(predicted, rewards):
            self.silence()
            return 0.0
        of_length = self.take_weights(design, fitted, known)
        self._look_ahead(visited)
        curve = best_curve(fitted, texts.finished, texts.rewards)
        self._tabulate(curve, marks, of_length, fitted.index[texts.finished], visited, beta)
        return float(1 - ((rewards - predicted) ** 2).mean() / rewards.var())

    def _learns_from_prefixes(self, texts: JudgedTexts, known: KnownTokens) -> bool:
        """Return True if finished texts are predicted better with the prefixes that were judged than without.

        A mood can be heard in half a text, and half of a JSON object is none.
        """
        if self._is_due(texts) and not texts.finished.all():
            both = texts, texts.rows(texts.finished)
            errors = [self._as_before(self._design(some, known)[0], some)[1].error for some in both]
            self.prefixes.fill_(float(errors[0] < errors[1]))
        return bool(self.prefixes)

    def _design(self, texts: JudgedTexts, known: KnownTokens) -> tuple[Design, tuple[float, float]]:
        kinds = TokenKinds(*(of.cpu() for of in self.kinds))
        return design_of(texts, known, self.characters.cpu().numpy(), kinds, int(self.middle))

    def _is_due(self, texts: JudgedTexts) -> bool:
        """Return True if it is to be found anew what the judge cares about."""
        return bool(texts.finished.sum() >= WEIGH_AGAIN * float(self.weighed))

    def _as_before(self, design: Design, texts: JudgedTexts) -> tuple[Problem, Fitted]:
        """Return the features, as large as they were relevant, with the rewards, and their weights."""
        problem = Problem(design, texts.rewards, texts.folds, texts.finished)
        problem = problem.sized(**dict(zip(GROUPS, self.relevance.tolist(), strict=True)))
        strongest = 3 * float(self.penalty) or max(PENALTIES)
        return problem, cross_fit(problem, FOLDS, penalties_up_to(strongest))

    def _fitted(self, design: Design, texts: JudgedTexts) -> tuple[Design, Fitted]:
        """Return the features, as large as they are relevant, and their weights; note both for the next fit."""
        problem, fitted = self._as_before(design, texts)
        if self._is_due(texts):
            count = len(texts.rewards)
            some = np.linspace(0, count - 1, min(count, MOST_WEIGHED)).astype(np.int64)
            relevance = weigh_groups(problem.rows(some), FOLDS, fitted.penalty, fitted.weights)
            problem = problem.sized(**relevance)
            fitted = cross_fit(problem, FOLDS, [fitted.penalty], fitted.weights)
            self.relevance.copy_(torch.tensor([relevance[group] for group in GROUPS]))
            self.weighed.fill_(texts.finished.sum())
        self.penalty.fill_(fitted.penalty)
        return problem.design, bent(problem, FOLDS, fitted)

    def _tabulate(
        self,
        curve: tuple[Floats, Floats],
        marks: tuple[float, float],
        of_length: Floats,
        predicted: Floats,
        visited: Visited,
        beta: float,
    ) -> None:
        """Tabulate the potential: the soft mean of the curve over a normal law of what is still to come."""
        courses = self._courses(visited)
        deviations = [of.deviation() for of in courses]
        for axis, of in enumerate(courses):
            drift = of.still_to_come() - (of.persistence - 1) * of.so_far
            self.persistence[axis], self.drift[axis] = torch.from_numpy(of.persistence), torch.from_numpy(drift)
        mean, deviation = marks
        length = np.linspace(max(0.0, mean - 4 * deviation), mean + 4 * deviation, GRID[1])
        added = hats(length, marks) @ of_length
        reach = 0.25 * (np.ptp(predicted) + np.ptp(added)) + 1e-6
        index = np.linspace(predicted.min() - added.max() - reach, predicted.max() - added.min() + reach, GRID[0])
        nodes, shares = np.polynomial.hermite_e.hermegauss(7)
        shares = shares / shares.sum()
        total = np.full(self.potential.shape, -np.inf)  # log E[exp(g / beta)]
        for node_c, share_c in zip(nodes, shares, strict=True):
            lengths = length + deviations[1][:, None] * node_c  # (T + 1, GRID[1])
            at_length = index[:, None] + (hats(lengths, marks) @ of_length)[:, None, :]
            for node_z, share_z in zip(nodes, shares, strict=True):
                z = at_length + deviations[0][:, None, None] * node_z
                total = np.logaddexp(total, np.log(share_z * share_c) + np.interp(z, *curve) / beta)
        self.potential.copy_(torch.from_numpy(beta * total))
        for axis, values in enumerate((index, length)):
            self.grid[axis] = torch.tensor([values[0], values[1] - values[0]])

    @torch.no_grad()
    def _look_ahead(self, visited: Visited) -> None:
        """Find what each token lets expect of the next ones: value iteration over the states that follow it."""
        tokens, there = visited.tokens, visited.acted[:, 1:]
        steps = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        last, candidates = tokens[:, :-1][there], visited.candidates[:, 1:][there]  # (n,), (n, k)
        mu, goes_on = visited.probabilities[:, 1:][there], self.goes_on(candidates)
        visits = torch.bincount(last, minlength=self.vocab_size)
        past = Past.of(tokens, self.kinds)
        for fold in range(FOLDS + 1):
            own, echoes = torch.full_like(tokens[:, 0], fold), visited.echoes.candidates
            more = self.added(own, visited.candidates, echoes, steps, tokens, past)[:, 1:][there]
            value = torch.zeros_like(self.characters)
            for depth in range(AHEAD):
                gain = (mu * (more + goes_on * at(value, candidates))).sum(-1)
                sums = torch.zeros_like(value).index_add_(0, last, gain - gain.mean())
                value = sums / (visits + FEW_VISITS)
                self.ahead[fold, depth] = value

    @torch.no_grad()
    def _courses(self, visited: Visited) -> tuple[Course, Course]:
        """Return how the language model adds to z and to the length."""
        tokens, mu = visited.tokens, visited.probabilities
        steps = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        z, length, more, longer = self.sums(visited.folds, tokens, steps, visited.candidates, visited.echoes)
        fold, after = visited.folds.view(-1, 1, 1), steps.unsqueeze(-1) + 1
        ahead = self._expected(fold, tokens.unsqueeze(-1), after).squeeze(-1)
        ahead = ahead - (mu * self._expected(fold, visited.candidates, after)).sum(-1)
        goes_on = self.goes_on(visited.candidates).double()
        of_z = course(z, more, ahead, goes_on, visited, self.max_new_tokens)
        return of_z, course(length, longer, torch.zeros_like(ahead), goes_on, visited, self.max_new_tokens)
