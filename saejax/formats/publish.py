"""A release directory -> a Hugging Face repository, in one commit. Says what it would do unless it is told to do it."""

import json
import re
from pathlib import Path

from saejax.base.assets import published
from saejax.base.errors import FormatError
from saejax.base.storage import is_writer
from saejax.formats import saelens, saelens_read
from saejax.sae.inference import SAEConfig

FILES = (saelens.CONFIG, "metrics.json", "README.md")  # the only ones that are uploaded, and the weights
_REPO = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.\-+]*")


def publish(directory: Path, repo: str, licence: str | None = None, *, upload: bool = False) -> str:
    """What is (upload) or would be written to `repo`, as text. The README gets a header with model, tags and the licence.

    Raises `FormatError` for a directory that is no release of saejax or does not verify, a malformed name, and what the hub
    refuses.
    """
    directory = Path(directory)
    if not _REPO.fullmatch(repo):
        raise FormatError(f"repo={repo}: expected ORG/NAME (letters, digits, '_', '.', '-')")
    if licence is not None and not _LICENCE.fullmatch(licence):
        raise FormatError(f"license={licence}: expected an identifier of the hub, such as apache-2.0")
    if not saelens.is_release(directory):
        raise FormatError(f"{directory}: not a release; make one with `saejax release RUN`")
    cfg = saelens_read.verify(directory)
    if not any(name in cfg.metadata for name in saelens.DIGESTS):
        raise FormatError(f"{directory}: was not written by saejax; only its own releases are published, whose digest can be "
                          "verified")
    files = {name: (directory / name).read_bytes() for name in FILES if (directory / name).is_file()}
    files["README.md"] = _header(cfg, licence).encode() + files.get("README.md", b"")
    files |= {name: directory / name for name in saelens.weights(cfg)}
    listed = "\n".join(f"  {name:<{max(map(len, files))}} {_size(data):>13,} bytes" for name, data in files.items())
    if not upload:
        return (f"would write to https://huggingface.co/{repo}:\n{listed}\nlicence: {licence or 'none declared'}\n"
                "nothing was uploaded")
    return f"wrote {_commit(repo, files)}\n{listed}" if is_writer() else ""


def _size(data: bytes | Path) -> int:
    return data.stat().st_size if isinstance(data, Path) else len(data)


def _header(cfg: SAEConfig, licence: str | None) -> str:
    """The YAML block that the hub reads. JSON strings are YAML strings, so no name can break out of its value."""
    model = published(cfg.model)
    lines = ["library_name: saejax", "tags:", "- sparse-autoencoder", "- saelens", "- interpretability"]
    lines += [f"license: {json.dumps(licence)}"] if licence else []
    lines += [f"base_model: {json.dumps(model)}"] if _REPO.fullmatch(model) else []
    return "---\n" + "\n".join(lines) + "\n---\n\n"


def _commit(repo: str, files: dict[str, bytes | Path]) -> str:
    import huggingface_hub
    from huggingface_hub import errors
    api = huggingface_hub.HfApi()
    operations = [huggingface_hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in files.items()]
    try:
        api.create_repo(repo, exist_ok=True)
        return str(api.create_commit(repo, operations, commit_message="Release written by saejax").commit_url)
    except (errors.HfHubHTTPError, errors.LocalTokenNotFoundError, errors.OfflineModeIsEnabled, OSError, ValueError) as error:
        raise FormatError(f"{repo}: the hub did not take it ({type(error).__name__}: {' '.join(str(error).split())[:200]}); "
                          "check the name, "
                          "the network and `hf auth login`") from error
