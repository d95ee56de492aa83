"""Publish a model folder on the Hub: complete, in one commit, and tested."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_session,
    get_token,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported lazily
    hf_raise_for_status,
    validate_repo_id,
)

from detrelay.core.detector.loading import load_model, load_processor
from detrelay.core.engine import run_folder
from detrelay.core.errors import one_line
from detrelay.core.hub.calls import HubError, ask
from detrelay.core.hub.fetch import fetch_verified
from detrelay.core.hub.folder import CARD, CheckedFolder, complete_folder, run_once
from detrelay.core.hub.shim import SHIM

_Answer = TypeVar("_Answer")

# what a repository without a model may contain, and the Hub's own files
_HUB_FILE = ".gitattributes"
_NO_CONTENT = frozenset({_HUB_FILE, ".gitignore", "LICENSE", "README.md"})
# what identifies a model of this project
_MARKS = frozenset({run_folder.RECORD, SHIM})
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
    head: str | None = None
    tags: dict[str, str] = field(default_factory=dict)

    def ask(self, what: str, call: Callable[[], _Answer]) -> _Answer:
        """Make a repeatable call; its error names the destination and the request."""
        return ask(self.api, f"{self.repo_id}: {what}", call)


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
        commit_message: first line of the commit.

    Raises:
        HubError: in one line: what is wrong and whether anything was published.
    """
    check_names(repo_id, tag, license)
    options: dict[str, Any] = {"private": private, "token": token, "tag": tag}
    destination = check_destination(repo_id, **options)
    api, repo_id = destination.api, destination.repo_id
    with tempfile.TemporaryDirectory() as temporary:
        checked = complete_folder(Path(folder), Path(temporary) / "model", repo_id, license)
        _check_card(destination, checked.folder / CARD)
        if destination.head is None:
            destination.ask(
                "cannot be created, nothing was published",
                lambda: api.create_repo(repo_id, private=private, exist_ok=True),
            )
            destination = check_destination(repo_id, **options)
        commit = destination.ask(
            "not published; the repository has its old content, or all of the new if an answer was "
            "lost, and the same command resumes from there",
            lambda: _commit(destination, checked.folder, tag, commit_message),
        )
        name = destination.ask(
            f"commit {commit} is published, but its tag cannot be made",
            lambda: _tag(destination, commit, tag),
        )
        try:
            _try_out(destination, name, checked, Path(temporary) / "cache")
        except ValueError as error:
            raise HubError(
                f"{error}; the files on the Hub have the right checksums (commit {commit}, tag "
                f"{name}), the download is at fault: try the same command again"
            ) from error
    return Published(repo_id, f"{api.endpoint}/{repo_id}", commit, name, private)


def check_destination(
    repo_id: str, *, private: bool = False, token: str | None = None, tag: str | None = None
) -> Destination:
    """Check beforehand whether a model can be published; changes nothing.

    Args:
        repo_id: "user/model", or "model" for the owner of the token.
        private: see `publish`.
        token: see `publish`.
        tag: see `publish`.

    Raises:
        HubError: no network, no token, no write permission, unknown owner, a name taken by
            something else, another visibility, or an existing tag.
    """
    check_names(repo_id, tag)
    api = HfApi(token=token or get_token(), library_name="detrelay")
    owner = _check_owner(api, repo_id)
    new = Destination(api, repo_id if "/" in repo_id else f"{owner}/{repo_id}", private)
    repo_id = new.repo_id
    if not new.ask("cannot be looked up", lambda: api.repo_exists(repo_id)):
        return new
    new.ask("cannot be written to", lambda: api.auth_check(repo_id, write=True))
    info = new.ask("cannot be looked up", lambda: api.model_info(repo_id))
    if bool(info.private) != private:
        is_now, asked = ("public", "private") if private else ("private", "public")
        raise HubError(
            f"{repo_id}: exists and is {is_now}, but {asked} was asked for; change one of the two"
        )
    files = {file.rfilename for file in info.siblings or ()}
    content = sorted(files - _NO_CONTENT)
    if content and _MARKS.isdisjoint(files):
        raise HubError(
            f"{repo_id}: the name is taken by something else ({len(content)} files, such as "
            f"{', '.join(content[:3])}; no {' or '.join(sorted(_MARKS))}); choose another name"
        )
    refs = new.ask("list of its branches and tags", lambda: api.list_repo_refs(repo_id))
    tags = {found.name: found.target_commit for found in refs.tags}
    if tag in {branch.name for branch in refs.branches}:
        raise HubError(f"{repo_id}: has a branch {tag}, which a tag would hide; choose another")
    if tag is not None and tags.get(tag, info.sha) != info.sha:
        raise HubError(f"{repo_id}: has a tag {tag} already, of an older commit; choose another")
    return replace(new, head=info.sha, tags=tags)


def check_names(repo_id: str, tag: str | None, license: str | None = None) -> None:
    """Reject names that no Hub accepts, without asking one.

    Raises:
        ValueError: name, tag or licence is malformed.
    """
    validate_repo_id(repo_id)
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+_-]*", license):
        raise HubError(
            f"licence {license!r}: expected its identifier on the Hub, such as apache-2.0"
        )
    if tag is None:
        return
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", tag, re.ASCII):
        raise HubError(f"tag {tag!r}: expected letters, digits, '.', '_', '+' and '-'")
    if tag in ("main", "HEAD") or re.fullmatch(r"[0-9a-fA-F]{7,40}", tag):
        raise HubError(
            f"tag {tag!r}: would hide the branch or the commit of that name; choose another, such "
            f"as v1"
        )


def _check_owner(api: HfApi, repo_id: str) -> str:
    """The owner of the token, if the token may write to the destination."""
    who = ask(api, f"{repo_id}: cannot be published", api.whoami, reachable=False)
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


def _check_card(destination: Destination, card: Path) -> None:
    """Let the Hub check the card before anything is created; it knows every licence."""
    address = f"{destination.api.endpoint}/api/validate-yaml"
    content = {"content": card.read_text(encoding="utf-8"), "repoType": "model"}
    destination.ask(
        "not published", lambda: hf_raise_for_status(get_session().post(address, json=content))
    )


def _commit(destination: Destination, folder: Path, tag: str | None, message: str) -> str:
    """Make the repository hold exactly the files of a folder, and return the commit that does.

    May be repeated after any error: a commit whose answer was lost is found, and nothing that
    somebody else has pushed is overwritten.
    """
    api, repo_id = destination.api, destination.repo_id
    head = api.model_info(repo_id).sha
    assert head is not None  # every repository has a first commit
    changed, stale = _difference(destination, head, folder)
    if not changed and not stale:
        return head
    if head != destination.head:
        raise HubError(
            f"{repo_id}: somebody else has pushed to it in the meantime (now at {head}); nothing "
            f"of this model was published; the same command again publishes on top of that"
        )
    if tag in destination.tags:
        raise HubError(
            f"{repo_id}: the tag {tag} names other files; choose another tag; nothing was published"
        )
    additions = [CommitOperationAdd(path, folder / path) for path in changed]
    deletions = [CommitOperationDelete(path) for path in stale]
    sent = api.create_commit(
        repo_id, [*additions, *deletions], commit_message=message, parent_commit=head
    )
    changed, stale = _difference(destination, sent.oid, folder)
    if changed or stale:
        raise HubError(
            f"{repo_id}: commit {sent.oid} does not hold the files that were sent: "
            f"{', '.join([*changed, *stale])} differ; it is not tagged, do not use it"
        )
    return sent.oid


def _difference(
    destination: Destination, revision: str, folder: Path
) -> tuple[list[str], list[str]]:
    """Files of a folder that a revision lacks or has differently, and files that only it has."""
    found = destination.api.verify_repo_checksums(
        destination.repo_id, revision=revision, local_dir=folder
    )
    changed = [*found.extra_paths, *(entry["path"] for entry in found.mismatches)]
    stale = [path for path in found.missing_paths if path != _HUB_FILE]
    return changed, stale


def _tag(destination: Destination, commit: str, tag: str | None) -> str:
    """Tag a commit, unless it has the tag; returns the tag."""
    api, repo_id = destination.api, destination.repo_id
    tags = {found.name: found.target_commit for found in api.list_repo_refs(repo_id).tags}
    if tag is None:
        numbers = {int(name[1:]): name for name in tags if re.fullmatch(r"v\d+", name)}
        mine = [name for name in numbers.values() if tags[name] == commit]
        tag = mine[-1] if mine else f"v{max(numbers, default=0) + 1}"
    if tags.get(tag) != commit:
        api.create_tag(repo_id, tag=tag, revision=commit)
    return tag


def _try_out(destination: Destination, tag: str, checked: CheckedFolder, cache: Path) -> None:
    """Download by tag into an empty cache and compare."""
    name = f"{destination.repo_id} at {tag}"
    fetch_verified(destination.api, destination.repo_id, tag, cache)
    downloaded = {"local_files_only": True, "revision": tag, "cache_dir": cache}
    model = load_model(destination.repo_id, name, **downloaded)
    processor = load_processor(destination.repo_id, name, **downloaded)
    found, expected = run_once(model, processor, name), (checked.logits, checked.boxes)
    try:
        torch.testing.assert_close(dict(model.state_dict()), checked.weights, rtol=0, atol=0)
        torch.testing.assert_close(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE)
    except AssertionError as error:
        raise HubError(f"{name}: differs from the folder ({one_line(error)})") from error
