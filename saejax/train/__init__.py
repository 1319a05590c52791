"""Training: schedules, state, step, resampling, checkpoints and the loop that joins them."""
