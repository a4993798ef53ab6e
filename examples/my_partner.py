"""A partner of one's own, in a file: a function of the conversation that answers, and pays for what it likes.

    textgen train --partner examples/my_partner.py:listener --reward none --max-turns 2 --max-turn-tokens 8 \
        --max-new-tokens 16 --steps 3000 --out runs/talk
    textgen generate runs/talk --num 2

The run keeps the name of the file and its checksum, as for a reward (examples/my_reward.py).
"""

from __future__ import annotations

from textgen_env.conversation import Conversation, Reply

KIND = {"good", "great", "love", "thank", "thanks", "happy", "wonderful", "enjoyed", "enjoy", "lovely"}


def listener(conversation: Conversation) -> Reply:
    """Answer what was said; each kind word in it is worth 1."""
    words = [word.strip(".,;:!?\"'") for word in conversation.last.lower().split()]
    kind = sum(word in KIND for word in words)
    return Reply(" That is good to hear." if kind else " And then?", reward=kind)
