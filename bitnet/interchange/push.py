"""Upload of an exported folder with ``huggingface_hub``: transformers cannot push a loaded packed model itself."""

from pathlib import Path

from bitnet.errors import UserError


def push(folder: Path, name: str, *, private: bool = False) -> str:
    """Create the repository ``user/name`` if need be, upload ``folder``, return the address of the commit.

    Token and endpoint are those of huggingface_hub (``HF_TOKEN``, ``HF_ENDPOINT``). Raises ``UserError`` on failure;
    the folder stays where it is.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise UserError("--push needs huggingface_hub (pip install 'bitnet-lightning[hf]').") from error
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export of a low-bit model")
    except Exception as error:  # names, permissions, and whatever the library's transport raises without a network
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"--push {name}: the upload failed ({reason[:200]}); {folder} is written and checked."
        ) from error
    return str(commit.commit_url)
