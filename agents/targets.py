"""What Q is trained towards: soft returns of whole episodes, computed backwards.

The trade is E[R] - beta KL(pi || mu). Its optimal policy is pi(a|s) proportional to
mu(a|s) exp(Q(s, a) / beta), and the value of a state V(s) = beta log sum_a mu(a|s) exp(Q(s, a) / beta)
already pays for the KL of its own step. Every target below is one recursion,

    y_t = r_t + gamma (V(s_t+1) + lambda c_t+1 (y_t+1 - B(s_t+1, a_t+1))),

and they differ in the trace c and the baseline B:

    td        c = 0              one step: unbiased fixed point, slow over a long text
    retrace   c = min(1, pi/b)   B = Q   stable off-policy (Munos et al. 2016, arXiv:1606.02647)
    path      c = 1              B = Q   path consistency (Nachum et al. 2017, arXiv:1702.08892)
    peng      c = 1              B = V   Peng's Q(lambda): fast, biased towards the behaviour;
                                         with lambda 1 the return that followed, whoever acted
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from agents.q_networks import prior
from agents.replay import EpisodeBatch
from textgen_env.registry import Registry

Traces = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
TRACES: Registry[Traces] = Registry("target")
"""From (ratio pi/b, Q of the action, V), each (B, T), to trace c and baseline B."""


@TRACES.register("td")
def _td(ratio: torch.Tensor, q: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros_like(q), q


@TRACES.register("retrace")
def _retrace(ratio: torch.Tensor, q: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return ratio.clamp(max=1.0), q


@TRACES.register("path")
def _path(ratio: torch.Tensor, q: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones_like(q), q


@TRACES.register("peng")
def _peng(ratio: torch.Tensor, q: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones_like(q), v


def soft_value(log_mu: torch.Tensor, q: torch.Tensor, beta: float) -> torch.Tensor:
    """Return V = beta log sum_a mu exp(Q / beta) over the last axis: masked actions have log mu near -1e9."""
    return beta * torch.logsumexp(log_mu + q / beta, dim=-1)


def log_policy(log_mu: torch.Tensor, q: torch.Tensor, beta: float) -> torch.Tensor:
    """Return log pi, pi proportional to mu exp(Q / beta), over the last axis; nats."""
    return torch.log_softmax(log_mu + q / beta, dim=-1)


def lambda_targets(
    batch: EpisodeBatch,
    q: torch.Tensor,
    *,
    beta: float,
    trace: str = "retrace",
    trace_lambda: float = 1.0,
    gamma: float = 1.0,
) -> torch.Tensor:
    """Return y, (B, T): what Q of each taken action should be. Padding gets numbers to be ignored.

    Args:
        batch: Whole episodes.
        q: (B, T, k) values of a slow copy of the network.
        beta: The trade between reward and KL, reward units a nat; positive.
        trace: One of ``TRACES``.
        trace_lambda: In 0..1; how much of the correction is carried back.
        gamma: Discount; the task itself has none.
    """
    log_mu = prior(batch.observations)
    value = soft_value(log_mu, q, beta)  # (B, T)
    taken = batch.actions.unsqueeze(-1)
    chosen = q.gather(-1, taken).squeeze(-1)
    ratio = (log_policy(log_mu, q, beta).gather(-1, taken).squeeze(-1) - batch.behaviour).exp()
    c, baseline = TRACES[trace](ratio, chosen, value)
    carry = trace_lambda * c * batch.acted  # a state without an action passes on its value alone
    target = batch.rewards.clone()
    for t in range(batch.rewards.shape[1] - 2, -1, -1):
        after = value[:, t + 1] + carry[:, t + 1] * (target[:, t + 1] - baseline[:, t + 1])
        target[:, t] += gamma * torch.where(batch.ended[:, t], 0.0, after)
    return target
