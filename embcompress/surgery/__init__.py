"""``compress()``: find the tables of a model, plan, swap them, and report."""

from embcompress.surgery.compression_report import CompressionReport
from embcompress.surgery.swapping import compress

__all__ = ["CompressionReport", "compress"]
