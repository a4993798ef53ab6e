"""Search for the best texts of the language tasks: the bounds of ``Task.bounds()``.

Each test prompt has a pool of its best texts. Again and again one of them is cut somewhere, and
the language model writes the rest anew, sometimes leaning towards what raises the running score.
Whatever comes out was written within the candidates, so its reward is a lower bound of the best.

    python -m benchmarks.bounds                    # all language tasks; writes textgen_env/tasks/bounds.json
    python -m benchmarks.bounds --tasks TextGen/Sentiment-v0 --sizes length=40     # adds one more
    python -m benchmarks.bounds --tasks TextGen/GuessNumber-v0 --sizes model=smollm2     # a game in words
    python -m benchmarks.bounds --table            # the tables of docs/tasks.md, without a search
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import trange

import textgen_env
from agents.baselines.one_step import SampleAgent
from textgen_env.evaluation import Evaluation, evaluate
from textgen_env.files import read_json, write_file
from textgen_env.policies import sample
from textgen_env.tasks import TASKS, Task, make_task
from textgen_env.tasks import language as language_tasks

PATH = Path(language_tasks.__file__).with_name("bounds.json")
POOL = 8  # best texts kept of each prompt
LEANS = (0.0, 0.0, 3.0, 10.0, 30.0)  # nats a unit of the running score; 0: as the language model writes
FLATTER = (1.0, 1.0, 0.5, 0.2)  # powers of the language model's probabilities

Actions = tuple[int, ...]


class Search:
    """The pools of best texts, as actions, of the test prompts of a task."""

    def __init__(self, task: Task, rows: int, seed: int) -> None:
        model_keys = ("logprobs", "action_mask", "score")
        scores = task.reward.running() is not None and task.settings.get("top_k", 16) is not None
        self.env = task.make_vec(rows, observation=(*model_keys, "candidate_scores") if scores else model_keys)
        self.scores = scores
        self.prompts = list(task.test_prompts)
        self.pools: list[list[tuple[float, Actions]]] = [[] for _ in self.prompts]
        self.rng = np.random.default_rng(seed)

    def plant_references(self) -> None:
        """Try the references themselves, where every token is a candidate."""
        episodes = self.env.episodes
        for i, prompt in enumerate(self.prompts):
            if episodes.config.top_k is None and prompt.reference is not None:
                begun, whole = (episodes.model.encode(text) for text in (prompt.text, prompt.text + prompt.reference))
                new = whole[len(begun) :] if whole[: len(begun)] == begun else episodes.model.encode(prompt.reference)
                self._write([i], [(*new, *episodes.model.end_ids[:1])])

    def step(self) -> None:
        """Write one more text in every row and keep the best."""
        which = self.rng.integers(len(self.prompts), size=self.env.num_envs)
        self._write(which.tolist(), [self._cut(i) for i in which])

    @property
    def best(self) -> float:
        """The mean over prompts of the best reward found."""
        return float(np.mean([pool[0][0] if pool else np.nan for pool in self.pools]))

    def _cut(self, prompt: int) -> Actions:
        pool = self.pools[prompt]
        if not pool or self.rng.random() < 0.1:
            return ()
        actions = pool[self.rng.integers(len(pool))][1]
        return actions[: self.rng.integers(len(actions))]

    def _write(self, which: Sequence[int], begun: Sequence[Actions]) -> None:
        episodes, texts = self.env.episodes, [list[int]() for _ in which]
        rows = np.arange(len(which))
        lean = self.rng.choice(LEANS, len(which))[:, None]
        power = self.rng.choice(FLATTER, len(which))[:, None]
        totals = np.zeros(len(which))
        episodes.begin(rows, [self.prompts[i] for i in which])
        while rows.size:
            logits = episodes.log_prior(rows)[0] * power[rows]
            if self.scores:
                logits = logits + lean[rows] * episodes.observe(rows)["candidate_scores"]
            policy = np.exp(logits - logits.max(-1, keepdims=True))
            actions = sample(policy, self.rng.random(rows.size))
            for j, row in enumerate(rows):
                if len(texts[row]) < len(begun[row]):
                    actions[j] = begun[row][len(texts[row])]
                texts[row].append(int(actions[j]))
            outcome = episodes.act(rows, actions)
            totals[rows] += outcome.rewards
            rows = rows[~outcome.ended]
        for prompt, reward, text in zip(which, totals.tolist(), texts, strict=True):
            pool = {(reward, tuple(text)), *self.pools[prompt]}
            self.pools[prompt] = sorted(pool, reverse=True)[:POOL]


def bounds_of(task: Task, search_texts: int, texts: int, rows: int, seed: int) -> dict[str, Any]:
    """Return the entry of ``bounds.json`` for ``task``."""
    if task.partner is not None:  # a game in words: no play is better than the best one with the game's own tokens
        env = task.make_vec(rows, observation=("logprobs", "action_mask"))
        game = {name: value for name, value in task.sizes.items() if name != "model"}
        played = evaluate(SampleAgent(), env, texts, seed, task.test_prompts)
        return _entry(task, played, make_task(task.id, **game).bounds().best, 0)
    search = Search(task, rows, seed)
    search.plant_references()
    with trange(0, search_texts, rows, desc=task.id, unit="text", unit_scale=rows) as rounds:
        for _ in rounds:
            search.step()
            rounds.set_postfix(best=f"{search.best:.3f}")
    return _entry(task, evaluate(SampleAgent(), search.env, texts, seed, task.test_prompts), search.best, search_texts)


def _entry(task: Task, sampled: Evaluation, best: float, searched: int) -> dict[str, Any]:
    return {
        "id": task.id,
        "sizes": dict(task.sizes),
        "language_model": round(sampled.reward, 6),
        "best": round(best, 6),
        "standard_error": round(float(sampled.rewards.std() / len(sampled.rewards) ** 0.5), 6),
        "texts": len(sampled.rewards),
        "searched": searched,
    }


def tables() -> str:
    """Return the bounds of all tasks at their default sizes, as three Markdown tables."""
    rows: dict[str, list[str]] = {"diagnostic": [], "language": [], "conversation": []}
    for id in TASKS:
        task = make_task(id)
        kind = "language" if isinstance(task.model, str) else "diagnostic"
        kind = "conversation" if task.partner is not None else kind
        sizes = ", ".join(f"`{name}={value}`" for name, value in task.sizes.items())
        bounds = task.bounds()
        figures = [f"{bounds.language_model:.4f}", f"{bounds.best:.4f}"]
        if kind == "language":
            figures.append(f"{bounds.ceiling:g}")
        rows[kind].append(f"| `{id}` | {task.summary} | {sizes} | {' | '.join(figures)} |")
    return "\n\n".join("\n".join(lines) for lines in rows.values()) + "\n"


def main() -> None:
    """Search, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [f"TextGen/{name}-v0" for name in textgen_env.LANGUAGE_TASKS]
    parser.add_argument("--tasks", nargs="+", default=names, help="ids of language tasks; all unless said")
    parser.add_argument("--sizes", nargs="*", default=[], metavar="NAME=VALUE", help="sizes other than the default")
    parser.add_argument("--search", type=int, default=2560, help="texts to search through, for each task")
    parser.add_argument("--texts", type=int, default=1024, help="of the language model, for its mean reward")
    parser.add_argument("--rows", type=int, default=128, help="texts written at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="print what is known, and search nothing")
    given = parser.parse_args()
    if given.table:
        print(tables(), end="")
        return
    sizes = {name: _value(value) for name, _, value in (size.partition("=") for size in given.sizes)}
    entries = read_json(PATH, ["bounds"])["bounds"] if PATH.exists() else []
    for id in given.tasks:
        found = bounds_of(make_task(id, **sizes), given.search, given.texts, given.rows, given.seed)
        entries = [e for e in entries if (e["id"], e["sizes"]) != (id, found["sizes"])] + [found]
        entries.sort(key=lambda entry: list(TASKS).index(entry["id"]))
        lines = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
        text = f'{{"made_by": "python -m benchmarks.bounds", "bounds": [\n{lines}\n]}}\n'
        write_file(PATH, text)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


if __name__ == "__main__":
    main()
