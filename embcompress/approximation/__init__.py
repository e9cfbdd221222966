"""Stores that come close to a trained table, and samples of what ids occur with."""
