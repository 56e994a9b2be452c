"""Finding a network's classifier, which structured pruning leaves whole."""

from __future__ import annotations

from torch import nn

from spamprune.errors import ModelError


def classifier_name(model: nn.Module) -> str:
    """Return the name of the layer that gives the class scores.

    That is what timm's ``get_classifier`` says where a model has it, else the last linear layer.

    Raises:
        ModelError: There is neither.
    """
    names = {module: name for name, module in model.named_modules()}
    get_classifier = getattr(model, "get_classifier", None)
    if get_classifier is not None:
        classifier = get_classifier()
        if isinstance(classifier, nn.Module) and classifier in names:
            return names[classifier]
    linear = [name for module, name in names.items() if isinstance(module, nn.Linear)]
    if not linear:
        raise ModelError(f"{type(model).__name__} has no linear layer that could be its classifier")
    return linear[-1]
