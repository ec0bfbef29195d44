"""Seconds and bytes: what compute, communication and memory cost on a described cluster. Needs no torch."""
