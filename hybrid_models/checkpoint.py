"""Checkpoints as files: read tensor by tensor, checked before anything is believed, and written so that half is never whole.

A 1.3B checkpoint in float32 is 5.9 GB, more than many machines that convert it can hold. So a tensor stays in its file
until it is asked for (``LazyTensor``), and the writer asks for one at a time. What is read is distrusted: only
safetensors (a pickle can run code), only file names without a folder (an index could name ``../../etc``), no shard that
is cut short, no tensor twice. What is written goes to ``DESTINATION.partial`` and gets its name at the very end.

This module knows no format's names; ``fla_format`` does.

    >>> import torch
    >>> weight = LazyTensor.of(torch.arange(6.0).view(3, 2))
    >>> stack([weight, weight]).rows(2, 4)[...].tolist()
    [[4.0, 5.0], [0.0, 1.0]]
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging
from transformers.utils.hub import cached_files, extract_commit_hash, resolve_revision

logger = logging.get_logger(__name__)

# The floating types of safetensors that a language model's weights come in.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What Files passes on to the Hub's client.
DOWNLOAD = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download", "proxies")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class LazyTensor:
    """A tensor that is computed when it is indexed: ``lazy[...]``, which is how transformers reads a state dict.

    Args:
        shape, dtype: of the result.
        read: returns it.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, read: Callable[[], torch.Tensor]):
        self.shape, self.dtype, self.read = torch.Size(shape), dtype, read

    @classmethod
    def of(cls, tensor: torch.Tensor) -> LazyTensor:
        return cls(tensor.shape, tensor.dtype, lambda: tensor)

    def __getitem__(self, index) -> torch.Tensor:
        return self.read()[index]

    def __repr__(self) -> str:
        return f"LazyTensor({list(self.shape)}, {self.dtype})"

    @property
    def nbytes(self) -> int:
        return self.numel() * self.dtype.itemsize

    def numel(self) -> int:
        return math.prod(self.shape)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def to(self, dtype: torch.dtype) -> LazyTensor:
        return self if dtype == self.dtype else LazyTensor(self.shape, dtype, lambda: self.read().to(dtype))

    def rows(self, start: int, stop: int) -> LazyTensor:
        """Rows start to stop of dimension 0."""
        if (start, stop) == (0, self.shape[0]):
            return self
        return LazyTensor((stop - start, *self.shape[1:]), self.dtype, lambda: self.read()[start:stop])


def stack(tensors: list[LazyTensor]) -> LazyTensor:
    """Their concatenation on dimension 0. All must agree in the other dimensions; the widest dtype wins."""
    if len(tensors) == 1:
        return tensors[0]
    shape = (sum(t.shape[0] for t in tensors), *tensors[0].shape[1:])
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return LazyTensor(shape, dtype, lambda: torch.cat([t.read().to(dtype) for t in tensors]))


class Files:
    """The files of a checkpoint by name, in a local folder or on the Hub (all from one commit there).

    Args:
        source: folder or repo id.
        download: revision, subfolder, token, cache_dir, local_files_only, force_download, proxies, as in
            ``from_pretrained``.

    Raises:
        FileNotFoundError: ``source`` looks like a path and is not there. (A repo that cannot be reached raises OSError.)
    """

    def __init__(self, source: str | os.PathLike, **download):
        self.source = os.fspath(source)
        self.local = os.path.isdir(self.source)
        if not self.local and (os.path.exists(self.source) or self.source.startswith((".", "/", "~"))):
            raise FileNotFoundError(f"{self.source} is not a folder: name a checkpoint's folder, or a repo id.")
        self.download = download
        self.revision = None
        if not self.local:
            known = ("token", "local_files_only", "cache_dir")
            options = {name: download[name] for name in known if download.get(name) is not None}
            self.download["revision"] = resolve_revision(self.source, download.get("revision"), **options)

    @property
    def name(self) -> str:
        """The repo id, or the folder's own name: paths of a machine do not belong into a published file."""
        return Path(self.source).resolve().name if self.local else self.source

    def get(self, *names: str, required: bool = False) -> dict[str, Path]:
        """Local paths of those of ``names`` that exist. Only with ``required`` a Hub out of reach is told from no file."""
        strict = required and not self.local
        found = cached_files(self.source, list(names), _raise_exceptions_for_missing_entries=strict, **self.download)
        paths = {Path(path).name: Path(path) for path in found or ()}
        for path in paths.values():
            self.revision = self.revision or (None if self.local else extract_commit_hash(str(path), None))
        return paths

    def has(self, name: str) -> bool:
        """Whether there is such a file, without downloading it."""
        if self.local:
            return (Path(self.source) / (self.download.get("subfolder") or "") / name).is_file()
        path = "/".join(filter(None, (self.download.get("subfolder"), name)))
        try:
            token = self.download.get("token")
            return HfApi().file_exists(self.source, path, revision=self.download["revision"], token=token)
        except Exception:  # offline, say: this only words an error message
            return False

    def json(self, name: str) -> dict | None:
        """The object in file ``name``; None if there is no such file."""
        path = self.get(name, required=name == "config.json").get(name)
        if path is None:
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{name} of {self.source} is not JSON: {error}. Download it again.") from error
        if not isinstance(content, dict):
            raise ValueError(f"{name} of {self.source} holds {type(content).__name__}, not an object.")
        return content

    def weights(self) -> tuple[dict[str, Path], dict[str, str] | None]:
        """The safetensors files by name, and the index's map from tensor to file (None without an index).

        Raises:
            ValueError: pickled weights only, no weights, or an index that is damaged or names a file elsewhere.
        """
        single = self.get(SAFE_WEIGHTS_NAME)
        if single:  # the same preference as transformers
            return single, None
        index = self.json(SAFE_WEIGHTS_INDEX_NAME)
        if index is None:
            pickles = [name for name in PICKLES if self.has(name)]
            if pickles:
                raise ValueError(
                    f"{self.source} holds only pickled weights ({', '.join(pickles)}). A pickle can run any code when it is "
                    "read, so it is refused: load it where you trust it and save it with safe_serialization=True."
                )
            raise ValueError(
                f"{self.source} holds no weights: {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME} expected."
            )
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{SAFE_WEIGHTS_INDEX_NAME} of {self.source} has no weight_map. Download it again.")
        names = list(dict.fromkeys(weight_map.values()))
        for name in names:
            if not isinstance(name, str) or not re.fullmatch(r"[\w][\w.\-]*\.safetensors", name):
                raise ValueError(
                    f"{SAFE_WEIGHTS_INDEX_NAME} of {self.source} names the file {name!r}. Only a plain name that ends in "
                    ".safetensors, in the checkpoint's own folder, is read."
                )
        shards = self.get(*names, required=True)
        missing = [name for name in names if name not in shards]
        if missing:
            raise ValueError(
                f"{self.source} lacks {', '.join(missing)}, which {SAFE_WEIGHTS_INDEX_NAME} names. Download it again."
            )
        return shards, weight_map

    def weight_files(self) -> list[str]:
        """Names of the weight files, and of the index if there is one."""
        files, weight_map = self.weights()
        return list(files) + ([SAFE_WEIGHTS_INDEX_NAME] if weight_map else [])

    def tensors(self) -> dict[str, LazyTensor]:
        """Every tensor in the weight files, by its name there.

        Raises:
            ValueError: as ``weights``; a file that is cut short or is no safetensors; a tensor twice, or not where the
                index has it; a dtype that is no float.
        """
        files, weight_map = self.weights()
        tensors, origin = {}, {}
        for file_name, path in files.items():
            try:
                # pread, not mmap: pages of a mapped file count as resident memory, and there may be gigabytes of them.
                handle = safe_open(path, framework="pt", backend="pread")
            except SafetensorError as error:
                raise ValueError(
                    f"{file_name} of {self.source} is damaged ({path.stat().st_size} bytes: {error}). Download it again."
                ) from error
            for name in handle.keys():
                if name in origin:
                    raise ValueError(
                        f"{name} is in {origin[name]} and in {file_name} of {self.source}: which one holds?"
                    )
                origin[name] = file_name
                part = handle.get_slice(name)
                dtype = DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise ValueError(
                        f"{name} in {file_name} of {self.source} has dtype {part.get_dtype()}: only {', '.join(DTYPES)} "
                        "are weights that can be read. Dequantize it first."
                    )
                tensors[name] = LazyTensor(part.get_shape(), dtype, lambda h=handle, n=name: h.get_tensor(n))
        if weight_map is not None:
            wrong = [name for name in {**weight_map, **origin} if weight_map.get(name) != origin.get(name)]
            if wrong:
                raise ValueError(
                    f"{SAFE_WEIGHTS_INDEX_NAME} of {self.source} and the shards disagree about {some(wrong)}. Download it again."
                )
        return tensors

    def hashes(self, names: list[str]) -> dict[str, dict]:
        """Size and sha256 of the files that exist."""
        out = {}
        for name, path in sorted(self.get(*names).items()):
            with path.open("rb") as file:
                out[name] = {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        return out


def some(names: list[str], limit: int = 8) -> str:
    """The first ``limit`` names, and how many more there are."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def size_in_bytes(size: int | str) -> int:
    """5000, "5GB", "500MB", "100KB" or "5GiB" in bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", str(size).strip(), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"max_shard_size={size!r}: use a number of bytes, or a text such as '5GB' or '500MB'.")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))


def write_weights(tensors: dict[str, LazyTensor], folder: Path, max_shard_size: int | str = "5GB") -> list[str]:
    """Write ``tensors`` as safetensors shards with their index, holding one tensor at a time.

    Returns:
        the names of the files written.
    """
    limit, shards, size = size_in_bytes(max_shard_size), [{}], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    count = len(shards)
    names = (
        [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)] if count > 1 else [SAFE_WEIGHTS_NAME]
    )
    with logging.tqdm(total=len(tensors), desc="Writing tensors") as progress:
        for name, shard in zip(names, shards, strict=True):
            _write_safetensors(folder / name, shard, progress)
    if count > 1:
        index = {
            "metadata": {
                "total_parameters": sum(t.numel() for t in tensors.values()),
                "total_size": sum(t.nbytes for t in tensors.values()),
            },
            "weight_map": {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
        }
        write_json(folder / SAFE_WEIGHTS_INDEX_NAME, index)
        names.append(SAFE_WEIGHTS_INDEX_NAME)
    return names


def _write_safetensors(path: Path, tensors: dict[str, LazyTensor], progress) -> None:
    """One safetensors file: a length, a JSON header, then the bytes of each tensor.

    The library's own writer takes all tensors of a file at once. The order is the library's too, widest dtype first, so
    that every tensor is aligned to its element size.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        tensor = tensors[name]
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in order:
            value = tensors[name][...].contiguous()
            if value.shape != tensors[name].shape or value.dtype != tensors[name].dtype:
                raise RuntimeError(f"{name} became {list(value.shape)} {value.dtype}, announced as {tensors[name]}.")
            file.write(value.reshape(-1).view(torch.uint8).numpy())
            progress.update()


def write_json(path: Path, content: dict) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


@contextmanager
def finished_or_absent(destination: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write in, which is renamed to ``destination`` when the block ends well.

    Until then it is ``destination`` with ".partial" appended, whoever looks; left behind by a killed process, it is
    removed by the next one. All files reach the disk before the rename.

    Raises:
        FileExistsError: ``destination`` holds something already, and ``overwrite`` is false.
    """
    destination = Path(os.path.abspath(destination))
    if destination.is_file() or (destination.is_dir() and any(destination.iterdir()) and not overwrite):
        raise FileExistsError(f"{destination} exists already: choose another destination, or say overwrite.")
    partial = destination.with_name(destination.name + ".partial")
    if partial.exists():
        logger.warning(f"Removing {partial}, which an interrupted run left behind.")
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.iterdir(), partial):
            flush(path)
        old = destination.with_name(destination.name + ".old")
        if destination.is_dir():
            destination.rename(old)
        partial.rename(destination)
        flush(destination.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def flush(path: Path) -> None:
    """Have a file, or a directory's names, on the disk: a power cut after this does not undo it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = [
    "Files",
    "LazyTensor",
    "finished_or_absent",
    "flush",
    "size_in_bytes",
    "some",
    "stack",
    "write_json",
    "write_weights",
]
