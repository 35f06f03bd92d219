"""Proofs about masks: index algebra, clauses, terms."""
