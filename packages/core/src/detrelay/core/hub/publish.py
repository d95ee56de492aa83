"""Publish a model folder on the Hub: complete, in one commit, and tested."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    GitRefs,
    HfApi,
    get_session,
    get_token,
    is_offline_mode,
)
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported lazily
    build_hf_headers,
    hf_raise_for_status,
    validate_repo_id,
)

from detrelay.core.engine import run_folder
from detrelay.core.hub.calls import (
    CALL_ERRORS,
    TRIES,
    HubError,
    bounded_waits,
    explain,
    is_transient,
    patiently,
    status,
    wait,
)
from detrelay.core.hub.fetch import fetch_verified
from detrelay.core.hub.folder import CARD, CheckedFolder, complete_folder, load_folder, run_once
from detrelay.core.hub.shim import SHIM

_Answer = TypeVar("_Answer")

# what a repository without a model may contain, and the Hub's own files
_HUB_FILE = ".gitattributes"
_NO_CONTENT = frozenset({_HUB_FILE, ".gitignore", "LICENSE", "README.md"})
# what identifies a model of this project
_MARKS = frozenset({run_folder.RECORD, SHIM})
# names to which the Hub gives another meaning
_REFERENCES = frozenset({"main", "HEAD"})
# boxes and scores of equal weights may differ by the order of additions
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Destination:
    """Where a model goes, as the Hub has confirmed it.

    Attributes:
        api: the client, with the token.
        repo_id: "user/model".
        private: whether only its owners see it.
        head: newest commit; None if there is no repository yet.
        tags: commit of each tag.
    """

    api: HfApi
    repo_id: str
    private: bool
    head: str | None
    tags: dict[str, str]

    def ask(self, call: Callable[[], _Answer], what: str) -> _Answer:
        """Make a repeatable call; its error names the destination and the request."""
        try:
            return patiently(call)
        except CALL_ERRORS as error:
            raise HubError(f"{self.repo_id}: {what}: {explain(error, self.api)}") from error


@dataclass(frozen=True)
class Published:
    """A model on the Hub that was downloaded again and verified.

    Attributes:
        repo_id: "user/model".
        url: its page.
        commit: the commit that holds it.
        tag: name of that commit.
        private: whether only its owners see it.
    """

    repo_id: str
    url: str
    commit: str
    tag: str
    private: bool


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    tag: str | None = None,
    license: str | None = None,
    endpoint: str | None = None,
    commit_message: str = "Publish a detector",
) -> Published:
    """Publish a saved model under a tag, or nothing.

    The folder is copied, completed (card, shim) and run; uploaded in one commit that also deletes
    files of an older model; compared with the Hub by checksums; tagged; and downloaded by that tag
    into an empty cache, where weights and boxes must be the same. Publishing the same folder again
    is harmless: what is already there is kept.

    Args:
        folder: as training writes it, such as `best` of a run.
        repo_id: "user/model", or "model" for the owner of the token.
        private: visibility; an existing repository must already have it.
        token: write token; the stored one or HF_TOKEN if None.
        tag: name of this version; the next free one of v1, v2, ... if None.
        license: identifier of the weights' licence, for a card that is written here; None for
            `default_license`.
        endpoint: address of the Hub; HF_ENDPOINT or huggingface.co if None.
        commit_message: first line of the commit.

    Raises:
        HubError: in one line: what is wrong and whether anything was published.
    """
    check_names(repo_id, tag, license)
    destination = check_destination(
        repo_id, private=private, token=token, tag=tag, endpoint=endpoint
    )
    with tempfile.TemporaryDirectory() as temporary:
        checked = complete_folder(
            Path(folder), Path(temporary) / "model", destination.repo_id, license
        )
        _check_metadata(destination, checked.folder)
        destination = _create(destination)
        commit = _commit(destination, checked.folder, tag, commit_message)
        name = _tag(destination, commit, tag)
        try:
            _try_out(destination, name, checked, Path(temporary) / "cache")
        except HubError as error:
            raise HubError(
                f"{error}; the files on the Hub have the right checksums (commit {commit}, tag "
                f"{name}), the download is at fault: try the same command again"
            ) from error
    url = f"{destination.api.endpoint}/{destination.repo_id}"
    return Published(destination.repo_id, url, commit, name, destination.private)


def check_destination(
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    tag: str | None = None,
    endpoint: str | None = None,
) -> Destination:
    """Check beforehand whether a model can be published; changes nothing.

    Args:
        repo_id: "user/model", or "model" for the owner of the token.
        private: see `publish`.
        token: see `publish`.
        tag: see `publish`.
        endpoint: see `publish`.

    Raises:
        HubError: no network, no token, no write permission, unknown owner, a name taken by
            something else, another visibility, or an existing tag.
    """
    if is_offline_mode():
        raise HubError(f"{repo_id}: cannot be published while HF_HUB_OFFLINE is set; unset it")
    check_names(repo_id, tag)
    token = token or get_token()
    if not token:
        raise HubError(
            f"{repo_id}: no token to publish with; log in by `hf auth login`, or set HF_TOKEN"
        )
    api = HfApi(endpoint=endpoint, token=token, library_name="detrelay")
    owner = _check_owner(api, repo_id)
    full = repo_id if "/" in repo_id else f"{owner}/{repo_id}"
    new = Destination(api, full, private, None, {})
    try:
        info = patiently(lambda: api.model_info(full))
    except RepositoryNotFoundError:
        return new
    except CALL_ERRORS as error:
        raise HubError(f"{full}: {explain(error, api)}") from error
    existing = replace(new, head=info.sha, tags=_tags(new))
    _check_existing(existing, bool(info.private), tag)
    return existing


def check_names(repo_id: str, tag: str | None, license: str | None = None) -> None:
    """Reject names that no Hub accepts, without asking one.

    Raises:
        HubError: name, tag or licence is malformed.
    """
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+_-]*", license):
        raise HubError(
            f"licence {license!r}: expected its identifier on the Hub, such as apache-2.0"
        )
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(
            f"{repo_id!r}: expected a name on the Hub, USER/MODEL, of letters, digits, '-', '_' "
            f"and '.'"
        ) from error
    if tag is None:
        return
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", tag, re.ASCII):
        raise HubError(f"tag {tag!r}: expected letters, digits, '.', '_', '+' and '-'")
    if tag in _REFERENCES or re.fullmatch(r"[0-9a-fA-F]{7,40}", tag):
        raise HubError(
            f"tag {tag!r}: would hide the branch or the commit of that name; choose another, such "
            f"as v1"
        )


def _check_owner(api: HfApi, repo_id: str) -> str:
    """The owner of the token, if the token may write to the destination."""
    try:
        who = patiently(api.whoami, reachable=False)
    except CALL_ERRORS as error:
        if status(error) == 401:
            raise HubError(
                f"{repo_id}: {api.endpoint} does not know the token; log in by `hf auth login`, or "
                f"set HF_TOKEN"
            ) from error
        raise HubError(f"{repo_id}: {explain(error, api)}") from error
    user = str(who["name"])
    access = (who.get("auth") or {}).get("accessToken") or {}
    if access.get("role") == "read":
        raise HubError(
            f"{repo_id}: the token {access.get('displayName', '')!r} of {user} may only read; make "
            f"one that may write ({api.endpoint}/settings/tokens)"
        )
    orgs = [str(org["name"]) for org in who.get("orgs") or () if org.get("roleInOrg") != "read"]
    owner = repo_id.partition("/")[0] if "/" in repo_id else user
    if owner not in (user, *orgs):
        raise HubError(
            f"{repo_id}: {user} has no right to write under {owner}; may write under "
            f"{', '.join([user, *orgs])}"
        )
    return user


def _check_existing(destination: Destination, is_private: bool, tag: str | None) -> None:
    api, repo_id = destination.api, destination.repo_id
    try:
        patiently(lambda: api.auth_check(repo_id, write=True))
    except CALL_ERRORS as error:
        if status(error) in (401, 403, 404):
            raise HubError(
                f"{repo_id}: exists, and the token has no right to write to it"
            ) from error
        raise HubError(f"{repo_id}: {explain(error, api)}") from error
    if is_private != destination.private:
        is_now, asked = ("private", "public") if is_private else ("public", "private")
        raise HubError(
            f"{repo_id}: exists and is {is_now}, but {asked} was asked for; change one of the two"
        )
    files = destination.ask(
        lambda: set(api.list_repo_files(repo_id, revision=destination.head)), "list of its files"
    )
    content = sorted(files - _NO_CONTENT)
    if content and _MARKS.isdisjoint(files):
        shown = ", ".join(content[:3])
        raise HubError(
            f"{repo_id}: the name is taken by something else ({len(content)} files, such as {shown}"
            f"; no {' or '.join(sorted(_MARKS))}); choose another name"
        )
    branches = {branch.name for branch in _references(destination).branches}
    if tag in branches:
        raise HubError(f"{repo_id}: has a branch {tag}, which a tag would hide; choose another")
    if tag is not None and destination.tags.get(tag, destination.head) != destination.head:
        raise HubError(f"{repo_id}: has a tag {tag} already, of an older commit; choose another")


def _tags(destination: Destination) -> dict[str, str]:
    return {tag.name: tag.target_commit for tag in _references(destination).tags}


def _references(destination: Destination) -> GitRefs:
    api, repo_id = destination.api, destination.repo_id
    return destination.ask(lambda: api.list_repo_refs(repo_id), "list of its branches and tags")


def _check_metadata(destination: Destination, folder: Path) -> None:
    """Let the Hub check the card before anything is created; it knows every licence."""
    api = destination.api
    content = {
        "content": (folder / CARD).read_text(encoding="utf-8"),
        "repoType": "model",
    }

    def ask() -> None:
        answer = get_session().post(
            f"{api.endpoint}/api/validate-yaml",
            json=content,
            headers=build_hf_headers(token=api.token, library_name="detrelay"),
        )
        hf_raise_for_status(answer)

    try:
        patiently(ask)
    except CALL_ERRORS as error:
        raise HubError(_refused(destination, error)) from error


def _create(destination: Destination) -> Destination:
    """Create the repository if there is none, and check its visibility."""
    api, repo_id, private = destination.api, destination.repo_id, destination.private
    if destination.head is None:
        try:
            # A repeated call finds what was created if the answer was lost
            patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        except CALL_ERRORS as error:
            if status(error) in (401, 403):
                raise HubError(
                    f"{repo_id}: the token has no right to make it; nothing was published"
                ) from error
            raise HubError(
                f"{repo_id}: cannot be made: {explain(error, api)}; nothing was published"
            ) from error
    info = destination.ask(lambda: api.model_info(repo_id), "look at the repository")
    if bool(info.private) != private:
        raise HubError(
            f"{repo_id}: should be {'private' if private else 'public'} but is not; nothing was "
            f"published"
        )
    if destination.head is not None and info.sha != destination.head:
        raise HubError(
            f"{repo_id}: somebody else has pushed to it in the meantime; nothing was published"
        )
    return replace(destination, head=info.sha)


def _commit(destination: Destination, folder: Path, tag: str | None, message: str) -> str:
    """Make the repository hold exactly the files of a folder; returns the commit that does."""
    api, repo_id, parent = destination.api, destination.repo_id, destination.head
    changed, stale = _difference(destination, parent, folder)
    if not changed and not stale:
        assert parent is not None  # because it holds files
        return parent
    if tag in destination.tags:
        raise HubError(
            f"{repo_id}: the tag {tag} names other files; choose another tag; nothing was published"
        )
    for attempt in range(TRIES):
        # An operation object must not be reused once sent
        additions = [CommitOperationAdd(path, folder / path) for path in changed]
        deletions = [CommitOperationDelete(path) for path in stale]
        try:
            with bounded_waits():
                sent = api.create_commit(
                    repo_id,
                    [*additions, *deletions],
                    commit_message=message,
                    parent_commit=parent,
                )
        except (*CALL_ERRORS, ValueError) as error:
            commit = _after_failure(destination, folder, error)
            if commit is not None:
                return commit
            if attempt == TRIES - 1:
                raise HubError(_refused(destination, error)) from error
            wait(error, attempt)
        else:
            _require_same(destination, sent.oid, folder)
            return sent.oid
    raise AssertionError("the last try returns or raises")


def _after_failure(destination: Destination, folder: Path, error: Exception) -> str | None:
    """The outcome of a commit without an answer: its id if it exists, None to try again."""
    outdated = status(error) == 412
    if not outdated and not is_transient(error):
        raise HubError(_refused(destination, error)) from error
    api, repo_id = destination.api, destination.repo_id
    what = "a commit was sent, the same command again finds out whether it arrived"
    head = destination.ask(lambda: api.model_info(repo_id).sha, what)
    if head != destination.head and not any(_difference(destination, head, folder)):
        return head
    if head != destination.head or outdated:
        raise HubError(
            f"{repo_id}: somebody else has pushed to it in the meantime (now at {head}); nothing "
            f"of this model was published; the same command again publishes on top of that"
        ) from error
    return None


def _refused(destination: Destination, error: Exception) -> str:
    return (
        f"{destination.repo_id}: not published, the repository is as it was before: "
        f"{explain(error, destination.api)}"
    )


def _difference(
    destination: Destination, revision: str | None, folder: Path
) -> tuple[list[str], list[str]]:
    """Files of a folder that a revision lacks or has differently, and files that only it has."""
    api, repo_id = destination.api, destination.repo_id
    found = destination.ask(
        lambda: api.verify_repo_checksums(repo_id, revision=revision, local_dir=folder),
        "checksums of its files",
    )
    changed = [*found.extra_paths, *(entry["path"] for entry in found.mismatches)]
    stale = [path for path in found.missing_paths if path != _HUB_FILE]
    return changed, stale


def _require_same(destination: Destination, commit: str, folder: Path) -> None:
    changed, stale = _difference(destination, commit, folder)
    if changed or stale:
        raise HubError(
            f"{destination.repo_id}: commit {commit} does not hold the files that were sent: "
            f"{', '.join([*changed, *stale])} differ; it is not tagged, do not use it"
        )


def _tag(destination: Destination, commit: str, tag: str | None) -> str:
    """Tag a commit; returns the tag."""
    api, repo_id = destination.api, destination.repo_id
    tags = _tags(destination)
    if tag is None:
        numbers = {int(name[1:]): name for name in tags if re.fullmatch(r"v\d+", name)}
        mine = [name for name in numbers.values() if tags[name] == commit]
        tag = mine[-1] if mine else f"v{max(numbers, default=0) + 1}"
    if tags.get(tag) != commit:
        what = f"commit {commit} is published, but the tag {tag} cannot be made"
        # A repeated call finds the tag that was created if the answer was lost
        destination.ask(
            lambda: api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True), what
        )
        if (now := _tags(destination).get(tag)) != commit:
            raise HubError(f"{repo_id}: {what}: it names commit {now}")
    return tag


def _try_out(destination: Destination, tag: str, checked: CheckedFolder, cache: Path) -> None:
    """Download by tag into an empty cache and compare."""
    repo_id = destination.repo_id
    fetch_verified(destination.api, repo_id, tag, cache)
    name = f"{repo_id} at {tag}"
    model, processor = load_folder(repo_id, name, revision=tag, cache_dir=cache)
    weights = model.state_dict()
    if weights.keys() != checked.weights.keys():
        raise HubError(f"{name}: has other weights than the folder")
    for key, value in checked.weights.items():
        if not torch.equal(value, weights[key]):
            raise HubError(f"{name}: its weight {key} is not that of the folder")
    answers = zip(run_once(model, processor, name), (checked.logits, checked.boxes), strict=True)
    if not all(torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE) for a, b in answers):
        raise HubError(f"{name}: finds other boxes than the folder")
