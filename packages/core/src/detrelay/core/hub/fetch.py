"""Download models from the Hub and verify its checksums."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, is_offline_mode, snapshot_download

from detrelay.core.hub.calls import HubError, ask

_REPOSITORY = re.compile(r"(?P<repo_id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./+-]+))?")


def model_folder(name: str | Path) -> Path:
    """The folder of a model: the given one, or that in the cache for a name on the Hub.

    Args:
        name: a folder; or "user/model", "user/model@revision". A folder of that name takes
            precedence.

    Raises:
        HubError: the model cannot be downloaded or is damaged.
    """
    found = _REPOSITORY.fullmatch(str(name))
    if found is None or Path(name).exists():
        return Path(name)
    api = HfApi(library_name="detrelay")
    try:
        return fetch_verified(api, found["repo_id"], found["revision"], reachable=False)
    except HubError as error:
        raise HubError(f"no folder {name}; as a model on the Hub: {error}") from error


def fetch_verified(
    api: HfApi,
    repo_id: str,
    revision: str | None,
    cache: Path | None = None,
    *,
    reachable: bool = True,
) -> Path:
    """Download a model and compare every file with the Hub's checksums.

    The client itself compares sizes only, so a damaged file would load silently.

    Args:
        api: the client, with the token.
        repo_id: "user/model".
        revision: tag, branch or commit; the main branch if None.
        cache: where to keep it; the default cache if None.
        reachable: whether the Hub is known to answer; if not, a failed connection is a final error.

    Returns:
        The folder in the cache.

    Raises:
        HubError: it cannot be downloaded, or a file is damaged; names the file.
    """
    what = f"{repo_id}: cannot be downloaded"

    def download() -> str:
        return snapshot_download(
            repo_id, revision=revision, cache_dir=cache, token=api.token, endpoint=api.endpoint
        )

    folder = Path(ask(api, what, download, reachable=reachable))
    if is_offline_mode():  # it was verified when it was downloaded
        return folder
    found = ask(
        api,
        what,
        lambda: api.verify_repo_checksums(repo_id, revision=folder.name, local_dir=folder),
    )
    for entry in found.mismatches:
        file = (folder / entry["path"]).resolve()
        raise HubError(
            f"{repo_id}: {entry['path']} was damaged in transit ({entry['algorithm']} "
            f"{entry['actual'][:12]}... instead of {entry['expected'][:12]}...); delete {file} and "
            f"download it again"
        )
    if found.missing_paths:
        raise HubError(f"{repo_id}: {', '.join(found.missing_paths)} did not arrive")
    return folder
