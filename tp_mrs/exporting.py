"""Export a model to one file that runs without this package: ONNX, or PyTorch's own exported program."""

from __future__ import annotations

import importlib
import importlib.util
import io
import logging
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .borrowing import borrowed, copied
from .errors import InputError, check_choice, check_example_inputs, check_path
from .files import write_bytes

logger = logging.getLogger(__name__)

Format = Literal["onnx", "pt2"]
Program = Callable[[Tensor], Tensor]

TRACED_BATCH = 2
"""Batch size that is traced; tracers take a size of 1 for a constant."""
CHECKED_BATCHES = (1, 3, 8)
"""Batch sizes that the program is checked with before it is written."""
OLDEST_OPSET = 18
"""PyTorch's exporter writes no older one; asked for less, it warns and stays with this one."""
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def export(
    model: nn.Module,
    path: str | Path,
    example_inputs: Tensor,
    *,
    format: Format | None = None,
    opset: int | None = None,
) -> Path:
    """Write `model` in eval mode as a program for batches of any size; normalisation by `normalize` included.

    The program is read again, run on random images in batches of 1, 3 and 8, and written only if its outputs are the
    model's; ONNX by onnxruntime. All this happens on a copy on the CPU. No value of the example inputs is kept.

    Args:
        model: takes images (N, C, H, W), returns one tensor; stays as it is.
        path: the file. It is replaced whole or not at all.
        example_inputs: images of the size that the program is for, (N, C, H, W), on the model's device.
        format: `"onnx"`, for float32 models, with input `images` and output `logits`; or `"pt2"`, to be read with
            `torch.export.load(path).module()`. By default what the path ends in.
        opset: version of ONNX's operators, 18 or later; by default PyTorch's choice.

    Returns:
        The path.

    Raises:
        InputError: an argument is unusable, a package is missing, PyTorch cannot export the model, the program's
            outputs differ from the model's, or the file cannot be written.

    Notes:
        A pt2 file written here holds no pickle. PyTorch would add the example inputs as one: they are left out. Its
        older versions pickle the weights, too: they are refused. Still, `torch.export.load` unpickles what it finds in
        a file, so read pt2 files only from those you trust. ONNX files carry no code.
    """
    check_example_inputs(model, example_inputs)
    chosen = check_format(path, format, opset)
    if chosen == "onnx":
        _check_onnx(model, example_inputs, opset)
    write, read = FORMATS[chosen]
    with borrowed(model), torch.no_grad():
        original = copied(model).cpu()
        checked = [_images_like(example_inputs, size) for size in CHECKED_BATCHES]
        expected = [_outputs(original, images) for images in checked]
        content = write(original, _images_like(example_inputs, TRACED_BATCH), opset)
        program = read(content)
        for images, outputs in zip(checked, expected, strict=True):
            _check_same(program(images), outputs, chosen)
    return write_bytes(path, content)


# --- checks --------------------------------------------------------------------------------------------------------


def check_format(path: str | Path, format: str | None, opset: int | None) -> str:
    """The format that is meant; raises `InputError` if none is, or if it has no opset."""
    suffix = check_path("path", path).suffix.lstrip(".")
    if format is None and suffix not in FORMATS:
        raise InputError(f"path: expected a name that ends in .onnx or .pt2, or a format, got {str(path)!r}")
    chosen = suffix if format is None else format
    check_choice("format", chosen, FORMATS)
    if suffix in FORMATS and suffix != chosen:
        raise InputError(
            f"format: {chosen!r} does not go with the name {str(path)!r}; leave it out, or rename the file"
        )
    if opset is not None and chosen != "onnx":
        raise InputError(f"opset: a {chosen} file has none; leave it out, or choose format='onnx'")
    return chosen


def _check_onnx(model: nn.Module, example_inputs: Tensor, opset: int | None) -> None:
    missing = [package for package in ONNX_PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise InputError(f'format: ONNX needs {", ".join(missing)}; pip install "tp_mrs[export]"')
    if example_inputs.dtype != torch.float32:
        raise InputError(f"example_inputs: ONNX takes float32, got {example_inputs.dtype}; use .float(), on model too")
    if sum(tensor.nbytes for tensor in model.state_dict().values()) >= 2**31:
        raise InputError("model: its weights exceed the 2 GiB of an ONNX file; choose format='pt2'")
    newest = importlib.import_module("onnx").defs.onnx_opset_version()
    if opset is not None and not (isinstance(opset, int) and OLDEST_OPSET <= opset <= newest):
        raise InputError(f"opset: expected an integer in [{OLDEST_OPSET}, {newest}], got {opset!r}")


def _images_like(example_inputs: Tensor, size: int) -> Tensor:
    """`size` random images in [0, 1] on the CPU, the same each time."""
    images = torch.rand(size, *example_inputs.shape[1:], generator=torch.Generator().manual_seed(size))
    return images.to(example_inputs.dtype)


def _outputs(model: nn.Module, images: Tensor) -> Tensor:
    with _refusing(f"example_inputs: the model cannot run on {tuple(images.shape)}"):
        outputs = model(images)
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        found = outputs.dtype if isinstance(outputs, Tensor) else type(outputs).__name__
        raise InputError(f"model: expected it to return one floating-point tensor, got {found}; wrap it in a module")
    if not bool(outputs.isfinite().all()):
        raise InputError("model: its outputs on images in [0, 1] are not finite; check its weights")
    return outputs


def _check_same(found: Tensor, expected: Tensor, format: str) -> None:
    """Half the digits of the type have to agree, relative to the largest output."""
    allowed = torch.finfo(expected.dtype).eps ** 0.5 * float(expected.abs().max())
    if found.shape != expected.shape:
        what = f"outputs of shape {tuple(found.shape)} in place of {tuple(expected.shape)}"
    else:
        difference = float((found - expected).abs().max())
        if difference <= allowed:
            logger.debug("%s, batch of %d: outputs differ by at most %.1e", format, len(expected), difference)
            return
        what = f"outputs off by {difference:.2g}, where {allowed:.2g} is allowed"
    raise InputError(
        f"model: exported as {format}, a batch of {len(expected)} gives {what}, so nothing was written; "
        "does the model compute with its batch size, or at random?"
    )


@contextmanager
def _refusing(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """What PyTorch and onnxruntime raise becomes an `InputError`: `what`, and the first cause."""
    refused: tuple[type[Exception], ...] = (RuntimeError, ValueError, TypeError, AssertionError, *kinds)
    try:
        yield
    except refused as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise InputError(f"{what}: {reason}") from error


# --- formats: writing and reading each -------------------------------------------------------------------------------


def _to_onnx(model: nn.Module, images: Tensor, opset: int | None) -> bytes:
    with _refusing(f"model: PyTorch {torch.__version__} cannot export it to ONNX for batches of any size"):
        program: Any = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["images"],
            output_names=["logits"],
            opset_version=opset,
            verbose=False,
        )
    written = program.model_proto.opset_import[0].version
    if opset not in (None, written):
        raise InputError(f"opset: PyTorch cannot write this model with version {opset}; leave it out, or try another")
    content: bytes = program.model_proto.SerializeToString()
    return content


def _run_onnx(content: bytes) -> Program:
    runtime: Any = importlib.import_module("onnxruntime")
    raised = vars(runtime.capi.onnxruntime_pybind11_state).values()
    kinds = [kind for kind in raised if isinstance(kind, type) and issubclass(kind, Exception)]
    what = f"model: onnxruntime {runtime.__version__} cannot run what PyTorch exported (an older opset may do)"
    with _refusing(what, *kinds):
        session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        with _refusing(what, *kinds):
            return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return run


def _to_pt2(model: nn.Module, images: Tensor, _opset: int | None) -> bytes:
    file = io.BytesIO()
    with _refusing(f"model: PyTorch {torch.__version__} cannot export it for batches of any size"):
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False)
        program._example_inputs = None  # the public setter refuses None in older versions
        torch.export.save(program, file)
    if _holds_pickles(file):
        raise InputError(f"format: PyTorch {torch.__version__} puts pickles in pt2 files; upgrade it, or choose 'onnx'")
    return file.getvalue()


def _holds_pickles(archive: io.BytesIO) -> bool:
    """Whether parts of a zip file come from `torch.save`, which makes zip files, too."""
    with zipfile.ZipFile(archive) as file:
        return any(file.read(name).startswith(b"PK\x03\x04") for name in file.namelist())


def _run_pt2(content: bytes) -> Program:
    what = "model: PyTorch cannot run what it exported"
    with _refusing(what):
        program: Any = torch.export.load(io.BytesIO(content)).module()

    def run(images: Tensor) -> Tensor:
        with _refusing(what):
            outputs: Tensor = program(images)
            return outputs

    return run


FORMATS: dict[str, tuple[Callable[[nn.Module, Tensor, int | None], bytes], Callable[[bytes], Program]]] = {
    "onnx": (_to_onnx, _run_onnx),
    "pt2": (_to_pt2, _run_pt2),
}
