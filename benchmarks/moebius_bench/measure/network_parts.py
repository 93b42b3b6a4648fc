"""Which part of the network a node belongs to, from the name that the export gave it: `MODULE/OPERATOR`."""

from __future__ import annotations

import re

UNNAMED = "unnamed"
LAYOUT = "layout (runtime)"

# The first that matches. Norms and resampling come before the blocks that hold them.
_PARTS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (part, re.compile(pattern))
    for part, pattern in (
        ("Local-λ", r"transformer_blocks\.\d+\.attn1\b"),
        ("Interactive-λ", r"transformer_blocks\.\d+\.attn2\b|^encoder_hid_proj\b|^embedding_layer\b"),
        ("FFN", r"transformer_blocks\.\d+\.ff\b"),
        ("norms", r"(^|\.)(norm\d*|group_norm|conv_norm_out|layer_norm)$"),
        ("resampling", r"\b(up|down)samplers\.\d+\b"),
        ("VAE attention", r"\bmid_block\.attentions\.\d+\b"),
        ("residual blocks", r"\bresnets\.\d+\b"),
        ("transformer in/out", r"\battentions\.\d+\b"),
        ("time embedding", r"^time_embedding\b"),
        ("in/out", r"(^|\.)(conv_in|conv_out|conv_act|quant_conv|post_quant_conv)\b|^(encoder|decoder)$"),
    )
)
# What ONNX Runtime calls the nodes of functions' bodies. A kernel that takes a function whole has the call's own name.
_INLINED = re.compile(r"_inlfunc_([A-Za-z0-9]+)_")
_OF_FUNCTION = {
    "LocalLambda": "Local-λ",
    "LambdaSummary": "Local-λ",
    "InteractiveLambda": "Interactive-λ",
    "FeedForward": "FFN",
    "ResidualBlock": "residual blocks",
    "ProjectedResidualBlock": "residual blocks",
    "GroupNorm": "norms",
    "UpsampleConv3x3": "resampling",
    "Conv3x3": "3x3 convolutions",  # of any module, which the runtime names only where it optimises
}
# Copies between memory layouts that a runtime adds on its own account; transpositions only where they have no module.
_LAYOUT_TYPES = ("ReorderInput", "ReorderOutput", "MemcpyFromHost", "MemcpyToHost")
_OUTPUTS = ("noise_pred", "latent", "image")  # runtimes name the last node after the graph's output


def part_of(name: str, op_type: str) -> str:
    """The part's name.

    `graph` nodes (guidance, timestep arithmetic) are "in/out"; nodes without a module in their name are "unnamed",
    so that a graph of another exporter is not shown as something that it is not.
    """
    if op_type in _LAYOUT_TYPES:
        return LAYOUT
    if inlined := _INLINED.match(name):
        return _OF_FUNCTION.get(inlined[1], UNNAMED)
    module, slash, _ = name.rpartition("/")
    if not slash:
        if name in _OUTPUTS:
            return "in/out"
        return LAYOUT if op_type == "Transpose" and re.fullmatch(r"Transpose(_token_\d+)?", name) else UNNAMED
    for part, pattern in _PARTS:
        if pattern.search(module):
            return part
    return "in/out" if module == "graph" else "other"
