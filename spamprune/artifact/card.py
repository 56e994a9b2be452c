"""The model card: what a person wants to know of an artifact, as the hub shows it."""

from __future__ import annotations

from typing import Any

from torch import nn

from spamprune.artifact.format import Config, Preprocessing, slots

_BUILT, _SAVED = "as built", "saved"  # columns of the table of figures


def card(config: Config, model: nn.Module, built: nn.Module | None) -> str:
    """Return the model card in Markdown, headed by the hub's metadata in YAML.

    Args:
        config: The artifact's configuration.
        model: The model that is saved.
        built: The model as built, where it is known, to say what has changed.
    """
    sections = [
        f"---\n{_metadata(config)}\n---",
        _summary(config, model, built),
        _use(config),
        _inputs(config.preprocessing),
        _figures(config, model, built),
        _pruning(config, model, built),
        _terms(config),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _metadata(config: Config) -> str:
    from huggingface_hub import ModelCardData

    task = None  # unknown for a class of the maker's, and where inputs may be no images
    known = config.architecture is not None and config.preprocessing is not None
    if known and config.num_classes is not None:
        task = "image-classification" if config.num_classes else "image-feature-extraction"
    data = ModelCardData(
        library_name=config.library_name,
        license=config.licence,
        base_model=config.base_model,
        pipeline_tag=task,
        tags=["spamprune", "pruning", *(["timm"] if config.architecture else [])],
    )
    return data.to_yaml().strip()


def _name(config: Config) -> str:
    if config.architecture is not None:
        return config.architecture.name
    return config.class_name.rpartition(".")[2]


def _summary(config: Config, model: nn.Module, built: nn.Module | None) -> str:
    name = _name(config)
    text = f"# {name}\n\nA `{name}` network"
    if config.num_classes:
        text += f" for {config.num_classes} classes"
    if built is not None:
        before = _entries(built)
        text += f" with {_entries(model) / max(before, 1):.1%} of the {before:,} parameters it "
        text += "was built with"
    return f"{text}, saved with spamprune {config.versions['spamprune']}."


def _use(config: Config) -> str:
    call = 'sp.load("PATH")  # a copy of this folder, or "hf-hub:OWNER/NAME"'
    if config.architecture is None:
        call = (
            f"# build() returns a new {_name(config)}, unpruned; the code of that class is not here"
            '\nmodel = sp.load("PATH", factory=build)  # or "hf-hub:OWNER/NAME"'
        )
    else:
        call = f"model = {call}"
    return f"## Use\n\n```python\nimport spamprune as sp\n\n{call}\n```"


def _inputs(settings: Preprocessing | None) -> str:
    if settings is None:
        return "## Inputs\n\nThe preprocessing of the inputs was not recorded."
    channels, height, width = settings.input_size
    rows = [
        f"- {height} × {width} pixels, {channels} channels",
        f"- interpolation {settings.interpolation}, {settings.crop_mode} crop of "
        f"{settings.crop_pct:g} of the image",
        f"- mean {settings.mean} and standard deviation {settings.std}, for values from 0 to 1",
    ]
    code = (
        "```python\nfrom timm.data import create_transform, resolve_model_data_config\n\n"
        "transform = create_transform(**resolve_model_data_config(model))\n```"
    )
    caveat = "Unless its maker gave others, these are timm's settings for a network of that name."
    return "\n".join(["## Inputs", "", caveat, "", *rows, "", code])


def _figures(config: Config, model: nn.Module, built: nn.Module | None) -> str:
    """Return a table with a row for each metric and a column for each stage."""
    sizes: dict[str, float] = {_BUILT: _entries(built)} if built is not None else {}
    table: dict[str, dict[str, float]] = {"parameters": {**sizes, _SAVED: _entries(model)}}
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    if zeros > 0.01 * _entries(model):
        table["parameters that are not zero"] = {_SAVED: _entries(model) - zeros}
    for name, value in config.metrics.items():
        table[name] = value if isinstance(value, dict) else {_SAVED: value}
    stages = list(dict.fromkeys(stage for values in table.values() for stage in values))
    stages.sort(key=lambda stage: (stage == _SAVED) - (stage == _BUILT))  # last and first
    rows = [["", *stages], ["---", *["---:"] * len(stages)]]
    for name, values in table.items():
        rows.append([name, *(_number(values.get(stage)) for stage in stages)])
    return "## Size and quality\n\n" + "\n".join(map(_row, rows))


def _pruning(config: Config, model: nn.Module, built: nn.Module | None) -> str:
    said = [
        f"- {name}: {value}"
        for name, value in config.extra.items()
        if isinstance(value, (str, int, float))
    ]
    parts = ["\n".join(said)] if said else []
    if built is not None and config.shapes:
        before, after = slots(built), slots(model)
        rows = [["tensor", _BUILT, _SAVED], ["---"] * 3]
        rows += [
            [f"`{name}`", _shape(before[name].shape), _shape(after[name].shape)]
            for name in config.shapes
            if after[name].is_parameter
        ]
        table = "\n".join(map(_row, rows))
        parts.append(
            f"<details><summary>{len(rows) - 2} parameter tensors have another shape"
            f"</summary>\n\n{table}\n\n</details>"
        )
    return "## How it was pruned\n\n" + "\n\n".join(parts) if parts else ""


def _terms(config: Config) -> str:
    licence = config.licence or "not stated, so ask whoever published it before you use it"
    text = f"## Origin and licence\n\n- licence: {licence}"
    return f"{text}\n- pruned from: {config.base_model}" if config.base_model else text


def _entries(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else " × ".join(map(str, shape)) or "one number"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _row(cells: list[Any]) -> str:
    return "| " + " | ".join(str(cell).replace("|", r"\|") for cell in cells) + " |"
