"""What each stage measures: tasks, heads, patching, tracing, dictionaries, steering, restoration."""
