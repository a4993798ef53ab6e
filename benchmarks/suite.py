"""Any judge: what an agent gains where only finished texts are judged, on a suite of black boxes.

``tiny`` (or any model) writes texts of a fixed length, 16 candidates a step. Agents learn from the training prompts
and are measured on others. Each row is a judge, a length, a way to score prefixes and a seed:

    share of the optimal gain = (J(pi) - J(mu)) / (J* - J(mu)),   J = E[R] - 0.1 KL,

with J* from samples of the language model on the same prompts, and how often the judge was asked.
Before it is measured an agent's acting temperature is chosen on validation prompts; "own" is its
share at the temperature that it learned for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agents.baselines.one_step import SampleAgent
from agents.runs.optimum import best_of_n, estimated_optimum, share_of_optimal_gain
from agents.text_dqn.agent import TextDQN
from agents.zoo import OBSERVATION
from benchmarks.judges import JSON_TASK, JUDGES, SEALED, Judge
from textgen_env.evaluation import bootstrap_interval, choose_prompts, evaluate
from textgen_env.files import read_json, write_file
from textgen_env.models import load_language_model
from textgen_env.policies import Agent, Floats
from textgen_env.prompts import PromptSource, make_prompts
from textgen_env.rewards import Generation, batch_reward
from textgen_env.tasks import make_task
from textgen_env.vector_env import TextGenVectorEnv

BETA = 0.1
UNSCORED = tuple(key for key in OBSERVATION if key != "score")
CLASSIFIED = 1024
"""Texts on which the suite's classifiers are trained."""


@dataclass(frozen=True)
class Cell:
    """One run of the suite."""

    judge: str
    tokens: int = 20
    score: str | None = "auto"  # see ``TextDQN``
    seed: int = 0
    steps: int = 40_000
    model: str = "tiny"

    @property
    def name(self) -> str:
        return f"{self.model}-{self.judge}-{self.tokens}-{self.score}-{self.steps}-{self.seed}"


class Yardstick:
    """The language model's own texts, which judges are fitted to and results are measured against; kept in a folder."""

    def __init__(self, folder: Path, model: str, tokens: int, samples: int, json_task: bool = False) -> None:
        self._folder, self.tokens, self.samples = folder, tokens, samples
        self.model = load_language_model(model)
        self._kind = f"{model}-{tokens}" + ("-json" if json_task else "")
        self._json_task = json_task
        self._judges: dict[str, Judge] = {}
        source = make_task(JSON_TASK).train_prompts if json_task else make_prompts("openings")
        self.train = source if json_task else source.split("train")
        self.validation = choose_prompts(source if json_task else source.split("validation"), 16, 0)
        self.test = choose_prompts(make_task(JSON_TASK).test_prompts if json_task else source.split("test"), 16, 0)

    def env(self, rows: int, prompts: PromptSource, reward: Any, keys: tuple[str, ...] = UNSCORED) -> TextGenVectorEnv:
        ends = {"stop": ("}",)} if self._json_task else {"min_new_tokens": self.tokens}
        return TextGenVectorEnv(
            rows, self.model, prompts, reward, observation=keys, top_k=16, max_new_tokens=self.tokens, **ends
        )

    def judge(self, name: str) -> Judge:
        if name not in self._judges:
            texts = [text.completion for text in self._written("validation", self.validation, 7, CLASSIFIED)]
            self._judges[name] = JUDGES[name](texts, self.tokens)
        return self._judges[name]

    def rewards(self, judge: Judge) -> Floats:
        """Return rewards of the language model's texts on the test prompts, (P, samples)."""
        texts = self._written("test", self.test, 1, self.samples * len(self.test))
        return np.asarray(judge(texts)).reshape(len(self.test), -1)

    def _written(self, name: str, prompts: PromptSource, seed: int, count: int) -> list[Generation]:
        """Return texts of the language model, one prompt's after another's."""
        path = self._folder / f"language-model-{self._kind}-{name}-{count}.json"
        if not path.is_file():
            found = evaluate(
                SampleAgent(), self.env(256, prompts, "length", ("logprobs", "action_mask")), count, seed, prompts
            )
            texts = np.array(list(zip(found.prompts, found.completions, strict=True)), object)
            by_prompt = texts.reshape(-1, found.num_prompts, 2).transpose(1, 0, 2).reshape(-1, 2)
            write_file(path, json.dumps(by_prompt.tolist()))
        return [Generation(prompt, completion) for prompt, completion in read_json(path)]


class Suite:
    """Runs of cells, kept in a folder: what is there already is not done again."""

    def __init__(self, folder: Path, samples: int = 512, texts: int = 512) -> None:
        self.folder, self.samples, self.texts = folder, samples, texts
        folder.mkdir(parents=True, exist_ok=True)
        self._yardsticks: dict[tuple[str, int, bool], Yardstick] = {}

    def yardstick(self, cell: Cell) -> Yardstick:
        key = (cell.model, cell.tokens, cell.judge == "json")
        if key not in self._yardsticks:
            self._yardsticks[key] = Yardstick(self.folder, cell.model, cell.tokens, self.samples, cell.judge == "json")
        return self._yardsticks[key]

    def run(self, cell: Cell, **settings: Any) -> dict[str, Any]:
        """Let an agent learn and be measured, unless it has been; return its figures."""
        path = self.folder / f"{cell.name}.json"
        if not path.is_file():
            write_file(path, json.dumps(self._run(cell, settings), indent=1) + "\n")
        found: dict[str, Any] = read_json(path, allow_nan=True)
        return found

    def learned(self, cell: Cell, settings: Mapping[str, Any]) -> tuple[TextDQN, dict[str, float]]:
        """Return an agent that has learned on a cell, and the ``seconds`` and ``cpu_seconds`` that it took."""
        agent = TextDQN(
            env=self.env(cell, "train", 64), score=cell.score, beta=BETA, seed=cell.seed,
            **{"buffer_size": cell.steps, **settings},
        )  # fmt: skip
        started, cpu = time.perf_counter(), time.process_time()
        agent.learn(cell.steps)
        return agent, {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}

    def measured(self, cell: Cell, agent: Agent) -> dict[str, float]:
        """Return reward, KL and share of the optimal gain, with the interval of its texts, on the test prompts."""
        stick = self.yardstick(cell)
        found = evaluate(agent, self.env(cell, "test", 128), self.texts, 11, stick.test)
        rewards, values = stick.rewards(stick.judge(cell.judge)), found.values(BETA)
        assert values is not None
        assert found.mean_kl is not None  # its probabilities are known
        best = float(estimated_optimum(rewards, BETA).value.mean())
        low, high = bootstrap_interval(found.by_prompt(values))
        before = float(rewards.mean())
        shares = [share_of_optimal_gain(value, before, best) for value in (float(values.mean()), low, high)]
        return {"reward": found.reward, "kl": found.mean_kl, **dict(zip(("share", "low", "high"), shares, strict=True))}

    def env(self, cell: Cell, prompts: str, rows: int) -> TextGenVectorEnv:
        """Return an environment on the ``"train"``, ``"validation"`` or ``"test"`` prompts, rewarded by the judge."""
        stick = self.yardstick(cell)
        judge = stick.judge(cell.judge)
        return stick.env(rows, getattr(stick, prompts), batch_reward(lambda generations: judge(generations)))

    def _run(self, cell: Cell, settings: Mapping[str, Any]) -> dict[str, Any]:
        agent, seconds = self.learned(cell, settings)
        own = self.measured(cell, agent)
        chosen = agent.choose_beta(self.env(cell, "validation", 64), 256, seed=5)
        stick = self.yardstick(cell)
        return {
            **asdict(cell),
            "own": own,
            "validated": own if chosen.beta == BETA else self.measured(cell, agent),
            "acting_beta": chosen.beta,
            "judge_calls": agent.learner.judge_calls,
            "unjudged_steps": agent.learner.unjudged_steps,
            "held_out": agent.learner.scorer_r2,
            **seconds,
            **self._bounds(stick.rewards(stick.judge(cell.judge))),
        }

    def _bounds(self, rewards: Floats) -> dict[str, Any]:
        best = estimated_optimum(rewards, BETA)
        before, value = float(rewards.mean()), float(best.value.mean())
        of_n = {}
        for n in (4, 16):
            point = best_of_n(rewards, n)
            of_n[str(n)] = share_of_optimal_gain(point.reward - BETA * point.kl, before, value)
        return {
            "language_model": before,
            "best_possible": value,
            "effective_samples": float(np.median(best.effective_samples)),
            "best_of": of_n,
        }


def cells(quick: bool, seeds: int) -> Iterator[Cell]:
    """Yield what the suite runs: every judge at two lengths; at one of them also asked about prefixes."""
    if quick:
        for name in ("pairs", "length", "sparse"):
            yield Cell(name, steps=8_000)
        yield Cell("pairs", score="judge", steps=8_000)
        return
    names = [*(name for name in JUDGES if name not in SEALED), *SEALED]
    for seed in range(seeds):
        for name in names:
            yield Cell(name, seed=seed)
            yield Cell(name, score="judge", seed=seed)
            if name != "json":
                yield Cell(name, tokens=64, seed=seed)
        for name in ("lexicon", "pairs", "sentence"):
            yield Cell(name, seed=seed, model="smollm2")


def run_suite(folder: Path, quick: bool, seeds: int) -> list[dict[str, Any]]:
    """Run all cells that have not been run, print each, and return their figures."""
    suite = Suite(folder, *((64, 128) if quick else (512, 512)))
    settings = {"learning_starts": 2_000} if quick else {}
    heads = ("tokens", "score", "own", "chosen", "interval", "KL", "best of 4", "calls")
    print(f"{'judge':14}" + "".join(f"{head:>12}" for head in heads))
    rows = []
    for cell in cells(quick, seeds):
        found = suite.run(cell, **settings)
        rows.append(found)
        chosen = found["validated"]
        interval = f"{chosen['low']:.0%} to {chosen['high']:.0%}"
        figures = (
            cell.tokens,
            cell.score,
            f"{found['own']['share']:.0%}",
            f"{chosen['share']:.0%}",
            interval,
            f"{chosen['kl']:.2f}",
            f"{found['best_of']['4']:.0%}",
            f"{found['judge_calls']:,}",
        )
        print(f"{cell.judge:14}" + "".join(f"{figure!s:>12}" for figure in figures), flush=True)
    return rows
