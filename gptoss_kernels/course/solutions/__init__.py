"""One module a chapter: each exercise's solution under its own name, and its checker as `check_<name>`."""
