"""The command `moebius-export push`. It needs huggingface_hub, and neither PyTorch nor the `onnx` package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moebius_runtime import console
from moebius_runtime.errors import InputError


def push(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    target: Annotated[str, typer.Argument(help="hub:OWNER/REPO, or hub:OWNER/REPO@BRANCH; made if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    license: Annotated[
        str | None,
        typer.Option(
            help="Identifier of the weights' licence on the hub, such as apache-2.0. Default: that of their origin."
        ),
    ] = None,
    report: Annotated[
        list[Path] | None,
        typer.Option(
            help="Figures for the card: a file of `moebius-bench BUNDLE --json` or `moebius-export verify BUNDLE "
            "--json`; may be repeated."
        ),
    ] = None,
    replace_card: Annotated[
        bool, typer.Option("--replace-card", help="Replace a README.md that this command did not write.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="First line of the commit.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the bundle and print the card; upload nothing.")
    ] = False,
) -> None:
    """Publishes a bundle in a repository of a Hugging Face hub, with a model card, in one commit.

    Every file is checked first. `hub:OWNER/REPO` then names the bundle wherever a command takes one. The address is
    that of HF_ENDPOINT, the token that of `hf auth login` or HF_TOKEN.
    """
    from moebius_export.publish import upload
    from moebius_runtime.bundle.bundle import Bundle
    from moebius_runtime.bundle.hub import hub_name
    from moebius_runtime.files.hub_library import import_hub

    name = hub_name(target)
    if name is None:
        raise InputError(f"{target}: expected hub:OWNER/REPO or hub:OWNER/REPO@BRANCH, such as hub:me/moebius-int8")
    if hub_name(bundle) is not None:
        raise InputError(f"{bundle}: expected the folder of a bundle; a bundle of a hub is already published")
    import_hub("pushing a bundle", "hub", "copy the folder")
    opened = Bundle.open(bundle)
    options = upload.PushOptions(private, license, tuple(report or ()), replace_card, message)
    if opened.manifest.stand_in:
        console.warn("this bundle has stand-in weights (random test weights); the card is marked so")
    if dry_run:
        for file in opened.manifest.files:
            opened.file(file)
        console.out.print(upload.card_of(opened, name, options), end="")
        return
    done = upload.push(opened, name, options, lambda text: console.err.print(console.one_line(text), style="dim"))
    for note in done.notes:
        console.warn(note)
    deleted = f"; deleted {', '.join(done.deleted)}" if done.deleted else ""
    console.out.print(f"{name}: {done.files} files, {done.size / 1e6:,.1f} MB at commit {done.commit}{deleted}")
