"""Options of XLA's compilers by hardware: which, why, and who says so.

They are given to the compile of a step and not to the process, so that ``lmjax plan --compile`` and ``lmjax train``
compile the same program, no launcher has to pass them on, and the installed compiler is asked about each by name.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from lmjax.errors import InputError
from lmjax.hardware import Hardware

Value = bool | int | str


class Flag(NamedTuple):
    """An option that a step is compiled with."""

    name: str
    value: Value
    hardware: frozenset[str]
    """``gpu``, or one generation as ``tpu v5e``."""
    reason: str
    source: str


GPU = frozenset({"gpu"})
COMBINED = "A layer's collectives of one kind go out as one: fewer and larger ones keep the links busier."
TOOLBOX = "NVIDIA's JAX-Toolbox (2026-07)"
GIB = 2**30

FLAGS = (
    Flag("xla_gpu_all_gather_combine_threshold_bytes", GIB, GPU, COMBINED, TOOLBOX),
    Flag(
        "xla_tpu_scoped_vmem_limit_kib",
        98304,
        frozenset({"tpu v6e"}),
        "A fusion may take 96 of the 128 MiB of vector memory: more of what it reads is there before it is due.",
        "MaxText 0.2.4, benchmarks/xla_flags_library.py, for dense models on v6e",
    ),
)
"""Published by those who run them, known to the compiler, and of another effect than none: benchmarks/xla_flags.py
tells what becomes of these and of others. How much faster they make a step was not measured here."""


def flags_for(hardware: Hardware, asked: Mapping[str, Value | None]) -> dict[str, Value]:
    """Those of the table, with what was asked for in their place; None leaves one out.

    Raises InputError for one that is left out and is not in the table, and for one without effect on ``hardware``.
    """
    for name in asked:
        platform = re.match(r"xla_(cpu|gpu|tpu)_", name)
        if platform is not None and platform[1] != hardware.platform:
            raise InputError(
                f"train.xla_flags: {name} is of the compiler for {platform[1]}, and has no effect on {hardware}. Leave "
                "it out here."
            )
        if name == "xla_force_host_platform_device_count":
            raise InputError(
                f"train.xla_flags: {name} has no effect on a compile. Set JAX_NUM_CPU_DEVICES for as many devices."
            )
    table: dict[str, Value] = {flag.name: flag.value for flag in FLAGS if hardware.is_one_of(flag.hardware)}
    for name in [name for name, value in asked.items() if value is None]:
        if name not in table:
            raise InputError(
                f"train.xla_flags: {name} is null, which leaves it out, but for {hardware} there are only "
                f"{', '.join(sorted(table)) or 'none'} (lmjax info --xla-flags). Leave it away, or give it a value."
            )
    merged = table | dict(asked)
    return {name: value for name, value in merged.items() if value is not None}


class Built(NamedTuple):
    """A compiled step, and how."""

    compiled: jax.stages.Compiled
    flags: dict[str, Value]
    """That it was compiled with."""
    unknown: tuple[str, ...]
    """Of the table, what the installed compiler does not know: it went without."""


def compile_with_flags(
    lowered: jax.stages.Lowered,
    hardware: Hardware,
    asked: Mapping[str, Value | None],
    tracing: Mapping[str, Any] | None = None,
) -> Built:
    """With ``tracing`` come options that do not change what is made, and are told nowhere.

    Raises InputError for a flag that was asked for and that the compiler does not know, or does not take so."""
    flags, unknown = flags_for(hardware, asked), []
    while True:
        options: dict[str, Any] = {**flags, **(tracing or {})}
        try:
            return Built(lowered.compile(compiler_options=options), flags, tuple(unknown))
        except jax.errors.JaxRuntimeError as error:
            message = " ".join(str(error).split())
            for name in asked:
                if name in message:
                    raise InputError(
                        f"train.xla_flags: the compiler refuses {name}={flags[name]}: {message}. Names and values are "
                        "those of the installed version; correct it, or leave it out."
                    ) from error
            missing = re.search(r"No such compile option: '(\w+)'", message)
            if missing is None or missing[1] not in flags:
                raise
            unknown.append(missing[1])
            del flags[missing[1]]
