"""Before a byte moves: who pushes, whether they may, where to, and the card that will be there; errors as sentences."""

import re

import httpx2
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from moe_hf.errors import MoEError
from moe_hf.reporting.card import MoECard


logger = logging.get_logger(__name__)

# Of a file of the repository: what has a scheme lies elsewhere.
_PICTURE = re.compile(r"!\[[^\]]*\]\(([^()\s:]+)\)")
_STATUS_OF_XET = re.compile(r"HTTP status (?:client|server) error \((\d{3})")
LOGIN_HINT = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write."


def check_repo_id(repo_id: str) -> None:
    """Refuse what is no name of a repository, before any request.

    Raises:
        `MoEError`: with the rule that it breaks.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise MoEError(f"{repo_id!r} is no repository name: {error}") from error


def preflight_account(api: HfApi, repo_id: str) -> str:
    """The repository's full name, once its form is right and the token is accepted and may write.

    Raises:
        `MoEError`: a bad name; no token, a wrong one, or one that may only read.
    """
    check_repo_id(repo_id)
    try:
        account = api.whoami()
    except LocalTokenNotFoundError as error:
        raise MoEError(f"Not logged in at {api.endpoint}. {LOGIN_HINT}") from error
    except httpx2.HTTPError as error:
        raise explained(api, repo_id, error) from error
    role = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise MoEError(f"The token of {account['name']} may only read: nothing was sent. {LOGIN_HINT}")
    return repo_id if "/" in repo_id else f"{account['name']}/{repo_id}"


def open_repository(
    api: HfApi, repo_id: str, *, private: bool | None, revision: str | None, create_pr: bool = False
) -> None:
    """Make the repository and the branch where they are missing; a proposal needs no right to make what exists.

    Raises:
        `MoEError`: no right to, or `private=True` on a public repository.
    """
    if create_pr and revision not in (None, "main"):
        raise MoEError(f"A proposal is made against main: leave revision={revision!r} out, or create_pr.")
    try:
        if not (create_pr and api.repo_exists(repo_id)):
            api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise MoEError(
                f"{repo_id} exists and is public, and private=True was asked for: nothing was sent. Make it private in "
                "its settings, or push to another name."
            )
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    except httpx2.HTTPError as error:
        raise explained(api, repo_id, error) from error


def final_card(
    api: HfApi, repo_id: str, revision: str | None, card: ModelCard, tags: list[str], overwrite: bool
) -> ModelCard:
    """The card to push. One that people may have edited on the Hub stays, and gets the tags and results that it lacks.

    Results of the same task, data and metric are replaced by the new ones, as `huggingface_hub.metadata_update` does; the
    rest of the metadata and the text are left to who wrote them. A picture that only the new card shows is told in a warning.

    Args:
        card (`ModelCard`): the new one, which is pushed where there is none, or with `overwrite`.

    Returns:
        `ModelCard`, with the files that go beside the new card, if it has any.

    Raises:
        `MoEError`: the card on the Hub cannot be read.
    """
    if not overwrite:
        try:
            there = ModelCard.load(api.hf_hub_download(repo_id, "README.md", revision=revision))
            card = _kept_card(there, card, repo_id)
        except EntryNotFoundError:
            # The first push: the new card is used.
            pass
        except httpx2.HTTPError as error:
            raise explained(api, repo_id, error) from error
        except (ValueError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise MoEError(
                f"The card that is in {repo_id} has broken metadata ({reason}): repair it there, or pass "
                "overwrite_card=True."
            ) from error
    missing = [tag for tag in dict.fromkeys(tags) if tag not in (card.data.tags or [])]
    if missing:
        card.data.tags = [*(card.data.tags or []), *missing]
    return card


def _kept_card(there: ModelCard, new: ModelCard, repo_id: str) -> MoECard:
    kept = MoECard(str(there))
    kept.companions = getattr(new, "companions", {})
    results = list(there.data.eval_results or [])
    for result in new.data.eval_results or []:
        results = [old for old in results if not result.is_equal_except_value(old)] + [result]
    if results:
        kept.data.eval_results = results
        kept.data.model_name = there.data.model_name or new.data.model_name
    unseen = [name for name in _PICTURE.findall(new.text) if name not in there.content]
    if unseen:
        logger.warning(
            f"The card that is in {repo_id} stays as it is. {unseen[0]} is pushed, and the card does not show it: add "
            f"`![]({unseen[0]})` there, or pass overwrite_card=True."
        )
    return kept


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status behind an error of the client, which wraps those of its threads."""
    while error is not None:
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            return error.response.status_code
        # hf_xet has the status in its text alone.
        if found := _STATUS_OF_XET.search(str(error)):
            return int(found[1])
        error = error.__cause__
    return None


def explained(api: HfApi, repo_id: str, error: Exception, *, pulling: bool = False) -> MoEError:
    """One sentence about a failed request, and what to do."""
    status, what = status_of(error), "pull of" if pulling else "push to"
    said = " ".join((getattr(error, "server_message", None) or str(error).partition("\n")[0]).split()).rstrip(".")
    if pulling and isinstance(error, GatedRepoError | RepositoryNotFoundError):
        return MoEError(
            f"{repo_id} is not at {api.endpoint}, or the token may not read it. Check the name; {LOGIN_HINT}"
        )
    if status == 401:
        return MoEError(f"{api.endpoint} does not accept the token: {said}. {LOGIN_HINT}")
    if status == 403:
        verb, outcome = ("read", "Nothing was written") if pulling else ("write to", "Nothing was published")
        return MoEError(f"The token may not {verb} {repo_id}: {said}. {outcome}. {LOGIN_HINT}")
    if status == 412:
        return MoEError(
            f"{repo_id} was changed by somebody else during the push: {said}. Nothing of it was replaced; look at what "
            "is there, and push again (files that arrived are not sent a second time)."
        )
    if status is not None and status < 500 and status not in (408, 429):
        return MoEError(f"{api.endpoint} refused the {what} {repo_id} with status {status}: {said}.")
    again = "Pull again: files that are here" if pulling else "Push again: files that arrived"
    return MoEError(f"The {what} {repo_id} failed: {said}. {again} are not sent a second time.")
