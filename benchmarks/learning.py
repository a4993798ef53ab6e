"""How good, how fast, how far from the language model: TextDQN beside its rivals, on one yardstick.

SmolLM2-135M writes 20 tokens, 16 candidates a step; the reward is VADER's compound score. Every
contestant learns from the training prompts and is measured on 16 prompts of other templates, with
texts and random numbers of their own. Rewards always come with their KL, and both become

    share of the optimal gain = (J(pi) - J(mu)) / (J* - J(mu)),   J = E[R] - 0.1 KL,

where J* is estimated from 2,048 samples of the language model a prompt. Clocks stop during
evaluations. Settings were chosen on the validation prompts.

    python -m benchmarks.learning --quick                  # five minutes: shorter, one seed
    python -m benchmarks.learning --json FILE              # everything; goes on where it was stopped
    python -m benchmarks.learning --only text_dqn --seeds 1
    python -m benchmarks.learning --suite --quick          # judges of finished texts; see ``benchmarks.suite``
    python -m benchmarks.learning --fronts --quick         # such judges beside GRPO; see ``benchmarks.fronts``
    python -m benchmarks.learning --diagnose --quick       # how wrong Q is; see ``benchmarks.diagnose``
    python -m benchmarks.learning --only particles --quick --model tiny

``particles`` measures what more tokens a text buy: best-of-n, weighted best-of-n, guided best-of-n and
particles, whose settings are chosen on the validation prompts (see ``agents.runs.spending``).

GRPO, the policy-gradient rival, needs ``pip install trl==1.16.0 peft``; see ``benchmarks.grpo``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import trim_mean
from stable_baselines3.common.callbacks import BaseCallback

from agents.baselines.one_step import LookaheadAgent, SampleAgent
from agents.runs.optimum import best_of_n, estimated_optimum, share_of_optimal_gain
from agents.runs.spending import Spending, choices, draw_tokens, spend
from agents.text_dqn.agent import TextDQN
from agents.text_dqn.targets import OBJECTIVES
from agents.zoo import OBSERVATION
from benchmarks.throughput import machine
from textgen_env.evaluation import choose_prompts, evaluate
from textgen_env.files import read_json, whole_file, write_file
from textgen_env.models import load_language_model
from textgen_env.policies import Agent
from textgen_env.prompts import PromptSource, make_prompts
from textgen_env.rewards import Generation, make_reward
from textgen_env.rewards.classifier import train_classifier
from textgen_env.vector_env import TextGenVectorEnv

BETA = 0.1  # price of KL in J, reward units a nat
GOAL = 0.7  # reward whose time is taken
TASK: Mapping[str, Any] = {"top_k": 16, "max_new_tokens": 20, "min_new_tokens": 20}
MEASURED = ("tokens", "length", "logprobs", "action_mask")  # what agents without learning need
SCORES = ("score", "candidate_scores")
UNSCORED = tuple(key for key in OBSERVATION if key != "score")


@dataclass(frozen=True)
class Contestant:
    """A way to learn, and how it is measured."""

    about: str
    steps: int  # environment steps, one token each
    observation: tuple[str, ...] = UNSCORED
    reward: str = "sentiment"  # or "classifier"
    acting: tuple[float, ...] = (0.05, 0.07, 0.1, 0.13, 0.2)  # temperatures of the final evaluation
    looks: tuple[int, ...] = ()  # steps at which the course is measured
    settings: Mapping[str, Any] = field(default_factory=dict)  # of TextDQN; empty for GRPO
    counts: tuple[int, ...] = ()  # rows a text, by which more tokens are spent on a text


CONTESTANTS: dict[str, Contestant] = {
    "text_dqn_scores": Contestant(
        "TextDQN that sees the candidates' scores",
        250_000,
        (*OBSERVATION, "candidate_scores"),
        looks=(25_000, 50_000, 100_000),
        settings={"beta": BETA, "buffer_size": 250_000},
    ),
    "text_dqn": Contestant(
        "TextDQN without score inputs",
        60_000,
        looks=(10_000, 25_000, 40_000),
        settings={"beta": BETA, "buffer_size": 60_000},
    ),
    "text_dqn_fast": Contestant(
        "TextDQN without score inputs, speed before KL",
        10_000,
        acting=(0.03, 0.037, 0.05, 0.1),
        looks=(5_000, 7_500, 10_000),
        settings={
            "beta": 0.037,
            "target_beta": 0.05,
            "beta_start": 0.2,
            "exploration_fraction": 0.6,
            "learning_starts": 1_280,
            "steps_per_update": 40,
            "batch_size": 16,
            "learning_rate": 2e-3,
            "tau": 0.05,
        },
    ),
    "text_dqn_classifier": Contestant(
        "TextDQN on a classifier that judges finished texts only",
        40_000,
        reward="classifier",
        acting=(0.05, 0.1),
        settings={"beta": BETA},
    ),
    "particles": Contestant(
        "TextDQN without score inputs, and more tokens a text",
        60_000,
        acting=(0.1,),
        settings={"beta": BETA, "buffer_size": 60_000},
        counts=(1, 2, 4, 8, 16),
    ),
    "particles_classifier": Contestant(
        "TextDQN on a classifier of finished texts, and more tokens a text",
        40_000,
        reward="classifier",
        acting=(0.1,),
        settings={"beta": BETA},
        counts=(1, 2, 4, 8, 16),
    ),
    **{
        f"target_{target}": Contestant(
            f"TextDQN without score inputs, target {target}",
            40_000,
            acting=(0.07, 0.1, 0.13),
            settings={"beta": BETA, "buffer_size": 40_000, "target": target},
        )
        for target in OBJECTIVES
    },
    "grpo": Contestant("GRPO with LoRA (TRL)", 5 * 1_280, acting=()),
    "grpo_near": Contestant("GRPO with LoRA (TRL), the best within 8 nats", 8 * 1_280, acting=()),
}
SPENDING = tuple(name for name, contestant in CONTESTANTS.items() if contestant.counts)
MOST_KL = {"grpo": math.inf, "grpo_near": 8.0}  # nats, among which GRPO's settings are chosen by reward
SEEDS = {"grpo": 3, "grpo_near": 3, **{f"target_{target}": 2 for target in OBJECTIVES}}  # at most


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="five minutes: short runs, one seed, no GRPO")
    parser.add_argument(
        "--only", nargs="+", choices=CONTESTANTS, help="contestants to run; the others if there already"
    )
    parser.add_argument("--suite", action="store_true", help="judges of finished texts instead")
    parser.add_argument("--fronts", action="store_true", help="such judges, beside GRPO at equal CPU seconds, instead")
    parser.add_argument("--diagnose", action="store_true", help="the errors of Q instead")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--model", help="language model (default smollm2, of --fronts tiny)")
    parser.add_argument("--out", type=Path, help="folder of the runs (default out/learning, out/learning-quick)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the plane and the courses there (PNG)")
    options = parser.parse_args(arguments)
    if options.suite or options.fronts or options.diagnose:
        from benchmarks import judged

        judged.main(options)
        return
    model = options.model or "smollm2"
    folder = "out/learning" + "-quick" * options.quick + f"-{model}" * (model != "smollm2")
    bench = Bench(options.out or Path(folder), options.quick, model)
    names = options.only or [name for name in CONTESTANTS if not (options.quick and name in (*SEEDS, *SPENDING))]
    for name in names:
        for seed in range(1 if options.quick else min(options.seeds, SEEDS.get(name, options.seeds))):
            bench.run(name, seed)
    report = bench.report()
    write_file(bench.folder / "report.json", json.dumps(report, indent=1) + "\n")
    if options.json:
        write_file(options.json, json.dumps(report, indent=1) + "\n")
    draw(report, options.plot or bench.folder / "learning.png")
    print_table(report)


class Bench:
    """Runs and their yardstick, kept in a folder: what is there already is not done again."""

    def __init__(self, folder: Path, quick: bool, model: str = "smollm2") -> None:
        self.folder, self.quick = folder, quick
        self.texts = 128 if quick else 512  # of a final evaluation
        self.samples = 64 if quick else 2048  # of the language model, a test prompt
        folder.mkdir(parents=True, exist_ok=True)
        openings = make_prompts("openings")
        self.train = openings.split("train")
        self.validation = choose_prompts(openings.split("validation"), 16, 0)
        self.test = choose_prompts(openings.split("test"), 16, 0)
        self.model = load_language_model(model)

    def env(self, rows: int, prompts: PromptSource, keys: tuple[str, ...], reward: Any) -> TextGenVectorEnv:
        return TextGenVectorEnv(rows, self.model, prompts, reward, observation=keys, **TASK)

    def reward(self, name: str) -> Any:
        """Return what a contestant is rewarded for."""
        if name != "classifier":
            return name
        classifier = make_reward({"name": "classifier", "file": str(self._classifier())})

        def judged(completion: str) -> float:  # a plain function: nothing scores a prefix
            return float(classifier([Generation("", completion)])[0])

        return judged

    def _classifier(self) -> Path:
        """Return a classifier of positive and negative texts, trained on the language model's own."""
        path = self.folder / "classifier.json"
        if not path.is_file():
            texts = self._written("validation", self.validation, 64 if self.quick else 256, seed=7)
            rewards = make_reward("sentiment")([Generation("", text) for text in texts])
            clear = [(r, text) for r, text in zip(rewards, texts, strict=True) if abs(r) > 0.3]
            report = train_classifier(
                [("positive" if r > 0 else "negative", text) for r, text in clear], path, "positive"
            )
            print(f"classifier: {report}")
        return path

    def yardstick(self, reward: str) -> np.ndarray:
        """Return rewards of the language model's own texts on the test prompts, (P, n)."""
        path = self.folder / f"language_model_{reward}.npy"
        if not path.is_file():
            texts = [Generation("", text) for text in self._written("test", self.test, self.samples, seed=1)]
            np.save(path, make_reward(self.reward(reward))(texts).reshape(len(self.test), self.samples))
        return np.load(path)

    def _written(self, name: str, prompts: PromptSource, samples: int, seed: int) -> list[str]:
        """Return the language model's own texts, ``samples`` for each prompt, one prompt's after another's."""
        path = self.folder / f"language_model_{name}.json"
        if not path.is_file():
            print(f"language model: {samples} texts for each of {len(prompts)} prompts", flush=True)
            env = self.env(256, prompts, ("logprobs", "action_mask"), "length")
            written = evaluate(SampleAgent(), env, samples * len(prompts), seed, prompts)
            write_file(path, json.dumps(written.by_prompt(np.array(written.completions, object)).ravel().tolist()))
        found: list[str] = read_json(path, allow_nan=True)
        return found

    def run(self, name: str, seed: int) -> None:
        """Let a contestant learn and be measured, unless it has been."""
        path = self.folder / f"{name}-{seed}.json"
        if path.is_file():
            return
        contestant = CONTESTANTS[name]
        print(f"{name}, seed {seed}", flush=True)
        if name in MOST_KL:
            from benchmarks import grpo

            found = grpo.run(self, seed, contestant.steps, MOST_KL[name])
        else:
            found = self._text_dqn(contestant, seed)
        write_file(path, json.dumps(found, indent=1) + "\n")

    def _text_dqn(self, contestant: Contestant, seed: int) -> dict[str, Any]:
        reward = self.reward(contestant.reward)
        steps = min(contestant.steps, 15_000) if self.quick else contestant.steps
        env = self.env(64, self.train, contestant.observation, reward)
        measured_in = self.env(128, self.test, contestant.observation, reward)
        agent = TextDQN("CandidatePolicy", env, seed=seed, **contestant.settings)
        course = Course(lambda: self.measure(agent, measured_in, self.texts // 2), contestant.looks)
        agent.learn(steps, callback=course)
        points = {}
        for beta in contestant.acting:
            agent.beta = beta
            points[f"{beta:g}"] = self.measure(agent, measured_in, self.texts)
        return {"steps": steps, **course.figures(), "points": points, **self._spending(contestant, agent, measured_in)}

    def _spending(self, contestant: Contestant, agent: TextDQN, env: TextGenVectorEnv) -> dict[str, Any]:
        """Return what more tokens a text buy; nothing for a contestant without counts."""
        if not contestant.counts:
            return {}
        agent.beta = BETA
        counts = [n for n in contestant.counts if n <= (8 if self.quick else self.samples)]
        validation = list(self.validation)[: 8 if self.quick else None]
        points = []
        for n in counts:
            points += choices(self.yardstick(contestant.reward), n, BETA, float(TASK["max_new_tokens"]))
            points += spend(
                agent, env, list(self.test), validation, n, beta=BETA, texts=4 * self.texts, seed=11,
                say=lambda way: print(f"  {way}", flush=True),
            )  # fmt: skip
        return {"spending": [asdict(point) for point in points]}

    def measure(self, agent: Agent, env: TextGenVectorEnv, texts: int) -> dict[str, float]:
        """Return reward, KL and the like of ``texts`` fresh texts on the test prompts."""
        found = evaluate(agent, env, texts, seed=11, prompts=self.test)
        kl = found.mean_kl
        return {
            "reward": found.reward,
            "kl": math.nan if kl is None else kl,
            "likelihood": found.likelihood,
            "distinct_2": found.distinct(2),
            "repetition": found.repetition,
        }

    def report(self) -> dict[str, Any]:
        """Return every figure of the runs that are there."""
        contestants: dict[str, Any] = {}
        for name, contestant in CONTESTANTS.items():
            files = sorted(self.folder.glob(f"{name}-[0-9]*.json"))
            if files:
                runs = [read_json(file, allow_nan=True) for file in files]
                contestants[name] = self._summary(contestant, runs)
        rewards = self.yardstick("sentiment")
        best = estimated_optimum(rewards, BETA)
        frontier = {
            f"{beta:g}": estimated_optimum(rewards, beta).point for beta in (1.0, 0.5, 0.2, 0.15, 0.1, 0.07, 0.05)
        }
        return {
            **machine(),
            "share_of_optimal_gain": contestants.get("text_dqn_scores", {}).get("share_of_optimal_gain"),
            "seconds_to_0.7": contestants.get("text_dqn_fast", {}).get("seconds_to_0.7"),
            "contestants": contestants | {"lookahead": self._lookahead("sentiment")},
            "language_model": {"reward": float(rewards.mean()), "samples_a_prompt": rewards.shape[1]},
            "best_possible": {
                "value": float(best.value.mean()),
                "effective_samples": float(np.median(best.effective_samples)),
                "frontier": frontier,
            },
            "best_of_n": {str(n): best_of_n(rewards, n) for n in (2, 4, 8, 16, 32, 64) if n <= rewards.shape[1]},
        }

    def _summary(self, contestant: Contestant, runs: list[dict[str, Any]]) -> dict[str, Any]:
        points = {
            beta: {key: middle([run["points"][beta][key] for run in runs]) for key in runs[0]["points"][beta]}
            for beta in runs[0]["points"]
        }
        shares = {
            beta: [self.share(run["points"][beta], contestant.reward) for run in runs] for beta in runs[0]["points"]
        }
        own = f"{BETA:g}" if f"{BETA:g}" in shares else next(iter(shares))
        return {
            "about": contestant.about,
            "share_of_optimal_gain": middle(shares[own]),
            "shares": {beta: {"middle": middle(values), "seeds": values} for beta, values in shares.items()},
            "points": points,
            **{key: middle([run[key] for run in runs]) for key in ("seconds", "seconds_of_updates") if key in runs[0]},
            "seconds_to_0.7": _seconds_to(GOAL, runs),
            **({"spending": self._spent(contestant, runs)} if contestant.counts else {}),
            "runs": runs,
        }

    def _spent(self, contestant: Contestant, runs: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the middle of the runs' certified shares and rewards, by way and rows a text."""
        rewards = self.yardstick(contestant.reward)
        bounds = float(rewards.mean()), float(estimated_optimum(rewards, BETA).value.mean())
        points = [Spending(**point) for run in runs for point in run["spending"]]
        draw_tokens(points[: len(runs[0]["spending"])], *bounds, self.folder / f"tokens_{contestant.reward}.png")
        found: dict[str, Any] = {}
        for way, n in dict.fromkeys((point.way, point.n) for point in points):
            same = [point for point in points if (point.way, point.n) == (way, n)]
            shares = [share_of_optimal_gain(point.value, *bounds) for point in same]
            spread = [(point.value_high - point.value_low) / 2 / (bounds[1] - bounds[0]) for point in same]
            found[f"{way}, n = {n}"] = {
                "share_at_least": middle(shares),
                "half_interval": middle(spread),  # of a seed's texts
                "shares": shares,
                **{key: middle([getattr(point, key) for point in same]) for key in ("reward", "tokens", "judge_calls")},
                "trust": [point.trust for point in same],
                "threshold": [point.threshold for point in same],
            }
        return found

    def _lookahead(self, reward: str) -> dict[str, Any]:
        """Return score lookahead without learning, measured once."""
        path = self.folder / f"lookahead_{reward}.json"
        if not path.is_file():
            env = self.env(128, self.test, ("logprobs", "action_mask", *SCORES), reward)
            betas = (0.1, 0.2) if self.quick else (0.05, 0.1, 0.15, 0.2, 0.3)
            points = {f"{beta:g}": self.measure(LookaheadAgent(beta), env, self.texts) for beta in betas}
            write_file(path, json.dumps(points))
        points = read_json(path, allow_nan=True)
        shares = {beta: self.share(point, reward) for beta, point in points.items()}
        return {
            "about": "score lookahead, no learning",
            "share_of_optimal_gain": max(shares.values()),
            "points": points,
        }

    def share(self, point: Mapping[str, float], reward: str) -> float:
        """Return the share of the optimal gain of a measured point."""
        rewards = self.yardstick(reward)
        best = float(estimated_optimum(rewards, BETA).value.mean())
        return share_of_optimal_gain(point["reward"] - BETA * point["kl"], float(rewards.mean()), best)


class Course(BaseCallback):
    """Measures an agent at given steps while it learns, with the clock stopped."""

    def __init__(self, measure: Any, looks: Sequence[int]) -> None:
        super().__init__()
        self._measure, self._looks = measure, list(looks)
        self._stopped = 0.0  # seconds that evaluations took
        self.rows: list[dict[str, float]] = []

    def _on_training_start(self) -> None:
        self._started = time.perf_counter()
        self._updates = 0.0
        learn = self.model.train

        def timed(*args: Any, **kwargs: Any) -> None:
            started = time.perf_counter()
            learn(*args, **kwargs)
            self._updates += time.perf_counter() - started

        self.model.train = timed  # type: ignore[method-assign]

    def _on_step(self) -> bool:
        self.seconds = time.perf_counter() - self._started - self._stopped
        if self._looks and self.num_timesteps >= self._looks[0]:
            self._looks.pop(0)
            started = time.perf_counter()
            self.rows.append({"steps": self.num_timesteps, "seconds": self.seconds, **self._measure()})
            self._stopped += time.perf_counter() - started
        return True

    def figures(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "seconds_of_updates": self._updates, "course": self.rows}


def middle(values: Sequence[float]) -> float:
    """Return the interquartile mean."""
    return float(trim_mean(values, 0.25))


def _seconds_to(goal: float, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the first measured moments at which each run's reward was at ``goal``, and their medians."""
    firsts = [next((row for row in run["course"] if row["reward"] >= goal), None) for run in runs]
    reached = [first for first in firsts if first is not None]
    if len(reached) < len(firsts) or not reached:
        return {"reached": f"{len(reached)} of {len(firsts)}", "seconds": None}
    keys = ("seconds", "steps", "kl", "distinct_2")
    return {"reached": f"{len(reached)} of {len(firsts)}", **{key: median(row[key] for row in reached) for key in keys}}


def print_table(report: Mapping[str, Any]) -> None:
    before, best = report["language_model"]["reward"], report["best_possible"]["value"]
    print(f"\nlanguage model {before:.2f}, best possible J* {best:.3f}")
    print(f"{'contestant':22} {'acting beta: reward at KL (share of the optimal gain)'}")
    for name, found in report["contestants"].items():
        shares = found.get("shares", {})
        cells = (
            f"{beta}: {point['reward']:.2f} at {point['kl']:.1f}"
            + (f" ({shares[beta]['middle']:.0%})" if beta in shares else "")
            for beta, point in found["points"].items()
        )
        print(f"{name:22} {'  '.join(cells)}")
        for way, spent in found.get("spending", {}).items():
            share = f"at least {spent['share_at_least']:4.0%} ±{spent['half_interval']:.0%}"
            print(f"{'':22} {way:28} {spent['tokens']:4.0f} tokens: reward {spent['reward']:.2f}, {share}")
        if seconds := found.get("seconds_to_0.7"):
            print(f"{'':22} to reward {GOAL}: {seconds}")


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw the reward-KL plane, and reward against tokens and seconds."""
    figure = Figure(figsize=(13, 4.2), dpi=110, layout="constrained")
    plane, tokens, seconds = (figure.add_subplot(1, 3, i) for i in (1, 2, 3))
    bounds = {"best possible policy": ("black", list(report["best_possible"]["frontier"].values()), "-")}
    bounds["best of n"] = ("tab:gray", list(report["best_of_n"].values()), "--")
    for name, (color, points, style) in bounds.items():
        plane.plot([kl for _, kl in points], [reward for reward, _ in points], style, color=color, label=name)
    shown = {name: found for name, found in report["contestants"].items() if "classifier" not in name}
    for i, found in enumerate(found for name, found in shown.items() if not name.startswith("target_")):
        plane.plot([], [], "o-", color=f"C{i}", label=found["about"])
        # What has one policy at a time is drawn as it learned, the others at all their temperatures.
        lines = [found["points"].values()] if "-" not in found["points"] else [run["course"] for run in found["runs"]]
        for line in lines:
            points = sorted((point["kl"], point["reward"]) for point in line)
            plane.plot(*zip(*points, strict=True), "o-", markersize=4, color=f"C{i}")
        for run in found.get("runs", []):
            for axes, key in ((tokens, "steps"), (seconds, "seconds")):
                axes.plot(
                    [row[key] for row in run["course"]], [row["reward"] for row in run["course"]], ".-", color=f"C{i}"
                )
    plane.set(xlabel="KL, nats a text", ylabel="reward", xlim=(0, 16))
    tokens.set(xlabel="tokens")
    seconds.set(xlabel="seconds of training")
    plane.legend(frameon=False, fontsize=7, loc="lower right")
    for axes in (plane, tokens, seconds):
        axes.grid(alpha=0.3)
    with whole_file(path) as half_made:
        figure.savefig(half_made, format=path.suffix[1:])


if __name__ == "__main__":
    main()
