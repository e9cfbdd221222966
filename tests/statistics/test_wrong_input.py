"""Wrong batches and arguments are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import embcompress as ec
from embcompress import Profile, ProfileSettings
from embcompress.data import ClickLog


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"x": np.array([0, 10])}, IndexError, r"'x': id 10 is outside \[0, 10\)"),
        ({"x": np.array([-1, 0])}, IndexError, "id -1"),
        ({"x": np.array([0.5])}, TypeError, "int32 or int64, got float64"),
        ({"x": [1, 2]}, TypeError, "tensor or an array, got list"),
        ({"y": np.array([1])}, ValueError, "features"),
        ({"x": (torch.arange(3), torch.tensor([0, 5]))}, ValueError, "'x': .*offset"),
        ((np.arange(3), np.arange(3)), TypeError, "a tuple with one such mapping"),
        (3, TypeError, "got int"),
    ],
)
def test_wrong_batches_are_refused_whole(
    batch: object, error: type[Exception], message: str
) -> None:
    profile = Profile({"x": 10})
    with pytest.raises(error, match=message):
        profile.update(batch)
    assert profile.rows == 0 and profile.counts("x").sum() == 0


def test_wrong_arguments_are_refused(log: ClickLog) -> None:
    one = {"x": np.arange(3)}
    with pytest.raises(ValueError, match="different numbers of rows"):
        ec.profile({**one, "y": np.arange(4)}, progress=False)
    with pytest.raises(ValueError, match="no batches"):
        ec.profile([], progress=False)
    with pytest.raises(ValueError, match="num_embeddings names"):
        ec.profile(one, num_embeddings={"z": 3}, progress=False)
    with pytest.raises(ValueError, match="click log only"):
        ec.profile(one, rows=range(2), progress=False)
    with pytest.raises(ValueError, match="knows its own"):
        ec.profile(log, num_embeddings={"id_0": 3}, progress=False)
    with pytest.raises(TypeError, match="got int"):
        ec.profile(7, progress=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="times must be given"):
        Profile({"x": None}, has_times=True).update(one)
    with pytest.raises(ValueError, match="pass it"):
        ec.profile(one, progress=False).counts("x")
    with pytest.raises(ValueError, match="has ids of 2 and above"):
        ec.profile(one, progress=False).counts("x", 2)
    with pytest.raises(KeyError, match="no feature 'z'"):
        ec.profile(one, progress=False).counts("z")
    for wrong in ({"sketch_columns": 1000}, {"slices": 1}, {"seed": 2**63}, {"exact_ids": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ProfileSettings(**wrong)  # type: ignore[arg-type]
