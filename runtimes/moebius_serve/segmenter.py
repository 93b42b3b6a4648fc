"""Segmentation by click with a SAM-type model: an encoder and a decoder as ONNX files, on ONNX Runtime's CPU.

The interface is that of the exports of SAM and MobileSAM (`onnx_model_example.ipynb` of segment-anything) and of
SAM 2 (samexporter). The two differ in how a picture comes to the encoder's size and in the decoder's outputs;
`orig_im_size` among the decoder's inputs tells which one a folder holds.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from moebius_runtime.errors import InputError, OutputError, RuntimeUnavailableError

Clicks = npt.NDArray[np.float32]
"""[N, 3]: x and y in pixels of the picture, and 1 for the object or 0 for what is not of it."""

_MEAN = np.array([123.675, 116.28, 103.53], np.float32)  # of ImageNet, as SAM and SAM 2 normalize
_DEVIATION = np.array([58.395, 57.12, 57.375], np.float32)
_PROMPT = ("point_coords", "point_labels", "mask_input", "has_mask_input")
_MAX_CLICKS = 64
_KEPT = 2  # encoded pictures that further clicks need


class Segmenter:
    """Masks of objects at clicked points. Threads can share one: it runs one picture at a time.

    Args:
        folder: holds one file `*encoder*.onnx` and one `*decoder*.onnx`.
        threads: on the CPU; None for all.

    Raises:
        InputError: no such files, or their inputs and outputs are not those of a SAM-type model.
        RuntimeUnavailableError: ONNX Runtime is not installed.
    """

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        self.name = folder.resolve().name
        self._folder = folder
        self._lock = threading.Lock()
        self._encoded: OrderedDict[bytes, dict[str, npt.NDArray[Any]]] = OrderedDict()
        self._encoder = _session(_only(folder, "encoder"), threads)
        self._decoder = _session(_only(folder, "decoder"), threads)
        self._image, self._size = self._checked_encoder()
        self._own_size = self._checked_decoder()

    def segment(self, rgb: npt.NDArray[np.uint8], clicks: Clicks) -> npt.NDArray[np.bool_]:
        """The object at the clicks, bool [H, W].

        Args:
            rgb: uint8 [H, W, 3].
            clicks: see `Clicks`; at least one marks the object.

        Raises:
            OutputError: the model's masks are not of the picture's size, or not finite.
        """
        height, width = rgb.shape[:2]
        with self._lock:
            features = self._features(rgb)
            scale = np.array([self._scales(height, width)], np.float32)  # [1, 2]
            points = np.concatenate([clicks[:, :2] * scale, np.zeros((1, 2), np.float32)])  # [N + 1, 2]
            labels = np.concatenate([clicks[:, 2], np.array([-1], np.float32)])  # -1: padding, as no box is given
            inputs = features | {
                "point_coords": points[None],  # [1, N + 1, 2]
                "point_labels": labels[None],  # [1, N + 1]
                "mask_input": np.zeros((1, 1, self._size // 4, self._size // 4), np.float32),
                "has_mask_input": np.zeros(1, np.float32),
            }
            if self._own_size:
                inputs["orig_im_size"] = np.array([height, width], np.float32)
            try:
                masks, scores = self._decoder.run(["masks", "iou_predictions"], inputs)
            except Exception as error:
                raise OutputError(f"the segmentation model failed: {_reason(error)}") from error
        best = np.asarray(masks)[0, int(np.asarray(scores)[0].argmax())]
        if not np.isfinite(best).all() or (self._own_size and best.shape != (height, width)):
            raise OutputError(
                f"the segmentation model gave a mask of shape {list(best.shape)}, or NaN; nothing is used"
            )
        if best.shape != (height, width):
            resized = Image.fromarray(best.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
            best = np.asarray(resized)
        area: npt.NDArray[np.bool_] = best > 0
        return area

    def _features(self, rgb: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[Any]]:
        """What the decoder takes of the encoder, kept for the next click on the same picture."""
        key = hashlib.sha256(rgb.tobytes()).digest() + bytes(str(rgb.shape), "ascii")
        if key in self._encoded:
            self._encoded.move_to_end(key)
            return self._encoded[key]
        names = [one.name for one in self._encoder.get_outputs()]
        try:
            outputs = self._encoder.run(names, {self._image: self._prepared(rgb)})
        except Exception as error:
            raise OutputError(f"the segmentation model failed: {_reason(error)}") from error
        wanted = {one.name for one in self._decoder.get_inputs()}
        found = {name: value for name, value in zip(names, outputs, strict=True) if name in wanted}
        self._encoded[key] = found
        while len(self._encoded) > _KEPT:
            self._encoded.popitem(last=False)
        return found

    def _scales(self, height: int, width: int) -> tuple[float, float]:
        """From pixels of the picture to those of the encoder's input: x, y."""
        if self._own_size:  # the longest side fills the input, the rest is padded
            factor = self._size / max(height, width)
            return int(width * factor + 0.5) / width, int(height * factor + 0.5) / height
        return self._size / width, self._size / height

    def _prepared(self, rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """float32 [1, 3, S, S], normalized, zero where it is padded."""
        height, width = rgb.shape[:2]
        x, y = self._scales(height, width)
        size = (round(width * x), round(height * y))
        small = np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BILINEAR), np.float32)
        padded = np.zeros((1, 3, self._size, self._size), np.float32)
        padded[0, :, : size[1], : size[0]] = ((small - _MEAN) / _DEVIATION).transpose(2, 0, 1)  # [h, w, 3] -> [3, h, w]
        return padded

    def _checked_encoder(self) -> tuple[str, int]:
        """The name of the encoder's input and its side."""
        inputs = self._encoder.get_inputs()
        shape = inputs[0].shape
        good = len(inputs) == 1 and inputs[0].type == "tensor(float)" and len(shape) == 4 and shape[1] in (3, "3")
        sides = [side if isinstance(side, int) else 1024 for side in shape[2:]]
        if not good or sides[0] != sides[1]:
            described = ", ".join(f"{one.name}: {one.type} {one.shape}" for one in inputs)
            raise InputError(
                f"{self._folder}: the encoder takes {described}; expected one picture, tensor(float) [1, 3, S, S]"
            )
        return inputs[0].name, sides[0]

    def _checked_decoder(self) -> bool:
        """Whether the decoder brings masks to the picture's size itself (SAM), or not (SAM 2)."""
        takes = {one.name for one in self._decoder.get_inputs()}
        gives = {one.name for one in self._decoder.get_outputs()}
        encoded = {one.name for one in self._encoder.get_outputs()}
        missing = [name for name in _PROMPT if name not in takes]
        missing += [name for name in ("masks", "iou_predictions") if name not in gives]
        unknown = takes - set(_PROMPT) - {"orig_im_size"} - encoded
        if missing or unknown or not takes & encoded:
            raise InputError(
                f"{self._folder}: the decoder takes {', '.join(sorted(takes))} and gives {', '.join(sorted(gives))}; "
                f"expected {', '.join(_PROMPT)} and the encoder's outputs ({', '.join(sorted(encoded))}) -> masks, "
                "iou_predictions, as the ONNX exports of SAM, MobileSAM and SAM 2 have them"
            )
        return "orig_im_size" in takes


def checked_clicks(clicks: Any, shape: tuple[int, int]) -> Clicks:
    """Clicks as JSON has them, [[x, y, 1 or 0], ...], inside of a picture of `shape` (height, width).

    Raises:
        InputError: anything else.
    """
    height, width = shape
    good = isinstance(clicks, list) and 0 < len(clicks) <= _MAX_CLICKS
    for click in clicks if good else []:
        good &= isinstance(click, list) and len(click) == 3
        good = good and all(isinstance(part, (int, float)) and not isinstance(part, bool) for part in click)
        good = good and 0 <= click[0] < width and 0 <= click[1] < height and click[2] in (0, 1)
        if not good:
            break
    if not good or not any(click[2] == 1 for click in clicks):
        raise InputError(
            f"clicks are not as expected: a list of 1 to {_MAX_CLICKS} points [x, y, 1 for the object or 0], inside of "
            f"the {width}x{height} picture, at least one of them on the object"
        )
    return np.array(clicks, np.float32)


def _only(folder: Path, part: str) -> Path:
    found = sorted(folder.glob(f"*{part}*.onnx")) if folder.is_dir() else []
    if len(found) != 1:
        raise InputError(
            f"--segmenter {folder}: {len(found)} files *{part}*.onnx; expected a folder with one encoder and "
            "one decoder"
        )
    return found[0]


def _session(path: Path, threads: int | None) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeUnavailableError("--segmenter needs ONNX Runtime: pip install 'moebius-edge[ort]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise InputError(f"{path} is not a model that ONNX Runtime can load: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
