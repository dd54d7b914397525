"""Runs on many machines: jobs for Slurm, their launcher, what failed in them, and the first-run
check."""
