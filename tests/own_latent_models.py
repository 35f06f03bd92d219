"""Models of transformers whose attention makes keys and values of a latent and caches them in full."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, rotate_half
from zoo.build import randomise


class Expanded(nn.Module):
    """Latent attention as the first published code of DeepSeek-V2 has it: the cache holds keys of every head."""

    def __init__(self, config: LlamaConfig, layer_idx: int, **ways: Any) -> None:
        super().__init__()
        heads, hidden = config.num_attention_heads, config.hidden_size
        self.layer_idx, self.heads, self.ways = layer_idx, heads, ways
        sizes = {"rank": 12, "plain": 8, "turned": 4, "value": 6} | ways
        self.rank, self.plain, self.turned, self.value = (sizes[n] for n in ("rank", "plain", "turned", "value"))
        self.groups, self.ropes = ways.get("groups", heads), ways.get("ropes", 1)
        narrow = ways.get("query_rank", 20)
        self.q_a = nn.Linear(hidden, narrow, bias=False) if narrow else nn.Identity()
        self.q_norm = LlamaRMSNorm(narrow) if narrow else nn.Identity()
        self.q_b = nn.Linear(narrow or hidden, heads * (self.plain + self.turned))
        self.kv_a = nn.Linear(hidden, self.rank + self.ropes * self.turned)
        self.kv_norm = LlamaRMSNorm(self.rank)
        self.kv_b = nn.Linear(self.rank, self.groups * (self.plain + self.value), bias=ways.get("bias", False))
        self.k_norm = LlamaRMSNorm(self.plain)
        self.out = nn.Linear(heads * self.value, hidden)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        batch, tokens, _ = hidden_states.shape
        query = self.q_b(self.q_norm(self.q_a(hidden_states))).view(batch, tokens, self.heads, -1).transpose(1, 2)
        latent, rope = self.kv_a(hidden_states).split((self.rank, self.ropes * self.turned), -1)
        both = self.kv_b(self.kv_norm(latent)).view(batch, tokens, self.groups, -1).transpose(1, 2)
        key, value = both.split((self.plain, self.value), -1)
        if self.ways.get("norm"):
            key = self.k_norm(key)
        cos, sin = (t[..., : self.turned].unsqueeze(1) for t in position_embeddings)
        plain, turned = query.split((self.plain, self.turned), -1)
        if self.turned:
            turned = turned * cos + rotate_half(turned) * sin
            rope = rope.view(batch, tokens, self.ropes, -1).transpose(1, 2)
            rope = (rope * cos + rotate_half(rope) * sin).expand(-1, self.groups, -1, -1)
            parts = [(turned, plain), (rope, key)] if self.ways.get("first") else [(plain, turned), (key, rope)]
            query, key = (filled(*part) if self.ways.get("filled") else torch.cat(part, -1) for part in parts)
        else:
            query = plain
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        key, value = (x.repeat_interleave(self.heads // self.groups, 1) for x in (key, value))
        scores = query @ key.transpose(2, 3) * (self.plain + self.turned) ** -0.5
        if attention_mask is not None:
            scores = scores + attention_mask[..., : key.shape[-2]]
        heads = torch.softmax(scores, -1) @ value
        return self.out(heads.transpose(1, 2).reshape(batch, tokens, -1)), None


def filled(plain: Tensor, turned: Tensor) -> Tensor:
    """Both in one buffer, as that code does it."""
    width = plain.shape[-1]
    made = plain.new_empty(*plain.shape[:-1], width + turned.shape[-1])
    made[:, :, :, :width] = plain
    made[:, :, :, width:] = turned
    return made


def expanded(dtype: torch.dtype = torch.float64, layers: int = 2, **ways: Any) -> Any:
    """`turned` columns of the keys have positions, `first` or behind, and `ropes` heads; `filled` buffers hold them.

    `groups` of heads share keys; `bias` and `norm` are those of the expansion.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=8192,
        pad_token_id=0,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn = Expanded(config, index, **ways)
    randomise(model, seed=0)
    return model.to(dtype).eval()
