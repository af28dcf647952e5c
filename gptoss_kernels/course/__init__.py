"""What the notebooks import beside the package itself: set-up, exercises' checks, plots."""
