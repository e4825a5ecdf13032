"""Model directories on their way to the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError  # of the HTTP client it uses, which changes with its version

from ..errors import CheckpointError
from ..utils.reading import first_line


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
) -> str:
    """Upload a model directory in one commit; the repository is made where it is not there.

    Args:
        folder: the directory; all of it is uploaded.
        repo_id: such as `me/my-lenvm`.
        private: of a repository that is made now; None leaves it to the hub.
        token: an access token; the one of `hf auth login` or `$HF_TOKEN` where None.
        revision: branch to commit to; made where it is not there.
        create_pr: propose the commit instead of making it.
        commit_message: first line of the commit.
        commit_description: the rest.

    Returns:
        Address of the commit.

    Raises:
        CheckpointError: the hub cannot be reached or refuses.
    """
    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or "Upload length value model",
            commit_description=commit_description,
        )
    except (OSError, ValueError, HTTPError) as error:  # refused, no such name, no network
        raise CheckpointError(
            f"{folder} could not be pushed to {repo_id!r}: {first_line(error)} Log in with `hf auth login` (or set "
            "HF_TOKEN) as somebody who may write there, and check the name, which is that of a user or organisation, "
            "a slash, and that of the model."
        ) from error
    return str(commit.commit_url)
