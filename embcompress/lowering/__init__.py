"""Plans as lookups in plain tables, for engines that have nothing else (TorchRec, FBGEMM).

:mod:`embcompress.lowering.tables` says which tables there are and what is read from them,
:mod:`embcompress.lowering.readers` turns ids into rows to read and what was read into vectors.
"""
