"""Where programs that a model wrote are run: apart from this machine's files, secrets and network,
and within limits.
"""
