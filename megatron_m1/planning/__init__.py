"""What a run would take before anybody rents a machine: operations, memory, time, dollars.

Nothing here imports torch. Everything follows from sizes, degrees and the figures of a cluster.
"""
