"""The command of `scripts/prove-on-gpu.sh`: checks and times everything on a GPU and writes a report."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from moebius_runtime import console
from moebius_runtime.errors import InputError, MoebiusError

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_DOCS = Path(__file__).resolve().parents[3] / "docs"  # of a checkout

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def prove(
    name: Annotated[
        str | None, typer.Option(help="Name of the report files, such as rtx-4090; default: the name of the GPU.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for NAME.json and NAME.md; default: docs/hardware of the checkout.")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(min=1, help="Time limit of all stages together, in seconds; default: 590, for jetson 2700."),
    ] = None,
    profile: Annotated[
        str, typer.Option(help="Set of stages: gpu, or jetson, which needs no PyTorch and takes a --bundle.")
    ] = "gpu",
    stages: Annotated[str | None, typer.Option(help="Run only these stages, separated by commas.")] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Preset of the networks: full, small or tiny; reduced where time or memory is short."),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(help="Bundle for the engines, in place of a small one that is exported; needed for jetson."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run every stage with tiny networks on the CPU, in seconds.")
    ] = False,
    table: Annotated[
        bool, typer.Option("--table", help="Only write the table of all reports in --out to docs/status.md.")
    ] = False,
) -> None:
    """Checks and times everything on this machine, and writes one report as JSON and Markdown.

    The exit code is 1 where a check failed or a stage broke off, else 0. Missing libraries are listed and no failure.
    """
    from moebius_bench.hardware.table import write_table

    if out is None:
        out = (_DOCS if _DOCS.is_dir() else Path("docs")) / "hardware"
    if table:
        page = out.parent / "status.md"
        console.err.print(f"{page}: {'written' if write_table(out, page) else 'is current'}")
        return
    from moebius_bench.hardware.markdown import page as markdown
    from moebius_bench.hardware.running import Plan, find_device, run_stages
    from moebius_bench.hardware.stages import BUDGETS, PROFILES
    from moebius_runtime.files import atomic_write, check_writable
    from moebius_runtime.hardware.nvidia import describe_gpus

    if profile not in PROFILES:
        raise InputError(f"--profile {profile}: expected one of {', '.join(PROFILES)}")
    chosen = _chosen(stages, PROFILES[profile])
    if preset not in (None, "full", "small", "tiny"):
        raise InputError(f"--preset {preset}: expected full, small or tiny")
    if profile == "jetson" and (bundle is None or not (bundle / "manifest.json").is_file()):
        raise InputError(
            f"--profile jetson --bundle {bundle}: expected a folder with a manifest.json, which `moebius-export onnx "
            "--target tensorrt` wrote on a PC (docs/jetson.md)"
        )
    device = "cpu" if dry_run or profile == "jetson" else find_device()
    if device == "cpu" and not dry_run and profile != "jetson":
        raise InputError(
            "PyTorch is not installed here or sees no CUDA GPU, so nothing can be measured; check nvidia-smi and "
            "`moebius-export doctor`, or try on the CPU with --dry-run"
        )
    gpus = describe_gpus()
    found = name or ("dry-run" if dry_run else _named(gpus[0]["name"] if gpus else profile))
    if not _NAME.fullmatch(found):
        raise InputError(f"--name {found!r}: expected lower-case letters, digits, '.', '_' and '-', at most 64")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror or error}; choose a folder that can be made") from error
    for suffix in ("json", "md"):
        check_writable(out / f"{found}.{suffix}")
    plan = Plan(
        name=found,
        profile=profile,
        stages=chosen,
        device=device,
        preset=preset or ("tiny" if dry_run else "full"),
        budget=budget or BUDGETS[profile],
        bundle=bundle,
        dry_run=dry_run,
    )
    report = run_stages(plan, lambda stage, text: console.err.print(console.one_line(f"{stage}: {text}")))
    with atomic_write(out / f"{found}.json") as stream:
        stream.write((report.model_dump_json(indent=1) + "\n").encode())
    with atomic_write(out / f"{found}.md") as stream:
        stream.write(markdown(report).encode())
    failed = [stage.name for stage in report.stages if not stage.held]
    console.out.print(str(out / f"{found}.md"), soft_wrap=True)
    console.err.print(f"failed: {', '.join(failed)}" if failed else "every check that ran passed")
    raise typer.Exit(report.exit_code)


def _chosen(text: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """The named stages, in the order of the profile."""
    if text is None:
        return known
    wanted = [part.strip() for part in text.split(",") if part.strip()]
    if not wanted or (unknown := [name for name in wanted if name not in known]):
        raise InputError(f"--stages {text}: expected some of {', '.join(known)}{wanted and f'; not {unknown[0]}'}")
    return tuple(name for name in known if name in wanted)


def _named(gpu: str) -> str:
    """A file name from the name of a GPU: "NVIDIA GeForce RTX 4090" -> "nvidia-geforce-rtx-4090"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")[:64] or "gpu"


def main() -> None:
    """Entry point of `python -m moebius_bench.hardware`."""
    console.run(app, (MoebiusError,))
