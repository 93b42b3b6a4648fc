"""`moebius-bench`: latency, efficiency and quality of a bundle, and masks to measure quality with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from moebius_bench import cli_browser, cli_inpaint, cli_tradeoff
from moebius_runtime import console
from moebius_runtime.errors import InputError, MoebiusError

if TYPE_CHECKING:
    from moebius_bench.measure.results import Report
    from moebius_bench.measure.rounds import Measured, Plan
    from moebius_bench.measure.variants import Variant
    from moebius_runtime.bundle.manifest import Precision

DEFAULT_COMMAND = "run"
_BUSY = 0.5  # a load average above it means that something else was running


app = typer.Typer(
    cls=console.default_group(DEFAULT_COMMAND),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class EngineName(str, Enum):
    """--engine."""

    local = "local"
    ray = "ray"


@app.callback()
def _commands(version: console.Version = False) -> None:
    """Measures speed, memory and quality of bundles. `moebius-bench BUNDLE` means `moebius-bench run BUNDLE`."""


@app.command(name=DEFAULT_COMMAND)
def run_command(
    bundles: Annotated[
        list[Path],
        typer.Argument(help="Bundles to measure; several are compared. Folders, or hub:OWNER/REPO[@REVISION]."),
    ],
    runtime: Annotated[
        str,
        typer.Option(help="Runtimes of moebius-inpaint, separated by commas; each is measured or reported as failed."),
    ] = "ort-cpu",
    precision: Annotated[str, typer.Option(help="Precisions of the bundle, separated by commas.")] = "fp32",
    threads: Annotated[
        str | None, typer.Option(help="Numbers of threads, separated by commas; default: the physical cores.")
    ] = None,
    steps: Annotated[
        str | None, typer.Option(help="Numbers of steps, separated by commas; default: the bundle's.")
    ] = None,
    mode: Annotated[
        str,
        typer.Option(help="Modes of moebius-inpaint, separated by commas. Baselines run reference, the original's."),
    ] = "reference",
    baseline: Annotated[
        str | None, typer.Option(help="torch: the unfused network in eager PyTorch; plain: an unfused bundle.")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also profile by operator and part of the network, in a separate run.")
    ] = False,
    rounds: Annotated[
        int, typer.Option(min=1, help="Number of rounds; each runs every variant in a fresh process.")
    ] = 3,
    repeats: Annotated[int, typer.Option(min=1, help="Number of measured pictures in each process.")] = 1,
    warmup: Annotated[
        int, typer.Option(min=1, help="Steps of the first picture of each process, which is not measured.")
    ] = 1,
    image: Annotated[Path | None, typer.Option(help="Picture to inpaint; default: a drawn one.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Mask of --image; default: the middle quarter.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Default: the bundle's.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the drawn picture and the noise.")] = 0,
    weights: Annotated[
        str | None,
        typer.Option(help="Weights of the baselines; default: those of the bundle where they are random test weights."),
    ] = None,
    vae: Annotated[str | None, typer.Option(help="As --weights, for the autoencoder.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for all figures, as JSON.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="File for a page with plots.")] = None,
) -> None:
    """Measures the latency of each stage for every combination of the options, interleaved round by round."""
    from moebius_bench.measure.plain import plain_bundle
    from moebius_bench.measure.rounds import Plan
    from moebius_bench.measure.variants import combine, parse_list
    from moebius_runtime.bundle.copies import fetched_folder
    from moebius_runtime.settings.modes import MODES

    if mask is not None and image is None:
        raise InputError("--mask without --image; name the picture that the mask belongs to")
    for path in (file for file in (json_file, html_file) if file is not None):
        if not path.parent.is_dir():
            raise InputError(f"{path}: its folder does not exist; make it first")
    kinds_of_files = [entry or "" for entry in parse_list(precision, str, "--precision")]
    modes = [entry or "" for entry in parse_list(mode, str, "--mode")]
    if unknown := [name for name in modes if name not in MODES]:
        raise InputError(f"--mode {', '.join(unknown)}: expected some of {', '.join(MODES)}, separated by commas")
    variants = combine(
        [str(fetched_folder(bundle, cast("list[Precision]", kinds_of_files))) for bundle in bundles],
        [entry or "" for entry in parse_list(runtime, str, "--runtime")],
        kinds_of_files,
        parse_list(threads, int, "--threads"),
        parse_list(steps, int, "--steps"),
        modes,
    )
    plan = Plan(
        rounds=rounds,
        repeats=repeats,
        warmup_steps=warmup,
        seed=seed,
        guidance_scale=guidance_scale,
        image=None if image is None else str(image),
        mask=None if mask is None else str(mask),
        weights=weights,
        vae=vae,
        profile=profile,
    )
    kinds = [str(kind) for kind in parse_list(baseline, str, "--baseline") if kind]
    if unknown := [kind for kind in kinds if kind not in ("torch", "plain")]:
        raise InputError(f"--baseline {', '.join(unknown)}: expected torch, plain, or both with a comma")
    _check(variants)
    with plain_bundle(variants[0].bundle, plan) if "plain" in kinds else nullcontext() as plain:
        variants += _baselines(variants, kinds, plain)
        report = _measure(variants, plan)
    _deliver(report, json_file, html_file)
    raise typer.Exit(0 if all(row.status == "ok" for row in report.variants) else 1)


@app.command()
def efficiency(
    bundle: Annotated[
        Path | None, typer.Argument(help="Bundle to time; without one only parameters and MACs are counted.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Inference steps of a picture.")] = 20,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the physical cores.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds, each in a fresh process.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for all figures, as JSON.")] = None,
) -> None:
    """Prints the columns of the paper's tables 1 and 2 for this model, with the figures of the paper."""
    from moebius_bench.paper.efficiency import efficiency_table, measured_row, to_json
    from moebius_runtime.bundle.copies import fetched_folder

    folder = None if bundle is None else str(fetched_folder(bundle, ["fp32"]))
    row = measured_row(folder, steps, threads, rounds, _announce)
    console.out.print(efficiency_table(row), soft_wrap=False)
    if json_file is not None:
        _write(json_file, to_json(row))


@app.command()
def layers(
    preset: Annotated[str, typer.Option(help="Preset of the network: full, small or tiny.")] = "full",
    batch: Annotated[int, typer.Option(min=1, help="Batch size, 2 or more.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds; each times both implementations.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the physical cores.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for all figures, as JSON.")] = None,
) -> None:
    """Times the λ layers in PyTorch, original against fast: forward, and forward with backward."""
    from moebius_bench.measure.machine import describe_machine
    from moebius_export.network.torch_runtime import import_torch

    if json_file is not None and not json_file.parent.is_dir():
        raise InputError(f"{json_file}: its folder does not exist; make it first")
    import_torch()
    from moebius_bench.paper.layers import layers_table, measure_layers
    from moebius_bench.report.text_report import wide

    machine = describe_machine()
    with _progress() as progress:
        report = measure_layers(preset, batch, rounds, threads, machine, progress)
    wide(console.out).print(layers_table(report), soft_wrap=False)
    if float(machine.get("load_average", 0)) > _BUSY:
        console.warn(
            f"the machine was loaded at the start (load average {machine['load_average']}): trust ratios, not times"
        )
    if json_file is not None:
        _write(json_file, report.model_dump_json(indent=1))


@app.command()
def quality(
    real: Annotated[Path, typer.Option(help="Folder of the true pictures.")],
    fake: Annotated[Path, typer.Option(help="Folder of the inpainted pictures, paired by stem.")],
    mask: Annotated[
        Path | None, typer.Option(help="Folder of masks, for PSNR and SSIM inside the masked region.")
    ] = None,
    fid_weights: Annotated[
        Path | None, typer.Option(help="The Inception network of FID, a TorchScript archive (a program: it is run).")
    ] = None,
    lpips_weights: Annotated[
        Path | None, typer.Option(help="The LPIPS network, a TorchScript archive (a program: it is run).")
    ] = None,
    engine: Annotated[
        EngineName, typer.Option(help="local: this process. ray: a Ray cluster, whose nodes read the files.")
    ] = EngineName.local,
    address: Annotated[
        str, typer.Option(help="The Ray cluster: auto, HOST:PORT, or local for a new one on this machine.")
    ] = "auto",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Workers on the Ray cluster. Default: as many as fit.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for all figures, as JSON.")] = None,
) -> None:
    """Compares inpainted pictures with true ones: PSNR, SSIM, and FID and LPIPS where their networks are given."""
    from moebius_bench.paper.quality import Cluster, measure_quality, quality_lines

    cluster = Cluster(address, workers) if engine == EngineName.ray else None
    result = measure_quality(real, fake, mask, fid_weights, lpips_weights, _announce, cluster)
    for line in quality_lines(result):
        console.out.print(line)
    if json_file is not None:
        _write(json_file, result.model_dump_json(indent=1))


@app.command()
def masks(
    out: Annotated[Path, typer.Option(help="Folder for the PNG files; made where it is missing.")],
    kind: Annotated[
        str, typer.Option(help="mat-large, mat-small, lama-thick, lama-medium, lama-thin, or ratio-40-50.")
    ] = "mat-large",
    count: Annotated[int, typer.Option(min=1, max=1_000_000, help="Number of masks.")] = 100,
    size: Annotated[int, typer.Option(min=16, max=8192, help="Side in pixels.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the masks.")] = 0,
) -> None:
    """Draws one of the paper's mask sets; the masked region is white."""
    from moebius_bench.paper.mask_sets import write_masks

    ratios = write_masks(out, kind, count, size, seed)
    console.out.print(
        f"{out}: {count} masks of set {kind}, {size}x{size}, seed {seed}; they mask {min(ratios):.1%} to "
        f"{max(ratios):.1%} of the picture, mean {sum(ratios) / len(ratios):.1%}"
    )


@app.command()
def students(
    preset: Annotated[str, typer.Option(help="Preset of the networks: full, small or tiny.")] = "full",
    json_file: Annotated[Path | None, typer.Option("--json", help="File for all figures, as JSON.")] = None,
) -> None:
    """Counts parameters and MACs of the students of the paper's table 2, with the figures of the paper."""
    from moebius_export.network.torch_runtime import import_torch

    if json_file is not None and not json_file.parent.is_dir():
        raise InputError(f"{json_file}: its folder does not exist; make it first")
    import_torch()
    from moebius_bench.paper.students import count_students, students_table, to_json
    from moebius_bench.report.text_report import wide

    rows = count_students(preset, _announce)
    wide(console.out).print(students_table(rows, preset), soft_wrap=False)
    if json_file is not None:
        _write(json_file, to_json(rows, preset))


app.command()(cli_inpaint.inpaint)
app.command()(cli_tradeoff.tradeoff)
app.command()(cli_browser.browser)


def _check(variants: Sequence[Variant]) -> None:
    """Opens every bundle, so that a wrong one fails before anything is measured."""
    from moebius_bench.measure.rounds import bundle_facts

    for bundle in dict.fromkeys(variant.bundle for variant in variants):
        bundle_facts(bundle)


def _baselines(variants: Sequence[Variant], kinds: Sequence[str], plain: str | None) -> list[Variant]:
    """One baseline per kind, steps and number of threads."""
    from dataclasses import replace

    from moebius_bench.measure.variants import TORCH

    found: dict[tuple[object, ...], Variant] = {}
    several = len({(v.steps, v.threads) for v in variants}) > 1
    for kind in kinds:
        for variant in variants:
            key = (kind, variant.steps, variant.threads, variant.runtime if kind == "plain" else TORCH)
            suffix = f" {variant.threads or 'all'} threads {variant.steps or 'default'} steps" if several else ""
            if kind == "plain":
                suffix += f" {variant.runtime}" if len({v.runtime for v in variants}) > 1 else ""
            base = replace(variant, precision="fp32", baseline=True, mode="reference", name=f"baseline {kind}{suffix}")
            base = replace(base, runtime=TORCH) if kind == TORCH else replace(base, bundle=plain or "")
            found.setdefault(key, base)
    return list(found.values())


def _announce(text: str) -> None:
    console.err.print(text, style="dim")


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Shows a line with the current work and its time; yields a function that sets the text."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console.err, transient=True) as bars:
        task = bars.add_task("starting")
        yield lambda text: bars.update(task, description=text)


def _measure(variants: Sequence[Variant], plan: Plan) -> Report:
    from moebius_bench.measure.machine import describe_machine
    from moebius_bench.measure.processes import run_worker
    from moebius_bench.measure.rounds import measure_variants
    from moebius_bench.measure.sensors import find_sensors
    from moebius_runtime.hardware.jetson import describe_jetson
    from moebius_runtime.hardware.nvidia import describe_gpus

    sensors = find_sensors()
    machine = describe_machine() | describe_jetson()
    before = describe_gpus()
    with _progress() as progress:

        def turn(number: int, what: str) -> None:
            progress(f"round {number} of {plan.rounds}: {what}")

        measured = measure_variants(variants, plan, lambda job: run_worker(job, sensors), turn, sensors.power_source)
    after = describe_gpus()
    gpus = [gpu | {"when": "before"} for gpu in before] + [gpu | {"when": "after"} for gpu in after]
    return _report(measured, plan, machine, gpus)


def _report(measured: Measured, plan: Plan, machine: dict[str, str], gpus: list[dict[str, str]]) -> Report:
    from moebius_bench.measure.machine import installed_sizes, installed_version
    from moebius_bench.measure.results import Report, Settings

    notes = list(measured.notes)
    if any(row.bundle is not None and row.bundle.stand_in for row in measured.variants):
        notes.append("random test weights (stand-in): times are valid, pictures are not")
    if float(machine.get("load_average", 0)) > _BUSY:
        notes.append(
            f"the machine was loaded at the start (load average {machine['load_average']}): trust ratios, not times"
        )
    return Report(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        version=installed_version("moebius-edge") or "from a source tree",
        machine=machine,
        gpus=gpus,
        installed=installed_sizes(),
        settings=Settings(
            rounds=plan.rounds,
            repeats=plan.repeats,
            warmup_steps=plan.warmup_steps,
            seed=plan.seed,
            guidance_scale=plan.guidance_scale,
            picture=plan.image or f"drawn from seed {plan.seed}, the middle quarter masked",
            order=measured.order,
        ),
        variants=measured.variants,
        ratios=measured.ratios,
        rates=measured.rates,
        notes=notes,
    )


def _deliver(report: Report, json_file: Path | None, html_file: Path | None) -> None:
    from moebius_bench.report.html_report import page
    from moebius_bench.report.text_report import print_report

    print_report(report, console.out)
    if json_file is not None:
        _write(json_file, report.model_dump_json(indent=1))
    if html_file is not None:
        _write(html_file, page(report))


def _write(path: Path, text: str) -> None:
    from moebius_runtime.files import atomic_write

    with atomic_write(path) as stream:
        stream.write(text.encode())
    console.err.print(f"written: {path}", style="dim")


def main() -> None:
    """Entry point of `moebius-bench`."""

    console.run(app, (MoebiusError,))


if __name__ == "__main__":
    main()
