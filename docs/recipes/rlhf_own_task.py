"""A task, a vocabulary and a reward of your own for ppo_rlhf_toy.py: sort the letters of "dbca:".

Beside the scripts:
    python ppo_rlhf_toy.py --task rlhf_own_task:Sort

`gold` is the reward, because `learned` is False. With `learned = True` it is what a judge goes by,
a reward model learns his preferences, and PPO sees only that model.
"""

import numpy as np

import ppo_rlhf_toy as toy


class Sort(toy.Task):
    """Sort three to five letters. Gold is the share of the places that have the right letter."""

    tokenizer = toy.Tokenizer(list("abcdefgh:"), separator="")  # PAD and EOS are added
    prompt_size = 6  # five letters and the colon
    num_iterations, sft_steps = 30, 2000  # what differs from the defaults of the flags

    def prompts(self, count: int, rng: np.random.Generator, held_out: bool = False) -> list[str]:
        texts: list[str] = []
        while len(texts) < count:
            letters = "".join(rng.choice(list("abcdefgh"), rng.integers(3, 6)))
            if held_out == (sum(map(ord, letters[:3])) % 7 == 0):  # a seventh is held out
                texts.append(f"{letters}:")
        return texts

    def demonstration(self, prompt: str, rng: np.random.Generator | None = None) -> str:
        return "".join(sorted(prompt[:-1]))

    def gold(self, prompt: str, response: str) -> float:
        right = self.demonstration(prompt)
        longest = max(len(right), len(response))
        return sum(a == b for a, b in zip(right, response)) / longest
