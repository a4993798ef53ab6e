"""What more tokens a text buy: best-of-n, weighted best-of-n, guided best-of-n, and particles.

    samples of the language model (P, m)  ->  best of n, weighted best of n    no further text is written
    values                                ->  guided best of n, particles      n rows a text

Each way has a J that is certified: a lower bound whose mean is estimated without bias; see
``agents.baselines.particles``. Weighted ways have beta E[log Z], a choice of the best has the largest KL
that a choice among n can cost.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agents.baselines.guided import GuidedBestOfNAgent
from agents.baselines.particles import ParticlesAgent
from agents.baselines.values import value_source
from agents.runs.optimum import share_of_optimal_gain
from agents.runs.parts import VALIDATION_PROMPTS, some_prompts
from agents.terminal import decimals_for
from textgen_env.config import check_type
from textgen_env.errors import ConfigError
from textgen_env.evaluation import Evaluation, bootstrap_interval
from textgen_env.files import read_json, whole_file, write_file
from textgen_env.policies import Floats
from textgen_env.prompts import Prompt
from textgen_env.vector_env import TextGenVectorEnv

if TYPE_CHECKING:
    from rich.table import Table

MAXIMUM = "best of n"
WEIGHTED = "weighted best of n"
GUIDED = "guided best of n"
PARTICLES = "particles"

SPENDING_NOTE = (
    "Tokens and judge calls a text, all rows together. J and its share of the optimal gain are certified: at least so "
    "much (± is half of the 95% interval). Weighted: drawn by exp(reward / beta), not the best. Guided: a quarter of a "
    "text at a time, the agent's V keeps the best. Particles: n texts at once, weighted, and copied where Q says so."
)
"""Below ``spending_table``."""

TEMPERED = ("pick", "trust", "threshold")
"""Settings of the particles that are chosen on validation prompts."""

TEMPERED_FILE = "particles-{n}.json"
"""Where an evaluation keeps them."""

BLOCKS = 4
"""Guided best-of-n writes blocks of this share of the longest text, rounded down, one token at least: of 7 tokens 7."""


@dataclass(frozen=True)
class Spending:
    """A way to spend tokens on a text, measured: means over prompts, with 95% bootstrap intervals."""

    way: str
    n: int  # rows a text
    tokens: float  # a text, those of dropped rows included
    judge_calls: float  # a text
    reward: float
    reward_low: float
    reward_high: float
    value: float  # a lower bound of J, reward units
    value_low: float
    value_high: float
    trust: float | None = None  # tempered on validation prompts; None: nothing to temper
    threshold: float | None = None
    pick: str | None = None

    @classmethod
    def of(
        cls, way: str, n: int, tokens: float, judge_calls: float, rewards: Floats, values: Floats, **tempered: Any
    ) -> Spending:
        """Return the point of texts with these rewards and bounds of J, each (prompts, texts)."""
        low, high = bootstrap_interval(rewards)
        value_low, value_high = bootstrap_interval(values)
        return cls(
            way, n, tokens, judge_calls,
            float(rewards.mean()), low, high,
            float(values.mean()), value_low, value_high,
            **tempered,
        )  # fmt: skip


def choices(rewards: Floats, n: int, beta: float, length: float) -> list[Spending]:
    """Return best-of-n and weighted best-of-n of the language model's own texts.

    Each ``n`` neighbours of a prompt's samples are one choice, so no text is used twice.

    Args:
        rewards: (P, m) rewards of samples of mu_k.
        n: In 1..m.
        beta: Reward units a nat.
        length: Tokens of a text, on average.

    Raises:
        ConfigError: ``n`` is not in 1..m.
    """
    prompts, count = rewards.shape
    if not 1 <= n <= count:
        raise ConfigError(f"n must be in 1..{count} (samples a prompt), got {n}")
    groups = rewards[:, : count // n * n].reshape(prompts, -1, n)
    best = groups.max(-1)
    log_sum = np.logaddexp.reduce(groups / beta, axis=-1)
    weighted = (np.exp(groups / beta - log_sum[..., None]) * groups).sum(-1)
    kl = math.log(n) - (n - 1) / n
    return [
        Spending.of(MAXIMUM, n, n * length, n, best, best - beta * kl),
        Spending.of(WEIGHTED, n, n * length, n, weighted, beta * (log_sum - math.log(n))),
    ]


def spend(
    values: Any,
    env: TextGenVectorEnv,
    prompts: Sequence[Prompt],
    validation: Sequence[Prompt],
    n: int,
    *,
    beta: float,
    texts: int,
    seed: int,
    say: Callable[[str], None] = lambda way: None,
) -> list[Spending]:
    """Let guided best-of-n and particles write for ``prompts``, and return what that costs and is worth.

    Args:
        values: See ``agents.baselines.values.value_source``.
        env: Not used itself: its model, reward and settings are.
        prompts: To measure on.
        validation: Others, on which pick, trust and threshold of the particles are chosen.
        n: Rows a text.
        beta: Reward units a nat.
        texts: All rows together; so many are written by each way, rounded up to two texts a prompt.
        seed: Of the random numbers.
        say: Called with each way before it is measured.
    """
    repeats = max(2, math.ceil(texts / (n * len(prompts))))
    repeated = list(prompts) * repeats
    block = max(1, env.max_new_tokens // BLOCKS)
    say(f"{n} {GUIDED}")
    guided = GuidedBestOfNAgent(env, seed, n=n, block=block, values=values, beta=beta)
    points = [_measured(GUIDED, n, guided.write(repeated), repeats, beta)]
    particles = ParticlesAgent(env, seed, n=n, values=values, beta=beta)
    say(f"{n} {PARTICLES}: tempering")
    particles.temper(validation, repeats=2, seed=seed)
    say(f"{n} {PARTICLES}")
    tempered = {name: getattr(particles, name) for name in TEMPERED}
    return [*points, _measured(PARTICLES, n, particles.write(repeated), repeats, beta, **tempered)]


def check_counts(values: Any, env: TextGenVectorEnv, counts: Sequence[int], samples: int) -> None:
    """Raise ``ConfigError`` where ``spend_each`` would: an agent without Q, or more rows than ``samples`` a prompt."""
    if counts:
        value_source(values, env)
        if max(counts) > samples:
            raise ConfigError(f"particles must be at most {samples}, the samples of a prompt, got {max(counts)}")


def spend_each(
    values: Any,
    env: TextGenVectorEnv,
    prompts: Sequence[Prompt],
    samples: Evaluation,
    counts: Sequence[int],
    *,
    beta: float,
    texts: int,
    seed: int,
    say: Callable[[str], None] = lambda way: None,
) -> list[Spending]:
    """Return all ways to spend ``counts`` times the tokens of a text, measured on ``prompts``.

    Settings are chosen on the environment's own prompts, which the values were learned on.

    Args:
        samples: Of the language model, on ``prompts``.
        values, env, beta, texts, seed, say: See ``spend``.

    Raises:
        ConfigError: an agent without Q, or more rows than there are samples a prompt.
    """
    rewards, length = samples.by_prompt(samples.rewards), float(samples.lengths.mean())
    points = [point for n in counts for point in choices(rewards, n, beta, length)]
    some = list(some_prompts(env.episodes.prompts, VALIDATION_PROMPTS, seed)) if counts else []
    for n in counts:
        points += spend(values, env, prompts, some, n, beta=beta, texts=texts, seed=seed, say=say)
    return points


def keep_tempered(points: Sequence[Spending], folder: Path) -> None:
    """Write what tempering chose into ``folder``, a file for each number of particles."""
    for point in points:
        if point.way == PARTICLES:
            write_file(folder / TEMPERED_FILE.format(n=point.n), json.dumps(asdict(point), indent=2) + "\n")


def tempered_settings(folder: Path, n: int) -> dict[str, Any]:
    """Return pick, trust and threshold of ``n`` particles that ``keep_tempered`` wrote; nothing where it did not.

    Raises:
        RunFolderError: the file is damaged.
        ConfigError: a setting of another type.
    """
    path = folder / TEMPERED_FILE.format(n=n)
    if not path.is_file():
        return {}
    found = read_json(path, TEMPERED, allow_nan=True)
    for name in TEMPERED:
        check_type(name, found[name], *((str,) if name == "pick" else (int, float)))
    return {name: found[name] for name in TEMPERED}


def _measured(way: str, n: int, found: Sequence[Any], repeats: int, beta: float, **tempered: Any) -> Spending:
    rewards = np.array([text.reward for text in found])
    if way == GUIDED:
        bounds = rewards - beta * np.array([text.kl_at_most for text in found])
    else:
        bounds = np.array([text.value_at_least for text in found])
    tokens, calls = (float(np.mean([getattr(text, name) for text in found])) for name in ("tokens", "judge_calls"))
    return Spending.of(way, n, tokens, calls, rewards.reshape(repeats, -1).T, bounds.reshape(repeats, -1).T, **tempered)


def spending_table(points: Sequence[Spending], reference: float, optimal: float | None) -> Table:
    """Return the points as a ``rich`` table; ``SPENDING_NOTE`` is the line below it.

    Args:
        reference, optimal: J of the language model and of the best possible policy; None where their difference is
            within its error, so that no share of it means anything.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    grid = Table(box=SIMPLE_HEAD, pad_edge=False)
    grid.add_column("more tokens a text", min_width=16)
    for heading in ("n", "tokens", "calls", "reward", "J", "share"):
        grid.add_column(heading, justify="right", no_wrap=True)
    decimals = decimals_for(point.reward for point in points)
    for point in points:
        grid.add_row(
            point.way,
            str(point.n),
            f"{point.tokens:.0f}",
            f"{point.judge_calls:.0f}",
            f"{point.reward:.{decimals}f} ±{(point.reward_high - point.reward_low) / 2:.{decimals}f}",
            f"≥ {point.value:.{decimals}f} ±{(point.value_high - point.value_low) / 2:.{decimals}f}",
            "–" if optimal is None else f"≥ {share_of_optimal_gain(point.value, reference, optimal):.0%}",
        )
    return grid


def draw_tokens(points: Sequence[Spending], reference: float, optimal: float | None, path: Path) -> None:
    """Draw the share of the optimal gain, or J without one, against tokens a text, a line a way, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for way in dict.fromkeys(point.way for point in points):
        line = sorted((point for point in points if point.way == way), key=lambda point: point.tokens)
        worth = np.array([[point.value, point.value_low, point.value_high] for point in line])
        if optimal is not None:
            worth = np.vectorize(share_of_optimal_gain)(worth, reference, optimal)
        spread = np.abs(worth[:, 1:] - worth[:, :1]).T
        axes.errorbar([point.tokens for point in line], worth[:, 0], spread, marker="o", capsize=3, label=way)
    level, mark = (reference, "language model") if optimal is None else (1.0, "best possible policy")
    axes.axhline(level, color="black", linestyle=":", label=mark)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens a text, all rows together")
    axes.set_ylabel("J, at least" if optimal is None else "share of the optimal gain, at least")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", frameon=False, ncols=3, fontsize=8)  # on no curve
    with whole_file(path) as half_made:
        figure.savefig(half_made, format="png")
