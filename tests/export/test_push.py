"""`moebius-export push`: the commit, the card, what is refused; and the bundle opened again from the stand-in hub."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from moebius_export.commands import app
from moebius_export.errors import ExportError
from moebius_export.publish.card import MARKER, licence_of
from moebius_export.publish.upload import PushOptions, card_of
from moebius_runtime.bundle import manifest as schema
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.hub import HubName
from moebius_runtime.bundle.manifest import read_manifest, write_manifest
from moebius_runtime.files import sha256_file

pytest.importorskip("huggingface_hub")

TARGET = "hub:me/bundle"


GRAPHS: dict[str, tuple[str, list[tuple[str, str, list[int]]], list[int]]] = {
    "unet": (
        "noise_pred",
        [("sample", "float32", [1, 9, 8, 8]), ("timestep", "int64", [1]), ("guidance_scale", "float32", [1])],
        [1, 4, 8, 8],
    ),
    "unet_conditional": (
        "noise_pred",
        [("sample", "float32", [1, 9, 8, 8]), ("timestep", "int64", [1])],
        [1, 4, 8, 8],
    ),
    "vae_encoder": ("latent", [("image", "float32", [1, 3, 64, 64])], [1, 4, 8, 8]),
    "vae_decoder": ("image", [("latent", "float32", [1, 4, 8, 8])], [1, 3, 64, 64]),
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle with a valid manifest, random test weights, and graphs without nodes."""
    folder = tmp_path / "made"
    graphs = {}
    for name, (output, inputs, shape) in GRAPHS.items():
        group = name.partition("_cond")[0]
        stem = "model_conditional" if name == "unet_conditional" else "model"
        (folder / group).mkdir(parents=True, exist_ok=True)
        (folder / group / f"{stem}.onnx").write_bytes(b"\x08\x0a" + b"\x12" + bytes([len(name)]) + name.encode())
        (folder / group / "model.onnx.data").write_bytes(group.encode() * 1000)
        file = schema.GraphFile(model=f"{group}/{stem}.onnx", weights=f"{group}/model.onnx.data")
        tensors = [schema.TensorInfo(name=label, dtype=kind, shape=size) for label, kind, size in inputs]
        out = schema.TensorInfo(name=output, dtype="float32", shape=shape)
        graphs[name] = schema.GraphInfo(files={"fp32": file}, inputs=tensors, outputs=[out])
    (folder / "unet/model_int8_cpu.onnx").write_bytes(b"\x08\x0a")
    (folder / "unet/int8_cpu.json").write_text(json.dumps({"errors": {"plan": 0.0123, "all": 1}, "psnr": 43.21}))
    int8 = schema.GraphFile(model="unet/model_int8_cpu.onnx", weights=None, plan="unet/int8_cpu.json")
    both = {**graphs["unet"].files, "int8_cpu": int8}
    graphs["unet"] = graphs["unet"].model_copy(update={"files": both})
    files = {
        path.relative_to(folder).as_posix(): schema.FileInfo(size=path.stat().st_size, sha256=sha256_file(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = schema.Manifest(
        schema_version=1,
        created="2026-01-01",
        model=schema.ModelInfo(
            preset="tiny",
            parameters=1234567,
            unet=schema.WeightsInfo(origin="stand-in:0", sha256="1" * 64, stand_in=True),
            vae=schema.WeightsInfo(origin="stand-in:0", sha256="2" * 64, stand_in=True),
        ),
        geometry=schema.Geometry(image_size=64, latent_size=8, latent_channels=4, scaling_factor=0.13025),
        schedule=schema.ScheduleInfo(
            num_train_timesteps=1000,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="epsilon",
        ),
        defaults=schema.Defaults(num_inference_steps=20, guidance_scale=2.5, strength=0.99, noise_offset=0.0357),
        graphs=graphs,
        files=files,
        rewrites=[schema.Rewrite(graph="unet", name="fold", count=3, macs_before=9 * 10**9, macs_after=4 * 10**9)],
        parity={name: schema.Parity(relative_error=1.5e-6, max_error=2e-5) for name in GRAPHS},
        tools={"onnx": "1.23"},
    )
    schema.write_manifest(manifest, folder)
    return folder


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """run("push", ...): exit code, standard output, lines of the error stream."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["moebius-export", *map(str, arguments)])
        with pytest.raises(SystemExit) as leaving:
            app.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return int(leaving.value.code or 0), captured.out, captured.err.splitlines()

    return call


def pushed(hub, repo="me/bundle", branch="main") -> dict[str, bytes]:
    held = hub.repos[repo]
    return {name: hub.content(content) for name, content in held.commits[held.refs[branch]].items()}


def change_manifest(folder: Path, **changes) -> None:
    write_manifest(read_manifest(folder).model_copy(update=changes), folder)


def with_origin(folder: Path, origin: str, vae: str | None = None) -> Bundle:
    """The bundle as if its weights came from `origin`."""
    model = read_manifest(folder).model
    unet = model.unet.model_copy(update={"origin": origin, "stand_in": False})
    other = model.vae.model_copy(update={"origin": vae or origin, "stand_in": False})
    change_manifest(folder, model=model.model_copy(update={"unet": unet, "vae": other}))
    return Bundle.open(folder)


def test_there_and_back(bundle_hub, bundle, run):
    code, out, err = run("push", bundle, TARGET)
    assert code == 0, err[-1]
    assert f"{len(read_manifest(bundle).files)} files" in out
    assert bundle_hub.repos["me/bundle"].refs["main"] in out
    files = pushed(bundle_hub)
    local = {path.relative_to(bundle).as_posix(): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    assert {name: files[name] for name in local} == local
    assert set(files) - set(local) == {"README.md", ".gitattributes"}
    shutil.rmtree(bundle)
    again = Bundle.open(TARGET)
    for graph in again.manifest.graphs:
        assert again.model_file(graph).read_bytes() == local[again.manifest.graphs[graph].files["fp32"].model]
    assert {file: again.file(file).read_bytes() for file in again.manifest.files} == {
        file: content for file, content in local.items() if file != "manifest.json"
    }


def test_a_second_push_sends_what_changed_and_deletes_what_went(bundle_hub, bundle, run):
    assert run("push", bundle, TARGET)[0] == 0
    sent = bundle_hub.received.total()
    repo = bundle_hub.repos["me/bundle"]
    repo.commit(repo.commits[repo.refs["main"]] | {"notes.txt": b"the user's own"})
    manifest = read_manifest(bundle)
    graphs = {name: graph for name, graph in manifest.graphs.items() if name != "unet_conditional"}
    gone = manifest.graphs["unet_conditional"].files["fp32"].model
    files = {name: info for name, info in manifest.files.items() if name != gone}
    (bundle / gone).unlink()
    change_manifest(bundle, graphs=graphs, files=files)
    code, out, _ = run("push", bundle, TARGET)
    assert code == 0
    assert f"deleted {gone}" in out
    assert gone not in pushed(bundle_hub)
    assert pushed(bundle_hub)["notes.txt"] == b"the user's own"
    assert bundle_hub.received.total() == sent  # no large file again


def test_an_upload_that_failed_is_repeated_without_what_arrived(bundle_hub, bundle, run):
    bundle_hub.status = {"/commit/": 500}
    code, _, err = run("push", bundle, TARGET)
    assert code == 2
    assert "answered with HTTP status 500 (a fault of the hub" in err[-1]
    assert set(pushed(bundle_hub)) == {".gitattributes"}  # nothing of it is visible
    sent = bundle_hub.received.total()
    bundle_hub.status = {}
    assert run("push", bundle, TARGET)[0] == 0
    assert bundle_hub.received.total() == sent


def test_a_branch_and_a_private_repository(bundle_hub, bundle, run):
    assert run("push", bundle, f"{TARGET}@test", "--private", "--message", "first")[0] == 0
    assert bundle_hub.repos["me/bundle"].private
    assert "manifest.json" in pushed(bundle_hub, branch="test")
    assert "manifest.json" not in pushed(bundle_hub)
    assert Bundle.open(f"{TARGET}@test").manifest == read_manifest(bundle)


def test_the_card_of_random_test_weights_says_so(bundle_hub, bundle, run):
    run("push", bundle, TARGET)
    card = pushed(bundle_hub)["README.md"].decode()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "- random-test-weights\n" in card
    assert "# bundle (random test weights)" in card
    assert "> **Random test weights.**" in card
    assert MARKER in card


def test_the_card_holds_origin_licence_and_figures(bundle_hub, bundle):
    hub = bundle_hub.repos.setdefault("them/weights", sys.modules["bundle_hub"].Repo())
    commit = hub.commit({"x": b""})
    bundle_hub.cards = {"them/weights": {"license": "mit"}}
    opened = with_origin(bundle, f"hub:them/weights/ft/model.bin@{commit}; EMA | file", "shipped:small/vae")
    with pytest.raises(ExportError, match=r"licences apache-2.0 and mit; name the one that holds"):
        card_of(opened, HubName("me/bundle"), PushOptions())
    opened = with_origin(bundle, f"hub:them/weights/ft/model.bin@{commit}; EMA | file")
    card = card_of(opened, HubName("me/bundle"), PushOptions())
    assert "license: mit\n" in card
    assert "base_model: them/weights\n" in card or "base_model:\n- them/weights\n" in card
    assert r"EMA \| file" in card  # no column more
    assert "published under it as them/weights" in card
    assert "Random test weights" not in card
    assert "| vae\\_encoder | 1.5e-06 | 2.0e-05 |" in card
    assert "| unet | 4.00 |" in card
    assert "| int8\\_cpu | unet | 1.2e-02 | 43.2 dB |" in card
    assert f"GET /api/models/them/weights/revision/{commit}" in bundle_hub.requests


@pytest.mark.parametrize("stated", [None, {"license": ["mit", "other"]}, {"license": "mit\nevil: true"}, {}])
def test_an_unknown_licence_must_be_named(bundle_hub, bundle, stated):
    bundle_hub.repos["them/weights"] = sys.modules["bundle_hub"].Repo()
    bundle_hub.repos["them/weights"].commit({"x": b""})
    bundle_hub.cards = {} if stated is None else {"them/weights": stated}
    opened = with_origin(bundle, "hub:them/weights/model.bin")
    with pytest.raises(ExportError, match=r"licence of the U-Net's weights .* is not known; name it with --license"):
        card_of(opened, HubName("me/bundle"), PushOptions())
    assert "license: other\nlicense_name: see-below\n" in card_of(
        opened, HubName("me/bundle"), PushOptions(licence="other")
    )
    with pytest.raises(ExportError, match="expected an identifier of the hub"):
        licence_of(opened, "MIT License\nx: y", {})


def test_a_local_origin_has_no_licence(bundle_hub, bundle):
    with pytest.raises(ExportError, match="is not known; name it with --license"):
        card_of(with_origin(bundle, "runs/mine/student.safetensors"), HubName("me/bundle"), PushOptions())


def latency_report(opened: Bundle, **changes) -> dict:
    variant = {
        "name": "ort-cpu", "status": "ok", "runtime": "ort-cpu", "precision": "fp32", "threads": 2, "steps": 20,
        "baseline": False, "bundle": {"sha256": {n: f.sha256 for n, f in opened.manifest.files.items()}},
        "total_seconds": {"median": 12.345, "min": 12, "max": 13}, "step": {"p50": 0.0567}, "peak_memory": 900 << 20,
    }  # fmt: skip
    return {
        "created": "2026-01-02",
        "version": "0.2.0",
        "machine": {"processor": "EPYC"},
        "variants": [variant | changes],
    }


def test_reports_of_this_bundle_are_in_the_card(bundle, tmp_path):
    opened = Bundle.open(bundle)
    model = opened.manifest.model
    facts = {"U-Net": f"x, SHA-256 {model.unet.sha256[:16]}", "VAE": f"y, SHA-256 {model.vae.sha256[:16]}"}
    check = {
        "area": "graphs",
        "subject": "unet fp32",
        "name": "error",
        "status": "pass",
        "measured": 1e-6,
        "budget": 1e-4,
    }
    verification = {"held": True, "facts": facts, "checks": [check, check | {"measured": None, "budget": None}]}
    for name, content in (("speed", latency_report(opened)), ("verified", verification)):
        (tmp_path / name).write_text(json.dumps(content))
    card = card_of(opened, HubName("me/b"), PushOptions(reports=(tmp_path / "speed", tmp_path / "verified")))
    assert "Latency, measured 2026-01-02 with moebius-edge 0.2.0 on EPYC." in card
    assert "| ort-cpu | fp32 | 2 | 20 | 12.3 (12 to 13) | 56.7 | 900 |" in card
    assert "2 of 2 checks passed, every check held." in card
    assert "| graphs | unet fp32 | error | 1e-06 | 0.0001 | pass |" in card


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("other files", "was measured with another fp32 file than"),
        ("other precision", "was measured with another fp16 file than"),
        ("failed", "no variant of it was measured"),
        ("other weights", "it verified a bundle of other weights"),
        ("no report", "expected a report of `moebius-bench BUNDLE --json`"),
        ("missing", "No such file"),
    ],
)
def test_reports_of_something_else_are_refused(bundle, tmp_path, content, words):
    opened = Bundle.open(bundle)
    path = tmp_path / "report.json"
    made = {
        "other files": latency_report(opened, bundle={"sha256": {"unet/model.onnx": "0" * 64}}),
        "other precision": latency_report(opened, precision="fp16"),
        "failed": latency_report(opened, status="failed"),
        "other weights": {"held": True, "facts": {"U-Net": "SHA-256 " + "0" * 16}, "checks": []},
        "no report": [1],
    }
    if content != "missing":
        path.write_text(json.dumps(made[content]))
    with pytest.raises(ExportError) as caught:
        card_of(opened, HubName("me/b"), PushOptions(reports=(path,)))
    assert words in str(caught.value)


def test_a_card_of_the_user_stays(bundle_hub, bundle, run):
    run("push", bundle, TARGET)
    repo = bundle_hub.repos["me/bundle"]
    repo.commit(repo.commits[repo.refs["main"]] | {"README.md": b"---\nlicense: mit\n---\n# My own words\n"})
    _, _, err = run("push", bundle, TARGET)
    assert any("the repository's own README.md stays" in line for line in err)
    assert pushed(bundle_hub)["README.md"].endswith(b"# My own words\n")
    run("push", bundle, TARGET, "--replace-card")
    assert MARKER in pushed(bundle_hub)["README.md"].decode()
    repo.commit(repo.commits[repo.refs["main"]] | {"README.md": b"---\nlicense: mit\n---\n"})  # as a new repository has
    run("push", bundle, TARGET)
    assert MARKER in pushed(bundle_hub)["README.md"].decode()


def test_engines_stay_here(bundle_hub, bundle, run):
    (bundle / "engines" / "gpu-tensorrt10-fp16").mkdir(parents=True)
    (bundle / "engines" / "gpu-tensorrt10-fp16" / "unet.plan").write_bytes(b"code")
    code, _, err = run("push", bundle, TARGET)
    assert code == 0
    assert any("engines are not pushed" in line for line in err)
    assert not any("engines" in name for name in pushed(bundle_hub))


def test_a_dry_run_uploads_nothing(bundle_hub, bundle, run):
    code, out, _ = run("push", bundle, TARGET, "--dry-run")
    assert code == 0
    assert out.startswith("---\nlicense:")
    assert bundle_hub.requests == []


def refused(run, *arguments) -> str:
    code, out, err = run("push", *arguments)
    assert (code, out) == (2, "")
    assert err[-1].startswith("error: ")
    return err[-1]


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("me/bundle", "expected hub:OWNER/REPO or hub:OWNER/REPO@BRANCH"),
        ("hub:me", "expected hub:OWNER/REPO"),
        (f"hub:me/bundle@{'a' * 40}", "a commit cannot be changed; name a branch"),
    ],
)
def test_wrong_targets(bundle_hub, bundle, run, target, words):
    assert words in refused(run, bundle, target)
    assert not any(request.startswith("P") for request in bundle_hub.requests)


def test_a_damaged_bundle_is_not_pushed(bundle_hub, bundle, run):
    with open(bundle / "vae_decoder" / "model.onnx", "r+b") as stream:
        stream.write(b"x")
    assert "it is damaged or was exchanged" in refused(run, bundle, TARGET)
    assert bundle_hub.repos == {}


@pytest.mark.parametrize(
    ("part", "status", "words"),
    [
        ("repos/create", 401, "HTTP status 401: it does not accept the access token; run `hf auth login` again"),
        ("repos/create", 403, "access to me/bundle is refused; use a token that may write it"),
        ("/commit/", 403, "use a token that may write it"),
        ("PUT /lfs", 500, "a fault of the hub"),
        ("/commit/", 412, "the branch was changed meanwhile; run the command again"),
        ("/commit/", 413, "nothing was changed in the repository"),
    ],
)
def test_a_hub_that_refuses(bundle_hub, bundle, run, part, status, words):
    bundle_hub.status = {part: status}
    assert words in refused(run, bundle, TARGET)


def test_a_licence_that_the_hub_does_not_know(bundle_hub, bundle, run):
    bundle_hub.card_errors = ['"license" must be one of [apache-2.0, ...]']
    words = refused(run, bundle, TARGET, "--license", "my-own")
    assert "the hub refuses the card" in words
    assert '"license" must be one of' in words


def test_offline_and_without_the_extra(bundle_hub, bundle, run, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "offline mode (HF_HUB_OFFLINE) is on; unset it to push" in refused(run, bundle, TARGET)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "install moebius-edge[hub], or copy the folder" in refused(run, bundle, TARGET)


# --- commands that read and write bundles of a hub ------------------------------------------------------------


@pytest.mark.slow
def test_precision_of_a_bundle_of_a_hub_writes_a_copy(bundle_hub, fused_bundle, run):
    run("push", fused_bundle, TARGET)
    code, out, err = run("precision", TARGET, "--to", "bf16")
    assert code == 0, err[-1]
    assert "copied to bundle" in err
    assert out.splitlines()[-1].startswith("bundle: ")
    assert "bf16" in read_manifest("bundle").graphs["unet"].files
    assert "bf16" not in Bundle.open(TARGET).manifest.graphs["unet"].files
    code, _, err = run("precision", TARGET, "--to", "bf16")
    assert code == 2
    assert "name that folder in place of hub:me/bundle" in err[-1]


@pytest.mark.parametrize("arguments", [("precision", "--to", "bf16"), ("int8", "--target", "ort-cpu")])
def test_commands_that_write_take_a_copy(bundle_hub, bundle, run, arguments):
    run("push", bundle, TARGET)
    Path("bundle").mkdir()
    code, _, err = run(arguments[0], TARGET, *arguments[1:])
    assert code == 2
    assert f"{TARGET} is copied to the folder bundle before it is changed, and there is one already" in err[-1]


def test_the_benchmark_measures_a_folder(bundle_hub, bundle, run, monkeypatch):
    """Its processes open the bundle by its folder: none of them asks the hub."""
    import typer

    from moebius_bench import cli

    run("push", bundle, TARGET)
    measured = []

    def measure(variants, plan):
        measured.extend(variants)
        raise typer.Exit(0)

    monkeypatch.setattr(cli, "_measure", measure)
    monkeypatch.setattr(sys, "argv", ["moebius-bench", TARGET, "--precision", "int8_cpu"])
    with pytest.raises(SystemExit):
        cli.main()
    (variant,) = measured
    folder = Path(variant.bundle)
    assert folder.is_relative_to(Path.cwd() / "moebius")
    assert (folder / "unet/model_int8_cpu.onnx").is_file()
    assert not (folder / "unet/model.onnx").exists()  # the fp32 file of the guided network is not needed


def test_trt_of_a_precision_that_the_hub_lacks(bundle_hub, bundle, run, monkeypatch):
    from moebius_export.trt.options import BuildOptions
    from moebius_export.trt.prepare import prepare

    run("push", bundle, TARGET)
    with pytest.raises(ExportError, match=r"no fp16 file of .* moebius-export precision hub:me/bundle --to fp16"):
        prepare(Path(TARGET), BuildOptions(precision="fp16"), lambda event: None)
    found = prepare(Path(TARGET), BuildOptions(precision="fp32"), lambda event: None)
    assert found.path.is_relative_to(Path.cwd() / "moebius")  # MOEBIUS_CACHE: engines go there
    assert found.model_file("unet").is_file()


@pytest.mark.slow
def test_the_doctor_checks_a_bundle_of_a_hub_whole(bundle_hub, bundle, run):
    run("push", bundle, TARGET)
    code, out, _ = run("doctor", TARGET)
    assert code == 0
    assert "9 files" in out
    assert f"moebius-export trt {TARGET} --fp16" in out
