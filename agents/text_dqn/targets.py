"""What Q learns from whole episodes: six objectives behind one switch, to be read side by side.

The trade is E[R] - beta KL(pi || mu). Its optimal policy is pi(a|s) proportional to
mu(a|s) exp(Q(s, a) / beta), and the value of a state V(s) = beta log sum_a mu(a|s) exp(Q(s, a) / beta)
already pays for the KL of its own step.

Four regress Q on one recursion over the episode, computed backwards with a slow network::

    y_t = r_t + gamma (V(s_t+1) + lambda c_t+1 (y_t+1 - B(s_t+1, a_t+1))),

and differ in the trace c and the baseline B::

    td        c = 0              one step: unbiased fixed point, slow over a long text
    retrace   c = min(1, pi/b)   B = Q   stable off-policy (Munos et al. 2016, arXiv:1606.02647)
    path      c = 1              B = Q   path consistency (Nachum et al. 2017, arXiv:1702.08892)
    peng      c = 1              B = V   Peng's Q(lambda): fast, biased towards the behaviour;
                                         with lambda 1 the return that followed, whoever acted

Two need no slow network::

    residual  the squared Bellman residual of the whole text, V(s_0) + sum_t (Q - V) - R, through
              all of its terms at once (Yuan et al. 2025, arXiv:2505.15311)
    q_sharp   Q = beta log E_mu[exp(G / beta) | s, a]: the distribution of the return G under the
              language model, by classification, without bootstrapping (Zhou et al. 2025,
              arXiv:2502.20548). Texts are begun by the agent and finished by the language model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from agents.text_dqn.networks import CandidateQNetwork, at_actions, prior
from agents.text_dqn.replay import EpisodeBatch
from textgen_env.registry import Registry

Traces = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
TRACES: Mapping[str, Traces] = {
    "td": lambda ratio, q, v: (torch.zeros_like(q), q),
    "retrace": lambda ratio, q, v: (ratio.clamp(max=1.0), q),
    "path": lambda ratio, q, v: (torch.ones_like(q), q),
    "peng": lambda ratio, q, v: (torch.ones_like(q), v),
}
"""From (ratio pi/b, Q of the action, V), each (B, T), to trace c and baseline B."""


def soft_value(log_mu: torch.Tensor, q: torch.Tensor, beta: float) -> torch.Tensor:
    """Return V = beta log sum_a mu exp(Q / beta) over the last axis: masked actions have log mu near -1e9."""
    return beta * torch.logsumexp(log_mu + q / beta, dim=-1)


def log_policy(log_mu: torch.Tensor, q: torch.Tensor, beta: float) -> torch.Tensor:
    """Return log pi, pi proportional to mu exp(Q / beta), over the last axis; nats."""
    return torch.log_softmax(log_mu + q / beta, dim=-1)


@dataclass(frozen=True)
class ObjectiveSettings:
    """What the objectives share: the trade between reward and KL, and how far back corrections reach.

    Args:
        beta: The trade between reward and KL, reward units a nat; positive.
        trace_lambda: In 0..1; how much of the correction is carried back.
        gamma: Discount; the task itself has none.
    """

    beta: float
    trace_lambda: float = 1.0
    gamma: float = 1.0


def lambda_targets(
    batch: EpisodeBatch, q: torch.Tensor, settings: ObjectiveSettings, trace: str = "retrace"
) -> torch.Tensor:
    """Return y, (B, T): what Q of each taken action should be. Padding gets numbers to be ignored.

    Args:
        batch: Whole episodes.
        q: (B, T, k) values of a slow copy of the network.
        settings: Temperature, lambda, discount.
        trace: One of ``TRACES``.
    """
    log_mu = prior(batch.observations)
    value = soft_value(log_mu, q, settings.beta)  # (B, T)
    chosen = of_actions(q, batch.actions)
    ratio = (of_actions(log_policy(log_mu, q, settings.beta), batch.actions) - batch.behaviour).exp()
    c, baseline = TRACES[trace](ratio, chosen, value)
    carry = settings.trace_lambda * c * batch.acted  # a state without an action passes on its value alone
    target = batch.rewards.clone()
    for t in range(batch.rewards.shape[1] - 2, -1, -1):
        after = value[:, t + 1] + carry[:, t + 1] * (target[:, t + 1] - baseline[:, t + 1])
        target[:, t] += settings.gamma * torch.where(batch.ended[:, t], 0.0, after)
    return target


def of_actions(values: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """Return the entries (..., B, T) of ``values`` (..., B, T, k) at ``actions`` (B, T)."""
    return values.gather(-1, actions.expand(values.shape[:-1]).unsqueeze(-1)).squeeze(-1)


Objective = Callable[[CandidateQNetwork, CandidateQNetwork, EpisodeBatch, ObjectiveSettings], torch.Tensor]
OBJECTIVES: Registry[Objective] = Registry("target")
"""From the online network, the slow one, whole episodes and the settings to a loss."""

UNDISCOUNTED = ("residual", "q_sharp")
"""Objectives that know no ``gamma`` but 1."""


def regression(
    online: CandidateQNetwork, slow: CandidateQNetwork, batch: EpisodeBatch, settings: ObjectiveSettings, *, trace: str
) -> torch.Tensor:
    """Return the mean squared distance of each head from the same targets."""
    looked_up = online.look_up(batch.observations["candidates"], batch.tokens)
    with torch.no_grad():
        q = slow.episode_values(batch.observations, looked_up).mean(0)  # (B, T, k)
        target = lambda_targets(batch, q, settings, trace)
    # The loss reads Q of the taken candidates alone, so that alone is computed: a k-th of the work.
    observations, taken = at_actions(batch.observations, looked_up, batch.actions)
    values = online.episode_values(observations, taken).squeeze(-1)  # (heads, B, T)
    errors = (((values - target) / online.unit) ** 2)[:, batch.acted]
    return errors.mean() if batch.acted.any() else errors.sum()  # 0 where texts of one token were cut


for _name in TRACES:
    OBJECTIVES.register(_name)(partial(regression, trace=_name))


@OBJECTIVES.register("residual")
def residual(
    online: CandidateQNetwork, slow: CandidateQNetwork, batch: EpisodeBatch, settings: ObjectiveSettings
) -> torch.Tensor:
    """Return the mean squared Bellman residual of whole texts, a step."""
    looked_up = online.look_up(batch.observations["candidates"], batch.tokens)
    q = online.episode_values(batch.observations, looked_up)  # (heads, B, T, k)
    value = soft_value(prior(batch.observations), q, settings.beta)  # (heads, B, T)
    advantage = (of_actions(q, batch.actions) - value) * batch.acted  # beta log pi / mu of each step
    paid = (batch.rewards * batch.acted).sum(-1)
    last = batch.acted.sum(-1) - 1
    cut_off = ~batch.ended.gather(-1, last.unsqueeze(-1)).squeeze(-1)  # its last state has a value of its own
    after = of_actions(value, (last + 1).clamp(max=value.shape[-1] - 1)) * cut_off
    gap = (value[..., 0] + advantage.sum(-1) - paid - after) / online.unit
    return (gap**2).mean() / batch.acted.sum(-1).float().mean()


@OBJECTIVES.register("q_sharp")
def classification(
    online: CandidateQNetwork, slow: CandidateQNetwork, batch: EpisodeBatch, settings: ObjectiveSettings
) -> torch.Tensor:
    """Return the cross-entropy of the return's distribution, at steps after which the language model wrote."""
    looked_up = online.look_up(batch.observations["candidates"], batch.tokens)
    observations, taken = at_actions(batch.observations, looked_up, batch.actions)
    logits = online.episode_outputs(observations, taken).squeeze(-2)  # (heads, B, T, atoms)
    returns = (batch.rewards * batch.acted).flip(-1).cumsum(-1).flip(-1)  # (B, T), what was still to come
    target = online.atoms_of(returns - online.known(observations).squeeze(-1))  # (B, T, atoms)
    own = (batch.acted & ~batch.by_language_model).long()  # written by the agent
    own_later = own.flip(-1).cumsum(-1).flip(-1) - own
    taught = batch.acted & (own_later == 0)  # whoever acted at t, the language model wrote the rest
    losses = -(target * logits.log_softmax(-1)).sum(-1)
    return losses[:, taught].mean() if taught.any() else losses.sum() * 0.0
