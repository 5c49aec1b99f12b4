"""Introspective-consistency training: teach a model, or a gated adapter beside it, to draft at mask slots."""
