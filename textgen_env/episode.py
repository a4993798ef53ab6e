"""The rules of an episode, for N rows at once, without Gymnasium.

The single environment is these rules with one row, the vector environment with N. A row is a
prompt and the tokens chosen since; the language model proposes the next ones. Each row is in one phase:

    EMPTY  --begin-->  STALE  --observe-->  READY  --act-->  STALE, or ENDED  --begin-->  STALE

``observe`` runs one forward for all its stale rows, and none for the others. An error of the model
or the reward leaves its rows EMPTY: half a step is no text to go on with. ``fork`` and ``load`` copy the phase too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from textgen_env.config import EnvConfig
from textgen_env.conversation import Partner, Talk, TurnStates
from textgen_env.errors import ConfigError, IllegalAction, PromptError, ResetNeeded
from textgen_env.models.base import LanguageModel, Proposals, Rows, read_only
from textgen_env.observation import Observation, as_observation, budget_left, legal_candidates
from textgen_env.policies import Floats, last_legal, renormalise
from textgen_env.prompts import Prompt, PromptSource
from textgen_env.rewards.base import CheckedScore, Generation, Reward, ScoreState, Turn
from textgen_env.rows import FINISH_REASONS, Phase, RowStates, Snapshot


@dataclass(frozen=True)
class Outcome:
    """The result of a step, for the B rows that acted."""

    actions: npt.NDArray[np.int64]  # (B,) that were played: illegal ones are mapped
    rewards: npt.NDArray[np.float64]  # (B,)
    ended: npt.NDArray[np.bool_]  # (B,)
    infos: list[dict[str, Any]]  # one a row, filled where the episode ended


class Episodes:
    """N rows of text generation under one model, prompt source, reward and configuration.

    Attributes:
        k: Number of actions.
        keys: Keys of the observation.
        slots: The rows on the model, with their token ids.
        phases: (N,) int8, the ``Phase`` of each row; read-only.

    Raises:
        ConfigError: ``top_k`` does not fit the vocabulary, the prompt and the completion do not
            fit the context, scores are asked of a reward that cannot score a prefix, or turns without a partner.
        CapacityError: the model's cache for N rows would not fit into memory.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: PromptSource,
        reward: Reward,
        config: EnvConfig,
        rows: int,
        partner: Partner | None = None,
    ) -> None:
        self.model, self.prompts, self.reward, self.config, self.rows = model, prompts, reward, config, rows
        self.partner = partner
        running = reward.running()
        self._check_settings(scores_prefixes=running is not None)
        self.keys = config.keys(running is not None, partner is not None)
        sees_scores = config.reward_at == "step" or not {"score", "candidate_scores"}.isdisjoint(self.keys)
        self._running = CheckedScore(reward.name, running) if sees_scores and running is not None else None
        self._keeps_text = self._running is not None or bool(config.stop)
        self.k = config.num_actions(model.vocab_size)
        self._is_end = np.zeros(model.vocab_size, np.bool_)
        self._is_end[list(model.end_ids)] = True
        self.slots = model.slots(rows, config.max_length, config.top_k)
        self._talk: Talk | None = None
        if partner is None:
            self._state = RowStates(rows, config.max_new_tokens, self.k, model.hidden_size)
        else:
            self._state = state = TurnStates(rows, config, self.k, model.hidden_size)
            self._talk = Talk(partner, config, model, self.slots, state)
        self.phases = read_only(self._state.phase)
        self._encode: Callable[[str], tuple[int, ...]] = lru_cache(maxsize=4096)(self._encode_prompt)

    def _check_settings(self, scores_prefixes: bool) -> None:
        config, model = self.config, self.model
        if config.max_length > model.max_context:
            raise ConfigError(
                f"max_prompt_tokens={config.max_prompt_tokens} plus max_new_tokens={config.max_new_tokens}"
                f"{f' and {config.max_turns} replies of {config.max_reply_tokens}' if self.partner else ''} "
                f"exceed the {model.max_context} tokens of context that model {model.name!r} has"
            )
        turns = (config.max_turns, config.max_turn_tokens, config.max_reply_tokens)
        if self.partner is None and turns != (1, None, 0):
            raise ConfigError("max_turns, max_turn_tokens and max_reply_tokens need a partner: give partner=")
        if config.reward_at == "step" and not scores_prefixes:
            raise ConfigError(
                f"reward_at='step' needs a reward that can score a prefix, and {self.reward.name!r} cannot: "
                "use reward_at='end', or give the reward a running() score"
            )

    def copied(self) -> Episodes:
        """Return a copy in the same state, on the same model, prompts and reward. O(rows)."""
        new = Episodes(self.model, self.prompts, self.reward, self.config, self.rows, self.partner)
        for row in np.flatnonzero(self.slots.lengths).tolist():
            new.slots.load(row, self.slots.save(row))
        for name, array in vars(new._state).items():
            array[...] = getattr(self._state, name)
        return new

    # --- the course of an episode

    def begin(self, rows: Rows, prompts: Sequence[Prompt]) -> None:
        """Start a new episode in each row. No forward.

        Raises:
            PromptError: a prompt without tokens, or longer than ``max_prompt_tokens``. No row has changed.
            RewardError: the running score cannot start on a prompt. No row has changed.
        """
        encoded = [self._encode(prompt.text) for prompt in prompts]
        scores = [self._start_score(prompt) for prompt in prompts]
        self.slots.start(rows, encoded)
        state = self._state
        for row, prompt, score in zip(rows, prompts, scores, strict=True):
            state.prompt[row] = prompt
            state.completion[row] = ""
            state.score_state[row] = score
            state.score[row] = 0.0 if score is None else score.value
        state.token_logprobs[rows] = 0.0
        state.paid[rows], state.illegal[rows] = 0.0, 0
        if self._talk is not None:
            self._talk.begin(rows)
        state.phase[rows] = Phase.STALE

    def observe(self, rows: Rows) -> Observation:
        """Return fresh arrays, one a key, each (len(rows), ...), in the order of ``keys``.

        At most one forward, for all stale rows together. An ended row shows no proposals: nothing
        that a target may read. A row that never began shows zeros.

        Raises:
            ResetNeeded: the model or the reward raised on a row.
            ModelError: the model cannot propose. The stale rows need a reset.
            RewardError: the running score cannot look ahead. The stale rows need a reset.
        """
        self._propose_where_stale(rows)
        state = self._state
        makers: dict[str, Callable[[], npt.NDArray[Any]]] = {
            "tokens": lambda: self.slots.tokens[rows],
            "length": lambda: self.slots.lengths[rows],
            "budget": lambda: budget_left(self.steps(rows), self.config.max_new_tokens),
            "candidates": lambda: state.candidates[rows],
            "logprobs": lambda: state.logprobs[rows],
            "score": lambda: state.score[rows],
            "candidate_scores": lambda: state.candidate_scores[rows],
            "action_mask": lambda: state.legal[rows],
            "hidden": lambda: state.hidden[rows],
            "source": lambda: self.slots.prompts_of(rows, self.config.max_prompt_tokens),
        }
        if self._talk is not None:
            talk = self._talk
            makers |= {
                "turn": lambda: talk.state.turn[rows],
                "turn_budget": lambda: talk.budget_left(rows),
                "speaker": lambda: talk.state.speaker[rows],
            }
        return as_observation({key: makers[key]() for key in self.keys})

    def act(self, rows: Rows, actions: npt.ArrayLike) -> Outcome:
        """Append ``candidates[row, action]`` to each row, and the reply to a turn that it ends; pay. No forward.

        Raises:
            ResetNeeded: a row is not READY.
            IllegalAction: an action that is no integer, out of range, or masked. No row has changed.
            RewardError: see ``Reward.scored`` and ``CheckedScore``. The rows need a reset.
            PartnerError: see ``Talk.go_on``. The rows need a reset.
        """
        self._check_ready(rows)
        state, chosen = self._state, self._playable(rows, actions)
        state.phase[rows] = Phase.EMPTY  # if anything raises from here on, no row goes on with half a step
        tokens = state.candidates[rows, chosen]
        places = self.slots.lengths[rows] - self.slots.prompt_lengths[rows]
        state.token_logprobs[rows, places] = state.logprobs[rows, chosen]
        self.slots.advance(rows, tokens.astype(np.int64))
        if self._keeps_text:
            self._extend_texts(rows, chosen, tokens)
        reasons = self._finish_reasons(rows, tokens)
        if self._talk is not None:
            answered, (reasons, replied) = rows[reasons > 0], self._talk.go_on(rows, reasons, self.prompts_at(rows))
            if self._keeps_text:
                self._keep_texts(answered, [self.text_of(row) for row in answered.tolist()])
        rewards, infos = self._pay(rows, reasons)
        if self._talk is not None:
            rewards += replied
        ended = reasons > 0
        state.phase[rows] = Phase.STALE
        if ended.any():
            self._end(rows[ended])
        return Outcome(chosen, rewards, ended, infos)

    # --- rows that branch

    def fork(self, src: Rows, dst: Rows) -> None:
        """Let row ``dst[i]`` become a copy of row ``src[i]``, the model's cache included. O(row).

        Raises:
            IndexError: a row out of range, or a ``dst`` named twice.
            ResetNeeded: a ``src`` without an episode.
        """
        for name, rows in (("src", src), ("dst", dst)):
            whole = rows.dtype.kind in "iu" or not rows.size
            if not whole or rows.ndim != 1 or not ((rows >= 0) & (rows < self.rows)).all():
                raise IndexError(f"{name} must be rows in 0..{self.rows - 1}, got {rows.tolist()}")
        if len(src) != len(dst) or len(set(dst.tolist())) != len(dst):
            raise IndexError(f"each src needs one dst, each dst named once; got src={src.tolist()}, dst={dst.tolist()}")
        src, dst = src.astype(np.int64), dst.astype(np.int64)  # torch takes uint8 for a mask
        self._check_begun(src)
        self.slots.fork(src, dst)
        self._state.copy_rows(src, dst)

    def save(self, row: int) -> Snapshot:
        """Return a copy of one row. O(row).

        Raises:
            ResetNeeded: the row has no episode.
        """
        self._check_begun(np.array([row]))
        return Snapshot(self, self._state.save(row), self.slots.save(row))

    def load(self, row: int, saved: Snapshot) -> None:
        """Restore a row from a snapshot.

        Raises:
            ConfigError: another environment saved it, or it is no snapshot.
        """
        if not isinstance(saved, Snapshot):
            raise ConfigError(f"only a snapshot can be restored, got {type(saved).__name__}")
        if saved.owner is not self:
            raise ConfigError("the snapshot was taken in another environment; restore it where it was taken")
        self.slots.load(row, saved.slot)
        self._state.load(row, saved.state)

    def rebuild(self) -> None:
        """Forget memos, caches and running scores but the token ids and texts, as a resumed process must."""
        self.slots.rebuild()
        if self._running is None:
            return
        state, begun = self._state, np.flatnonzero(self.phases != Phase.EMPTY)
        for row in begun.tolist():
            score: Any = self._start_score(state.prompt[row])
            state.score_state[row], state.score[row] = score, score.value
        written = begun[state.completion[begun] != ""]
        self._keep_texts(written, state.completion[written].tolist())

    def state_dict(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Return all rows as arrays and plain data, and ``rebuild``: who goes on and who resumes are alike."""
        self.rebuild()
        prompts = [
            None if p is None else {"text": p.text, "reference": p.reference, "metadata": dict(p.metadata)}
            for p in self._state.prompt
        ]
        kept = ("completion", "continuations") if self._talk is None else ("completion", "continuations", "turns")
        texts = {name: getattr(self._state, name).tolist() for name in kept}
        return {name: array.copy() for name, array in self._numbers().items()}, {"prompt": prompts, **texts}

    def load_state_dict(self, arrays: dict[str, npt.NDArray[Any]], plain: dict[str, Any]) -> None:
        """Restore all rows from a ``state_dict`` of the same model, reward and configuration.

        Raises:
            ConfigError: it is of other shapes.
        """
        held = self._numbers()
        for name, array in held.items():
            given = arrays[name].shape if name in arrays else None
            if given != array.shape:
                raise ConfigError(f"the stored rows are of another environment: {name} is {given}, not {array.shape}")
        self.slots.refill(arrays["tokens"], arrays["length"], arrays["prompt_length"])
        for name in held.keys() & vars(self._state).keys():
            held[name][...] = arrays[name]
        for row, prompt in enumerate(plain["prompt"]):
            self._state.prompt[row] = None if prompt is None else Prompt(**prompt)
            self._state.completion[row] = plain["completion"][row]
            self._state.continuations[row] = plain["continuations"][row]
            if self._talk is not None and plain["turns"][row] is not None:
                self._talk.state.turns[row] = tuple(Turn(*turn) for turn in plain["turns"][row])
            if prompt is not None:
                self.slots.set_prompts(np.array([row]), [self._encode(prompt["text"])])
        self.rebuild()

    # --- reading rows

    def steps(self, rows: Rows) -> npt.NDArray[np.int64]:
        """Return how many tokens each row has generated; replies do not count."""
        behind = self.slots.lengths[rows] - self.slots.prompt_lengths[rows]
        return behind if self._talk is None else behind - self._talk.state.replied[rows]

    def legal(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """Return the legal actions of each row, (B, k), all of them where there is no proposal."""
        self._propose_where_stale(rows)
        return self._state.legal[rows]

    def proposals(self, rows: Rows) -> Proposals:
        """Return the proposals of each row; masked ones have ``MASKED_LOGPROB``."""
        self._propose_where_stale(rows)
        state = self._state
        return Proposals(state.candidates[rows], state.logprobs[rows], state.hidden[rows])

    def offer(self, rows: Rows, tokens: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        """Return the action that appends each token, (B,). One that is not legal takes the last candidate's place.

        A text that was written elsewhere has such tokens: in half precision, the candidates of a prefix depend
        on the rows beside it.
        """
        state, found = self._state, self.proposals(rows).candidates == tokens[:, None]
        actions = np.where(found.any(-1), found.argmax(-1), self.k - 1)
        state.candidates[rows, actions], state.legal[rows, actions] = tokens, True
        state.continuations[rows] = None  # where they were written out, they were those of other candidates
        return actions

    def log_prior(self, rows: Rows) -> tuple[Floats, Floats]:
        """Return log mu_k over the candidates, (B, k) with -inf where masked, and their log mass, (B,)."""
        self._propose_where_stale(rows)
        return renormalise(self._state.logprobs[rows], self._state.legal[rows])

    def prompts_at(self, rows: Rows) -> list[Prompt | None]:
        """Return the prompt of each row, None where no episode began."""
        return list(self._state.prompt[rows])

    def score_of(self, row: int) -> float:
        """Return the running score of a row, 0 without one."""
        return float(self._state.score[row])

    def ids_of(self, row: int) -> tuple[list[int], list[int]]:
        """Return the token ids of the prompt and of the completion."""
        ids, start = self.slots.ids_of(row), self.slots.prompt_lengths[row]
        return ids[:start], ids[start:]

    def text_of(self, row: int) -> str:
        """Return the completion so far."""
        prompt, new = self.ids_of(row)
        return self.model.continuations(prompt, new[:-1], new[-1:])[0] if new else ""

    def judged(self, rows: Rows) -> npt.NDArray[np.float64]:
        """Return the reward that each row's text would get if it ended here, (B,). Nothing is paid.

        Raises:
            ResetNeeded: a row without an episode.
            RewardError: see ``Reward.scored``.
        """
        self._check_begun(rows)
        paid = 0.0 if self._talk is None else self._talk.paid(rows)
        return self.reward.scored([self._generation(row, "length") for row in rows.tolist()]).total + paid

    # --- phases

    def _check_ready(self, rows: Rows) -> None:
        phases = self.phases[rows]
        if (phases == Phase.READY).all():
            return
        self._check_sound(rows)
        if (stale := rows[phases == Phase.STALE]).size:
            raise ResetNeeded(f"rows {stale.tolist()} have changed since they were observed: observe them, then act")
        over = rows[phases != Phase.READY].tolist()
        raise ResetNeeded(f"rows {over} have no live episode: call reset before the first step and after the end")

    def _check_begun(self, rows: Rows) -> None:
        self._check_sound(rows)
        if (empty := rows[self.phases[rows] == Phase.EMPTY]).size:
            raise ResetNeeded(f"rows {empty.tolist()} hold no text yet: call reset first")

    def _check_sound(self, rows: Rows) -> None:
        """Raise ``ResetNeeded`` for rows that an error left EMPTY: unlike new ones, they hold tokens."""
        failed = rows[(self.phases[rows] == Phase.EMPTY) & (self.slots.lengths[rows] > 0)]
        if failed.size:
            raise ResetNeeded(f"rows {failed.tolist()} need a reset: the model or the reward raised on them")

    def _propose_where_stale(self, rows: Rows) -> None:
        phases = self.phases[rows]
        if (phases == Phase.EMPTY).any():
            self._check_sound(rows)
        rows = rows[phases == Phase.STALE]
        if not rows.size:
            return
        state = self._state
        state.phase[rows] = Phase.EMPTY  # a model that fails leaves no row with the candidates of another prefix
        steps = self.steps(rows) if self._talk is None else self._talk.turn_steps(rows)
        found = self.slots.propose(rows, steps < self.config.min_new_tokens)
        legal, logprobs = legal_candidates(found.logprobs, self.config.top_k, self.config.top_p)
        state.candidates[rows], state.hidden[rows] = found.candidates, found.hidden
        state.legal[rows], state.logprobs[rows] = legal, logprobs
        if self._running is not None and "candidate_scores" in self.keys:
            self._look_ahead(rows, self._running)
        state.phase[rows] = Phase.READY

    def _end(self, rows: Rows) -> None:
        """End rows, whose proposals become a neutral filling."""
        state = self._state
        state.phase[rows] = Phase.ENDED
        state.candidates[rows], state.hidden[rows] = 0, 0.0
        state.legal[rows], state.logprobs[rows] = True, -np.log(self.k)
        state.candidate_scores[rows] = state.score[rows, None]
        state.continuations[rows] = None

    # --- texts and scores

    def _encode_prompt(self, text: str) -> tuple[int, ...]:
        ids = tuple(self.model.encode(text))
        if not ids:
            raise PromptError(f"the prompt {text!r} has no tokens under model {self.model.name!r}")
        if len(ids) > self.config.max_prompt_tokens:
            shown = text if len(text) <= 60 else text[:59] + "…"
            raise PromptError(
                f"the prompt {shown!r} has {len(ids)} tokens, more than max_prompt_tokens="
                f"{self.config.max_prompt_tokens}; shorten it, or raise max_prompt_tokens (model {self.model.name!r} "
                f"has {self.model.max_context} tokens of context for prompt and completion)"
            )
        return ids

    def _start_score(self, prompt: Prompt) -> ScoreState | None:
        return None if self._running is None else self._running.start(prompt.text, prompt.reference, prompt.metadata)

    def _extend_texts(self, rows: Rows, chosen: npt.NDArray[np.int64], tokens: npt.NDArray[np.int32]) -> None:
        state, completions = self._state, []
        for row, action, token in zip(rows.tolist(), chosen.tolist(), tokens.tolist(), strict=True):
            known = state.continuations[row]
            completion = self.model.extended(state.completion[row], token) if known is None else known[action]
            completions.append(self.text_of(row) if completion is None else completion)
        self._keep_texts(rows, completions)

    def _keep_texts(self, rows: Rows, completions: Sequence[str]) -> None:
        """Keep the completions of rows as they are now, and move their running scores there."""
        state = self._state
        state.completion[rows] = completions
        if self._running is not None:
            state.score_state[rows], state.score[rows] = self._running.extend(state.score_state[rows], completions)

    def _look_ahead(self, rows: Rows, running: CheckedScore) -> None:
        state, texts = self._state, []
        for row in rows.tolist():
            prompt, new = self.ids_of(row)
            texts.append(self.model.continuations(prompt, new, state.candidates[row].tolist()))
            state.continuations[row] = texts[-1]
        state.candidate_scores[rows] = running.lookahead(state.score_state[rows], texts)

    # --- steps

    def _playable(self, rows: Rows, actions: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the actions to play, (B,): those given, a masked one mapped or refused."""
        given = np.asarray(actions)
        if given.shape != rows.shape or given.dtype.kind not in "iu":
            raise IllegalAction(
                f"actions must be {len(rows)} integers in 0..{self.k - 1}, got {given.dtype} of shape {given.shape}"
            )
        wrong = (given < 0) | (given >= self.k)
        if wrong.any():
            raise IllegalAction(f"actions must be in 0..{self.k - 1}, got {given[wrong].tolist()}")
        chosen, legal = given.astype(np.int64), self._state.legal[rows]
        masked = ~legal[np.arange(len(rows)), chosen]
        if not masked.any():
            return chosen
        if self.config.on_illegal == "raise":
            raise IllegalAction(
                f"actions {chosen[masked].tolist()} of rows {rows[masked].tolist()} are masked; choose where "
                "action_mask is 1, or make the environment with on_illegal='last_legal'"
            )
        self._state.illegal[rows] += masked
        return np.where(masked, last_legal(legal), chosen)

    def _finish_reasons(self, rows: Rows, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """Return the number in ``FINISH_REASONS`` of each row, (B,): 0 where the text, or the turn, goes on."""
        full = self.steps(rows) >= self.config.max_new_tokens
        if self._talk is not None:
            full |= self._talk.is_full(rows)
        reasons = np.where(full, FINISH_REASONS.index("length"), 0)
        if self.config.stop:
            texts = self._state.completion[rows].tolist()
            if self._talk is not None:
                texts = [self._talk.text_of_turn(row) for row in rows.tolist()]
            reasons[[any(stop in text for stop in self.config.stop) for text in texts]] = FINISH_REASONS.index("stop")
        reasons[self._is_end[tokens]] = FINISH_REASONS.index("eos")
        return reasons

    def _pay(self, rows: Rows, reasons: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float64], list[dict[str, Any]]]:
        """Return the rewards of a step, (B,), and an info a row."""
        state = self._state
        infos: list[dict[str, Any]] = [{} for _ in range(len(rows))]
        if self.config.on_illegal == "last_legal":
            infos = [{"illegal_actions": float(count)} for count in state.illegal[rows].tolist()]
        rewards = np.zeros(len(rows), np.float64)
        if self.config.reward_at == "step":
            rewards += state.score[rows] - state.paid[rows]
        ended = np.flatnonzero(reasons).tolist()
        if ended:
            generations = [self._generation(rows[i], FINISH_REASONS[reasons[i]]) for i in ended]
            scored = self.reward.scored(generations)
            rewards[ended] = scored.total - state.paid[rows[ended]]
            for j, (i, generation) in enumerate(zip(ended, generations, strict=True)):
                infos[i] |= generation.as_info() | {
                    "reward_parts": {name: float(values[j]) for name, values in scored.parts.items()}
                }
                if self._talk is not None:
                    infos[i]["turns"] = generation.turns
                    infos[i]["reward_parts"]["partner"] = sum(turn.reward for turn in generation.turns)
        state.paid[rows] += rewards
        return rewards, infos

    def _generation(self, row: int, finish_reason: str) -> Generation:
        prompt: Prompt = self._state.prompt[row]
        prompt_ids, ids = self.ids_of(row)
        return Generation(
            prompt=prompt.text,
            completion=self._state.completion[row] if self._keeps_text else self.text_of(row),
            prompt_ids=tuple(prompt_ids),
            ids=tuple(ids),
            logprobs=tuple(self._state.token_logprobs[row, : len(ids)].tolist()),
            finish_reason=finish_reason,
            reference=prompt.reference,
            metadata=prompt.metadata,
            turns=() if self._talk is None else self._talk.state.turns[row],
            replied=0 if self._talk is None else int(self._talk.state.replied[row]),
        )

    def _numbers(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays of all rows that hold numbers, by their stored names."""
        slots = self.slots
        numbers = {name: array for name, array in vars(self._state).items() if array.dtype != object}
        return {"tokens": slots.tokens, "length": slots.lengths, "prompt_length": slots.prompt_lengths, **numbers}
