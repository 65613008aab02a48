"""Prompts of tens of thousands of tokens: which earlier blocks attention reads, without a matrix of all positions.

May import the rooms below measure.
"""
