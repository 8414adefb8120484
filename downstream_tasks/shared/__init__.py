"""What the tasks share: flags, processes, data, the training loop, and the table of what a cache costs."""
