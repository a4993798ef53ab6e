"""The rules of an episode, for N rows at once, without a word of Gymnasium.

The single environment is these rules with one row, the vector environment with N. A row is a
prompt and the tokens chosen since; the language model proposes what may come next.

    begin(rows)  ->  refresh(rows)  ->  observe()          one forward a refresh, for all rows in it
                        ^                   |
    act(rows, actions) -+-- live            +-> agent
                        +-- ended: rewards, infos, show_end(rows), begin(rows)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from textgen_env.config import EnvConfig
from textgen_env.errors import ConfigError, IllegalAction, PromptError, ResetNeeded
from textgen_env.models.base import MASKED_LOGPROB, LanguageModel
from textgen_env.models.candidates import nucleus
from textgen_env.prompts import Prompt, PromptSource
from textgen_env.rewards.base import Generation, Reward, ScoreState

Rows = npt.NDArray[np.int64]
Observation = dict[str, npt.NDArray[Any]]


@dataclass
class RowStates:
    """Everything an episode knows of its rows: one array a field, row by row.

    Python objects (prompts, texts, the reward's running state) are immutable and sit in object
    arrays, so that one indexing rule copies a row, whatever it holds.
    """

    tokens: npt.NDArray[np.int32]  # (N, T) prompt and generated ids
    length: npt.NDArray[np.int64]  # (N,) how many of them are real
    prompt_length: npt.NDArray[np.int64]  # (N,)
    token_logprobs: npt.NDArray[np.float32]  # (N, max_new_tokens) nats, of the chosen tokens
    live: npt.NDArray[np.bool_]  # (N,) between reset and the end
    paid: npt.NDArray[np.float64]  # (N,) reward paid so far
    illegal: npt.NDArray[np.int64]  # (N,) masked actions that were mapped
    prompt: npt.NDArray[np.object_]  # (N,) Prompt
    completion: npt.NDArray[np.object_]  # (N,) text so far, kept where stop strings or scores need it
    score_state: npt.NDArray[np.object_]  # (N,) the running score's state
    candidates: npt.NDArray[np.int32]  # (N, k) what the model proposes now
    logprobs: npt.NDArray[np.float32]  # (N, k) nats
    legal: npt.NDArray[np.bool_]  # (N, k)
    hidden: npt.NDArray[np.float32]  # (N, d)
    score: npt.NDArray[np.float32]  # (N,)
    candidate_scores: npt.NDArray[np.float32]  # (N, k)
    continuations: npt.NDArray[np.object_]  # (N,) list of the k texts, or None

    @classmethod
    def empty(cls, rows: int, length: int, new: int, k: int, hidden: int) -> RowStates:
        def objects() -> npt.NDArray[np.object_]:
            return np.full(rows, None, dtype=object)

        return cls(
            tokens=np.zeros((rows, length), np.int32),
            length=np.zeros(rows, np.int64),
            prompt_length=np.zeros(rows, np.int64),
            token_logprobs=np.zeros((rows, new), np.float32),
            live=np.zeros(rows, np.bool_),
            paid=np.zeros(rows, np.float64),
            illegal=np.zeros(rows, np.int64),
            prompt=objects(),
            completion=objects(),
            score_state=objects(),
            candidates=np.zeros((rows, k), np.int32),
            logprobs=np.zeros((rows, k), np.float32),
            legal=np.ones((rows, k), np.bool_),
            hidden=np.zeros((rows, hidden), np.float32),
            score=np.zeros(rows, np.float32),
            candidate_scores=np.zeros((rows, k), np.float32),
            continuations=objects(),
        )

    def copy_rows(self, src: Rows, dst: Rows) -> None:
        for field in fields(self):
            array = getattr(self, field.name)
            array[dst] = array[src]

    def save(self, row: int) -> dict[str, Any]:
        return {field.name: copy.copy(getattr(self, field.name)[row]) for field in fields(self)}

    def load(self, row: int, saved: dict[str, Any]) -> None:
        for field in fields(self):
            getattr(self, field.name)[row] = saved[field.name]


@dataclass(frozen=True)
class Outcome:
    """What a step did to the B rows that acted."""

    actions: npt.NDArray[np.int64]  # (B,) that were played: illegal ones are mapped
    rewards: npt.NDArray[np.float64]  # (B,)
    ended: npt.NDArray[np.bool_]  # (B,)
    infos: list[dict[str, Any]]  # one a row, filled where the episode ended


@dataclass(frozen=True)
class Snapshot:
    """One row at one moment. Later steps do not touch it."""

    owner: Episodes
    state: dict[str, Any]
    slot: Any


class Episodes:
    """N rows of text generation under one model, prompt source, reward and configuration.

    Raises:
        ConfigError: ``top_k`` does not fit the vocabulary, the prompt and the completion do not
            fit the context, or scores are asked of a reward that cannot score a prefix.
        CapacityError: the model's cache for N rows would not fit into memory.
    """

    def __init__(
        self, model: LanguageModel, prompts: PromptSource, reward: Reward, config: EnvConfig, rows: int
    ) -> None:
        self.model = model
        self.prompts = prompts
        self.reward = reward
        self.config = config
        self.rows = rows
        self.max_length = config.max_prompt_tokens + config.max_new_tokens
        if self.max_length > model.max_context:
            raise ConfigError(
                f"max_prompt_tokens={config.max_prompt_tokens} plus max_new_tokens={config.max_new_tokens} "
                f"exceed the {model.max_context} tokens of context that model {model.name!r} has"
            )
        self._running = reward.running()
        if config.reward_at == "step" and self._running is None:
            raise ConfigError(
                f"reward_at='step' needs a reward that can score a prefix, and {reward.name!r} cannot: "
                "use reward_at='end', or give the reward a running() score"
            )
        self.keys = config.keys(self._running is not None)
        self._scores = self._running is not None and (
            config.reward_at == "step" or bool({"score", "candidate_scores"} & set(self.keys))
        )
        self._keeps_text = self._scores or bool(config.stop)
        self.k = model.vocab_size if config.top_k is None else config.top_k
        self._is_end = np.zeros(model.vocab_size, np.bool_)
        self._is_end[list(model.end_ids)] = True
        self._slots = model.slots(rows, self.max_length, config.top_k)
        self.state = RowStates.empty(rows, self.max_length, config.max_new_tokens, self.k, model.hidden_size)
        self._encode: Callable[[str], tuple[int, ...]] = lru_cache(maxsize=4096)(self._encode_prompt)

    # --- the course of an episode

    def begin(self, rows: Rows, prompts: Sequence[Prompt]) -> None:
        """Start a new episode in each row. No forward.

        Raises:
            PromptError: a prompt without tokens, or longer than ``max_prompt_tokens``. No row has changed.
            RewardError: the running score cannot start on a prompt. No row has changed.
        """
        encoded = [self._encode(prompt.text) for prompt in prompts]
        scores = [self._start_score(prompt) for prompt in prompts]
        state = self.state
        for row, prompt, ids, score in zip(rows, prompts, encoded, scores, strict=True):
            state.prompt[row] = prompt
            state.tokens[row] = 0
            state.tokens[row, : len(ids)] = ids
            state.length[row] = state.prompt_length[row] = len(ids)
            state.completion[row] = ""
            state.score_state[row] = score
            state.score[row] = 0.0 if score is None else score.value
        state.token_logprobs[rows] = 0.0
        state.live[rows] = True
        state.paid[rows] = 0.0
        state.illegal[rows] = 0
        self._slots.start(rows, encoded)

    def refresh(self, rows: Rows) -> None:
        """Let the model propose what comes next in each row: at most one forward, none for no rows."""
        if not len(rows):
            return
        state = self.state
        state.live[rows] = False  # a model that fails leaves no row with the candidates of another prefix
        proposals = self._slots.propose(rows, self.steps(rows) < self.config.min_new_tokens)
        legal = proposals.logprobs > MASKED_LOGPROB
        if self.config.top_p < 1.0:
            legal &= self._nucleus(proposals.logprobs)
        state.candidates[rows] = proposals.candidates
        state.logprobs[rows] = np.where(legal, proposals.logprobs, np.float32(MASKED_LOGPROB))
        state.legal[rows] = legal
        state.hidden[rows] = proposals.hidden
        if "candidate_scores" in self.keys:
            self._look_ahead(rows)
        state.live[rows] = True

    def act(self, rows: Rows, actions: npt.ArrayLike) -> Outcome:
        """Append ``candidates[row, action]`` to each row and pay its reward. No forward.

        Raises:
            ResetNeeded: a row has no live episode.
            IllegalAction: an action that is no integer, out of range, or masked. No row has changed.
            RewardError: see ``Reward.scored``. The rows need a reset.
        """
        state = self.state
        if not state.live[rows].all():
            ended = rows[~state.live[rows]].tolist()
            raise ResetNeeded(f"rows {ended} have no live episode: call reset before the first step and after the end")
        chosen = self._legal_actions(rows, actions)
        state.live[rows] = False  # whatever raises from here on, no row goes on with half a step
        tokens = state.candidates[rows, chosen]
        state.token_logprobs[rows, self.steps(rows)] = state.logprobs[rows, chosen]
        state.tokens[rows, state.length[rows]] = tokens
        state.length[rows] += 1
        self._slots.advance(rows, tokens.astype(np.int64))
        if self._keeps_text:
            self._extend_texts(rows, chosen, tokens)
        reasons = self._finish_reasons(rows, tokens)
        ended = np.array([reason is not None for reason in reasons], np.bool_)
        rewards = np.zeros(len(rows), np.float64)
        if self.config.reward_at == "step":
            rewards += state.score[rows] - state.paid[rows]
        infos: list[dict[str, Any]] = [{} for _ in rows]
        if self.config.on_illegal == "last_legal":
            for info, row in zip(infos, rows, strict=True):
                info["illegal_actions"] = float(state.illegal[row])
        if ended.any():
            self._pay_ended(rows, ended, reasons, rewards, infos)
        state.paid[rows] += rewards
        state.live[rows] = ~ended
        return Outcome(chosen, rewards, ended, infos)

    def show_end(self, rows: Rows) -> None:
        """Fill the observation of ended rows: no forward, nothing that a target may read."""
        state = self.state
        state.hidden[rows] = 0.0
        state.candidates[rows] = 0
        state.logprobs[rows] = -np.log(self.k)
        state.legal[rows] = True
        state.candidate_scores[rows] = state.score[rows, None]
        state.continuations[rows] = None

    def draw(self, rng: np.random.Generator) -> Prompt:
        """Return the next prompt of a row, chosen by the row's own generator."""
        return self.prompts.draw(rng)

    # --- rows that branch

    def fork(self, src: Rows, dst: Rows) -> None:
        """Let row ``dst[i]`` become what row ``src[i]`` is, the model's cache included. O(row).

        Raises:
            IndexError: a row out of range, or a ``dst`` named twice.
            ResetNeeded: a ``src`` that never began.
        """
        for name, rows in (("src", src), ("dst", dst)):
            if rows.dtype.kind not in "iu" or rows.ndim != 1 or not ((rows >= 0) & (rows < self.rows)).all():
                raise IndexError(f"{name} must be rows in 0..{self.rows - 1}, got {rows.tolist()}")
        if len(src) != len(dst) or len(set(dst.tolist())) != len(dst):
            raise IndexError(f"each src needs one dst, each dst named once; got src={src.tolist()}, dst={dst.tolist()}")
        self._check_begun(src)
        self._slots.fork(src, dst)
        self.state.copy_rows(src, dst)

    def save(self, row: int) -> Snapshot:
        """Return a copy of one row. O(row).

        Raises:
            ResetNeeded: the row never began.
        """
        self._check_begun(np.array([row]))
        return Snapshot(self, self.state.save(row), self._slots.save(row))

    def load(self, row: int, saved: Snapshot) -> None:
        """Put back what ``save`` returned.

        Raises:
            ConfigError: another environment saved it, or it is no snapshot.
        """
        if not isinstance(saved, Snapshot):
            raise ConfigError(f"only a snapshot can be restored, got {type(saved).__name__}")
        if saved.owner is not self:
            raise ConfigError("the snapshot was taken in another environment; restore it where it was taken")
        self._slots.load(row, saved.slot)
        self.state.load(row, saved.state)

    def rebuild(self) -> None:
        """Forget memos, caches and running scores but the token ids and texts, as a resumed process must."""
        self._slots.rebuild()
        for row in np.flatnonzero(self.begun(np.arange(self.rows))):
            score = self._start_score(self.state.prompt[row])
            if score is not None and self._running is not None:
                if self.state.completion[row]:
                    score = self._running.extend(score, self.state.completion[row])
                self.state.score_state[row], self.state.score[row] = score, score.value

    def state_dict(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Return all rows as arrays and plain data, and ``rebuild``: who goes on and who resumes are alike."""
        self.rebuild()
        state = self.state
        arrays = {f.name: getattr(state, f.name) for f in fields(state)}
        prompts = [
            None if p is None else {"text": p.text, "reference": p.reference, "metadata": dict(p.metadata)}
            for p in state.prompt
        ]
        objects = {name: arrays[name].tolist() for name in ("completion", "continuations")}
        return {name: a.copy() for name, a in arrays.items() if a.dtype != object}, {"prompt": prompts, **objects}

    def load_state_dict(self, arrays: dict[str, npt.NDArray[Any]], plain: dict[str, Any]) -> None:
        """Put back what ``state_dict`` returned, under the same model, reward and configuration.

        Raises:
            ConfigError: it is of other shapes.
        """
        state = self.state
        for name in (f.name for f in fields(state)):
            array = getattr(state, name)
            if array.dtype == object:
                continue
            if name not in arrays or arrays[name].shape != array.shape:
                given = arrays[name].shape if name in arrays else None
                raise ConfigError(f"the stored rows are of another environment: {name} is {given}, not {array.shape}")
            array[...] = arrays[name]
        for row, prompt in enumerate(plain["prompt"]):
            state.prompt[row] = None if prompt is None else Prompt(**prompt)
            state.completion[row] = plain["completion"][row]
            state.continuations[row] = plain["continuations"][row]
        begun = np.flatnonzero(self.begun(np.arange(self.rows))).tolist()
        ids = {row: self.ids_of(row) for row in begun}
        self._slots.start(np.array(begun, np.int64), [ids[row][0] for row in begun])
        for step in range(self.config.max_new_tokens):
            longer = [row for row in begun if step < len(ids[row][1])]
            self._slots.advance(np.array(longer, np.int64), np.array([ids[row][1][step] for row in longer], np.int64))
        self.rebuild()

    # --- what is seen

    def begun(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """Return which rows hold a text, going on or ended."""
        return self.state.length[rows] > 0

    def steps(self, rows: Rows) -> npt.NDArray[np.int64]:
        """Return how many tokens each row has generated."""
        return self.state.length[rows] - self.state.prompt_length[rows]

    def observe(self, rows: Rows) -> Observation:
        """Return fresh arrays, one a key, each (len(rows), ...), in the order of ``keys``."""
        state = self.state
        makers: dict[str, Callable[[], npt.NDArray[Any]]] = {
            "tokens": lambda: state.tokens[rows],
            "length": lambda: state.length[rows, None].astype(np.int32),
            "budget": lambda: (1.0 - self.steps(rows)[:, None] / self.config.max_new_tokens).astype(np.float32),
            "candidates": lambda: state.candidates[rows],
            "logprobs": lambda: state.logprobs[rows],
            "score": lambda: state.score[rows, None],
            "candidate_scores": lambda: state.candidate_scores[rows],
            "action_mask": lambda: state.legal[rows].astype(np.int8),
            "hidden": lambda: state.hidden[rows],
        }
        return {key: makers[key]() for key in self.keys}

    def ids_of(self, row: int) -> tuple[list[int], list[int]]:
        """Return the token ids of the prompt and of the completion."""
        ids = self.state.tokens[row, : self.state.length[row]].tolist()
        start = self.state.prompt_length[row]
        return ids[:start], ids[start:]

    def text_of(self, row: int) -> str:
        """Return the completion so far."""
        prompt, new = self.ids_of(row)
        if not new:
            return ""
        return self.model.continuations(prompt, new[:-1], new[-1:])[0]

    # --- pieces

    def _check_begun(self, rows: Rows) -> None:
        if not self.begun(rows).all():
            raise ResetNeeded(f"rows {rows[~self.begun(rows)].tolist()} hold no text yet: call reset first")

    def _encode_prompt(self, text: str) -> tuple[int, ...]:
        ids = tuple(self.model.encode(text))
        if not ids:
            raise PromptError(f"the prompt {text!r} has no tokens under model {self.model.name!r}")
        if len(ids) > self.config.max_prompt_tokens:
            raise PromptError(
                f"the prompt {_shorten(text)!r} has {len(ids)} tokens, more than max_prompt_tokens="
                f"{self.config.max_prompt_tokens}; shorten it, or raise max_prompt_tokens (model {self.model.name!r} "
                f"has {self.model.max_context} tokens of context for prompt and completion)"
            )
        return ids

    def _start_score(self, prompt: Prompt) -> ScoreState | None:
        if not self._scores or self._running is None:
            return None
        state: ScoreState = self._running.start(prompt.text, prompt.reference, prompt.metadata)
        return state

    def _nucleus(self, logprobs: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        if self.config.top_k is not None:
            return nucleus(logprobs, self.config.top_p)
        order = np.argsort(-logprobs, axis=-1, kind="stable")  # id order: sort, cut, put back
        legal = np.empty(logprobs.shape, np.bool_)
        np.put_along_axis(legal, order, nucleus(np.take_along_axis(logprobs, order, -1), self.config.top_p), -1)
        return legal

    def _legal_actions(self, rows: Rows, actions: npt.ArrayLike) -> npt.NDArray[np.int64]:
        given = np.asarray(actions)
        if given.shape != rows.shape or given.dtype.kind not in "iu":
            raise IllegalAction(
                f"actions must be {len(rows)} integers in 0..{self.k - 1}, got {given.dtype} of shape {given.shape}"
            )
        wrong = (given < 0) | (given >= self.k)
        if wrong.any():
            raise IllegalAction(f"actions must be in 0..{self.k - 1}, got {given[wrong].tolist()}")
        chosen = given.astype(np.int64)
        legal = self.state.legal[rows]
        masked = ~legal[np.arange(len(rows)), chosen]
        if masked.any():
            if self.config.on_illegal == "raise":
                raise IllegalAction(
                    f"actions {chosen[masked].tolist()} of rows {rows[masked].tolist()} are masked; choose where "
                    "action_mask is 1, or make the environment with on_illegal='last_legal'"
                )
            last = self.k - 1 - np.argmax(legal[:, ::-1], axis=-1)
            chosen = np.where(masked, last, chosen)
            self.state.illegal[rows] += masked
        return chosen

    def _extend_texts(self, rows: Rows, chosen: npt.NDArray[np.int64], tokens: npt.NDArray[np.int32]) -> None:
        state = self.state
        for row, action, token in zip(rows.tolist(), chosen.tolist(), tokens.tolist(), strict=True):
            known = state.continuations[row]
            completion = self.model.extended(state.completion[row], token) if known is None else known[action]
            if completion is None:
                completion = self.text_of(row)
            state.completion[row] = completion
            if self._scores and self._running is not None:
                state.score_state[row] = self._running.extend(state.score_state[row], completion)
                state.score[row] = state.score_state[row].value

    def _look_ahead(self, rows: Rows) -> None:
        if self._running is None:
            return
        state = self.state
        for row in rows:
            prompt, new = self.ids_of(row)
            texts = self.model.continuations(prompt, new, state.candidates[row].tolist())
            state.continuations[row] = texts
            state.candidate_scores[row] = self._running.lookahead(state.score_state[row], texts)

    def _finish_reasons(self, rows: Rows, tokens: npt.NDArray[np.int32]) -> list[str | None]:
        at_end = self._is_end[tokens]
        full = self.steps(rows) >= self.config.max_new_tokens
        reasons: list[str | None] = []
        for row, eos, length in zip(rows, at_end.tolist(), full.tolist(), strict=True):
            if eos:
                reasons.append("eos")
            elif self.config.stop and any(stop in self.state.completion[row] for stop in self.config.stop):
                reasons.append("stop")
            else:
                reasons.append("length" if length else None)
        return reasons

    def _pay_ended(
        self,
        rows: Rows,
        ended: npt.NDArray[np.bool_],
        reasons: Sequence[str | None],
        rewards: npt.NDArray[np.float64],
        infos: list[dict[str, Any]],
    ) -> None:
        """Replace the rewards of ended rows by what is still owed, and fill their infos."""
        where = np.flatnonzero(ended).tolist()
        generations = [self._generation(rows[i], reasons[i] or "") for i in where]
        scored = self.reward.scored(generations)
        rewards[where] = scored.total - self.state.paid[rows[where]]
        for j, (i, generation) in enumerate(zip(where, generations, strict=True)):
            infos[i] |= {
                "prompt": generation.prompt,
                "completion": generation.completion,
                "text": generation.text,
                "finish_reason": generation.finish_reason,
                "logprob": float(np.sum(generation.logprobs)),
                "reward_parts": {name: float(values[j]) for name, values in scored.parts.items()},
            }

    def _generation(self, row: int, finish_reason: str) -> Generation:
        prompt: Prompt = self.state.prompt[row]
        prompt_ids, ids = self.ids_of(row)
        logprobs = self.state.token_logprobs[row, : len(ids)].tolist()
        return Generation(
            prompt=prompt.text,
            completion=self.state.completion[row] if self._keeps_text else self.text_of(row),
            prompt_ids=tuple(prompt_ids),
            ids=tuple(ids),
            logprobs=tuple(logprobs),
            finish_reason=finish_reason,
            reference=prompt.reference,
            metadata=prompt.metadata,
        )


def _shorten(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
