"""Modules that hold and read the stores of a plan, their start values and fused optimizer."""
