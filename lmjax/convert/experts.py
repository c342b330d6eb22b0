"""Mixtures of experts in config.json, and the tensors of their parts."""

from collections.abc import Sequence
from typing import Any

from lmjax.convert.family import Part, linear
from lmjax.convert.settings import Settings
from lmjax.errors import InputError
from lmjax.models.config import DecoderConfig
from lmjax.nn.moe import MLPKind, MoEConfig


def expert_parts(module: str, *, gate: str, up: str, down: str) -> tuple[Part, ...]:
    """The router and the matrices of each expert, in a module of the files."""
    experts = {"moe/gate": gate, "moe/up": up, "moe/down": down}
    each = (linear(ours, f"{module}.experts.{{}}.{theirs}") for ours, theirs in experts.items())
    return (linear("moe/router", f"{module}.gate"), *each)


def read_moe(settings: Settings, **fields: Any) -> MoEConfig:
    """Raises InputError, with the file, for fields that do not go together."""
    try:
        return MoEConfig(**fields)
    except InputError as error:
        raise InputError(f"{settings.place}: not experts that the decoder can have: {error}") from None


def moe_of(config: DecoderConfig) -> MoEConfig:
    """The experts of a decoder; of one that has none, such that what is written of it reads as another model."""
    return config.moe or MoEConfig(num_experts=1, experts_per_token=1)


def read_experts(settings: Settings, kinds: Sequence[MLPKind], **fields: Any) -> dict[str, Any]:
    """``moe``, with these ``fields``, and ``mlp_dim``, of the families in which some layers may be dense.

    ``kinds`` are those of all layers. Where none is dense, ``mlp_dim`` is the experts' width, whatever
    ``intermediate_size`` says.
    """
    width = settings.take("moe_intermediate_size")
    moe = read_moe(
        settings,
        expert_dim=width if "dense" in kinds else None,
        renormalize=settings.take("norm_topk_prob", False),
        **mlp_pattern(kinds),
        **fields,
    )
    return {"mlp_dim": settings.take("intermediate_size") if "dense" in kinds else width, "moe": moe}


def read_kinds(settings: Settings, num_layers: int) -> list[MLPKind]:
    """Every ``decoder_sparse_step``-th layer has experts, but not those of ``mlp_only_layers``."""
    step, dense = settings.take("decoder_sparse_step", 1), settings.take("mlp_only_layers", None) or []
    if step < 1:
        raise InputError(f"{settings.place}: decoder_sparse_step is {step}; it has to be 1 or more")
    return ["dense" if layer in dense or (layer + 1) % step else "moe" for layer in range(num_layers)]


def write_experts(config: DecoderConfig) -> dict[str, Any]:
    moe, kinds = moe_of(config), mlp_kinds(config)
    steps = range(1, len(kinds) + 1)
    regular = [n for n in steps if kinds == ["dense" if (i + 1) % n else "moe" for i in range(len(kinds))]]
    return {
        "decoder_sparse_step": regular[0] if regular else 1,
        "mlp_only_layers": [] if regular else [i for i, kind in enumerate(kinds) if kind == "dense"],
        "moe_intermediate_size": config.mlp_dim if moe.expert_dim is None else moe.expert_dim,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "norm_topk_prob": moe.renormalize,
    }


def mlp_kinds(config: DecoderConfig) -> list[MLPKind]:
    """Those of all layers."""
    return [block.mlp for block in config.blocks]


def mlp_pattern(kinds: Sequence[MLPKind]) -> dict[str, Any]:
    """The fields ``dense_first`` and ``pattern`` that have the fewest blocks between them."""

    def shortest(blocks: Sequence[MLPKind]) -> Sequence[MLPKind]:
        return next(
            blocks[:n] for n in range(1, len(blocks) + 1) if all(kind == blocks[i % n] for i, kind in enumerate(blocks))
        )

    num_first = kinds.index("moe") if "moe" in kinds else 0
    dense_first = min(range(num_first + 1), key=lambda first: first + len(shortest(kinds[first:])))
    return {"dense_first": dense_first, "pattern": tuple(shortest(kinds[dense_first:]))}
