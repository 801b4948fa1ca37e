"""The cost of a method before anything runs: plans of masks, and estimates of other methods."""

from diffattn.planning.costs import Cost, Estimate
from diffattn.planning.plans import Plan, model_shape, plan

__all__ = ["Cost", "Estimate", "Plan", "model_shape", "plan"]
