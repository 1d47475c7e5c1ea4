"""What networks write in torch's operators becomes cmfast's: one file a pattern.

A pattern is a pass as those of `passes` are: it rewrites the graph, which computes the same, and says how often.
"""
