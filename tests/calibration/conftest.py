"""A bundle with INT8 files in TensorRT's form, made once."""

import shutil

import pytest

pytest.importorskip("torch", reason="the bundles are real exports")


@pytest.fixture(scope="package")
def options():
    """Quick: one picture of two steps, wide budgets, and a device where every operator gains."""
    from moebius_calibration.graph.gain import Rates
    from moebius_calibration.options import Int8Options

    every = Rates(per_gmac=1e3, per_activation=0.0, per_weight=0.0)
    return Int8Options(pictures=1, steps=2, samples=1, observer="mse", error=0.4, psnr=5.0, rates=every, evaluations=20)


@pytest.fixture(scope="package")
def calibrated(tiny_bundle, options, tmp_path_factory):
    """The bundle's folder, its plans and works. Read only: copy the folder."""
    from moebius_calibration.calibrate import Calibrator
    from moebius_calibration.files.write import write_int8
    from moebius_runtime.bundle.bundle import Bundle

    folder = tmp_path_factory.mktemp("int8") / "bundle"
    shutil.copytree(tiny_bundle, folder)
    bundle = Bundle.open(folder)
    calibrator = Calibrator(bundle, options, lambda what, done, total: None)
    plans = calibrator.run()
    write_int8(bundle, plans, calibrator.works, lambda what, done, total: None)
    return folder, plans, calibrator.works


@pytest.fixture(scope="package")
def in_fp8(calibrated, tmp_path_factory):
    """The same in FP8, with the ranges of INT8's plans: the bundle's folder, its plans and works. Read only."""
    from dataclasses import replace

    from moebius_calibration.files.write import write_int8
    from moebius_runtime.bundle.bundle import Bundle

    folder = tmp_path_factory.mktemp("fp8") / "bundle"
    shutil.copytree(calibrated[0], folder)
    plans = {
        name: plan.model_copy(
            update={
                "target": "tensorrt-fp8",
                "nodes": {node: "float" if choice == "float" else "fp8" for node, choice in plan.nodes.items()},
            }
        )
        for name, plan in calibrated[1].items()
    }
    works = {name: replace(work, target="tensorrt-fp8") for name, work in calibrated[2].items()}
    write_int8(Bundle.open(folder), plans, works, lambda what, done, total: None)
    return folder, plans, works
