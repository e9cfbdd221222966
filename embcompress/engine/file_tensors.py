"""Tensors whose memory is a mapped file: the pages that are read or written come and go."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_PREFIX = "embcompress-"


def file_tensor(
    shape: Sequence[int], dtype: torch.dtype, directory: str | os.PathLike[str] | None = None
) -> Tensor:
    """Zeros in a file of their own, which takes its whole size on the disk at once.

    The file has no name any more when this returns: it goes with the last tensor that shares the
    memory, also where the process is killed. The operating system keeps the pages that are used in
    its cache as long as there is room, and writes changed ones back. It is told that reads are
    random, so that it fetches no neighbours.

    Args:
        shape: of the tensor; not empty.
        dtype: of the tensor.
        directory: on a local disk; None: that of temporary files, ``TMPDIR``. A directory in memory
            (tmpfs) saves none.

    Returns:
        A tensor on the CPU, contiguous.

    Raises:
        OSError: of the fitting kind, where the directory does not exist or cannot be written, or
            the disk has no room.
    """
    folder = Path(tempfile.gettempdir() if directory is None else directory)
    size = torch.Size(shape).numel() * dtype.itemsize
    try:
        if shutil.disk_usage(folder).free < size:  # before anything is taken from others
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        descriptor, path = tempfile.mkstemp(prefix=_PREFIX, dir=folder)
    except OSError as error:
        raise _explained(error, folder, size) from error
    try:
        _reserve(descriptor, size)
        flat = torch.from_file(path, shared=True, size=size // dtype.itemsize, dtype=dtype)
    except OSError as error:
        raise _explained(error, folder, size) from error
    finally:
        os.close(descriptor)
        os.unlink(path)
    _read_at_random(flat, size)
    return flat.view(*shape)


def is_in_file(tensor: Tensor) -> bool:
    """Whether the memory of a tensor is a file of :func:`file_tensor`, not a copy in memory."""
    return directory_of(tensor) is not None


def directory_of(tensor: Tensor) -> str | None:
    """The directory of a tensor's file; None where it has none."""
    if tensor.device.type != "cpu":
        return None
    folder, name = os.path.split(tensor.untyped_storage().filename or "")
    return folder if name.startswith(_PREFIX) else None


def zeros_beside(tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros on the device of a tensor; in a file of the same directory, if it is in one."""
    directory = directory_of(tensor)
    if directory is None:
        return torch.zeros(tuple(shape), dtype=dtype, device=tensor.device)
    return file_tensor(shape, dtype, directory)


def move_to_file(tensor: Tensor, directory: str | os.PathLike[str] | None) -> None:
    """Put the numbers of a tensor on the CPU into a file; the object stays the same."""
    mapped = file_tensor(tensor.shape, tensor.dtype, directory)
    mapped.copy_(tensor.detach())
    tensor.data = mapped


def _reserve(descriptor: int, size: int) -> None:
    """Give a file its size, and room on the disk: a page without room would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:  # not on macOS
        os.truncate(descriptor, size)


def _read_at_random(tensor: Tensor, size: int) -> None:
    """Advice only: where the system does not take it, reads fetch neighbouring pages, too."""
    advice = getattr(mmap, "MADV_RANDOM", None)
    if advice is not None:
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        madvise(tensor.data_ptr(), size, advice)


def _explained(error: OSError, folder: Path, size: int) -> OSError:
    """The same kind of error, saying what was wanted and what can be done."""
    remedy = "name another directory"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        remedy = "free some room, or name a directory on a larger disk"
    reason = os.strerror(error.errno) if error.errno else str(error)
    return OSError(
        error.errno or errno.EIO,
        f"rows of {size} bytes cannot be kept in a file in directory {str(folder)!r} ({reason}); "
        f"{remedy}",
    )
