"""Base classes of methods that differ in little."""
