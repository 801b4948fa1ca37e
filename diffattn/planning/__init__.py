"""What a method costs before anything runs: plans of models, and estimates where data decide."""

from diffattn.planning.costs import Cost, Estimate
from diffattn.planning.plans import Plan, model_shape, plan

__all__ = ["Cost", "Estimate", "Plan", "model_shape", "plan"]
