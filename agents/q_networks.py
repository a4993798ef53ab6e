"""The earlier path of ``agents.text_dqn.networks``, kept for scripts that name it."""

from agents.text_dqn.networks import NEEDED_KEYS, CandidateQNetwork

__all__ = ["NEEDED_KEYS", "CandidateQNetwork"]
