"""Q of (prefix, candidate token), on features that the language model has computed anyway.

The hidden state says what the prefix is about, but hardly what it is worth so far: the reward of
a text is a property of all its words. So the network keeps a *memory*, a sum of learned
contributions of the tokens generated so far, and every candidate is judged by the memory that it
would lead to:

    hidden (B, d), budget (B, 1), score (B, 1)  ->  state (B, h)
    tokens (B, T)         ->  contributions, summed  ->  memory (B, m)
    candidates (B, k)     ->  memory + contribution, embedding, log mu  ->  Q (B, k)

Token embeddings are the language model's own: read from it when needed, never copied or saved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces
from torch import nn
from torch.nn import functional

from agents.text_dqn.echoes import Echoes
from agents.text_dqn.features import JudgedTexts, KnownTokens, known_tokens
from agents.text_dqn.head import CandidateHead, LookedUp, near_the_end
from agents.text_dqn.outlook import Visited
from agents.text_dqn.score_value import ScoreValue
from agents.text_dqn.scorer import TextScorer
from textgen_env.conversation import AGENT
from textgen_env.errors import ConfigError, ModelError
from textgen_env.models.base import LanguageModel

NEEDED_KEYS = ("tokens", "length", "budget", "candidates", "logprobs", "action_mask", "hidden")
TURN_KEYS = ("turn", "turn_budget")
"""What a state of a conversation has beside its budget; read where the observation has it."""

MASKED_LOGIT = -1e9  # added to what must not be chosen: finite, since 0 * inf is not a number

Tensors = Mapping[str, torch.Tensor]


def check_observation_space(space: spaces.Space[Any]) -> spaces.Dict:
    """Return ``space`` if a candidate network can read it.

    Raises:
        ConfigError: it is no Dict, or lacks keys (names them and how to get them).
    """
    keys = list(space.spaces) if isinstance(space, spaces.Dict) else []
    missing = [key for key in NEEDED_KEYS if key not in keys]
    if missing or not isinstance(space, spaces.Dict):
        raise ConfigError(
            f"the observation space lacks {', '.join(missing)} (it has {', '.join(keys) or 'no keys'}): make the "
            f"environment with observation='full', or with a tuple that holds at least {NEEDED_KEYS}"
        )
    return space


def prior(observations: Tensors) -> torch.Tensor:
    """Return log mu: the language model renormalised over the legal candidates, (..., k) nats."""
    logprobs = observations["logprobs"].float()
    legal = observations["action_mask"].bool()
    return torch.log_softmax(torch.where(legal, logprobs, MASKED_LOGIT), dim=-1)


def own_text(observations: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids (B, T) and lengths (B, 1) whose last ones are the agent's own: replies are left out."""
    tokens, length = observations["tokens"].long(), observations["length"].long()
    if "speaker" not in observations:
        return tokens, length
    own = observations["speaker"] == AGENT
    places = torch.argsort((~own).byte(), dim=1, stable=True)
    return tokens.gather(1, places), own.sum(1, keepdim=True)


def shifted(vectors: torch.Tensor) -> torch.Tensor:
    """Return the vector before each one, (B, t, e), zero before the first."""
    return functional.pad(vectors, (0, 0, 1, 0))[:, :-1]


def at_actions(observations: Tensors, looked_up: LookedUp, actions: torch.Tensor) -> tuple[Tensors, LookedUp]:
    """Return both with one candidate a state, that of ``actions`` (B, T): c = 1 instead of k."""
    index = actions.unsqueeze(-1)
    picked = {
        key: value.gather(-1, index) if key in ("candidates", "logprobs", "candidate_scores") else value
        for key, value in observations.items()
    }
    return picked, looked_up._replace(candidates=looked_up.candidates.gather(-1, index))


class CandidateQNetwork(nn.Module):
    """Score each proposed token: Q(prefix, token), one value a candidate.

    Q is the return still to come, in reward units; where the observation has ``candidate_scores``
    it is what the candidate adds to the value of the running score (known, see ``score_value``) plus a learned rest.
    Scores come in and Q goes out by ``unit``, so judges of 0 to 100 and of 0 to 0.01 are learned from alike.

    Input:  an observation with ``NEEDED_KEYS``, and ``score`` and ``candidate_scores`` if there.
    Output: (B, k), the mean of the heads.

    With ``atoms`` a head learns the distribution of the return G under the language model, on so
    many values, and Q = beta log E[exp(G / beta)]; otherwise it learns Q itself.

    Source: action-in Q-network, He et al. 2016, arXiv:1511.04636; sums of token features as a
    memory, Zaheer et al. 2017, arXiv:1703.06114.

    Raises:
        ConfigError: the observation space lacks a key that the network reads.
    """

    _language_model: LanguageModel | None
    _known_tokens: KnownTokens | None
    support: torch.Tensor | None  # (atoms,) the values that returns are spread over
    unit: torch.Tensor  # reward units that the heads count in, a power of 4: to divide by it loses no digit

    def __init__(
        self,
        observation_space: spaces.Dict,
        *,
        embedding_size: int,
        max_new_tokens: int,
        heads: int = 2,
        atoms: int = 0,
        beta: float = 0.1,
        vocab_size: int | None = None,
        **head_kwargs: Any,
    ) -> None:
        super().__init__()
        check_observation_space(observation_space)
        self.max_new_tokens = max_new_tokens
        self.scorer = None if vocab_size is None else TextScorer(vocab_size, max_new_tokens)
        keys = set(observation_space.spaces) | ({"score", "candidate_scores"} if self.scorer else set())
        self.uses_score = "score" in keys
        self.uses_candidate_scores = {"score", "candidate_scores"} <= keys
        self.score_value = ScoreValue(max_new_tokens) if self.reads_given_scores else None
        self.turn_scales = {key: _one_over(observation_space[key]) for key in TURN_KEYS if key in keys}
        hidden_size = int(np.prod(observation_space["hidden"].shape or ()))
        self._heads = nn.ModuleList(
            CandidateHead(
                hidden_size,
                embedding_size,
                uses_score=self.uses_score,
                turn_scalars=len(self.turn_scales),
                uses_candidate_scores=self.uses_candidate_scores,
                outputs=max(1, atoms),
                **head_kwargs,
            )
            for _ in range(heads)
        )
        self.beta = beta
        self.register_buffer("unit", torch.ones(()))
        self.register_buffer("support", torch.linspace(-1.0, 1.0, atoms) if atoms else None)
        self.float()  # whatever torch's default is: features are float32
        # Held outside module registration: shared by online and target network, never saved.
        object.__setattr__(self, "_language_model", None)
        object.__setattr__(self, "_known_tokens", None)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.heads[0].value.weight.device

    @property
    def heads(self) -> list[CandidateHead]:
        """The networks whose mean is Q."""
        return cast("list[CandidateHead]", list(self._heads))

    @property
    def scores(self) -> list[nn.Module]:
        """What is fitted to texts, and not by gradients: all that is known of the scores of prefixes."""
        return [part for part in (self.scorer, self.score_value) if part is not None]

    def bind(self, language_model: LanguageModel) -> None:
        """Read token embeddings from ``language_model`` from now on.

        Raises:
            ModelError: its embeddings have another size than the network was made for.
        """
        size = self.heads[0].embed.in_features
        if language_model.embedding_size != size:
            raise ModelError(
                f"the agent was made for embeddings of {size} numbers, model {language_model.name!r} has "
                f"{language_model.embedding_size}: load it with the model that it was trained on"
            )
        object.__setattr__(self, "_language_model", language_model)
        object.__setattr__(self, "_known_tokens", None)
        if self.scorer is not None:
            self.scorer.describe(language_model, self._end_ids)

    def fit_scorer(self, texts: JudgedTexts, visited: Visited, beta: float) -> float:
        """Fit the scorer; return R2 on texts that were left out. See ``TextScorer.fit``."""
        if self.scorer is None or self._language_model is None:
            raise ModelError("no scorer to fit, or no language model to read embeddings from: call bind")
        known = known_tokens(self._language_model) if self._known_tokens is None else self._known_tokens
        object.__setattr__(self, "_known_tokens", known)
        return self.scorer.fit(texts, known, visited, beta)

    def scored(self, observations: Tensors) -> Tensors:
        """Return observations of single states (B, ...) with learned scores, or with what given ones are worth."""
        if self.scorer is None:
            return self.valued(observations, self._generated(observations))
        tokens, length = own_text(observations)
        generated = self._generated(observations)
        places = length - generated + torch.arange(self.max_new_tokens, device=tokens.device)
        own = tokens.gather(1, places.clamp(max=tokens.shape[1] - 1))
        proposed = observations["candidates"].long().unsqueeze(1)
        echoes = None if "speaker" in observations else Echoes.of_prompt(tokens, length - generated, own, proposed)
        score, candidates = self.scorer(own, generated, proposed, echoes)
        return {**observations, "score": score.squeeze(1), "candidate_scores": candidates.squeeze(1)}

    def valued(self, observations: Tensors, steps: torch.Tensor) -> Tensors:
        """Return observations with what given scores are worth in their place, after ``steps`` (..., 1) tokens."""
        if self.score_value is None:
            return observations
        last = len(self.score_value.slope) - 1
        at = steps + last - self.max_new_tokens  # texts of another length than in training: by the tokens that are left
        found = {"score": self.score_value(observations["score"].float(), at.clamp(0, last))}
        if self.uses_candidate_scores:
            scores, candidates = observations["candidate_scores"].float(), observations["candidates"]
            ends = torch.tensor(self._end_ids, dtype=candidates.dtype, device=candidates.device)
            ended = torch.isin(candidates, ends)
            after = self.score_value(scores, (at + 1).clamp(0, last))
            found["candidate_scores"] = torch.where(ended, scores, after)
        return {**observations, **found}

    @property
    def _end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text. In a conversation they end a turn."""
        return () if self._language_model is None or self.turn_scales else self._language_model.end_ids

    def _generated(self, observations: Tensors) -> torch.Tensor:
        return ((1.0 - observations["budget"].float()) * self.max_new_tokens).round().long()  # (B, 1)

    def set_training_mode(self, mode: bool) -> None:
        """Switch dropout on or off: the name by which SB3's policies ask for it."""
        self.train(mode)

    def start_at(self, returns: torch.Tensor) -> None:
        """Count in the power of 4 that is nearest to the range of the returns (n,); set the output bias to their mean.

        Softmax ignores shifts, so the policy is unchanged.
        """
        with torch.no_grad():
            low, high = returns.aminmax()
            if high > low:
                self.unit.fill_(4.0 ** math.ceil((math.log2(float(high - low)) - 1) / 2))
            bias = returns.mean() / self.unit
            if self.support is not None:
                margin = (high - low).clamp(min=0.1) / 4
                self.support.copy_(torch.linspace(float(low - margin), float(high + margin), len(self.support)))
                bias = torch.log(self.atoms_of(returns).mean(0) + 1e-3)
            for head in self.heads:
                head.value.bias[: head.outputs] = bias

    def atoms_of(self, returns: torch.Tensor) -> torch.Tensor:
        """Return (..., atoms) probabilities whose mean is the return, on the two atoms next to it."""
        assert self.support is not None  # only a network with atoms is asked
        step = self.support[1] - self.support[0]
        place = ((returns - self.support[0]) / step).clamp(0, len(self.support) - 1).unsqueeze(-1)
        return (1 - (place - torch.arange(len(self.support), device=place.device)).abs()).clamp(min=0)

    @property
    def reads_given_scores(self) -> bool:
        """Whether the environment's running scores are an input, and not those of a scorer of its own."""
        return self.uses_score and self.scorer is None

    def known(self, observations: Tensors) -> torch.Tensor:
        """Return the part of Q that is not learned, (..., k)."""
        if not self.uses_candidate_scores:
            return torch.zeros_like(observations["logprobs"])
        return (observations["candidate_scores"] - observations["score"]).float()

    def forward(self, observations: Tensors) -> torch.Tensor:
        """Return Q of single states, (B, k)."""
        return self.head_values(self.scored(observations)).mean(0)

    def head_values(self, observations: Tensors) -> torch.Tensor:
        """Return Q of single states by each head, (heads, B, k), from what ``scored`` returns."""
        tokens, length = own_text(observations)  # (B, T), (B, 1)
        generated = self._generated(observations)
        offset = torch.arange(-max(1, int(generated.max())), 0, device=tokens.device)  # (t,), right-aligned
        inside = (offset >= -generated).unsqueeze(-1)  # (B, t, 1)
        looked_up = self.look_up(observations["candidates"], tokens.gather(1, (length + offset).clamp(min=0)))
        outputs = []
        for head in self.heads:
            candidates, vectors = head.embedded(looked_up)
            vectors = vectors * inside
            memory = (head.contributions(vectors, shifted(vectors)) * inside).sum(-2)
            outputs.append(self._head(head, observations, candidates, memory, vectors[:, -1]))
        return self._q(torch.stack(outputs), observations)

    def episode_values(self, observations: Tensors, looked_up: LookedUp) -> torch.Tensor:
        """Return Q of every step of whole episodes, for each head: (heads, B, T, c); see ``episode_outputs``."""
        return self._q(self.episode_outputs(observations, looked_up), observations)

    def episode_outputs(self, observations: Tensors, looked_up: LookedUp) -> torch.Tensor:
        """Return what each head says of every step of whole episodes: (heads, B, T, c, 1 or atoms).

        Args:
            observations: Each (B, T, ...); those of candidates (B, T, c), all k of them or some.
            looked_up: What ``look_up`` answers for the candidates (B, T, c) and the token
                appended at each step (B, T).
        """
        outputs = []
        for head in self.heads:
            candidates, vectors = head.embedded(looked_up)
            last = shifted(vectors)  # the token before each step
            added = head.contributions(vectors, last)
            memory = added.cumsum(1) - added  # of the tokens before each step
            outputs.append(self._head(head, observations, candidates, memory, last))
        return torch.stack(outputs)

    def look_up(self, candidates: torch.Tensor, tokens: torch.Tensor) -> LookedUp:
        """Return the normalised embeddings of all these tokens, each read once.

        Raises:
            ModelError: no language model is bound.
        """
        if self._language_model is None:
            raise ModelError("no language model to read embeddings from: call bind, or pass env= to load")
        ids = torch.cat([candidates.long().flatten(), tokens.long().flatten()])
        distinct, index = torch.unique(ids, return_inverse=True)
        vectors = torch.from_numpy(self._language_model.embed(distinct.cpu().numpy())).to(self.device)
        of_candidates, of_tokens = index.split([candidates.numel(), tokens.numel()])
        return LookedUp(
            functional.layer_norm(vectors, vectors.shape[-1:]),
            of_candidates.view(candidates.shape),
            of_tokens.view(tokens.shape),
        )

    def _q(self, outputs: torch.Tensor, observations: Tensors) -> torch.Tensor:
        """Return Q, (heads, ..., k), from what the heads say, (heads, ..., k, n)."""
        if self.support is None:
            return outputs.squeeze(-1) * self.unit + self.known(observations)
        tilted = outputs.log_softmax(-1) + self.support / self.beta
        return self.beta * tilted.logsumexp(-1) + self.known(observations)

    def _head(
        self,
        head: CandidateHead,
        observations: Tensors,
        candidates: torch.Tensor,
        memory: torch.Tensor,
        last: torch.Tensor,
    ) -> torch.Tensor:
        scalars = [observations["budget"].float()]
        if self.uses_score:
            scalars.append(observations["score"].float() / self.unit)
        scalars += [observations[key].float() * scale for key, scale in self.turn_scales.items()]
        candidate_scalars = [observations["logprobs"].float().clamp(min=-20.0) / 10.0]
        if self.uses_candidate_scores:
            candidate_scalars.append(self.known(observations) / self.unit)
        outputs: torch.Tensor = head(
            observations["hidden"],
            torch.cat(scalars, -1),
            near_the_end((observations["budget"].float() * self.max_new_tokens).round()),
            candidates,
            torch.stack(candidate_scalars, -1),
            memory,
            last,
        )
        return outputs


def _one_over(space: spaces.Space[Any]) -> float:
    return 1.0 / float(space.high[0])  # type: ignore[attr-defined]
