"""A GPT-2 of Hugging Face's and a byte-level BPE, both made here, as the models of ppo_rlhf_toy.py.

Beside the scripts:
    pip install transformers tokenizers
    python ppo_rlhf_toy.py --task rlhf_gpt2:Reviews
"""

import numpy as np
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, cat, nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

import ppo_rlhf_toy as toy


class BytePairs(toy.Tokenizer):
    def __init__(self, texts: list[str]):
        self.bpe = ByteLevelBPETokenizer(add_prefix_space=True)
        special = ["<pad>", "<eos>"]  # tokens 0 and 1, as in toy.Tokenizer
        self.bpe.train_from_iterator(texts, 512, special_tokens=special, show_progress=False)

    def __len__(self) -> int:
        return self.bpe.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.bpe.encode(text).ids

    def decode(self, tokens: list[int]) -> str:
        return self.bpe.decode(tokens).removeprefix(" ")


class GPT2(toy.Transformer):
    """Policy and reference have GPT-2's head, reward and value model a scalar one."""

    def __init__(self, args: toy.Args, tokenizer: toy.Tokenizer, head_size: int):
        nn.Module.__init__(self)
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=args.context_size,
            n_embd=args.d_model,
            n_layer=args.num_layers,
            n_head=args.num_heads,
            initializer_range=args.d_model**-0.5,  # 0.02 suits a width of 768
            bos_token_id=None,
            eos_token_id=tokenizer.eos,
            **dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0),  # no dropout
        )
        model, self.tokenizer = GPT2LMHeadModel(config), tokenizer
        self.trunk = model.transformer
        self.head = model.lm_head if head_size > 1 else nn.Linear(args.d_model, 1)

    def forward(self, tokens: Tensor, cache: dict | None = None) -> Tensor:
        cache = {} if cache is None else cache
        cache["seen"] = cat([cache.get("seen", tokens[:, :0]), tokens], dim=1)
        real = (cache["seen"] != self.tokenizer.pad).long()
        positions = (real.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        past = cache.setdefault("past", DynamicCache())  # filled in place
        out = self.trunk(tokens, past, attention_mask=real, position_ids=positions)
        return self.head(out.last_hidden_state)


reviews, rng = toy.Reviews(), np.random.default_rng(0)


class Reviews(toy.Reviews):
    tokenizer = BytePairs(
        [f"{x} {reviews.demonstration(x, rng)}" for x in reviews.prompts(1000, rng)]
    )

    def network(self, args: toy.Args, head_size: int) -> GPT2:
        return GPT2(args, self.tokenizer, head_size)
