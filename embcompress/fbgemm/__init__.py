"""Low-precision rows in FBGEMM's formats, and inference through its quantized tables.

The formats need torch alone; :class:`BatchedLookup` needs ``fbgemm-gpu`` or ``fbgemm-gpu-cpu``.
"""

from embcompress.fbgemm.rows import dequantize_rows, export_rows, import_rows, quantize_rows
from embcompress.fbgemm.serving import BatchedLookup

__all__ = ["BatchedLookup", "dequantize_rows", "export_rows", "import_rows", "quantize_rows"]
