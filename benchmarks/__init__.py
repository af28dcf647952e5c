"""One script a table or figure. Run them from the repository's root; rows go to benchmarks/results/."""
