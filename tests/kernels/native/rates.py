"""Rates of matmul on one core in GMAC/s: float32 and INT8 of the kernels by variant, and ONNX Runtime's own.

python tests/kernels/native/rates.py avx2,avx512vnni [--rounds 3]

The programs run alternately; the best round of each counts, which other work on the machine disturbs least. ONNX
Runtime chooses by the processor and cannot be told to use fewer instructions.
"""

import argparse
import importlib.util
import json
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

from moebius_runtime.backends.ort import import_onnxruntime

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("native_build", HERE / "build.py")
native = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(native)


def programs(variants, folder):
    """Compiles `rates.cpp` for each variant."""
    hook = native.hook()
    compiler, sources = hook._compiler(), native.ROOT / hook.FOLDER / "src"
    made = {}
    for name in variants:
        lanes, flags = hook.variants_of(compiler)[name]
        made[name] = folder / name
        command = [*compiler, *hook.FLAGS, *flags, f"-DMOEBIUS_VARIANT={name}", f"-DMOEBIUS_LANES={lanes}"]
        sources_of = [str(HERE / "rates.cpp"), str(sources / "work.cpp")]
        subprocess.run([*command, f"-I{sources}", *sources_of, "-o", str(made[name])], check=True)
    return made


def of_onnxruntime(depth, outputs, tokens=1024, runs=9):
    """GMAC/s of `MatMul` and `MatMulInteger` with one thread, by processor time."""
    import onnx.parser

    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    rng = np.random.default_rng(0)
    shapes = (tokens, depth, tokens), (depth, outputs, outputs)
    rows, weights = rng.integers(0, 256, (tokens, depth)), rng.integers(-64, 65, (depth, outputs))
    found = {}
    for operator, kinds, types in (
        ("MatMul", (np.float32, np.float32), ("float", "float", "float")),
        ("MatMulInteger", (np.uint8, np.int8), ("uint8", "int8", "int32")),
    ):
        a, b, c = (f"{kind}[{n},{m}]" for kind, n, m in zip(types, *shapes, strict=True))
        stored = onnx.numpy_helper.from_array(weights.astype(kinds[1]), "b")
        model = onnx.parser.parse_model(
            f'<ir_version: 8, opset_import: ["": 13]> g ({a} a, {b} b) => ({c} c) {{ c = {operator} (a, b) }}'
        )
        del model.graph.input[1]
        model.graph.initializer.append(stored)
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        x, best = rows.astype(kinds[0]), float("inf")
        for _ in range(runs):
            started = time.process_time()
            session.run(None, {"a": x})
            best = min(best, time.process_time() - started)
        found[operator] = tokens * depth * outputs / best * 1e-9
    return found


def measured(variants, rounds):
    """(depth, outputs) -> name -> best GMAC/s."""
    best = {}
    with tempfile.TemporaryDirectory() as folder:
        made = programs(variants, Path(folder))
        for _ in range(rounds):
            for name, program in made.items():
                lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
                for line in map(json.loads, lines):
                    row = best.setdefault((line.pop("depth"), line.pop("outputs")), {})
                    for kind, rate in line.items():
                        row[f"{name} {kind}"] = max(rate, row.get(f"{name} {kind}", 0))
            for (depth, outputs), row in best.items():
                for operator, rate in of_onnxruntime(depth, outputs).items():
                    row[f"ONNX Runtime {operator}"] = max(rate, row.get(f"ONNX Runtime {operator}", 0))
    return best


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    for (depth, outputs), row in measured(given.variants.split(","), given.rounds).items():
        print(f"{depth} to {outputs}: " + ", ".join(f"{name} {rate:.0f}" for name, rate in row.items()))
