"""The memory-budget sweep: runs, records, report."""
