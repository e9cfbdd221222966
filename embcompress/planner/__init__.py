"""The planner: who gets which width, bits and sharing, under one budget; see docs/planner.md."""
