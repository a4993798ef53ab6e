"""Measure an agent next to the language model and next to the best possible policy.

    language model  ->  Yardstick  (samples, greedy, lookahead, the optimum)
    agent           ->  Report     (rows of the table, curves on the reward-KL plane)  ->  table, PNG, Markdown, JSON

Everything in a report is plain data, so ``summary.json`` holds every figure of the table.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from agents.baselines.one_step import GreedyAgent, LookaheadAgent, SampleAgent
from agents.runs.optimum import Optimum, Point, best_of_n, estimated_optimum, share_of_optimal_gain
from agents.terminal import cell, decimals_for
from agents.text_dqn.validation import LANGUAGE_MODEL
from textgen_env.evaluation import Evaluation, evaluate
from textgen_env.policies import Agent
from textgen_env.prompts import PromptSource
from textgen_env.vector_env import TextGenVectorEnv

if TYPE_CHECKING:
    from rich.table import Table

BEST_OF = (1, 2, 4, 8, 16, 32, 64)
FRONTIER_FACTORS = tuple(np.geomspace(10.0, 0.5, 13).tolist())
"""The curve of the best possible policies has points at these multiples of the run's beta, and where others act."""

ACTING_FACTORS = (0.5, 2.0)
"""A tilted policy is drawn on the plane at its own temperature and at these multiples of it."""

SURE = 3.0
"""Standard errors that the optimal gain must be above 0, so that a share of it means something."""

LEAST_BETAS, MOST_BETAS, USUAL_BETAS = 1.0, 50.0, 4.0
"""Standard deviations of the reward, in betas: below the first no reward is worth its KL, beyond the second KL hardly
costs anything; what is advised then."""

BEST = "best possible policy"
BOUND = "at most, if all replies were known"
"""In place of ``BEST`` in conversations: the policy of the same formula may choose its words by what they will be
answered, which no player can."""

BEST_OF_N = "best of n samples, KL at most"
LOOKAHEAD = "score lookahead, no learning"

SEEN = {
    BEST_OF_N: "sees rewards of whole texts",
    LOOKAHEAD: "sees each candidate's score",
}
"""What the policies without learning see of the reward."""

Curve = list[tuple[float, float]]
"""Points (KL in nats a text, reward)."""

Watch = Callable[[str, int, int], None]
"""Called while a policy is measured: its name, the texts that have ended, their number."""


def unwatched(policy: str, ended: int, texts: int) -> None:
    """Watch nothing."""


@dataclass(frozen=True)
class ReportLine:
    """One line of the table. A figure that is unknown, or has no meaning for the row, is None."""

    name: str
    reward: float
    reward_low: float | None = None  # 95% bootstrap interval
    reward_high: float | None = None
    kl: float | None = None  # nats a text, to the language model over the candidates
    kl_at_most: bool = False  # kl is a bound, so value and share are lower bounds
    likelihood: float | None = None  # nats a token, under the language model
    distinct_2: float | None = None
    value: float | None = None  # J = reward - beta kl
    share: float | None = None  # of the optimal gain in J
    details: Mapping[str, Any] | None = None  # every other figure of the evaluation


@dataclass(frozen=True)
class Report:
    """The table, the curves of the plane, and notes for their readers."""

    agent: str  # its name in the rows and curves
    beta: float
    rows: list[ReportLine]
    curves: dict[str, Curve]
    notes: list[str]
    gain: float  # of the best possible policy over the language model, in J
    gain_error: float  # its standard error
    betas: dict[str, list[float]]  # acting temperatures of the points of a curve, where it has them
    sees: dict[str, str]  # what the policy of a curve sees of the reward

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Yardstick:
    """Policies without learning, measured on the prompts of a report."""

    beta: float
    samples: Evaluation  # of the language model, as many a prompt as the optimum is estimated from
    greedy: Evaluation
    lookahead: list[Evaluation]  # at its own temperature, then at others; empty where no prefix can be scored

    @classmethod
    def measure(
        cls,
        env: TextGenVectorEnv,
        prompts: PromptSource,
        *,
        beta: float,
        texts: int,
        samples: int,
        seed: int,
        watch: Watch = unwatched,
    ) -> Yardstick:
        """Roll out the agents without learning.

        Args:
            env: With ``logprobs`` and ``action_mask`` in its observation; lookahead also needs
                ``score`` and ``candidate_scores``, and is left out without them.
            prompts: Of the report.
            beta: Reward units a nat: the price of KL in J.
            texts: For each agent, rounded up to a whole number a prompt.
            samples: Texts of the language model a prompt, from which the optimum is estimated.
            seed: Of the evaluation's random numbers.
            watch: Told of each policy while it is measured.
        """
        count = max(texts, samples * len(prompts))
        sampled = evaluate(SampleAgent(), env, count, seed, prompts, watch=partial(watch, "language model"))
        named = partial(watch, "language model, greedy")
        # Once a prompt: it has no other text.
        greedy = evaluate(GreedyAgent(), env, len(prompts), seed, prompts, watch=named)
        lookahead = []
        if "candidate_scores" in env.episodes.keys:
            agent, name = LookaheadAgent(), "score lookahead"
            lookahead = evaluate_agent(agent, env, prompts, texts=texts, seed=seed, watch=watch, name=name)
        return cls(beta, sampled, greedy, lookahead)

    def optimum(self, beta: float) -> Optimum:
        """Return the best policy at ``beta``, estimated from the samples."""
        return estimated_optimum(self.samples.by_prompt(self.samples.rewards), beta)

    @cached_property
    def best(self) -> Optimum:
        """The best policy at the report's own beta."""
        return self.optimum(self.beta)

    @property
    def gain(self) -> float:
        """What the best possible policy gains over the language model, in J, reward units."""
        return float(self.best.value.mean()) - self.samples.reward

    @property
    def is_saturated(self) -> bool:
        """True if that gain is within its own error, so that no share of it means anything."""
        return not self.gain > max(SURE * self.best.gain_error, 1e-12)

    @property
    def are_conversations(self) -> bool:
        """True if a partner answered."""
        return bool(self.samples.turns)

    def row(self, name: str, evaluation: Evaluation, distinct: bool = True) -> ReportLine:
        """Return the line of an evaluated agent."""
        figures = evaluation.figures()
        values = evaluation.values(self.beta)
        value = None if values is None else float(values.mean())
        return ReportLine(
            name,
            figures["reward"],
            figures["reward_low"],
            figures["reward_high"],
            figures["kl"],
            likelihood=figures["likelihood"],
            distinct_2=figures["distinct_2"] if distinct else None,
            value=value,
            share=self._share(value),
            details=figures,
        )

    def report(
        self,
        agent: str,
        evaluations: Sequence[Evaluation],
        notes: Sequence[str] = (),
        betas: Sequence[float] = (),
        sees: str = "",
    ) -> Report:
        """Return the report of an agent.

        Args:
            agent: Its name in the report.
            evaluations: Those of ``evaluate_agent``.
            notes: For readers.
            betas: The acting temperatures of ``evaluations``; see ``acting_betas``.
            sees: What it sees of the reward.
        """
        rewards = self.samples.by_prompt(self.samples.rewards)
        # A choice among conversations that have ended would know the partner's answers.
        most = 0 if self.are_conversations else rewards.shape[1]
        bests = {n: best_of_n(rewards, n) for n in BEST_OF if n <= most}
        shown = [n for n in bests if n <= 16][-1:]
        best = BOUND if self.are_conversations else BEST
        rows = [
            self.row("language model, sampled", self.samples),
            self.row("language model, greedy", self.greedy, distinct=False),
            *(self._plain_row(f"best of {n} samples", bests[n], kl_at_most=True) for n in shown),
            *(self.row(LOOKAHEAD, evaluation) for evaluation in self.lookahead[:1]),
            *(self.row(agent, evaluation) for evaluation in evaluations[:1]),
            self._plain_row(best, self.best.point, value=float(self.best.value.mean())),
        ]
        lookahead_betas = acting_betas(LookaheadAgent()) if self.lookahead else []
        of_frontier = {*(factor * self.beta for factor in FRONTIER_FACTORS), self.beta, *betas, *lookahead_betas}
        frontier = [self.optimum(beta).point for beta in sorted(of_frontier, reverse=True)]
        curves = {
            best: [(0.0, self.samples.reward), *((point.kl, point.reward) for point in frontier)],
            BEST_OF_N: [(point.kl, point.reward) for point in bests.values()],
            LOOKAHEAD: _curve(self.lookahead),
            agent: _curve(evaluations),
        }
        return Report(
            agent,
            self.beta,
            rows,
            {name: curve for name, curve in curves.items() if curve},
            [*notes, *self._notes(len(rewards), rewards.shape[1], agent, sees), *self._behind(agent, evaluations)],
            self.gain,
            self.best.gain_error,
            {LOOKAHEAD: _by_kl(self.lookahead, lookahead_betas), agent: _by_kl(evaluations, betas)},
            {**SEEN, agent: sees},
        )

    def _notes(self, prompts: int, samples: int, agent: str, sees: str) -> list[str]:
        decimals = 1 + decimals_for([self.samples.reward, self.best.point.reward])
        gain = f"{self.gain:.{decimals}f} ± {2 * self.best.gain_error:.{decimals}f}"
        share = f"Its share of the optimal gain ({gain}) is 0% for the language model and 100% for the best policy."
        if self.are_conversations:
            share = (
                f"Its share is of a bound of the optimal gain ({gain}), so above 0 it is at least so much: the "
                "last line knows the reply to a turn before it is said, secrets included."
            )
        if self.is_saturated:
            share = (
                f"Already saturated: the optimal gain, {gain}, is within {SURE:g} of its standard errors, so no shares "
                "of it are shown. A smaller beta, a harder reward or more --samples would tell more."
            )
        notes = [f"J = reward - {self.beta:g} KL. {share}"]
        if self.lookahead and sees and sees != SEEN[LOOKAHEAD]:
            notes.append(
                f"{LOOKAHEAD.capitalize()}, {SEEN[LOOKAHEAD]}; {agent}, {sees}. With the same information as the "
                "agent there are the language model, sampled and greedy; --candidate-scores shows the agent as much."
            )
        deviation = float(self.samples.rewards.std())
        usual = float(f"{deviation / USUAL_BETAS:.1g}")
        if not np.ptp(self.samples.rewards):  # the deviation of equal numbers is not always 0
            notes.append("All texts of the language model have the same reward: there is nothing to learn from.")
        elif deviation < LEAST_BETAS * self.beta:
            notes.append(
                f"Rewards vary by {deviation:.3g} (standard deviation); beside that, {self.beta:g} a nat is a high "
                f"price, at which the language model is nearly the best. For more reward: --beta {usual:g} or so."
            )
        elif deviation > MOST_BETAS * self.beta:
            notes.append(
                f"Rewards vary by {deviation:.3g} (standard deviation); beside that, {self.beta:g} a nat is next to no "
                f"price. For texts that stay close to the language: --beta {usual:g} or so."
            )
        estimated = "That bound" if self.are_conversations else "The best possible policy"
        return [
            *notes,
            f"{estimated} is estimated from {samples} samples for each of {prompts} prompts, worth "
            f"{np.median(self.best.effective_samples):.0f} of its own (median): more samples, a surer estimate.",
        ]

    def _behind(self, agent: str, evaluations: Sequence[Evaluation]) -> list[str]:
        """Return what to do where looking one token ahead, without learning, has the clearly larger J."""
        values = [found[0].values(self.beta) for found in (self.lookahead, evaluations) if found]
        known = [value for value in values if value is not None]
        errors = [value.std() / np.sqrt(len(value)) for value in known]
        if len(known) < 2 or known[0].mean() - known[1].mean() < SURE * np.hypot(*errors):
            return []
        return [f"Score lookahead, which does not learn, is ahead of {agent}: let it learn for longer."]

    def _plain_row(self, name: str, point: Point, kl_at_most: bool = False, value: float | None = None) -> ReportLine:
        value = point.reward - self.beta * point.kl if value is None else value
        return ReportLine(name, point.reward, kl=point.kl, kl_at_most=kl_at_most, value=value, share=self._share(value))

    def _share(self, value: float | None) -> float | None:
        if value is None or self.is_saturated:
            return None
        return share_of_optimal_gain(value, self.samples.reward, float(self.best.value.mean()))


def evaluate_agent(
    agent: Agent,
    env: TextGenVectorEnv,
    prompts: PromptSource,
    *,
    texts: int,
    seed: int,
    deterministic: bool = False,
    watch: Watch = unwatched,
    name: str = "agent",
) -> list[Evaluation]:
    """Return the agent's evaluation and, where it has a temperature ``beta``, those at others (half the texts).

    Every prompt gets a text each time, also where ``texts`` are fewer: others are measured on all prompts, too.
    """
    own, other = text_counts(texts, len(prompts))
    evaluations = [evaluate(agent, env, own, seed, prompts, deterministic, partial(watch, name))]
    for acting in acting_betas(agent)[1:]:
        named = partial(watch, f"{name} at beta {acting:g}")
        with _acting_at(agent, acting):
            evaluations.append(evaluate(agent, env, other, seed, prompts, deterministic, named))
    return evaluations


def text_counts(texts: int, prompts: int) -> tuple[int, int]:
    """Return how many texts an agent writes at its own temperature, and at each other one: one a prompt at least."""
    return max(texts, prompts), max(texts // 2, prompts)


def acting_betas(agent: Agent) -> list[float]:
    """Return the temperatures of ``evaluate_agent``, its own first; none for an agent without.

    An agent that chose to act as the language model has its own alone: the others would be the same policy.
    """
    own = getattr(agent, "beta", None)
    if own is None:
        return []
    return [own] if own == LANGUAGE_MODEL else [own, *(factor * own for factor in ACTING_FACTORS)]


def table(report: Report) -> Table:
    """Return the rows as a ``rich`` table; ``report_notes`` are the lines below it."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    grid = Table(box=SIMPLE_HEAD, pad_edge=False)
    grid.add_column("policy", min_width=18)  # it wraps; figures never do
    for heading in ("reward", "KL", "loglik", "distinct", "J", "share"):
        grid.add_column(heading, justify="right", no_wrap=True)
    decimals = decimals_for(row.reward for row in report.rows)
    for row in report.rows:
        grid.add_row(cell(row.name), *_figures(row, decimals), style="bold" if row.name == report.agent else None)
    return grid


def report_notes(report: Report) -> list[str]:
    """Return the lines below the table."""
    units = "± is half of the 95% interval; KL in nats a text, log-likelihood a token; distinct-2."
    return [units, *report.notes]


def _figures(row: ReportLine, decimals: int) -> tuple[str, ...]:
    """Return the cells of a line of the table, after its name; reward and J with ``decimals``."""
    half = None if row.reward_low is None or row.reward_high is None else (row.reward_high - row.reward_low) / 2
    value, share = _shown(row.value, f".{decimals}f"), _shown(row.share, ".0%")
    if row.kl_at_most:
        value, share = (text if text == "–" else f"≥ {text}" for text in (value, share))
    return (
        f"{row.reward:.{decimals}f}" + ("" if half is None else f" ±{half:.{decimals}f}"),
        ("≤ " if row.kl_at_most else "") + _shown(row.kl, ".1f"),
        _shown(row.likelihood, ".2f"),
        _shown(row.distinct_2, ".2f"),
        value,
        "< -100%" if (row.share or 0) < -1 else share,
    )


def _curve(evaluations: Sequence[Evaluation]) -> Curve:
    """Return the points with a KL, by KL."""
    points = [(evaluation.mean_kl, evaluation.reward) for evaluation in evaluations]
    return sorted((kl, reward) for kl, reward in points if kl is not None)


def _by_kl(evaluations: Sequence[Evaluation], betas: Sequence[float]) -> list[float]:
    """Return the temperatures in the order of the points of ``_curve``."""
    pairs = zip(evaluations, betas, strict=False)
    return [beta for _, _, beta in sorted((e.mean_kl, e.reward, beta) for e, beta in pairs if e.mean_kl is not None)]


@contextlib.contextmanager
def _acting_at(agent: Any, beta: float) -> Iterator[None]:
    own, agent.beta = agent.beta, beta
    try:
        yield
    finally:
        agent.beta = own


def _shown(value: float | None, form: str) -> str:
    text = "–" if value is None else format(value, form)
    return text if text.strip("-0.%") else text.removeprefix("-")  # no minus before a zero
