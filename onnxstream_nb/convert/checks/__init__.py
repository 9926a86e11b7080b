"""What `verify` looks at, a file for each kind of check."""
