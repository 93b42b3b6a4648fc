import json

import pytest

from moebius_bench.measure.network_parts import part_of
from moebius_bench.measure.profiling import read_profile, summarise
from moebius_runtime.errors import OutputError

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


def session(name, begin, duration):
    return {"cat": "Session", "name": name, "ts": begin, "dur": duration, "args": {}}


def event(name, op, begin, duration, provider="CPUExecutionProvider"):
    args = {"op_name": op, "provider": provider}
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": begin, "dur": duration, "args": args}


@pytest.fixture
def profile(tmp_path):
    """Three runs; the first, which is slower, does not count. Microseconds."""
    events = [session("model_loading_uri", 0, 50)]
    for begin, slow in ((100, 10), (5000, 1), (9000, 1)):
        events += [
            event(f"{BLOCK}.attn1/Einsum_3", "Einsum", begin + 1, 30 * slow),
            event(f"{BLOCK}.attn1.pos_conv/Conv", "Conv", begin + 331, 20 * slow),
            event(f"{BLOCK}.ff.depth_conv.conv/Conv_nchwc", "Conv", begin + 540, 10 * slow),
            event("ReorderInput_token_5", "ReorderInput", begin + 650, 40 * slow, "CUDAExecutionProvider"),
            session("model_run", begin, 110 * slow if slow > 1 else 700),
        ]
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(events))
    return path


def test_a_profile_is_summed_over_counted_runs(profile):
    runs = read_profile(profile)
    assert [len(run) for run in runs] == [4, 4, 4]
    found = summarise("unet", runs, uncounted=1)
    assert found.runs == 2
    assert found.by_type[0].name == "ReorderInput"  # the costliest comes first
    by_type = {s.name: s for s in found.by_type}
    assert by_type["Conv"].seconds == pytest.approx(30e-6)
    assert by_type["Conv"].share == pytest.approx(0.3)
    assert by_type["Conv"].count == 2
    by_part = {s.name: s.share for s in found.by_part}
    assert by_part == pytest.approx({"Local-λ": 0.5, "FFN": 0.1, "layout (runtime)": 0.4})
    assert {s.name: s.share for s in found.by_provider} == pytest.approx(
        {"CPUExecutionProvider": 0.6, "CUDAExecutionProvider": 0.4}
    )
    assert found.by_node[0].name == "ReorderInput_token_5"


def test_warm_up_alone_is_no_profile(profile):
    with pytest.raises(OutputError, match="all of them warm-up"):
        summarise("unet", read_profile(profile), uncounted=3)


@pytest.mark.parametrize("text", ["", "{}", "[]", '[{"cat": "Node"}]', "[1]"])
def test_what_is_no_profile_is_refused(tmp_path, text):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(OutputError, match="profile"):
        read_profile(path)


@pytest.mark.parametrize(
    ("name", "op", "part"),
    [
        (f"{BLOCK}.attn1.to_q/Conv", "Conv", "Local-λ"),
        (f"{BLOCK}.attn2/Einsum_2", "Einsum", "Interactive-λ"),
        ("encoder_hid_proj/Gemm", "Gemm", "Interactive-λ"),
        (f"{BLOCK}.ff/Split", "Split", "FFN"),
        (f"{BLOCK}.norm1/LayerNormalization", "LayerNormalization", "norms"),
        ("down_blocks.0.resnets.0.norm2/Mul", "Mul", "norms"),
        ("conv_norm_out/Mul", "Mul", "norms"),
        ("decoder.mid_block.attentions.0.group_norm/Mul", "Mul", "norms"),
        ("down_blocks.0.attentions.0.proj_in/Conv", "Conv", "transformer in/out"),
        (f"{BLOCK}/Add", "Add", "transformer in/out"),
        ("down_blocks.0.resnets.0.conv1.conv_dw/Conv", "Conv", "residual blocks"),
        ("up_blocks.0.upsamplers.0/Resize", "Resize", "resampling"),
        ("encoder.down_blocks.1.downsamplers.0.conv/Conv", "Conv", "resampling"),
        ("decoder.mid_block.attentions.0.to_q/Gemm", "Gemm", "VAE attention"),
        ("decoder.mid_block.resnets.0.conv1/Conv", "Conv", "residual blocks"),
        ("conv_in.conv_dw/Conv", "Conv", "in/out"),
        ("encoder.conv_out/Conv", "Conv", "in/out"),
        ("graph/Add_2", "Add", "in/out"),
        ("noise_pred", "Add", "in/out"),
        ("time_embedding.linear_1/Gemm", "Gemm", "time embedding"),
        ("ReorderOutput", "ReorderOutput", "layout (runtime)"),
        ("Transpose_token_7", "Transpose", "layout (runtime)"),
        ("node_Conv_4389", "Conv", "unnamed"),
        ("something.new/Conv", "Conv", "other"),
        ("_inlfunc_LocalLambda_token_13_positions", "MatMul", "Local-λ"),
        ("_inlfunc_LambdaSummary_summary", "MatMul", "Local-λ"),
        ("_inlfunc_InteractiveLambda_token_2_scores", "MatMul", "Interactive-λ"),
        ("_inlfunc_FeedForward_token_2_expanded", "Conv", "FFN"),
        ("_inlfunc_ResidualBlock_first_grouped", "Reshape", "residual blocks"),
        ("_inlfunc_ProjectedResidualBlock_token_14_middle", "Add", "residual blocks"),
        ("_inlfunc_UpsampleConv3x3_token_12_phases", "Reshape", "resampling"),
        ("_inlfunc_Conv3x3_token_3_y", "Conv", "3x3 convolutions"),
        ("_inlfunc_GroupNorm_token_2_centred", "Sub", "norms"),
        ("_inlfunc_SomethingNew_y", "Conv", "unnamed"),
        ("down_blocks.0.resnets.1/ResidualBlock", "ResidualBlock", "residual blocks"),
        ("down_blocks.0.resnets.0/ProjectedResidualBlock", "ProjectedResidualBlock", "residual blocks"),
        ("decoder.up_blocks.0.upsamplers.0/UpsampleConv3x3", "UpsampleConv3x3", "resampling"),
        ("decoder.mid_block.resnets.0.conv1/Conv3x3", "Conv3x3", "residual blocks"),
        ("decoder.conv_in/Conv3x3", "Conv3x3", "in/out"),
        ("mid_block.attentions.0.transformer_blocks.0.attn1/LocalLambda", "LocalLambda", "Local-λ"),
        ("mid_block.attentions.0.transformer_blocks.0.ff/FeedForward", "FeedForward", "FFN"),
    ],
)
def test_parts(name, op, part):
    assert part_of(name, op) == part
