"""Agent Attention: a few agents between all queries and all keys."""

from diffattn.methods.agent.method import AgentAttn

__all__ = ["AgentAttn"]
