"""Publishing an artifact on the Hugging Face hub."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError, safe_open

from spamprune.artifact.format import CARD, CONFIG, WEIGHTS, read_config, regular_file
from spamprune.artifact.hub import checked_name, first_line
from spamprune.artifact.load import load
from spamprune.errors import ArtifactError


def push(
    folder: str | Path,
    repository: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Publish an artifact on the Hugging Face hub; the repository is made where it is missing.

    Only the artifact's own files go: the configuration, the weights and the model card.

    Args:
        folder: The artifact.
        repository: ``"owner/name"``.
        private: Make a new repository private.
        token: A token that may write there; by default the one of ``hf auth login``.
        revision: The branch, made where it is missing; by default the main one.

    Returns:
        The address of the commit.

    Raises:
        ArtifactError: The artifact would not load, or the hub does not take it.
    """
    from huggingface_hub import HfApi

    repository = checked_name(repository)
    names = _checked_files(Path(folder))
    api = HfApi(token=token, library_name="spamprune", library_version=version("spamprune"))
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=names,
            revision=revision,
            commit_message=f"Upload with spamprune {version('spamprune')}",
        )
    except Exception as error:  # of the hub's client, or of whichever HTTP library it uses
        raise ArtifactError(
            f"{folder} cannot be pushed to {repository!r} ({first_line(error)}): check the name, "
            "the network and `hf auth login`"
        ) from error
    return str(commit.commit_url)


def _checked_files(folder: Path) -> list[str]:
    """Return the names of the artifact's files, once they are known to load."""
    if read_config(folder).architecture is not None:
        load(folder)
    else:  # a class of the maker's, which only they can build
        weights = regular_file(folder, WEIGHTS)
        try:
            with safe_open(weights, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{weights} is damaged ({error}): save the model anew") from error
    names = [CONFIG, WEIGHTS]
    if (folder / CARD).exists() or (folder / CARD).is_symlink():
        regular_file(folder, CARD)
        names.append(CARD)
    return names
