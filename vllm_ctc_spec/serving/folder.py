"""Where the drafter is: in a folder, on the model hub, or inside the target's folder."""

from pathlib import Path
from typing import Any

from vllm_ctc_spec.drafter.config import DRAFTER_SUBFOLDER
from vllm_ctc_spec.errors import DrafterConfigError, shown


def find_drafter(model: Any, revision: str | None, target: str) -> Path:
    """The local folder of the drafter `model`, downloaded if need be (DrafterConfigError).

    model: a folder, or a name on the model hub in that `revision`; None: the drafter that the folder `target` carries.
    """
    if model is None:
        folder = Path(target) / DRAFTER_SUBFOLDER
        if not _is_folder(folder):
            raise DrafterConfigError(
                f'No CTC drafter given: add "model": DRAFTER to --speculative-config, or put the drafter into {folder}.'
            )
        return folder
    if not isinstance(model, str | Path):
        raise DrafterConfigError(
            f'"model" in --speculative-config is {shown(model)}; give the folder or the hub name of a CTC drafter.'
        )
    return Path(model) if _is_folder(Path(model)) else _download(model, revision)


def _download(model: str | Path, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        name = model if str(model).isprintable() else shown(model)
        raise DrafterConfigError(
            f"No CTC drafter at {name}: it is neither a folder nor a model that the hub could deliver "
            f"({type(error).__name__}); give the folder that `vllm-ctc train` wrote."
        ) from error


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        raise DrafterConfigError(
            f"The CTC drafter at {path} cannot be read ({error.strerror}); make it readable to this user."
        ) from error
