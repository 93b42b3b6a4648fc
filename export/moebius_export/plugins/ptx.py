"""Local-λ's Triton kernel compiled ahead of time: PTX for one GPU architecture. Needs Triton, and no GPU."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from moebius_export.errors import ExportError

TYPES = ("fp32", "fp16", "bf16")
SHARED_LIMIT = 48 * 1024  # bytes of a block that a launch gets without asking the driver for more
_TENSORS = ("query", "values", "summary", "window", "output")
# SM -> PTX version times 10: that of CUDA 12.0, or the first that knows the SM. A driver takes no newer one than its
# own, and LLVM ends the whole process where the version is too old for the SM.
PTX_VERSIONS = {80: 80, 86: 80, 87: 80, 89: 80, 90: 80, 120: 87, 121: 88}
_HIDDEN = 2  # pointers to scratch memory that Triton adds behind a kernel's own parameters


@dataclass(frozen=True)
class LocalLambdaKernel:
    """A compiled kernel, and how it is launched: PTX, entry point, threads and shared bytes of a block, grid.

    `grid` is (x, y) of one picture; z is the batch. Parameters are the pointers query, values, summary, window, output.
    """

    ptx: str
    name: str
    threads: int
    shared: int
    grid: tuple[int, int]


def usable_tactics(size: tuple[int, int], heads: int, depth: int, reach: int, kind: str, sm: int) -> list[int]:
    """The numbers of the cuts of the work, from 1, whose kernel an engine can launch; arguments as below.

    Raises:
        ExportError: Triton is not installed or cannot compile this, or there is none.
    """
    check_compiler(sm)
    from moebius.network.triton_kernel import block_choices

    numbers = range(1, len(block_choices(heads, depth, _itemsize(kind))) + 1)
    shared = {n: compile_local_lambda(size, heads, depth, reach, kind, sm, n).shared for n in numbers}
    usable = [number for number, taken in shared.items() if taken <= SHARED_LIMIT]
    if not usable:
        raise ExportError(
            f"LocalLambda {heads}x{depth} of {kind} for SM {sm}: every cut of the work takes more than {SHARED_LIMIT} "
            f"bytes of shared memory ({min(shared.values())} the least); build without plugins"
        )
    return usable


@lru_cache(maxsize=256)
def compile_local_lambda(
    size: tuple[int, int], heads: int, depth: int, reach: int, kind: str, sm: int, tactic: int = 1
) -> LocalLambdaKernel:
    """Compiles the kernel for pictures of one size.

    Args:
        size: (H, W) of the picture.
        heads, depth, reach: h, k = v and r of `moebius.network.lambda_ops.local_lambda`.
        kind: of all tensors, one of `TYPES`.
        sm: compute capability without its point, of `PTX_VERSIONS`.
        tactic: which cut of the work, from 1.

    Raises:
        ExportError: Triton is not installed, cannot compile this, or makes a kernel with more arguments.
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
    except Exception as error:  # its exceptions share no base class of their own
        raise ExportError(f"{what}: Triton {triton.__version__} cannot compile it: {error}") from error
    facts = compiled.metadata
    if facts.global_scratch_size or facts.profile_scratch_size:
        raise ExportError(f"{what}: Triton {triton.__version__} asks for scratch memory, which an engine cannot give")
    return LocalLambdaKernel(
        ptx=without_hidden_parameters(compiled.asm["ptx"], facts.name, len(_TENSORS)),
        name=facts.name,
        threads=facts.num_warps * 32,
        shared=facts.shared,
        grid=blocks.grid((height, width), heads, depth),
    )


def without_hidden_parameters(ptx: str, name: str, wanted: int) -> str:
    """PTX whose entry `name` has its first `wanted` parameters only.

    Triton ends every entry with pointers to scratch memory. TensorRT passes a kernel's own arguments and no more, so
    the driver would read two pointers past the end of its list. They are cut where the kernel never uses them.

    Raises:
        ExportError: there is no such entry, it has other parameters than expected, or it uses those to be cut.
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
    """Refuses where nothing can be compiled: `ExportError` without Triton, or for a GPU that is not known here."""
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
