"""Where a name leads: the embedded model, a folder, a local conversion, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import errno
import importlib.resources
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bigbigan import integrity, modelfolder
from bigbigan.config import PARTS, BigBiGANConfig, GraphConfig, ModelInfo, select_parts
from bigbigan.integrity import WeightsError, cache_dir
from bigbigan.modelcard import model_card
from bigbigan.presets import EMBEDDED, PRESETS, HubEntry, get_preset, normalize
from bigbigan.schema import ConfigError

logger = logging.getLogger(__name__)

COMMIT = re.compile(r"[0-9a-f]{40}")
RELEASED = ("bigbigan-resnet50", "bigbigan-revnet50x4")  # by DeepMind, as TF-Hub modules
ATTEMPTS, RETRY_SECONDS = 4, 10.0  # versions of the client differ in what they repeat, and for how long
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


class DownloadError(OSError):
    """A model that cannot be had from the Hub; the message says what to do."""


class UploadError(OSError):
    """A model that cannot be put on the Hub; the message says what to do."""


@dataclass(frozen=True)
class _Repository:
    """What every request to the client takes."""

    repo_id: str
    revision: str | None
    cache_dir: str | os.PathLike[str] | None
    token: str | bool | None = field(repr=False)
    local_files_only: bool


@dataclass(frozen=True)
class Located:
    """Where a model is."""

    folder: Path
    verify: bool  # its weights have still to be verified
    remember: bool  # and that they were may be written down


def locate(
    name: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    parts: Sequence[str] | None = None,
) -> Located:
    """The local folder that `load` reads; what comes from the Hub is downloaded and verified.

    Raises:
        ValueError, FileNotFoundError, DownloadError, ConfigError, WeightsError: as `bigbigan.load`.
    """
    folder, checked = _locate(name, _Repository("", revision, cache_dir, token, local_files_only), parts)
    return Located(folder, not checked, folder != _embedded())


def resolve(name: str | os.PathLike[str] | None = None, **options: Any) -> Path:
    """The folder that `locate` finds."""
    return locate(name, **options).folder


def has_weights(name: str) -> bool:
    """Whether a preset's weights are in the package, in the local model cache, or in a registered repository.

    Raises:
        ValueError: unknown name.
    """
    preset = get_preset(name)
    folder = _embedded() if preset.name == EMBEDDED else _converted(preset.name)
    return (folder / modelfolder.CONFIG_NAME).exists() or preset.hub is not None


def _locate(name: str | os.PathLike[str] | None, client: _Repository, parts: Sequence[str] | None) -> tuple[Path, bool]:
    """The folder, and whether its weights have been verified already."""
    if name is None:
        _refuse_revision(client, "the embedded model")
        return _embedded(), False
    folder = Path(name).expanduser()
    preset = isinstance(name, str) and normalize(name) in PRESETS
    if isinstance(name, os.PathLike) or folder.is_dir() or _looks_like_path(name):
        if not folder.is_dir():
            raise modelfolder.missing_folder(folder)
        if not preset or (folder / modelfolder.CONFIG_NAME).is_file():
            if preset:
                logger.info("%s: the folder of that name here, not the model that `bigbigan list` shows", name)
            _refuse_revision(client, f"the folder {folder}")
            return folder, False
        logger.warning("%s: the folder of that name here holds no model, so the named model is meant", name)
    if preset and normalize(str(name)) == EMBEDDED:
        _refuse_revision(client, "the embedded model")
        return _embedded(), False
    name = str(name)
    name, at, revision = name.partition("@")
    if at:
        if not revision:
            raise ValueError(
                f"{name}@ names no revision behind the @; give a branch, a tag or a commit, or leave it out"
            )
        if client.revision not in (None, revision):
            raise ValueError(f"{name}@{revision} and revision={client.revision!r} do not agree; give one revision")
        client = replace(client, revision=revision)
    if "/" in name:
        return _from_hub(replace(client, repo_id=name), None, parts), True
    return _preset(name, client, parts)


def _preset(name: str, client: _Repository, parts: Sequence[str] | None) -> tuple[Path, bool]:
    try:
        preset = get_preset(name)
    except ValueError as error:
        text = str(error) if str(error).endswith("?") else f"{error}."
        raise ValueError(f"{text} A name may also be a folder, or a repository as 'org/name'") from error
    local = _converted(preset.name)
    if client.revision is None and (local / modelfolder.CONFIG_NAME).exists():
        return local, False
    entry, organization = preset.hub, os.environ.get("BIGBIGAN_HUB_ORG")
    if entry is not None and client.revision in (None, entry.revision):
        return _from_hub(replace(client, repo_id=entry.repo_id, revision=entry.revision), entry, parts), True
    if entry is not None or organization:
        repo_id = entry.repo_id if entry is not None else f"{organization}/{preset.name}"
        return _from_hub(replace(client, repo_id=repo_id), None, parts), True
    if preset.name in RELEASED:
        how = f"Convert DeepMind's release: pip install 'bigbigan[convert]' && bigbigan convert {preset.name}"
    else:
        how = f"Nobody has published its weights: train it, or start from create_model({preset.name!r})"
    raise FileNotFoundError(
        f"{preset.name} is not in {local.parent}, and no repository is registered for it.\n{how}.\n"
        f"Or name a repository: load('org/{preset.name}'), or set BIGBIGAN_HUB_ORG=org"
    )


def _from_hub(source: _Repository, entry: HubEntry | None, parts: Sequence[str] | None) -> Path:
    """The snapshot folder with `config.json` and the wanted parts, all of one commit, verified."""
    config_path = _download(source, modelfolder.CONFIG_NAME)
    with _discarding(config_path):
        described = modelfolder.read_config(config_path)
    folder = config_path.parent
    if COMMIT.fullmatch(folder.name):  # a branch may move between two downloads
        source = replace(source, revision=folder.name)
    for part in select_parts(parts, described.files, source.repo_id):
        if isinstance(graph := getattr(described.config, part), GraphConfig):
            path = _download(source, modelfolder.graph_file(part))
            with _discarding(path, config_path):
                modelfolder.read_graph_file(folder, part, graph)
        path, file = _download(source, modelfolder.weight_file(part)), described.files[part]
        # The wrong one of the two may be config.json: a branch that moved between the client's two requests for it
        # leaves one commit's file under another's name.
        with _discarding(path, config_path):
            if entry is not None and entry.sha256.get(part) != file.sha256:
                raise WeightsError(f"{path} is not the registered {part}: sha256 {file.sha256}")
            integrity.read_header(path)
            modelfolder.verify_part(folder, part, file)
    return folder


@contextmanager
def _discarding(*paths: Path) -> Iterator[None]:
    """Removes downloaded files that prove bad or do not fit each other, so that the next call fetches them anew."""
    try:
        yield
    except (ConfigError, WeightsError) as error:
        for path in paths:
            blob = path.resolve()  # the cache has the content in blobs/, and a link to it in snapshots/
            for file in (path, blob):
                file.unlink(missing_ok=True)
        advice = "What was downloaded was removed from the cache: load again to download it anew"
        raise type(error)(f"{error}. {advice}") from error


def _download(source: _Repository, filename: str) -> Path:
    """A file from the cache or the Hub; without a request where none is needed."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    where: dict[str, Any] = {"repo_id": source.repo_id, "filename": filename}
    where |= {"revision": source.revision, "cache_dir": source.cache_dir}
    described = f"{filename} of {source.repo_id} at revision {source.revision or 'main'}"
    offline = source.local_files_only or constants.HF_HUB_OFFLINE
    if offline or COMMIT.fullmatch(source.revision or ""):
        # `hf_hub_download` may open a connection for its user agent even if the file is there.
        cached = huggingface_hub.try_to_load_from_cache(**where)
        if isinstance(cached, str):
            return Path(cached)
        if offline:
            raise DownloadError(
                f"{described} is not in the cache, and downloads are off (local_files_only or HF_HUB_OFFLINE). "
                "Load it once with a connection"
            )
    start = time.monotonic()
    for attempt in range(ATTEMPTS):
        try:
            return Path(huggingface_hub.hf_hub_download(**where, token=source.token))
        except errors.HFValidationError:  # a ValueError that says what a name may be
            raise
        except Exception as error:  # the transports of the client's versions (requests, httpx) share no base class
            if attempt == ATTEMPTS - 1 or time.monotonic() - start > RETRY_SECONDS or _is_final(error):
                raise DownloadError(f"{described}: {_advice(error, source, filename)}") from error
            logger.warning("%s: %s; trying again", described, error)
            time.sleep(2**attempt / 2)
    raise AssertionError("unreachable")


def _origin(error: Exception) -> BaseException:
    """The client says that a file is not in its cache whatever was wrong with the request; the cause tells."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    return error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error


def _is_final(error: Exception) -> bool:
    """Whether asking again is of no use: the Hub said no, or the disk did."""
    origin = _origin(error)
    status = getattr(getattr(origin, "response", None), "status_code", 500)
    return status < 500 or (isinstance(origin, OSError) and origin.errno in DISK_ERRORS)


def _advice(error: Exception, source: _Repository, filename: str) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return f"access is restricted; ask for it at {constants.ENDPOINT}/{source.repo_id} and pass its token="
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private: check the name, or pass token= (or `hf auth login`)"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision; give a branch, a tag or a commit, or leave it out"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        if filename == modelfolder.CONFIG_NAME:
            return "the repository has no such file, so it is not a bigbigan model folder"
        return f"{modelfolder.CONFIG_NAME} lists this file, but the repository lacks it: its upload is not complete"
    origin = _origin(error)
    text = f"{type(origin).__name__}: {' '.join(str(origin).split())[:300]}"
    if isinstance(origin, OSError) and origin.errno in DISK_ERRORS:
        return f"{text}. Make room, or name another folder by cache_dir= or HF_HOME"
    return f"{text}. Check the connection, the proxy and HF_ENDPOINT (now {constants.ENDPOINT}), then try again"


def push_to_hub(
    repo_id: str,
    config: BigBiGANConfig,
    info: ModelInfo,
    states: Mapping[str, modelfolder.State],
    *,
    graphs: Mapping[str, bytes] | None = None,
    token: str | bool | None = None,
    private: bool = False,
    commit_message: str = "Upload BigBiGAN model",
    revision: str | None = None,
) -> str:
    """Puts the model folder into a repository (made if need be) as one commit, and returns the repository's URL.

    Parts that the repository had and the model has not are deleted in the same commit.

    Raises:
        UploadError: if the Hub refuses or cannot be reached.
        ConfigError, WeightsError: as `modelfolder.save_folder`.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        card = model_card(config, info, states, repo_id)
        modelfolder.save_folder(folder, config, info, states, graphs=graphs, card=card)
        names = sorted(path.name for path in folder.iterdir())
        try:
            url = str(api.create_repo(repo_id, private=private, exist_ok=True))
            present = api.list_repo_files(repo_id, revision=revision)
            known = [name for part in PARTS for name in (modelfolder.weight_file(part), modelfolder.graph_file(part))]
            stale = [name for name in known if name in present and name not in names]
            # Not `upload_folder`: it may split an upload into several commits.
            api.create_commit(
                repo_id,
                [
                    *(CommitOperationAdd(name, folder / name) for name in names),
                    *(CommitOperationDelete(name) for name in stale),
                ],
                commit_message=commit_message,
                revision=revision,
            )
        except Exception as error:  # as in `_download`
            text = " ".join(str(error).split())[:300]
            raise UploadError(
                f"{repo_id} at revision {revision or 'main'}: {type(error).__name__}: {text}. "
                "Check that the revision exists and that the token may write (`hf auth login`, or token=)"
            ) from error
    return url


def _embedded() -> Path:
    return Path(str(importlib.resources.files("bigbigan") / "assets" / EMBEDDED))


def _converted(name: str) -> Path:
    return cache_dir() / "models" / name


def _looks_like_path(name: str) -> bool:
    slashes = name.partition("@")[0].count("/")  # a revision may have some of its own
    return name.startswith((".", "/", "~")) or slashes > 1 or "\\" in name or name.endswith("/")


def _refuse_revision(client: _Repository, what: str) -> None:
    if client.revision is not None:
        raise ValueError(f"{what} has no revisions; leave out revision={client.revision!r}")
