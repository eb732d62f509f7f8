"""Files of a model on the Hugging Face hub, fetched one by one when first needed.

Honours what huggingface_hub honours: HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, its cache and its retries.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import (
    _CACHED_NO_EXIST,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from cluster.checkpoint.safetensors_file import InvalidCheckpoint

# The base error of whichever HTTP library this version of huggingface_hub is built on.
TransportError: type[BaseException] = HfHubHTTPError.__mro__[1]
PROBE_TIMEOUT_S = 4.0  # for the first answer; without one huggingface_hub would try again for half a minute


class HubFiles:
    """All files come from one commit: the one the first answer named."""

    def __init__(self, repo_id: str, revision: str | None = None) -> None:
        self.location = repo_id
        self._revision = revision
        self._is_reachable: bool | None = None  # not known before the first file

    def fetch(self, file_name: str) -> Path:
        """Raises InvalidCheckpoint if the repository lacks the file or the hub cannot be reached."""
        path = self.fetch_optional(file_name)
        if path is None:
            raise InvalidCheckpoint(f"{self.location}: the repository has no file {file_name}")
        return path

    def fetch_optional(self, file_name: str) -> Path | None:
        """None if the repository lacks the file. Raises InvalidCheckpoint if that cannot be found out."""
        try:
            with self._named_errors(file_name):
                is_offline = not self._can_reach_hub(file_name)
                path = Path(
                    hf_hub_download(self.location, file_name, revision=self._revision, local_files_only=is_offline)
                )
        except LocalEntryNotFoundError as error:
            if try_to_load_from_cache(self.location, file_name, revision=self._revision) is _CACHED_NO_EXIST:
                return None  # the hub once answered that there is none
            raise InvalidCheckpoint(
                f"{self.location}: {file_name} is neither in the local cache nor could the hub be reached "
                f"within {PROBE_TIMEOUT_S:g} s; connect, set HF_ENDPOINT to a mirror, or give a local folder's path"
            ) from error
        except EntryNotFoundError:
            return None
        self._revision = path.parent.name  # .../snapshots/<commit>/<file name>
        return path

    def has(self, file_name: str) -> bool:
        """Whether the repository has the file, which is not fetched; where the hub cannot be reached, the cache.

        Raises InvalidCheckpoint if that cannot be found out.
        """
        try:
            with self._named_errors(file_name):
                if not self._can_reach_hub(file_name):
                    return isinstance(try_to_load_from_cache(self.location, file_name, revision=self._revision), str)
                get_hf_file_metadata(
                    hf_hub_url(self.location, file_name, revision=self._revision), timeout=PROBE_TIMEOUT_S
                )
        except EntryNotFoundError:
            return False
        return True

    @contextmanager
    def _named_errors(self, file_name: str) -> Iterator[None]:
        """Errors as InvalidCheckpoint, but for that of a file that is not there."""
        try:
            yield
        except EntryNotFoundError:
            raise
        except RevisionNotFoundError as error:
            raise InvalidCheckpoint(f"{self.location}: no revision {self._revision!r} on the hub") from error
        except RepositoryNotFoundError as error:
            raise InvalidCheckpoint(
                f"{self.location}: no such folder here, and no such repository on the hub, or it is private (HF_TOKEN)"
            ) from error
        except HFValidationError as error:
            raise InvalidCheckpoint(f"{self.location}: neither a local folder nor a hub id: {error}") from error
        except (TransportError, OSError) as error:
            raise InvalidCheckpoint(f"{self.location}: {file_name} could not be fetched: {error}") from error

    def _can_reach_hub(self, file_name: str) -> bool:
        if self._is_reachable is None:
            self._is_reachable = self._answers(file_name)
        return self._is_reachable

    def _answers(self, file_name: str) -> bool:
        """Whether the hub can be reached. Raises HFValidationError."""
        url = hf_hub_url(self.location, file_name, revision=self._revision)
        try:
            get_hf_file_metadata(url, timeout=PROBE_TIMEOUT_S)
        except HfHubHTTPError:
            return True  # it has answered; what is wrong the fetch itself will find
        except (TransportError, OSError):
            return False
        return True
