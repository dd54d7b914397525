"""Weights between our checkpoints and the formats of others.

A format is a table of names (``families``) and a configuration (``words``). A conversion
(``convert``) goes through our parameters one at a time (``weights``), from tensors on one side
(``hf_folder``, ``distributed_folder``) to files on the other (``targets``).
"""
