"""DQN in one file that reads from top to bottom, in the manner of CleanRL.

    python examples/cleanrl_dqn.py --steps 30000

The observation is one flat vector a text: hidden state, log-probabilities of the k candidates (-1e4
where masked), budget, score. So the mask of a state is in the state, also of the next one.

A plain DQN learns a value of the i-th candidate, which is another token in every state: in half a minute
the mean reward rises from about 0.12 to 0.20, and no further. ``TextDQN`` learns values of tokens.
"""

from textgen_env.models.device import prepare_process

prepare_process()  # before torch loads, which reads it then

import argparse
import time

import gymnasium as gym
import numpy as np
import torch
from torch import nn
from torch.nn import functional

import textgen_env  # noqa: F401  registers the environment


class QNetwork(nn.Module):
    """Value of each candidate: (B, d + k + 2) -> (B, k), -1e9 where it is masked."""

    def __init__(self, observation_size: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.layers = nn.Sequential(
            nn.LayerNorm(observation_size), nn.Linear(observation_size, 256), nn.ReLU(), nn.Linear(256, k)
        )

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        legal = observation[:, -self.k - 2 : -2] > -1e4
        return torch.where(legal, self.layers(observation.clamp(min=-20.0)), -1e9)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="DQN in one file")
    parser.add_argument("--model", default=None, help="a name, folder or hub id; the environment's default unless said")
    parser.add_argument("--reward", default="sentiment")
    parser.add_argument("--steps", type=int, default=30_000, help="tokens")
    parser.add_argument("--envs", type=int, default=32, help="texts written at a time")
    parser.add_argument("--top-k", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=12)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--buffer-size", type=int, default=20_000, help="steps kept")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--updates", type=int, default=4, help="gradient steps for each step of all environments")
    parser.add_argument("--learning-starts", type=int, default=1_000)
    parser.add_argument("--target-every", type=int, default=100, help="gradient steps between copies")
    parser.add_argument("--exploration", type=float, default=0.5, help="share of the steps over which epsilon falls")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> list[float]:
    """Train, print the course, and return the mean reward of every 256 texts."""
    args = parse()
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)

    chosen = {} if args.model is None else {"model": args.model}
    envs = gym.make_vec(
        "TextGen-v0",
        num_envs=args.envs,
        reward=args.reward,
        reward_at="step",  # the increments of the running score, which sum to the reward
        observation="hidden",
        top_k=args.top_k,
        max_new_tokens=args.max_new_tokens,
        **chosen,
    )
    size, k = envs.single_observation_space.shape[0], args.top_k
    online, target = QNetwork(size, k), QNetwork(size, k)
    target.load_state_dict(online.state_dict())
    optimizer = torch.optim.Adam(online.parameters(), args.learning_rate)

    capacity = args.buffer_size // args.envs * args.envs
    states, next_states = np.zeros((2, capacity, size), np.float32)
    actions = np.zeros(capacity, np.int64)
    rewards, dones = np.zeros((2, capacity), np.float32)
    written = updates = 0

    returns: list[float] = []
    unfinished = np.zeros(args.envs)
    started = time.time()
    observation, _ = envs.reset(seed=args.seed)
    for step in range(0, args.steps, args.envs):
        # Act: epsilon-greedy over the legal candidates.
        epsilon = max(0.02, 1.0 - step / (args.exploration * args.steps))
        with torch.no_grad():
            action = online(torch.from_numpy(observation)).argmax(1).numpy()
        explore = np.flatnonzero(rng.random(args.envs) < epsilon)
        masks = envs.unwrapped.action_masks()
        action[explore] = [rng.choice(np.flatnonzero(masks[row])) for row in explore]
        next_observation, reward, terminated, _, _ = envs.step(action)

        # Store. Ended rows show their next text already; its value is never read, since they are done.
        at = np.arange(written, written + args.envs) % capacity
        states[at], actions[at], next_states[at] = observation, action, next_observation
        rewards[at], dones[at] = reward, terminated
        written += args.envs
        observation = next_observation
        unfinished += reward
        returns += unfinished[terminated].tolist()
        unfinished[terminated] = 0.0

        # Learn: one-step targets, undiscounted as the task is.
        if written < args.learning_starts:
            continue
        for _ in range(args.updates):
            batch = rng.integers(min(written, capacity), size=args.batch_size)
            with torch.no_grad():
                after = target(torch.from_numpy(next_states[batch])).max(1).values
                goal = torch.from_numpy(rewards[batch]) + (1 - torch.from_numpy(dones[batch])) * after
            values = online(torch.from_numpy(states[batch]))
            taken = values.gather(1, torch.from_numpy(actions[batch])[:, None])[:, 0]
            loss = functional.smooth_l1_loss(taken, goal)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            updates += 1
            if updates % args.target_every == 0:
                target.load_state_dict(online.state_dict())
        if step // 2000 != (step - args.envs) // 2000:
            print(
                f"{step:7,} tokens  {time.time() - started:4.0f} s  epsilon {epsilon:.2f}  "
                f"reward of the last 256 texts {np.mean(returns[-256:]):+.2f}"
            )
    return [float(np.mean(returns[i : i + 256])) for i in range(0, len(returns) - 255, 256)]


if __name__ == "__main__":
    main()
