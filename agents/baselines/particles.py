"""Particles: n rows write one text, and those that turn out well are copied.

Each row draws from the language model tilted by Q, and has a weight. A step multiplies it by

    exp((r + V' - Q) / beta)

which a perfect Q makes 1. Where the weights of a text's unfinished rows are too uneven, these are drawn
anew by weight (forked); when all have ended, one is drawn. The last step uses the true reward, so the
text follows the best possible policy, mu(text) exp(R / beta) / Z, as n grows, whatever Q is. With Q = 0
nothing happens before the end, which is best-of-n with weights in place of the maximum.

    prompts (P)  ->  P n rows, one forward a step  ->  weights (n,), log Z  ->  a text a prompt

Z estimates E_mu[exp(R / beta)] without bias, so beta E[log Z] is at most J of the text that is
drawn: a certified value, for which no KL is estimated.

Few rows are better used by ``pick="best"``: they stay independent, and the text with the largest weight is
taken. That is best-of-n of the tilted policy, by R - beta log(pi / mu). A choice among n independent texts
has a KL of at most log n - (n - 1) / n, so

    beta E[max_i log w_i] - beta (log n - (n - 1) / n)  <=  J.

Sources: Zhao et al. 2024, arXiv:2404.17546 (twisted sequential Monte Carlo); Andrieu, Doucet and
Holenstein 2010 (the first bound, by their extended space); Beirami et al. 2024, arXiv:2401.01879 (the second).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from agents.baselines.planning import PLANNING_AGENTS, ROWS, Ids
from agents.baselines.values import Tilted, ValuePlanner, beginnings
from textgen_env.config import check_at_least, check_one_of
from textgen_env.errors import ConfigError
from textgen_env.models.base import Rows
from textgen_env.policies import Floats, sample
from textgen_env.prompts import Prompt
from textgen_env.rewards.base import Generation, Reward
from textgen_env.vector_env import TextGenVectorEnv

TRUSTS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
"""Factors on Q that ``temper`` tries; 0 is weighted best-of-n."""

THRESHOLDS = (0.5, 0.9, 0.25, 0.0)
"""Thresholds of resampling that ``temper`` tries."""

LEAD = 0.05
"""Betas by which picking the best must be ahead: about what even spread and resampling give to drawing by weight."""

FEW = 4
"""Rows of a text up to which the best of independent ones is picked, where nobody has tempered."""

PICKS = ("weight", "best")
"""How one of the texts is picked: drawn by weight, or the one with the largest."""


def usual_pick(n: int, judge: bool) -> str:
    """Return how one of ``n`` texts is picked where values are learned, and so rough, and ``temper`` has not chosen.

    Texts that nobody judges are weighted by the values alone: the best of them would be that of their noise.
    """
    return "best" if judge and n <= FEW else "weight"


@dataclass(frozen=True)
class WeightedTexts:
    """The n texts that were written for one prompt, and the one of them that was picked."""

    prompt: str
    completions: tuple[str, ...]  # n
    ids: tuple[Ids, ...]  # n, of the completions
    rewards: Floats  # (n,), NaN where the texts were not judged
    weights: Floats  # (n,), sum to 1
    logprobs: Floats  # (n,) nats, of the texts under the language model (whole vocabulary)
    chosen: int  # in 0..n-1
    log_z: float  # log of the estimate of E_mu[exp(R / beta)]
    value_at_least: float | None  # its mean bounds J from below, reward units; None where nothing was judged
    tokens: int  # generated, those of dropped rows included
    judge_calls: int  # finished texts that the reward was asked about
    resamplings: int

    @property
    def completion(self) -> str:
        """The text that was picked."""
        return self.completions[self.chosen]

    @property
    def reward(self) -> float:
        """Its reward, NaN where it was not judged."""
        return float(self.rewards[self.chosen])


@dataclass(frozen=True)
class Tempering:
    """A setting that was tried on validation prompts, and what it is worth there."""

    pick: str
    trust: float
    threshold: float
    values: Floats  # (repeats, prompts) lower bounds of J, reward units

    @property
    def value_at_least(self) -> float:
        """Their mean."""
        return float(self.values.mean())


@dataclass
class _Cloud:
    """G groups of n rows: row ``g n + i`` is row ``i`` of the text ``g``. N = G n."""

    generators: list[np.random.Generator]  # G
    log_weights: Floats  # (G, n)
    tilted: Tilted  # of all N rows; what ended rows have is not read
    prefix: npt.NDArray[np.int64]  # (N,) equal for rows of a group that hold the same text
    worth: Floats  # (N,) of the whole text: expected, or the reward of an ended one
    logprobs: Floats  # (N,) of ended texts
    ended: npt.NDArray[np.bool_]  # (N,)
    tokens: npt.NDArray[np.int64]  # (G,)
    judge_calls: npt.NDArray[np.int64]  # (G,)
    resamplings: npt.NDArray[np.int64]  # (G,)

    def copy_rows(self, src: Rows, dst: Rows) -> None:
        """Let rows ``dst`` be what rows ``src`` are."""
        for array in (*vars(self.tilted).values(), self.prefix, self.worth, self.ended):
            array[dst] = array[src]


@PLANNING_AGENTS.register("particles")
class ParticlesAgent(ValuePlanner):
    """Twisted sequential Monte Carlo: n weighted rows a text, resampled by systematic draws.

    As an agent it plans a text and emits its tokens; ``write`` returns all n texts with their weights.
    Each text has a stream of random numbers of its own, so it does not depend on its neighbours.

    Args:
        n: Rows a text, at least 1; each costs its tokens. With 1 it is the tilted policy itself.
        values, beta, trust, rows: See ``ValuePlanner``.
        threshold: Unfinished rows are resampled where their effective number is below this share of them,
            in [0, 1]; 0: never.
        pick: ``"weight"``: one of the texts is drawn by weight. ``"best"``: rows stay independent, whatever the
            threshold, and the text with the largest weight is taken.
        judge: Ask the reward about finished texts. Without it the last weight is left out: the texts
            follow the values alone, and nothing is certified.

    Raises:
        ConfigError: a value out of range, or values that cannot be had.
        CapacityError: n rows do not fit into memory.
    """

    def __init__(
        self,
        env: TextGenVectorEnv,
        seed: int | None = None,
        *,
        n: int = 8,
        values: object = None,
        beta: float | None = None,
        threshold: float = 0.5,
        trust: float = 1.0,
        pick: str = "weight",
        judge: bool = True,
        rows: int = ROWS,
    ) -> None:
        super().__init__(env, seed, n=n, values=values, beta=beta, trust=trust, rows=rows)
        self.threshold = threshold
        self.pick = pick
        self.judge = judge
        if not judge:
            self._episodes.reward = _Unjudged()

    @property
    def pick(self) -> str:
        """How one of the texts is picked, one of ``PICKS``."""
        return self._pick

    @pick.setter
    def pick(self, pick: str) -> None:
        check_one_of("pick", pick, PICKS)
        self._pick = pick

    @property
    def threshold(self) -> float:
        """The share of unfinished rows below which their effective number causes a resampling."""
        return self._threshold

    @threshold.setter
    def threshold(self, threshold: float) -> None:
        if not 0 <= threshold <= 1:
            raise ConfigError(f"threshold must be in [0, 1] (a share of the rows), got {threshold}")
        self._threshold = float(threshold)

    def write(
        self, prompts: Sequence[str | Prompt], so_far: Sequence[Sequence[int]] | None = None
    ) -> list[WeightedTexts]:
        """Return n weighted texts for each prompt, one of them picked.

        Args:
            so_far: Token ids with which the n texts of each prompt begin, unfinished. None: with none.

        Raises:
            PromptError: a prompt without tokens, or one that is too long.
            RewardError: the reward failed.
        """
        return self._weigh(beginnings(prompts, so_far))

    def temper(self, prompts: Sequence[str | Prompt], repeats: int = 4, seed: int = 0) -> list[Tempering]:
        """Set ``pick``, ``trust`` and ``threshold`` to those whose certified value is highest on ``prompts``.

        Trust is chosen for either pick, and then the threshold where texts are drawn by weight. Of settings that
        differ by less than two standard errors the one is taken whose values vary least: E[log Z] falls short of
        log E[Z] by about half its variance. The best is picked where it leads by ``LEAD`` on the same rows.

        Args:
            prompts: Others than those that the result is measured on.
            repeats: Texts a prompt and setting, each of n rows, at least 2; their random numbers are
                the same for all settings.

        Returns:
            Everything that was tried, the chosen setting first.

        Raises:
            ConfigError: without a judge, prompts, or enough repeats.
        """
        if not self.judge:
            raise ConfigError("tempering compares true rewards: it needs judge=True")
        check_at_least("repeats", repeats, 2)
        check_at_least("the number of prompts", len(prompts), 1)
        chosen, rng, repeated = (self.pick, self.trust, self.threshold), self._rng, list(prompts) * repeats
        own = self.threshold

        def written(pick: str, trust: float, threshold: float) -> list[WeightedTexts]:
            self.pick, self.trust, self.threshold, self._rng = pick, trust, threshold, np.random.default_rng(seed)
            return self.write(repeated)

        def tried_with(pick: str, trust: float, threshold: float, found: Sequence[WeightedTexts]) -> Tempering:
            values = [self.beta * text.log_z if pick == "weight" else text.value_at_least for text in found]
            return Tempering(pick, trust, threshold, np.array(values, np.float64).reshape(repeats, -1))

        def by_weight(trust: float, threshold: float) -> Tempering:
            return tried_with("weight", trust, threshold, written("weight", trust, threshold))

        try:
            drawn = [by_weight(trust, own) for trust in TRUSTS]
            trust = _best(drawn).trust
            drawn += [by_weight(trust, threshold) for threshold in THRESHOLDS if threshold != own]
            independent = {share: written("best", share, own) for share in TRUSTS}
            picked = [tried_with("best", share, own, found) for share, found in independent.items()]
            best = _best(picked)
            same_rows = tried_with("weight", trust, own, independent[trust])  # what a draw from them would be worth
            if best.value_at_least < same_rows.value_at_least + LEAD * self.beta:
                best = _best(drawn)
            chosen = best.pick, best.trust, best.threshold
        finally:
            (self.pick, self.trust, self.threshold), self._rng = chosen, rng
        return [best, *(found for found in (*drawn, *picked) if found is not best)]

    def _plan(self, texts: Sequence[tuple[Prompt, Ids]]) -> list[Ids]:
        found = self._weigh(texts)
        return [text.ids[text.chosen][len(ids) :] for text, (_, ids) in zip(found, texts, strict=True)]

    def _weigh(self, texts: Sequence[tuple[Prompt, Ids]]) -> list[WeightedTexts]:
        generators = self._rng.spawn(len(texts))
        found: list[WeightedTexts] = []
        for start in range(0, len(texts), self._at_a_time):
            part = slice(start, start + self._at_a_time)
            found += self._weigh_together(texts[part], generators[part])
        return found

    def _weigh_together(
        self, texts: Sequence[tuple[Prompt, Ids]], generators: list[np.random.Generator]
    ) -> list[WeightedTexts]:
        rows = self._start(texts).ravel()
        cloud, groups = self._cloud(rows, generators), len(texts)
        while (live := rows[~cloud.ended]).size:
            self._advance(cloud, live)
            self._resample(cloud)
        weights, log_sum = _normalised(cloud.log_weights)
        log_z = log_sum - math.log(self.n)
        of_group = rows.reshape(groups, -1)
        return [self._result(cloud, g, of_group[g], weights[g], float(log_z[g])) for g in range(groups)]

    def _cloud(self, rows: Rows, generators: list[np.random.Generator]) -> _Cloud:
        groups, tilted = len(generators), self._tilted(rows)
        counts = np.zeros((3, groups), np.int64)
        return _Cloud(
            generators=generators,
            log_weights=tilted.worth.reshape(groups, -1) / self.beta,
            tilted=tilted,
            prefix=rows // self.n,
            worth=tilted.worth,
            logprobs=np.zeros(len(rows)),
            ended=np.zeros(len(rows), bool),
            tokens=counts[0],
            judge_calls=counts[1],
            resamplings=counts[2],
        )

    def _advance(self, cloud: _Cloud, live: Rows) -> None:
        """Let the rows ``live`` write a token each, and update their weights."""
        tilted, groups = cloud.tilted, live // self.n
        actions = self._draw(cloud, live)
        expected = tilted.score[live] + tilted.q[live, actions]
        outcome = self._act(self._episodes, live, actions)
        over, going = live[outcome.ended], live[~outcome.ended]
        if going.size:
            found = self._tilted(going)
            for name, array in vars(tilted).items():
                array[going] = getattr(found, name)
            cloud.worth[going] = found.worth
        cloud.worth[over] = (outcome.rewards if self.judge else expected)[outcome.ended]
        cloud.logprobs[over] = [info["logprob"] for info in outcome.infos if info.get("finish_reason")]
        cloud.ended[over] = True
        cloud.log_weights.ravel()[live] += (cloud.worth[live] - expected) / self.beta
        np.add.at(cloud.tokens, groups, 1)
        np.add.at(cloud.judge_calls, groups[outcome.ended], int(self.judge))

    def _draw(self, cloud: _Cloud, live: Rows) -> npt.NDArray[np.int64]:
        """Return an action a row, and note which rows are alike after it."""
        groups = live // self.n
        if self.pick == "best":
            numbers = np.array([cloud.generators[group].random() for group in groups.tolist()])
        else:
            numbers = _spread(cloud.prefix[live], groups, cloud.generators)
        actions = sample(np.exp(cloud.tilted.log_pi[live]), numbers)
        cloud.prefix[live] = np.unique(cloud.prefix[live] * self._episodes.k + actions, return_inverse=True)[1].ravel()
        return actions

    def _resample(self, cloud: _Cloud) -> None:
        """Draw the unfinished rows of a text anew, by weight, where their weights are too uneven.

        Finished rows stay as they are: a value that is too low or too high would let one kind push out
        the other.
        """
        if self.pick == "best":
            return
        live = ~cloud.ended.reshape(cloud.log_weights.shape)
        count = live.sum(-1)
        with np.errstate(invalid="ignore"):  # of texts without unfinished rows
            weights, log_sum = _normalised(np.where(live, cloud.log_weights, -np.inf))
            effective = 1 / (weights**2).sum(-1)
            # Equal weights differ in their last bits, which is no reason to resample.
            uneven = np.flatnonzero((count > 0) & (effective < self.threshold * count * (1 - 1e-9)))
        src, dst = [], []
        for g in uneven.tolist():
            here = np.flatnonzero(live[g])
            copies = systematic(weights[g, here], cloud.generators[g].random())
            src.append(g * self.n + np.repeat(here, np.maximum(copies - 1, 0)))
            dst.append(g * self.n + here[copies == 0])
            cloud.log_weights[g, here] = log_sum[g] - math.log(len(here))
            cloud.resamplings[g] += 1
        if src:
            self._episodes.fork(np.concatenate(src), np.concatenate(dst))
            cloud.copy_rows(np.concatenate(src), np.concatenate(dst))

    def _result(self, cloud: _Cloud, group: int, rows: Rows, weights: Floats, log_z: float) -> WeightedTexts:
        episodes, prompt = self._episodes, self._episodes.prompts_at(rows[:1])[0]
        assert prompt is not None
        if self.pick == "best":
            chosen = int(weights.argmax())
            value = log_z + math.log(weights[chosen]) + (self.n - 1) / self.n  # log max w - log n + (n - 1) / n
        else:
            chosen, value = int(sample(weights[None], cloud.generators[group].random(1))[0]), log_z
        return WeightedTexts(
            prompt=prompt.text,
            completions=tuple(episodes.text_of(row) for row in rows.tolist()),
            ids=tuple(tuple(episodes.ids_of(row)[1]) for row in rows.tolist()),
            rewards=cloud.worth[rows] if self.judge else np.full(len(rows), math.nan),
            weights=weights,
            logprobs=cloud.logprobs[rows],
            chosen=chosen,
            log_z=log_z,
            value_at_least=self.beta * value if self.judge else None,
            tokens=int(cloud.tokens[group]),
            judge_calls=int(cloud.judge_calls[group]),
            resamplings=int(cloud.resamplings[group]),
        )


def _best(tried: Sequence[Tempering]) -> Tempering:
    """Return the setting with the highest mean, or one as good but for noise whose values vary less."""
    highest = max(tried, key=lambda found: found.value_at_least)

    def is_as_good(found: Tempering) -> bool:
        behind = highest.values - found.values
        return bool(behind.mean() <= 2 * behind.std() / math.sqrt(behind.size))

    return min(filter(is_as_good, tried), key=lambda found: float(found.values.var(axis=0).mean()))


def systematic(weights: Floats, number: float) -> npt.NDArray[np.int64]:
    """Return how often each of n rows is drawn in n systematic draws: n weight, rounded up or down; (n,).

    Args:
        weights: (n,), sum to 1.
        number: Uniform in [0, 1), the only luck there is.
    """
    n = len(weights)
    cumulated = np.cumsum(weights)
    cumulated[-1] = 1.0
    places = np.minimum((np.arange(n) + number) / n, np.nextafter(1.0, 0.0))
    return np.bincount(np.searchsorted(cumulated, places, side="right"), minlength=n)


def _spread(
    prefix: npt.NDArray[np.int64], groups: npt.NDArray[np.int64], generators: Sequence[np.random.Generator]
) -> Floats:
    """Return a number in [0, 1) for each row, (B,): those with one prefix are evenly spread, by a single draw.

    Each number is uniform, so estimates stay unbiased, and equal rows part as evenly as their policy allows.

    Args:
        prefix: (B,) equal for equal prefixes of one group, increasing with the group.
        groups: (B,) whose generator draws.
    """
    _, first, kinds, counts = np.unique(prefix, return_index=True, return_inverse=True, return_counts=True)
    group, draws = np.unique(groups[first], return_counts=True)
    luck = np.concatenate([generators[g].random(count) for g, count in zip(group, draws, strict=True)])
    kinds = kinds.ravel()
    order = np.argsort(kinds, kind="stable")
    rank = np.empty(len(kinds), np.int64)
    rank[order] = np.arange(len(kinds)) - (np.cumsum(counts) - counts)[kinds[order]]
    return np.minimum((rank + luck[kinds]) / counts[kinds], np.nextafter(1.0, 0.0))


def _normalised(log_weights: Floats) -> tuple[Floats, Floats]:
    """Return weights (G, n) that sum to 1, and the log of the sum of what they were, (G,)."""
    log_sum = np.logaddexp.reduce(log_weights, axis=-1)
    return np.exp(log_weights - log_sum[:, None]), log_sum


class _Unjudged(Reward):
    """0 for every finished text."""

    name = "unjudged"

    def __call__(self, generations: Sequence[Generation]) -> Floats:
        return np.zeros(len(generations))
