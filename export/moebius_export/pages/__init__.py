"""Reports as one HTML file: Jinja2 templates around tables, plots and pictures, with everything from outside escaped.

A page needs nothing else: no script, no font, no request. It is readable from 360 pixels of width up, light and dark.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from moebius_export.pages import plots

TEMPLATES = Path(__file__).with_name("templates")


def render(template: Path, **context: Any) -> str:
    """The page that a template file makes of `context`.

    The template extends `base.html` and imports `parts.html` from this package; `plots` and `colour` are in its reach.
    An undefined name is an error.
    """
    environment = Environment(
        loader=FileSystemLoader([TEMPLATES, template.parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(plots=plots, colour=plots.colour)
    return environment.get_template(template.name).render(**context)


def png_uri(pixels: npt.NDArray[np.uint8], longest: int = 320) -> str:
    """A `data:` address of a picture, uint8 [H, W, 3], as PNG, shrunk where its longer side is over `longest`."""
    image = Image.fromarray(pixels)
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
