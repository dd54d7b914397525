"""The first-run check: what each machine of a run is, what would break the run, and what to do."""
