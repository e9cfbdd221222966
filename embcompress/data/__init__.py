"""Click logs for CTR models: preparation, memory-mapped columns, batches, splits."""

from embcompress.data.avazu import AvazuSettings, prepare_avazu
from embcompress.data.click_log import (
    Batch,
    ClickLog,
    ClickLogError,
    ClickLogWriter,
    Feature,
    Split,
)
from embcompress.data.criteo import CriteoSettings, prepare_criteo
from embcompress.data.delimited import MalformedRowsError
from embcompress.data.load import load_click_log
from embcompress.data.movielens import prepare_movielens
from embcompress.data.negatives import NegativeSampling
from embcompress.data.schema import ClickLogSchema, prepare_schema
from embcompress.data.synthetic import SyntheticSettings, prepare_synthetic

__all__ = [
    "AvazuSettings",
    "Batch",
    "ClickLog",
    "ClickLogError",
    "ClickLogSchema",
    "ClickLogWriter",
    "CriteoSettings",
    "Feature",
    "MalformedRowsError",
    "NegativeSampling",
    "Split",
    "SyntheticSettings",
    "load_click_log",
    "prepare_avazu",
    "prepare_criteo",
    "prepare_movielens",
    "prepare_schema",
    "prepare_synthetic",
]
