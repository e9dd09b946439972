"""How matrices grow: the growth rules, apart from optimizers, hooks, processes and files."""

from .paper import PaperRule
from .rule import GrowthRule, Matrices, Matrix

__all__ = ["GrowthRule", "Matrices", "Matrix", "PaperRule"]
