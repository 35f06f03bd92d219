"""Where query, key and value come from."""
