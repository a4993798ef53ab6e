"""TextDQN: soft Q-learning over the candidates of a language model."""

from agents.text_dqn.agent import CandidatePolicy, TextDQN

__all__ = ["CandidatePolicy", "TextDQN"]
