"""`moebius-export`: from weights to a bundle. Higher packages register their commands by entry points."""

from __future__ import annotations

from importlib import metadata

import typer

from moebius_export.commands.doctor import doctor
from moebius_export.commands.inline import inline
from moebius_export.commands.onnx import onnx
from moebius_export.commands.precision import precision
from moebius_export.commands.push import push
from moebius_export.commands.trt import trt
from moebius_export.commands.tune import tune
from moebius_export.commands.verify import verify
from moebius_export.commands.web import web
from moebius_runtime import console
from moebius_runtime.errors import MoebiusError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _commands(version: console.Version = False) -> None:
    """Exports PyTorch weights to a bundle that a device runs without PyTorch."""


for _command in (onnx, inline, precision, trt, web, verify, doctor, tune, push):
    app.command()(_command)
for _entry in metadata.entry_points(group="moebius_export.commands"):
    app.command(_entry.name)(_entry.load())


def main() -> None:
    """Entry point of `moebius-export`."""
    console.run(app, (MoebiusError,))


if __name__ == "__main__":
    main()
