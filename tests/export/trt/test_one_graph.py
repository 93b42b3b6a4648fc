"""Engines of a bundle whose guidance is distilled: its U-Net takes no guidance scale."""

import shutil

from moebius_runtime.bundle.passport import ENGINES, read_passport


def test_engines_of_a_distilled_bundle(install, trt, device, distilled_bundle, tmp_path):
    install("10.9.0")
    bundle = shutil.copytree(distilled_bundle, tmp_path / "bundle")
    code, out, err = trt(bundle, "--fp32", device=device)
    assert code == 0, out + err
    (folder,) = (bundle / ENGINES).iterdir()
    passport = read_passport(folder)
    assert set(passport.engines) == {"unet", "vae_encoder", "vae_decoder"}
    assert set(passport.engines["unet"].shapes) == {"sample", "timestep"}
    code, out, err = trt(bundle, "--fp32", "--graphs", "unet_conditional", device=device)
    assert code == 2
    assert "no graph 'unet_conditional'; the bundle holds unet, vae_encoder, vae_decoder" in err
