"""The command `moebius-distill`. On several GPUs: `accelerate launch -m moebius.distill.cli CONFIG.yaml`."""

from __future__ import annotations

import typer

from moebius.distill.commands.ablate import ablate_command
from moebius.distill.commands.encode import encode_command
from moebius.distill.commands.train import train_command
from moebius_runtime import console
from moebius_runtime.errors import MoebiusError

DEFAULT_COMMAND = "train"

app = typer.Typer(
    cls=console.default_group(DEFAULT_COMMAND),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _commands(version: console.Version = False) -> None:
    """Trains Moebius, with or without a teacher. `moebius-distill CONFIG.yaml` means `train CONFIG.yaml`.

    On several GPUs: `accelerate launch -m moebius.distill.cli CONFIG.yaml`.
    """


app.command(name=DEFAULT_COMMAND)(train_command)
app.command(name="encode")(encode_command)
app.command(name="ablate")(ablate_command)


def main() -> None:
    """Runs `moebius-distill` and exits with its code."""
    console.run(app, (MoebiusError,))


if __name__ == "__main__":
    main()
