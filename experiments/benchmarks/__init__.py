"""How fast sweeps, generation and training steps are, beside other libraries."""
