"""A desk for an agent that was shared: what ``textgen play FOLDER`` and a Space open."""

from __future__ import annotations

from typing import Any

from agents.playground.desk import Desk
from agents.shared import open_shared


def open_shared_desk(source: Any, reward: Any = None, model: Any = None) -> tuple[Desk, str]:
    """Return a desk with the agent in ``source``, and "", or the reason why its texts are not scored.

    Args:
        source: A folder that ``save_pretrained`` wrote, or ``"user/agent"`` on the Hugging Face Hub.
        reward, model: See ``open_shared``.

    Raises:
        ConfigError, ModelError: see ``open_shared``.
    """
    opened = open_shared(source, reward, model, rows=2)
    return Desk(opened.env, opened.agent, "text_dqn", scored=not opened.unscored), opened.unscored
