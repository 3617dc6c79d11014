"""What ``from_pretrained`` refuses. The library only warns when tensors are missing and goes on with random ones.

    >>> from hybrid_models import HybridLinearForCausalLM
    >>> HybridLinearForCausalLM.from_pretrained("half/downloaded")     # doctest: +SKIP
    ValueError: half/downloaded does not fit HybridLinearForCausalLM: missing tensors: model.norm.weight. ...

Where config.json says that another class was saved (the bare decoder, another task), heads may come and go: a head that is
not in the checkpoint starts anew, one that the model does not have is left out. A tied lm_head need not be stored.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

HEADS = {"lm_head", "score", "qa_outputs"}


class StrictLoading:
    """Goes before PreTrainedModel in a class's bases."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, output_loading_info=False, ignore_mismatched_sizes=False, **kwargs
    ):
        """As in transformers, but a checkpoint that does not fit raises.

        Args:
            output_loading_info: load it all the same, and return (model, what is missing and unexpected).
            ignore_mismatched_sizes: start tensors of another shape anew.

        Raises:
            ValueError: tensors are missing, unexpected or of another shape.
            OSError: a file is cut short; the message names it.
        """
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except SafetensorError as error:
            raise name_damaged_file(error, pretrained_model_name_or_path, kwargs) from error
        if output_loading_info and (ignore_mismatched_sizes or not info["mismatched_keys"]):
            return model, info
        refuse_misfits(model, info, pretrained_model_name_or_path, ignore_mismatched_sizes)
        return model


def refuse_misfits(model, info: dict, source, ignore_mismatched_sizes: bool) -> None:
    """Raise a ValueError that names the tensors in which checkpoint and model differ.

    Args:
        info: what ``from_pretrained(output_loading_info=True)`` says.
        source: what the caller named; None for a state dict.
    """
    missing, unexpected = info["missing_keys"], info["unexpected_keys"]
    if type(model).__name__ not in (model.config.architectures or []):
        base = f"{model.base_model_prefix}."
        own = {_first(name) for name in model.state_dict() if hasattr(model, base[:-1]) and not name.startswith(base)}
        missing = [name for name in missing if _first(name) not in own]
        unexpected = [name for name in unexpected if _first(name) not in HEADS]
    mismatched = [] if ignore_mismatched_sizes else info["mismatched_keys"]
    found = [
        f"{what}: {_listed(names)}"
        for what, names in (
            ("missing tensors", missing),
            ("unexpected tensors", unexpected),
            (
                "tensors of another shape",
                [f"{name} {list(saved)}, here {list(own)}" for name, saved, own in mismatched],
            ),
        )
        if names
    ]
    if not found:
        return
    raise ValueError(
        f"{source or 'The state dict'} does not fit {type(model).__name__}: {'; '.join(found)}. If the checkpoint is "
        "incomplete, download or save it again; if its config.json was edited, mixer, layer_types and sizes must be those "
        "it was trained with. output_loading_info=True loads it all the same and returns these lists, "
        "ignore_mismatched_sizes=True starts tensors of another shape anew."
    )


def name_damaged_file(error: SafetensorError, source, kwargs: dict) -> OSError:
    """The error to raise instead: safetensors does not say which file it could not read.

    Args:
        source, kwargs: of ``from_pretrained``.
    """
    try:
        folder = Path(source)
        if not folder.is_dir():
            wanted = {name: kwargs[name] for name in ("revision", "cache_dir") if kwargs.get(name) is not None}
            folder = Path(snapshot_download(str(source), local_files_only=True, **wanted))
    except (TypeError, ValueError, OSError):  # a state dict, or files that are no longer there
        return OSError(f"A file of {source} is cut short or damaged ({error}): download it again.")
    for path in sorted((folder / kwargs.get("subfolder", "")).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as reason:
            return OSError(
                f"{path} ({path.stat().st_size} bytes) is cut short or damaged ({reason}): download it again, with "
                "force_download=True from the Hub, or copy it again."
            )
    return OSError(f"A file of {source} is cut short or damaged ({error}): download it again.")


def _first(name: str) -> str:
    return name.split(".", 1)[0]


def _listed(names, most: int = 6) -> str:
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


__all__ = ["StrictLoading"]
