"""Policies: methods by layer, by range of steps and by head."""

from __future__ import annotations

from diffattn.methods.policy.method import Policy
from diffattn.methods.policy.recorded import Recorded
from diffattn.methods.policy.rules import Phase, Rule

__all__ = ["Phase", "Policy", "Recorded", "Rule"]
