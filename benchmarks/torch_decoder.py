"""The same decoder in PyTorch, written against the papers and not against lmjax: the peer of tests and benchmarks."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lmjax.models.decoder import DecoderConfig


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, window: int | None):
        super().__init__()
        self.head_dim = config.head_width
        self.window = window
        self.query = nn.Linear(config.embed_dim, config.num_heads * self.head_dim, bias=False)
        self.key = nn.Linear(config.embed_dim, config.kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(config.embed_dim, config.kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(config.num_heads * self.head_dim, config.embed_dim, bias=False)

    def forward(self, x, rotation, segment_ids):
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (layer(x).view(heads).transpose(1, 2) for layer in (self.query, self.key, self.value))
        q, k = (rotate(t, *rotation) for t in (q, k))
        mask = None if segment_ids is None and self.window is None else visible(x.shape[1], self.window, segment_ids)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        return self.out(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate = nn.Linear(config.embed_dim, config.mlp_dim, bias=False)
        self.up = nn.Linear(config.embed_dim, config.mlp_dim, bias=False)
        self.down = nn.Linear(config.mlp_dim, config.embed_dim, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: DecoderConfig, window: int | None):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.embed_dim, eps=config.norm_epsilon)
        self.attention = Attention(config, window)
        self.mlp_norm = nn.RMSNorm(config.embed_dim, eps=config.norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x, rotation, segment_ids):
        x = x + self.attention(self.attention_norm(x), rotation, segment_ids)
        return x + self.mlp(self.mlp_norm(x))


class TorchDecoder(nn.Module):
    """Pre-norm decoder with RMSNorm, RoPE, SwiGLU and grouped-query attention."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        pattern = config.layer_pattern
        self.head_dim, self.rope_theta = config.head_width, config.rope_theta
        self.embed = nn.Embedding(config.vocab_size, config.embed_dim)
        self.blocks = nn.ModuleList(
            [Block(config, config.window(pattern[i % len(pattern)])) for i in range(config.num_layers)]
        )
        self.final_norm = nn.RMSNorm(config.embed_dim, eps=config.norm_epsilon)
        self.head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight

    def forward(self, tokens, positions=None, segment_ids=None):
        """Logits (batch, seq, vocab). Without ``segment_ids`` (0 at padding) each row is one document."""
        if positions is None:
            positions = torch.arange(tokens.shape[1])[None]
        frequencies = self.rope_theta ** (-torch.arange(0, self.head_dim, 2) / self.head_dim)
        angles = torch.cat([positions[:, None, :, None] * frequencies] * 2, dim=-1)
        rotation = angles.cos(), angles.sin()
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, rotation, segment_ids)
        return self.head(self.final_norm(x))


def rotate(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def visible(length: int, window: int | None, segment_ids):
    """Which keys a query sees, (batch or 1, 1, query, key). A padding token sees itself, so that softmax is defined."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distance >= 0)[None]
    if window is not None:
        seen = seen & (distance < window)
    if segment_ids is not None:
        seen = seen & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return seen[:, None]


def loss(logits, targets, weights=None):
    """Mean negative log-likelihood of the weighted targets; all of them weigh the same without ``weights``."""
    if weights is None:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (nll * weights.flatten()).sum() / weights.sum()


def layers(params: Any, config: DecoderConfig) -> Iterator[Any]:
    """Each block's parameters in lmjax's tree ``params``, by depth, unstacked and as numpy arrays."""
    for index, segment in enumerate(config.segments):
        for repeat in range(segment.repeats):
            for place in range(len(segment.pattern)):
                yield _take(params["segments"][index]["blocks"][place], repeat)


def _take(tree: Any, repeat: int) -> Any:
    if isinstance(tree, dict):
        return {key: _take(value, repeat) for key, value in tree.items()}
    return np.asarray(tree)[repeat]


def copy_parameters(model: TorchDecoder, params: Any, config: DecoderConfig) -> None:
    """Give ``model`` the parameters of lmjax's tree ``params``."""

    def put(target: torch.Tensor, source: np.ndarray) -> None:
        assert target.shape == source.shape, (target.shape, source.shape)
        target.copy_(torch.from_numpy(np.array(source)))

    with torch.no_grad():
        put(model.embed.weight, np.asarray(params["embed"]["table"])[: config.vocab_size])
        if not config.tie_embeddings:
            put(model.head.weight, np.asarray(params["head"]["table"])[: config.vocab_size])
        put(model.final_norm.weight, np.asarray(params["final_norm"]["scale"]))
        for block, layer in zip(model.blocks, layers(params, config), strict=True):
            assert isinstance(block, Block)
            put(block.attention_norm.weight, layer["attention_norm"]["scale"])
            put(block.mlp_norm.weight, layer["mlp_norm"]["scale"])
            for name in ("query", "key", "value"):
                kernel = layer["attention"][name]["kernel"]
                put(getattr(block.attention, name).weight, kernel.reshape(config.embed_dim, -1).T)
            put(block.attention.out.weight, layer["attention"]["out"]["kernel"].reshape(-1, config.embed_dim).T)
            for name in ("gate", "up", "down"):
                put(getattr(block.mlp, name).weight, layer["mlp"][name]["kernel"].T)


def make_adamw(
    model: nn.Module, *, learning_rate: float, beta1: float, beta2: float, epsilon: float, weight_decay: float
) -> torch.optim.AdamW:
    """Fused AdamW that decays matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), eps=epsilon, fused=True)
