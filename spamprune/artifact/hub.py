"""Finding an artifact on the Hugging Face hub."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from spamprune.errors import ArtifactError

PREFIX = "hf-hub:"


def is_address(where: str | Path) -> bool:
    """Tell whether ``where`` is an address such as ``"hf-hub:owner/name"`` and no folder."""
    return str(where).startswith(PREFIX)


class Snapshot:
    """An artifact on the hub, all of whose files come from the same commit.

    They are links within the hub's own cache, made by its client: files of a repository are never
    links. So ``regular_file``, which guards folders from elsewhere, has no say here.

    Args:
        address: ``"hf-hub:owner/name"`` or ``"hf-hub:owner/name@revision"``.

    Raises:
        ArtifactError: The address is of another form.
    """

    def __init__(self, address: str):
        self.address = address
        repository, mark, revision = address.removeprefix(PREFIX).partition("@")
        if mark and not revision:
            raise ArtifactError(f"{address!r} ends in '@': a branch, tag or commit follows it")
        self.repository = checked_name(repository)
        self.revision = revision or None

    def file(self, name: str) -> Path:
        """Return the path of one of the files, downloaded unless the cache has it.

        Raises:
            ArtifactError: It cannot be had.
        """
        from huggingface_hub import hf_hub_download

        try:
            path = Path(
                hf_hub_download(
                    self.repository,
                    name,
                    revision=self.revision,
                    library_name="spamprune",
                    library_version=version("spamprune"),
                )
            )
        except Exception as error:  # of the hub's client, or of whichever HTTP library it uses
            raise ArtifactError(
                f"{name} of {self.address!r} cannot be downloaded ({first_line(error)}): check "
                "the name, the network and, for a private repository, `hf auth login`"
            ) from error
        self.revision = path.parent.name  # the commit, for the files that follow
        return path


def checked_name(repository: str) -> str:
    """Return ``repository`` if it reads ``owner/name``.

    Raises:
        ArtifactError: It does not.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ArtifactError(f"{repository!r} is no repository: {first_line(error)}") from error
    if repository.count("/") != 1:
        raise ArtifactError(f"{repository!r} is no repository: it reads owner/name")
    return repository


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
