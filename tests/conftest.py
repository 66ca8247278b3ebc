"""Read by pytest before any test; standing here, it puts `tests/` on the path, so that tests can `import families`."""
