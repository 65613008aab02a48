"""One file a command: its settings go in, its result comes out. What is heavy is imported when a command runs."""
