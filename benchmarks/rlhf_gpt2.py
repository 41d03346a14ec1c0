"""A task of one's own with a network of the size and shape of GPT-2, 124 million weights.

    python ppo_rlhf_toy.py --task benchmarks.rlhf_gpt2:Echo --num-layers 12 --num-heads 12 ...

What it learns is worth nothing; `benchmarks.rlhf_options --only memory` measures what it needs.
"""

import numpy as np
from torch import nn

import ppo_rlhf_toy as toy


class Numbers(toy.Tokenizer):
    """As many words as GPT-2 has, and a padding that is not EOS."""

    pad, eos = 50257, 50256

    def __init__(self) -> None:
        super().__init__([])

    def __len__(self) -> int:
        return 50258

    def encode(self, text: str) -> list[int]:
        return list(map(int, text.split()))

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


class GPT2(toy.Transformer):
    """Its output layer is the table of words, as in GPT-2, whose MLP has a GELU."""

    def __init__(self, args: toy.Args, tokenizer: toy.Tokenizer, head_size: int):
        super().__init__(args, tokenizer, head_size)
        nn.init.normal_(self.word.weight, std=0.02)
        for block in self.blocks:
            block.mlp[1] = nn.GELU(approximate="tanh")
        if head_size > 1:
            self.head.weight = self.word.weight


class Echo(toy.Task):
    """Say the same number. Learned from nothing but the reward."""

    tokenizer, prompt_size = Numbers(), 8

    def prompts(self, count: int, rng: np.random.Generator, held_out: bool = False) -> list[str]:
        return [" ".join(map(str, row)) for row in rng.integers(0, 50256, (count, 8))]

    def demonstration(self, prompt: str, rng: np.random.Generator) -> str:
        return prompt

    def gold(self, prompt: str, response: str) -> float:
        return float(response == prompt)

    def network(self, args: toy.Args, head_size: int) -> GPT2:
        return GPT2(args, self.tokenizer, head_size)
