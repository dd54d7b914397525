"""Where rollout and trainer part: what each module adds to the difference between the two."""
