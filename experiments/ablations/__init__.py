"""Which mixer is better at a task: grids of small runs, compared fairly."""
