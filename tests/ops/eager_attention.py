"""Attention as transformers computes it, eagerly, from whole matrices of scores."""

import types
from typing import Any

import numpy as np

from lmjax.ops.attention_mask import Mask
from tests.ops.attention_case import SCALE, Case, Features


def visible(case: Case, mask: Mask, features: Features, segmented: bool = True) -> np.ndarray:
    """(batch, query, key), written out for each pair."""
    batch, length = case.segment_ids.shape
    sees = np.zeros((batch, length, length), bool)
    for row, i, j in np.ndindex(batch, length, length):
        inside = (not mask.causal or j <= i) and (mask.window is None or i - j < mask.window)
        one_document = not segmented or case.segment_ids[row, i] == case.segment_ids[row, j] != 0
        sees[row, i, j] = (inside or (features.prefix and case.prefix[row, j])) and one_document
    return sees


def eager_attention(case: Case, mask: Mask, features: Features, segmented: bool = True) -> list[np.ndarray]:
    """(out, dq, dk, dv), and dsinks, by the functions that Gemma 2 and gpt-oss call; in float64."""
    import torch
    from transformers.models.gemma2 import modeling_gemma2
    from transformers.models.gpt_oss import modeling_gpt_oss

    def tensor(array: np.ndarray) -> Any:
        return torch.tensor(array.astype(np.float64), requires_grad=True)

    q, k, v, sinks = (tensor(array) for array in (case.q, case.k, case.v, case.sinks))
    length, num_heads = case.q.shape[1:3]
    sees = visible(case, mask, features, segmented)
    is_padding = np.logical_not(sees.any(axis=-1))
    added = np.where(sees | is_padding[..., None], 0, -np.inf)[:, None]  # a query that sees nothing is dropped below
    if features.alibi:
        distance = np.abs(np.arange(length)[:, None] - np.arange(length))
        added = added - case.slopes.astype(np.float64)[:, None, None] * distance
    module = types.SimpleNamespace(
        num_key_value_groups=num_heads // case.k.shape[2], training=False, head_dim=case.q.shape[3], sinks=sinks
    )
    inputs: Any = [module, *(x.transpose(1, 2) for x in (q, k, v)), torch.tensor(added)]
    if features.sinks:
        assert features.softcap is None
        out, _ = modeling_gpt_oss.eager_attention_forward(*inputs, scaling=SCALE)
    else:
        out, _ = modeling_gemma2.eager_attention_forward(*inputs, scaling=SCALE, softcap=features.softcap)
    out = out * torch.tensor(~is_padding)[:, :, None, None]
    out.backward(torch.tensor(case.dout.astype(np.float64)))
    return [x.detach().numpy() for x in (out, q.grad, k.grad, v.grad, *([sinks.grad] if features.sinks else []))]
