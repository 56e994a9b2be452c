"""What is learned, and by which network."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from spamprune.recipe.schema.section import Section, known


class Data(Section):
    """Which data set, from where, and how it is split."""

    name: Annotated[str, known("data set")] = Field(
        description="Name of the data set: `spamprune data` lists them."
    )
    root: str | None = Field(
        None,
        description="Folder with the raw files in their standard names, gzipped or not; of an "
        "image_folder the one that holds train and test or val. By default the places that the "
        "data set knows, else a download.",
    )
    validation: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Fraction of the training data held out for choices; 0 trains on all. An "
        "image_folder with both test and val has val for that, unless this is 0.",
    )
    augment: Literal["none", "flip", "flip_crop"] = Field(
        "none",
        description="flip: random horizontal flips; flip_crop: crops too, after padding by 4 "
        "pixels, and of an image_folder of random area and aspect, resized.",
    )
    image_size: int | None = Field(
        None,
        ge=1,
        description="Side that images of an image_folder are resized to, in pixels: 224 by "
        "default, or what model.weights expect.",
    )


class Model(Section):
    """Which network: any name that timm's registry knows, ours included."""

    name: Annotated[str, known("model")] = Field(description="Name of the architecture.")
    kwargs: dict[str, JsonValue] = Field(
        default_factory=dict, description="Further arguments of `timm.create_model`."
    )
    weights: str | None = Field(
        None,
        description="Trained weights to start with: `pretrained` for those that timm publishes, a "
        "safetensors file, an artifact's folder or `hf-hub:owner/name`; fresh ones by default. A "
        "classifier of another number of classes starts fresh.",
    )
