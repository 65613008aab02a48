"""How fast sweeps, generation and training steps are, compared with other libraries."""
