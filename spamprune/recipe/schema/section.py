"""What all parts of a recipe have in common: how they are checked, and how faults are named."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from spamprune.errors import SpampruneError


def known(kind: str, *besides: str) -> AfterValidator:
    """Look a name up with the function that recipe.load passes in the context, if any.

    Names in ``besides`` are known too.
    """

    def check(name: str, info: ValidationInfo) -> str:
        if info.context and name not in besides:
            try:
                info.context[kind](name)
            except SpampruneError as e:
                raise ValueError(str(e)) from None
        return name

    return AfterValidator(check)


def fault(message: str, *path: str | int) -> PydanticCustomError:
    """Return the error of a rule between fields that blames the field at ``path``."""
    return PydanticCustomError("rule", "{message}", {"message": message, "path": path})


def idle(section: BaseModel, reason: str, *names: str) -> None:
    """Refuse settings that have no effect, unless they have their default."""
    for name in names:
        default = type(section).model_fields[name].get_default(call_default_factory=True)
        if getattr(section, name) != default:
            number = f", or at {default}" if isinstance(default, int | float) else ""
            raise fault(f"{reason}: leave it out{number}", name)


def distinct(values: list[Any]) -> list[Any]:
    """Refuse repeated entries, which would count as further measurements."""
    for i, value in enumerate(values):
        if value in values[:i]:
            raise fault("repeats an earlier entry: leave it out", i)
    return values


T = TypeVar("T")
Distinct = Annotated[list[T], Field(min_length=1), AfterValidator(distinct)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """A part of a recipe; unknown keys are errors and values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
