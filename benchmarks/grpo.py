"""The policy-gradient rival: TRL's GRPO with LoRA, on the task of ``benchmarks.learning`` or a judge of the suite.

It samples the candidates that the environment proposes (top-k, no end of text), 64 texts a step. On the task its
learning rate, of three, and its KL term, on or off, are chosen on the validation prompts by the
reward after four steps: once whatever the KL, once among those within 8 nats. Then three seeds of
each are measured on the test prompts. On a judge all settings are shown. For the measurement
its policy is renormalised over the candidates of the untouched language model, as every policy is.

Needs ``pip install trl==1.16.0 peft``.
"""

from __future__ import annotations

import copy
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from textgen_env.errors import ConfigError
from textgen_env.evaluation import evaluate
from textgen_env.files import read_json, write_file
from textgen_env.models import load_pretrained
from textgen_env.policies import Floats, renormalise
from textgen_env.prompts import PromptSource
from textgen_env.rewards import make_reward
from textgen_env.rewards.base import Generation

if TYPE_CHECKING:
    from benchmarks.learning import Bench

TEXTS_A_STEP = 64
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
KL_TERMS = (0.0, 0.04)
STEPS_TO_CHOOSE = 4
GRID = tuple(
    {"learning_rate": rate, "kl_term": kl_term} for rate, kl_term in itertools.product(LEARNING_RATES, KL_TERMS)
)


@dataclass(frozen=True)
class Problem:
    """What it learns, and how its policy is measured."""

    model: str
    dtype: torch.dtype
    prompts: PromptSource  # to learn from
    tokens: int  # of a text
    score: Callable[[Sequence[Generation]], Floats]
    measure: Callable[[TunedModel], Mapping[str, float]]
    clock: Callable[[], float] = time.perf_counter


class TunedModel:
    """The model under training as an agent of the environment.

    Texts that all grow by one token are read on from a cache.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._tokens = torch.zeros(0, 0, dtype=torch.long)  # read so far, left-padded, (B, T)
        self._cache: Any = None

    @torch.inference_mode()
    def probabilities(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        """Return its policy over the candidates, (B, k)."""
        tokens, mask = left_padded(observation["tokens"], observation["length"][:, 0])
        known = self._tokens.shape[1]
        goes_on = tokens.shape == (len(self._tokens), known + 1) and torch.equal(tokens[:, :known], self._tokens)
        read = tokens[:, known:] if goes_on else tokens
        training = self._model.training
        self._model.eval()
        found = self._model(
            input_ids=read,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp_min(0)[:, -read.shape[1] :],
            past_key_values=self._cache if goes_on else None,
            use_cache=True,
            logits_to_keep=1,
        )
        self._model.train(training)
        self._tokens, self._cache = tokens, found.past_key_values
        last = found.logits[:, -1].float().log_softmax(-1)
        candidates = torch.from_numpy(observation["candidates"].astype(np.int64))
        return np.exp(renormalise(last.gather(-1, candidates).numpy(), observation["action_mask"])[0])

    def predict(self, observation: Any, **_: Any) -> Any:
        raise NotImplementedError("measured by its probabilities")


def left_padded(tokens: np.ndarray, lengths: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and attention mask, (B, T) each, of texts that are padded on the right."""
    longest = int(lengths.max())
    at = np.arange(longest) - (longest - lengths)[:, None]
    ids = np.where(at >= 0, np.take_along_axis(tokens, np.maximum(at, 0), axis=1), 0)
    return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy((at >= 0).astype(np.int64))


def run(bench: Bench, seed: int, steps: int, most_kl: float) -> dict[str, Any]:
    """Return the course of one seed at the settings chosen within ``most_kl`` nats, and its last point."""
    chosen = choose(bench, most_kl)
    updates = steps // (TEXTS_A_STEP * 20)
    course = train(_sentiment(bench, bench.test), seed, updates, lambda step, seconds: step >= updates // 2, **chosen)
    return {"settings": chosen, "seconds": course[-1]["seconds"], "course": course, "points": {"-": course[-1]}}


def choose(bench: Bench, most_kl: float) -> dict[str, float]:
    """Return the learning rate and KL term of the highest reward on the validation prompts, within ``most_kl``."""
    path = bench.folder / "grpo_settings.json"
    found = read_json(path) if path.is_file() else []
    problem = _sentiment(bench, bench.validation)
    for settings in GRID[len(found) :]:
        last = train(problem, 100, STEPS_TO_CHOOSE, lambda step, seconds: step == STEPS_TO_CHOOSE, **settings)[-1]
        found.append({**settings, **last})
        print(f"  grpo, validation: {found[-1]}", flush=True)
        write_file(path, json.dumps(found, indent=1))
    best = max((run for run in found if run["kl"] <= most_kl), key=lambda run: run["reward"])
    return {key: best[key] for key in ("learning_rate", "kl_term")}


def _sentiment(bench: Bench, prompts: Any) -> Problem:
    """Return the task of ``benchmarks.learning``, measured on ``prompts``."""
    env = bench.env(64, prompts, ("tokens", "length", "candidates", "logprobs", "action_mask"), "sentiment")

    def measure(policy: TunedModel) -> dict[str, float]:
        texts = evaluate(policy, env, bench.texts // 4, 11, prompts)
        return {"reward": texts.reward, "kl": float(texts.mean_kl or 0.0), "distinct_2": texts.distinct(2)}

    return Problem("smollm2", torch.bfloat16, bench.train, 20, make_reward("sentiment"), measure)


def train(
    problem: Problem,
    seed: int,
    updates: int,
    is_due: Callable[[int, float], bool],
    *,
    learning_rate: float,
    kl_term: float,
    seconds: float = float("inf"),
) -> list[dict[str, float]]:
    """Train from the start for ``updates`` steps or so many ``seconds``; return a row of figures for each look.

    Args:
        problem: What to learn.
        seed: Of its texts.
        updates: Steps of 64 texts.
        is_due: Whether to look at the policy after so many steps and seconds; looks do not count as seconds.
        learning_rate, kl_term: Of GRPO.
        seconds: By the problem's clock.
    """
    try:
        from datasets import Dataset
        from peft import LoraConfig
        from trl import GRPOTrainer
    except ImportError as error:
        raise ConfigError(f"the rival needs trl and peft ({error}): pip install trl==1.16.0 peft") from error

    model, tokenizer = load_pretrained(problem.model, problem.dtype)
    rows: list[dict[str, float]] = []

    def score(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return problem.score([Generation(p, c) for p, c in zip(prompts, completions, strict=True)]).tolist()

    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=copy.deepcopy(model),
            processing_class=tokenizer,
            reward_funcs=score,
            args=_settings(problem, folder, seed, updates, learning_rate, kl_term),
            train_dataset=Dataset.from_dict({"prompt": [problem.prompts[i].text for i in range(len(problem.prompts))]}),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[_measurements(problem, is_due, seconds, rows)],
        )
        trainer.train()
    return rows


def _measurements(
    problem: Problem, is_due: Callable[[int, float], bool], most_seconds: float, rows: list[dict[str, float]]
) -> Any:
    """Return a callback that adds a row for each look, with the clock stopped, and ends the training in time."""
    from transformers import TrainerCallback

    class Look(TrainerCallback):
        stopped = 0.0
        started = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.started = problem.clock()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seconds = problem.clock() - self.started - self.stopped
            if seconds >= most_seconds:
                control.should_training_stop = True
            if not control.should_training_stop and not is_due(state.global_step, seconds):
                return
            begun = problem.clock()
            row = {"steps": state.global_step * TEXTS_A_STEP * problem.tokens, "seconds": seconds}
            rows.append({**row, **problem.measure(TunedModel(kwargs["model"]))})
            self.stopped += problem.clock() - begun

    return Look()


def _settings(problem: Problem, folder: str, seed: int, updates: int, learning_rate: float, kl_term: float) -> Any:
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=folder,
        seed=seed,
        use_cpu=True,
        bf16=problem.dtype == torch.bfloat16,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        beta=kl_term,
        max_steps=updates,
        per_device_train_batch_size=TEXTS_A_STEP,
        num_generations=8,
        max_completion_length=problem.tokens,
        top_k=16,
        generation_kwargs={"min_new_tokens": problem.tokens},
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
    )
