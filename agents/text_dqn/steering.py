"""The trained Q inside ``model.generate``: any Hugging Face generation, steered.

The processor makes of a step of ``generate`` what the environment makes of it: the same
candidates, the same observation, hence the same policy. Hidden states come from a hook in front
of the output embedding, where the environment takes them from too, so there is no second forward.
Nothing of the model is replaced: a step whose scores are not the logits of the last forward (beam
search, guidance, an assistant) is noticed as such, and refused.

    logits (B, V)  ->  candidates (B, k)  ->  log pi (B, k)  ->  logits: log pi there, -inf elsewhere
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import LogitsProcessor

from agents.text_dqn.learner import Learner
from agents.text_dqn.networks import prior
from agents.text_dqn.targets import log_policy
from agents.text_dqn.task import known_task
from textgen_env.config import check_at_least
from textgen_env.errors import ConfigError, ModelError
from textgen_env.models.base import LanguageModel
from textgen_env.models.candidates import top_candidates
from textgen_env.models.device import forward_lock
from textgen_env.observation import as_observation, budget_left, legal_candidates
from textgen_env.rewards import RunningScore, ScoreState, make_reward

COMPARED = 256
"""Tokens whose scores are compared with the model's logits at each step."""


class _Texts(threading.local):
    """The texts that a thread generates, and its last forward."""

    def __init__(self) -> None:
        self.locked = 0  # forwards that this thread is in
        self.mask: Any = None  # of the last forward
        self.cached = self.begins = True  # it has a cache; which was empty before it
        self.hidden: torch.Tensor | None = None  # (B, d) of the last tokens
        self.logits: torch.Tensor | None = None  # (B, V)
        self.seen: npt.NDArray[np.int64] | None = None  # (B, L) the ids of the step before
        self.width = 0  # columns that are prompt
        self.scores: list[ScoreState] = []


class Steering(LogitsProcessor):
    """Steers ``model.generate`` while its ``with`` block lasts. Made by ``TextDQN.logits_processor``.

    Sampling and greedy decoding, batches of any size, prompts padded on the left. Processors that
    ``generate`` adds itself (repetition penalties and the like) act before it, and change what is
    proposed; its warpers (temperature, top-k, top-p) act after it, and ``settings`` turns them off.

    Args:
        learner: The agent's; its ``beta`` may be changed at any time.
        language_model: That it was trained on.
        task: What it was trained on.
        model: The causal LM that generates: the agent's own, or another copy of it.
        max_new_tokens: What ``budget`` is a share of.
        reward: Where the agent sees running scores: what they are of.
    """

    def __init__(
        self,
        learner: Learner,
        language_model: LanguageModel,
        task: Mapping[str, Any] | None,
        model: Any,
        max_new_tokens: int | None,
        reward: Any,
    ) -> None:
        task = self._task = known_task(task)
        self._learner = learner
        self.max_new_tokens = task["max_new_tokens"] if max_new_tokens is None else max_new_tokens
        check_at_least("max_new_tokens", self.max_new_tokens, 1)
        if learner.network.scorer is not None and self.max_new_tokens > task["max_new_tokens"]:
            raise ConfigError(
                f"max_new_tokens must be at most {task['max_new_tokens']}, as in training, got {self.max_new_tokens}: "
                "scores are learned for so many places"
            )
        self._model = model
        self._language_model = language_model
        _check_same(model, language_model)
        # A view on the slow network, weights shared, that counts the budget in these tokens.
        self._network = copy.copy(learner.slow_network)
        self._network.max_new_tokens = self.max_new_tokens
        self._running = self._running_score(reward)
        self._removable: list[Any] = []
        self._texts = _Texts()

    @property
    def settings(self) -> dict[str, Any]:
        """Keywords with which ``generate`` samples as the environment does; for greedy, put ``do_sample=False``."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": True,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "eos_token_id": list(self._language_model.end_ids) or None,
            "disable_compile": True,  # hooks are not compiled
        }

    # --- the hooks

    def __enter__(self) -> Steering:
        lock, texts = forward_lock(self._model), self._texts
        # An encoder-decoder's other mask is of what the encoder reads.
        mask_name = "decoder_attention_mask" if self._model.config.is_encoder_decoder else "attention_mask"

        def begin(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            lock.acquire()  # hooks must not see the forwards of other threads
            texts.locked += 1
            cache = kwargs.get("past_key_values")
            texts.mask, texts.cached = kwargs.get(mask_name), kwargs.get("use_cache") is not False
            texts.begins = cache is None or int(cache.get_seq_length()) == 0

        def keep_hidden(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            texts.hidden = args[0][:, -1]

        def end(_: Any, args: tuple[Any, ...], output: Any) -> None:
            logits = getattr(output, "logits", None)
            texts.logits = None if logits is None else logits[:, -1]
            if texts.locked:  # a forward that raises early has not taken it
                texts.locked -= 1
                lock.release()

        self._removable = [
            self._model.register_forward_pre_hook(begin, with_kwargs=True),
            self._model.get_output_embeddings().register_forward_pre_hook(keep_hidden),
            self._model.register_forward_hook(end, always_call=True),
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._removable:
            hook.remove()
        self._texts = _Texts()

    # --- a step

    @torch.inference_mode()
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return (B, V) log-probabilities of the steered policy, -inf for all but the candidates.

        Raises:
            ConfigError: a search or other forwards within a step (beams, guidance, an assistant), more
                than ``max_new_tokens`` steps, no cache, or a forward of another model.
        """
        texts, ids = self._texts, input_ids.cpu().numpy()
        hidden, texts.hidden = texts.hidden, None
        if hidden is None or len(hidden) != len(input_ids):
            raise ConfigError(
                "the model that generates is not the one given to logits_processor, or outside its with, or it judges "
                "several tokens a forward, as in assisted generation"
            )
        pad = self._follow(ids)
        steps = ids.shape[1] - texts.width
        if steps < 0:
            return scores  # a first token that ``generate`` forces
        _check_plain_step(scores, texts.logits)
        if steps >= self.max_new_tokens:
            raise ConfigError(
                f"generation goes on after {steps} tokens: give generate and logits_processor the same max_new_tokens"
            )
        ended = np.asarray(np.isin(ids[:, texts.width :], self._language_model.end_ids).any(-1))
        observation = self._observe(ids, pad, steps, scores, ended) | {"hidden": hidden.float().cpu().numpy()}
        tensors = {key: torch.from_numpy(value).to(self._network.device) for key, value in observation.items()}
        logprobs = log_policy(prior(tensors), self._network(tensors), self._learner.beta).to(scores)
        steered = torch.full_like(scores, -torch.inf)
        steered.scatter_(1, tensors["candidates"].long().to(scores.device), logprobs)
        done = torch.from_numpy(ended).to(scores.device)
        steered[done] = scores[done]  # generate pads them
        return steered

    def _follow(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return how many columns of padding each row begins with, (B,), noticing when a text begins."""
        texts = self._texts
        if not texts.cached:
            raise ConfigError("use_cache=False: texts are told apart by their caches; leave it on")
        if texts.begins:
            texts.width, texts.scores = max(ids.shape[1], len(self._language_model.begin)), []
        elif texts.seen is None or not np.array_equal(ids[:, :-1], texts.seen):
            raise ConfigError(
                "rows changed places between two steps, as in beam search, or began with a cache from elsewhere: "
                "sample, or decode greedily, from the start"
            )
        texts.seen = ids
        return _padding(texts.mask, len(ids))

    def _observe(
        self,
        ids: npt.NDArray[np.int64],
        pad: npt.NDArray[np.int64],
        steps: int,
        scores: torch.Tensor,
        ended: npt.NDArray[np.bool_],
    ) -> dict[str, npt.NDArray[Any]]:
        """Return the environment's observation of these rows, without ``hidden``."""
        rows, width = ids.shape
        model, task = self._language_model, self._task
        block_end = np.full(rows, steps < task["min_new_tokens"])
        candidates, logprobs = top_candidates(scores, task["top_k"], model.end_ids, block_end)
        legal, logprobs = legal_candidates(logprobs, task["top_k"], task["top_p"])
        length = width - pad
        columns = np.arange(width)[None] + pad[:, None]
        tokens = np.take_along_axis(ids, np.minimum(columns, width - 1), 1) * (columns < width)
        observation = as_observation(
            {
                "tokens": tokens,
                "length": length,
                "budget": budget_left(np.full(rows, steps), self.max_new_tokens),
                "candidates": candidates,
                "logprobs": logprobs,
                "action_mask": legal,
                "score": np.zeros(rows),
            }
        )
        if self._running is None:
            return observation
        return observation | self._look_ahead(ids, pad, candidates, ended)

    # --- running scores

    def _running_score(self, reward: Any) -> RunningScore[Any] | None:
        if not self._task["scores"] or not self._network.reads_given_scores:
            return None
        reward = self._task["reward"] if reward is None else reward
        if reward is None:
            raise ConfigError(
                f"the agent sees running scores of reward {self._task['reward_name']!r}, a Python object that was not "
                "stored: give it again, as logits_processor(model, reward=...)"
            )
        running = make_reward(reward).running()
        if running is None:
            raise ConfigError(f"the agent sees running scores, and reward {reward!r} cannot score a prefix")
        return running

    def _look_ahead(
        self,
        ids: npt.NDArray[np.int64],
        pad: npt.NDArray[np.int64],
        candidates: npt.NDArray[np.int32],
        ended: npt.NDArray[np.bool_],
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Return ``score`` (B, 1) and ``candidate_scores`` (B, k) of the completions so far."""
        assert self._running is not None
        model = self._language_model
        texts = self._texts
        prompts = [row[start : texts.width].tolist() for row, start in zip(ids, pad, strict=True)]
        new = ids[:, texts.width :].tolist()
        if not new[0]:
            texts.scores = [self._running.start(model.decode(prompt), None, {}) for prompt in prompts]
        ahead = np.zeros(candidates.shape, np.float32)
        for i in np.flatnonzero(~ended).tolist():
            if new[i]:
                completion = model.continuations(prompts[i], new[i][:-1], new[i][-1:])[0]
                texts.scores[i] = self._running.extend(texts.scores[i], completion)
            continuations = model.continuations(prompts[i], new[i], candidates[i].tolist())
            ahead[i] = self._running.lookahead(texts.scores[i], continuations)
        score = np.array([[state.value] for state in texts.scores], np.float32)
        return {"score": score, "candidate_scores": ahead}


def _check_same(model: Any, own: LanguageModel) -> None:
    """Raise ``ModelError`` unless ``model`` embeds tokens as the agent's language model does."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no output embedding: a causal language model is needed")
    weights = model.get_input_embeddings().weight
    expected = own.embed(np.arange(min(64, own.vocab_size)))
    same = (
        tuple(head.weight.shape) == (own.vocab_size, own.hidden_size)
        and weights.shape[-1] == own.embedding_size
        and np.allclose(weights[: len(expected)].detach().float().cpu().numpy(), expected, rtol=0.02, atol=1e-3)
    )
    if not same:
        raise ModelError(
            f"this {type(model).__name__} is not the agent's language model {own.name!r}: its embeddings differ"
        )


def _padding(mask: Any, rows: int) -> npt.NDArray[np.int64]:
    """Return how many columns of padding each row begins with, (B,), by the attention mask of a forward.

    Args:
        mask: (B, T) with 1 for tokens; or (B, 1, Q, T), as static caches have it, True or 0 where a
            token is seen; or one such for each kind of layer.
    """
    if isinstance(mask, dict):  # layers with a window see less than the text
        mask = mask["full_attention"] if "full_attention" in mask else next(iter(mask.values()))
    if mask is None:
        return np.zeros(rows, np.int64)
    if mask.ndim == 4:
        last = mask[:, 0, -1]
        mask = last if last.dtype == torch.bool else last == 0
    found: npt.NDArray[np.int64] = mask.long().argmax(-1).cpu().numpy()
    return np.broadcast_to(found, rows)


def _check_plain_step(scores: torch.Tensor, logits: torch.Tensor | None) -> None:
    """Raise ``ConfigError`` unless most of ``scores`` (B, V) are the ``logits`` (B, V) of the last forward.

    Beam search scores log-probabilities, guidance mixes two forwards, and an assistant's tokens are
    judged several a forward. Processors that ``generate`` adds change a few tokens.
    """
    if logits is None or logits.shape != scores.shape:
        raise ConfigError("the model that generates answers no logits of these rows")
    some = torch.linspace(0, scores.shape[1] - 1, min(COMPARED, scores.shape[1]), device=scores.device).long()
    same = torch.isclose(scores[:, some], logits[:, some].to(scores), rtol=1e-4, atol=1e-4)
    if not bool((same.float().mean(-1) >= 0.5).all()):
        raise ConfigError(
            "the scores are not the logits of the model's last forward: a beam search (num_beams), guidance_scale, "
            "assisted or contrastive generation, whose steps log pi cannot steer; sample, or decode greedily, instead"
        )
