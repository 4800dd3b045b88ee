"""What decides and never does: no clock, thread, socket, environment or broker; `now` is an argument."""
