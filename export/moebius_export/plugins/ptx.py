"""Compiles the Triton kernel of local λ to PTX for one GPU architecture. Needs Triton but no GPU."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from moebius_export.errors import ExportError

TYPES = ("fp32", "fp16", "bf16")
SHARED_LIMIT = 48 * 1024  # bytes of a block that a launch gets by default
_TENSORS = ("query", "values", "summary", "window", "output")
# SM -> PTX version times 10: that of CUDA 12.0, or the first that supports the SM. A driver rejects PTX newer than its
# own, and LLVM ends the whole process if the version is too old for the SM.
PTX_VERSIONS = {80: 80, 86: 80, 87: 80, 89: 80, 90: 80, 120: 87, 121: 88}
_HIDDEN = 2  # scratch memory pointers that Triton appends to the parameters of a kernel


@dataclass(frozen=True)
class LocalLambdaKernel:
    """A compiled kernel and its launch: PTX, entry point, threads and shared bytes of a block, grid.

    `grid` is (x, y) for one picture; z is the batch. Its pointers are query, values, summary, window, output.
    """

    ptx: str
    name: str
    threads: int
    shared: int
    grid: tuple[int, int]


def usable_tactics(size: tuple[int, int], heads: int, depth: int, reach: int, kind: str, sm: int) -> list[int]:
    """The numbers (from 1) of the tilings whose kernel an engine can launch. Arguments as of `compile_local_lambda`.

    Raises:
        ExportError: Triton is not installed or cannot compile the kernel, or no tiling fits.
    """
    check_compiler(sm)
    from moebius.network.triton_kernel import block_choices

    numbers = range(1, len(block_choices(heads, depth, _itemsize(kind))) + 1)
    shared = {n: compile_local_lambda(size, heads, depth, reach, kind, sm, n).shared for n in numbers}
    usable = [number for number, taken in shared.items() if taken <= SHARED_LIMIT]
    if not usable:
        raise ExportError(
            f"LocalLambda {heads}x{depth} of {kind} for SM {sm}: every tiling takes more than {SHARED_LIMIT} "
            f"bytes of shared memory ({min(shared.values())} the least); build without plugins"
        )
    return usable


@lru_cache(maxsize=256)
def compile_local_lambda(
    size: tuple[int, int], heads: int, depth: int, reach: int, kind: str, sm: int, tactic: int = 1
) -> LocalLambdaKernel:
    """Compiles the kernel for one picture size.

    Args:
        size: (H, W) of the picture.
        heads, depth, reach: h, k = v and r of `moebius.network.lambda_ops.local_lambda`.
        kind: of all tensors, one of `TYPES`.
        sm: compute capability without its point, of `PTX_VERSIONS`.
        tactic: number of the tiling, from 1.

    Raises:
        ExportError: Triton is not installed, cannot compile the kernel, or gives it more parameters.
    """
    check_compiler(sm)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moebius.network.triton_kernel import block_choices, local_lambda_kernel

    choices = block_choices(heads, depth, _itemsize(kind))
    if not 1 <= tactic <= len(choices):
        raise ExportError(f"tactic {tactic} of LocalLambda: expected 1 to {len(choices)}")
    blocks = choices[tactic - 1]
    (height, width), what = size, f"LocalLambda {heads}x{depth} of {kind} for SM {sm}"
    constants = {
        "HEIGHT": height,
        "WIDTH": width,
        "HEADS": heads,
        "DEPTH": depth,
        "REACH": reach,
        "PRECISION": "ieee",
        "WIDEN": False,
        **blocks.constants(reach),
    }
    source = ASTSource(
        fn=local_lambda_kernel,
        signature=dict.fromkeys(_TENSORS, f"*{kind}") | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(index,): [["tt.divisibility", 16]] for index in range(len(_TENSORS))},  # TensorRT aligns to 256 bytes
    )
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages, "enable_fp_fusion": True}
    options["ptx_version"] = PTX_VERSIONS[sm]
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    except Exception as error:  # its exceptions share no base class
        raise ExportError(f"{what}: Triton {triton.__version__} cannot compile it: {error}") from error
    facts = compiled.metadata
    if facts.global_scratch_size or facts.profile_scratch_size:
        raise ExportError(f"{what}: Triton {triton.__version__} needs scratch memory, which an engine cannot provide")
    return LocalLambdaKernel(
        ptx=without_hidden_parameters(compiled.asm["ptx"], facts.name, len(_TENSORS)),
        name=facts.name,
        threads=facts.num_warps * 32,
        shared=facts.shared,
        grid=blocks.grid((height, width), heads, depth),
    )


def without_hidden_parameters(ptx: str, name: str, wanted: int) -> str:
    """Removes all parameters of the PTX entry `name` after the first `wanted` ones.

    Triton appends pointers to scratch memory to every entry. TensorRT passes only the kernel's own arguments, so the
    driver would read two pointers past the end of its list.

    Raises:
        ExportError: there is no such entry, it has other parameters than expected, or it reads a removed one.
    """
    entry = re.search(rf"\.entry\s+{re.escape(name)}\s*\(([^)]*)\)", ptx)
    if entry is None:
        raise ExportError(f"the compiled PTX has no entry {name}; use another version of Triton")
    parameters = [part.strip() for part in entry[1].split(",") if part.strip()]
    extra = [part.split()[-1] for part in parameters[wanted:]]
    if len(parameters) < wanted or len(extra) > _HIDDEN:
        raise ExportError(
            f"the compiled entry {name} has {len(parameters)} parameters, expected {wanted} and up to {_HIDDEN} hidden "
            "ones; use another version of Triton"
        )
    rest = ptx[: entry.start(1)] + ptx[entry.end(1) :]
    used = [parameter for parameter in extra if re.search(rf"\b{re.escape(parameter)}\b", rest)]
    if used:
        raise ExportError(f"the compiled entry {name} reads its hidden parameters {', '.join(used)}")
    kept = ",\n\t".join(parameters[:wanted])
    return f"{ptx[: entry.start(1)]}\n\t{kept}\n{ptx[entry.end(1) :]}"


def _itemsize(kind: str) -> int:
    if kind not in TYPES:
        raise ExportError(f"LocalLambda of {kind!r}: expected one of {', '.join(TYPES)}")
    return 4 if kind == "fp32" else 2


def check_compiler(sm: int) -> None:
    """Raises `ExportError` without Triton, or for a GPU that the kernel is not compiled for."""
    if sm not in PTX_VERSIONS:
        raise ExportError(
            f"SM {sm}: LocalLambda as a plugin is compiled for {', '.join(map(str, PTX_VERSIONS))}; build without it"
        )
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ExportError(
            f"the LocalLambda plugin is compiled by Triton, which cannot be imported ({error}); install it with "
            "`pip install triton` on Linux, or build without plugins"
        ) from error
