"""Exporting a model to a runtime's own format, checked against the model itself."""

from __future__ import annotations

import copy
import importlib
import logging
import os
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from spamprune.artifact.hub import first_line
from spamprune.artifact.load import load
from spamprune.errors import ArtifactError, OutputError
from spamprune.modules import evaluation_mode

_SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
_ONE_FILE = 2**31 - 2**20  # bytes of weights that fit an ONNX file, which must stay below 2 GiB


def export(
    model: nn.Module | str | Path,
    path: str | Path,
    example: Tensor | None = None,
    *,
    format: Literal["onnx", "torch"] = "onnx",
    tolerance: float = 1e-4,
) -> float:
    """Write a model for ONNX runtimes or for ``torch.export.load``, in evaluation mode.

    The batch size stays free. The file appears only after its outputs were compared with the
    model's, for the batch of ``example`` and for another batch size.

    Args:
        model: The model, or where ``load`` finds it.
        path: The file to write, ``.onnx`` or ``.pt2``; ONNX keeps weights above 2 GiB in a second
            one beside it.
        example: Inputs to trace and compare with, ``(B, ...)``; by default random ones of the size
            in the model's recorded preprocessing, or that a first linear layer takes.
        format: ``"onnx"``, run here by onnxruntime, or ``"torch"`` for a ``.pt2`` archive.
        tolerance: Largest difference allowed, relative to the largest output.

    Returns:
        The largest difference found, relative to the largest output.

    Raises:
        ArtifactError: The model cannot be exported, or what was exported differs from it.
        OutputError: The file cannot be written.
    """
    if format not in _SUFFIXES:
        raise ArtifactError(f"unknown format {format!r}: it is 'onnx' or 'torch'")
    final = Path(path)
    if final.suffix != _SUFFIXES[format]:
        raise OutputError(f"{final} would hold {format}: let its name end in {_SUFFIXES[format]}")
    if format == "onnx":
        _check_packages()
    if not isinstance(model, nn.Module):
        model = load(model)
    # a copy on the CPU, since a trace names the devices of the tensors that it makes
    model = copy.deepcopy(model).cpu()
    example = (_example(model) if example is None else example).detach().cpu()
    pair = torch.cat([example, example])[:2]  # a batch of one would be taken for a constant
    probes = [example, torch.cat([pair, pair])[:3]]
    with evaluation_mode(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        expected = [_flat(model(probe)) for probe in probes]
        # zeros, since the archive keeps what was traced with
        program = _program(model, torch.zeros_like(pair))
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(prefix=f".{final.name}.", dir=final.parent) as folder:
                draft = Path(folder) / final.name
                if format == "onnx":
                    _write_onnx(program, draft)
                    got = _run_onnx(draft, probes)
                else:
                    torch.export.save(program, draft)
                    got = [_flat(program.module()(probe)) for probe in probes]
                difference = _difference(expected, got)
                if not difference <= tolerance:
                    raise ArtifactError(
                        f"{type(model).__name__} exported as {format} differs by {difference:.1e} "
                        f"from the model, more than {tolerance:.0e}: {final} was not written"
                    )
                for file in Path(folder).iterdir():
                    os.replace(file, final.parent / file.name)
        except OSError as error:
            raise OutputError(f"{final} cannot be written ({error}): choose another") from error
    return difference


def _example(model: nn.Module) -> Tensor:
    """Return one random input of the recorded size, or that the first layer shows."""
    settings = getattr(model, "pretrained_cfg", None) or {}
    size = settings.get("input_size") or _vector_size(model)
    if size is None:
        raise ArtifactError(
            f"the input size of {type(model).__name__} was not recorded: pass an example input"
        )
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, *size, generator=generator)


def _vector_size(model: nn.Module) -> tuple[int] | None:
    """Return the size of the vectors that a plain sequence of layers takes, if it takes such."""
    if not isinstance(model, nn.Sequential) or type(model).forward is not nn.Sequential.forward:
        return None
    first = next((layer for layer in model if not isinstance(layer, nn.Flatten)), None)
    return (first.in_features,) if isinstance(first, nn.Linear) else None


def _program(model: nn.Module, example: Tensor) -> ExportedProgram:
    try:
        program = torch.export.export(model, (example,), dynamic_shapes=({0: Dim("batch")},))
    except Exception as error:  # the tracer meets arbitrary code
        raise ArtifactError(
            f"{type(model).__name__} cannot be exported with a free batch size: {first_line(error)}"
        ) from error
    for module in program.graph_module.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # it names files of this machine
    return program


def _check_packages() -> None:
    """Raise where ONNX cannot be written or run, before any work is done."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise ArtifactError(f"{package} is missing: pip install 'spamprune[onnx]'") from error


def _write_onnx(program: ExportedProgram, path: Path) -> None:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        written = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=["input"],
            dynamic_shapes=({0: "batch"},),
        )
        assert written is not None  # with dynamo it never is
        weights = sum(tensor.nbytes for tensor in program.state_dict.values())
        written.save(path, external_data=weights > _ONE_FILE)
    except OSError:
        raise
    except Exception as error:  # an operation that ONNX lacks, above all
        raise ArtifactError(f"ONNX cannot express the model: {first_line(error)}") from error
    finally:
        logger.setLevel(level)


def _run_onnx(path: Path, inputs: list[Tensor]) -> list[list[Tensor]]:
    """Return the outputs that onnxruntime computes on the CPU."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (entry,) = session.get_inputs()
        return [
            [torch.from_numpy(y) for y in session.run(None, {entry.name: x.numpy()})]
            for x in inputs
        ]
    except Exception as error:  # onnxruntime's errors have no common base
        raise ArtifactError(f"onnxruntime cannot run the export: {first_line(error)}") from error


def _flat(outputs: object) -> list[Tensor]:
    """Return the tensors in a model's outputs, in order."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _difference(expected: list[list[Tensor]], got: list[list[Tensor]]) -> float:
    """Return the largest difference, relative to the largest entry of the same output."""
    worst = 0.0
    for wanted, found in zip(expected, got, strict=True):
        for a, b in zip(wanted, found, strict=True):
            if a.shape != b.shape:
                return float("inf")
            gap = (a.double() - b.double()).abs().max() / a.double().abs().max().clamp(min=1e-12)
            worst = max(worst, gap.item()) if gap == gap else float("inf")
    return worst
