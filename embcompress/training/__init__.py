"""What happens to tables between the steps of an optimizer, and the recipe of a training."""

from embcompress.training.training_procedure import TrainingProcedure

__all__ = ["TrainingProcedure"]
